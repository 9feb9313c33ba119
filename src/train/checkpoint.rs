//! Level 6. Training on disk: one file to train on from, and to use the network from.
//!
//! The file is in the safetensors format, which many programs read:
//!
//! | tensor | holds |
//! | --- | --- |
//! | `conv1.weight`, `bn1.running_mean`, ... | the network with the best validation accuracy: what one wants to use |
//! | `latest.conv1.weight`, ... | the network where training stands |
//! | `optim.first_moment.conv1.weight`, ... | what the update rule remembers |
//! | `normalizer.mean`, `normalizer.scale` | `x = (pixel - mean) * scale` |
//! | `history.loss`, `history.val_accuracy`, ... | the vectors of [`History`], in `f64` |
//!
//! The entry `gemmnet` of its metadata is JSON: the format's version, the network's notation, the options, the step.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorView, serialize};
use serde::{Deserialize, Serialize};

use super::history::History;
use super::options::SolverOptions;
use crate::data::{Batches, Dataset, Normalizer, Split};
use crate::element::{Element, Kind};
use crate::error::{Error, Result};
use crate::nn::init::Init;
use crate::nn::network::Network;
use crate::nn::notation::NetworkSpec;
use crate::optim::Optimizer;
use crate::params::{Param, Params};

/// Version of the file format; rises when older programs can no longer read it.
const FORMAT: u32 = 1;
/// The key of our entry in the metadata of a safetensors file.
const KEY: &str = "gemmnet";
const RESTORE: &str = "restore it from a copy, or train again";

/// A trained network and what it needs to be used.
#[derive(Debug)]
pub struct Trained<T: Element> {
    /// With the parameters and running statistics of the best validation accuracy so far; as it was initialised before
    /// the first iteration.
    pub network: Network<T>,
    /// What turns pixels into its input.
    pub normalizer: Normalizer,
    /// Names of the classes, by label.
    pub class_names: Vec<String>,
    /// How it was trained, with its accuracy: [`History::best`].
    pub history: History,
}

/// All of training but the images.
///
/// Training goes on exactly as if it had never been interrupted if [`Solver::resume`](super::Solver::resume) gets it
/// unchanged. Options may be changed before that: more epochs, another learning rate.
#[derive(Debug)]
pub struct Checkpoint<T: Element> {
    /// The best network so far.
    pub trained: Trained<T>,
    /// How to train.
    pub options: SolverOptions,
    /// Iterations done.
    pub(super) step: usize,
    /// How `step` counts epochs.
    pub(super) batches: Batches,
    /// Where training stands.
    pub(super) latest: Snapshot<T>,
    pub(super) optimizer: Optimizer<T>,
}

/// The network of a checkpoint file, with the best parameters: for measuring and predicting.
///
/// # Errors
/// As [`Checkpoint::load`].
pub fn load_network<T: Element>(path: &Path) -> Result<Trained<T>> {
    let bytes = read(path)?;
    Archive::open(path, &bytes)?.trained()
}

