//! Level 6. What checkpoints of format 1 say in other words: one rule, rate and decay for all parameters.

use serde::Deserialize;

use super::options::{Keep, SolverOptions};
use crate::data::{Augment, Sampler};
use crate::optim::{Group, LearningRate, UpdateRule};

/// How a network was trained, as format 1 has it.
#[derive(Deserialize)]
pub(super) struct Options {
    epochs: usize,
    batch_size: usize,
    rule: UpdateRule,
    learning_rate: LearningRate,
    l2: f64,
    sampler: Sampler,
    augment: Option<Augment>,
    seed: u64,
    train_accuracy_samples: usize,
    verbose: bool,
    print_every: usize,
}

impl From<Options> for SolverOptions {
    fn from(old: Options) -> Self {
        SolverOptions {
            epochs: old.epochs as f64,
            batch_size: old.batch_size,
            groups: Group::classic(old.rule, old.learning_rate, old.l2),
            clip_norm: None,
            ema: None,
            keep: Keep::Best,
            sampler: old.sampler,
            augment: old.augment,
            seed: old.seed,
            train_accuracy_samples: old.train_accuracy_samples,
            verbose: old.verbose,
            print_every: old.print_every,
        }
    }
}
