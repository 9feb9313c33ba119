//! Level 3. Sums over all images of a batch, the same bits at any number of threads and processes.
//!
//! A gradient of weights adds up terms of every image. A *slot* is one partial sum, of a fixed range of images, in a fixed order.
//! Slots are added up by a balanced binary tree: each with its neighbour, their sums with theirs, and so on. The number of
//! slots is a power of two that follows from sizes alone. So a batch that is cut in halves, quarters, ... where slots
//! meet has the same sums as a whole, however many run at once, if the parts are given the slots that they have in it.

use std::ops::Range;

use crate::element::Element;
use crate::ops::conv::plan::MOST_SLOTS;
use crate::parallel::{Grid, StridedMut, for_each_share, piece_range};
use crate::simd::{Aligned, LANES, vectorized};

/// How a batch is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots {
    images: usize,
    count: usize,
}

impl Slots {
    /// `images` images in `count` slots, a power of two.
    pub(super) fn new(images: usize, count: usize) -> Self {
        Slots { images, count }
    }

    /// Number of slots.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Images of the largest slot.
    pub(super) fn largest(&self) -> usize {
        self.images.div_ceil(self.count)
    }

    /// The images of a slot.
    pub(super) fn images(&self, slot: usize) -> Range<usize> {
        piece_range(self.images, self.count, slot)
    }
}

/// The sum of `count` neighbours, a power of two of them, which lie one after the other in `sums`; returned in the place of
/// the first.
pub(super) fn add_up<T: Element>(sums: &mut [T], count: usize) -> &[T] {
    const CHUNK: usize = 4096;
    let len = sums.len() / count;
    if count > 1 {
        let chunks = Grid::new(sums, (count, len), (count, CHUNK));
        for_each_share(chunks, |_, chunk| vectorized!(add_chunks(chunk)));
    }
    &sums[..len]
}

/// [`add_up`] of a few columns of all sums.
#[inline(always)]
fn add_chunks<T: Element>(mut sums: StridedMut<'_, T>) {
    const WIDTH: usize = 4 * LANES;
    let Aligned(tree) = &mut Aligned([[T::zero(); WIDTH]; MOST_SLOTS]);
    for start in (0..sums.run()).step_by(WIDTH) {
        let width = WIDTH.min(sums.run() - start);
        let mut count = sums.count();
        for (i, node) in tree[..count].iter_mut().enumerate() {
            node[..width].copy_from_slice(&sums.get(i)[start..][..width]);
        }
        while count > 1 {
            count /= 2;
            for i in 0..count {
                let (left, right) = (tree[2 * i], tree[2 * i + 1]);
                for j in 0..WIDTH {
                    tree[i][j] = left[j] + right[j];
                }
            }
        }
        sums.get(0)[start..][..width].copy_from_slice(&tree[0][..width]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition of the tree.
    fn tree(slots: &[f32]) -> f32 {
        match slots {
            [one] => *one,
            _ => tree(&slots[..slots.len() / 2]) + tree(&slots[slots.len() / 2..]),
        }
    }

    #[test]
    fn sums_follow_the_tree_to_the_bit() {
        const LEN: usize = 4096 + 77;
        for count in [1, 2, 4, 8, 16, 32] {
            let value =
                |slot: usize, i: usize| (slot as f32 * 0.37 + i as f32 * 0.11).sin() * 10_f32.powi(slot as i32 % 5);
            let want: Vec<f32> =
                (0..LEN).map(|i| tree(&Vec::from_iter((0..count).map(|slot| value(slot, i))))).collect();
            let mut sums: Vec<f32> = (0..count * LEN).map(|i| value(i / LEN, i % LEN)).collect();
            assert!(add_up(&mut sums, count) == want, "{count} slots");
        }
    }

    #[test]
    fn every_image_has_its_slot() {
        for (images, count) in [(1, 1), (3, 2), (16, 16), (35, 32), (100, 16), (101, 8)] {
            let slots = Slots { images, count };
            let all: Vec<usize> = (0..count).flat_map(|slot| slots.images(slot)).collect();
            assert_eq!(all, Vec::from_iter(0..images));
            assert!(
                (0..count).all(|slot| (1..=slots.largest()).contains(&slots.images(slot).len())),
                "{images} images"
            );
        }
    }

    #[test]
    fn halves_of_a_batch_have_the_slots_of_the_whole() {
        for images in [2, 16, 24, 96] {
            let (whole, half) =
                (Slots { images, count: 16.min(images) }, Slots { images: images / 2, count: 8.min(images / 2) });
            for slot in 0..half.count() {
                let own = half.images(slot);
                assert_eq!(whole.images(slot), own);
                let second = half.count() + slot;
                assert_eq!(whole.images(second), own.start + images / 2..own.end + images / 2);
            }
        }
    }
}
