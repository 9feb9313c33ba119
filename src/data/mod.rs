//! Level 4. Data: CIFAR-10 by memory map, splits, normalisation, augmentation, batches.
//!
//! ```no_run
//! use gemmnet::data::{Augment, Batches, Dataset, Normalization, PIXELS, Sampler, Split};
//!
//! let data = Dataset::open("data".as_ref(), Normalization::MeanImage)?;
//! let batches = Batches::new(data.len(Split::Train), 50)?;
//! let augment = Augment { flip: true, shift: 4 };
//! let (mut x, mut y, mut order) = (vec![0_f32; batches.size * PIXELS], vec![0; batches.size], Vec::new());
//! for epoch in 0..10 {
//!     Sampler::ShuffledEpochs.order(batches, 0, epoch, &mut order);
//!     for indices in order.chunks_exact(batches.size) {
//!         data.fill_batch(Split::Train, indices, Some(&augment), 0, epoch, &mut x, &mut y)?;
//!     }
//! }
//! # Ok::<(), gemmnet::Error>(())
//! ```

mod augment;
pub mod cifar10;
#[cfg(feature = "cli")]
pub mod fetch;
mod normalize;
mod order;
pub mod pictures;
#[cfg(feature = "cli")]
pub mod places;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ndarray::ArrayView4;

pub use augment::Augment;
pub use cifar10::{CHANNELS, Cifar10, PIXELS, Record, Records, SIDE};
pub use normalize::{Normalization, Normalizer};
pub use order::{Batches, Sampler};

use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::parallel;
use augment::Placement;

/// Images in [`Split::Test`], as in the seed.
const SMALL_TEST: usize = 1_000;
/// Training records of the official files.
const OFFICIAL_TRAIN: usize = 50_000;

/// A part of a [`Dataset`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// What the network learns from.
    Train,
    /// What hyperparameters and the best epoch are chosen by.
    Validation,
    /// The first 1,000 images of the test batch, as in the seed.
    Test,
    /// The whole test batch: what published accuracies refer to.
    TestFull,
}

/// Images `(3, 32, 32)` with labels in splits, and how the images are normalised.
///
/// Of the official 50,000 training records, the first 49,000 are the training split and the last 1,000 the validation
/// split, as in the seed. That is 2 %, and other numbers of records are split alike, with at least one for validation;
/// [`Dataset::notes`] then says so.
#[derive(Clone, Debug)]
pub struct Dataset {
    train: Samples,
    validation: Samples,
    test: Samples,
    test_full: Samples,
    normalizer: Normalizer,
    class_names: Vec<String>,
    notes: Vec<String>,
}

/// Images `(N, 3, 32, 32)` and their N labels.
pub type Labelled<'a> = (ArrayView4<'a, u8>, &'a [u8]);

impl Dataset {
    /// The batches of a folder: see [`Cifar10::open`] and [`Dataset::from_cifar10`].
    ///
    /// # Errors
    /// As those two.
    pub fn open(dir: &Path, normalization: Normalization) -> Result<Self> {
        Self::from_cifar10(&Cifar10::open(dir)?, normalization)
    }

    /// Splits the records and measures the normalisation on the training split.
    ///
    /// # Errors
    /// [`Error::Data`] if there is only one training record.
    pub fn from_cifar10(files: &Cifar10, normalization: Normalization) -> Result<Self> {
        let records = Samples::new(files.train.clone());
        if records.len() < 2 {
            let problem = "holds one training record, which cannot be split into training and validation";
            return Err(Error::data(&files.dir, problem, "add records or run `gemmnet data fetch`"));
        }
        let held_out = (records.len() / 50).max(1);
        let train_len = records.len() - held_out;
        let mut notes = Vec::new();
        if records.len() != OFFICIAL_TRAIN {
            notes.push(format!(
                "{} holds {} training records, not CIFAR-10's {OFFICIAL_TRAIN}: the last 2 % ({held_out}) are for \
                 validation, the other {train_len} for training",
                files.dir.display(),
                records.len()
            ));
        }
        let test_full = Samples::new(vec![files.test.clone()]);
        if test_full.len() < SMALL_TEST {
            notes.push(format!("the test batch holds {} records, fewer than {SMALL_TEST}", test_full.len()));
        }
        let train = records.slice(0..train_len);
        Ok(Dataset {
            normalizer: Normalizer::measure(&train, normalization),
            train,
            validation: records.slice(train_len..records.len()),
            test: test_full.slice(0..test_full.len().min(SMALL_TEST)),
            test_full,
            class_names: files.class_names.clone(),
            notes,
        })
    }

    /// A data set in memory, each split as it comes; [`Split::TestFull`] is all of `test`. The classes are numbered from
    /// 0 to the largest label.
    ///
    /// # Errors
    /// [`Error::Shape`] if a split is empty, its images are not `(N, 3, 32, 32)` or its labels not N.
    pub fn from_arrays(
        train: Labelled<'_>,
        validation: Labelled<'_>,
        test: Labelled<'_>,
        normalization: Normalization,
    ) -> Result<Self> {
        let largest = [train.1, validation.1, test.1].into_iter().flatten().max();
        let class_names = (0..=*largest.unwrap_or(&0)).map(|class| class.to_string()).collect();
        let train = Samples::copy("training images", train)?;
        let validation = Samples::copy("validation images", validation)?;
        let test_full = Samples::copy("test images", test)?;
        Ok(Dataset {
            normalizer: Normalizer::measure(&train, normalization),
            train,
            validation,
            test: test_full.slice(0..test_full.len().min(SMALL_TEST)),
            test_full,
            class_names,
            notes: Vec::new(),
        })
    }

