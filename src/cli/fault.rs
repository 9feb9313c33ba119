//! Level 7. When a mapped file fails: it was made shorter, or its disk cannot be read. The system says so by a signal, SIGBUS,
//! which would end the program without a word.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Iterations that are done, for the message.
pub(super) static STEP: AtomicUsize = AtomicUsize::new(0);

/// The end of the message: where training can go on.
static GO_ON: OnceLock<String> = OnceLock::new();

/// From now on such a failure ends the program with an error that says after which iteration, and how to go on.
#[cfg(unix)]
pub(super) fn explain(go_on: String) {
    use signal_hook::consts::SIGBUS;
    use signal_hook::low_level::{exit, register};

    // The first training of a process has said it.
    let _ = GO_ON.set(go_on);
    let message = || {
        say(b"error: a mapped data file became shorter, or its disk cannot be read, after iteration ");
        let (mut digits, mut rest, mut begin) = ([b'0'; 20], STEP.load(Ordering::Relaxed), 19);
        digits[begin] += (rest % 10) as u8;
        while rest > 9 {
            rest /= 10;
            begin -= 1;
            digits[begin] += (rest % 10) as u8;
        }
        say(&digits[begin..]);
        say(GO_ON.get().map_or(&b""[..], |text| text.as_bytes()));
        say(b"\n");
        exit(1);
    };
    // SAFETY: what runs in the handler takes no lock and no memory: atomics, an array on the stack, write(2) and _exit(2). It does
    // not return to what cannot be gone on with.
    let registered = unsafe { register(SIGBUS, message) };
    // Where the system refuses, the program ends without a word, as it would anyway.
    drop(registered);
}

#[cfg(not(unix))]
pub(super) fn explain(_: String) {}

/// To stderr, from within a signal handler.
#[cfg(unix)]
fn say(text: &[u8]) {
    // SAFETY: the pointer and the length are those of a slice. Nothing can be done if nobody reads it.
    let _ = unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}
