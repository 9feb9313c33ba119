//! Level 1. Threads that stay together from one parallel operation to the next.
//!
//! To wake a sleeping thread takes as long as a small layer. Within [`together`] the other threads are called once; between
//! the operations they wait in a loop, ready to take pieces. Nobody is waited for who has not come: whoever calls does all
//! pieces that are not taken.

use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::yield_now;

use super::current_threads;

thread_local! {
    /// The team whose operations this thread leads.
    static LED: Cell<Option<*const Team>> = const { Cell::new(None) };
}

/// How often a waiting thread looks before it lets others have its processor, each time it looks: some 50 microseconds.
const LOOKS: usize = 1 << 10;

/// Waits until `done`, in a loop.
fn wait_until(mut done: impl FnMut() -> bool) {
    let mut looks = 0;
    while !done() {
        if looks < LOOKS {
            looks += 1;
            spin_loop();
        } else {
            yield_now();
        }
    }
}

/// Runs `work`, whose parallel operations share out their pieces to threads that are called once for all of them.
pub(crate) fn together<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let threads = current_threads();
    if threads == 1 || LED.get().is_some() {
        return work();
    }
    let team = Team::default();
    let lead = || {
        let _end = OnDrop(|| {
            LED.set(None);
            team.over.store(true, Ordering::Release);
        });
        LED.set(Some(&raw const team));
        work()
    };
    rayon::join(lead, || team.call(threads - 1)).0
}

/// Runs `piece(0)`, ..., `piece(pieces - 1)` on the team that this thread leads; `false` if it leads none.
pub(super) fn for_each_piece(pieces: usize, piece: &(dyn Fn(usize) + Sync)) -> bool {
    let (Some(team), Ok(pieces)) = (LED.get(), u32::try_from(pieces)) else { return false };
    // What a piece itself shares out goes elsewhere.
    LED.set(None);
    let _back = OnDrop(|| LED.set(Some(team)));
    // SAFETY: `together` sets it to a team that lives until it is unset.
    unsafe { &*team }.run(pieces, piece);
    true
}

/// Calls a function when it is dropped, also where something panics.
pub(super) struct OnDrop<F: FnMut()>(pub(super) F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// An operation: a piece of it by its number.
type Job = *const (dyn Fn(usize) + Sync);

/// What others than the neighbours in memory write, on cache lines of its own: two, which processors fetch together.
#[derive(Default)]
#[repr(align(128))]
struct Apart<T>(T);

#[derive(Default)]
struct Team {
    /// Odd while there is a job.
    phase: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    over: AtomicBool,
    /// Helpers who may look at the job.
    inside: Apart<AtomicUsize>,
    left: Apart<Left>,
}

// SAFETY: `job` is written by the leader alone, while the phase is even and nobody is inside; helpers read it while they are
// inside and the phase is odd. The function that it points to may be called from several threads.
unsafe impl Sync for Team {}

impl Team {
    /// Helps, and calls others to help.
    fn call(&self, helpers: usize) {
        match helpers {
            0 => {}
            1 => self.help(),
            _ => drop(rayon::join(|| self.help(), || self.call(helpers - 1))),
        }
    }

    /// Takes pieces of one job after the other until the team's work is over.
    fn help(&self) {
        let mut seen = 0;
        loop {
            wait_until(|| {
                let phase = self.phase.load(Ordering::Relaxed);
                phase % 2 == 1 && phase != seen || self.over.load(Ordering::Acquire)
            });
            if self.over.load(Ordering::Acquire) {
                return;
            }
            self.inside.0.fetch_add(1, Ordering::SeqCst);
            let _leave = OnDrop(|| {
                self.inside.0.fetch_sub(1, Ordering::SeqCst);
            });
            seen = self.phase.load(Ordering::SeqCst);
            if seen.is_multiple_of(2) {
                continue;
            }
            // SAFETY: the leader saw nobody inside before it wrote the job and made the phase odd. It waits until nobody is inside
            // after it has made it even: until then the job is what it was, and what it points to lives.
            let job = unsafe { &*(*self.job.get()).expect("an odd phase has a job") };
            while let Some(index) = self.left.0.take_last() {
                job(index);
            }
        }
    }

    /// Runs all pieces of a job; the leader takes the first ones.
    fn run(&self, pieces: u32, piece: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime is another; the pointer is not used after this call.
        let job: Job =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(piece) };
        // SAFETY: the phase is even, and nobody is inside: see the end.
        unsafe { *self.job.get() = Some(job) };
        self.left.0.set(pieces);
        self.phase.fetch_add(1, Ordering::SeqCst);
        let _end = OnDrop(|| {
            self.phase.fetch_add(1, Ordering::SeqCst);
            wait_until(|| self.inside.0.load(Ordering::SeqCst) == 0);
        });
        while let Some(index) = self.left.0.take_first() {
            piece(index);
        }
    }
}

