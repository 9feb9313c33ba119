//! Level 6. The training loop.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::RngExt;

use super::checkpoint::{Checkpoint, Trained};
use super::evaluate::Batch;
use super::history::{Event, History, Report};
use super::options::{Keep, SolverOptions};
use crate::data::{Batches, Dataset, Draw, Split, Views};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::network::{Network, StepKey, TrainStep};
use crate::optim::Progress;
use crate::profile::{self, Phase, Work};
use crate::random::{Purpose, stream};
use crate::workspace::Buffer;

/// Trains a network on a data set.
///
/// The result has the same bits for the same options, network and data, at any number of threads, and whether training
/// was interrupted and resumed or not. After the first step of an epoch a step allocates nothing.
///
/// Between calls of [`Solver::train`], [`Solver::network_mut`] has the parameters and running statistics that are
/// [kept](Keep), those of the moving average if there is one; where training stands is apart.
#[derive(Debug)]
pub struct Solver<T: Element> {
    /// The state. During `train` its network is the latest and `latest` is the kept one, otherwise it is as it says.
    state: Checkpoint<T>,
    data: Dataset,
    batch: Batch<T>,
    /// The images of an epoch, and which epoch that is.
    order: (Option<usize>, Vec<usize>),
    save: Option<Save<T>>,
    /// Time that was spent on training before its first iteration.
    preparation: Duration,
}

type SaveFn<T> = dyn FnMut(&Checkpoint<T>) -> Result<()> + Send + Sync;

/// Saves a checkpoint.
struct Save<T: Element>(Box<SaveFn<T>>);

impl<T: Element> std::fmt::Debug for Save<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Save")
    }
}

/// What this call of `train` has done so far.
#[derive(Clone, Copy, Debug, Default)]
struct Effort {
    images: usize,
    time: Duration,
}

impl Effort {
    fn images_per_second(self) -> f64 {
        if self.images == 0 { 0.0 } else { self.images as f64 / self.time.as_secs_f64() }
    }
}

/// Iterations of so many epochs, the last of which may be a part of one.
fn steps_of(epochs: f64, batches: Batches) -> usize {
    // What is too large for a number of iterations is the largest there is.
    (epochs * batches.count as f64).ceil() as usize
}

/// Training images that whitening is measured on.
const WHITENED: usize = 5000;

/// Gives a whitening layer its filters, if it has none yet.
fn whiten<T: Element>(network: &mut Network<T>, data: &Dataset) -> Result<()> {
    // Other sizes are refused where the solver is made.
    if network.input() != data.dim() || !network.awaits_whitening() {
        return Ok(());
    }
    let indices: Vec<usize> = (0..data.len(Split::Train).min(WHITENED)).collect();
    let mut x = Buffer::zeroed(indices.len() * data.image_len());
    data.fill_batch(Draw::plain(Split::Train), &indices, &mut x, &mut vec![0; indices.len()])?;
    network.whiten(&x)
}

impl<T: Element> Solver<T> {
    /// A solver before its first iteration. A [whitening](crate::nn::whitening) layer whose filters have not been measured
    /// gets them here, from the first 5,000 training images.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an option that makes no sense, such as an augmentation that can take images out of sight, a
    /// network with fewer classes than the data, or one for images of another size.
    pub fn new(mut network: Network<T>, data: Dataset, options: SolverOptions) -> Result<Self> {
        let begin = Instant::now();
        whiten(&mut network, &data)?;
        let preparation = begin.elapsed();
        let state = Checkpoint::start(network, &data, options)?;
        Ok(Solver { preparation, ..Self::with_state(state, data)? })
    }

