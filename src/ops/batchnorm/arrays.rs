//! Level 3. Batch normalisation over arrays: the plain and the spatial form share one implementation.

use ndarray::{Array, Array1, Array2, Array4, ArrayView, ArrayView1, ArrayView2, ArrayView4, Dimension, Ix2, Ix4};

use super::kernels::{Channels, normalize_into, test_backward_into, train_backward_into};
use super::{BatchNorm, NormGradsMut, ScaleShift, Statistics, train_into};
use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::ops::Mode;
use crate::ops::layout::{row_major, slice_mut};

/// Gradients of batch normalisation; `D` is the dimension of its input.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchNormGrads<T, D: Dimension> {
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

/// Batchnorm of x `(N, D)` with gamma and beta `(D)`: `(N, D)`, and the cache for backward.
///
/// # Errors
/// [`crate::Error::Shape`] if gamma, beta or the running statistics do not have `D` elements; [`crate::Error::Invalid`]
/// for an empty batch in training, an `eps` that is not positive, or a momentum outside 0 to 1.
pub fn batchnorm_forward<T: Element>(
    x: ArrayView2<'_, T>,
    gamma: ArrayView1<'_, T>,
    beta: ArrayView1<'_, T>,
    running: &mut Statistics<T>,
    mode: Mode,
    config: &BatchNorm,
) -> Result<(Array2<T>, BatchNormCache<T>)> {
    forward("batchnorm", x, (gamma, beta), running, mode, config)
}

/// Gradients of [`batchnorm_forward`] for dout `(N, D)`.
///
/// # Errors
/// [`crate::Error::Shape`] if the shapes differ from the forward pass.
pub fn batchnorm_backward<T: Element>(
    dout: ArrayView2<'_, T>,
    x: ArrayView2<'_, T>,
    gamma: ArrayView1<'_, T>,
    cache: &BatchNormCache<T>,
) -> Result<BatchNormGrads<T, Ix2>> {
    backward("batchnorm backward", dout, x, gamma, cache)
}

/// Spatial batchnorm of x `(N, C, H, W)` with gamma and beta `(C)`, statistics over N, H and W: `(N, C, H, W)`, and the
/// cache for backward.
///
/// # Errors
/// Those of [`batchnorm_forward`], with `C` for `D`.
pub fn spatial_batchnorm_forward<T: Element>(
    x: ArrayView4<'_, T>,
    gamma: ArrayView1<'_, T>,
    beta: ArrayView1<'_, T>,
    running: &mut Statistics<T>,
    mode: Mode,
    config: &BatchNorm,
) -> Result<(Array4<T>, BatchNormCache<T>)> {
    forward("spatial_batchnorm", x, (gamma, beta), running, mode, config)
}

/// Gradients of [`spatial_batchnorm_forward`] for dout `(N, C, H, W)`.
///
/// # Errors
/// [`crate::Error::Shape`] if the shapes differ from the forward pass.
pub fn spatial_batchnorm_backward<T: Element>(
    dout: ArrayView4<'_, T>,
    x: ArrayView4<'_, T>,
    gamma: ArrayView1<'_, T>,
    cache: &BatchNormCache<T>,
) -> Result<BatchNormGrads<T, Ix4>> {
    backward("spatial_batchnorm backward", dout, x, gamma, cache)
}

/// Sizes of an array `(N, C, ..)`.
fn channels(shape: &[usize]) -> Channels {
    Channels { images: shape[0], channels: shape[1], plane: shape[2..].iter().product() }
}

fn forward<T: Element, D: Dimension>(
    op: &'static str,
    x: ArrayView<'_, T, D>,
    (gamma, beta): (ArrayView1<'_, T>, ArrayView1<'_, T>),
    running: &mut Statistics<T>,
    mode: Mode,
    config: &BatchNorm,
) -> Result<(Array<T, D>, BatchNormCache<T>)> {
    let sizes = channels(x.shape());
    check_shape(op, "gamma", gamma.shape(), &[sizes.channels])?;
    check_shape(op, "beta", beta.shape(), &[sizes.channels])?;
    check_shape(op, "running mean", &[running.mean.len()], &[sizes.channels])?;
    check_shape(op, "running variance", &[running.var.len()], &[sizes.channels])?;
    config.check()?;
    let mut out = Array::zeros(x.raw_dim());
    let (x, gamma, beta) = (row_major(x), row_major(gamma), row_major(beta));
    let mut statistics = running.clone();
    match mode {
        Mode::Train => {
            let parameters = ScaleShift { gamma: &gamma, beta: &beta };
            train_into(sizes, &x, parameters, running, config, slice_mut(&mut out), &mut statistics)?;
        }
        Mode::Test => normalize_into(sizes, &x, statistics.norm(&gamma, config), &beta, slice_mut(&mut out)),
    }
    Ok((out, BatchNormCache { statistics, mode, config: *config }))
}

fn backward<T: Element, D: Dimension>(
    op: &'static str,
    dout: ArrayView<'_, T, D>,
    x: ArrayView<'_, T, D>,
    gamma: ArrayView1<'_, T>,
    cache: &BatchNormCache<T>,
) -> Result<BatchNormGrads<T, D>> {
    let (sizes, Statistics { mean, var }) = (channels(x.shape()), &cache.statistics);
    check_shape(op, "dout", dout.shape(), x.shape())?;
    check_shape(op, "gamma", gamma.shape(), &[sizes.channels])?;
    check_shape(op, "cached mean", &[mean.len()], &[sizes.channels])?;
    check_shape(op, "cached variance", &[var.len()], &[sizes.channels])?;
    let (mut dx, mut dgamma) = (Array::zeros(x.raw_dim()), Array1::zeros(sizes.channels));
    let mut dbeta = Array1::zeros(sizes.channels);
    let grads = NormGradsMut { dx: slice_mut(&mut dx), dgamma: slice_mut(&mut dgamma), dbeta: slice_mut(&mut dbeta) };
    let (dout, x, gamma) = (row_major(dout), row_major(x), row_major(gamma));
    let norm = cache.statistics.norm(&gamma, &cache.config);
    match cache.mode {
        Mode::Train => train_backward_into(sizes, &dout, &x, norm, grads),
        Mode::Test => test_backward_into(sizes, &dout, &x, norm, grads),
    }
    Ok(BatchNormGrads { dx, dgamma, dbeta })
}
