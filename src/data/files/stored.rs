//! Level 5. Images of one size as they lie in files, and which of them belong to which split.

use rand::Rng;

use crate::data::map::Bytes;
use crate::data::source::{Image, Source, Split};
use crate::random::{Purpose, stream};

/// Of so many training images of a class, one is held out for a split that the files do not have.
const HELD_OUT: usize = 10;
/// The split is part of the data set, not of an experiment: the seed of a training does not change it.
const HOLD_OUT_SEED: u64 = 0;

/// Images in files: a [`Source`]. They are mapped, so that memory holds those that are in use; where a file is compressed,
/// they are unpacked in memory.
///
/// Mapped files must stay as they are while they are open; [`Cifar10::open`](crate::data::Cifar10::open) says what is promised if
/// they do not.
#[derive(Debug)]
pub struct Stored {
    pub(super) dim: [usize; 3],
    pub(super) class_names: Vec<String>,
    /// Of all splits, one behind the other.
    pub(super) blocks: Vec<Block>,
    /// Of the images of all blocks.
    pub(super) labels: Vec<usize>,
    /// Training, validation, test: indices into all blocks.
    pub(super) splits: [Vec<usize>; 3],
    pub(super) notes: Vec<String>,
}

/// Images of a file, at equal distances.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) bytes: Bytes,
    /// Where the first image begins, in bytes.
    pub(super) start: usize,
    /// From one image to the next, in bytes.
    pub(super) stride: usize,
    pub(super) images: usize,
    pub(super) values: Values,
}

/// What the values of an image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Values {
    Bytes,
    /// `f32` of this machine, aligned.
    Floats,
}

impl Block {
    /// Image `index`, of `len` values.
    fn image(&self, index: usize, len: usize) -> Image<'_> {
        let from = &self.bytes[self.start + index * self.stride..];
        match self.values {
            Values::Bytes => Image::Bytes(&from[..len]),
            Values::Floats => Image::Floats(bytemuck::cast_slice(&from[..len * size_of::<f32>()])),
        }
    }
}

impl Source for Stored {
    fn dim(&self) -> [usize; 3] {
        self.dim
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn len(&self, split: Split) -> usize {
        self.splits[split as usize].len()
    }

    fn image(&self, split: Split, index: usize) -> (Image<'_>, usize) {
        let index = self.splits[split as usize][index];
        let (mut rest, label) = (index, self.labels[index]);
        for block in &self.blocks {
            if rest < block.images {
                return (block.image(rest, self.dim.iter().product()), label);
            }
            rest -= block.images;
        }
        unreachable!("there is a label for every image of a block")
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }
}

/// The splits of images with these labels, of which the first `lens[0]` are for training, the next `lens[1]` for validation
/// and the last `lens[2]` for tests.
///
/// Where there are none for validation, a tenth of the training images of each class, rounded up, takes their place if it
/// leaves some for training; where there are none for tests either, another tenth, rounded down, is for them. They are those
/// of the class with the smallest keys. Each split is in the order of the keys: in files, images often are sorted by class,
/// and the first so many of a split should tell something about it.
pub(super) fn splits(labels: &[usize], lens: [usize; 3], key: impl Fn(usize) -> u64) -> [Vec<usize>; 3] {
    let [train, validation, test] = lens;
    let given = [0..train, train..train + validation, train + validation..train + validation + test];
    let mut splits = given.map(|range| range.collect::<Vec<_>>());
    let order = |splits: &mut [Vec<usize>; 3]| {
        splits.iter_mut().for_each(|split| split.sort_by_cached_key(|&index| (key(index), index)));
    };
    if validation > 0 {
        order(&mut splits);
        return splits;
    }
    let classes = labels.iter().max().map_or(0, |label| label + 1);
    let mut of_class = vec![Vec::new(); classes];
    splits[0].drain(..).for_each(|index| of_class[labels[index]].push((key(index), index)));
    for mut images in of_class {
        images.sort_unstable();
        let n = images.len();
        let held_out = n.div_ceil(HELD_OUT).min(n.saturating_sub(1));
        let mut images = images.into_iter().map(|(_, index)| index);
        splits[1].extend(images.by_ref().take(held_out));
        splits[2].extend(images.by_ref().take(if test == 0 { n / HELD_OUT } else { 0 }));
        splits[0].extend(images);
    }
    order(&mut splits);
    splits
}

/// The key of an image that has nothing but its place in a file.
pub(super) fn key_of_index(index: usize) -> u64 {
    stream(HOLD_OUT_SEED, Purpose::HoldOut, 0, index as u64).next_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_of_every_class_is_held_out_whatever_the_order() {
        // 25 of class 0, 9 of class 1, one of class 3, none of class 2.
        let labels: Vec<usize> =
            (0..35).map(|i| if i < 25 { 0 } else { usize::from(i < 34) + 3 * usize::from(i == 34) }).collect();
        let [train, validation, test] = splits(&labels, [35, 0, 0], key_of_index);
        let count = |split: &[usize], class| split.iter().filter(|&&i| labels[i] == class).count();
        assert_eq!([0, 1, 2, 3].map(|class| count(&validation, class)), [3, 1, 0, 0]);
        assert_eq!([0, 1, 2, 3].map(|class| count(&test, class)), [2, 0, 0, 0]);
        let mut all = [train.clone(), validation.clone(), test].concat();
        all.sort_unstable();
        assert_eq!(all, (0..35).collect::<Vec<_>>(), "every image is in one split");
        assert_ne!(validation[..3], [0, 1, 2], "they are drawn, not the first");

        // An image more moves at most one of those of its class that were held out.
        let more: Vec<usize> = labels.iter().copied().chain([0]).collect();
        let [_, again, _] = splits(&more, [36, 0, 0], key_of_index);
        assert!(validation.iter().filter(|i| !again.contains(i)).count() <= 1, "{validation:?} {again:?}");
    }

    #[test]
    fn splits_that_are_there_stay_and_are_mixed() {
        let labels: Vec<usize> = (0..60).map(|i| i / 10).collect();
        let sorted = |lens| {
            splits(&labels, lens, key_of_index).map(|mut split| {
                split.sort_unstable();
                split
            })
        };
        assert_eq!(sorted([30, 20, 10]), [(0..30).collect(), (30..50).collect(), (50..60).collect::<Vec<_>>()]);
        assert_eq!(sorted([40, 20, 0])[2], [] as [usize; 0]);
        let [train, validation, test] = sorted([40, 0, 20]);
        assert_eq!((train.len(), validation.len(), test), (36, 4, (40..60).collect()));
        let classes: std::collections::BTreeSet<_> =
            splits(&labels, [60, 0, 0], key_of_index)[0][..20].iter().map(|&i| labels[i]).collect();
        assert!(classes.len() > 3, "the first 20 are of {classes:?}");
    }
}
