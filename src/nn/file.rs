//! Level 5. A network in a file, with or without the training around it.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::init::Init;
use super::network::Network;
use super::notation::NetworkSpec;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::store::{Archive, Tensors, read};

/// Version of the files that are written. It rises when older programs can no longer read them; this one reads all so far.
const FORMAT: u32 = 3;

/// What the metadata of every file with a network say about it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Header {
    /// 1 to [`FORMAT`].
    pub(crate) format: u32,
    dtype: String,
    network: NetworkSpec,
    input: [usize; 3],
}

/// As much of [`Header`] as every version has.
#[derive(Deserialize)]
struct Version {
    format: u32,
    dtype: String,
}

impl Version {
    /// Whether this program reads the file, as a network of `T`.
    fn check<T: Element>(archive: &Archive<'_>) -> Result<()> {
        let Version { format, dtype } = parse(archive)?;
        if !(1..=FORMAT).contains(&format) {
            let problem = format!("is a checkpoint of format {format}, this program reads formats 1 to {FORMAT}");
            let fix = "use the version of gemmnet that wrote it, or train again";
            return Err(Error::data(archive.path(), problem, fix));
        }
        if dtype != T::NAME {
            let problem = format!("holds a network of {dtype} numbers, asked for was one of {}", T::NAME);
            return Err(Error::data(archive.path(), problem, format!("load it as {dtype}")));
        }
        Ok(())
    }
}

/// What the metadata say.
///
/// # Errors
/// [`Error::Data`] if they do not say it.
pub(crate) fn parse<M: DeserializeOwned>(archive: &Archive<'_>) -> Result<M> {
    serde_json::from_str(archive.json()).map_err(|e| archive.fault(format!("has metadata that cannot be read ({e})")))
}

impl Header {
    pub(crate) fn new<T: Element>(network: &Network<T>) -> Self {
        Header { format: FORMAT, dtype: T::NAME.into(), network: network.spec().clone(), input: network.input() }
    }

    /// Of a file that can be read, for a network of `T`.
    ///
    /// # Errors
    /// [`Error::Data`] if it is a newer program's, one of another element type, or damaged.
    pub(crate) fn read<T: Element>(archive: &Archive<'_>) -> Result<Self> {
        Version::check::<T>(archive)?;
        parse(archive)
    }

    /// The network with its parameters and statistics.
    ///
    /// # Errors
    /// [`Error::Data`] if the file does not have them, or if no network is like that.
    pub(crate) fn network<T: Element>(&self, archive: &Archive<'_>) -> Result<Network<T>> {
        let impossible = |e| archive.fault(format!("describes a network that cannot be ({e})"));
        // Before memory is taken for them.
        for layout in Network::<T>::layouts(&self.network, self.input).map_err(impossible)? {
            archive.check_params::<T>(layout.iter())?;
        }
        // The initial weights are all overwritten.
        let mut network =
            Network::new(&self.network, self.input, Init::Gaussian { std: 0.0 }, 0).map_err(impossible)?;
        archive.read_params("", network.params_mut())?;
        archive.read_params("", network.statistics_mut())?;
        Ok(network)
    }
}

/// A network's tensors.
pub(crate) fn tensors<T: Element>(network: &Network<T>) -> Tensors<'_> {
    let mut tensors = Tensors::default();
    tensors.push_params("", network.params());
    tensors.push_params("", network.statistics());
    tensors
}

impl<T: Element> Network<T> {
    /// Writes the network to a file in the safetensors format: every parameter and running statistic under its name, and
    /// the notation. A file that is there is replaced when the new one is complete and on the disk, or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder does not exist, cannot be written or is full.
    pub fn save(&self, path: &Path) -> Result<()> {
        tensors(self).save(path, serde_json::to_string(&Header::new(self)).expect("plain data has a JSON form"))
    }

    /// Reads a network that [`Network::save`] wrote, or the one that a checkpoint keeps.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::Data`] if it is damaged, none of ours, one of a newer program, or
    /// one of another element type.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = read(path)?;
        let archive = Archive::open(path, &bytes)?;
        Header::read::<T>(&archive)?.network(&archive)
    }

    /// Reads parameters and running statistics from a file of [`Network::save`] into this network, by their names. For a
    /// network with a [layer](crate::nn::layer) of one's own, whose notation alone does not say how to make it.
    ///
    /// # Errors
    /// As [`Network::load`], and [`Error::Data`] if the file lacks one of this network's. The network is then as it was.
    pub fn load_values(&mut self, path: &Path) -> Result<()> {
        let bytes = read(path)?;
        let archive = Archive::open(path, &bytes)?;
        Version::check::<T>(&archive)?;
        archive.check_params::<T>(self.params().iter())?;
        archive.check_params::<T>(self.statistics().iter())?;
        archive.read_params("", self.params_mut())?;
        archive.read_params("", self.statistics_mut())
    }
}
