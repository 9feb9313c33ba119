//! Level 1. The one thread policy.
//!
//! Work is cut into pieces, and a piece runs on one thread from start to end; BLAS inside it is single-threaded. Pieces
//! that add up write to slots of their own, whose number depends on shapes alone, and which are summed in order afterwards;
//! how other work is cut may follow the number of threads. So the same input gives the same bits at any number of threads.
//!
//! What the pieces write is shared out before they start: `for_each_share` gives every piece its own part of an array,
//! be it a run of elements (`Chunks`, `Runs`, `Even`), the planes of a channel (`Planes`) or a block of a matrix (`Grid`).
//!
//! The threads are those of the rayon pool that the caller is in: [`Threads`] makes one, a host program may `install` its
//! own. A single thread needs no pool: work then runs where it is called, and costs no handing over. Where many short
//! operations follow each other, threads stay together from the first to the last: `team`.

mod team;

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use crate::error::{Error, Result};

use team::OnDrop;
pub(crate) use team::together;

thread_local! {
    /// Whether this thread works alone, without a pool.
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Threads to run work on. They are told to end when this is dropped.
#[derive(Debug)]
pub struct Threads {
    /// None for a single thread, which is the caller's.
    pool: Option<rayon::ThreadPool>,
}

impl Threads {
    /// Starts `count` threads; none for 1.
    ///
    /// # Errors
    /// [`Error::Invalid`] for 0 threads, or if the system refuses to start them.
    pub fn new(count: usize) -> Result<Self> {
        if count == 0 {
            return Err(Error::invalid("threads", "0 threads cannot work", "give 1 or more"));
        }
        let start = || {
            rayon::ThreadPoolBuilder::new()
                .num_threads(count)
                .thread_name(|i| format!("gemmnet-{i}"))
                .build()
                .map_err(|e| Error::invalid("threads", format!("cannot start {count} threads: {e}"), "ask for fewer"))
        };
        Ok(Threads { pool: if count == 1 { None } else { Some(start()?) } })
    }

    /// Runs `work` on them: what it calls of this crate is cut into pieces for so many threads. Of a single thread rayon
    /// knows nothing: what `work` itself asks of rayon runs where it would run without this.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        // with a pool, too: this may be one of its workers, or help others while it waits
        let before = ALONE.replace(self.pool.is_none());
        let _back = OnDrop(|| ALONE.set(before));
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

/// Runs `work` on `threads` threads: [`Threads`] for one call.
///
/// # Errors
/// As [`Threads::new`].
pub fn with_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> Result<R> {
    Ok(Threads::new(threads)?.run(work))
}

/// The number of threads that work runs on here.
pub fn current_threads() -> usize {
    if ALONE.get() { 1 } else { rayon::current_num_threads() }
}

/// Which of them this is; 0 outside of their pool.
pub(crate) fn current_thread() -> usize {
    if ALONE.get() { 0 } else { rayon::current_thread_index().unwrap_or(0) }
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

/// Runs `piece(0)`, ..., `piece(pieces - 1)`, each on one of the current threads, with denormals flushed to zero.
pub fn for_each_piece(pieces: usize, piece: impl Fn(usize) + Sync + Send) {
    run_pieces(pieces, &piece);
}

/// [`for_each_piece`] for a function behind a pointer: compiled once, and rayon with it, not for every closure.
fn run_pieces(pieces: usize, piece: &(dyn Fn(usize) + Sync)) {
    let run = |i| {
        let _guard = FlushToZero::on();
        piece(i);
        finish_streaming();
    };
    if ALONE.get() || pieces == 1 {
        (0..pieces).for_each(run);
    } else if !team::for_each_piece(pieces, &run) {
        (0..pieces).into_par_iter().with_max_len(1).for_each(run);
    }
}

/// Cuts `data` into chunks of `chunk` elements (the last may be shorter) and runs `piece(index, chunk)` on each.
pub fn for_each_chunk_mut<T: Send>(data: &mut [T], chunk: usize, piece: impl Fn(usize, &mut [T]) + Sync + Send) {
    for_each_share(Chunks::new(data, chunk), piece);
}

/// Runs `piece(index, share)` for every share of `shares`.
pub(crate) fn for_each_share<S: Shares>(shares: S, piece: impl Fn(usize, S::Share) + Sync + Send) {
    for_each_piece(shares.count(), |i| {
        // SAFETY: there is one piece for each index.
        piece(i, unsafe { shares.share(i) });
    });
}

/// The half-open range of `len` items that belongs to piece `index` of `pieces`, as even as possible.
pub fn piece_range(len: usize, pieces: usize, index: usize) -> Range<usize> {
    len * index / pieces..len * (index + 1) / pieces
}

/// Memory that pieces of work share out among themselves. A pair of several of them, or more, is shared out together.
///
/// # Safety
/// Shares of different indices have no element in common.
pub(crate) unsafe trait Shares: Sync + Send {
    /// What one piece gets.
    type Share;

    /// Number of shares.
    fn count(&self) -> usize;

    /// Share `index`, below the count.
    ///
    /// # Safety
    /// For each index this is called once at most.
    unsafe fn share(&self, index: usize) -> Self::Share;
}

macro_rules! shares_of_tuples {
    ($first:ident: $F:ident, $($rest:ident: $R:ident),+) => {
        // SAFETY: shares of the members with different indices have nothing in common.
        unsafe impl<$F: Shares, $($R: Shares),+> Shares for ($F, $($R),+) {
            type Share = ($F::Share, $($R::Share),+);

            fn count(&self) -> usize {
                let ($first, $($rest),+) = self;
                $(assert_eq!($first.count(), $rest.count(), "arrays with the same number of shares");)+
                $first.count()
            }

            unsafe fn share(&self, index: usize) -> Self::Share {
                let ($first, $($rest),+) = self;
                // SAFETY: as the caller promises.
                unsafe { ($first.share(index), $($rest.share(index)),+) }
            }
        }
    };
}
shares_of_tuples!(a: A, b: B);
shares_of_tuples!(a: A, b: B, c: C);
shares_of_tuples!(a: A, b: B, c: C, d: D);
shares_of_tuples!(a: A, b: B, c: C, d: D, e: E);

/// Runs of `len` elements; the last may be shorter.
#[derive(Debug)]
pub(crate) struct Chunks<'a, T> {
    data: Disjoint<'a, T>,
    len: usize,
}

impl<'a, T> Chunks<'a, T> {
    pub(crate) fn new(data: &'a mut [T], len: usize) -> Self {
        Chunks { data: Disjoint::new(data), len: len.max(1) }
    }
}

// SAFETY: runs with different indices begin and end at different multiples of `len`.
unsafe impl<'a, T: Send> Shares for Chunks<'a, T> {
    type Share = &'a mut [T];

    fn count(&self) -> usize {
        self.data.len.div_ceil(self.len)
    }

    unsafe fn share(&self, index: usize) -> &'a mut [T] {
        let start = index * self.len;
        // SAFETY: the caller asks for each run once.
        unsafe { self.data.slice(start, self.len.min(self.data.len - start)) }
    }
}

/// The elements of ranges: share `i` is the run of `per` ranges from the one numbered `per * i` on; the last may be of fewer.
/// Of an empty array, which stands for one that is not there, every share is empty.
#[derive(Debug)]
pub(crate) struct Runs<'a, T> {
    data: Disjoint<'a, T>,
    ranges: &'a [Range<usize>],
    per: usize,
}

