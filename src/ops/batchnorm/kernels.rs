//! Level 3. Batch normalisation over slices `[N, C, plane]`: statistics, forward, backward, piece by piece.
//!
//! With planes, one channel is one piece of work. Without (planes of one element), a piece is [`COLUMNS`] columns of the
//! matrix `[N, C]`, which are whole vectors side by side.

use std::ops::Range;

use super::{Norm, NormGradsMut};
use crate::element::Element;
use crate::ops::Mode;
use crate::parallel::{Chunks, Grid, Planes, for_each_share};
use crate::simd::{Write, sum, sum_and_dot_centred, sum_squared_deviations, vectorized};

/// Pixels of a plane below which loops over single planes do not pay: they begin and end more than they run.
const SMALL_PLANE: usize = 256;

/// Elements that are summed in their own type; such sums are added up in f64.
const RUN: usize = 1024;

/// Sizes of what is normalised: `[N, C, plane]`; plain batchnorm has planes of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Channels {
    pub(crate) images: usize,
    pub(crate) channels: usize,
    pub(crate) plane: usize,
}

impl Channels {
    /// `[N, C, plane]`
    fn dim(self) -> [usize; 3] {
        [self.images, self.channels, self.plane]
    }

    /// Elements of the whole array; `None` if there cannot be as many.
    pub(crate) fn checked_len(self) -> Option<usize> {
        self.images.checked_mul(self.channels)?.checked_mul(self.plane)
    }

    /// Plane `n` of channel `c`, as a range of the whole array.
    #[inline(always)]
    pub(crate) fn plane_of(self, n: usize, c: usize) -> Range<usize> {
        let start = (n * self.channels + c) * self.plane;
        start..start + self.plane
    }

    /// The planes of channel `c`, as ranges of the whole array.
    #[inline(always)]
    pub(crate) fn planes(self, c: usize) -> impl Iterator<Item = Range<usize>> {
        (0..self.images).map(move |n| self.plane_of(n, c))
    }

    /// Whether the planes are so small that a channel's are to be worked on in one piece: [`Channels::gather`].
    pub(crate) fn gathers(self) -> bool {
        self.plane < SMALL_PLANE
    }

    /// Elements of a channel.
    pub(crate) fn channel_len(self) -> usize {
        self.images * self.plane
    }

    /// The planes of channel `c`, one after the other.
    #[inline(always)]
    pub(crate) fn gather<T: Element>(self, c: usize, x: &[T], to: &mut [T]) {
        for (plane, to) in self.planes(c).zip(to.chunks_exact_mut(self.plane)) {
            to.copy_from_slice(&x[plane]);
        }
    }

    /// Elements that are averaged for one channel.
    pub(crate) fn count(self) -> f64 {
        (self.images * self.plane) as f64
    }
}

/// Mean and biased variance of channel `c`, in two passes; sums of planes are added up in f64.
#[inline(always)]
pub(crate) fn moments<T: Element>(sizes: Channels, c: usize, x: &[T]) -> (T, T) {
    let (mut total, mut squares) = (0.0, 0.0);
    // loops, because the sum of an iterator is a function of its own, which would not be compiled for the processor at hand
    for plane in sizes.planes(c) {
        total += sum(&x[plane]).f64();
    }
    let mean = T::of(total / sizes.count());
    for plane in sizes.planes(c) {
        squares += sum_squared_deviations(&x[plane], mean).f64();
    }
    (mean, T::of(squares / sizes.count()))
}

/// [`moments`] of a channel whose planes lie one after the other.
#[inline(always)]
pub(crate) fn moments_of<T: Element>(channel: &[T]) -> (T, T) {
    let count = channel.len() as f64;
    let mut total = 0.0;
    for run in channel.chunks(RUN) {
        total += sum(run).f64();
    }
    let mean = T::of(total / count);
    let mut squares = 0.0;
    for run in channel.chunks(RUN) {
        squares += sum_squared_deviations(run, mean).f64();
    }
    (mean, T::of(squares / count))
}

