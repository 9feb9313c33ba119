//! Level 2. Memory that is asked for once: long-lived buffers on huge pages, and scratch for the pieces of an operation.

use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use bytemuck::Pod;
use memmap2::MmapMut;

use crate::parallel::{current_thread, current_threads};

static MAPS: AtomicUsize = AtomicUsize::new(0);

/// How many times this process has asked the system for the memory of a [`Buffer`]: it does not come from the allocator, so
/// counting that one does not tell whether a step allocates.
pub fn maps() -> usize {
    MAPS.load(Ordering::Relaxed)
}

/// Bytes of a huge page. Memory of half of one and more is made of whole ones, which recent versions of Linux align as such: else
/// its ends were on small pages.
const HUGE_PAGE: usize = 2 << 20;

/// A fixed number of elements, zeroed, aligned to a page, on huge pages where the system has them.
///
/// Fresh memory from the allocator is handed back to the system when it is freed and faults in again page by page: 4 to
/// 8 ms for 32 MB, more than the convolution that fills it. A `Buffer` is made once and kept.
#[derive(Debug)]
pub struct Buffer<T> {
    map: Option<MmapMut>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// `len` zeros.
    ///
    /// # Panics
    /// If the system has no memory left.
    pub fn zeroed(len: usize) -> Self {
        Self::try_zeroed(len).unwrap_or_else(|e| {
            panic!(
                "the system refused {} MiB of memory: {e}; use a smaller batch",
                len.saturating_mul(size_of::<T>()) >> 20
            )
        })
    }

    /// `len` zeros.
    ///
    /// # Errors
    /// If the system has no memory left.
    pub(crate) fn try_zeroed(len: usize) -> io::Result<Self> {
        let out_of_memory = || io::Error::from(io::ErrorKind::OutOfMemory);
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(out_of_memory)?;
        if bytes == 0 {
            return Ok(Buffer { map: None, len, element: PhantomData });
        }
        MAPS.fetch_add(1, Ordering::Relaxed);
        let whole = if bytes >= HUGE_PAGE / 2 { bytes.checked_next_multiple_of(HUGE_PAGE) } else { Some(bytes) };
        let map = MmapMut::map_anon(whole.ok_or_else(out_of_memory)?)?;
        // Advice only: a kernel without huge pages refuses it, and nothing depends on it. Miri does not know the call.
        #[cfg(all(target_os = "linux", not(miri)))]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Buffer { map: Some(map), len, element: PhantomData })
    }

    /// Makes it hold at least `len` elements; what was in it is lost if it has to grow.
    pub fn reserve(&mut self, len: usize) {
        if self.len < len {
            // Free first: both together may not fit.
            *self = Self::zeroed(0);
            *self = Self::zeroed(len);
        }
    }
}

impl<T: Pod> Default for Buffer<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.map.as_ref().map_or(&[], |map| bytemuck::cast_slice(&map[..self.len * size_of::<T>()]))
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.map.as_mut().map_or(&mut [], |map| bytemuck::cast_slice_mut(&mut map[..self.len * size_of::<T>()]))
    }
}

impl<T: Pod> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

/// Scratch memory of operations: some that an operation has as a whole, and an arena for each thread that its pieces run
/// on. It grows to the largest request and stays.
///
/// The caller owns it and lends it to one operation after the other; after the first step of a training loop it no longer
/// grows, whichever threads the pieces run on.
#[derive(Debug, Default)]
pub struct Workspace {
    shared: Buffer<u64>,
    /// Each is locked by the piece that runs on its thread: always free, as long as nobody has a pool within a pool.
    arenas: Vec<Mutex<Buffer<u64>>>,
}