impl<'a, T> Runs<'a, T> {
    /// # Panics
    /// If a range does not begin where the one before it ends, or later; if several per share are not adjacent.
    pub(crate) fn new(data: &'a mut [T], ranges: &'a [Range<usize>], per: usize) -> Self {
        let follows = |a: &Range<usize>, b: &Range<usize>| if per == 1 { a.end <= b.start } else { a.end == b.start };
        assert!(ranges.iter().all(|range| range.start <= range.end), "ranges that run forward");
        assert!(ranges.windows(2).all(|pair| follows(&pair[0], &pair[1])), "ranges one after the other");
        Runs { data: Disjoint::new(data), ranges, per: per.max(1) }
    }
}

// SAFETY: ranges rise and do not overlap, and a range belongs to one share.
unsafe impl<'a, T: Send> Shares for Runs<'a, T> {
    type Share = &'a mut [T];

    fn count(&self) -> usize {
        self.ranges.len().div_ceil(self.per)
    }

    unsafe fn share(&self, index: usize) -> &'a mut [T] {
        let of_share = &self.ranges[index * self.per..self.ranges.len().min((index + 1) * self.per)];
        let range = if self.data.len == 0 { 0..0 } else { of_share[0].start..of_share[of_share.len() - 1].end };
        // SAFETY: the caller asks for each run once.
        unsafe { self.data.slice(range.start, range.len()) }
    }
}

