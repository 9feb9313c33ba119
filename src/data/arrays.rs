//! Level 5. Images in memory.

use std::fmt::Display;

use ndarray::ArrayView4;

use super::source::{Image, Pixel, Source, Split};
use crate::error::{Error, Result, check_shape};

/// Images `(N, C, H, W)` and their N labels, numbers of any integer type.
pub type Labelled<'a, P, L> = (ArrayView4<'a, P>, &'a [L]);

/// The most classes that are numbered without being asked for by name: a larger label is rather a mistake.
const MOST_NUMBERED: usize = 1 << 16;

/// A data set in memory, of bytes or floats.
#[derive(Clone, Debug)]
pub struct Arrays<P: Pixel> {
    dim: [usize; 3],
    class_names: Vec<String>,
    /// Training, validation, test.
    parts: [Part<P>; 3],
}

#[derive(Clone, Debug)]
struct Part<P> {
    /// `(N, C, H, W)`
    pixels: Vec<P>,
    /// `(N)`
    labels: Vec<usize>,
}

impl<P: Pixel> Arrays<P> {
    /// Copies the arrays, each split as it comes. All images have the size of the training split's; the test split may be
    /// empty, `(0, C, H, W)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the images of two splits differ in size or a split has another number of labels than of images;
    /// [`Error::Invalid`] for a label that is not the index of a class name.
    pub fn new<L: Copy + TryInto<usize> + Display>(
        class_names: Vec<String>,
        train: Labelled<'_, P, L>,
        validation: Labelled<'_, P, L>,
        test: Labelled<'_, P, L>,
    ) -> Result<Self> {
        let classes = class_names.len();
        let (_, c, h, w) = train.0.dim();
        let part = |split, labelled| Part::copy(split, labelled, [c, h, w], classes);
        let parts = [part(Split::Train, train)?, part(Split::Validation, validation)?, part(Split::Test, test)?];
        Ok(Arrays { dim: [c, h, w], class_names, parts })
    }

    /// As [`Arrays::new`], with classes that are called by their numbers, from 0 to the largest label.
    ///
    /// # Errors
    /// As [`Arrays::new`], and [`Error::Invalid`] for a label above 65,535: name the classes if there are so many.
    pub fn numbered<L: Copy + TryInto<usize> + Display>(
        train: Labelled<'_, P, L>,
        validation: Labelled<'_, P, L>,
        test: Labelled<'_, P, L>,
    ) -> Result<Self> {
        let labels = [train.1, validation.1, test.1].into_iter().flatten();
        // A label that is no index is for `new` to refuse, with its place.
        let largest = labels.filter_map(|&label| label.try_into().ok()).filter(|&label| label < MOST_NUMBERED).max();
        let class_names = (0..largest.map_or(0, |label| label + 1)).map(|class| class.to_string()).collect();
        Self::new(class_names, train, validation, test)
    }

    fn part(&self, split: Split) -> &Part<P> {
        let [train, validation, test] = &self.parts;
        match split {
            Split::Train => train,
            Split::Validation => validation,
            Split::Test => test,
        }
    }
}

impl<P: Pixel> Part<P> {
    fn copy<L: Copy + TryInto<usize> + Display>(
        split: Split,
        (images, labels): Labelled<'_, P, L>,
        [c, h, w]: [usize; 3],
        classes: usize,
    ) -> Result<Self> {
        check_shape("data set", split.name(), images.shape(), &[labels.len(), c, h, w])?;
        let label = |(index, &label): (usize, &L)| {
            label
                .try_into()
                .ok()
                .filter(|&label| label < classes)
                .ok_or_else(|| bad_label(split, index, label, classes))
        };
        let labels = labels.iter().enumerate().map(label).collect::<Result<_>>()?;
        Ok(Part { pixels: images.iter().copied().collect(), labels })
    }
}

impl<P: Pixel> Source for Arrays<P> {
    fn dim(&self) -> [usize; 3] {
        self.dim
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn len(&self, split: Split) -> usize {
        self.part(split).labels.len()
    }

    fn image(&self, split: Split, index: usize) -> (Image<'_>, usize) {
        let Part { pixels, labels } = self.part(split);
        let len = self.dim.iter().product::<usize>();
        (P::image(&pixels[index * len..][..len]), labels[index])
    }
}

/// The error of an image whose label is not below `classes`.
pub(super) fn bad_label(split: Split, index: usize, label: impl Display, classes: usize) -> Error {
    let problem = format!("image {index} has label {label}, which is none of {classes} classes");
    let fix = if classes == 0 {
        "number the classes from 0, and name them".into()
    } else {
        format!("number the classes from 0 to {}, or name more of them", classes - 1)
    };
    Error::invalid(split.name(), problem, fix)
}