    /// A solver where the checkpoint's was. The data is normalised as it was then, whatever its own normalisation.
    ///
    /// # Errors
    /// As [`Solver::new`], and [`Error::Invalid`] if the data has another number of training images than it had then, or
    /// if an option was changed that cannot be: the batch size, the update rule, or fewer epochs than are done.
    pub fn resume(mut checkpoint: Checkpoint<T>, data: Dataset) -> Result<Self> {
        let data = data.with_normalizer(checkpoint.trained.normalizer.clone())?;
        checkpoint.apply_options()?;
        let Checkpoint { options, batches, .. } = &checkpoint;
        let now = Batches::new(data.len(Split::Train), options.batch_size)?;
        if now != *batches {
            let problem = format!(
                "it was trained on {} images in batches of {}, not on {} in batches of {}",
                batches.samples, batches.size, now.samples, now.size
            );
            return Err(Error::invalid("checkpoint", problem, "give the same data and batch size"));
        }
        let total = steps_of(options.epochs, *batches);
        if checkpoint.step > total {
            let problem = format!("it has done {} iterations, more than {total} in all", checkpoint.step);
            return Err(Error::invalid("epochs", problem, format!("give more than {}", checkpoint.epoch())));
        }
        Self::with_state(checkpoint, data)
    }

    fn with_state(state: Checkpoint<T>, data: Dataset) -> Result<Self> {
        let network = &state.trained.network;
        if data.classes() > network.classes() {
            let problem = format!("it gives {} scores, the data has {} classes", network.classes(), data.classes());
            return Err(Error::invalid("network", problem, format!("end it with affine{}", data.classes())));
        }
        Ok(Solver {
            batch: Batch::new(network, &data, state.batches.size)?,
            order: (None, Vec::new()),
            save: None,
            preparation: Duration::ZERO,
            state,
            data,
        })
    }

    /// From now on `train` saves a checkpoint at this path after every epoch, and when the observer ends training.
    pub fn save_to(&mut self, path: impl Into<PathBuf>) {
        let path = path.into();
        self.save_with(move |checkpoint| checkpoint.save(&path));
    }

    /// From now on `train` calls `save` where [`Solver::save_to`] would save: with the checkpoint as it would be saved, and
    /// after the observer knows of the epoch. An error ends training.
    pub fn save_with(&mut self, save: impl FnMut(&Checkpoint<T>) -> Result<()> + Send + Sync + 'static) {
        self.save = Some(Save(Box::new(save)));
    }

    /// The state of training: options, history, the step it has reached; to be saved.
    pub fn checkpoint(&self) -> &Checkpoint<T> {
        &self.state
    }

    /// The course of training so far.
    pub fn history(&self) -> &History {
        &self.state.trained.history
    }

    /// The data, normalised as the network learns it.
    pub fn data(&self) -> &Dataset {
        &self.data
    }

    /// The network that is kept; to measure it takes its buffers, hence `mut`.
    pub fn network_mut(&mut self) -> &mut Network<T> {
        &mut self.state.trained.network
    }

    /// The share of a split's images that the network takes for what they are where training stands, of the moving average if
    /// there is one; the history does not hear of it.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the split has no images.
    pub fn accuracy_now(&mut self, split: Split) -> Result<f64> {
        self.exchange();
        self.exchange_average();
        let Checkpoint { trained: Trained { network, .. }, options, .. } = &mut self.state;
        let measured = super::accuracy(network, &self.data, split, options.batch_size, Views::One);
        self.exchange_average();
        self.exchange();
        measured
    }

    /// The network that is kept.
    pub fn into_network(self) -> Network<T> {
        self.state.trained.network
    }

    /// Trains from where it stands up to the last epoch, and tells `observer` of every iteration and epoch. If that
    /// returns `Break`, training ends there; another call goes on.
    ///
    /// # Errors
    /// [`Error::Diverged`] if the loss is no longer a finite number, and [`Error::Io`] if a checkpoint cannot be saved. Then,
    /// too, the network is the one that is kept, and the history stays.
    pub fn train(&mut self, observer: impl FnMut(&Event) -> ControlFlow<()>) -> Result<Report> {
        self.train_to(self.state.options.epochs, observer)
    }

