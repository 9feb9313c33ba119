//! Level 6. How a network is trained.

use serde::{Deserialize, Serialize};

use crate::data::{Augment, Sampler};
use crate::error::{Error, Result};
use crate::optim::{Group, LearningRate, UpdateRule};

/// Which network is kept of those whose accuracy was measured: after the first iteration, and after every epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Keep {
    /// The one with the best validation accuracy, the first of them if several are equal.
    #[default]
    Best,
    /// The last one: right where rates fall to 0, since then the last epoch improves what all before it left rough, while
    /// the best of a few validation images is partly luck.
    Last,
}

/// How a [`Solver`](super::Solver) trains. The defaults are those of CS231n's solver, except for Adam at 1e-3 in place
/// of SGD at 1e-2, and shuffled epochs in place of batches drawn with replacement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SolverOptions {
    /// Passes over the training split, above 0; the last one may be a part of one.
    pub epochs: f64,
    /// Images in a batch, 1 or more; at most the whole training split is used.
    pub batch_size: usize,
    /// The parameters in groups: how a gradient changes them, how fast, and what shrinks them. [`Group::classic`] is one
    /// rule and rate for all.
    pub groups: Vec<Group>,
    /// Above this norm gradients are scaled down: see [`Optimizer::set_clip_norm`](crate::optim::Optimizer::set_clip_norm).
    pub clip_norm: Option<f64>,
    /// The decay of a moving average of parameters and running statistics, 0 to below 1. With one, accuracy is that of the
    /// average, and the network that is kept is an average; training itself goes on without it.
    pub ema: Option<f64>,
    /// Which network is kept; the same for all of a training.
    #[serde(default)]
    pub keep: Keep,
    /// How the images of an epoch are drawn.
    pub sampler: Sampler,
    /// Random changes to the training images.
    pub augment: Option<Augment>,
    /// Seed of the order of images, augmentation, dropout and the images that training accuracy is measured on.
    pub seed: u64,
    /// Training accuracy is measured on so many images, drawn with replacement anew in each epoch, or on the whole
    /// training split if it is no larger; 1 or more.
    pub train_accuracy_samples: usize,
    /// Whether `train` logs what CS231n's solver prints: as events of level INFO of the crate `tracing`, which a program shows
    /// that has a subscriber. [`Log`](super::Log) writes the same lines to any stream.
    pub verbose: bool,
    /// Every how many iterations to log the loss, 1 or more.
    pub print_every: usize,
}

impl Default for SolverOptions {
    fn default() -> Self {
        SolverOptions {
            epochs: 10.0,
            batch_size: 100,
            groups: Group::classic(
                UpdateRule::Adam { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
                LearningRate::constant(1e-3).expect("1e-3 is a learning rate"),
                0.0,
            ),
            clip_norm: None,
            ema: None,
            keep: Keep::Best,
            sampler: Sampler::ShuffledEpochs,
            augment: None,
            seed: 0,
            train_accuracy_samples: 1000,
            verbose: true,
            print_every: 10,
        }
    }
}

impl SolverOptions {
    /// What [`Batches`](crate::data::Batches), the optimizer and the average do not check; for images `[C, H, W]`.
    pub(crate) fn check(&self, dim: [usize; 3]) -> Result<()> {
        if !(self.epochs > 0.0 && self.epochs.is_finite()) {
            let problem = format!("{} epochs teach nothing", self.epochs);
            return Err(Error::invalid("epochs", problem, "give 1 or more, or a part of one such as 0.5"));
        }
        if self.train_accuracy_samples == 0 {
            let problem = "it cannot be measured on 0 images";
            return Err(Error::invalid("training accuracy", problem, "give 1 or more"));
        }
        if self.print_every == 0 {
            let problem = "every 0 iterations is not possible";
            return Err(Error::invalid("print_every", problem, "give 1 or more, or turn verbose off"));
        }
        self.augment.map_or(Ok(()), |augment| augment.check(dim))
    }
}
