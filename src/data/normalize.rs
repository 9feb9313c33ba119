//! Level 4. From bytes to numbers around zero.

use super::Samples;
use super::augment::Placement;
use super::cifar10::{CHANNELS, PIXELS, SIDE};
use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::parallel;

/// Pixels of one channel.
const PLANE: usize = SIDE * SIDE;
/// Records summed by one piece: the sum of so many bytes fits 32 bits.
const PIECE: usize = 1024;

/// Which statistics of the training split to normalise with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Normalization {
    /// Subtract the mean image, as the seed does: pixels stay on the scale of 0 to 255.
    #[default]
    MeanImage,
    /// Subtract each channel's mean and divide by its standard deviation, as is usual for deep networks.
    PerChannel,
}

/// `x = (pixel - mean) * scale`, with a mean per pixel and a scale per channel.
#[derive(Clone, Debug, PartialEq)]
pub struct Normalizer {
    mean: Vec<f32>,
    scale: Vec<f32>,
}

impl Normalizer {
    /// From the numbers of a checkpoint: a mean for every pixel `(3, 32, 32)` and a scale for every channel `(3)`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if they have other lengths.
    pub fn new(mean: Vec<f32>, scale: Vec<f32>) -> Result<Self> {
        check_shape("normalizer", "mean", &[mean.len()], &[PIXELS])?;
        check_shape("normalizer", "scale", &[scale.len()], &[CHANNELS])?;
        Ok(Normalizer { mean, scale })
    }

    /// What is subtracted from every pixel, `(3, 32, 32)`.
    pub fn mean(&self) -> &[f32] {
        &self.mean
    }

    /// What every channel is then multiplied by, `(3)`.
    pub fn scale(&self) -> &[f32] {
        &self.scale
    }

    /// Normalises one image `(3, 32, 32)`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `out` has another length.
    pub fn apply<T: Element>(&self, pixels: &[u8; PIXELS], out: &mut [T]) -> Result<()> {
        check_shape("normalizer", "out", &[out.len()], &[PIXELS])?;
        self.write(pixels, Placement::CENTRED, out);
        Ok(())
    }

    /// Statistics of `samples`. All sums are of integers, so they are exact and their order does not matter.
    pub(super) fn measure(samples: &Samples, normalization: Normalization) -> Self {
        let n = samples.len();
        let mut pieces = vec![([0_u32; PIXELS], [0_u64; CHANNELS]); n.div_ceil(PIECE)];
        parallel::for_each_chunk_mut(&mut pieces, 1, |piece, slot| {
            let (sums, squares) = &mut slot[0];
            for index in piece * PIECE..n.min((piece + 1) * PIECE) {
                let pixels = samples.get(index).0;
                sums.iter_mut().zip(pixels).for_each(|(sum, &p)| *sum += u32::from(p));
                if normalization == Normalization::PerChannel {
                    for (square, plane) in squares.iter_mut().zip(pixels.chunks_exact(PLANE)) {
                        *square += u64::from(plane.iter().map(|&p| u32::from(p) * u32::from(p)).sum::<u32>());
                    }
                }
            }
        });
        let mut sums = vec![0_u64; PIXELS];
        for (piece, _) in &pieces {
            sums.iter_mut().zip(piece).for_each(|(sum, &s)| *sum += u64::from(s));
        }
        match normalization {
            Normalization::MeanImage => Normalizer {
                mean: sums.iter().map(|&sum| (sum as f64 / n as f64) as f32).collect(),
                scale: vec![1.0; CHANNELS],
            },
            Normalization::PerChannel => {
                let (mut mean, mut scale) = (Vec::with_capacity(PIXELS), Vec::with_capacity(CHANNELS));
                let values = n as u128 * PLANE as u128;
                for (channel, plane) in sums.chunks_exact(PLANE).enumerate() {
                    let sum: u128 = plane.iter().map(|&s| u128::from(s)).sum();
                    let squares: u128 = pieces.iter().map(|(_, squares)| u128::from(squares[channel])).sum();
                    // n^2 times the variance, an integer: no cancellation.
                    let variance = (values * squares - sum * sum) as f64 / (values as f64 * values as f64);
                    mean.extend([(sum as f64 / values as f64) as f32; PLANE]);
                    // A channel without contrast is zero once its mean is subtracted; leave it so.
                    scale.push(if variance > 0.0 { (1.0 / variance.sqrt()) as f32 } else { 1.0 });
                }
                Normalizer { mean, scale }
            }
        }
    }

    /// Normalises `pixels` and puts the image where `placement` says, with zeros around it.
    pub(super) fn write<T: Element>(&self, pixels: &[u8; PIXELS], placement: Placement, out: &mut [T]) {
        // Columns that stay in sight, as the output counts them.
        let columns = placement.right.max(0) as usize..SIDE - (-placement.right).max(0) as usize;
        let first = (-placement.right).max(0) as usize;
        for (channel, &scale) in self.scale.iter().enumerate() {
            for y in 0..SIDE {
                let target = &mut out[channel * PLANE + y * SIDE..][..SIDE];
                target.fill(T::zero());
                let Some(from) = y.checked_add_signed(-placement.down).filter(|&from| from < SIDE) else { continue };
                let start = channel * PLANE + from * SIDE;
                let mut row = [T::zero(); SIDE];
                for ((value, &p), &mean) in row.iter_mut().zip(&pixels[start..]).zip(&self.mean[start..]) {
                    *value = T::of(f64::from((f32::from(p) - mean) * scale));
                }
                if placement.mirrored {
                    row.reverse();
                }
                target[columns.clone()].copy_from_slice(&row[first..first + columns.len()]);
            }
        }
    }
}
