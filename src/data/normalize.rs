//! Level 5. From pixels to numbers around zero.

use serde::{Deserialize, Serialize};

use super::augment::{Fill, Placement};
use super::source::{Image, Pixel, Source, Split};
use super::view::View;
use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::parallel::{self, piece_range};
use crate::simd::{LANES, vectorized};

/// Images summed by one piece, at least.
const PIECE: usize = 1024;
/// Sums of pixels that all pieces together may keep, in numbers (32 MB), as long as there are four pieces.
const SUMS: usize = 1 << 22;

/// Which statistics of the training split to normalise with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalization {
    /// Subtract the mean image, as CS231n does: pixels stay on their scale.
    #[default]
    MeanImage,
    /// Subtract each channel's mean and divide by its standard deviation, as is usual for deep networks.
    PerChannel,
}

/// `x = (pixel - mean) * scale`, with a mean per pixel and a scale per channel, for images of one size.
#[derive(Clone, Debug, PartialEq)]
pub struct Normalizer {
    dim: [usize; 3],
    mean: Vec<f32>,
    scale: Vec<f32>,
}

impl Normalizer {
    /// From the numbers of a checkpoint, for images `dim = [C, H, W]`: a mean for every pixel `(C, H, W)` and a scale for
    /// every channel `(C)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if they have other lengths, [`Error::Invalid`] if one of them is not finite.
    pub fn new(dim: [usize; 3], mean: Vec<f32>, scale: Vec<f32>) -> Result<Self> {
        let [channels, height, width] = dim;
        // A size that overflows is not that of a vector that exists.
        let pixels = channels.saturating_mul(height).saturating_mul(width);
        check_shape("normaliser", "mean", &[mean.len()], &[pixels])?;
        check_shape("normaliser", "scale", &[scale.len()], &[channels])?;
        if let Some(value) = mean.iter().chain(&scale).find(|value| !value.is_finite()) {
            let problem = format!("{value} is not a number to normalise with");
            return Err(Error::invalid("normaliser", problem, "restore it from a copy, or measure it again"));
        }
        Ok(Normalizer { dim, mean, scale })
    }

    /// For bytes, from the mean and the standard deviation of each channel of pixels from 0 to 1, as other programs state them.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is not one of each for every channel, if a standard deviation is not above 0, or if a number
    /// is not finite.
    pub fn per_channel(dim: [usize; 3], mean: &[f32], std: &[f32]) -> Result<Self> {
        let [channels, height, width] = dim;
        for (name, values) in [("mean", mean), ("std", std)] {
            if values.len() != channels {
                let problem = format!("{} numbers for {channels} channels", values.len());
                return Err(Error::invalid(name, problem, "give one for each channel"));
            }
        }
        if let Some(std) = std.iter().find(|&&std| std.is_nan() || std <= 0.0) {
            return Err(Error::invalid("std", format!("a standard deviation of {std}"), "give numbers above 0"));
        }
        let mean = mean.iter().flat_map(|mean| std::iter::repeat_n(255.0 * mean, height * width)).collect();
        Normalizer::new(dim, mean, std.iter().map(|std| 1.0 / (255.0 * std)).collect())
    }

    /// `[C, H, W]` of the images that it is for: channels, height, width.
    pub fn dim(&self) -> [usize; 3] {
        self.dim
    }

    /// What is subtracted from every pixel, `(C, H, W)`.
    pub fn mean(&self) -> &[f32] {
        &self.mean
    }

    /// What every channel is then multiplied by, `(C)`.
    pub fn scale(&self) -> &[f32] {
        &self.scale
    }

    /// Normalises one image `(C, H, W)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `image` or `out` has another length.
    pub fn apply<T: Element>(&self, image: Image<'_>, out: &mut [T]) -> Result<()> {
        check_shape("normaliser", "image", &[image.len()], &[self.mean.len()])?;
        check_shape("normaliser", "out", &[out.len()], &[self.mean.len()])?;
        self.write(image, &View::PLAIN.into(), out);
        Ok(())
    }

