//! Level 7. What the network that is kept makes of the validation images.

use super::data::{Evaluation, Picture};
use super::pictures::picture;
use crate::cli::eval::Confusion;
use crate::cli::predict::softmax;
use crate::data::{Dataset, Image, Split, Views};
use crate::element::Element;
use crate::error::Result;
use crate::nn::network::Network;
use crate::train::{argmax, scores};

/// Images that are shown, of those that the network is most wrong about.
const WORST: usize = 24;

/// Shows `network` the validation images, `batch` at a time.
pub(in crate::cli) fn evaluate<T: Element>(
    network: &mut Network<T>,
    data: &Dataset,
    batch: usize,
) -> Result<Evaluation> {
    let (classes, images) = (data.classes(), data.len(Split::Validation));
    let mut confusion = Confusion::new(classes);
    let (mut wrong, mut index): (Vec<Seen>, usize) = (Vec::new(), 0);
    scores(network, data, Split::Validation, batch, Views::One, |scores, label| {
        let predicted = argmax(scores);
        confusion.add(label, predicted);
        if predicted != Some(label) {
            wrong.push(Seen::new(index, label, predicted, scores));
        }
        index += 1;
    })?;
    // The worst first, and of those alike in the order of the split.
    wrong.sort_by(|a, b| a.of_label().total_cmp(&b.of_label()));
    wrong.truncate(WORST);
    let Confusion { counts: confusion, unclassified } = confusion;
    let worst = wrong.into_iter().map(|seen| seen.picture(data)).collect();
    Ok(Evaluation { images, confusion, unclassified, worst })
}

/// An image that the network takes for something else.
struct Seen {
    index: usize,
    label: usize,
    predicted: Option<usize>,
    /// Of the label and of what it is taken for; none where scores are no numbers.
    probabilities: Option<[f64; 2]>,
}

impl Seen {
    fn new<T: Element>(index: usize, label: usize, predicted: Option<usize>, scores: &[T]) -> Self {
        let all = softmax(scores);
        Seen { index, label, predicted, probabilities: predicted.map(|class| [all[label], all[class]]) }
    }

    fn of_label(&self) -> f64 {
        self.probabilities.map_or(-1.0, |[label, _]| label)
    }

    fn picture(self, data: &Dataset) -> Picture {
        let Seen { index, label, predicted, probabilities } = self;
        let (image, _) = data.image(Split::Validation, index);
        Picture {
            index,
            label,
            predicted,
            label_probability: probabilities.map(|[label, _]| label),
            predicted_probability: probabilities.map(|[_, predicted]| predicted),
            png: picture(data.dim(), &bytes(image, data.image_len())),
        }
    }
}

/// Pixels from 0 to 255; other numbers from the least to the largest.
fn bytes(image: Image<'_>, len: usize) -> Vec<u8> {
    if let Image::Bytes(bytes) = image {
        return bytes.to_vec();
    }
    let values: Vec<f32> = (0..len).map(|i| image.value(i)).collect();
    let (least, most) = values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
    values.iter().map(|x| (255.0 * (x - least) / (most - least).max(f32::MIN_POSITIVE)) as u8).collect()
}