/// `1 / sqrt(var + eps)`
#[inline(always)]
pub(crate) fn inverse_std<T: Element>(var: T, eps: f64) -> T {
    T::one() / (var + T::of(eps)).sqrt()
}

/// What backward of one channel needs besides dout and x.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ChannelGradient<T> {
    pub(super) mean: T,
    pub(super) inverse_std: T,
    pub(super) gamma: T,
    /// `mean(dout)`
    pub(super) dout: T,
    /// `mean(dout xhat)`
    pub(super) dout_xhat: T,
}

/// `sum(dout)` and `sum(dout xhat)` of one plane.
#[inline(always)]
pub(crate) fn gradient_sums<T: Element>(dout: &[T], x: &[T], mean: T, inverse_std: T) -> (f64, f64) {
    // subtracting the mean first keeps the digits that a large mean would cost
    let (total, centred) = sum_and_dot_centred(dout, x, mean);
    (total.f64(), (centred * inverse_std).f64())
}

/// [`gradient_sums`] of a channel whose planes lie one after the other.
#[inline(always)]
pub(crate) fn gradient_sums_of<T: Element>(dout: &[T], x: &[T], mean: T, inverse_std: T) -> (f64, f64) {
    let (mut total, mut total_xhat) = (0.0, 0.0);
    for (dout, x) in dout.chunks(RUN).zip(x.chunks(RUN)) {
        let sums = gradient_sums(dout, x, mean, inverse_std);
        total += sums.0;
        total_xhat += sums.1;
    }
    (total, total_xhat)
}

impl<T: Element> ChannelGradient<T> {
    /// From `sum(dout)` and `sum(dout xhat)` over a whole channel.
    #[inline(always)]
    pub(crate) fn new(sizes: Channels, mean: T, inverse_std: T, gamma: T, (total, total_xhat): (f64, f64)) -> Self {
        let [dout, dout_xhat] = [total, total_xhat].map(
            #[inline(always)]
            |sum| T::of(sum / sizes.count()),
        );
        ChannelGradient { mean, inverse_std, gamma, dout, dout_xhat }
    }

    /// Turns `dz`, the gradient of what batchnorm made of `x`, into that of `x`.
    #[inline(always)]
    pub(crate) fn apply(&self, dz: &mut [T], x: &[T]) {
        for (dz, &x) in dz.iter_mut().zip(x) {
            *dz = self.dx(*dz, x);
        }
    }

    /// dx of one element.
    #[inline(always)]
    pub(crate) fn dx(&self, dout: T, x: T) -> T {
        let xhat = (x - self.mean) * self.inverse_std;
        self.gamma * self.inverse_std * (dout - self.dout - xhat * self.dout_xhat)
    }
}

/// Columns of a plain batchnorm that one piece takes: whole vectors side by side.
const COLUMNS: usize = 64;

impl<'a, T: Element> Norm<'a, T> {
    /// The columns that a piece takes.
    fn columns(self, piece: usize) -> Self {
        let columns = piece * COLUMNS..((piece + 1) * COLUMNS).min(self.gamma.len());
        let Norm { gamma, mean, var, eps } = self;
        Norm { gamma: &gamma[columns.clone()], mean: &mean[columns.clone()], var: &var[columns], eps }
    }

    /// `1 / sqrt(var + eps)` of each of these columns.
    #[inline(always)]
    fn inverse_stds(self) -> [T; COLUMNS] {
        let mut inverse = [T::zero(); COLUMNS];
        for (inverse, &var) in inverse.iter_mut().zip(self.var) {
            *inverse = inverse_std(var, self.eps);
        }
        inverse
    }
}

