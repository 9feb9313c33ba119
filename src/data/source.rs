//! Level 5. What a data set is made of: labelled images in splits, of any size and number of channels.

use std::fmt::Debug;

/// A part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// What the network learns from.
    Train,
    /// What hyperparameters and the best epoch are chosen by.
    Validation,
    /// What the final accuracy is measured on.
    Test,
}

impl Split {
    /// All of them.
    pub const ALL: [Split; 3] = [Split::Train, Split::Validation, Split::Test];

    /// As errors call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Split::Train => "training split",
            Split::Validation => "validation split",
            Split::Test => "test split",
        }
    }
}

/// The pixels of an image `(C, H, W)`, where they lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Image<'a> {
    /// 0 to 255.
    Bytes(&'a [u8]),
    /// On whatever scale. `gemmnet predict` reads pictures on the scale of bytes: train on that if it is to be used.
    Floats(&'a [f32]),
}

impl Image<'_> {
    /// Number of values: `C * H * W`.
    pub fn len(&self) -> usize {
        match self {
            Image::Bytes(pixels) => pixels.len(),
            Image::Floats(pixels) => pixels.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Value `index`, from 0.
    ///
    /// # Panics
    /// If there is no such value.
    pub fn value(&self, index: usize) -> f32 {
        match self {
            Image::Bytes(pixels) => pixels[index].into(),
            Image::Floats(pixels) => pixels[index],
        }
    }
}

/// What pixels may be: `u8` or `f32`.
pub trait Pixel: Copy + Debug + Into<f32> + Into<f64> + Send + Sync + 'static {
    /// The image with these pixels.
    fn image(pixels: &[Self]) -> Image<'_>;
}

impl Pixel for u8 {
    fn image(pixels: &[Self]) -> Image<'_> {
        Image::Bytes(pixels)
    }
}

impl Pixel for f32 {
    fn image(pixels: &[Self]) -> Image<'_> {
        Image::Floats(pixels)
    }
}

/// Where images come from: files, arrays, or what a program draws.
///
/// All images have one size. They are lent, not copied, and the same index always gives the same image: a batch may ask
/// for them in any order, from several threads. [`Dataset::new`](super::Dataset::new) checks sizes and labels once.
pub trait Source: Debug + Send + Sync {
    /// `[C, H, W]` of every image: channels, height, width, each 1 or more.
    fn dim(&self) -> [usize; 3];

    /// Names of the classes, by label.
    fn class_names(&self) -> &[String];

    /// Number of images in a split. The test split may be empty, the others may not.
    fn len(&self, split: Split) -> usize;

    /// Image `index` of a split, `C * H * W` values row by row, channel after channel; and its label, below the number of
    /// classes.
    ///
    /// # Panics
    /// If there is no such image.
    fn image(&self, split: Split, index: usize) -> (Image<'_>, usize);

    /// Sentences about how this data differs from what one would expect of it. Usually none.
    fn notes(&self) -> &[String] {
        &[]
    }
}

/// A size as people write it: `3x32x32`.
pub(crate) fn written(dim: [usize; 3]) -> String {
    dim.map(|n| n.to_string()).join("x")
}
