//! A CNN engine for CPUs: convolutions as BLAS matrix products, layers fused into blocks, training that repeats to the bit.
//!
//! ```
//! use gemmnet::prelude::*;
//!
//! // 64 images of 16x16 pixels: vertical stripes are class 0, horizontal ones class 1; none begins where the last one did.
//! let stripe = |image: usize, pixel: usize| {
//!     let along = if image % 2 == 0 { pixel % 16 } else { pixel / 16 };
//!     if (along + image / 2) / 3 % 2 == 0 { 1.0_f32 } else { -1.0 }
//! };
//! let x: Vec<f32> = (0..64).flat_map(|image| (0..256).map(move |pixel| stripe(image, pixel))).collect();
//! let y: Vec<usize> = (0..64).map(|image| image % 2).collect();
//!
//! let spec: NetworkSpec = "conv8-relu-pool-affine32-relu-affine2".parse()?;
//! let mut network = Network::<f32>::new(&spec, [1, 16, 16], Init::He, 0)?;
//! let groups = Group::classic("adam".parse()?, LearningRate::constant(2e-3)?, 1e-4);
//! let mut adam = Optimizer::new(groups, network.params())?;
//!
//! let first = network.loss(&x, &y, StepKey::default())?;
//! let mut last = first;
//! for step in 0..=40 {
//!     last = network.step(&x, &y, StepKey { seed: 0, step }, &mut adam, Progress::default())?.loss;
//! }
//! assert!(last < 0.1 * first, "the loss was {first}, and is {last}");
//! # Ok::<(), gemmnet::Error>(())
//! ```
//!
//! With data in files, batches, accuracy and checkpoints that is [`train::Solver`]; from a shell it is `gemmnet train`.
//!
//! # The map of the house
//! Data flows one way: bytes of a file → batches → network → blocks → operations → [`blas::gemm`] → scores → loss, and
//! back through the same caches → gradients → optimizer → parameters → history. A module uses modules of lower levels
//! only; `scripts/check-layering` sees to it.
//!
//! | level | modules | hold |
//! | --- | --- | --- |
//! | 0 | [`error`], [`element`] | errors as values; the scalar types, `f32` and `f64` |
//! | 1 | [`shape`], [`parallel`], `simd`, [`random`], [`profile`], [`gradcheck`] | the sizes of convolutions and pools, the only place where an output size is computed; the one thread policy; vector instructions; random streams; where the time goes; numeric gradients |
//! | 2 | [`blas`], [`workspace`] | the matrix product, the only room that calls OpenBLAS; memory that is asked for once |
//! | 3 | [`ops`], [`params`] | the operations: pure functions over array views; named parameters in one buffer |
//! | 4 | [`naive`], [`blocks`], [`optim`] | the operations again, as nested loops to read, with the same signatures; a product and all that follows it, in as few passes over memory as its parts allow; optimizers and schedules |
//! | 5 | [`nn`], [`data`] | networks, their notation, initialisers, and their training step; sources of images of any size, batches, augmentation |
//! | 6 | [`models`], [`train`] | CS231n's networks; the solver: epochs, history, checkpoints |
//! | 7 | `cli` | the `gemmnet` program |
//!
//! Images are `(N, C, H, W)`, filters `(F, C / groups, KH, KW)`, affine weights `(D, M)`; arrays are
//! [`ndarray`](https://docs.rs/ndarray)'s. Where a choice was open, it is that of CS231n's notebooks, and the
//! documentation of the function says what PyTorch does instead.
//!
//! # What it promises
//! - *Every operation has a twin.* The fast one agrees with the naive one, with numeric gradients and with numbers from
//!   PyTorch, and tests hold it to that.
//! - *The same seed gives the same bits*, on one machine and one build, at any number of threads: sums are cut
//!   into pieces by their shape alone and added in a fixed order, and every use of randomness has a stream of its own.
//!   Another processor or another BLAS library rounds differently. (`GEMMNET_MAX_ISA`, set to something that is no set of
//!   instructions, makes the first operation panic: the program checks it, a host that sets it should, with
//!   [`check_environment`].)
//! - *Scores of an image do not depend on the others* in its batch: what decides how a layer runs is its size, and in a session
//!   the largest batch that it takes. To the bit with OpenBLAS' AVX-512 kernels, but for rounding with its AVX2 ones ([`blas::BackendInfo::rows_alike`]).
//! - *A training step allocates nothing* after the first (with OpenBLAS), and nothing is cached that is cheaper to compute
//!   again.
//! - *A wrong input is a value*: [`Error`] says what came, what was expected, and what to do.
//!
//! # Threads
//! There is one level of parallelism: the rayon pool that the caller is in. [`parallel::Threads`] makes one, or for a single
//! thread none; a program with a pool of its own calls from inside it. BLAS runs on one thread within each piece of work. A program that is to run on
//! a processor newer than its OpenBLAS calls [`blas::choose_kernels`] first thing.
//!
//! # Features
//! | feature | default | what |
//! | --- | --- | --- |
//! | `openblas-system` | yes | the system's OpenBLAS (package `libopenblas-dev` on Debian and Ubuntu) |
//! | `openblas-static` | | OpenBLAS built from source; needs network access while building |
//! | `cli` | yes | the `gemmnet` program, download of CIFAR-10, folders of pictures and files other than CIFAR-10's |
//!
//! Without either OpenBLAS feature products are [`matrixmultiply`](https://docs.rs/matrixmultiply)'s, pure Rust and slower,
//! and there is no orthogonal initialisation. Do not choose both.

