//! Level 4. Networks: parameters, initialisers, notation, and the list of fused blocks that runs them.

pub(crate) mod file;
pub mod init;
pub mod network;
pub mod notation;
pub mod session;