impl<T: Element> Checkpoint<T> {
    /// Training before its first iteration.
    pub(super) fn start(network: Network<T>, data: &Dataset, options: SolverOptions) -> Result<Self> {
        Ok(Checkpoint {
            step: 0,
            batches: Batches::new(data.len(Split::Train), options.batch_size)?,
            latest: Snapshot { params: network.params().clone(), statistics: network.statistics().clone() },
            optimizer: Optimizer::new(options.groups(), network.params())?,
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

    /// Writes it to `path`. A file that is there is replaced when the new one is complete and on the disk, or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder does not exist, cannot be written or is full.
    pub fn save(&self, path: &Path) -> Result<()> {
        let Trained { network, normalizer, class_names, history } = &self.trained;
        let metadata = Contents {
            format: FORMAT,
            dtype: T::NAME.into(),
            network: network.spec().clone(),
            input: network.input(),
            class_names: class_names.clone(),
            options: self.options.clone(),
            step: self.step,
            samples: self.batches.samples,
        };
        let metadata = serde_json::to_string(&metadata).expect("plain data has a JSON form");

        let mut tensors = Tensors(Vec::new());
        tensors.push_params("", network.params(), network.params().values());
        tensors.push_params("", network.statistics(), network.statistics().values());
        tensors.push_params("latest.", &self.latest.params, self.latest.params.values());
        tensors.push_params("latest.", &self.latest.statistics, self.latest.statistics.values());
        for (name, param, values) in self.optimizer.state() {
            tensors.push(format!("optim.{name}.{}", param.name), &param.shape, values);
        }
        tensors.push("normalizer.mean".into(), &normalizer.dim(), normalizer.mean());
        tensors.push("normalizer.scale".into(), &normalizer.dim()[..1], normalizer.scale());
        for (name, values) in history_tensors(history) {
            tensors.push(name.into(), &[values.len()], values);
        }
        // One entry only: the order of several would change from run to run.
        let bytes = serialize(tensors.0, Some(HashMap::from([(KEY.to_string(), metadata)])))
            .expect("tensors fit their shapes, and the header is below safetensors' limit of 100 MB");
        replace_file(path, &bytes).map_err(|e| {
            let megabytes = bytes.len().div_ceil(1_000_000);
            let fix = format!("choose a folder that exists and can be written, with {megabytes} MB of free space");
            Error::io("write", path, e, fix)
        })
    }

    /// Reads the file that [`Checkpoint::save`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Data`] if it is damaged, no checkpoint, one of a newer program, or
    /// one of another element type.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = read(path)?;
        let archive = Archive::open(path, &bytes)?;
        let trained = archive.trained::<T>()?;
        let Contents { options, step, .. } = archive.contents;
        let network = &trained.network;

        let mut latest =
            Snapshot { params: network.params().zeros_like(), statistics: network.statistics().zeros_like() };
        archive.tensors.read_params("latest.", &mut latest.params)?;
        archive.tensors.read_params("latest.", &mut latest.statistics)?;
        let mut optimizer = Optimizer::new(options.groups(), network.params())
            .map_err(|e| Error::data(path, format!("has an impossible update rule: {e}"), RESTORE))?;
        optimizer.set_steps(step as u64);
        for (name, param, values) in optimizer.state_mut() {
            archive.tensors.read(&format!("optim.{name}.{}", param.name), &param.shape, values)?;
        }
        Ok(Checkpoint { trained, options, step, batches: archive.batches, latest, optimizer })
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
}

/// The JSON of the metadata.
#[derive(Debug, Serialize, Deserialize)]
struct Contents {
    format: u32,
    dtype: String,
    network: NetworkSpec,
    input: [usize; 3],
    class_names: Vec<String>,
    options: SolverOptions,
    step: usize,
    /// Training images.
    samples: usize,
}

/// As much of [`Contents`] as every version has.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

fn history_tensors(history: &History) -> [(&'static str, &Vec<f64>); 4] {
    let History { loss, train_accuracy, val_accuracy, learning_rate } = history;
    [
        ("history.loss", loss),
        ("history.train_accuracy", train_accuracy),
        ("history.val_accuracy", val_accuracy),
        ("history.learning_rate", learning_rate),
    ]
}

fn dtype<T: Element>() -> Dtype {
    match T::KIND {
        Kind::F32 => Dtype::F32,
        Kind::F64 => Dtype::F64,
    }
}

/// Named tensors on their way into a file.
struct Tensors<'a>(Vec<(String, TensorView<'a>)>);

impl<'a> Tensors<'a> {
    fn push<T: Element>(&mut self, name: String, shape: &[usize], values: &'a [T]) {
        let view = TensorView::new(dtype::<T>(), shape.to_vec(), bytemuck::cast_slice(values));
        self.0.push((name, view.expect("values have the length of their shape")));
    }

    /// Every parameter of `layout`, with its values in the flat vector `values`.
    fn push_params<T: Element>(&mut self, prefix: &str, layout: &Params<T>, values: &'a [T]) {
        for Param { name, shape, range, .. } in layout.iter() {
            self.push(format!("{prefix}{name}"), shape, &values[range.clone()]);
        }
    }
}

/// A checkpoint file that has been read and is whole, as far as one can tell without its tensors' values.
struct Archive<'a> {
    tensors: Named<'a>,
    contents: Contents,
    batches: Batches,
}

/// The tensors of a file.
struct Named<'a> {
    path: &'a Path,
    file: SafeTensors<'a>,
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| Error::io("read", path, e, "give the path of a checkpoint that `gemmnet train` saved"))
}

