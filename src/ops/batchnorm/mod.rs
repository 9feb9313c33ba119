//! Level 3. Batch normalisation (Ioffe & Szegedy 2015), plain over `(N, D)` and spatial over `(N, C, H, W)`.
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
//! In test mode the running statistics normalise. They do not depend on x, so `dx = dout gamma / sqrt(var + eps)`.
//!
//! One channel is one piece of work: its planes are fetched from memory once and stay in the L2 cache for the second
//! and third pass over them.

mod arrays;
mod blocked;
mod kernels;

pub use arrays::{
    BatchNormCache, BatchNormGrads, batchnorm_backward, batchnorm_forward, spatial_batchnorm_backward,
    spatial_batchnorm_forward,
};
pub(crate) use blocked::{BlockGradient, gradient_sums_of_block, moments_of_blocks};
pub(crate) use kernels::{
    ChannelGradient, Channels, batch_statistics, gradient_sums, gradient_sums_of, inverse_std, moments, moments_of,
    train_backward_into,
};

use crate::element::Element;
use crate::error::{Error, Result};
use kernels::normalize_into;

/// Constants of batch normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNorm {
    /// Added to the variance, so that a constant channel does not divide by zero.
    pub eps: f64,
    /// Weight of the old value in the running statistics.
    pub momentum: f64,
}

impl Default for BatchNorm {
    fn default() -> Self {
        Self::USUAL
    }
}

impl BatchNorm {
    /// CS231n's: 1e-5 and 0.9.
    pub const USUAL: Self = BatchNorm { eps: 1e-5, momentum: 0.9 };

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

    /// Normalisation by these statistics, with the scale `gamma` and the `eps` of `config`.
    pub fn norm<'a>(&'a self, gamma: &'a [T], config: &BatchNorm) -> Norm<'a, T> {
        Norm { gamma, mean: &self.mean, var: &self.var, eps: config.eps }
    }
}

/// The parameters of batch normalisation, per channel.
#[derive(Clone, Copy, Debug)]
pub struct ScaleShift<'a, T> {
    /// Scale, `[C]`.
    pub gamma: &'a [T],
    /// Shift, `[C]`.
    pub beta: &'a [T],
}

/// A normalisation with known statistics, per channel: what backward needs of it besides x.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a, T> {
    /// Scale, `[C]`.
    pub gamma: &'a [T],
    /// Mean that was subtracted, `[C]`.
    pub mean: &'a [T],
    /// Biased variance, `[C]`.
    pub var: &'a [T],
    /// What was added to the variance.
    pub eps: f64,
}

/// Where the gradients of batch normalisation go; all set, not added to.
#[derive(Debug)]
pub struct NormGradsMut<'a, T> {
    /// Gradient of the input, in its shape.
    pub dx: &'a mut [T],
    /// Gradient of the scale, `[C]`.
    pub dgamma: &'a mut [T],
    /// Gradient of the shift, `[C]`.
    pub dbeta: &'a mut [T],
}

/// `running <- momentum * running + (1 - momentum) * batch`
pub(crate) fn update_running<T: Element>(running: &mut [T], batch: &[T], momentum: f64) {
    let (old, new) = (T::of(momentum), T::of(1.0 - momentum));
    for (running, &batch) in running.iter_mut().zip(batch) {
        *running = old * *running + new * batch;
    }
}

/// Training mode: the statistics of the batch into `batch`, the output, and the update of the running statistics. The
/// lengths and constants have been checked.
fn train_into<T: Element>(
    sizes: Channels,
    x: &[T],
    ScaleShift { gamma, beta }: ScaleShift<'_, T>,
    running: &mut Statistics<T>,
    config: &BatchNorm,
    out: &mut [T],
    batch: &mut Statistics<T>,
) -> Result<()> {
    if sizes.images == 0 || sizes.plane == 0 {
        return Err(Error::invalid("batchnorm", "a batch of 0 values has no statistics", "give at least one image"));
    }
    batch_statistics(sizes, x, &mut batch.mean, &mut batch.var);
    normalize_into(sizes, x, batch.norm(gamma, config), beta, out);
    update_running(&mut running.mean, &batch.mean, config.momentum);
    update_running(&mut running.var, &batch.var, config.momentum);
    Ok(())
}

/// Training mode of [`spatial_batchnorm_forward`] into the caller's buffers: `out`, and the statistics of the batch, which
/// backward needs, into `batch`. Shapes: x and out `shape` = `[N, C, H, W]`, all vectors `[C]`, all row-major. Allocates
/// nothing.
///
/// # Errors
/// [`Error::Invalid`] for an empty batch, an `eps` that is not positive, or a momentum outside 0 to 1.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn spatial_batchnorm_forward_into<T: Element>(
    shape: [usize; 4],
    x: &[T],
    parameters: ScaleShift<'_, T>,
    running: &mut Statistics<T>,
    config: &BatchNorm,
    out: &mut [T],
    batch: &mut Statistics<T>,
) -> Result<()> {
    let ScaleShift { gamma, beta } = parameters;
    let vectors = [gamma, beta, &running.mean, &running.var, &batch.mean, &batch.var];
    let sizes = checked_sizes(shape, [x, out], vectors);
    config.check()?;
    train_into(sizes, x, parameters, running, config, out, batch)
}

/// Gradients of [`spatial_batchnorm_forward_into`] into the caller's buffers; `norm` has the statistics of the batch, as
/// forward left them ([`Statistics::norm`]). Shapes: x, dout and dx `shape` = `[N, C, H, W]`, all vectors `[C]`. Allocates
/// nothing.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn spatial_batchnorm_backward_into<T: Element>(
    shape: [usize; 4],
    dout: &[T],
    x: &[T],
    norm: Norm<'_, T>,
    grads: NormGradsMut<'_, T>,
) {
    let vectors = [norm.gamma, norm.mean, norm.var, grads.dgamma, grads.dbeta];
    let sizes = checked_sizes(shape, [dout, x, grads.dx], vectors);
    train_backward_into(sizes, dout, x, norm, grads);
}

/// The sizes of `[N, C, H, W]`.
///
/// # Panics
/// Unless all `images` are of that shape and all `vectors` have one element for each channel.
#[track_caller]
fn checked_sizes<T, const A: usize, const B: usize>(
    [images, channels, h, w]: [usize; 4],
    arrays: [&[T]; A],
    vectors: [&[T]; B],
) -> Channels {
    let plane = h.checked_mul(w).expect("a plane that fits into memory");
    let sizes = Channels { images, channels, plane };
    assert!(
        arrays.iter().all(|a| Some(a.len()) == sizes.checked_len()) && vectors.iter().all(|v| v.len() == channels),
        "arrays of {:?} and {:?} elements for {sizes:?}",
        arrays.map(<[T]>::len),
        vectors.map(<[T]>::len)
    );
    sizes
}
