//! Operations on arrays, for `gemmnet.cs231n`: of f32 or of f64, which `gemmnet/_arrays.py` has made all arguments of a call.

use gemmnet::ops::activation::{relu_backward as relu_gradient, relu_forward as relu_values};
use gemmnet::ops::conv::{Conv2dGrads, conv2d_backward, conv2d_forward};
use gemmnet::ops::pool::{Argmax, max_pool2d_backward, max_pool2d_forward};
use gemmnet::shape::{Conv2d, Padding, Pool2d};
use ndarray::Dimension;
use numpy::{IntoPyArray, Ix1, Ix4, PyArrayDyn, PyReadonlyArray, PyReadonlyArray4};
use pyo3::prelude::*;

use crate::arrays::prepared;
use crate::threads::{count, run};

/// What elements may be, here and there.
trait Element: gemmnet::Element + numpy::Element {}
impl Element for f32 {}
impl Element for f64 {}

/// `$function::<T>($arguments)` for the `T` of the array `$array`.
macro_rules! of_its_type {
    ($array:expr, $function:ident($($argument:expr),*)) => {
        match $array.cast::<PyArrayDyn<f32>>() {
            Ok(_) => $function::<f32>($($argument),*),
            Err(_) => $function::<f64>($($argument),*),
        }
    };
}

type Array<'py> = Bound<'py, PyAny>;

fn images<'py, T: Element>(
    array: &Array<'py>,
    name: (&'static str, &'static str),
) -> PyResult<PyReadonlyArray4<'py, T>> {
    prepared::<T, Ix4>(array, name, format_args!("(N, C, H, W)"))
}

fn filters<'py, T: Element>(array: &Array<'py>) -> PyResult<PyReadonlyArray4<'py, T>> {
    prepared::<T, Ix4>(array, ("conv2d", "w"), format_args!("(F, C, KH, KW)"))
}

/// A new array of NumPy's.
fn given<'py, T: Element, D: Dimension>(py: Python<'py>, array: ndarray::Array<T, D>) -> Array<'py> {
    array.into_pyarray(py).into_any()
}

fn conv(stride: usize, pad: usize) -> Conv2d {
    Conv2d { stride: (stride, stride), padding: Padding::All(pad), ..Conv2d::default() }
}

/// Convolution of x (N, C, H, W) with w (F, C, KH, KW), plus b (F): (N, F, H', W').
#[pyfunction]
pub(crate) fn conv_forward<'py>(
    py: Python<'py>,
    x: &Array<'py>,
    w: &Array<'py>,
    b: &Array<'py>,
    stride: usize,
    pad: usize,
) -> PyResult<Array<'py>> {
    of_its_type!(x, conv_forward_of(py, [x, w, b], &conv(stride, pad)))
}

fn conv_forward_of<'py, T: Element>(
    py: Python<'py>,
    [x, w, b]: [&Array<'py>; 3],
    conv: &Conv2d,
) -> PyResult<Array<'py>> {
    let (x, w) = (images::<T>(x, ("conv2d", "x"))?, filters::<T>(w)?);
    let b: PyReadonlyArray<'_, T, Ix1> = prepared(b, ("conv2d", "b"), format_args!("(F,)"))?;
    let (x, w, b) = (x.as_array(), w.as_array(), b.as_array());
    Ok(given(py, run(py, count(py, None)?, || conv2d_forward(x, w, Some(b), conv))?))
}

/// Gradients of conv_forward by x, w and b, for dout (N, F, H', W').
#[pyfunction]
pub(crate) fn conv_backward<'py>(
    py: Python<'py>,
    dout: &Array<'py>,
    x: &Array<'py>,
    w: &Array<'py>,
    stride: usize,
    pad: usize,
) -> PyResult<(Array<'py>, Array<'py>, Array<'py>)> {
    of_its_type!(x, conv_backward_of(py, [dout, x, w], &conv(stride, pad)))
}