    /// Statistics of the training split of `source`, which has images.
    ///
    /// The sums are `f64`, of whole numbers for bytes: exact up to 2^53, so that their order does not matter. For floats it
    /// does, and depends on the number and size of images alone.
    pub(super) fn measure(source: &dyn Source, normalization: Normalization) -> Result<Self> {
        let [channels, height, width] = source.dim();
        let (mean, scale) = match normalization {
            Normalization::MeanImage => (mean_image(source), vec![1.0; channels]),
            Normalization::PerChannel => {
                let statistics = channel_statistics(source);
                let mean = statistics.iter().flat_map(|s| std::iter::repeat_n(s.0, height * width));
                (mean.collect(), statistics.iter().map(|s| s.1).collect())
            }
        };
        if mean.iter().any(|mean| !mean.is_finite()) {
            return Err(not_finite(source));
        }
        Normalizer::new(source.dim(), mean, scale)
    }

    /// Normalises an image and puts it where `placement` says.
    pub(super) fn write<T: Element>(&self, image: Image<'_>, placement: &Placement, out: &mut [T]) {
        match image {
            Image::Bytes(pixels) => vectorized!(self.place(pixels, placement, out)),
            Image::Floats(pixels) => vectorized!(self.place(pixels, placement, out)),
        }
    }

    #[inline(always)]
    fn place<P: Pixel, T: Element>(&self, pixels: &[P], placement: &Placement, out: &mut [T]) {
        let [_, height, width] = self.dim;
        let Placement { view, fill, rows, columns } = placement;
        for (channel, (plane, &scale)) in out.chunks_exact_mut(height * width).zip(&self.scale).enumerate() {
            for (y, row) in plane.chunks_exact_mut(width).enumerate() {
                let Some(from) = fill.source(y as isize - view.down, height) else {
                    row.fill(T::zero());
                    continue;
                };
                let start = (channel * height + from) * width;
                place_row(&pixels[start..][..width], &self.mean[start..][..width], scale, *view, *fill, row);
                if rows.contains(&y) {
                    row[columns.clone()].fill(T::zero());
                }
            }
        }
    }
}

/// One row of [`Normalizer::place`], from the row of the image that it shows.
#[inline(always)]
fn place_row<P: Pixel, T: Element>(pixels: &[P], mean: &[f32], scale: f32, view: View, fill: Fill, row: &mut [T]) {
    let View { mirrored, right, .. } = view;
    let width = row.len();
    // Columns of the output that show the image itself; then the first column of the image that they show.
    let seen = right.max(0) as usize..width - (-right).max(0) as usize;
    let first = (if mirrored { right } else { -right }).max(0) as usize;
    let shown = &mut row[seen.clone()];
    for ((value, &pixel), &mean) in shown.iter_mut().zip(&pixels[first..]).zip(&mean[first..]) {
        *value = normal(pixel, mean, scale);
    }
    if mirrored {
        shown.reverse();
    }
    for x in (0..seen.start).chain(seen.end..width) {
        row[x] = fill.source(x as isize - right, width).map_or(T::zero(), |column| {
            let column = if mirrored { width - 1 - column } else { column };
            normal(pixels[column], mean[column], scale)
        });
    }
}

#[inline(always)]
fn normal<P: Pixel, T: Element>(pixel: P, mean: f32, scale: f32) -> T {
    let pixel: f32 = pixel.into();
    T::of(f64::from((pixel - mean) * scale))
}

/// The mean of every pixel of the training split.
fn mean_image(source: &dyn Source) -> Vec<f32> {
    let (n, len) = (source.len(Split::Train), source.dim().iter().product::<usize>());
    let pieces = n.div_ceil(PIECE).min((SUMS / len).max(4));
    let mut sums = vec![0.0; pieces * len];
    parallel::for_each_chunk_mut(&mut sums, len, |piece, sums| {
        for index in piece_range(n, pieces, piece) {
            match source.image(Split::Train, index).0 {
                Image::Bytes(pixels) => vectorized!(add(sums, pixels)),
                Image::Floats(pixels) => vectorized!(add(sums, pixels)),
            }
        }
    });
    let (total, rest) = sums.split_at_mut(len);
    rest.chunks_exact(len).for_each(|piece| add(total, piece));
    total.iter().map(|sum| (sum / n as f64) as f32).collect()
}

