//! Which threads compute, and how a fork finds them.
//!
//! A fork copies the thread that asks for it and no other. So a pool is for the process that made it, and a fork waits until
//! nothing computes: what a thread has locked just then, in the allocator of OpenBLAS for instance, would stay locked in the
//! child for ever. Whoever holds a lock of this crate holds the GIL, which a fork needs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use gemmnet::parallel::{Threads, thread_count};
use pyo3::prelude::*;

use crate::errors::{gave_up, raised};

/// The threads of a process, by their number. They are never dropped: a child has no threads of its parent that could end.
struct Pool {
    process: u32,
    count: usize,
    threads: &'static Threads,
}

static POOLS: Mutex<Vec<Pool>> = Mutex::new(Vec::new());

/// What is behind a lock of this crate. The token is for the rule that whoever has one holds the GIL.
pub(crate) fn lock<'a, T>(_py: Python<'_>, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `count` threads of this process; all who ask for so many share them. A thread that waits for the rest of its work takes up
/// other work meanwhile, and goes on when that is done: nothing that runs there may wait for anything else.
fn pool(py: Python<'_>, count: usize) -> PyResult<&'static Threads> {
    let process = std::process::id();
    let mut pools = lock(py, &POOLS);
    if let Some(pool) = pools.iter().find(|pool| pool.process == process && pool.count == count) {
        return Ok(pool.threads);
    }
    let threads = Box::leak(Box::new(Threads::new(count).map_err(raised)?));
    pools.push(Pool { process, count, threads });
    Ok(threads)
}

/// How many threads to use: `asked` if given, else what `GEMMNET_NUM_THREADS` says when this is first asked, else one per
/// core that this process may use.
pub(crate) fn count(py: Python<'_>, asked: Option<usize>) -> PyResult<usize> {
    // Asking the system takes longer than a small convolution.
    static DEFAULT: Mutex<Option<usize>> = Mutex::new(None);
    if asked.is_some() {
        return thread_count(asked).map_err(raised);
    }
    let mut default = lock(py, &DEFAULT);
    if default.is_none() {
        *default = Some(thread_count(None).map_err(raised)?);
    }
    Ok(default.unwrap_or(1))
}

/// How many compute, or are about to.
static RUNNING: AtomicUsize = AtomicUsize::new(0);
/// How many forks are under way.
static FORKING: AtomicUsize = AtomicUsize::new(0);
/// How long to wait before looking again.
const PAUSE: Duration = Duration::from_micros(50);

/// Somebody computes, until this is dropped; a fork waits for that. Who has it does not wait for the GIL.
pub(crate) struct Running(());

impl Running {
    /// Waits until no fork is under way. To be called without the GIL, which a fork holds.
    pub(crate) fn begin() -> Self {
        loop {
            RUNNING.fetch_add(1, Ordering::SeqCst);
            let running = Running(());
            if FORKING.load(Ordering::SeqCst) == 0 {
                return running;
            }
            drop(running);
            sleep(PAUSE);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Before a fork: waits until nobody computes.
#[pyfunction]
pub(crate) fn before_fork() {
    FORKING.fetch_add(1, Ordering::SeqCst);
    while RUNNING.load(Ordering::SeqCst) > 0 {
        sleep(PAUSE);
    }
}

/// After a fork, in the parent.
#[pyfunction]
pub(crate) fn after_fork_in_parent() {
    FORKING.fetch_sub(1, Ordering::SeqCst);
}

/// After a fork, in the child, where nobody else is.
#[pyfunction]
pub(crate) fn after_fork_in_child() {
    RUNNING.store(0, Ordering::SeqCst);
    FORKING.store(0, Ordering::SeqCst);
}

/// Runs `work` on `count` threads, without the GIL; a panic becomes an exception.
pub(crate) fn run<R: Send>(
    py: Python<'_>,
    count: usize,
    work: impl FnOnce() -> gemmnet::Result<R> + Send,
) -> PyResult<R> {
    let threads = pool(py, count)?;
    let done = py.detach(|| {
        let _running = Running::begin();
        catch_unwind(AssertUnwindSafe(|| threads.run(work)))
    });
    match done {
        Ok(result) => result.map_err(raised),
        Err(panic) => Err(gave_up(&*panic)),
    }
}