fn conv_backward_of<'py, T: Element>(
    py: Python<'py>,
    [dout, x, w]: [&Array<'py>; 3],
    conv: &Conv2d,
) -> PyResult<(Array<'py>, Array<'py>, Array<'py>)> {
    let dout = prepared::<T, Ix4>(dout, ("conv2d backward", "dout"), format_args!("(N, F, H', W')"))?;
    let (x, w) = (images::<T>(x, ("conv2d", "x"))?, filters::<T>(w)?);
    let (dout, x, w) = (dout.as_array(), x.as_array(), w.as_array());
    let Conv2dGrads { dx, dw, db } = run(py, count(py, None)?, || conv2d_backward(dout, x, w, conv))?;
    Ok((given(py, dx), given(py, dw), given(py, db)))
}

/// Where max_pool_forward found its maxima.
#[pyclass(frozen, module = "gemmnet")]
pub(crate) struct Maxima(Argmax);

/// Maximum of each window of x (N, C, H, W): (N, C, H', W'), and where it was.
#[pyfunction]
pub(crate) fn max_pool_forward<'py>(
    py: Python<'py>,
    x: &Array<'py>,
    height: usize,
    width: usize,
    stride: usize,
) -> PyResult<(Array<'py>, Maxima)> {
    let pool = Pool2d { window: (height, width), stride: (stride, stride), padding: Padding::Valid };
    of_its_type!(x, max_pool_forward_of(py, x, &pool))
}

fn max_pool_forward_of<'py, T: Element>(
    py: Python<'py>,
    x: &Array<'py>,
    pool: &Pool2d,
) -> PyResult<(Array<'py>, Maxima)> {
    let x = images::<T>(x, ("max_pool2d", "x"))?;
    let x = x.as_array();
    let (out, argmax) = run(py, count(py, None)?, || max_pool2d_forward(x, pool))?;
    Ok((given(py, out), Maxima(argmax)))
}

/// Gradient of max_pool_forward by x, for dout (N, C, H', W').
#[pyfunction]
pub(crate) fn max_pool_backward<'py>(
    py: Python<'py>,
    dout: &Array<'py>,
    maxima: &Bound<'py, Maxima>,
) -> PyResult<Array<'py>> {
    of_its_type!(dout, max_pool_backward_of(py, dout, &maxima.get().0))
}

fn max_pool_backward_of<'py, T: Element>(py: Python<'py>, dout: &Array<'py>, argmax: &Argmax) -> PyResult<Array<'py>> {
    let dout = prepared::<T, Ix4>(dout, ("max_pool2d backward", "dout"), format_args!("(N, C, H', W')"))?;
    let dout = dout.as_array();
    Ok(given(py, run(py, count(py, None)?, || max_pool2d_backward(dout, argmax))?))
}

/// max(x, 0) of every value of x (N, C, H, W).
#[pyfunction]
pub(crate) fn relu_forward<'py>(py: Python<'py>, x: &Array<'py>) -> PyResult<Array<'py>> {
    of_its_type!(x, relu_forward_of(py, x))
}

fn relu_forward_of<'py, T: Element>(py: Python<'py>, x: &Array<'py>) -> PyResult<Array<'py>> {
    let x = images::<T>(x, ("relu", "x"))?;
    let x = x.as_array();
    Ok(given(py, run(py, count(py, None)?, || Ok(relu_values(&x)))?))
}

/// dout where x > 0, else 0; both (N, C, H, W).
#[pyfunction]
pub(crate) fn relu_backward<'py>(py: Python<'py>, dout: &Array<'py>, x: &Array<'py>) -> PyResult<Array<'py>> {
    of_its_type!(x, relu_backward_of(py, dout, x))
}

fn relu_backward_of<'py, T: Element>(py: Python<'py>, dout: &Array<'py>, x: &Array<'py>) -> PyResult<Array<'py>> {
    let (dout, x) = (images::<T>(dout, ("relu", "dout"))?, images::<T>(x, ("relu", "x"))?);
    let (dout, x) = (dout.as_array(), x.as_array());
    Ok(given(py, run(py, count(py, None)?, || relu_gradient(&dout, &x))?))
}