    /// [`Solver::train`] up to epoch `epoch`, which may be a part of one, of all those that the options say: saved there, and
    /// another call goes on as if it had not ended.
    ///
    /// # Errors
    /// As there, and [`Error::Invalid`] for an epoch that is not above 0.
    pub fn train_to(&mut self, epoch: f64, mut observer: impl FnMut(&Event) -> ControlFlow<()>) -> Result<Report> {
        if epoch.is_nan() || epoch <= 0.0 {
            let problem = format!("training up to epoch {epoch} does nothing");
            return Err(Error::invalid("epochs", problem, "give more than 0"));
        }
        let last = steps_of(epoch, self.state.batches).min(self.steps());
        let SolverOptions { verbose, print_every, .. } = self.state.options;
        let mut observe = |event: Event| {
            if let Some(line) = verbose.then(|| event.line(print_every)).flatten() {
                tracing::info!("{line}");
            }
            observer(&event).is_break()
        };
        let mut effort = Effort { images: 0, time: std::mem::take(&mut self.preparation) };
        self.exchange();
        let result = self.run(last, &mut observe, &mut effort);
        self.exchange();
        result?;

        let History { train_accuracy, val_accuracy, .. } = self.history();
        let measured = "accuracy is measured after the first iteration";
        let (kept_epoch, kept_val_accuracy) = self.history().kept(self.state.options.keep).expect(measured);
        Ok(Report {
            kept_val_accuracy,
            kept_epoch,
            final_val_accuracy: *val_accuracy.last().expect(measured),
            final_train_accuracy: *train_accuracy.last().expect(measured),
            steps: self.state.step,
            train_seconds: effort.time.as_secs_f64(),
            images_per_second: effort.images_per_second(),
            stopped_early: self.state.step < self.steps(),
        })
    }

    /// Iterations of the whole training.
    pub fn steps(&self) -> usize {
        steps_of(self.state.options.epochs, self.state.batches)
    }

