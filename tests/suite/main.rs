//! The integration tests, in one program: the engine is generic, and each program compiles all of it that it uses. Those that
//! count allocations are apart, since nothing may run beside them.

#[cfg(feature = "cli")]
mod bad_input;
mod blocks;
#[cfg(feature = "cli")]
mod book;
mod checkpoints;
#[cfg(feature = "cli")]
mod cli;
mod common;
mod data;
mod determinism;
#[cfg(feature = "cli")]
mod files;
mod golden;
mod golden_graph;
mod golden_recipe;
mod golden_training;
mod interface;
mod interop;
mod naive_gradients;
mod naive_vs_fast;
mod network;
#[cfg(feature = "cli")]
mod pictures;
#[cfg(feature = "blas")]
mod recipe;
#[cfg(feature = "cli")]
mod runs;
mod session;
mod sources;
mod training;
