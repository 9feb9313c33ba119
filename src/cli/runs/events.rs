//! Level 7. What a run's history.jsonl holds: an object a line.

use serde::{Deserialize, Serialize};

/// A line of history.jsonl.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(in crate::cli) enum Entry {
    /// Training begins, or goes on after an iteration.
    Start(Box<Start>),
    /// An iteration is done.
    Step(Step),
    /// Accuracy has been measured.
    Epoch(Epoch),
    /// Training is over.
    End(Box<End>),
}

impl Entry {
    /// Iterations that are done.
    pub(in crate::cli) fn step(&self) -> usize {
        match self {
            Entry::Start(start) => start.step,
            Entry::Step(step) => step.step,
            Entry::Epoch(epoch) => epoch.step,
            Entry::End(end) => end.step,
        }
    }
}

/// An iteration.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::cli) struct Step {
    /// From 1.
    pub(in crate::cli) step: usize,
    /// Regularisation included.
    pub(in crate::cli) loss: f64,
    /// Of the first group that is trained.
    pub(in crate::cli) learning_rate: f64,
    /// Of training since the run began, without the time for measuring and saving.
    pub(in crate::cli) seconds: f64,
}

/// A measurement.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::cli) struct Epoch {
    /// Iterations that are done.
    pub(in crate::cli) step: usize,
    /// Epochs that are done, the last perhaps a part of one; 0 is after the first iteration.
    pub(in crate::cli) epoch: f64,
    /// Share of training images that are classified correctly.
    pub(in crate::cli) train_accuracy: f64,
    /// Share of validation images that are classified correctly.
    pub(in crate::cli) val_accuracy: f64,
    /// Whether the network is kept, in the place of the one before.
    pub(in crate::cli) kept: bool,
    /// Of training since the run began.
    pub(in crate::cli) seconds: f64,
}

/// What is trained, on what, and by what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::cli) struct Start {
    /// Iterations that are done.
    pub(in crate::cli) step: usize,
    /// Of gemmnet.
    pub(in crate::cli) version: String,
    pub(in crate::cli) threads: usize,
    pub(in crate::cli) processor: String,
    /// Instructions of the kernels.
    pub(in crate::cli) vectors: String,
    pub(in crate::cli) blas: String,
    pub(in crate::cli) dtype: String,
    pub(in crate::cli) network: String,
    pub(in crate::cli) parameters: usize,
    /// The preset that the recipe began with, where it began with one.
    pub(in crate::cli) preset: Option<String>,
    pub(in crate::cli) seed: u64,
    /// What the data is, such as `cifar10`.
    pub(in crate::cli) data: String,
    pub(in crate::cli) data_dir: String,
    /// `[C, H, W]`
    pub(in crate::cli) image: [usize; 3],
    pub(in crate::cli) images: Images,
    /// Names of the classes, by label.
    pub(in crate::cli) classes: Vec<String>,
    /// Iterations in all.
    pub(in crate::cli) steps: usize,
    pub(in crate::cli) steps_per_epoch: usize,
}

/// Images of each split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::cli) struct Images {
    pub(in crate::cli) train: usize,
    pub(in crate::cli) validation: usize,
    pub(in crate::cli) test: usize,
}

/// How training ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::cli) struct End {
    /// Iterations that are done.
    pub(in crate::cli) step: usize,
    pub(in crate::cli) kept_epoch: f64,
    pub(in crate::cli) kept_val_accuracy: f64,
    /// On all images for tests, if there are any.
    pub(in crate::cli) test_accuracy: Option<f64>,
    /// Of training since the run began.
    pub(in crate::cli) seconds: f64,
    /// Since training last went on.
    pub(in crate::cli) images_per_second: f64,
    /// Where the time went since then.
    pub(in crate::cli) profile: Vec<Operation>,
}

/// An operation in one phase, over all its calls; [`crate::profile`] says how operations and bytes are counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::cli) struct Operation {
    pub(in crate::cli) operation: String,
    pub(in crate::cli) phase: String,
    pub(in crate::cli) seconds: f64,
    pub(in crate::cli) calls: u64,
    pub(in crate::cli) flops: u64,
    pub(in crate::cli) bytes: u64,
}

impl From<&crate::profile::Row> for Operation {
    fn from(row: &crate::profile::Row) -> Self {
        Operation {
            operation: row.op.clone(),
            phase: row.phase.name().to_owned(),
            seconds: row.time.as_secs_f64(),
            calls: row.calls,
            flops: row.flops,
            bytes: row.bytes,
        }
    }
}
