//! Level 2. Batch normalisation (Ioffe & Szegedy 2015), plain over `(N, D)` and spatial over `(N, C, H, W)`.
//!
//! Per channel (or feature), with mean and *biased* variance over the batch (and all pixels):
//!
//! ```text
//! xhat = (x - mean) / sqrt(var + eps)          out = gamma xhat + beta
//! dx = gamma / sqrt(var + eps) * (dout - mean(dout) - xhat mean(dout xhat))
//! dgamma = sum(dout xhat)                      dbeta = sum(dout)
//! ```
//!
//! Running statistics: `running = momentum * running + (1 - momentum) * batch`, momentum 0.9, the variance biased as in
//! the batch; the running mean starts at 0, the running variance at 1. PyTorch's `momentum` is the weight of the *new*
//! value (0.1 for our 0.9), and its running variance is the unbiased one.
//!
//! One channel is one piece of work: its planes are fetched from memory once and stay in the L2 cache for the second
//! and third pass over them.

use ndarray::{Array, Array1, Array2, Array4, ArrayView1, ArrayView2, ArrayView4};

use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::parallel::{Disjoint, for_each_piece};
use crate::simd::{Write, sum, sum_and_dot_centred, sum_squared_deviations, vectorized};

/// Constants of batch normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNorm {
    /// Added to the variance, so that a constant channel does not divide by zero.
    pub eps: f64,
    /// Weight of the old value in the running statistics.
    pub momentum: f64,
}

impl Default for BatchNorm {
    /// The seed's: 1e-5 and 0.9.
    fn default() -> Self {
        BatchNorm { eps: 1e-5, momentum: 0.9 }
    }
}

impl BatchNorm {
    /// Checks the constants.
    pub(crate) fn check(&self) -> Result<()> {
        let BatchNorm { eps, momentum } = *self;
        if !(eps > 0.0 && eps.is_finite()) {
            return Err(Error::invalid(
                "batchnorm",
                format!("eps is {eps}"),
                "choose a small positive number such as 1e-5",
            ));
        }
        if !(0.0..=1.0).contains(&momentum) {
            return Err(Error::invalid("batchnorm", format!("momentum is {momentum}"), "give 0 to 1, usually 0.9"));
        }
        Ok(())
    }
}

/// Which statistics normalise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Those of the batch; the running ones are updated.
    Train,
    /// The running ones, which stay as they are.
    Test,
}

/// Mean and variance per channel: of a batch, or running ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics<T> {
    /// Mean of each channel.
    pub mean: Vec<T>,
    /// Biased variance of each channel.
    pub var: Vec<T>,
}

impl<T: Element> Statistics<T> {
    /// What running statistics start from: mean 0, variance 1.
    pub fn new(channels: usize) -> Self {
        Statistics { mean: vec![T::zero(); channels], var: vec![T::one(); channels] }
    }
}

/// `running <- momentum * running + (1 - momentum) * batch`
pub(crate) fn update_running<T: Element>(running: &mut [T], batch: &[T], momentum: f64) {
    let (old, new) = (T::of(momentum), T::of(1.0 - momentum));
    for (running, &batch) in running.iter_mut().zip(batch) {
        *running = old * *running + new * batch;
    }
}

/// Sizes of what is normalised: `[N, C, plane]`; plain batchnorm has planes of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Channels {
    pub(crate) images: usize,
    pub(crate) channels: usize,
    pub(crate) plane: usize,
}

impl Channels {
    fn of([images, channels, h, w]: [usize; 4]) -> Self {
        Channels { images, channels, plane: h * w }
    }

    /// The planes of channel `c`, as ranges of the whole array.
    #[inline(always)]
    pub(crate) fn planes(self, c: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
        (0..self.images).map(move |n| {
            let start = (n * self.channels + c) * self.plane;
            start..start + self.plane
        })
    }

    /// Elements that are averaged for one channel.
    pub(crate) fn count(self) -> f64 {
        (self.images * self.plane) as f64
    }
}

