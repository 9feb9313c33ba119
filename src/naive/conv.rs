//! Level 4. Convolution by its definition.
//!
//! The innermost loops index single images and filters: ndarray checks three indices in a line, but any more in a loop.

use ndarray::{Array1, Array4, ArrayView1, ArrayView4, Axis};

use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::ops::conv::Conv2dGrads;
use crate::shape::{Conv2d, Conv2dShape};

/// Convolution (cross-correlation: filters are not flipped) of images `x` `(N, C, H, W)` with filters `w`
/// `(F, C / groups, KH, KW)` and bias `b` `(F)`:
///
/// ```text
/// out[n, f, i, j] = b[f] + sum over c, ki, kj of x[n, g C/groups + c, i s0 + ki d0 - top, j s1 + kj d1 - left] w[f, c, ki, kj]
/// ```
///
/// where `s` is the stride, `d` the dilation, and `g` the group of filter `f`. Pixels in the padding are 0.
/// Returns `(N, F, H', W')`, with `H'` and `W'` as in [`crate::shape`].
///
/// # Errors
/// Those of [`Conv2dShape::new`], and [`crate::Error::Shape`] if `b` does not have `F` values.
pub fn conv2d_forward<T: Element>(
    x: ArrayView4<T>,
    w: ArrayView4<T>,
    b: Option<ArrayView1<T>>,
    conv: &Conv2d,
) -> Result<Array4<T>> {
    let shape = Conv2dShape::new(x.dim().into(), w.dim().into(), conv)?;
    if let Some(b) = b {
        check_shape("conv2d", "b", b.shape(), &[shape.filters])?;
    }
    let group_filters = shape.filters / conv.groups;
    let [_, group_channels, _, _] = shape.w();
    let (top, left) = (shape.rows.before, shape.cols.before);

    let mut out = Array4::zeros(shape.out());
    for (image, mut out) in x.outer_iter().zip(out.outer_iter_mut()) {
        for ((f, i, j), out) in out.indexed_iter_mut() {
            let first_channel = f / group_filters * group_channels;
            let mut sum = b.map_or(T::zero(), |b| b[f]);
            for ((c, ki, kj), &w) in w.index_axis(Axis(0), f).indexed_iter() {
                // Above and left of the image the difference wraps to a huge index, outside as well.
                let row = (i * conv.stride.0 + ki * conv.dilation.0).wrapping_sub(top);
                let col = (j * conv.stride.1 + kj * conv.dilation.1).wrapping_sub(left);
                if let Some(&pixel) = image.get([first_channel + c, row, col]) {
                    sum += pixel * w;
                }
            }
            *out = sum;
        }
    }
    Ok(out)
}

/// Gradients of [`conv2d_forward`] for the gradient `dout` `(N, F, H', W')` of its output. Every product
/// `x[..] w[..]` that the forward pass added to `out[n, f, i, j]` gives, with `row`, `col` and `g` as there:
///
/// ```text
/// dx[n, g C/groups + c, row, col] += dout[n, f, i, j] w[f, c, ki, kj]
/// dw[f, c, ki, kj]                += dout[n, f, i, j] x[n, g C/groups + c, row, col]
/// db[f]                           += dout[n, f, i, j]
/// ```
///
/// # Errors
/// Those of [`Conv2dShape::new`], and [`crate::Error::Shape`] if `dout` does not have the shape of the output.
pub fn conv2d_backward<T: Element>(
    dout: ArrayView4<T>,
    x: ArrayView4<T>,
    w: ArrayView4<T>,
    conv: &Conv2d,
) -> Result<Conv2dGrads<T>> {
    let shape = Conv2dShape::new(x.dim().into(), w.dim().into(), conv)?;
    check_shape("conv2d", "dout", dout.shape(), &shape.out())?;
    let group_filters = shape.filters / conv.groups;
    let [_, group_channels, _, _] = shape.w();
    let (top, left) = (shape.rows.before, shape.cols.before);

    let mut dx = Array4::zeros(shape.x());
    let mut dw = Array4::zeros(shape.w());
    let mut db = Array1::zeros(shape.filters);
    for ((image, dout), mut dimage) in x.outer_iter().zip(dout.outer_iter()).zip(dx.outer_iter_mut()) {
        for ((f, i, j), &d) in dout.indexed_iter() {
            let first_channel = f / group_filters * group_channels;
            let mut dfilter = dw.index_axis_mut(Axis(0), f);
            db[f] += d;
            for ((c, ki, kj), &w) in w.index_axis(Axis(0), f).indexed_iter() {
                let row = (i * conv.stride.0 + ki * conv.dilation.0).wrapping_sub(top);
                let col = (j * conv.stride.1 + kj * conv.dilation.1).wrapping_sub(left);
                if let Some(&pixel) = image.get([first_channel + c, row, col]) {
                    dimage[[first_channel + c, row, col]] += d * w;
                    dfilter[[c, ki, kj]] += d * pixel;
                }
            }
        }
    }
    Ok(Conv2dGrads { dx, dw, db })
}

#[cfg(test)]
mod tests {
    use ndarray::{Array, array};

    use super::*;
    use crate::shape::Padding;

    #[test]
    fn a_hand_computed_convolution() {
        // One 3x3 image 0..9 and the filter [[1, 2], [3, 4]]; by hand.
        let x = Array::from_iter((0..9).map(f64::from)).into_shape_with_order((1, 1, 3, 3)).unwrap();
        let w = array![[[[1.0, 2.0], [3.0, 4.0]]]];
        let b = array![100.0];
        let out = conv2d_forward(x.view(), w.view(), Some(b.view()), &Conv2d::default()).unwrap();
        assert_eq!(out, array![[[[127.0, 137.0], [157.0, 167.0]]]]);

        // Padding only above and to the left: the windows of the first row and column reach into it.
        let sides = Padding::Sides { top: 1, bottom: 0, left: 1, right: 0 };
        let conv = Conv2d { padding: sides, stride: (2, 2), ..Conv2d::default() };
        let out = conv2d_forward(x.view(), w.view(), None, &conv).unwrap();
        assert_eq!(out, array![[[[0.0, 11.0], [30.0, 67.0]]]]);
    }

    #[test]
    fn wrong_shapes_are_errors_that_name_the_argument() {
        let (x, w) = (Array4::<f32>::zeros((1, 2, 4, 4)), Array4::<f32>::zeros((3, 2, 3, 3)));
        let b = Array1::zeros(2);
        let error = conv2d_forward(x.view(), w.view(), Some(b.view()), &Conv2d::default()).unwrap_err();
        assert_eq!(error.to_string(), "conv2d: b has shape [2], expected [3]");
        let dout = Array4::zeros((1, 3, 3, 2));
        let error = conv2d_backward(dout.view(), x.view(), w.view(), &Conv2d::default()).unwrap_err();
        assert_eq!(error.to_string(), "conv2d: dout has shape [1, 3, 3, 2], expected [1, 3, 2, 2]");
    }
}
