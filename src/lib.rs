//! gemmnet
pub mod blas;
pub mod blocks;
#[cfg(feature = "cli")]
pub mod cli;
pub mod data;
pub mod element;
pub mod error;
pub mod gradcheck;
pub mod models;
pub mod naive;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod parallel;
pub mod random;
pub mod shape;
mod simd;
pub mod train;
pub mod workspace;
pub use element::Element;
pub use error::{Error, Result};