/// Whole items, such as images, as evenly as possible: share `i` holds the items [`piece_range`] gives to piece `i`.
#[derive(Debug)]
pub(crate) struct Even<'a, T> {
    data: Disjoint<'a, T>,
    items: usize,
    shares: usize,
}

impl<'a, T> Even<'a, T> {
    /// # Panics
    /// If `data` does not hold a whole number of elements for each item.
    pub(crate) fn new(data: &'a mut [T], items: usize, shares: usize) -> Self {
        assert!(data.len() == data.len() / items.max(1) * items, "{} elements of {items} items", data.len());
        Even { data: Disjoint::new(data), items, shares }
    }
}

// SAFETY: the ranges of `piece_range` have no item in common.
unsafe impl<'a, T: Send> Shares for Even<'a, T> {
    type Share = &'a mut [T];

    fn count(&self) -> usize {
        self.shares
    }

    unsafe fn share(&self, index: usize) -> &'a mut [T] {
        let (item, range) = (self.data.len / self.items.max(1), piece_range(self.items, self.shares, index));
        // SAFETY: the caller asks for each range once.
        unsafe { self.data.slice(range.start * item, range.len() * item) }
    }
}

/// The product of sizes, `None` if it does not fit the machine's integers: what wraps around would seem to fit.
fn product(sizes: &[usize]) -> Option<usize> {
    // A zero makes nothing of whatever it is multiplied with.
    if sizes.contains(&0) {
        Some(0)
    } else {
        sizes.iter().try_fold(1_usize, |product, &size| product.checked_mul(size))
    }
}

/// The planes of an array `[images, channels, plane]` by channel: share `c` is channel `c` of every image.
#[derive(Debug)]
pub(crate) struct Planes<'a, T> {
    data: Disjoint<'a, T>,
    images: usize,
    channels: usize,
    plane: usize,
}

impl<'a, T> Planes<'a, T> {
    /// # Panics
    /// If `data` does not have the length of these sizes.
    pub(crate) fn new(data: &'a mut [T], [images, channels, plane]: [usize; 3]) -> Self {
        assert_eq!(Some(data.len()), product(&[images, channels, plane]), "{images} x {channels} planes of {plane}");
        Planes { data: Disjoint::new(data), images, channels, plane }
    }
}

// SAFETY: a plane belongs to one channel.
unsafe impl<'a, T: Send> Shares for Planes<'a, T> {
    type Share = StridedMut<'a, T>;

    fn count(&self) -> usize {
        self.channels
    }

    unsafe fn share(&self, index: usize) -> StridedMut<'a, T> {
        let Planes { images, channels, plane, .. } = *self;
        // SAFETY: the caller asks for each channel once; the last plane ends where the array does, at the latest.
        unsafe { self.data.strided(index * plane, images, channels * plane, plane) }
    }
}

/// Blocks of a matrix `rows x cols`, of `height x width` elements; those at the end may be smaller. Share `i` is block
/// `i / across` from above and `i % across` from the left.
#[derive(Debug)]
pub(crate) struct Grid<'a, T> {
    data: Disjoint<'a, T>,
    rows: usize,
    cols: usize,
    height: usize,
    width: usize,
}

impl<'a, T> Grid<'a, T> {
    /// # Panics
    /// If `data` does not have the length of these sizes.
    pub(crate) fn new(data: &'a mut [T], (rows, cols): (usize, usize), (height, width): (usize, usize)) -> Self {
        assert_eq!(Some(data.len()), product(&[rows, cols]), "elements of {rows} x {cols}");
        Grid { data: Disjoint::new(data), rows, cols, height: height.max(1), width: width.max(1) }
    }

    /// Number of blocks side by side.
    pub(crate) fn across(&self) -> usize {
        self.cols.div_ceil(self.width)
    }
}

// SAFETY: an element lies in one block.
unsafe impl<'a, T: Send> Shares for Grid<'a, T> {
    type Share = StridedMut<'a, T>;

    fn count(&self) -> usize {
        self.rows.div_ceil(self.height) * self.across()
    }

    unsafe fn share(&self, index: usize) -> StridedMut<'a, T> {
        let (row, col) = (index / self.across() * self.height, index % self.across() * self.width);
        let (height, width) = (self.height.min(self.rows - row), self.width.min(self.cols - col));
        // SAFETY: the caller asks for each block once; its last row ends where a row of the matrix does, at the latest.
        unsafe { self.data.strided(row * self.cols + col, height, self.cols, width) }
    }
}

