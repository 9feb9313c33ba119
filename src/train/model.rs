//! Level 6. A saved network to use, without the training around it.

use std::path::Path;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::data::Normalizer;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::file::{self, Header};
use crate::nn::network::Network;
use crate::nn::onnx::{self, Scaling};
use crate::store::{Archive, Tensors, read, replace};

/// A network with its parameters, and what programs that use it want to know.
#[derive(Clone, Debug)]
pub struct Model<T: Element> {
    /// From a checkpoint with the parameters that were kept.
    pub network: Network<T>,
    /// What turns pixels into its input, if that is known: checkpoints have it.
    pub normalizer: Option<Normalizer>,
    /// Names of the classes, by label; none where they are not known.
    pub class_names: Vec<String>,
}

/// The JSON of a saved model.
#[derive(Serialize)]
struct Contents<'a> {
    #[serde(flatten)]
    header: Header,
    class_names: &'a [String],
    normalized: bool,
}

/// As much as a model needs of the JSON of any file with a network.
#[derive(Deserialize)]
struct Meta {
    class_names: Option<Vec<String>>,
    normalized: Option<bool>,
    /// Of a checkpoint, which always has what normalises.
    options: Option<IgnoredAny>,
}

impl<T: Element> Model<T> {
    /// Reads a file of [`Model::save`], [`Checkpoint::save`](super::Checkpoint::save) or [`Network::save`].
    ///
    /// # Errors
    /// As [`Network::load`].
    pub fn load(path: &Path) -> Result<Self> {
        Self::from_bytes(&read(path)?, path)
    }

    /// The same from the bytes of such a file; errors call it `name`.
    ///
    /// # Errors
    /// As [`Network::load`], without those of reading.
    pub fn from_bytes(bytes: &[u8], name: &Path) -> Result<Self> {
        let archive = Archive::open(name, bytes)?;
        let network = Header::read::<T>(&archive)?.network(&archive)?;
        let Meta { class_names, normalized, options } = file::parse(&archive)?;
        let normalizer = normalized.unwrap_or(options.is_some()).then(|| read_normalizer(&archive, network.input()));
        Ok(Model { network, normalizer: normalizer.transpose()?, class_names: class_names.unwrap_or_default() })
    }

    /// Writes it to `path`, in the safetensors format. A file that is there is replaced when the new one is complete and on the
    /// disk, or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder does not exist, cannot be written or is full.
    pub fn save(&self, path: &Path) -> Result<()> {
        save(path, &self.network, self.normalizer.as_ref(), &self.class_names)
    }

    /// What turns pixels into the network's input; `path` is where it was read from.
    ///
    /// # Errors
    /// [`Error::Data`] if that is not known.
    pub fn normalizer(&self, path: &Path) -> Result<&Normalizer> {
        self.normalizer.as_ref().ok_or_else(|| {
            let problem = "holds a network alone, without what turns pixels into its input";
            Error::data(
                path,
                problem,
                "give a checkpoint, which `gemmnet train` saves, or import it with --mean and --std",
            )
        })
    }

    /// Writes it as an ONNX file that computes `scores` `(batch, classes)` of `images` `(batch, C, H, W)`, all `f32`, and for
    /// batches of any size. With `pixels` the images are pixels as in the data, which the graph normalises; else they are
    /// normalised already. Class names and notation are in its metadata, under `class_names` (JSON) and `notation`.
    ///
    /// # Errors
    /// [`Error::Io`] as [`Model::save`]; [`Error::Invalid`] if pixels are asked for and what normalises them is not known, or if
    /// a layer has no ONNX operators.
    pub fn save_onnx(&self, path: &Path, pixels: bool) -> Result<()> {
        let scaling = match &self.normalizer {
            Some(normalizer) if pixels => Some(Scaling { mean: normalizer.mean(), scale: normalizer.scale() }),
            None if pixels => {
                let problem = "the file holds a network alone, without what turns pixels into its input";
                return Err(Error::invalid("ONNX export", problem, "export it for normalised images, or a checkpoint"));
            }
            _ => None,
        };
        let names = serde_json::to_string(&self.class_names).expect("text has a JSON form");
        let metadata = [("class_names", names), ("notation", self.network.spec().to_string())];
        replace(path, &onnx::encode(&self.network, scaling, &metadata)?)
    }
}

/// [`Model::save`] of one in its parts.
pub(super) fn save<T: Element>(
    path: &Path,
    network: &Network<T>,
    normalizer: Option<&Normalizer>,
    class_names: &[String],
) -> Result<()> {
    let mut tensors = file::tensors(network);
    if let Some(normalizer) = normalizer {
        push_normalizer(normalizer, &mut tensors);
    }
    let contents = Contents { header: Header::new(network), class_names, normalized: normalizer.is_some() };
    tensors.save(path, serde_json::to_string(&contents).expect("plain data has a JSON form"))
}

/// What normalises images of size `dim`.
pub(super) fn read_normalizer(archive: &Archive<'_>, dim: [usize; 3]) -> Result<Normalizer> {
    let mean = archive.vector("normalizer.mean", &dim)?;
    let scale = archive.vector("normalizer.scale", &dim[..1])?;
    Normalizer::new(dim, mean, scale).map_err(|e| archive.fault(format!("cannot normalise images ({e})")))
}

pub(super) fn push_normalizer<'a>(normalizer: &'a Normalizer, tensors: &mut Tensors<'a>) {
    tensors.push("normalizer.mean".into(), &normalizer.dim(), normalizer.mean());
    tensors.push("normalizer.scale".into(), &normalizer.dim()[..1], normalizer.scale());
}
