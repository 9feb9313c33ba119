//! Level 3. Pooling of blocks of channels, forward: a pixel is a vector of them.

use super::{beats, for_each_window, for_each_window_of};
use crate::element::Element;
use crate::shape::Pool2dShape;
use crate::simd::{LANES, Lanes};

/// Max pooling of the planes of a block of channels, `x[H][W]` to `out[H'][W']`, any window: or of the first rows of windows that
/// tile them.
#[inline(always)]
pub(crate) fn max_pool_block<T: Element>(shape: &Pool2dShape, x: &[Lanes<T>], out: &mut [Lanes<T>]) {
    for_each_window_of(
        shape,
        out.len() / shape.cols.output,
        #[inline(always)]
        |o, window| {
            let mut best = [T::neg_infinity(); LANES];
            window.for_each_pixel(
                #[inline(always)]
                |_, pixel| {
                    for lane in 0..LANES {
                        let v = x[pixel][lane];
                        best[lane] = if beats(v, best[lane]) { v } else { best[lane] };
                    }
                },
            );
            out[o] = best;
        },
    );
}

/// [`avg_pool_plane`] of the planes of a block of channels.
#[inline(always)]
pub(crate) fn avg_pool_block<T: Element>(shape: &Pool2dShape, x: &[Lanes<T>], out: &mut [Lanes<T>]) {
    let scale = T::one() / T::of((shape.rows.window * shape.cols.window) as f64);
    for_each_window(
        shape,
        #[inline(always)]
        |o, window| {
            let mut sums = [T::zero(); LANES];
            window.for_each_pixel(
                #[inline(always)]
                |_, pixel| {
                    for lane in 0..LANES {
                        sums[lane] += x[pixel][lane];
                    }
                },
            );
            for lane in 0..LANES {
                out[o][lane] = sums[lane] * scale;
            }
        },
    );
}

/// Mean of each of the planes of a block of channels. Some pixels are added up before the next ones, for the sake of the last
/// digits.
#[inline(always)]
pub(crate) fn global_avg_block<T: Element>(x: &[Lanes<T>]) -> Lanes<T> {
    let mut mean = [T::zero(); LANES];
    for x in x.chunks(64) {
        let mut sums = [T::zero(); LANES];
        for x in x {
            for lane in 0..LANES {
                sums[lane] += x[lane];
            }
        }
        for lane in 0..LANES {
            mean[lane] += sums[lane];
        }
    }
    for lane in 0..LANES {
        mean[lane] /= T::of(x.len() as f64);
    }
    mean
}
