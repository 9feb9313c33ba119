//! Level 3. Pooling of blocks of channels: a pixel is a vector of them.

use super::{beats, for_each_window, for_each_window_of, share_of_cell};
use crate::element::Element;
use crate::shape::{Axis, Pool2dShape};
use crate::simd::{LANES, Lanes};

/// Max pooling of the planes of a block of channels, `x[H][W]` to `out[H'][W']`, any window: or of the first rows of windows that
/// tile them.
#[inline(always)]
pub(crate) fn max_pool_block<T: Element>(shape: &Pool2dShape, x: &[Lanes<T>], out: &mut [Lanes<T>]) {
    fold_windows(
        shape,
        x,
        out,
        T::neg_infinity(),
        #[inline(always)]
        |best, v| if beats(v, best) { v } else { best },
    );
}

/// [`max_pool_block`] that keeps the cell of every maximum.
#[inline(always)]
pub(crate) fn max_pool_block_with_cells<T: Element>(
    shape: &Pool2dShape,
    x: &[Lanes<T>],
    out: &mut [Lanes<T>],
    cell: &mut [Lanes<u8>],
) {
    for_each_window_of(
        shape,
        out.len() / shape.cols.output,
        #[inline(always)]
        |o, window| {
            // as wide as `f32`, so that vectors of both are compared and chosen from together
            let (mut best, mut at) = ([T::neg_infinity(); LANES], [-1_i32; LANES]);
            window.for_each_pixel(
                #[inline(always)]
                |index, pixel| {
                    for lane in 0..LANES {
                        // The first pixel of a window takes this place, whatever it is.
                        let takes = (at[lane] < 0) | beats(x[pixel][lane], best[lane]);
                        best[lane] = if takes { x[pixel][lane] } else { best[lane] };
                        at[lane] = if takes { index as i32 } else { at[lane] };
                    }
                },
            );
            out[o] = best;
            for lane in 0..LANES {
                cell[o][lane] = at[lane] as u8;
            }
        },
    );
}

/// Backward of [`max_pool_block_with_cells`], of whole planes: sets `dx[H][W]` from the gradient of every pixel of the output, which
/// `dout` is asked for once. A cell that is no index of the window gets no gradient.
#[inline(always)]
pub(crate) fn max_pool_block_backward<T: Element>(
    shape: &Pool2dShape,
    dout: impl FnMut(usize) -> Lanes<T>,
    cell: &[Lanes<u8>],
    dx: &mut [Lanes<T>],
) {
    let whole = |axis: &Axis| axis.output * axis.window == axis.input;
    // Where windows cover the plane and none another, every pixel is written once.
    if shape.tiles() && whole(&shape.rows) && whole(&shape.cols) {
        return route(
            shape,
            dout,
            cell,
            #[inline(always)]
            |pixel, dout| dx[pixel] = dout,
        );
    }
    dx.fill([T::zero(); LANES]);
    route(
        shape,
        dout,
        cell,
        #[inline(always)]
        |pixel, dout| {
            for lane in 0..LANES {
                dx[pixel][lane] += dout[lane];
            }
        },
    );
}

/// Calls `to(pixel, gradient)` for every pixel of every window: with that of its output, where a plane had its maximum there, else 0.
#[inline(always)]
fn route<T: Element>(
    shape: &Pool2dShape,
    mut dout: impl FnMut(usize) -> Lanes<T>,
    cell: &[Lanes<u8>],
    mut to: impl FnMut(usize, Lanes<T>),
) {
    for_each_window(
        shape,
        #[inline(always)]
        |o, window| {
            let (dout, mut at) = (dout(o), [0_i32; LANES]);
            for lane in 0..LANES {
                at[lane] = i32::from(cell[o][lane]);
            }
            window.for_each_pixel(
                #[inline(always)]
                |index, pixel| {
                    let mut routed = [T::zero(); LANES];
                    for lane in 0..LANES {
                        routed[lane] = if at[lane] == index as i32 { dout[lane] } else { T::zero() };
                    }
                    to(pixel, routed);
                },
            );
        },
    );
}

/// Backward of [`avg_pool_block`], of whole planes: sets `dx[H][W]`.
#[inline(always)]
pub(crate) fn avg_pool_block_backward<T: Element>(shape: &Pool2dShape, dout: &[Lanes<T>], dx: &mut [Lanes<T>]) {
    let scale = share_of_cell::<T>(shape);
    dx.fill([T::zero(); LANES]);
    for_each_window(
        shape,
        #[inline(always)]
        |o, window| {
            window.for_each_pixel(
                #[inline(always)]
                |_, pixel| {
                    for lane in 0..LANES {
                        dx[pixel][lane] += dout[o][lane] * scale;
                    }
                },
            );
        },
    );
}

/// [`avg_pool_plane`](super::avg_pool_plane) of the planes of a block of channels.
#[inline(always)]
pub(crate) fn avg_pool_block<T: Element>(shape: &Pool2dShape, x: &[Lanes<T>], out: &mut [Lanes<T>]) {
    let scale = share_of_cell::<T>(shape);
    fold_windows(
        shape,
        x,
        out,
        T::zero(),
        #[inline(always)]
        |sum, v| sum + v,
    );
    for mean in out.as_flattened_mut() {
        *mean *= scale;
    }
}

