//! Level 4. Named tensors in files, and files that appear complete or not at all.
//!
//! The files are in the safetensors format, which many programs read. What they mean is one entry of JSON in their metadata.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorView, serialize};
use tempfile::NamedTempFile;

use crate::element::{Element, Kind};
use crate::error::{Error, Result};
use crate::params::{Param, Params};

/// The key of our entry in the metadata.
const KEY: &str = "gemmnet";

/// What to do about a file that was ours and is no longer whole.
pub(crate) const RESTORE: &str = "restore it from a copy, or train again";

fn dtype<T: Element>() -> Dtype {
    match T::KIND {
        Kind::F32 => Dtype::F32,
        Kind::F64 => Dtype::F64,
    }
}

/// Named tensors on their way into a file.
#[derive(Debug, Default)]
pub(crate) struct Tensors<'a>(Vec<(String, TensorView<'a>)>);

impl<'a> Tensors<'a> {
    /// # Panics
    /// If there are not as many values as the shape says.
    pub(crate) fn push<T: Element>(&mut self, name: String, shape: &[usize], values: &'a [T]) {
        let view = TensorView::new(dtype::<T>(), shape.to_vec(), bytemuck::cast_slice(values));
        self.0.push((name, view.expect("values have the length of their shape")));
    }

    /// Every parameter, under its name after `prefix`.
    pub(crate) fn push_params<T: Element>(&mut self, prefix: &str, params: &'a Params<T>) {
        for param in params.iter() {
            self.push(format!("{prefix}{}", param.name), &param.shape, &params.values()[param.range.clone()]);
        }
    }

    /// Writes them to `path` with this JSON. A file that is there is replaced when the new one is complete and on the disk,
    /// or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder does not exist, cannot be written or is full.
    pub(crate) fn save(self, path: &Path, json: String) -> Result<()> {
        // One entry only: the order of several would change from run to run.
        let bytes = serialize(self.0, Some(HashMap::from([(KEY.to_string(), json)])))
            .expect("tensors fit their shapes, and the header is below safetensors' limit of 100 MB");
        replace(path, &bytes)
    }
}

/// The bytes of a file that [`Tensors::save`] wrote.
///
/// # Errors
/// [`Error::Io`] if it cannot be read.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path)
        .map_err(|e| Error::io("read", path, e, "give the path of a file that `gemmnet train` or the library saved"))
}

/// The tensors of a file. Nothing is allocated for what its header says before the file is known to hold it.
#[derive(Debug)]
pub(crate) struct Archive<'a> {
    path: &'a Path,
    file: SafeTensors<'a>,
    json: String,
}

impl<'a> Archive<'a> {
    /// `bytes` are those of the file at `path`.
    ///
    /// # Errors
    /// [`Error::Data`] if they are damaged or another program's.
    pub(crate) fn open(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let foreign = |problem: String| {
            Error::data(
                path,
                problem,
                "give a file that gemmnet saved, such as by `gemmnet train`, or restore it from a copy",
            )
        };
        let damaged = |e| foreign(format!("is not a checkpoint, or is cut off or damaged ({e})"));
        let (_, header): (_, Metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let json = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY)).cloned();
        let json = json.ok_or_else(|| foreign("is a safetensors file, but no checkpoint of gemmnet".into()))?;
        Ok(Archive { path, file: SafeTensors::deserialize(bytes).map_err(damaged)?, json })
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> &'a Path {
        self.path
    }

    /// What its metadata say.
    pub(crate) fn json(&self) -> &str {
        &self.json
    }

    /// That something is wrong with the file.
    pub(crate) fn fault(&self, problem: String) -> Error {
        Error::data(self.path, problem, RESTORE)
    }

    /// The bytes of a tensor that has this shape and type.
    fn bytes<T: Element>(&self, name: &str, shape: &[usize]) -> Result<&[u8]> {
        let tensor = self.file.tensor(name).map_err(|_| self.fault(format!("has no tensor `{name}`")))?;
        if (tensor.dtype(), tensor.shape()) != (dtype::<T>(), shape) {
            return Err(self.fault(format!(
                "has a tensor `{name}` of {} {:?}, needed is one of {} {shape:?}",
                tensor.dtype(),
                tensor.shape(),
                dtype::<T>()
            )));
        }
        Ok(tensor.data())
    }

    /// Copies a tensor to `values`, which has the length of `shape`.
    ///
    /// # Errors
    /// [`Error::Data`] if the file has none of this name, shape and type.
    pub(crate) fn read<T: Element>(&self, name: &str, shape: &[usize], values: &mut [T]) -> Result<()> {
        // As bytes: the file does not align its numbers.
        bytemuck::cast_slice_mut(values).copy_from_slice(self.bytes::<T>(name, shape)?);
        Ok(())
    }

    /// The values of a tensor.
    ///
    /// # Errors
    /// As [`Archive::read`].
    pub(crate) fn vector<T: Element>(&self, name: &str, shape: &[usize]) -> Result<Vec<T>> {
        // The file holds as many, so they are no more than it is long.
        let bytes = self.bytes::<T>(name, shape)?;
        let mut values = vec![T::zero(); bytes.len() / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(bytes);
        Ok(values)
    }

    /// Whether the file has all these parameters, under their names.
    ///
    /// # Errors
    /// As [`Archive::read`].
    pub(crate) fn check_params<'p, T: Element>(&self, mut params: impl Iterator<Item = &'p Param>) -> Result<()> {
        params.try_for_each(|param| self.bytes::<T>(&param.name, &param.shape).map(drop))
    }

    /// Reads every parameter.
    ///
    /// # Errors
    /// As [`Archive::read`].
    pub(crate) fn read_params<T: Element>(&self, prefix: &str, params: &mut Params<T>) -> Result<()> {
        let count = params.iter().len();
        for index in 0..count {
            let param = params.param(index);
            let (name, shape) = (format!("{prefix}{}", param.name), param.shape.clone());
            self.read(&name, &shape, params.slice_mut(index))?;
        }
        Ok(())
    }
}

/// Writes `bytes` to `path`. A file that is there is replaced when the new one is complete and on the disk, or not at all.
///
/// # Errors
/// [`Error::Io`] if the folder does not exist, cannot be written or is full.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    replace_file(path, bytes).map_err(|e| {
        let megabytes = bytes.len().div_ceil(1_000_000);
        let fix = format!("choose a folder that exists and can be written, with {megabytes} MB of free space");
        Error::io("write", path, e, fix)
    })
}

/// Writes beside `path`, waits for the disk, then renames.
fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    write_beside(folder, bytes)?.persist(path)?;
    // The name has to reach the disk too.
    #[cfg(unix)]
    fs::File::open(folder)?.sync_all()?;
    Ok(())
}

/// A complete file in `folder`, on the disk, without a name that lasts: it vanishes unless it is given one.
pub(crate) fn write_beside(folder: &Path, bytes: &[u8]) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    // As a file that was created under its own name: the user's umask decides who may read it.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    Ok(file)
}
