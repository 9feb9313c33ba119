//! Level 4. Batch normalisation in training mode by its definition.

use ndarray::{Array, Array1, Array2, Array4, ArrayView, ArrayView1, ArrayView2, ArrayView4, Axis, RemoveAxis};

use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::ops::batchnorm::BatchNormGrads;

/// Batch normalisation (Ioffe & Szegedy 2015) of `x` `(N, D)` with the statistics of the batch, feature by feature:
///
/// ```text
/// mean = 1/N sum of x        var = 1/N sum of (x - mean)^2        out = gamma (x - mean) / sqrt(var + eps) + beta
/// ```
///
/// The variance is the biased one. `gamma` and `beta` are `(D)`; returns `(N, D)`.
///
/// # Errors
/// [`Error::Shape`] if `gamma` or `beta` does not have a value for each feature; [`Error::Invalid`] for an empty batch,
/// which has no statistics, or an `eps` that is not positive.
pub fn batchnorm_forward<T: Element>(
    x: ArrayView2<T>,
    gamma: ArrayView1<T>,
    beta: ArrayView1<T>,
    eps: f64,
) -> Result<Array2<T>> {
    forward(x, gamma, beta, eps)
}

/// [`batchnorm_forward`] of images `x` `(N, C, H, W)`: each channel is a feature, and every pixel of every image a sample
/// of it. `gamma` and `beta` are `(C)`.
///
/// # Errors
/// Those of [`batchnorm_forward`].
pub fn spatial_batchnorm_forward<T: Element>(
    x: ArrayView4<T>,
    gamma: ArrayView1<T>,
    beta: ArrayView1<T>,
    eps: f64,
) -> Result<Array4<T>> {
    forward(x, gamma, beta, eps)
}

/// Gradients of [`batchnorm_forward`] for the gradient `dout` `(N, D)` of its output, by the chain rule through
/// `xhat = (x - mean) / sqrt(var + eps)`, `var` and `mean`, all sums over the batch:
///
/// ```text
/// dbeta  = sum of dout          dgamma = sum of dout xhat          dxhat = dout gamma
/// dvar   = sum of dxhat (x - mean) * -1/2 (var + eps)^(-3/2)
/// dmean  = sum of -dxhat / sqrt(var + eps) + dvar sum of -2 (x - mean) / N
/// dx     = dxhat / sqrt(var + eps) + dvar 2 (x - mean) / N + dmean / N
/// ```
///
/// # Errors
/// Those of [`batchnorm_forward`], and [`Error::Shape`] if `dout` does not have the shape of `x`.
pub fn batchnorm_backward<T: Element>(
    dout: ArrayView2<T>,
    x: ArrayView2<T>,
    gamma: ArrayView1<T>,
    eps: f64,
) -> Result<BatchNormGrads<T, ndarray::Ix2>> {
    backward(dout, x, gamma, eps)
}

/// Gradients of [`spatial_batchnorm_forward`], as [`batchnorm_backward`].
///
/// # Errors
/// Those of [`batchnorm_backward`].
pub fn spatial_batchnorm_backward<T: Element>(
    dout: ArrayView4<T>,
    x: ArrayView4<T>,
    gamma: ArrayView1<T>,
    eps: f64,
) -> Result<BatchNormGrads<T, ndarray::Ix4>> {
    backward(dout, x, gamma, eps)
}

/// Features are on this axis in `(N, D)` and in `(N, C, H, W)`; all other axes are the samples of a feature.
const FEATURES: Axis = Axis(1);

fn forward<T: Element, D: RemoveAxis>(
    x: ArrayView<T, D>,
    gamma: ArrayView1<T>,
    beta: ArrayView1<T>,
    eps: f64,
) -> Result<Array<T, D>> {
    check(&x, gamma, eps)?;
    check_shape("batchnorm", "beta", beta.shape(), gamma.shape())?;
    let mut out = Array::zeros(x.raw_dim());
    for f in 0..x.len_of(FEATURES) {
        let samples = x.index_axis(FEATURES, f);
        let (mean, var) = statistics(samples.view());
        for (out, &x) in out.index_axis_mut(FEATURES, f).iter_mut().zip(samples) {
            *out = gamma[f] * (x - mean) / (var + T::of(eps)).sqrt() + beta[f];
        }
    }
    Ok(out)
}