    /// The same data, normalised as `normalizer` says: that of a checkpoint.
    #[must_use]
    pub fn with_normalizer(mut self, normalizer: Normalizer) -> Self {
        self.normalizer = normalizer;
        self
    }

    /// The same data with the first `samples` of the training split only, for quick runs and for overfitting on purpose.
    /// The normalisation stays that of the whole training split, as in the seed.
    ///
    /// # Errors
    /// [`Error::Invalid`] for 0 or for more than there are.
    pub fn limit_train(mut self, samples: usize) -> Result<Self> {
        let len = self.train.len();
        if samples == 0 || samples > len {
            let problem = format!("{samples} of {len} training images cannot be used");
            return Err(Error::invalid("training split", problem, format!("give 1 to {len}")));
        }
        self.train = self.train.slice(0..samples);
        Ok(self)
    }

    /// Number of images.
    pub fn len(&self, split: Split) -> usize {
        self.samples(split).len()
    }

    /// Image `index` of a split, as in the file, and its label.
    ///
    /// # Panics
    /// If there is no such image.
    pub fn record(&self, split: Split, index: usize) -> Record<'_> {
        self.samples(split).get(index)
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.class_names.len()
    }

    /// Names of the classes, by label.
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// How images are normalised: for checkpoints.
    pub fn normalizer(&self) -> &Normalizer {
        &self.normalizer
    }

    /// Sentences about how this data differs from what one would expect of CIFAR-10. Usually none.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Writes the normalised images `indices` of a split to `x` `(N, 3, 32, 32)` and their labels to `y` `(N)`.
    ///
    /// Augmentation is drawn from (`seed`, `epoch`, index of the image): the same whatever the batch or the threads.
    /// Allocates nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` or `y` do not fit `indices`; [`Error::Invalid`] if there is no such image, or if `augment`
    /// shifts an image out of sight.
    pub fn fill_batch<T: Element>(
        &self,
        split: Split,
        indices: &[usize],
        augment: Option<&Augment>,
        seed: u64,
        epoch: u64,
        x: &mut [T],
        y: &mut [usize],
    ) -> Result<()> {
        let samples = self.samples(split);
        check_shape("batch", "x", &[x.len()], &[indices.len() * PIXELS])?;
        check_shape("batch", "y", &[y.len()], &[indices.len()])?;
        if let Some(augment) = augment {
            augment.check()?;
        }
        for (label, &index) in y.iter_mut().zip(indices) {
            if index >= samples.len() {
                let problem = format!("there is no image {index} among {}", samples.len());
                return Err(Error::invalid("batch", problem, "give indices below the length of the split"));
            }
            *label = usize::from(samples.get(index).1);
        }
        parallel::for_each_chunk_mut(x, PIXELS, |i, image| {
            let placement = augment.map_or(Placement::CENTRED, |a| a.draw(seed, epoch, indices[i]));
            self.normalizer.write(samples.get(indices[i]).0, placement, image);
        });
        Ok(())
    }

    fn samples(&self, split: Split) -> &Samples {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
            Split::Test => &self.test,
            Split::TestFull => &self.test_full,
        }
    }
}

/// Consecutive records of several files, numbered through.
#[derive(Clone, Debug)]
struct Samples {
    /// Never empty ones.
    parts: Vec<(Arc<Records>, Range<usize>)>,
}

impl Samples {
    fn new(files: Vec<Arc<Records>>) -> Self {
        Samples { parts: files.into_iter().map(|records| (records.clone(), 0..records.len())).collect() }
    }

    /// Interleaves labels and images as a batch file does, so that one code reads both.
    fn copy(what: &'static str, (images, labels): Labelled<'_>) -> Result<Self> {
        let n = labels.len();
        if n == 0 {
            return Err(Error::Shape { op: "dataset", what, expected: "1 or more".into(), got: vec![0] });
        }
        check_shape("dataset", what, images.shape(), &[n, CHANNELS, SIDE, SIDE])?;
        let mut bytes = Vec::with_capacity(n * cifar10::RECORD);
        for (&label, image) in labels.iter().zip(images.outer_iter()) {
            bytes.push(label);
            bytes.extend(image.iter());
        }
        Ok(Self::new(vec![Arc::new(Records::from_bytes(bytes))]))
    }

    fn len(&self) -> usize {
        self.parts.iter().map(|part| part.1.len()).sum()
    }

    fn get(&self, index: usize) -> Record<'_> {
        let mut rest = index;
        for (records, range) in &self.parts {
            if rest < range.len() {
                return records.get(range.start + rest);
            }
            rest -= range.len();
        }
        panic!("there is no image {index} among {}", self.len());
    }

    fn slice(&self, wanted: Range<usize>) -> Self {
        let (mut parts, mut start) = (Vec::new(), 0);
        for (records, range) in &self.parts {
            let end = start + range.len();
            let (from, to) = (wanted.start.clamp(start, end), wanted.end.clamp(start, end));
            if from < to {
                parts.push((records.clone(), range.start + from - start..range.start + to - start));
            }
            start = end;
        }
        Samples { parts }
    }
}