/// Mean and biased variance of channel `c`, in two passes; sums of planes are added up in f64.
#[inline(always)]
pub(crate) fn moments<T: Element>(of: Channels, c: usize, x: &[T]) -> (T, T) {
    let total: f64 = of.planes(c).map(|plane| sum(&x[plane]).f64()).sum();
    let mean = T::of(total / of.count());
    let squares: f64 = of.planes(c).map(|plane| sum_squared_deviations(&x[plane], mean).f64()).sum();
    (mean, T::of(squares / of.count()))
}

/// `1 / sqrt(var + eps)`
#[inline(always)]
pub(crate) fn inverse_std<T: Element>(var: T, eps: f64) -> T {
    T::one() / (var + T::of(eps)).sqrt()
}

/// What backward of one channel needs besides dout and x.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChannelGradient<T> {
    pub(crate) mean: T,
    pub(crate) inverse_std: T,
    pub(crate) gamma: T,
    /// `mean(dout)`
    pub(crate) dout: T,
    /// `mean(dout xhat)`
    pub(crate) dout_xhat: T,
}

/// `sum(dout)` and `sum(dout xhat)` of one plane.
#[inline(always)]
pub(crate) fn gradient_sums<T: Element>(dout: &[T], x: &[T], mean: T, inverse_std: T) -> (f64, f64) {
    // subtracting the mean first keeps the digits that a large mean would cost
    let (total, centred) = sum_and_dot_centred(dout, x, mean);
    (total.f64(), (centred * inverse_std).f64())
}

