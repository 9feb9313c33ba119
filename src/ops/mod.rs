//! Level 3. The operations, as they are to be used. Each has a twin in [`crate::naive`] that can be read.
//!
//! # The contract
//! `name_forward_into(shape, inputs, parameters, &mut out, ..)` and `name_backward_into(shape, dout, .., &mut gradients)`
//! work on slices that the caller owns; gradients are set, not added to; scratch comes from the caller's
//! [`Workspace`](crate::workspace::Workspace). `name_forward` and `name_backward` are thin forms over arrays that make
//! their own outputs.
//!
//! # Which path runs
//! | operation | path | when |
//! | --- | --- | --- |
//! | convolution | [`conv::winograd`]: products with a fifth to half of the multiplications | `f32`, 3x3, stride 1, 16 channels and filters or more: [`conv::ConvPlan`] says it in full |
//! | | [`conv::depthwise`]: plane by plane, no product | every channel a group of its own |
//! | | [`conv::im2col`] tiles and one product each, of our own kernel or of BLAS; of 1x1 filters the image itself is the columns | everything else; always with `Algorithm::Im2col` |
//! | max pooling | whole rows against whole rows | windows that tile the input |
//! | | a row of windows at once, cell by cell | everything else |
//! | batchnorm | channel by channel, planes kept in the cache | `(N, C, H, W)` |
//! | | 64 columns at a time | `(N, D)` |
//! | affine | pieces of the product along rows and columns | more than 2^18 multiply-adds; else one product |
//! | | the matrix in panels, read once | prepared weights in `f32`, as sessions have them |
//!
//! # Adding an operation
//! A naive twin with its formula in `naive`; the fast one here, with the same signature; both into the tables of
//! `tests/suite/naive_vs_fast.rs` and, with numbers from PyTorch, `golden.rs`; a numeric gradient in `blocks.rs`.

pub mod activation;
pub mod affine;
pub mod batchnorm;
pub mod conv;
pub mod dropout;
pub(crate) mod layout;
pub mod loss;
pub mod pool;

/// Which statistics normalise, and whether values are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Statistics of the batch, which the running ones follow; dropout.
    Train,
    /// The running statistics, which stay as they are; no dropout.
    Test,
}
