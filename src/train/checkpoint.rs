//! Level 6. Training on disk: one file to train on from, and to use the network from.
//!
//! The file is in the safetensors format, which many programs read:
//!
//! | tensor | holds |
//! | --- | --- |
//! | `conv1.weight`, `bn1.running_mean`, ... | the network that is kept, as [`Keep`] says: what one wants to use |
//! | `latest.conv1.weight`, ... | the network where training stands |
//! | `average.conv1.weight`, ... | the moving average of that, if there is one |
//! | `optim.first_moment.conv1.weight`, ... | what the update rules remember |
//! | `normalizer.mean`, `normalizer.scale` | `x = (pixel - mean) * scale` |
//! | `history.loss`, `history.val_accuracy`, ... | the vectors of [`History`], in `f64` |
//!
//! The entry `gemmnet` of its metadata is JSON: the format's version, the network's notation and input, the options, the
//! step. Files of earlier versions are read as well: the first had one rule for all parameters, the second whole epochs.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::format_1;
use super::history::History;
use super::model::{self, push_normalizer, read_normalizer};
use super::options::SolverOptions;
use crate::data::{Batches, Dataset, Normalizer, Split};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::file::{self, Header};
use crate::nn::network::Network;
use crate::optim::{Ema, Optimizer};
use crate::params::Params;
use crate::store::{Archive, Tensors, read};

/// A trained network and what it needs to be used.
#[derive(Debug)]
pub struct Trained<T: Element> {
    /// With the parameters and running statistics that are kept; as it was initialised before the first iteration.
    pub network: Network<T>,
    /// What turns pixels into its input.
    pub normalizer: Normalizer,
    /// Names of the classes, by label.
    pub class_names: Vec<String>,
    /// How it was trained, with its accuracy: [`History::kept`] by the option that it was trained with.
    pub history: History,
}

impl<T: Element> Trained<T> {
    /// Writes the network alone, to be used: what [`Model::load`](super::Model::load) reads, a third of a checkpoint or less.
    ///
    /// # Errors
    /// As [`Checkpoint::save`].
    pub fn save_model(&self, path: &Path) -> Result<()> {
        model::save(path, &self.network, Some(&self.normalizer), &self.class_names)
    }
}

/// All of training but the images.
///
/// Training goes on exactly as if it had never been interrupted if [`Solver::resume`](super::Solver::resume) gets it
/// unchanged. Options may be changed before that: more epochs, another learning rate.
#[derive(Debug)]
pub struct Checkpoint<T: Element> {
    /// The network that is kept.
    pub trained: Trained<T>,
    /// How to train.
    pub options: SolverOptions,
    /// Iterations done.
    pub(super) step: usize,
    /// How `step` counts epochs.
    pub(super) batches: Batches,
    /// Where training stands.
    pub(super) latest: Snapshot<T>,
    /// The moving average, if it is asked for.
    pub(super) average: Option<Average<T>>,
    pub(super) optimizer: Optimizer<T>,
}

impl<T: Element> Checkpoint<T> {
    /// Training before its first iteration.
    pub(super) fn start(network: Network<T>, data: &Dataset, options: SolverOptions) -> Result<Self> {
        options.check(data.dim())?;
        let latest = Snapshot { params: network.params().clone(), statistics: network.statistics().clone() };
        let mut optimizer = Optimizer::new(options.groups.clone(), network.params())?;
        optimizer.set_clip_norm(options.clip_norm)?;
        Ok(Checkpoint {
            step: 0,
            batches: Batches::new(data.len(Split::Train), options.batch_size)?,
            average: Average::new(options.ema, &latest)?,
            latest,
            optimizer,
            trained: Trained {
                network,
                normalizer: data.normalizer().clone(),
                class_names: data.class_names().to_vec(),
                history: History::default(),
            },
            options,
        })
    }

    /// Iterations done.
    pub fn step(&self) -> usize {
        self.step
    }

    /// Epochs done, without the one under way.
    pub fn epoch(&self) -> usize {
        self.step / self.batches.count
    }

