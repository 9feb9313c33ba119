//! Level 2. Sums over all images of a batch, the same bits at any number of threads.
//!
//! A gradient of weights adds up terms of every image. A *slot* is one partial sum, of a fixed range of images; slots run
//! in parallel, images within one in order, and the slots are added up in order at the end.

use std::ops::Range;

use crate::element::Element;
use crate::parallel::{for_each_chunk_mut, piece_range};
use crate::simd::{add_assign, vectorized};

/// How a batch is cut. Depends on sizes alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots {
    images: usize,
    count: usize,
    /// Elements from one slot to the next: whole cache lines.
    pitch: usize,
}

impl Slots {
    /// Slots of `len` elements: enough of them for many threads, few enough that they stay small.
    pub(crate) fn new<T>(images: usize, len: usize) -> Self {
        const BYTES: usize = 16 << 20;
        let pitch = len.next_multiple_of(64 / size_of::<T>()).max(1);
        Slots { images, count: (BYTES / (pitch * size_of::<T>())).clamp(4, 32).min(images).max(1), pitch }
    }

    /// Elements of all slots.
    pub(crate) fn len(&self) -> usize {
        self.count * self.pitch
    }

    /// Images of the largest slot.
    pub(crate) fn images(&self) -> usize {
        self.images.div_ceil(self.count)
    }

    /// Calls `fill(images, slot)`, which sets the slot to the sum over these images, for every slot of `data`; returns
    /// the sum of all.
    pub(crate) fn sum<'a, T: Element>(
        &self,
        data: &'a mut [T],
        fill: impl Fn(Range<usize>, &mut [T]) + Sync + Send,
    ) -> &'a [T] {
        const CHUNK: usize = 4096;
        if self.images == 0 {
            data.fill(T::zero());
            return &data[..self.pitch];
        }
        for_each_chunk_mut(data, self.pitch, |slot, sums| fill(piece_range(self.images, self.count, slot), sums));
        let (total, rest) = data.split_at_mut(self.pitch);
        let rest = &*rest;
        for_each_chunk_mut(total, CHUNK, |chunk, total| {
            vectorized!({
                for slot in rest.chunks_exact(self.pitch) {
                    add_assign(total, &slot[chunk * CHUNK..]);
                }
            },);
        });
        total
    }
}
