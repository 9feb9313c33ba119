//! Level 6. What a network makes of images, and how often it is right.

use crate::data::{Dataset, Draw, Split, Views, written};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::network::Network;
use crate::workspace::Buffer;

/// The class of the largest score, the first of them if several are equal; `None` if a score is NaN or there are none.
pub fn argmax<T: Element>(scores: &[T]) -> Option<usize> {
    if scores.iter().any(|score| score.is_nan()) {
        return None;
    }
    (0..scores.len()).reduce(|best, class| if scores[class] > scores[best] { class } else { best })
}

/// What `network` takes every image of a split for, in the split's order: [`argmax`] of its scores, averaged over `views`,
/// `batch` images at a time.
///
/// # Errors
/// [`Error::Invalid`] if the network is for images of another size, for a split without images, for a batch of 0, and for
/// [six views](Views::Six) of images with a side of 1 pixel.
pub fn predict<T: Element>(
    network: &mut Network<T>,
    data: &Dataset,
    split: Split,
    batch: usize,
    views: Views,
) -> Result<Vec<Option<usize>>> {
    let mut classes = Vec::with_capacity(data.len(split));
    scores(network, data, split, batch, views, |scores, _| classes.push(argmax(scores)))?;
    Ok(classes)
}

/// Calls `each(scores, label)` for every image of a split, in the split's order: with its scores, averaged over `views`, of
/// `batch` images at a time.
///
/// # Errors
/// As [`predict`].
pub fn scores<T: Element>(
    network: &mut Network<T>,
    data: &Dataset,
    split: Split,
    batch: usize,
    views: Views,
    each: impl FnMut(&[T], usize),
) -> Result<()> {
    let all = all_of(data, split)?;
    Batch::new(network, data, batch.min(all.len()))?.scores(network, data, split, views, &all, each)
}

/// The share of a split's images that `network` takes for what they are, 0 to 1. An image with a NaN among its scores
/// counts as wrong.
///
/// # Errors
/// As [`predict`].
pub fn accuracy<T: Element>(
    network: &mut Network<T>,
    data: &Dataset,
    split: Split,
    batch: usize,
    views: Views,
) -> Result<f64> {
    let all = all_of(data, split)?;
    Batch::new(network, data, batch.min(all.len()))?.accuracy(network, data, split, views, &all)
}

/// The indices of a split, of which there is one at least.
fn all_of(data: &Dataset, split: Split) -> Result<Vec<usize>> {
    match data.len(split) {
        0 => Err(Error::invalid(split.name(), "it has 0 images to measure on", "measure on another split")),
        len => Ok((0..len).collect()),
    }
}

/// Memory for one batch: images, labels, scores and their averages.
#[derive(Debug)]
pub(super) struct Batch<T: Element> {
    /// `(size, C, H, W)`
    pub(super) x: Buffer<T>,
    /// `(size)`
    pub(super) y: Vec<usize>,
    /// `(size, classes)`, of one view
    scores: Vec<T>,
    /// `(size, classes)`, of all views
    averages: Vec<T>,
}

impl<T: Element> Batch<T> {
    /// For `size` images of `data` at once.
    pub(super) fn new(network: &Network<T>, data: &Dataset, size: usize) -> Result<Self> {
        let (input, dim) = (network.input(), data.dim());
        if input != dim {
            let problem = format!("it takes images of {}, the data's are {}", written(input), written(dim));
            let fix = format!("make it for images of {}, or give data of its own size", written(dim));
            return Err(Error::invalid("network", problem, fix));
        }
        if size == 0 {
            return Err(Error::invalid("batch size", "a batch of 0 images is none", "give 1 or more"));
        }
        let [scores, averages] = [(); 2].map(|()| vec![T::zero(); size * network.classes()]);
        Ok(Batch { x: Buffer::zeroed(size * data.image_len()), y: vec![0; size], scores, averages })
    }

    /// The share of the images `samples` of a split that are classified correctly.
    pub(super) fn accuracy(
        &mut self,
        network: &mut Network<T>,
        data: &Dataset,
        split: Split,
        views: Views,
        samples: &[usize],
    ) -> Result<f64> {
        let mut correct = 0_usize;
        let count = |scores: &[T], label| correct += usize::from(argmax(scores) == Some(label));
        self.scores(network, data, split, views, samples, count)?;
        Ok(correct as f64 / samples.len() as f64)
    }

    /// Calls `each(scores, label)` for the images `samples` of a split, in this order.
    fn scores(
        &mut self,
        network: &mut Network<T>,
        data: &Dataset,
        split: Split,
        views: Views,
        samples: &[usize],
        mut each: impl FnMut(&[T], usize),
    ) -> Result<()> {
        let classes = network.classes();
        for indices in samples.chunks(self.y.len()) {
            let n = indices.len();
            let (x, y) = (&mut self.x[..n * data.image_len()], &mut self.y[..n]);
            let (scores, averages) = (&mut self.scores[..n * classes], &mut self.averages[..n * classes]);
            averages.fill(T::zero());
            for &(view, weight) in views.weighted() {
                data.fill_batch(Draw::view(split, view), indices, x, y)?;
                network.scores(x, scores)?;
                let weight = T::of(weight);
                averages.iter_mut().zip(&*scores).for_each(|(average, &score)| *average += weight * score);
            }
            for (row, &label) in averages.chunks_exact(classes).zip(&*y) {
                each(row, label);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_largest_score_wins_and_nan_never_does() {
        for (scores, class) in [
            (&[0.5, 2.0, -1.0][..], Some(1)),
            (&[3.0, 3.0], Some(0)),
            (&[f64::NEG_INFINITY; 2], Some(0)),
            (&[0.0, f64::INFINITY], Some(1)),
            (&[1.0, f64::NAN], None),
            (&[f64::NAN, 1.0], None),
            (&[], None),
        ] {
            assert_eq!(argmax(scores), class, "{scores:?}");
        }
    }
}