/// Runs of equal length at equal distances: the planes of a channel, the rows of a block of a matrix.
#[derive(Debug)]
pub(crate) struct StridedMut<'a, T> {
    pointer: *mut T,
    count: usize,
    stride: usize,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

impl<'a, T> StridedMut<'a, T> {
    /// The rows of a matrix of `len` elements a row, as many as `data` has.
    pub(crate) fn rows(data: &'a mut [T], len: usize) -> Self {
        StridedMut { pointer: data.as_mut_ptr(), count: data.len() / len, stride: len, len, lifetime: PhantomData }
    }
}

impl<T> StridedMut<'_, T> {
    /// Number of runs.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Elements of a run.
    pub(crate) fn run(&self) -> usize {
        self.len
    }

    /// Elements from the beginning of a run to that of the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Run `index`.
    #[track_caller]
    #[inline(always)]
    pub(crate) fn get(&mut self, index: usize) -> &mut [T] {
        assert!(index < self.count, "run {index} of {}", self.count);
        // SAFETY: `Disjoint::strided` promises the elements of every run to the one value that this is, and `rows` has them.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(index * self.stride), self.len) }
    }

    /// The same part of one run after the other.
    #[track_caller]
    #[inline(always)]
    pub(crate) fn parts(&mut self, part: Range<usize>) -> impl Iterator<Item = &mut [T]> {
        assert!(part.end <= self.len, "{part:?} of {}", self.len);
        let (first, stride) = (self.pointer.wrapping_add(part.start), self.stride);
        // SAFETY: as in `get`; runs do not overlap.
        (0..self.count).map(
            #[inline(always)]
            move |index| unsafe { std::slice::from_raw_parts_mut(first.add(index * stride), part.len()) },
        )
    }

    /// The first element, for a matrix whose rows are the runs.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut T {
        self.pointer
    }
}

/// A slice that several pieces write at once, each to elements of its own.
#[derive(Debug)]
pub(crate) struct Disjoint<'a, T> {
    pointer: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through unsafe methods, whose contracts forbid two threads the same elements.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above; it is a borrowed slice in all but name.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Disjoint { pointer: data.as_mut_ptr(), len: data.len(), lifetime: PhantomData }
    }

    /// Pointer to the first of the elements `start .. start + len`, for a block of a matrix: to write through it, the
    /// promise of [`Disjoint::slice`] is needed for the elements written.
    #[track_caller]
    pub(crate) fn pointer(&self, start: usize, len: usize) -> *mut T {
        assert!(start <= self.len && len <= self.len - start, "{start} + {len} is past the end, {}", self.len);
        self.pointer.wrapping_add(start)
    }

    /// The elements `start .. start + len`.
    ///
    /// # Safety
    /// While the result lives, no other slice handed out by this value may be *used* to touch the same elements.
    #[track_caller]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: in bounds by the assertion in `pointer`; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(start, len), len) }
    }

    /// `count` runs of `len` elements, the first from `start` on, `stride` elements apart.
    ///
    /// # Safety
    /// As for [`Disjoint::slice`].
    #[track_caller]
    unsafe fn strided(&self, start: usize, count: usize, stride: usize, len: usize) -> StridedMut<'a, T> {
        assert!(stride >= len, "runs of {len} elements, {stride} apart, overlap");
        let reach = count.saturating_sub(1).checked_mul(stride).and_then(|last| last.checked_add(len));
        let empty = count == 0 || len == 0;
        let pointer = if empty { self.pointer(0, 0) } else { self.pointer(start, reach.unwrap_or(usize::MAX)) };
        StridedMut { pointer, count, stride, len, lifetime: PhantomData }
    }
}