    /// Iterations of an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.state.batches.count
    }

    /// The kept parameters into the network and the latest out of it, or the other way round.
    fn exchange(&mut self) {
        self.state.latest.swap(&mut self.state.trained.network);
    }

    /// Trains until `last` iterations are done.
    fn run(&mut self, last: usize, observe: &mut impl FnMut(Event) -> bool, effort: &mut Effort) -> Result<()> {
        let (per_epoch, total) = (self.state.batches.count, self.steps());
        while self.state.step < last {
            let event = self.step(effort)?;
            let step = self.state.step;
            let mut stop = observe(event);
            if step == 1 {
                stop |= observe(self.measure(0)?);
            }
            let epoch_done = step.is_multiple_of(per_epoch) || step == total;
            if epoch_done {
                stop |= observe(self.measure(step.div_ceil(per_epoch))?);
            }
            stop |= step == last;
            if let Some(Save(save)) = self.save.as_mut().filter(|_| epoch_done || stop) {
                // A checkpoint has the kept network in its place.
                self.state.latest.swap(&mut self.state.trained.network);
                let saved = save(&self.state);
                self.state.latest.swap(&mut self.state.trained.network);
                saved?;
                tracing::debug!(step, "saved a checkpoint");
            }
            if stop {
                break;
            }
        }
        Ok(())
    }

    /// One iteration.
    fn step(&mut self, effort: &mut Effort) -> Result<Event> {
        let begin = Instant::now();
        let steps = self.steps();
        let Checkpoint {
            trained: Trained { network, history, .. }, options, step, batches, optimizer, average, ..
        } = &mut self.state;
        let (epoch, index) = (*step / batches.count, *step % batches.count);
        let (ordered, order) = &mut self.order;
        if *ordered != Some(epoch) {
            options.sampler.order(*batches, options.seed, epoch as u64, order);
            // Room for the losses of an epoch, however many epochs are planned.
            history.loss.reserve(batches.count);
            *ordered = Some(epoch);
        }
        let indices = &order[index * batches.size..][..batches.size];
        let Batch { x, y, .. } = &mut self.batch;
        let draw = Draw::augmented(Split::Train, options.augment, options.seed, epoch as u64);
        let bytes = x.len() * (size_of::<u8>() + size_of::<T>());
        let drawing = profile::scope(Phase::Data, || Work { op: "batch", flops: 0, bytes });
        self.data.fill_batch(draw, indices, x, y)?;
        drop(drawing);

        let at = Progress { step: *step, steps_per_epoch: batches.count, steps };
        network.set_trained(optimizer.trained(at));
        let learning_rate = optimizer.learning_rate(at);
        let key = StepKey { seed: options.seed, step: *step as u64 };
        let TrainStep { loss, stepped } = network.step(x, y, key, optimizer, at)?;
        let mut loss = loss.f64();
        if loss.is_finite() {
            loss += stepped.regularization;
        }
        if !loss.is_finite() {
            let origin = network.origin_of_non_finite(x, y.len());
            return Err(Error::Diverged { iteration: *step + 1, loss, learning_rate, origin });
        }
        if let Some(average) = average {
            average.update(network);
        }
        *step += 1;
        history.loss.push(loss);
        effort.images += batches.size;
        effort.time += begin.elapsed();
        Ok(Event::Step {
            epoch: epoch + 1,
            epochs: options.epochs,
            step: *step,
            steps,
            loss,
            learning_rate,
            seconds: effort.time.as_secs_f64(),
            images_per_second: effort.images_per_second(),
        })
    }

    /// The moving average into the network and the latest out of it, or the other way round, if there is an average.
    fn exchange_average(&mut self) {
        if let Some(average) = &mut self.state.average {
            average.swap(&mut self.state.trained.network);
        }
    }

    /// Measures accuracy, writes it into the history and keeps the network if it is to be kept.
    fn measure(&mut self, epoch: usize) -> Result<Event> {
        self.exchange_average();
        let measured = self.accuracies(epoch);
        let is_best = |val_accuracy| self.history().best().is_none_or(|(_, best)| val_accuracy > best);
        let kept = measured.as_ref().is_ok_and(|&[_, val_accuracy]| match self.state.options.keep {
            Keep::Best => is_best(val_accuracy),
            Keep::Last => true,
        });
        if kept {
            self.state.latest.copy_from(&self.state.trained.network);
        }
        self.exchange_average();
        let [train_accuracy, val_accuracy] = measured?;

        let steps = self.steps();
        let Checkpoint { trained: Trained { history, .. }, options, step, batches, optimizer, .. } = &mut self.state;
        let at = Progress { step: *step - 1, steps_per_epoch: batches.count, steps };
        history.train_accuracy.push(train_accuracy);
        history.val_accuracy.push(val_accuracy);
        history.learning_rate.push(optimizer.learning_rate(at));
        Ok(Event::Epoch { epoch, epochs: options.epochs, train_accuracy, val_accuracy, kept })
    }

    /// The network's accuracy on the training and on the validation split.
    fn accuracies(&mut self, epoch: usize) -> Result<[f64; 2]> {
        let Checkpoint { trained: Trained { network, .. }, options, .. } = &mut self.state;
        let len = self.data.len(Split::Train);
        let samples: Vec<_> = if len <= options.train_accuracy_samples {
            (0..len).collect()
        } else {
            let mut rng = stream(options.seed, Purpose::Measure, epoch as u64, 0);
            (0..options.train_accuracy_samples).map(|_| rng.random_range(0..len)).collect()
        };
        let all: Vec<_> = (0..self.data.len(Split::Validation)).collect();
        let mut accuracy =
            |split, samples: &[usize]| self.batch.accuracy(network, &self.data, split, Views::One, samples);
        Ok([accuracy(Split::Train, &samples)?, accuracy(Split::Validation, &all)?])
    }
}