#[inline(always)]
fn add<P: Copy + Into<f64>>(sums: &mut [f64], pixels: &[P]) {
    for (sum, &pixel) in sums.iter_mut().zip(pixels) {
        *sum += pixel.into();
    }
}

/// Mean of every channel of the training split, and what to multiply with for a standard deviation of 1.
fn channel_statistics(source: &dyn Source) -> Vec<(f32, f32)> {
    let (n, [channels, height, width]) = (source.len(Split::Train), source.dim());
    let plane = height * width;
    // Sums of differences to some value of the channel, for sums of squares that do not drown their variance.
    let some = source.image(Split::Train, 0).0;
    let reference = |channel: usize| f64::from(some.value(channel * plane));
    let pieces = n.div_ceil(PIECE);
    let mut sums = vec![[0.0; 2]; pieces * channels];
    parallel::for_each_chunk_mut(&mut sums, channels, |piece, sums| {
        for index in piece_range(n, pieces, piece) {
            let image = source.image(Split::Train, index).0;
            for (channel, sums) in sums.iter_mut().enumerate() {
                let range = channel * plane..(channel + 1) * plane;
                let [differences, squares] = match image {
                    Image::Bytes(pixels) => vectorized!(moments(&pixels[range], reference(channel))),
                    Image::Floats(pixels) => vectorized!(moments(&pixels[range], reference(channel))),
                };
                sums[0] += differences;
                sums[1] += squares;
            }
        }
    });
    let count = n as f64 * plane as f64;
    let statistics = |channel: usize| {
        let total = |which: usize| sums.iter().skip(channel).step_by(channels).map(|sum| sum[which]).sum::<f64>();
        let (differences, squares) = (total(0), total(1));
        let mean = (count * reference(channel) + differences) / count;
        let variance = (squares - differences * differences / count) / count;
        let scale = (1.0 / variance.sqrt()) as f32;
        // A channel without contrast is zero once its mean is subtracted; leave it so.
        (mean as f32, if scale.is_finite() { scale } else { 1.0 })
    };
    (0..channels).map(statistics).collect()
}

/// Sums of `p - reference` and of its square.
#[inline(always)]
fn moments<P: Pixel>(pixels: &[P], reference: f64) -> [f64; 2] {
    let mut sums = [[0.0; LANES]; 2];
    let (chunks, rest) = pixels.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            add_moments(&mut sums, lane, chunk[lane], reference);
        }
    }
    for (lane, &pixel) in rest.iter().enumerate() {
        add_moments(&mut sums, lane, pixel, reference);
    }
    sums.map(|lanes| lanes.iter().sum())
}

#[inline(always)]
fn add_moments<P: Pixel>(sums: &mut [[f64; LANES]; 2], lane: usize, pixel: P, reference: f64) {
    let pixel: f64 = pixel.into();
    let difference = pixel - reference;
    sums[0][lane] += difference;
    sums[1][lane] += difference * difference;
}

/// The error of a training split whose mean is not finite.
fn not_finite(source: &dyn Source) -> Error {
    let bad = |index: usize| match source.image(Split::Train, index).0 {
        Image::Bytes(_) => None,
        Image::Floats(pixels) => Some((index, *pixels.iter().find(|pixel| !pixel.is_finite())?)),
    };
    let (index, value) = (0..source.len(Split::Train)).find_map(bad).unwrap_or_default();
    let problem = format!("image {index} holds a pixel of {value}");
    Error::invalid(Split::Train.name(), problem, "leave that image out, or mend it")
}