impl<T: Element> ChannelGradient<T> {
    /// From `sum(dout)` and `sum(dout xhat)` over a whole channel.
    #[inline(always)]
    pub(crate) fn new(of: Channels, mean: T, inverse_std: T, gamma: T, (total, total_xhat): (f64, f64)) -> Self {
        let [dout, dout_xhat] = [total, total_xhat].map(
            #[inline(always)]
            |sum| T::of(sum / of.count()),
        );
        ChannelGradient { mean, inverse_std, gamma, dout, dout_xhat }
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

/// Mean and variance of every channel.
pub(crate) fn batch_statistics<T: Element>(of: Channels, x: &[T], mean: &mut [T], var: &mut [T]) {
    let (mean, var) = (Disjoint::new(mean), Disjoint::new(var));
    if of.plane == 1 {
        for_each_piece(of.channels.div_ceil(COLUMNS), |piece| {
            let columns = piece * COLUMNS..((piece + 1) * COLUMNS).min(of.channels);
            // SAFETY: a piece owns its columns.
            let (mean, var) =
                unsafe { (mean.slice(columns.start, columns.len()), var.slice(columns.start, columns.len())) };
            let scale = T::of(1.0 / of.count());
            let rows = || x.chunks_exact(of.channels).map(|row| &row[columns.clone()]);
            vectorized!({
                mean.fill(T::zero());
                rows().for_each(|row| mean.iter_mut().zip(row).for_each(|(mean, &x)| *mean += x));
                mean.iter_mut().for_each(|mean| *mean *= scale);
                var.fill(T::zero());
                for row in rows() {
                    var.iter_mut().zip(row).zip(&*mean).for_each(|((var, &x), &mean)| *var += (x - mean) * (x - mean));
                }
                var.iter_mut().for_each(|var| *var *= scale);
            },);
        });
    } else {
        for_each_piece(of.channels, |c| {
            // SAFETY: a piece owns its channel.
            let (mean, var) = unsafe { (mean.slice(c, 1), var.slice(c, 1)) };
            (mean[0], var[0]) = vectorized!(moments(of, c, x),);
        });
    }
}

/// `out = gamma (x - mean) / sqrt(var + eps) + beta` for every channel.
fn normalize_into<T: Element>(
    of: Channels,
    x: &[T],
    gamma: &[T],
    beta: &[T],
    eps: f64,
    mean: &[T],
    var: &[T],
    out: &mut [T],
) {
    let (write, out) = (Write::of::<T>(out.len()), Disjoint::new(out));
    if of.plane == 1 {
        for_each_piece(of.channels.div_ceil(COLUMNS), |piece| {
            let columns = piece * COLUMNS..((piece + 1) * COLUMNS).min(of.channels);
            let (mean, var) = (&mean[columns.clone()], &var[columns.clone()]);
            let (gamma, beta) = (&gamma[columns.clone()], &beta[columns.clone()]);
            vectorized!({
                let mut inverse = [T::zero(); COLUMNS];
                inverse.iter_mut().zip(var).for_each(|(inverse, &var)| *inverse = inverse_std(var, eps));
                for n in 0..of.images {
                    let start = n * of.channels + columns.start;
                    // SAFETY: a piece owns its columns of every row.
                    let out = unsafe { out.slice(start, columns.len()) };
                    for (c, (out, &x)) in out.iter_mut().zip(&x[start..]).enumerate() {
                        *out = gamma[c] * ((x - mean[c]) * inverse[c]) + beta[c];
                    }
                }
            },);
        });
    } else {
        for_each_piece(of.channels, |c| {
            vectorized!({
                let (mean, inverse, gamma, beta) = (mean[c], inverse_std(var[c], eps), gamma[c], beta[c]);
                for plane in of.planes(c) {
                    // SAFETY: a piece owns the planes of its channel.
                    let out = unsafe { out.slice(plane.start, plane.len()) };
                    let x = &x[plane];
                    write.map(out, x, x, |x, _| gamma * ((x - mean) * inverse) + beta);
                }
            },);
        });
    }
}

/// Backward of training mode into the caller's buffers, all set. x and dout `[N, C, plane]`.
pub(crate) fn train_backward_into<T: Element>(
    of: Channels,
    dout: &[T],
    x: &[T],
    gamma: &[T],
    eps: f64,
    mean: &[T],
    var: &[T],
    dx: &mut [T],
    dgamma: &mut [T],
    dbeta: &mut [T],
) {
    let write = Write::of::<T>(dx.len());
    let (dx, dgamma, dbeta) = (Disjoint::new(dx), Disjoint::new(dgamma), Disjoint::new(dbeta));
    if of.plane == 1 {
        let scale = 1.0 / of.count();
        for_each_piece(of.channels.div_ceil(COLUMNS), |piece| {
            let columns = piece * COLUMNS..((piece + 1) * COLUMNS).min(of.channels);
            let width = columns.len();
            // SAFETY: a piece owns its columns.
            let (dgamma, dbeta) = unsafe { (dgamma.slice(columns.start, width), dbeta.slice(columns.start, width)) };
            let (mean, var, gamma) = (&mean[columns.clone()], &var[columns.clone()], &gamma[columns.clone()]);
            let row = |n: usize| n * of.channels + columns.start..n * of.channels + columns.end;
            vectorized!({
                let mut inverse = [T::zero(); COLUMNS];
                inverse.iter_mut().zip(var).for_each(|(inverse, &var)| *inverse = inverse_std(var, eps));
                dgamma.fill(T::zero());
                dbeta.fill(T::zero());
                for n in 0..of.images {
                    let (dout, x) = (&dout[row(n)], &x[row(n)]);
                    for c in 0..width {
                        dbeta[c] += dout[c];
                        dgamma[c] += dout[c] * ((x[c] - mean[c]) * inverse[c]);
                    }
                }
                for n in 0..of.images {
                    let (dout, x) = (&dout[row(n)], &x[row(n)]);
                    // SAFETY: a piece owns its columns of every row.
                    let dx = unsafe { dx.slice(row(n).start, width) };
                    for c in 0..width {
                        let (dout_mean, dout_xhat) = (dbeta[c] * T::of(scale), dgamma[c] * T::of(scale));
                        let gradient = ChannelGradient {
                            mean: mean[c],
                            inverse_std: inverse[c],
                            gamma: gamma[c],
                            dout: dout_mean,
                            dout_xhat,
                        };
                        dx[c] = gradient.dx(dout[c], x[c]);
                    }
                }
            },);
        });
    } else {
        for_each_piece(of.channels, |c| {
            vectorized!({
                let inverse_std = inverse_std(var[c], eps);
                let (mut total, mut total_xhat) = (0.0, 0.0);
                for plane in of.planes(c) {
                    let sums = gradient_sums(&dout[plane.clone()], &x[plane], mean[c], inverse_std);
                    total += sums.0;
                    total_xhat += sums.1;
                }
                let gradient = ChannelGradient::new(of, mean[c], inverse_std, gamma[c], (total, total_xhat));
                for plane in of.planes(c) {
                    // SAFETY: a piece owns the planes of its channel.
                    let dx = unsafe { dx.slice(plane.start, plane.len()) };
                    let (dout, x) = (&dout[plane.clone()], &x[plane]);
                    write.map(dx, dout, x, |dout, x| gradient.dx(dout, x));
                }
                // SAFETY: a piece owns its channel.
                unsafe {
                    dgamma.slice(c, 1)[0] = T::of(total_xhat);
                    dbeta.slice(c, 1)[0] = T::of(total);
                }
            },);
        });
    }
}

/// Gradients of batch normalisation; `D` is the dimension of its input.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchNormGrads<T, D: ndarray::Dimension> {
    /// Gradient of the input, in its shape.
    pub dx: Array<T, D>,
    /// Gradient of the scale, `(C)`.
    pub dgamma: Array1<T>,
    /// Gradient of the shift, `(C)`.
    pub dbeta: Array1<T>,
}

/// What the backward pass needs of the forward pass: the statistics that normalised, and in which mode.
#[derive(Clone, Debug)]
pub struct BatchNormCache<T> {
    /// The statistics that normalised.
    pub statistics: Statistics<T>,
    /// Whether they were the batch's.
    pub mode: Mode,
    /// The constants used.
    pub config: BatchNorm,
}

fn check_parameters<T>(
    op: &'static str,
    channels: usize,
    gamma: &ArrayView1<'_, T>,
    beta: &ArrayView1<'_, T>,
    running: &Statistics<T>,
) -> Result<()> {
    check_shape(op, "gamma", gamma.shape(), &[channels])?;
    check_shape(op, "beta", beta.shape(), &[channels])?;
    check_shape(op, "running mean", &[running.mean.len()], &[channels])?;
    check_shape(op, "running variance", &[running.var.len()], &[channels])
}

/// Training mode, with the running statistics: those of the batch into `batch`.
fn train<T: Element>(
    of: Channels,
    x: &[T],
    gamma: &[T],
    beta: &[T],
    running: &mut Statistics<T>,
    config: &BatchNorm,
    out: &mut [T],
    batch: &mut Statistics<T>,
) -> Result<()> {
    if of.images * of.plane == 0 {
        return Err(Error::invalid("batchnorm", "a batch of 0 values has no statistics", "give at least one image"));
    }
    let Statistics { mean, var } = batch;
    batch_statistics(of, x, mean, var);
    normalize_into(of, x, gamma, beta, config.eps, mean, var, out);
    update_running(&mut running.mean, mean, config.momentum);
    update_running(&mut running.var, var, config.momentum);
    Ok(())
}

fn forward<T: Element>(
    of: Channels,
    x: &[T],
    gamma: ArrayView1<'_, T>,
    beta: ArrayView1<'_, T>,
    running: &mut Statistics<T>,
    mode: Mode,
    config: &BatchNorm,
    out: &mut [T],
) -> Result<BatchNormCache<T>> {
    config.check()?;
    let (gamma, beta) = (gamma.as_standard_layout(), beta.as_standard_layout());
    let (gamma, beta) = (gamma.as_slice().expect("standard layout"), beta.as_slice().expect("standard layout"));
    let mut statistics = running.clone();
    match mode {
        Mode::Train => train(of, x, gamma, beta, running, config, out, &mut statistics)?,
        Mode::Test => normalize_into(of, x, gamma, beta, config.eps, &statistics.mean, &statistics.var, out),
    }
    Ok(BatchNormCache { statistics, mode, config: *config })
}

fn backward<T: Element>(
    of: Channels,
    dout: &[T],
    x: &[T],
    gamma: ArrayView1<'_, T>,
    cache: &BatchNormCache<T>,
    dx: &mut [T],
) -> Result<(Array1<T>, Array1<T>)> {
    check_shape("batchnorm backward", "gamma", gamma.shape(), &[of.channels])?;
    check_shape("batchnorm backward", "cached mean", &[cache.statistics.mean.len()], &[of.channels])?;
    let gamma = gamma.as_standard_layout();
    let gamma = gamma.as_slice().expect("standard layout");
    let (mut dgamma, mut dbeta) = (Array1::zeros(of.channels), Array1::zeros(of.channels));
    let Statistics { mean, var } = &cache.statistics;
    train_backward_into(
        of,
        dout,
        x,
        gamma,
        cache.config.eps,
        mean,
        var,
        dx,
        dgamma.as_slice_mut().expect("freshly made"),
        dbeta.as_slice_mut().expect("freshly made"),
    );
    if cache.mode == Mode::Test {
        // the statistics did not depend on x: dx = dout gamma / sqrt(var + eps)
        for (i, (dx, &dout)) in dx.iter_mut().zip(dout).enumerate() {
            let c = i / of.plane % of.channels;
            *dx = dout * gamma[c] * inverse_std(var[c], cache.config.eps);
        }
    }
    Ok((dgamma, dbeta))
}

/// Batchnorm of x `(N, D)` with gamma and beta `(D)`: `(N, D)`, and the cache for backward.
///
/// # Errors
/// [`Error::Shape`] if gamma, beta or the running statistics do not have `D` elements; [`Error::Invalid`] for an empty batch
/// in training, an `eps` that is not positive, or a momentum outside 0 to 1.
pub fn batchnorm_forward<T: Element>(
    x: ArrayView2<'_, T>,
    gamma: ArrayView1<'_, T>,
    beta: ArrayView1<'_, T>,
    running: &mut Statistics<T>,
    mode: Mode,
    config: &BatchNorm,
) -> Result<(Array2<T>, BatchNormCache<T>)> {
    let (images, channels) = x.dim();
    check_parameters("batchnorm", channels, &gamma, &beta, running)?;
    let x = x.as_standard_layout();
    let mut out = Array2::zeros((images, channels));
    let (input, output) = (x.as_slice().expect("standard layout"), out.as_slice_mut().expect("freshly made"));
    let cache = forward(Channels { images, channels, plane: 1 }, input, gamma, beta, running, mode, config, output)?;
    Ok((out, cache))
}

/// Gradients of [`batchnorm_forward`] for dout `(N, D)`.
///
/// # Errors
/// [`Error::Shape`] if the shapes differ from the forward pass.
pub fn batchnorm_backward<T: Element>(
    dout: ArrayView2<'_, T>,
    x: ArrayView2<'_, T>,
    gamma: ArrayView1<'_, T>,
    cache: &BatchNormCache<T>,
) -> Result<BatchNormGrads<T, ndarray::Ix2>> {
    let (images, channels) = x.dim();
    check_shape("batchnorm backward", "dout", dout.shape(), x.shape())?;
    let (x, dout) = (x.as_standard_layout(), dout.as_standard_layout());
    let mut dx = Array2::zeros((images, channels));
    let of = Channels { images, channels, plane: 1 };
    let (x, dout) = (x.as_slice().expect("standard layout"), dout.as_slice().expect("standard layout"));
    let (dgamma, dbeta) = backward(of, dout, x, gamma, cache, dx.as_slice_mut().expect("freshly made"))?;
    Ok(BatchNormGrads { dx, dgamma, dbeta })
}

/// Training mode of [`spatial_batchnorm_forward`] into the caller's buffers: `out`, and the statistics of the batch, which
/// backward needs, into `batch`. Shapes: x and out `shape` = `[N, C, H, W]`, gamma and beta `[C]`, all row-major.
/// Allocates nothing.
///
/// # Errors
/// As [`spatial_batchnorm_forward`] for an empty batch and for the constants.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn spatial_batchnorm_forward_into<T: Element>(
    shape: [usize; 4],
    x: &[T],
    gamma: &[T],
    beta: &[T],
    running: &mut Statistics<T>,
    config: &BatchNorm,
    out: &mut [T],
    batch: &mut Statistics<T>,
) -> Result<()> {
    let of = Channels::of(shape);
    assert_lengths(of, [x, out], [gamma, beta, &running.mean, &running.var, &batch.mean, &batch.var]);
    config.check()?;
    train(of, x, gamma, beta, running, config, out, batch)
}

