//! Level 7. Ctrl-C.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::INTERRUPTED;

/// Ctrl-C: the first one asks for an end, the second one is the end. So is the first, once nobody listens any more.
pub(super) struct Interrupt {
    came: Arc<AtomicBool>,
}

impl Interrupt {
    pub(super) fn listen() -> Self {
        let came = Arc::new(AtomicBool::new(false));
        let flag = came.clone();
        // Where the system refuses, Ctrl-C ends the program as it does anyway.
        let _ = ctrlc::set_handler(move || {
            if flag.swap(true, Ordering::SeqCst) {
                std::process::exit(INTERRUPTED.into());
            }
        });
        Interrupt { came }
    }

    pub(super) fn came(&self) -> bool {
        self.came.load(Ordering::SeqCst)
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        self.came.store(true, Ordering::SeqCst);
    }
}
