//! Level 1. Memory that is asked for once: long-lived buffers on huge pages, and scratch for the pieces of an operation.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

use bytemuck::Pod;
use memmap2::MmapMut;

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
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer's size in bytes fits the address space");
        let map = (bytes > 0).then(|| {
            let map = MmapMut::map_anon(bytes).unwrap_or_else(|e| {
                panic!("the system refused {} MiB of memory: {e}; use a smaller batch", bytes >> 20)
            });
            // Advice only: a kernel without huge pages refuses it, and nothing depends on it.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            map
        });
        Buffer { map, len, element: PhantomData }
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
        self.map.as_ref().map_or(&[], |map| &bytemuck::cast_slice(map)[..self.len])
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.map.as_mut().map_or(&mut [], |map| &mut bytemuck::cast_slice_mut(map)[..self.len])
    }
}

impl<T: Pod> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

/// Scratch memory for the pieces of an operation, one arena per thread. It grows to the largest request and stays.
///
/// The caller owns it and lends it to every operation in turn; after the first step of a training loop it no longer grows.
#[derive(Debug)]
pub struct Workspace {
    arenas: Vec<Mutex<Buffer<u64>>>,
    shared: Mutex<Buffer<u64>>,
}

impl Default for Workspace {
    fn default() -> Self {
        Self::new()
    }
}

impl Workspace {
    /// An empty workspace for the threads of the current rayon pool. In a pool of more threads it works too, but some of
    /// them then wait for each other.
    pub fn new() -> Self {
        let threads = rayon::current_num_threads().max(1);
        Workspace { arenas: (0..threads).map(|_| Mutex::default()).collect(), shared: Mutex::default() }
    }

    /// Lends `len` elements of the calling thread's arena to `work`; their content is whatever was left there. A piece
    /// asks once and splits what it gets.
    ///
    /// # Panics
    /// If a piece panicked while it held this arena.
    pub fn scratch<T: Pod, R>(&self, len: usize, work: impl FnOnce(&mut [T]) -> R) -> R {
        let thread = rayon::current_thread_index().unwrap_or(0) % self.arenas.len();
        lend(&self.arenas[thread], len, work)
    }

    /// Lends `len` elements that belong to an operation as a whole, such as partial sums, to `work`, whose pieces may
    /// use [`Workspace::scratch`] meanwhile. Content and contract as there.
    ///
    /// # Panics
    /// If an operation panicked while it held them.
    pub fn shared<T: Pod, R>(&self, len: usize, work: impl FnOnce(&mut [T]) -> R) -> R {
        lend(&self.shared, len, work)
    }
}

fn lend<T: Pod, R>(arena: &Mutex<Buffer<u64>>, len: usize, work: impl FnOnce(&mut [T]) -> R) -> R {
    let mut arena = arena.lock().expect("no operation panics while it holds scratch");
    arena.reserve((len * size_of::<T>()).div_ceil(size_of::<u64>()));
    work(&mut bytemuck::cast_slice_mut(&mut arena)[..len])
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
    }

    #[test]
    fn scratch_grows_and_keeps_its_place() {
        let ws = Workspace::new();
        let first = ws.scratch::<f32, _>(100, |s| s.as_ptr().addr());
        let second = ws.scratch::<f64, _>(50, |s| s.as_ptr().addr());
        assert_eq!(first, second);
        ws.scratch::<f32, _>(1 << 20, |s| assert_eq!(s.len(), 1 << 20));
    }
}