impl Workspace {
    /// An empty workspace.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lends an operation `shared` elements, such as partial sums, and scratch of `scratch` elements to each of its pieces.
    /// Their content is whatever was left there.
    pub fn lend<T: Pod>(&mut self, shared: usize, scratch: usize) -> (&mut [T], Scratch<'_, T>) {
        let Workspace { shared: memory, arenas } = self;
        let threads = current_threads().max(arenas.len());
        arenas.resize_with(threads, Mutex::default);
        for arena in arenas.iter_mut() {
            // What a panicking piece left there is scratch all the same.
            arena.get_mut().unwrap_or_else(PoisonError::into_inner).reserve(units::<T>(scratch));
        }
        memory.reserve(units::<T>(shared));
        let shared = &mut bytemuck::cast_slice_mut(memory)[..shared];
        (shared, Scratch { arenas, len: scratch, element: PhantomData })
    }
}

/// `len` elements, counted in units of a workspace's buffers.
fn units<T>(len: usize) -> usize {
    len.checked_mul(size_of::<T>()).expect("scratch fits the address space").div_ceil(size_of::<u64>())
}

/// The scratch memory of an operation's pieces: see [`Workspace::lend`].
#[derive(Debug)]
pub struct Scratch<'a, T> {
    arenas: &'a [Mutex<Buffer<u64>>],
    len: usize,
    element: PhantomData<fn() -> T>,
}

impl<T: Pod> Scratch<'_, T> {
    /// Lends the elements of the calling thread's arena to `work`. A piece asks once and splits what it gets.
    pub fn with<R>(&self, work: impl FnOnce(&mut [T]) -> R) -> R {
        let thread = current_thread() % self.arenas.len();
        let mut arena = self.arenas[thread].lock().unwrap_or_else(PoisonError::into_inner);
        work(&mut bytemuck::cast_slice_mut(&mut arena)[..self.len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_aligned_and_copied() {
        let mut buffer = Buffer::<f64>::zeroed(1000);
        assert!(buffer.iter().all(|&v| v == 0.0) && buffer.len() == 1000);
        assert_eq!(buffer.as_ptr().addr() % 64, 0);
        buffer[999] = 3.0;
        assert_eq!(buffer.clone()[999], 3.0);
        assert!(Buffer::<f32>::zeroed(0).is_empty());
        // on whole huge pages, whose size three does not divide
        let mut buffer = Buffer::<[f32; 3]>::zeroed(HUGE_PAGE / 24 + 1);
        assert_eq!(buffer.iter_mut().count(), HUGE_PAGE / 24 + 1);
    }

    #[test]
    fn scratch_grows_and_keeps_its_place() {
        let mut ws = Workspace::new();
        let first = ws.lend::<f32>(0, 100).1.with(|s| s.as_ptr().addr());
        let second = ws.lend::<f64>(0, 50).1.with(|s| s.as_ptr().addr());
        assert_eq!(first, second);
        let (shared, scratch) = ws.lend::<f32>(7, 1 << 20);
        assert_eq!(shared.len(), 7);
        scratch.with(|s| assert_eq!(s.len(), 1 << 20));
    }

    /// A piece that panics leaves a workspace that goes on working.
    #[test]
    fn a_caught_panic_does_no_harm() {
        let mut ws = Workspace::new();
        let (_, scratch) = ws.lend::<f32>(0, 10);
        let panicked =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| scratch.with(|_| panic!("on purpose"))));
        assert!(panicked.is_err());
        scratch.with(|s| s.fill(1.0));
        ws.lend::<f32>(0, 20).1.with(|s| assert_eq!(s.len(), 20));
    }

    /// The first call grows the arenas of all threads, so none is left to grow in a later one.
    #[test]
    fn nothing_grows_after_the_first_call() {
        crate::parallel::with_threads(3, || {
            let mut ws = Workspace::new();
            ws.lend::<f32>(5, 1000);
            let places = |ws: &mut Workspace| -> Vec<usize> {
                ws.arenas.iter_mut().map(|arena| arena.get_mut().unwrap().as_ptr().addr()).collect()
            };
            let before = places(&mut ws);
            assert_eq!(before.len(), 3);
            let (_, scratch) = ws.lend::<f32>(5, 1000);
            crate::parallel::for_each_piece(30, |_| scratch.with(|s| s.fill(1.0)));
            assert_eq!(places(&mut ws), before);
        })
        .unwrap();
    }
}
