//! Level 2. Naive twins.
use ndarray::{Array1, Array4};
/// Gradients of a convolution.
#[derive(Debug)]
pub struct Conv2dGrads<T> {
    /// x
    pub dx: Array4<T>,
    /// w
    pub dw: Array4<T>,
    /// b
    pub db: Array1<T>,
}
/// Where maxima were.
#[derive(Debug)]
pub struct Argmax {
    /// shape
    pub shape: crate::shape::Pool2dShape,
    /// cell
    pub cell: Vec<u8>,
}