/// Makes what [`crate::simd::Write::Streamed`] wrote visible to other threads before anything that this thread does
/// afterwards.
fn finish_streaming() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86_64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
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

    /// Every way of sharing out covers every element once.
    #[test]
    fn shares_are_disjoint_and_whole() {
        fn check(name: &str, len: usize, count: impl Fn(&mut [u8])) {
            let mut data = vec![0; len];
            count(&mut data);
            assert!(data.iter().all(|&n| n == 1), "{name}: {data:?}");
        }
        let mark = |run: &mut [u8]| run.iter_mut().for_each(|n| *n += 1);
        let mark_all = |mut runs: StridedMut<'_, u8>| (0..runs.count()).for_each(|i| mark(runs.get(i)));
        check("chunks", 23, |data| for_each_share(Chunks::new(data, 5), |_, run| mark(run)));
        check("even", 21, |data| for_each_share(Even::new(data, 7, 4), |_, run| mark(run)));
        let ranges = [0..3, 3..4, 4..4, 4..12];
        check("runs", 12, |data| for_each_share(Runs::new(data, &ranges, 1), |_, run| mark(run)));
        check("runs of pairs", 12, |data| for_each_share(Runs::new(data, &ranges, 2), |_, run| mark(run)));
        check("runs of threes", 12, |data| for_each_share(Runs::new(data, &ranges, 3), |_, run| mark(run)));
        check("an array that is not there", 0, |data| {
            for_each_share(Runs::new(data, &ranges, 2), |_, run| assert!(run.is_empty()));
        });
        check("nothing", 0, |data| for_each_share(Even::new(data, 0, 4), |_, run| mark(run)));
        check("planes", 60, |data| for_each_share(Planes::new(data, [3, 4, 5]), |_, runs| mark_all(runs)));
        check("no images", 0, |data| for_each_share(Planes::new(data, [0, 4, 5]), |_, runs| mark_all(runs)));
        check("grid", 7 * 9, |data| for_each_share(Grid::new(data, (7, 9), (2, 4)), |_, runs| mark_all(runs)));
        check("pair", 24, |data| {
            let mut other = vec![0; 6];
            for_each_share((Chunks::new(data, 4), Chunks::new(&mut other, 1)), |i, (run, other)| {
                mark(run);
                other[0] = i;
            });
            assert_eq!(other, [0, 1, 2, 3, 4, 5]);
        });
    }

    /// Sizes whose product wraps around to that of an empty slice are refused.
    #[test]
    fn sizes_that_wrap_around_are_refused() {
        let planes = |sizes| std::panic::catch_unwind(|| Planes::new(&mut [0_u8; 0], sizes).count()).is_err();
        let grid = |sizes| std::panic::catch_unwind(|| Grid::new(&mut [0_u8; 0], sizes, (1, 1)).count()).is_err();
        assert!(planes([1 << 32, 1 << 31, 2]) && grid((1 << 32, 1 << 32)));
        assert!(!planes([0, 1 << 63, 4]) && !grid((0, 1 << 63)));
    }

    /// Ranges that overlap, or leave out elements in the middle of a share, are refused.
    #[test]
    fn runs_are_of_ranges_one_after_the_other() {
        let refused = |ranges: [Range<usize>; 2], per| {
            std::panic::catch_unwind(|| Runs::new(&mut [0_u8; 9], &ranges, per).count()).is_err()
        };
        assert!(refused([0..5, 4..9], 1) && refused([4..9, 0..4], 1) && refused([0..4, 5..9], 2));
        assert!(refused([0..4, Range { start: 9, end: 4 }], 1));
        assert!(!refused([0..4, 5..9], 1) && !refused([0..4, 4..9], 2));
    }

    #[test]
    #[should_panic(expected = "same number of shares")]
    fn arrays_shared_out_together_have_as_many_shares() {
        for_each_share((Chunks::new(&mut [0; 4], 2), Chunks::new(&mut [0; 4], 1)), |_, _: (&mut [i32], &mut [i32])| {});
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
        assert_eq!(with_threads(3, current_threads).unwrap(), 3);
    }

    /// A single thread is the caller's, also within a pool, and only as long as the work goes on.
    #[test]
    fn a_single_thread_is_the_callers() {
        let here = || (current_threads(), current_thread(), std::thread::current().id());
        let alone = Threads::new(1).unwrap();
        let pieces = || {
            let places = std::sync::Mutex::new(Vec::new());
            for_each_piece(5, |_| places.lock().unwrap().push(std::thread::current().id()));
            places.into_inner().unwrap()
        };
        for pool in [2, 3].map(|count| Threads::new(count).unwrap()) {
            pool.run(|| {
                let (threads, thread, id) = here();
                assert_eq!(alone.run(here), (1, 0, id));
                assert_eq!(alone.run(pieces), [id; 5]);
                let panics = std::panic::AssertUnwindSafe(|| alone.run(|| panic!("on purpose")));
                let panicked = std::panic::catch_unwind(panics);
                assert!(panicked.is_err());
                assert_eq!(here(), (threads, thread, id), "the pool again");
                assert_eq!(alone.run(|| Threads::new(5).unwrap().run(current_threads)), 5, "a pool within");
                assert_eq!(alone.run(|| pool.run(current_threads)), threads, "the same pool within");
            });
        }
    }
}
