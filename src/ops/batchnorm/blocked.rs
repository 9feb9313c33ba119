//! Level 3. Batch normalisation over blocks of channels: a pixel is a vector of [`LANES`] of them.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::kernels::ChannelGradient;
use crate::element::Element;
use crate::simd::{LANES, Lanes, arch};

/// Pixels whose sums, one for each channel, are made in their own type; such sums are added up in f64.
const RUN_PIXELS: usize = 256;

/// Mean, and sum of the squared deviations from it, of each of [`LANES`] channels, whose pixels in an image are `of_image(image)`.
/// Sums of some pixels are added up in f64.
#[inline(always)]
pub(crate) fn moments_of_blocks<'a, T: Element>(
    images: Range<usize>,
    pixels: usize,
    of_image: impl Fn(usize) -> &'a [Lanes<T>],
) -> [Lanes<f64>; 2] {
    let (count, mut mean, mut squares) = ((images.len() * pixels) as f64, [0.0; LANES], [0.0; LANES]);
    for image in images.clone() {
        for run in of_image(image).chunks(RUN_PIXELS) {
            let mut sums = [T::zero(); LANES];
            for pixel in run {
                for lane in 0..LANES {
                    sums[lane] += pixel[lane];
                }
            }
            for lane in 0..LANES {
                mean[lane] += sums[lane].f64();
            }
        }
    }
    let mut center = [T::zero(); LANES];
    for lane in 0..LANES {
        center[lane] = T::of(mean[lane] / count);
        mean[lane] = center[lane].f64();
    }
    for image in images {
        for run in of_image(image).chunks(RUN_PIXELS) {
            let mut sums = [T::zero(); LANES];
            for pixel in run {
                for lane in 0..LANES {
                    sums[lane] += (pixel[lane] - center[lane]) * (pixel[lane] - center[lane]);
                }
            }
            for lane in 0..LANES {
                squares[lane] += sums[lane].f64();
            }
        }
    }
    [mean, squares]
}

/// Adds `sum(dout)` and `sum(dout (x - center))` of an image to the sums of [`LANES`] channels.
#[inline(always)]
pub(crate) fn gradient_sums_of_block<T: Element>(
    dout: &[Lanes<T>],
    x: &[Lanes<T>],
    center: &Lanes<T>,
    sums: &mut [Lanes<f64>; 2],
) {
    for (dout, x) in dout.chunks(RUN_PIXELS).zip(x.chunks(RUN_PIXELS)) {
        let mut of_run = [[T::zero(); LANES]; 2];
        for (dout, x) in dout.iter().zip(x) {
            for lane in 0..LANES {
                of_run[0][lane] += dout[lane];
                of_run[1][lane] += dout[lane] * (x[lane] - center[lane]);
            }
        }
        for (sums, of_run) in sums.iter_mut().zip(&of_run) {
            for lane in 0..LANES {
                sums[lane] += of_run[lane].f64();
            }
        }
    }
}

/// [`ChannelGradient`] of [`LANES`] channels, whose pixels are vectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockGradient<T> {
    mean: Lanes<T>,
    /// `gamma / std`
    scale: Lanes<T>,
    /// `mean(dout)`
    dout: Lanes<T>,
    /// `mean(dout xhat) / std`
    slope: Lanes<T>,
}

impl<T: Element> BlockGradient<T> {
    /// Of a block's channels; of lanes without one, 0.
    pub(crate) fn new(of_block: &[ChannelGradient<T>]) -> Self {
        let mut channels = [ChannelGradient::default(); LANES];
        channels[..of_block.len()].copy_from_slice(of_block);
        BlockGradient {
            mean: channels.map(|channel| channel.mean),
            scale: channels.map(|channel| channel.gamma * channel.inverse_std),
            dout: channels.map(|channel| channel.dout),
            slope: channels.map(|channel| channel.dout_xhat * channel.inverse_std),
        }
    }

    /// Sets dx of some pixels; where there is no `dout`, it is what is in `dx`.
    pub(crate) fn apply(&self, dout: Option<&[T]>, x: &[T], dx: &mut [T]) {
        let BlockGradient { mean, scale, dout: mean_dout, slope } = self;
        let constants = [mean, scale, mean_dout, slope].map(|lanes| bytemuck::cast_slice(lanes));
        let (dout, x, dx) = (dout.map(bytemuck::cast_slice), bytemuck::cast_slice(x), bytemuck::cast_slice_mut(dx));
        arch().dispatch(GradientOfBlock { constants, dout, x, dx });
    }

    /// The same of one pixel, in a loop over other things as well.
    #[inline(always)]
    pub(crate) fn dx(&self, dout: &Lanes<T>, x: &Lanes<T>) -> Lanes<T> {
        let mut dx = [T::zero(); LANES];
        for lane in 0..LANES {
            let centred = (x[lane] - self.mean[lane]) * self.slope[lane];
            dx[lane] = self.scale[lane] * (dout[lane] - self.dout[lane] - centred);
        }
        dx
    }
}

/// [`BlockGradient::apply`] with vectors, because the compiler would make one of several pixels instead, and gather their channels.
struct GradientOfBlock<'a> {
    /// Mean, `gamma / std`, `mean(dout)` and `mean(dout xhat) / std`.
    constants: [&'a [f32]; 4],
    dout: Option<&'a [f32]>,
    x: &'a [f32],
    dx: &'a mut [f32],
}

impl WithSimd for GradientOfBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let GradientOfBlock { constants, dout, x, dx } = self;
        let (x, dx) = (x.as_chunks::<LANES>().0, dx.as_chunks_mut::<LANES>().0);
        for lane in (0..LANES).step_by(S::F32_LANES) {
            let lanes = lane..lane + S::F32_LANES;
            let constants = constants.map(
                #[inline(always)]
                |values| S::as_simd_f32s(&values[lanes.clone()]).0[0],
            );
            match dout {
                None => {
                    for (dx, x) in dx.iter_mut().zip(x) {
                        let dx = &mut S::as_mut_simd_f32s(&mut dx[lanes.clone()]).0[0];
                        *dx = gradient(simd, *dx, S::as_simd_f32s(&x[lanes.clone()]).0[0], constants);
                    }
                }
                Some(dout) => {
                    for ((dx, dout), x) in dx.iter_mut().zip(dout.as_chunks::<LANES>().0).zip(x) {
                        let [dout, x] = [dout, x].map(
                            #[inline(always)]
                            |values| S::as_simd_f32s(&values[lanes.clone()]).0[0],
                        );
                        S::as_mut_simd_f32s(&mut dx[lanes.clone()]).0[0] = gradient(simd, dout, x, constants);
                    }
                }
            }
        }
    }
}

/// [`BlockGradient::dx`] of some channels.
#[inline(always)]
fn gradient<S: Simd>(simd: S, dout: S::f32s, x: S::f32s, constants: [S::f32s; 4]) -> S::f32s {
    let [mean, scale, mean_dout, slope] = constants;
    let centred = simd.mul_f32s(simd.sub_f32s(x, mean), slope);
    simd.mul_f32s(scale, simd.sub_f32s(simd.sub_f32s(dout, mean_dout), centred))
}