/// Folds the pixels of every window, channel by channel, into its pixel of `out`: as many rows of windows as that has.
#[inline(always)]
fn fold_windows<T: Element>(
    shape: &Pool2dShape,
    x: &[Lanes<T>],
    out: &mut [Lanes<T>],
    start: T,
    fold: impl Fn(T, T) -> T,
) {
    for_each_window_of(
        shape,
        out.len() / shape.cols.output,
        #[inline(always)]
        |o, window| {
            let mut folded = [start; LANES];
            window.for_each_pixel(
                #[inline(always)]
                |_, pixel| {
                    for lane in 0..LANES {
                        folded[lane] = fold(folded[lane], x[pixel][lane]);
                    }
                },
            );
            out[o] = folded;
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

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;
    use crate::ops::pool::{
        avg_pool_plane, avg_pool_plane_backward, global_avg_plane, max_pool_plane, max_pool_plane_backward,
    };
    use crate::random::{Purpose, stream};
    use crate::shape::{Padding, Pool2d};

    /// As planes are pooled, each by itself, to the bit, and the mean of a plane but for rounding: also where a plane has numbers that
    /// are none, and infinite ones.
    #[test]
    fn a_block_is_pooled_as_its_planes_are() {
        let pool = |window, stride, padding| Pool2d { window, stride, padding };
        let strange = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0];
        for pool in [
            pool((2, 2), (2, 2), Padding::Valid),
            pool((3, 4), (3, 4), Padding::Valid),
            pool((3, 2), (2, 1), Padding::Valid),
            pool((3, 3), (2, 2), Padding::All(1)),
        ] {
            let shape = Pool2dShape::new([1, LANES, 9, 11], &pool).unwrap();
            let mut rng = stream(0, Purpose::Example, 0, 0);
            let mut value = || match rng.random_range(0..12) {
                0 => strange[rng.random_range(0..4)],
                _ => rng.random_range(-1.0..1.0),
            };
            let x: Vec<Lanes<f32>> = (0..shape.in_plane()).map(|_| std::array::from_fn(|_| value())).collect();
            let outputs = shape.out_plane();
            let mut block = [vec![[0.0; LANES]; outputs], vec![[0.0; LANES]; outputs]];
            max_pool_block(&shape, &x, &mut block[0]);
            avg_pool_block(&shape, &x, &mut block[1]);
            let (mut largest, mut cells) = (vec![[0.0; LANES]; outputs], vec![[9; LANES]; outputs]);
            max_pool_block_with_cells(&shape, &x, &mut largest, &mut cells);
            let dout: Vec<Lanes<f32>> = (0..outputs).map(|_| std::array::from_fn(|_| value())).collect();
            let mut dx = [vec![[9.0; LANES]; x.len()], vec![[9.0; LANES]; x.len()]];
            max_pool_block_backward(&shape, |o| dout[o], &cells, &mut dx[0]);
            avg_pool_block_backward(&shape, &dout, &mut dx[1]);
            let mean = global_avg_block(&x);
            for lane in 0..LANES {
                let plane: Vec<f32> = x.iter().map(|x| x[lane]).collect();
                let (mut out, mut cell) = ([vec![0.0; outputs], vec![0.0; outputs]], vec![0; outputs]);
                max_pool_plane(&shape, &plane, &mut out[0], &mut cell);
                avg_pool_plane(&shape, &plane, &mut out[1]);
                let bits = |value: f32| if value.is_nan() { u32::MAX } else { value.to_bits() };
                for (block, out) in block.iter().zip(&out) {
                    let same = |(got, want): (&Lanes<f32>, &f32)| bits(got[lane]) == bits(*want);
                    assert!(block.iter().zip(out).all(same), "{pool:?}, plane {lane}");
                }
                assert!(
                    cells.iter().zip(&cell).all(|(got, want)| got[lane] == *want),
                    "{pool:?}, cells of plane {lane}"
                );
                assert!(
                    largest.iter().zip(&out[0]).all(|pair| bits(pair.0[lane]) == bits(*pair.1)),
                    "{pool:?}, {lane}"
                );
                let dout: Vec<f32> = dout.iter().map(|dout| dout[lane]).collect();
                let mut want = [vec![9.0; plane.len()], vec![9.0; plane.len()]];
                max_pool_plane_backward(&shape, &dout, &cell, &mut want[0]);
                avg_pool_plane_backward(&shape, &dout, &mut want[1]);
                for (got, want) in dx.iter().zip(&want) {
                    // -0.0 is as good as 0.0 where gradients are added up
                    let same = got.iter().zip(want).all(|(got, want)| bits(got[lane] + 0.0) == bits(*want + 0.0));
                    assert!(same, "{pool:?}, gradient of plane {lane}");
                }
                let want = global_avg_plane(&plane);
                assert!((mean[lane] - want).abs() < 1e-6 || !want.is_finite(), "{} and not {want}", mean[lane]);
                assert_eq!(mean[lane].is_nan(), want.is_nan());
            }
        }
    }
}