/// Mean and variance of every channel.
pub(crate) fn batch_statistics<T: Element>(sizes: Channels, x: &[T], mean: &mut [T], var: &mut [T]) {
    if sizes.plane != 1 {
        let shares = (Chunks::new(mean, 1), Chunks::new(var, 1));
        return for_each_share(shares, |c, (mean, var)| (mean[0], var[0]) = vectorized!(moments(sizes, c, x)));
    }
    let scale = T::of(1.0 / sizes.count());
    for_each_share((Chunks::new(mean, COLUMNS), Chunks::new(var, COLUMNS)), |piece, (mean, var)| {
        let (start, width) = (piece * COLUMNS, mean.len());
        let rows = || x.chunks_exact(sizes.channels).map(|row| &row[start..start + width]);
        vectorized!({
            mean.fill(T::zero());
            rows().for_each(|row| mean.iter_mut().zip(row).for_each(|(mean, &x)| *mean += x));
            mean.iter_mut().for_each(|mean| *mean *= scale);
            var.fill(T::zero());
            for row in rows() {
                var.iter_mut().zip(row).zip(&*mean).for_each(|((var, &x), &mean)| *var += (x - mean) * (x - mean));
            }
            var.iter_mut().for_each(|var| *var *= scale);
        });
    });
}

/// `out = gamma (x - mean) / sqrt(var + eps) + beta` for every channel.
pub(crate) fn normalize_into<T: Element>(sizes: Channels, x: &[T], norm: Norm<'_, T>, beta: &[T], out: &mut [T]) {
    if sizes.plane == 1 {
        return normalize_columns(sizes, x, norm, beta, out);
    }
    let write = Write::of::<T>(out.len());
    for_each_share(Planes::new(out, sizes.dim()), |c, mut out| {
        vectorized!({
            let (mean, inverse) = (norm.mean[c], inverse_std(norm.var[c], norm.eps));
            let (gamma, beta) = (norm.gamma[c], beta[c]);
            for (n, plane) in sizes.planes(c).enumerate() {
                let x = &x[plane];
                write.map(
                    out.get(n),
                    x,
                    x,
                    #[inline(always)]
                    |x, _| gamma * ((x - mean) * inverse) + beta,
                );
            }
        });
    });
}

fn normalize_columns<T: Element>(sizes: Channels, x: &[T], norm: Norm<'_, T>, beta: &[T], out: &mut [T]) {
    let out = Grid::new(out, (sizes.images, sizes.channels), (sizes.images, COLUMNS));
    for_each_share(out, |piece, mut out| {
        let (norm, start, width) = (norm.columns(piece), piece * COLUMNS, out.run());
        let beta = &beta[start..start + width];
        vectorized!({
            let inverse = norm.inverse_stds();
            for n in 0..sizes.images {
                let x = &x[n * sizes.channels + start..];
                for (c, (out, &x)) in out.get(n).iter_mut().zip(x).enumerate() {
                    *out = norm.gamma[c] * ((x - norm.mean[c]) * inverse[c]) + beta[c];
                }
            }
        });
    });
}

/// Backward of training mode, everything in `grads` set. x and dout `[N, C, plane]`; `norm` has the batch's statistics.
pub(crate) fn train_backward_into<T: Element>(
    sizes: Channels,
    dout: &[T],
    x: &[T],
    norm: Norm<'_, T>,
    grads: NormGradsMut<'_, T>,
) {
    backward_into(Mode::Train, sizes, dout, x, norm, grads);
}

/// Backward of test mode, whose statistics did not depend on x: `dx = dout gamma / sqrt(var + eps)`, the rest as in training.
pub(crate) fn test_backward_into<T: Element>(
    sizes: Channels,
    dout: &[T],
    x: &[T],
    norm: Norm<'_, T>,
    grads: NormGradsMut<'_, T>,
) {
    backward_into(Mode::Test, sizes, dout, x, norm, grads);
}