    /// Brings what the options say about the optimizer and the average into force.
    pub(super) fn apply_options(&mut self) -> Result<()> {
        let Checkpoint { options, optimizer, average, latest, trained, .. } = self;
        options.check(trained.network.input())?;
        optimizer.set_groups(options.groups.clone())?;
        optimizer.set_clip_norm(options.clip_norm)?;
        *average = match average.take() {
            Some(average) => average.with_decay(options.ema)?,
            None => Average::new(options.ema, latest)?,
        };
        Ok(())
    }

    /// Writes it to `path`. A file that is there is replaced when the new one is complete and on the disk, or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder does not exist, cannot be written or is full.
    pub fn save(&self, path: &Path) -> Result<()> {
        let Trained { network, normalizer, class_names, history } = &self.trained;
        let contents = Contents {
            header: Header::new(network),
            class_names: class_names.clone(),
            options: self.options.clone(),
            step: self.step,
            samples: self.batches.samples,
            measured: Some(history.val_accuracy.len()),
        };
        let mut tensors = file::tensors(network);
        self.latest.push("latest.", &mut tensors);
        if let Some(Average { params, statistics }) = &self.average {
            tensors.push_params("average.", params.params());
            tensors.push_params("average.", statistics.params());
        }
        for (name, param, values) in self.optimizer.state() {
            tensors.push(format!("optim.{name}.{}", param.name), &param.shape, values);
        }
        push_normalizer(normalizer, &mut tensors);
        let History { loss, train_accuracy, val_accuracy, learning_rate } = history;
        for (name, values) in [
            ("history.loss", loss),
            ("history.train_accuracy", train_accuracy),
            ("history.val_accuracy", val_accuracy),
            ("history.learning_rate", learning_rate),
        ] {
            tensors.push(name.into(), &[values.len()], values);
        }
        tensors.save(path, serde_json::to_string(&contents).expect("plain data has a JSON form"))
    }

    /// Reads the file that [`Checkpoint::save`] wrote, in this version or an earlier one.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Data`] if it is damaged, no checkpoint, one of a newer program, or
    /// one of another element type.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = read(path)?;
        let archive = Archive::open(path, &bytes)?;
        let contents = Contents::read::<T>(&archive)?;
        let trained = contents.trained::<T>(&archive)?;
        let batches = contents.batches(&archive)?;
        let Contents { options, step, .. } = contents;
        let network = &trained.network;

        let fault = |what: &str, e: Error| archive.fault(format!("has {what} ({e})"));
        let mut optimizer = Optimizer::new(options.groups.clone(), network.params())
            .map_err(|e| fault("impossible groups of parameters", e))?;
        optimizer.set_clip_norm(options.clip_norm).map_err(|e| fault("an impossible limit of the gradient", e))?;
        optimizer.set_steps(step as u64);
        for (name, param, values) in optimizer.state_mut() {
            archive.read(&format!("optim.{name}.{}", param.name), &param.shape, values)?;
        }
        let mut latest =
            Snapshot { params: network.params().zeros_like(), statistics: network.statistics().zeros_like() };
        archive.read_params("latest.", &mut latest.params)?;
        archive.read_params("latest.", &mut latest.statistics)?;
        let mut average = Average::new(options.ema, &latest).map_err(|e| fault("an impossible moving average", e))?;
        if let Some(Average { params, statistics }) = &mut average {
            archive.read_params("average.", params.params_mut())?;
            archive.read_params("average.", statistics.params_mut())?;
        }
        Ok(Checkpoint { trained, options, step, batches, latest, average, optimizer })
    }
}

/// Parameters and running statistics of a network, apart from it.
#[derive(Debug)]
pub(super) struct Snapshot<T: Element> {
    params: Params<T>,
    statistics: Params<T>,
}

impl<T: Element> Snapshot<T> {
    /// Makes it a copy of the network's.
    pub(super) fn copy_from(&mut self, network: &Network<T>) {
        self.params.copy_from(network.params());
        self.statistics.copy_from(network.statistics());
    }

    /// Exchanges it with the network's; moves no values.
    pub(super) fn swap(&mut self, network: &mut Network<T>) {
        std::mem::swap(&mut self.params, network.params_mut());
        std::mem::swap(&mut self.statistics, network.statistics_mut());
    }

