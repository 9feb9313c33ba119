//! Level 5. A source of images, normalised, and its batches.

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

use super::arrays::{Arrays, Labelled, bad_label};
use super::cifar10::Cifar10;
use super::draw::Draw;
use super::normalize::{Normalization, Normalizer};
use super::source::{Image, Pixel, Source, Split, written};
use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::parallel;

/// Labelled images in splits, and how they are normalised. A clone shares the images.
#[derive(Clone, Debug)]
pub struct Dataset {
    source: Arc<dyn Source>,
    normalizer: Normalizer,
    /// Images in use of the training, validation and test split: the first so many.
    lens: [usize; 3],
}

impl Dataset {
    /// Checks every label and size of the source and measures the normalisation on the training split.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the training or validation split is empty, a label is not below the number of classes (with
    /// the image's index) or a training image holds a number that is not finite; [`Error::Shape`] if an image is not
    /// `C * H * W` values, or if such a size cannot be.
    pub fn new(source: Arc<dyn Source>, normalization: Normalization) -> Result<Self> {
        check(&*source)?;
        let normalizer = Normalizer::measure(&*source, normalization)?;
        let lens = Split::ALL.map(|split| source.len(split));
        Ok(Dataset { source, normalizer, lens })
    }

    /// CIFAR-10's batches in a folder: see [`Cifar10::open`].
    ///
    /// # Errors
    /// As there.
    pub fn open(dir: &Path, normalization: Normalization) -> Result<Self> {
        Self::new(Arc::new(Cifar10::open(dir)?), normalization)
    }

    /// Copies of images in memory, of any size: see [`Arrays::numbered`], and [`Arrays::new`] for classes with names.
    ///
    /// # Errors
    /// As there and as [`Dataset::new`].
    pub fn from_arrays<P: Pixel, L: Copy + TryInto<usize> + Display>(
        train: Labelled<'_, P, L>,
        validation: Labelled<'_, P, L>,
        test: Labelled<'_, P, L>,
        normalization: Normalization,
    ) -> Result<Self> {
        Self::new(Arc::new(Arrays::numbered(train, validation, test)?), normalization)
    }

    /// The same data, normalised by other statistics than its own: those of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the normaliser is for images of another size.
    pub fn with_normalizer(mut self, normalizer: Normalizer) -> Result<Self> {
        let (wanted, dim) = (normalizer.dim(), self.dim());
        if wanted != dim {
            let problem = format!("it is for images of {}, the data's are {}", written(wanted), written(dim));
            return Err(Error::invalid("normaliser", problem, "give the data that it was measured on, or like it"));
        }
        self.normalizer = normalizer;
        Ok(self)
    }

    /// The same data with the first `images` of a split only, for quick runs and for overfitting on purpose. The
    /// normalisation stays that of the whole training split, as in CS231n.
    ///
    /// # Errors
    /// [`Error::Invalid`] for 0 or for more than there are.
    pub fn limit(mut self, split: Split, images: usize) -> Result<Self> {
        let len = self.len(split);
        if images == 0 || images > len {
            let problem = format!("{images} of {len} images cannot be used");
            return Err(Error::invalid(split.name(), problem, format!("give 1 to {len}")));
        }
        self.lens[split as usize] = images;
        Ok(self)
    }

    /// `[C, H, W]` of every image: channels, height, width.
    pub fn dim(&self) -> [usize; 3] {
        self.source.dim()
    }

    /// Values of an image: `C * H * W`.
    pub fn image_len(&self) -> usize {
        self.dim().iter().product()
    }

    /// Number of images.
    pub fn len(&self, split: Split) -> usize {
        self.lens[split as usize]
    }

    /// Image `index` of a split, as in the source, and its label.
    ///
    /// # Panics
    /// If there is no such image.
    pub fn image(&self, split: Split, index: usize) -> (Image<'_>, usize) {
        assert!(index < self.len(split), "there is no image {index} among {}", self.len(split));
        self.source.image(split, index)
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.class_names().len()
    }

    /// Names of the classes, by label.
    pub fn class_names(&self) -> &[String] {
        self.source.class_names()
    }

    /// How images are normalised: for checkpoints.
    pub fn normalizer(&self) -> &Normalizer {
        &self.normalizer
    }

    /// Sentences about how this data differs from what one would expect of it. Usually none.
    pub fn notes(&self) -> &[String] {
        self.source.notes()
    }

    /// Writes the normalised images `indices` of a split to `x` `(N, C, H, W)` and their labels to `y` `(N)`.
    ///
    /// Random changes depend on (`seed`, `epoch`, index of the image): they are the same whatever the batch or the threads.
    /// Allocates nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` or `y` do not fit `indices`; [`Error::Invalid`] if there is no such image, or if an image
    /// can be moved or cut out of sight.
    pub fn fill_batch<T: Element>(&self, draw: Draw, indices: &[usize], x: &mut [T], y: &mut [usize]) -> Result<()> {
        let Draw { split, change } = draw;
        check_shape("batch", "x", &[x.len()], &[indices.len() * self.image_len()])?;
        check_shape("batch", "y", &[y.len()], &[indices.len()])?;
        change.check(self.dim())?;
        for (label, &index) in y.iter_mut().zip(indices) {
            if index >= self.len(split) {
                let problem = format!("there is no image {index} among {}", self.len(split));
                return Err(Error::invalid("batch", problem, "give indices below the length of the split"));
            }
            *label = self.image(split, index).1;
        }
        parallel::for_each_chunk_mut(x, self.image_len(), |i, out| {
            let placement = change.placement(self.dim(), indices[i]);
            self.normalizer.write(self.image(split, indices[i]).0, &placement, out);
        });
        Ok(())
    }
}

/// What [`Source`] asks of those who implement it.
fn check(source: &dyn Source) -> Result<()> {
    let dim = source.dim();
    let len = dim.iter().try_fold(1_usize, |len, &n| len.checked_mul(n)).filter(|&len| len > 0);
    let Some(len) = len else {
        let expected = "channels, height and width of 1 or more, as a memory can hold them".into();
        return Err(Error::Shape { op: "data set", what: "an image", expected, got: dim.to_vec() });
    };
    let classes = source.class_names().len();
    for split in Split::ALL {
        let images = source.len(split);
        if images == 0 && split != Split::Test {
            return Err(Error::invalid(split.name(), "it has 0 images", "give it 1 or more"));
        }
        for index in 0..images {
            let (image, label) = source.image(split, index);
            check_shape("data set", "an image", &[image.len()], &[len])?;
            if label >= classes {
                return Err(bad_label(split, index, label, classes));
            }
        }
    }
    Ok(())
}