fn backward_into<T: Element>(
    mode: Mode,
    sizes: Channels,
    dout: &[T],
    x: &[T],
    norm: Norm<'_, T>,
    grads: NormGradsMut<'_, T>,
) {
    if sizes.plane == 1 {
        return backward_columns(mode, sizes, dout, x, norm, grads);
    }
    let NormGradsMut { dx, dgamma, dbeta } = grads;
    let write = Write::of::<T>(dx.len());
    let shares = (Planes::new(dx, sizes.dim()), Chunks::new(dgamma, 1), Chunks::new(dbeta, 1));
    for_each_share(shares, |c, (mut dx, dgamma, dbeta)| {
        vectorized!({
            let (mean, inverse_std) = (norm.mean[c], inverse_std(norm.var[c], norm.eps));
            let (mut total, mut total_xhat) = (0.0, 0.0);
            for plane in sizes.planes(c) {
                let sums = gradient_sums(&dout[plane.clone()], &x[plane], mean, inverse_std);
                total += sums.0;
                total_xhat += sums.1;
            }
            (dbeta[0], dgamma[0]) = (T::of(total), T::of(total_xhat));
            let gradient = ChannelGradient::new(sizes, mean, inverse_std, norm.gamma[c], (total, total_xhat));
            let scale = norm.gamma[c] * inverse_std;
            for (n, plane) in sizes.planes(c).enumerate() {
                let (dout, x) = (&dout[plane.clone()], &x[plane]);
                match mode {
                    Mode::Train => write.map(
                        dx.get(n),
                        dout,
                        x,
                        #[inline(always)]
                        |dout, x| gradient.dx(dout, x),
                    ),
                    Mode::Test => write.map(
                        dx.get(n),
                        dout,
                        dout,
                        #[inline(always)]
                        |dout, _| dout * scale,
                    ),
                }
            }
        });
    });
}

fn backward_columns<T: Element>(
    mode: Mode,
    sizes: Channels,
    dout: &[T],
    x: &[T],
    norm: Norm<'_, T>,
    grads: NormGradsMut<'_, T>,
) {
    let NormGradsMut { dx, dgamma, dbeta } = grads;
    if sizes.images == 0 {
        dgamma.fill(T::zero());
        dbeta.fill(T::zero());
        return;
    }
    let scale = T::of(1.0 / sizes.count());
    let dx = Grid::new(dx, (sizes.images, sizes.channels), (sizes.images, COLUMNS));
    for_each_share(
        (dx, Chunks::new(dgamma, COLUMNS), Chunks::new(dbeta, COLUMNS)),
        |piece, (mut dx, dgamma, dbeta)| {
            let (norm, start, width) = (norm.columns(piece), piece * COLUMNS, dgamma.len());
            let row = |n: usize| n * sizes.channels + start..n * sizes.channels + start + width;
            let (mean, gamma) = (&norm.mean[..width], &norm.gamma[..width]);
            vectorized!({
                let inverse = norm.inverse_stds();
                dgamma.fill(T::zero());
                dbeta.fill(T::zero());
                for n in 0..sizes.images {
                    let (dout, x) = (&dout[row(n)], &x[row(n)]);
                    for c in 0..width {
                        dbeta[c] += dout[c];
                        dgamma[c] += dout[c] * ((x[c] - mean[c]) * inverse[c]);
                    }
                }
                let gradient = |c: usize| {
                    let (dout, dout_xhat) = (dbeta[c] * scale, dgamma[c] * scale);
                    ChannelGradient { mean: mean[c], inverse_std: inverse[c], gamma: gamma[c], dout, dout_xhat }
                };
                for n in 0..sizes.images {
                    let (dout, x, dx) = (&dout[row(n)], &x[row(n)], dx.get(n));
                    match mode {
                        Mode::Train => (0..width).for_each(|c| dx[c] = gradient(c).dx(dout[c], x[c])),
                        Mode::Test => (0..width).for_each(|c| dx[c] = dout[c] * (gamma[c] * inverse[c])),
                    }
                }
            });
        },
    );
}