    fn push<'a>(&'a self, prefix: &str, tensors: &mut Tensors<'a>) {
        tensors.push_params(prefix, &self.params);
        tensors.push_params(prefix, &self.statistics);
    }
}

/// The moving average of parameters, and of the running statistics that go with them.
#[derive(Debug)]
pub(super) struct Average<T: Element> {
    params: Ema<T>,
    statistics: Ema<T>,
}

impl<T: Element> Average<T> {
    /// From `start` on, if there is a decay.
    fn new(decay: Option<f64>, start: &Snapshot<T>) -> Result<Option<Self>> {
        let average = |decay| {
            Ok(Average { params: Ema::new(decay, &start.params)?, statistics: Ema::new(decay, &start.statistics)? })
        };
        decay.map(average).transpose()
    }

    /// As it is, from now on with this decay, if there is one.
    fn with_decay(self, decay: Option<f64>) -> Result<Option<Self>> {
        let Average { params, statistics } = self;
        Self::new(decay, &Snapshot { params: params.into_params(), statistics: statistics.into_params() })
    }

    /// Takes the network after a step into the average.
    pub(super) fn update(&mut self, network: &Network<T>) {
        self.params.update(network.params());
        self.statistics.update(network.statistics());
    }

    /// Exchanges it with the network's; moves no values.
    pub(super) fn swap(&mut self, network: &mut Network<T>) {
        std::mem::swap(self.params.params_mut(), network.params_mut());
        std::mem::swap(self.statistics.params_mut(), network.statistics_mut());
    }
}

/// The JSON of the metadata.
#[derive(Debug, Serialize, Deserialize)]
struct Contents<Options = SolverOptions> {
    #[serde(flatten)]
    header: Header,
    class_names: Vec<String>,
    options: Options,
    step: usize,
    /// Training images.
    samples: usize,
    /// How often accuracy was measured; before format 3 once after the first iteration and after every epoch.
    measured: Option<usize>,
}

/// As much of [`Contents`] as tells a checkpoint from a network alone.
#[derive(Deserialize)]
struct Training {
    options: Option<serde::de::IgnoredAny>,
}

impl Contents<format_1::Options> {
    fn translate(self) -> Contents {
        let Contents { header, class_names, options, step, samples, measured } = self;
        Contents { header, class_names, options: options.into(), step, samples, measured }
    }
}

impl Contents {
    /// Of a file in any version, with a network of `T`.
    fn read<T: Element>(archive: &Archive<'_>) -> Result<Self> {
        let header = Header::read::<T>(archive)?;
        let Training { options } = file::parse(archive)?;
        if options.is_none() {
            let fix = "give a checkpoint, which `gemmnet train` saves, or load it as a network alone";
            return Err(Error::data(archive.path(), "holds a network without its training", fix));
        }
        if header.format == 1 { file::parse(archive).map(Contents::translate) } else { file::parse(archive) }
    }

    fn batches(&self, archive: &Archive<'_>) -> Result<Batches> {
        Batches::new(self.samples, self.options.batch_size)
            .map_err(|e| archive.fault(format!("has impossible batches ({e})")))
    }

    /// The network that is kept and what belongs to it.
    fn trained<T: Element>(&self, archive: &Archive<'_>) -> Result<Trained<T>> {
        let network = self.header.network::<T>(archive)?;
        let batches = self.batches(archive)?;
        let normalizer = read_normalizer(archive, network.input())?;
        let epochs = (self.step / batches.count).saturating_add(1);
        let measured = self.measured.unwrap_or(if self.step == 0 { 0 } else { epochs });
        let history = History {
            loss: archive.vector("history.loss", &[self.step])?,
            train_accuracy: archive.vector("history.train_accuracy", &[measured])?,
            val_accuracy: archive.vector("history.val_accuracy", &[measured])?,
            learning_rate: archive.vector("history.learning_rate", &[measured])?,
        };
        Ok(Trained { network, normalizer, class_names: self.class_names.clone(), history })
    }
}
