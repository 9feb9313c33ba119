//! Level 4. Pooling by its definition.

use ndarray::{Array2, Array4, ArrayView2, ArrayView4, indices};

use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::ops::pool::Argmax;
use crate::shape::{Pool2d, Pool2dShape};

/// Max pooling of `x` `(N, C, H, W)`:
///
/// ```text
/// out[n, c, i, j] = max over ki, kj of x[n, c, i s0 + ki - top, j s1 + kj - left]
/// ```
///
/// Padding is never the maximum. Of equal maxima the first in row-major order counts; a NaN is larger than everything,
/// and the first one counts. Returns `(N, C, H', W')` and where the maxima were.
///
/// # Errors
/// Those of [`Pool2dShape::new`], and [`crate::Error::Invalid`] for windows of more than 255 cells.
pub fn max_pool2d_forward<T: Element>(x: ArrayView4<T>, pool: &Pool2d) -> Result<(Array4<T>, Argmax)> {
    let shape = Pool2dShape::new(x.dim().into(), pool)?;
    shape.check_max()?;
    let (top, left) = (shape.rows.before, shape.cols.before);

    let mut out = Array4::zeros(shape.out());
    let mut cells = Vec::with_capacity(out.len());
    for ((n, c, i, j), out) in out.indexed_iter_mut() {
        let mut best: Option<(T, usize)> = None;
        for (ki, kj) in indices(pool.window) {
            // Above and left of the image the difference wraps to a huge index, outside as well.
            let row = (i * pool.stride.0 + ki).wrapping_sub(top);
            let col = (j * pool.stride.1 + kj).wrapping_sub(left);
            if let Some(&value) = x.get([n, c, row, col])
                && best.is_none_or(|(max, _)| value > max || (value.is_nan() && !max.is_nan()))
            {
                best = Some((value, ki * pool.window.1 + kj));
            }
        }
        let (max, cell) = best.expect("padding is smaller than the window, so every window has a pixel");
        *out = max;
        cells.push(u8::try_from(cell).expect("windows have at most 255 cells"));
    }
    Ok((out, Argmax { shape, cell: cells }))
}

/// Gradient of [`max_pool2d_forward`] with respect to `x`: each `dout[n, c, i, j]` of `(N, C, H', W')` is added to the
/// pixel that was the maximum of its window. Returns `(N, C, H, W)`.
///
/// # Errors
/// [`crate::Error::Shape`] if `dout` or the cells do not have the shape of the output.
pub fn max_pool2d_backward<T: Element>(dout: ArrayView4<T>, argmax: &Argmax) -> Result<Array4<T>> {
    let shape = &argmax.shape;
    check_shape("max_pool2d", "dout", dout.shape(), &shape.out())?;
    check_shape("max_pool2d", "argmax", &[argmax.cell.len()], &[dout.len()])?;
    let mut dx = Array4::zeros(shape.x());
    for (((n, c, i, j), &d), &cell) in dout.indexed_iter().zip(&argmax.cell) {
        let (ki, kj) = (usize::from(cell) / shape.cols.window, usize::from(cell) % shape.cols.window);
        let row = i * shape.rows.stride + ki - shape.rows.before;
        let col = j * shape.cols.stride + kj - shape.cols.before;
        dx[[n, c, row, col]] += d;
    }
    Ok(dx)
}

