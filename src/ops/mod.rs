//! Level 2. The operations.

pub mod activation;
pub mod affine;
pub mod batchnorm;
pub mod conv;
pub mod depthwise;
pub mod dropout;
pub mod im2col;
pub mod loss;
pub mod pool;
pub mod winograd;
