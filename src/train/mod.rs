//! Level 6. Training: epochs, accuracy, history, checkpoints.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use gemmnet::data::{Dataset, Normalization};
//! use gemmnet::nn::init::Init;
//! use gemmnet::nn::network::Network;
//! use gemmnet::nn::notation::NetworkSpec;
//! use gemmnet::optim::{Group, LearningRate};
//! use gemmnet::train::{Solver, SolverOptions};
//!
//! let data = Dataset::open("data".as_ref(), Normalization::MeanImage)?;
//! let spec = NetworkSpec::parse("conv32k7-relu-pool-affine500-relu-affine10")?;
//! let network = Network::<f32>::new(&spec, [3, 32, 32], Init::Gaussian { std: 1e-3 }, 0)?;
//! let groups = Group::classic("adam".parse()?, LearningRate::constant(1e-3)?, 1e-3);
//! let options = SolverOptions { epochs: 1.0, batch_size: 50, groups, ..SolverOptions::default() };
//! let mut solver = Solver::new(network, data, options)?;
//! let report = solver.train(|_| ControlFlow::Continue(()))?;
//! println!("{:.1} % of the validation images", 100.0 * report.kept_val_accuracy);
//! solver.checkpoint().save("model.safetensors".as_ref())?;
//! # Ok::<(), gemmnet::Error>(())
//! ```

mod checkpoint;
mod evaluate;
mod format_1;
mod history;
mod model;
mod options;
mod solver;

pub use checkpoint::{Checkpoint, Trained};
pub use evaluate::{accuracy, argmax, predict, scores};
pub use history::{Event, History, Log, Report};
pub use model::Model;
pub use options::{Keep, SolverOptions};
pub use solver::Solver;