/// Average pooling of `x` `(N, C, H, W)`. Padding counts as zeros, so every sum is divided by the whole window
/// (PyTorch's `count_include_pad=True`):
///
/// ```text
/// out[n, c, i, j] = 1 / (KH KW) * sum over ki, kj of x[n, c, i s0 + ki - top, j s1 + kj - left]
/// ```
///
/// Returns `(N, C, H', W')`.
///
/// # Errors
/// Those of [`Pool2dShape::new`].
pub fn avg_pool2d_forward<T: Element>(x: ArrayView4<T>, pool: &Pool2d) -> Result<Array4<T>> {
    let shape = Pool2dShape::new(x.dim().into(), pool)?;
    let (top, left) = (shape.rows.before, shape.cols.before);
    let cells = T::of((pool.window.0 * pool.window.1) as f64);

    let mut out = Array4::zeros(shape.out());
    for ((n, c, i, j), out) in out.indexed_iter_mut() {
        let mut sum = T::zero();
        for (ki, kj) in indices(pool.window) {
            let row = (i * pool.stride.0 + ki).wrapping_sub(top);
            let col = (j * pool.stride.1 + kj).wrapping_sub(left);
            if let Some(&pixel) = x.get([n, c, row, col]) {
                sum += pixel;
            }
        }
        *out = sum / cells;
    }
    Ok(out)
}

/// Gradient of [`avg_pool2d_forward`] for images of shape `x_shape` `[N, C, H, W]`: each `dout[n, c, i, j]` of
/// `(N, C, H', W')`, divided by the cells of a window, is added to every pixel of its window. Returns `(N, C, H, W)`.
///
/// # Errors
/// Those of [`Pool2dShape::new`], and [`crate::Error::Shape`] if `dout` does not have the shape of the output.
pub fn avg_pool2d_backward<T: Element>(dout: ArrayView4<T>, x_shape: [usize; 4], pool: &Pool2d) -> Result<Array4<T>> {
    let shape = Pool2dShape::new(x_shape, pool)?;
    check_shape("avg_pool2d", "dout", dout.shape(), &shape.out())?;
    let cells = T::of((pool.window.0 * pool.window.1) as f64);

    let mut dx = Array4::zeros(x_shape);
    for ((n, c, i, j), &d) in dout.indexed_iter() {
        for (ki, kj) in indices(pool.window) {
            let row = (i * pool.stride.0 + ki).wrapping_sub(shape.rows.before);
            let col = (j * pool.stride.1 + kj).wrapping_sub(shape.cols.before);
            if let Some(pixel) = dx.get_mut([n, c, row, col]) {
                *pixel += d / cells;
            }
        }
    }
    Ok(dx)
}

/// Average over all pixels of each channel: `x` `(N, C, H, W)` to `(N, C)`,
/// `out[n, c] = 1 / (H W) * sum over i, j of x[n, c, i, j]`. The average of no pixels is NaN.
pub fn global_avg_pool_forward<T: Element>(x: ArrayView4<T>) -> Array2<T> {
    let (images, channels, rows, cols) = x.dim();
    let mut out = Array2::zeros((images, channels));
    for ((n, c, _, _), &value) in x.indexed_iter() {
        out[[n, c]] += value;
    }
    out.mapv_into(|sum| sum / T::of((rows * cols) as f64))
}

