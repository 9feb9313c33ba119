//! Level 4. The affine layer by its definition.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::ops::affine::AffineGrads;

/// `out[n, m] = b[m] + sum over d of x[n, d] w[d, m]` for `x` `(N, D)`, `w` `(D, M)` and `b` `(M)`. Returns `(N, M)`.
///
/// # Errors
/// [`crate::Error::Shape`] if `w` does not have a row for each column of `x`, or `b` not a value for each column of `w`.
pub fn affine_forward<T: Element>(x: ArrayView2<T>, w: ArrayView2<T>, b: Option<ArrayView1<T>>) -> Result<Array2<T>> {
    let ((samples, inputs), outputs) = (x.dim(), w.ncols());
    check_shape("affine", "w", w.shape(), &[inputs, outputs])?;
    if let Some(b) = b {
        check_shape("affine", "b", b.shape(), &[outputs])?;
    }
    let mut out = Array2::zeros((samples, outputs));
    for n in 0..samples {
        for m in 0..outputs {
            let mut sum = b.map_or(T::zero(), |b| b[m]);
            for d in 0..inputs {
                sum += x[[n, d]] * w[[d, m]];
            }
            out[[n, m]] = sum;
        }
    }
    Ok(out)
}

/// Gradients of [`affine_forward`] for the gradient `dout` `(N, M)` of its output:
///
/// ```text
/// dx[n, d] = sum over m of dout[n, m] w[d, m]
/// dw[d, m] = sum over n of x[n, d] dout[n, m]
/// db[m]    = sum over n of dout[n, m]
/// ```
///
/// # Errors
/// [`crate::Error::Shape`] if the shapes do not fit together.
pub fn affine_backward<T: Element>(dout: ArrayView2<T>, x: ArrayView2<T>, w: ArrayView2<T>) -> Result<AffineGrads<T>> {
    let ((samples, inputs), outputs) = (x.dim(), w.ncols());
    check_shape("affine", "w", w.shape(), &[inputs, outputs])?;
    check_shape("affine", "dout", dout.shape(), &[samples, outputs])?;
    let mut dx = Array2::zeros((samples, inputs));
    let mut dw = Array2::zeros((inputs, outputs));
    let mut db = Array1::zeros(outputs);
    for n in 0..samples {
        for m in 0..outputs {
            let d_out = dout[[n, m]];
            db[m] += d_out;
            for d in 0..inputs {
                dx[[n, d]] += d_out * w[[d, m]];
                dw[[d, m]] += d_out * x[[n, d]];
            }
        }
    }
    Ok(AffineGrads { dx, dw, db })
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn a_hand_computed_product() {
        let (x, w, b) = (array![[1.0, 2.0]], array![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], array![100.0, 200.0, 300.0]);
        assert_eq!(affine_forward(x.view(), w.view(), Some(b.view())).unwrap(), array![[109.0, 212.0, 315.0]]);
        let grads = affine_backward(array![[1.0, 10.0, 100.0]].view(), x.view(), w.view()).unwrap();
        assert_eq!(grads.dx, array![[321.0, 654.0]]);
        assert_eq!(grads.dw, array![[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]);
        assert_eq!(grads.db, array![1.0, 10.0, 100.0]);
    }

    #[test]
    fn wrong_shapes_are_errors_that_name_the_argument() {
        let (x, w) = (Array2::<f32>::zeros((2, 3)), Array2::zeros((3, 4)));
        let error = affine_forward(x.view(), w.t(), None).unwrap_err().to_string();
        assert_eq!(error, "affine: w has shape [4, 3], expected [3, 3]");
        let error = affine_forward(x.view(), w.view(), Some(Array1::zeros(3).view())).unwrap_err().to_string();
        assert_eq!(error, "affine: b has shape [3], expected [4]");
        let error = affine_backward(x.view(), x.view(), w.view()).unwrap_err().to_string();
        assert_eq!(error, "affine: dout has shape [2, 3], expected [2, 4]");
    }
}