impl<'a> Archive<'a> {
    fn open(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let fault = |problem: String| Error::data(path, problem, RESTORE);
        let foreign = |problem: String| {
            Error::data(path, problem, "give a checkpoint that `gemmnet train` saved, or restore it from a copy")
        };
        let damaged = |e| foreign(format!("is not a checkpoint, or is cut off or damaged ({e})"));
        let (_, header): (_, Metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let json = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
        let json = json.ok_or_else(|| foreign("is a safetensors file, but no checkpoint of gemmnet".into()))?;
        let unreadable = |e| fault(format!("has metadata that cannot be read ({e})"));
        let Version { format } = serde_json::from_str(json).map_err(unreadable)?;
        if format != FORMAT {
            let problem = format!("is a checkpoint of format {format}, this program reads format {FORMAT}");
            return Err(Error::data(path, problem, "use the version of gemmnet that wrote it, or train again"));
        }
        let contents: Contents = serde_json::from_str(json).map_err(unreadable)?;
        let batches = Batches::new(contents.samples, contents.options.batch_size)
            .map_err(|e| fault(format!("has impossible batches ({e})")))?;
        let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
        Ok(Archive { tensors: Named { path, file }, contents, batches })
    }

    /// The best network and what belongs to it.
    fn trained<T: Element>(&self) -> Result<Trained<T>> {
        let Contents { dtype, network, input, class_names, step, .. } = &self.contents;
        let path = self.tensors.path;
        if dtype != T::NAME {
            let problem = format!("holds a network of {dtype} numbers, asked for was one of {}", T::NAME);
            return Err(Error::data(path, problem, format!("load it as {dtype}")));
        }
        // The initial weights are all overwritten.
        let mut network = Network::new(network, *input, Init::Gaussian { std: 0.0 }, 0)
            .map_err(|e| Error::data(path, format!("describes a network that cannot be ({e})"), RESTORE))?;
        self.tensors.read_params("", network.params_mut())?;
        self.tensors.read_params("", network.statistics_mut())?;

        let mut mean = vec![0.0; input.iter().product()];
        let mut scale = vec![0.0; input[0]];
        self.tensors.read("normalizer.mean", input, &mut mean)?;
        self.tensors.read("normalizer.scale", &input[..1], &mut scale)?;
        let measured = if *step == 0 { 0 } else { 1 + step / self.batches.count };
        let vector = |name, len| {
            let mut values = vec![0.0; len];
            self.tensors.read(name, &[len], &mut values).map(|()| values)
        };
        let history = History {
            loss: vector("history.loss", *step)?,
            train_accuracy: vector("history.train_accuracy", measured)?,
            val_accuracy: vector("history.val_accuracy", measured)?,
            learning_rate: vector("history.learning_rate", measured)?,
        };
        let normalizer = Normalizer::new(*input, mean, scale)
            .map_err(|e| Error::data(path, format!("cannot normalise images ({e})"), RESTORE))?;
        Ok(Trained { network, normalizer, class_names: class_names.clone(), history })
    }
}

impl Named<'_> {
    fn read<T: Element>(&self, name: &str, shape: &[usize], values: &mut [T]) -> Result<()> {
        let fault = |problem: String| Error::data(self.path, problem, RESTORE);
        let tensor = self.file.tensor(name).map_err(|_| fault(format!("has no tensor `{name}`")))?;
        if (tensor.dtype(), tensor.shape()) != (dtype::<T>(), shape) {
            return Err(fault(format!(
                "has a tensor `{name}` of {} {:?}, its network needs {} {shape:?}",
                tensor.dtype(),
                tensor.shape(),
                dtype::<T>()
            )));
        }
        // As bytes: the file does not align its numbers.
        bytemuck::cast_slice_mut(values).copy_from_slice(tensor.data());
        Ok(())
    }

    fn read_params<T: Element>(&self, prefix: &str, params: &mut Params<T>) -> Result<()> {
        let layout: Vec<Param> = params.iter().cloned().collect();
        for Param { name, shape, range, .. } in layout {
            self.read(&format!("{prefix}{name}"), &shape, &mut params.values_mut()[range])?;
        }
        Ok(())
    }
}

/// Writes beside `path`, waits for the disk, then renames.
fn replace_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    // As a file that was created under its own name: the user's umask decides who may read it.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    // The name has to reach the disk too.
    #[cfg(unix)]
    fs::File::open(folder)?.sync_all()?;
    Ok(())
}
