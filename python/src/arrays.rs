//! NumPy's arrays as slices in row-major order. What is no such array becomes one in `gemmnet/_arrays.py`.

use std::fmt::Arguments;

use gemmnet::Error;
use numpy::{Element, PyArray, PyArrayDyn, PyArrayMethods, PyReadonlyArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::errors::raised;

/// An operation and one of its arguments, as errors call them.
pub(crate) type Name = (&'static str, &'static str);

/// The error of an argument that has another shape than the one expected.
pub(crate) fn misshapen((op, what): Name, got: &[usize], expected: Arguments<'_>) -> PyErr {
    raised(Error::Shape { op, what, expected: expected.to_string(), got: got.to_vec() })
}

/// The error of an argument that another call writes to.
fn in_use((_, what): Name) -> PyErr {
    raised(Error::invalid(
        what,
        "a call of another thread writes to the array",
        "give every thread an `out` of its own",
    ))
}

/// The array to read from, if it is row-major, aligned, of type `T`, and has so many axes.
///
/// # Errors
/// If a call is writing to it.
pub(crate) fn as_it_is<'py, T: Element, D: ndarray::Dimension>(
    array: &Bound<'py, PyAny>,
    name: Name,
) -> PyResult<Option<PyReadonlyArray<'py, T, D>>> {
    let Ok(array) = array.cast::<PyArray<T, D>>() else { return Ok(None) };
    if !array.is_c_contiguous() || !array.is_aligned() {
        return Ok(None);
    }
    array.try_readonly().map(Some).map_err(|_| in_use(name))
}

/// An array that `gemmnet/_arrays.py` has prepared: row-major, aligned and of type `T`.
///
/// # Errors
/// If it has another number of axes than `expected`, or as [`as_it_is`].
pub(crate) fn prepared<'py, T: Element, D: ndarray::Dimension>(
    array: &Bound<'py, PyAny>,
    name: Name,
    expected: Arguments<'_>,
) -> PyResult<PyReadonlyArray<'py, T, D>> {
    match as_it_is(array, name)? {
        Some(array) => Ok(array),
        None => Err(misshapen(name, array.cast::<PyArrayDyn<T>>()?.shape(), expected)),
    }
}

/// `array` as floats, whatever it was: an array of `f32` as [`prepared`] takes it.
///
/// # Errors
/// If it holds something else than floats.
pub(crate) fn floats<'py>(array: &Bound<'py, PyAny>, (_, what): Name) -> PyResult<Bound<'py, PyAny>> {
    static FLOATS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    FLOATS.import(array.py(), "gemmnet._arrays", "floats")?.call1((array, what))
}

/// `array` as images: an array of `u8` or `f32` as [`prepared`] takes it.
///
/// # Errors
/// If it holds neither bytes nor floats.
pub(crate) fn images<'py>(array: &Bound<'py, PyAny>, (_, what): Name) -> PyResult<Bound<'py, PyAny>> {
    static IMAGES: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    IMAGES.import(array.py(), "gemmnet._arrays", "images")?.call1((array, what))
}
