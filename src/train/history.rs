//! Level 6. What happened in training: while it happens, line by line, and in the end.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};

use super::options::Keep;

/// The course of training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Loss of every iteration, regularisation included.
    pub loss: Vec<f64>,
    /// Share of training images classified correctly after every epoch. Index 0 is after the first iteration, as in
    /// CS231n, index `e` after epoch `e`, the last of which may be a part of one: so in the other vectors of epochs.
    pub train_accuracy: Vec<f64>,
    /// Share of validation images classified correctly.
    pub val_accuracy: Vec<f64>,
    /// Learning rate of the last iteration before that, of the first group that is trained.
    pub learning_rate: Vec<f64>,
}

impl History {
    /// The epoch with the best validation accuracy, the first of them if several are equal, and that accuracy; `None`
    /// before the first iteration.
    pub fn best(&self) -> Option<(usize, f64)> {
        let epochs = self.val_accuracy.iter().copied().enumerate();
        epochs.reduce(|best, epoch| if epoch.1 > best.1 { epoch } else { best })
    }

    /// The epoch whose network is kept, and its validation accuracy; `None` before the first iteration.
    pub fn kept(&self, keep: Keep) -> Option<(usize, f64)> {
        match keep {
            Keep::Best => self.best(),
            Keep::Last => self.val_accuracy.iter().copied().enumerate().next_back(),
        }
    }
}

/// What [`Solver::train`](super::Solver::train) tells its observer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// An iteration is done.
    Step {
        /// The epoch it belongs to, from 1.
        epoch: usize,
        /// Epochs in all.
        epochs: f64,
        /// The iteration, from 1.
        step: usize,
        /// Iterations in all.
        steps: usize,
        /// Loss, regularisation included, of the parameters before the iteration.
        loss: f64,
        /// Learning rate of the iteration, of the first group that is trained.
        learning_rate: f64,
        /// Seconds that the iterations of this call of `train` took, without the time for measuring accuracy and saving.
        seconds: f64,
        /// Training images per second since this call of `train` began, without the time for measuring accuracy.
        images_per_second: f64,
    },
    /// Accuracy has been measured: after the first iteration (epoch 0) and after every epoch.
    Epoch {
        /// The finished epoch, the last of which may be a part of one.
        epoch: usize,
        /// Epochs in all.
        epochs: f64,
        /// Share of training images classified correctly.
        train_accuracy: f64,
        /// Share of validation images classified correctly.
        val_accuracy: f64,
        /// Whether the network is kept, in the place of the one before.
        kept: bool,
    },
}

impl Event {
    /// What CS231n's solver prints of it, if it prints every epoch and every `every`-th iteration, beginning with the first.
    pub(super) fn line(&self, every: usize) -> Option<String> {
        match *self {
            Event::Step { step, steps, loss, .. } if (step - 1).is_multiple_of(every) => {
                Some(format!("(Iteration {step} / {steps}) loss: {loss:.6}"))
            }
            Event::Step { .. } => None,
            Event::Epoch { epoch, epochs, train_accuracy, val_accuracy, .. } => {
                let epoch = epochs.min(epoch as f64);
                Some(format!("(Epoch {epoch} / {epochs}) train acc: {train_accuracy:.6}; val_acc: {val_accuracy:.6}"))
            }
        }
    }
}

/// Writes events as CS231n's solver prints them.
#[derive(Debug)]
pub struct Log<W> {
    out: W,
    every: usize,
}

impl<W: Write> Log<W> {
    /// Writes every epoch and every `every`-th iteration, beginning with the first, to `out`.
    ///
    /// # Panics
    /// If `every` is 0.
    pub fn new(out: W, every: usize) -> Self {
        assert!(every > 0, "every 0 iterations is not possible");
        Log { out, every }
    }

    /// Writes the line of this event, if it has one.
    ///
    /// # Errors
    /// As writing to `out`.
    pub fn write(&mut self, event: &Event) -> io::Result<()> {
        event.line(self.every).map_or(Ok(()), |line| writeln!(self.out, "{line}"))
    }
}

/// How training ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Validation accuracy, 0 to 1, of the network that is kept, as `train` leaves it.
    pub kept_val_accuracy: f64,
    /// The epoch after which it was that.
    pub kept_epoch: usize,
    /// Validation accuracy when it was last measured.
    pub final_val_accuracy: f64,
    /// Training accuracy when it was last measured.
    pub final_train_accuracy: f64,
    /// Iterations so far, those before a checkpoint included.
    pub steps: usize,
    /// Seconds that the iterations of this call took, without the time for measuring accuracy and for checkpoints.
    pub train_seconds: f64,
    /// Training images per second of `train_seconds`; 0 if there was nothing left to train.
    pub images_per_second: f64,
    /// Whether the observer ended training before its last iteration.
    pub stopped_early: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_best_epoch_wins() {
        for (accuracies, best) in [(&[][..], None), (&[0.1, 0.3, 0.3, 0.2], Some((1, 0.3))), (&[0.0], Some((0, 0.0)))] {
            let history = History { val_accuracy: accuracies.to_vec(), ..History::default() };
            assert_eq!(history.best(), best);
            assert_eq!(history.kept(Keep::Best), best);
            assert_eq!(history.kept(Keep::Last), accuracies.iter().copied().enumerate().next_back());
        }
    }

    /// The lines of CS231n's solver over one epoch.
    #[test]
    fn the_log_reads_as_cs231ns() {
        let mut log = Log::new(Vec::new(), 20);
        let step = |step, loss| Event::Step {
            epoch: 1,
            epochs: 1.0,
            step,
            steps: 980,
            loss,
            learning_rate: 1e-3,
            seconds: 1.0,
            images_per_second: 1.0,
        };
        let epoch = |epoch, train_accuracy, val_accuracy| Event::Epoch {
            epoch,
            epochs: 1.0,
            train_accuracy,
            val_accuracy,
            kept: true,
        };
        for event in [
            step(1, 2.304_528),
            epoch(0, 0.145, 0.135),
            step(2, 9.9),
            step(20, 9.9),
            step(21, 2.311_741_4),
            epoch(1, 0.461, 0.459),
        ] {
            log.write(&event).unwrap();
        }
        let expected = "(Iteration 1 / 980) loss: 2.304528\n\
                        (Epoch 0 / 1) train acc: 0.145000; val_acc: 0.135000\n\
                        (Iteration 21 / 980) loss: 2.311741\n\
                        (Epoch 1 / 1) train acc: 0.461000; val_acc: 0.459000\n";
        assert_eq!(String::from_utf8(log.out).unwrap(), expected);
    }
}