/// Gradient of [`global_avg_pool_forward`] for images of shape `x_shape` `[N, C, H, W]`:
/// `dx[n, c, i, j] = dout[n, c] / (H W)`.
///
/// # Errors
/// [`crate::Error::Shape`] if `dout` is not `(N, C)`.
pub fn global_avg_pool_backward<T: Element>(dout: ArrayView2<T>, x_shape: [usize; 4]) -> Result<Array4<T>> {
    let [images, channels, rows, cols] = x_shape;
    check_shape("global_avg_pool", "dout", dout.shape(), &[images, channels])?;
    Ok(Array4::from_shape_fn(x_shape, |(n, c, _, _)| dout[[n, c]] / T::of((rows * cols) as f64)))
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;
    use crate::shape::Padding;

    #[test]
    fn the_first_maximum_gets_the_gradient_and_padding_never_does() {
        let padded = Pool2d { window: (2, 2), stride: (2, 2), padding: Padding::All(1) };
        let low = f64::NEG_INFINITY;
        // (x, pool, output, cells, dx for dout = 1, 10, 100, 1000)
        for (x, pool, out, cells, dx) in [
            // A constant window: the tie goes to its first cell.
            (array![[7.0, 7.0], [7.0, 7.0]], Pool2d::square(2), vec![7.0], vec![0], array![[1.0, 0.0], [0.0, 0.0]]),
            // A tie between the last two cells.
            (array![[1.0, 2.0], [3.0, 3.0]], Pool2d::square(2), vec![3.0], vec![2], array![[0.0, 0.0], [1.0, 0.0]]),
            // Negative pixels beside padding: zeros of the padding must not win. Each window sees one pixel.
            (
                array![[-1.0, -2.0], [-3.0, low]],
                padded,
                vec![-1.0, -2.0, -3.0, low],
                vec![3, 2, 1, 0],
                array![[1.0, 10.0], [100.0, 1000.0]],
            ),
        ] {
            let x = x.into_shape_with_order((1, 1, 2, 2)).unwrap();
            let (got, argmax) = max_pool2d_forward(x.view(), &pool).unwrap();
            assert_eq!(got.flatten().to_vec(), out, "{x}");
            assert_eq!(argmax.cell, cells, "{x}");
            let dout = Array4::from_shape_fn(got.dim(), |(_, _, i, j)| [[1.0, 10.0], [100.0, 1000.0]][i][j]);
            let got = max_pool2d_backward(dout.view(), &argmax).unwrap();
            assert_eq!(got, dx.into_shape_with_order((1, 1, 2, 2)).unwrap(), "{x}");
        }
    }

    #[test]
    fn a_nan_is_the_maximum_of_its_window_only() {
        let x = array![[[[1.0, f32::NAN, 5.0, 6.0], [f32::INFINITY, f32::NAN, 7.0, 8.0]]]];
        let (out, argmax) = max_pool2d_forward(x.view(), &Pool2d::square(2)).unwrap();
        assert!(out[[0, 0, 0, 0]].is_nan());
        assert_eq!(out[[0, 0, 0, 1]], 8.0);
        assert_eq!(argmax.cell, [1, 3]);
    }

    #[test]
    fn averages_count_padding_as_zeros() {
        let pool = Pool2d { window: (2, 2), stride: (2, 2), padding: Padding::All(1) };
        let x = array![[[[4.0, 8.0], [12.0, 16.0]]]];
        assert_eq!(avg_pool2d_forward(x.view(), &pool).unwrap(), array![[[[1.0, 2.0], [3.0, 4.0]]]]);
        let dx = avg_pool2d_backward(x.view(), [1, 1, 2, 2], &pool).unwrap();
        assert_eq!(dx, array![[[[1.0, 2.0], [3.0, 4.0]]]]);
        assert_eq!(global_avg_pool_forward(x.view()), array![[10.0]]);
        let dx = global_avg_pool_backward(array![[10.0]].view(), [1, 1, 2, 2]).unwrap();
        assert_eq!(dx, array![[[[2.5, 2.5], [2.5, 2.5]]]]);
    }

    #[test]
    fn wrong_shapes_are_errors_that_name_the_argument() {
        let x = Array4::<f32>::zeros((1, 2, 4, 4));
        let (out, mut argmax) = max_pool2d_forward(x.view(), &Pool2d::square(2)).unwrap();
        let error = max_pool2d_backward(x.view(), &argmax).unwrap_err().to_string();
        assert_eq!(error, "max_pool2d: dout has shape [1, 2, 4, 4], expected [1, 2, 2, 2]");
        argmax.cell.pop();
        let error = max_pool2d_backward(out.view(), &argmax).unwrap_err().to_string();
        assert_eq!(error, "max_pool2d: argmax has shape [7], expected [8]");
        assert!(avg_pool2d_backward(x.view(), [1, 2, 4, 4], &Pool2d::square(2)).is_err());
        assert!(global_avg_pool_backward(Array2::<f32>::zeros((2, 2)).view(), [1, 2, 4, 4]).is_err());
        assert!(max_pool2d_forward(Array4::<f32>::zeros((1, 1, 16, 16)).view(), &Pool2d::square(16)).is_err());
    }
}
