//! Level 5. Networks: their notation, the graph of their layers, and the fused steps that run it.
//!
//! ```text
//! text -> notation -> graph (nodes, values) -> fusion (steps) -> steps (sizes, named parameters) -> run (forward, backward)
//! ```
//!
//! [`network`] trains and predicts, [`session`] serves; [`layer`] says what a layer of one's own has to do.

pub(crate) mod file;
mod formats;
mod fusion;
mod graph;
pub mod import;
pub mod init;
pub mod layer;
pub mod layers;
mod memory;
pub mod network;
pub mod notation;
pub mod onnx;
mod run;
pub mod session;
mod steps;
pub mod whitening;
