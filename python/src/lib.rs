//! gemmnet as a Python package: what `gemmnet/_native.pyi` declares, for the modules in `gemmnet` to use and to pass on.
//!
//! No arithmetic is done here. Arrays are read where NumPy has them, everything that takes time runs without the GIL and on
//! the threads of `threads`, errors and panics become exceptions. What is easier said in Python is said there: which arrays
//! are taken, progress bars, the functions of CS231n's notebooks.

mod arrays;
mod errors;
mod layers;
mod model;
mod session;
mod threads;
mod train;

use pyo3::prelude::*;

use errors::raised;

/// Sees to what the library reads once: environment, processor, OpenBLAS. Returns what the user should know.
///
/// first says that nobody used the OpenBLAS that the library is linked to before this module was loaded, and that nobody will
/// before this returns. Where it is older than the processor, it is then made to choose better kernels.
#[pyfunction]
fn set_up(first: bool) -> PyResult<Option<String>> {
    gemmnet::check_environment().map_err(raised)?;
    if first {
        // SAFETY: nobody uses OpenBLAS, as the caller promises. The environment changes while the GIL is held, as it does
        // when Python assigns to os.environ: neither can keep threads that are not Python's from reading it.
        unsafe { gemmnet::blas::choose_kernels() };
    }
    Ok(gemmnet::blas::setup().note.clone())
}

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::layers::{
        Maxima, conv_backward, conv_forward, max_pool_backward, max_pool_forward, relu_backward, relu_forward,
    };
    #[pymodule_export]
    use super::model::Model;
    #[pymodule_export]
    use super::session::Session;
    #[pymodule_export]
    use super::set_up;
    #[pymodule_export]
    use super::threads::{after_fork_in_child, after_fork_in_parent, before_fork};
    #[pymodule_export]
    use super::train::train;
}