/// Gradients of [`spatial_batchnorm_forward_into`] into the caller's buffers, all of them set, not added to; `batch` as
/// forward left it. Shapes: x, dout and dx `shape` = `[N, C, H, W]`, gamma, dgamma and dbeta `[C]`. Allocates nothing.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn spatial_batchnorm_backward_into<T: Element>(
    shape: [usize; 4],
    dout: &[T],
    x: &[T],
    gamma: &[T],
    batch: &Statistics<T>,
    config: &BatchNorm,
    dx: &mut [T],
    dgamma: &mut [T],
    dbeta: &mut [T],
) {
    let of = Channels::of(shape);
    let Statistics { mean, var } = batch;
    assert_lengths(of, [dout, x, dx], [gamma, mean, var, dgamma, dbeta]);
    train_backward_into(of, dout, x, gamma, config.eps, mean, var, dx, dgamma, dbeta);
}

#[track_caller]
fn assert_lengths<T, const A: usize, const B: usize>(of: Channels, images: [&[T]; A], vectors: [&[T]; B]) {
    let len = of.images * of.channels * of.plane;
    assert!(
        images.iter().all(|a| a.len() == len) && vectors.iter().all(|v| v.len() == of.channels),
        "arrays of {:?} and {:?} elements for {of:?}",
        images.map(<[T]>::len),
        vectors.map(<[T]>::len)
    );
}

