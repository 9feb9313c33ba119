//! Level 4. Naive twins of the operations: nested loops that can be read straight from the formulas.
//!
//! They are the reference against which the fast operations of [`crate::ops`] are tested and timed, and they have the
//! same signatures. They take checked sizes from [`crate::shape`] and compute every pixel's index themselves, so that a
//! mistake in the fast path cannot hide here too. Sums are taken in `T`, in the order of the loops.

mod affine;
mod batchnorm;
mod conv;
mod loss;
mod pool;

pub use affine::{affine_backward, affine_forward};
pub use batchnorm::{batchnorm_backward, batchnorm_forward, spatial_batchnorm_backward, spatial_batchnorm_forward};
pub use conv::{conv2d_backward, conv2d_forward};
pub use loss::{softmax_cross_entropy, svm_hinge};
pub use pool::{
    avg_pool2d_backward, avg_pool2d_forward, global_avg_pool_backward, global_avg_pool_forward, max_pool2d_backward,
    max_pool2d_forward,
};