fn backward<T: Element, D: RemoveAxis>(
    dout: ArrayView<T, D>,
    x: ArrayView<T, D>,
    gamma: ArrayView1<T>,
    eps: f64,
) -> Result<BatchNormGrads<T, D>> {
    check(&x, gamma, eps)?;
    check_shape("batchnorm", "dout", dout.shape(), x.shape())?;
    let (half, two) = (T::of(0.5), T::of(2.0));
    let mut dx = Array::zeros(x.raw_dim());
    let mut dgamma = Array1::zeros(gamma.len());
    let mut dbeta = Array1::zeros(gamma.len());
    for f in 0..x.len_of(FEATURES) {
        let (samples, dout) = (x.index_axis(FEATURES, f), dout.index_axis(FEATURES, f));
        let count = T::of(samples.len() as f64);
        let (mean, var) = statistics(samples.view());
        let std = (var + T::of(eps)).sqrt();

        let mut dvar = T::zero();
        let mut dmean = T::zero();
        let mut deviations = T::zero();
        for (&d, &x) in dout.iter().zip(&samples) {
            dbeta[f] += d;
            dgamma[f] += d * (x - mean) / std;
            let dxhat = d * gamma[f];
            dvar -= dxhat * (x - mean) * half / (std * std * std);
            dmean -= dxhat / std;
            deviations += x - mean;
        }
        dmean -= dvar * two * deviations / count;
        for ((dx, &d), &x) in dx.index_axis_mut(FEATURES, f).iter_mut().zip(dout).zip(&samples) {
            *dx = d * gamma[f] / std + dvar * two * (x - mean) / count + dmean / count;
        }
    }
    Ok(BatchNormGrads { dx, dgamma, dbeta })
}

/// Mean and biased variance, in two passes.
fn statistics<T: Element, D: ndarray::Dimension>(samples: ArrayView<T, D>) -> (T, T) {
    let count = T::of(samples.len() as f64);
    let mut sum = T::zero();
    for &x in &samples {
        sum += x;
    }
    let mean = sum / count;
    let mut squares = T::zero();
    for &x in samples {
        squares += (x - mean) * (x - mean);
    }
    (mean, squares / count)
}

fn check<T: Element, D: RemoveAxis>(x: &ArrayView<T, D>, gamma: ArrayView1<T>, eps: f64) -> Result<()> {
    check_shape("batchnorm", "gamma", gamma.shape(), &[x.len_of(FEATURES)])?;
    if x.is_empty() {
        return Err(Error::invalid(
            "batchnorm",
            format!("an input of shape {:?} has no statistics", x.shape()),
            "give at least one sample",
        ));
    }
    if eps.is_nan() || eps <= 0.0 {
        return Err(Error::invalid(
            "batchnorm",
            format!("eps is {eps}"),
            "choose a small positive number such as 1e-5",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn the_output_has_mean_beta_and_deviation_gamma() {
        // Deviations 1 and 2 around 5 and -3: normalised to +-1 but for eps.
        let x = array![[4.0_f64, -5.0], [6.0, -1.0]];
        let out = batchnorm_forward(x.view(), array![1.0, 10.0].view(), array![0.0, 7.0].view(), 1e-14).unwrap();
        for (got, want) in out.iter().zip([-1.0, -3.0, 1.0, 17.0]) {
            assert!((got - want).abs() < 1e-12, "{out}");
        }
        // The same numbers as pixels of one image with two channels.
        let images = array![[[[4.0, 6.0]], [[-5.0, -1.0]]]];
        let spatial =
            spatial_batchnorm_forward(images.view(), array![1.0, 10.0].view(), array![0.0, 7.0].view(), 1e-14);
        assert_eq!(spatial.unwrap().flatten().to_vec(), out.t().iter().copied().collect::<Vec<_>>());
    }

    #[test]
    fn what_has_no_statistics_is_an_error() {
        let ones = Array1::<f64>::ones(3);
        let error = |x: Array2<f64>, eps| batchnorm_forward(x.view(), ones.view(), ones.view(), eps).unwrap_err();
        assert!(error(Array2::zeros((0, 3)), 1e-5).to_string().contains("[0, 3] has no statistics"));
        assert!(error(Array2::zeros((2, 3)), f64::NAN).to_string().contains("eps is NaN"));
        assert!(error(Array2::zeros((2, 4)), 1e-5).to_string().contains("gamma has shape [3], expected [4]"));
        let (x, dout) = (Array2::zeros((2, 3)), Array2::zeros((3, 3)));
        let error = batchnorm_backward(dout.view(), x.view(), ones.view(), 1e-5).unwrap_err().to_string();
        assert_eq!(error, "batchnorm: dout has shape [3, 3], expected [2, 3]");
    }
}
