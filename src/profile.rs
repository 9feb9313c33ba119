//! Level 1. Where the time of a training goes: time, calls, operations and bytes of every operation and phase.
//!
//! There is one table for the whole process. It costs nothing while it is off, its usual state: an operation asks one
//! relaxed atomic whether to look at the clock. While it is on, an operation known to the table allocates nothing.
//!
//! # What is counted
//! - *Time* is the caller's, from begin to end of an operation, with all the threads that work on it. Callers that run
//!   side by side, such as several [`crate::nn::session::Session`]s, each count theirs.
//! - *Operations* are those of the products, a multiply-add as 2: forward once, backward once for the gradient of the
//!   weights and once for that of the input, where it is asked for. Convolutions count as if computed directly; an
//!   algorithm with fewer multiplications shows as more GFLOP/s.
//! - *Bytes* are what an operation must move at least, each array counted once. Forward: input, output, weights.
//!   Backward: input, gradient of the output, weights and their gradients, and the gradient of the input where it is
//!   asked for; where it updates a matrix, the new weights instead of their gradients, and what the rule remembers.
//!   Optimizer: gradients, and twice the parameters that are left to it and what the rules remember. What a block keeps
//!   between the two, scratch, and a second look at an array do not count.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

static ENABLED: AtomicBool = AtomicBool::new(false);
static TABLE: Mutex<Vec<Row>> = Mutex::new(Vec::new());

/// When an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Drawing, normalising and augmenting a batch.
    Data,
    /// Forward in training mode.
    Forward,
    /// Backward.
    Backward,
    /// The update of the parameters.
    Optimizer,
    /// Forward in test mode.
    Test,
}

impl Phase {
    /// `"forward"` and so on.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Data => "data",
            Phase::Forward => "forward",
            Phase::Backward => "backward",
            Phase::Optimizer => "optimizer",
            Phase::Test => "test",
        }
    }
}

/// An operation in one phase, over all its calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The operation: a block in notation, or what else took time.
    pub op: String,
    /// When it ran.
    pub phase: Phase,
    /// How often.
    pub calls: u64,
    /// How long.
    pub time: Duration,
    /// Floating-point operations of its products; 0 if it has none.
    pub flops: u64,
    /// Bytes moved.
    pub bytes: u64,
}

/// What one call does.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// The operation; calls of the same name and phase are added up.
    pub op: &'a str,
    /// Floating-point operations of its products.
    pub flops: usize,
    /// Bytes moved.
    pub bytes: usize,
}

/// Whether operations are timed.
#[inline]
pub fn enabled() -> bool {
    ENABLED.load(Ordering::Relaxed)
}

/// Whether the user wants a profile: `asked`, or `GEMMNET_PROFILE=1`.
///
/// # Errors
/// [`Error::Invalid`] if the variable is neither 0 nor 1.
pub fn wanted(asked: bool) -> Result<bool> {
    match std::env::var("GEMMNET_PROFILE").as_deref().map(str::trim) {
        _ if asked => Ok(true),
        Ok("1") => Ok(true),
        Ok("0" | "") | Err(std::env::VarError::NotPresent) => Ok(false),
        other => {
            let problem = format!("`{}` is neither 0 nor 1", other.unwrap_or("not Unicode"));
            Err(Error::invalid("GEMMNET_PROFILE", problem, "set it to 1 for a profile, or unset it"))
        }
    }
}

/// From now on operations are timed, in an empty table.
pub fn start() {
    table().clear();
    ENABLED.store(true, Ordering::Relaxed);
}

/// Operations are no longer timed; what was, the longest first.
pub fn stop() -> Vec<Row> {
    ENABLED.store(false, Ordering::Relaxed);
    let mut rows = std::mem::take(&mut *table());
    rows.sort_by_key(|row| std::cmp::Reverse(row.time));
    rows
}

fn table() -> std::sync::MutexGuard<'static, Vec<Row>> {
    TABLE.lock().expect("nothing panics while it holds the profile")
}

/// Times what happens until the result is dropped, if that is wanted; otherwise `work` is not even asked.
#[inline]
#[must_use = "the operation ends when this is dropped"]
pub fn scope<'a>(phase: Phase, work: impl FnOnce() -> Work<'a>) -> Option<Scope<'a>> {
    enabled().then(|| Scope { phase, work: work(), begin: Instant::now() })
}

/// An operation that is being timed.
#[derive(Debug)]
pub struct Scope<'a> {
    phase: Phase,
    work: Work<'a>,
    begin: Instant,
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        let (time, Work { op, flops, bytes }) = (self.begin.elapsed(), self.work);
        let mut table = table();
        let place = table.iter().position(|row| row.phase == self.phase && row.op == op).unwrap_or_else(|| {
            let (calls, flops, bytes) = (0, 0, 0);
            table.push(Row { op: op.to_owned(), phase: self.phase, calls, time: Duration::ZERO, flops, bytes });
            table.len() - 1
        });
        let row = &mut table[place];
        row.calls += 1;
        row.time += time;
        row.flops += flops as u64;
        row.bytes += bytes as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, because there is one table; other tests' networks may write to it meanwhile.
    #[test]
    fn calls_are_added_up_by_operation_and_phase_while_it_is_on() {
        let call = |phase, op: &'static str, flops| drop(scope(phase, || Work { op, flops, bytes: 10 }));
        call(Phase::Forward, "a of this test", 1);
        start();
        std::thread::scope(|threads| {
            for _ in 0..2 {
                threads.spawn(|| (0..100).for_each(|_| call(Phase::Forward, "a of this test", 3)));
            }
        });
        let guard = scope(Phase::Backward, || Work { op: "a of this test", flops: 6, bytes: 20 });
        std::thread::sleep(Duration::from_millis(20));
        drop(guard);
        let rows = stop();
        call(Phase::Forward, "a of this test", 1);

        let ours: Vec<_> = rows.iter().filter(|row| row.op == "a of this test").collect();
        let counts: Vec<_> = ours.iter().map(|row| (row.phase, row.calls, row.flops, row.bytes)).collect();
        assert_eq!(counts, [(Phase::Backward, 1, 6, 20), (Phase::Forward, 200, 600, 2000)], "the longest first");
        assert!(ours[0].time >= Duration::from_millis(20), "{:?}", ours[0]);
        assert!(scope(Phase::Data, || unreachable!("it is off")).is_none());
    }
}