/// Spatial batchnorm of x `(N, C, H, W)` with gamma and beta `(C)`, statistics over N, H and W: `(N, C, H, W)`, and the
/// cache for backward.
///
/// # Errors
/// [`Error::Shape`] if gamma, beta or the running statistics do not have `C` elements; [`Error::Invalid`] for an empty batch
/// in training, an `eps` that is not positive, or a momentum outside 0 to 1.
pub fn spatial_batchnorm_forward<T: Element>(
    x: ArrayView4<'_, T>,
    gamma: ArrayView1<'_, T>,
    beta: ArrayView1<'_, T>,
    running: &mut Statistics<T>,
    mode: Mode,
    config: &BatchNorm,
) -> Result<(Array4<T>, BatchNormCache<T>)> {
    let (images, channels, h, w) = x.dim();
    check_parameters("spatial_batchnorm", channels, &gamma, &beta, running)?;
    let x = x.as_standard_layout();
    let mut out = Array4::zeros((images, channels, h, w));
    let (input, output) = (x.as_slice().expect("standard layout"), out.as_slice_mut().expect("freshly made"));
    let cache = forward(Channels::of(x.dim().into()), input, gamma, beta, running, mode, config, output)?;
    Ok((out, cache))
}

/// Gradients of [`spatial_batchnorm_forward`] for dout `(N, C, H, W)`.
///
/// # Errors
/// [`Error::Shape`] if the shapes differ from the forward pass.
pub fn spatial_batchnorm_backward<T: Element>(
    dout: ArrayView4<'_, T>,
    x: ArrayView4<'_, T>,
    gamma: ArrayView1<'_, T>,
    cache: &BatchNormCache<T>,
) -> Result<BatchNormGrads<T, ndarray::Ix4>> {
    let (images, channels, h, w) = x.dim();
    check_shape("spatial_batchnorm backward", "dout", dout.shape(), x.shape())?;
    let (x, dout) = (x.as_standard_layout(), dout.as_standard_layout());
    let mut dx = Array4::zeros((images, channels, h, w));
    let of = Channels::of(x.dim().into());
    let (x, dout) = (x.as_slice().expect("standard layout"), dout.as_slice().expect("standard layout"));
    let (dgamma, dbeta) = backward(of, dout, x, gamma, cache, dx.as_slice_mut().expect("freshly made"))?;
    Ok(BatchNormGrads { dx, dgamma, dbeta })
}