#![warn(clippy::too_many_lines)]

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
pub mod params;
pub mod profile;
pub mod random;
pub mod shape;
mod simd;
mod store;
pub mod train;
pub mod workspace;

pub use element::Element;
pub use error::{Error, Result};

/// Checks the environment variables that the library reads where it cannot return an error: `GEMMNET_MAX_ISA`, for which the
/// first operation would panic.
///
/// # Errors
/// [`Error::Invalid`] if it is set to something that is no set of instructions.
pub fn check_environment() -> Result<()> {
    simd::Isa::limit().map(|_| ())
}

/// What most programs use: `use gemmnet::prelude::*;`.
pub mod prelude {
    pub use crate::data::{Augment, Dataset, Fill, Flip, Normalization, Sampler, Split, Views};
    pub use crate::element::Element;
    pub use crate::error::{Error, Result};
    pub use crate::nn::init::Init;
    pub use crate::nn::network::{Network, StepKey};
    pub use crate::nn::notation::NetworkSpec;
    pub use crate::nn::session::Session;
    pub use crate::optim::{Group, LearningRate, Optimizer, Progress};
    pub use crate::train::{Solver, SolverOptions};
}

/// The code of the README, so that it is compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The code of the book, chapter by chapter.
#[cfg(doctest)]
mod book {
    #[doc = include_str!("../docs/book/src/introduction.md")]
    struct Introduction;
    #[doc = include_str!("../docs/book/src/convolution.md")]
    struct Convolution;
    #[doc = include_str!("../docs/book/src/convolution/loops.md")]
    struct Loops;
    #[doc = include_str!("../docs/book/src/convolution/im2col.md")]
    struct Im2col;
    #[doc = include_str!("../docs/book/src/convolution/tiles.md")]
    struct Tiles;
    #[doc = include_str!("../docs/book/src/convolution/pointwise.md")]
    struct Pointwise;
    #[doc = include_str!("../docs/book/src/convolution/winograd.md")]
    struct Winograd;
    #[doc = include_str!("../docs/book/src/convolution/backward.md")]
    struct Backward;
    #[doc = include_str!("../docs/book/src/convolution/pooling.md")]
    struct Pooling;
    #[doc = include_str!("../docs/book/src/network.md")]
    struct Network;
    #[doc = include_str!("../docs/book/src/notebook.md")]
    struct Notebook;
    #[doc = include_str!("../docs/book/src/pictures.md")]
    struct Pictures;
    #[doc = include_str!("../docs/book/src/commands.md")]
    struct Commands;
    #[doc = include_str!("../docs/book/src/adding.md")]
    struct Adding;
}
