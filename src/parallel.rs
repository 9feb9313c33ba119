//! Level 1. The one thread policy.
//!
//! Work is cut into pieces whose number depends on shapes alone, never on threads, and a piece runs on one thread from
//! start to end; BLAS inside it is single-threaded. So the same input gives the same bits at any number of threads, as
//! long as pieces that add up write to slots of their own, which are summed in order afterwards.
//!
//! The threads are those of the rayon pool that the caller is in: [`with_threads`] makes one, a host program may
//! `install` its own.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::simd::finish_streaming;

/// Runs `work` inside a pool of `threads` threads.
///
/// # Errors
/// [`Error::Invalid`] for 0 threads, or if the system refuses to start them.
pub fn with_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> Result<R> {
    if threads == 0 {
        return Err(Error::invalid("threads", "0 threads cannot work", "give 1 or more"));
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("gemmnet-{i}"))
        .build()
        .map_err(|e| Error::invalid("threads", format!("cannot start {threads} threads: {e}"), "ask for fewer"))?;
    Ok(pool.install(work))
}

/// How many threads to use: `asked` if given, else `GEMMNET_NUM_THREADS`, else one per core that this process may use.
///
/// # Errors
/// [`Error::Invalid`] for 0 or for a variable that is not a number.
pub fn thread_count(asked: Option<usize>) -> Result<usize> {
    let count = match (asked, std::env::var("GEMMNET_NUM_THREADS")) {
        (Some(n), _) => n,
        (None, Ok(text)) => text.trim().parse().map_err(|_| {
            Error::invalid(
                "GEMMNET_NUM_THREADS",
                format!("`{text}` is not a number of threads"),
                "set it to 1 or more, or unset it",
            )
        })?,
        (None, Err(_)) => std::thread::available_parallelism().map_or(1, usize::from),
    };
    if count == 0 {
        return Err(Error::invalid("threads", "0 threads cannot work", "give 1 or more"));
    }
    Ok(count)
}

/// Runs `piece(0)`, ..., `piece(pieces - 1)`, each on one thread of the current pool, with denormals flushed to zero.
pub fn for_each_piece(pieces: usize, piece: impl Fn(usize) + Sync + Send) {
    (0..pieces).into_par_iter().with_max_len(1).for_each(|i| {
        let _guard = FlushToZero::on();
        piece(i);
        finish_streaming();
    });
}

/// Cuts `data` into chunks of `chunk` elements (the last may be shorter) and runs `piece(index, chunk)` on each.
pub fn for_each_chunk_mut<T: Send>(data: &mut [T], chunk: usize, piece: impl Fn(usize, &mut [T]) + Sync + Send) {
    data.par_chunks_mut(chunk.max(1)).with_max_len(1).enumerate().for_each(|(i, chunk)| {
        let _guard = FlushToZero::on();
        piece(i, chunk);
        finish_streaming();
    });
}

/// The half-open range of `len` items that belongs to piece `index` of `pieces`, as even as possible.
pub fn piece_range(len: usize, pieces: usize, index: usize) -> std::ops::Range<usize> {
    len * index / pieces..len * (index + 1) / pieces
}

/// A slice that several pieces write at once, each to elements of its own.
///
/// `chunks_mut` serves where a piece's elements are contiguous; this is for the strided rest (column blocks of a matrix,
/// a row range of every channel).
#[derive(Debug)]
pub(crate) struct Disjoint<'a, T> {
    pointer: *mut T,
    len: usize,
    lifetime: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice`, whose contract forbids two threads the same elements.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above; it is a borrowed slice in all but name.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Disjoint { pointer: data.as_mut_ptr(), len: data.len(), lifetime: std::marker::PhantomData }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Pointer to the first of the elements `start .. start + len`, for a block of a matrix: to write through it, the
    /// promise of [`Disjoint::slice`] is needed for the elements written.
    #[track_caller]
    pub(crate) fn pointer(&self, start: usize, len: usize) -> *mut T {
        assert!(start + len <= self.len, "{start} + {len} is past the end, {}", self.len);
        self.pointer.wrapping_add(start)
    }

    /// The elements `start .. start + len`.
    ///
    /// # Safety
    /// While the result lives, no other slice handed out by this value may be *used* to touch the same elements.
    #[allow(clippy::mut_from_ref)]
    #[track_caller]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.len, "{start} + {len} is past the end, {}", self.len);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), len) }
    }
}

/// While it lives, this thread's arithmetic treats denormal numbers as zero. A denormal operand costs some 150 cycles, and
/// weights and moments that shrink towards zero are full of them.
#[derive(Debug)]
pub(crate) struct FlushToZero {
    #[cfg(target_arch = "x86_64")]
    before: u32,
}

impl FlushToZero {
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn on() -> Self {
        /// Flush results to zero (bit 15) and read denormal operands as zero (bit 6): Intel SDM vol. 1, 10.2.3.
        const FTZ_DAZ: u32 = 0x8040;
        let mut before = 0_u32;
        // SAFETY: stmxcsr stores the control register to the given address; every x86_64 has it.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut before, options(nostack, preserves_flags)) };
        if before & FTZ_DAZ != FTZ_DAZ {
            let with = before | FTZ_DAZ;
            // SAFETY: loads the control register with two more bits set, both defined since SSE2; Drop restores it.
            unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &with, options(nostack, readonly, preserves_flags)) };
        }
        FlushToZero { before }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn on() -> Self {
        FlushToZero {}
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for FlushToZero {
    fn drop(&mut self) {
        // SAFETY: restores the control register that `on` read.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &self.before, options(nostack, readonly, preserves_flags)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_everything_once() {
        for len in [0, 1, 7, 100] {
            for pieces in [1, 3, 8] {
                let all: Vec<_> = (0..pieces).flat_map(|i| piece_range(len, pieces, i)).collect();
                assert_eq!(all, (0..len).collect::<Vec<_>>());
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn denormals_are_zero_inside_a_piece_only() {
        let tiny = std::hint::black_box(f32::MIN_POSITIVE);
        let inside = std::sync::atomic::AtomicU32::new(1);
        for_each_piece(1, |_| {
            let product = std::hint::black_box(tiny) * std::hint::black_box(0.5);
            inside.store(product.to_bits(), std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(inside.into_inner(), 0);
        assert!(std::hint::black_box(tiny) * std::hint::black_box(0.5) > 0.0, "the caller's arithmetic is as it was");
    }

    #[test]
    fn no_threads_is_an_error() {
        assert!(with_threads(0, || ()).unwrap_err().to_string().contains("0 threads"));
        assert_eq!(with_threads(3, rayon::current_num_threads).unwrap(), 3);
    }
}