/// Pieces that nobody has taken: the number of the first in the lower half, and of the one after the last in the upper.
#[derive(Default)]
struct Left(AtomicU64);

impl Left {
    fn set(&self, pieces: u32) {
        self.0.store(u64::from(pieces) << 32, Ordering::Relaxed);
    }

    fn take(&self, taken: impl Fn(u64, u64) -> u64) -> Option<(u64, u64)> {
        let update = |left: u64| {
            let (first, end) = (left & u64::from(u32::MAX), left >> 32);
            (first < end).then(|| taken(first, end))
        };
        let left = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).ok()?;
        Some((left & u64::from(u32::MAX), left >> 32))
    }

    /// So that in one job after the other the leader gets about the same pieces, whose memory is in its cache.
    fn take_first(&self) -> Option<usize> {
        self.take(|first, end| end << 32 | (first + 1)).map(|(first, _)| first as usize)
    }

    fn take_last(&self) -> Option<usize> {
        self.take(|first, end| (end - 1) << 32 | first).map(|(_, end)| end as usize - 1)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU32;

    use super::*;
    use crate::parallel::{Threads, for_each_chunk_mut, for_each_piece, with_threads};

    /// Fewer of everything where an interpreter looks at every access.
    const ROUNDS: usize = if cfg!(miri) { 12 } else { 2_000 };

    /// Operations one after the other, of few and of many pieces: each piece runs once, and before the operation ends.
    #[test]
    fn every_piece_runs_once() {
        for threads in [1, 2, 3, 7] {
            let rounds = || {
                for round in 0..ROUNDS {
                    let mut data = vec![0_u32; [0, 1, 2, 3, 8, 40][round % 6]];
                    for_each_chunk_mut(&mut data, 1, |i, value| value[0] += i as u32 + 1);
                    assert!(data.iter().zip(1..).all(|(&got, want)| got == want), "round {round}: {data:?}");
                }
            };
            with_threads(threads, || together(rounds)).unwrap();
        }
    }

    #[test]
    fn several_callers_share_the_threads() {
        let threads = Threads::new(2).unwrap();
        std::thread::scope(|scope| {
            for caller in 0..4 {
                let threads = &threads;
                scope.spawn(move || {
                    for _ in 0..ROUNDS / 10 {
                        let sum = AtomicU32::new(0);
                        let add = |i: usize| _ = sum.fetch_add(i as u32 + caller, Ordering::Relaxed);
                        threads.run(|| together(|| (0..5).for_each(|_| for_each_piece(10, add))));
                        assert_eq!(sum.into_inner(), 5 * (45 + 10 * caller));
                    }
                });
            }
        });
    }

    /// A team within a team, and operations within a piece.
    #[test]
    fn pieces_may_have_pieces() {
        with_threads(3, || {
            together(|| {
                let all = Mutex::new(Vec::new());
                for_each_piece(4, |i| together(|| for_each_piece(3, |j| all.lock().unwrap().push((i, j)))));
                together(|| for_each_piece(1, |i| all.lock().unwrap().push((9, i))));
                let mut all = all.into_inner().unwrap();
                all.sort_unstable();
                let want = (0..4).flat_map(|i| (0..3).map(move |j| (i, j))).chain([(9, 0)]);
                assert!(all.into_iter().eq(want));
            });
        })
        .unwrap();
    }

    /// A panic in any piece reaches the caller, and leaves threads that go on working.
    #[test]
    fn a_panic_reaches_the_caller() {
        let threads = Threads::new(2).unwrap();
        for wrong in 0..8 {
            let pieces = || together(|| for_each_piece(8, |i| assert_ne!(i, wrong, "on purpose")));
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| threads.run(pieces)));
            assert!(panicked.is_err(), "piece {wrong}");
            let count = AtomicU32::new(0);
            threads.run(|| together(|| for_each_piece(9, |_| _ = count.fetch_add(1, Ordering::Relaxed))));
            assert_eq!(count.into_inner(), 9);
        }
    }
}
