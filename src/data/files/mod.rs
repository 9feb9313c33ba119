//! Level 5. Data sets in files other than CIFAR-10's, and which kind a folder holds.
//!
//! | format | recognised by | splits |
//! | --- | --- | --- |
//! | CIFAR-10's binary files | one of its six batches | [`Cifar10`](super::Cifar10)'s |
//! | CIFAR-100's binary files | `train.bin` or `test.bin` | the last 2 % of `train.bin` are for validation |
//! | IDX, as MNIST's | `train-images-idx3-ubyte`, perhaps with a prefix or `.gz` | tests are `t10k-` or `test-` files |
//! | NumPy arrays | `x_train.npy`, or one `.npz` file | `x_val`, `x_test` and their labels |
//! | a folder of pictures for each class | folders | `train`, `val` and `test` above the classes |
//!
//! Where there is no validation split, a tenth of the training images of each class is held out, and another tenth for
//! tests if there are none either. Which ones depends on the images' names or places alone, not on a seed.

pub mod arrays;
pub mod cifar100;
pub mod decode;
pub mod folder;
pub mod idx;
mod scan;
mod stored;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

pub use stored::Stored;

use crate::data::cifar10;
use crate::error::{Error, Result};

/// What a folder may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// CIFAR-10's binary batches: [`Cifar10::open`](super::Cifar10::open).
    Cifar10,
    /// CIFAR-100's binary files: [`cifar100::open`].
    Cifar100,
    /// Files such as MNIST's: [`idx::open`].
    Idx,
    /// `.npy` files or a `.npz` file: [`arrays::open`].
    Arrays,
    /// Pictures, a folder for each class: [`folder::open`].
    Pictures,
}

impl Format {
    /// What `dir` holds. Whether it is whole is for those who open it to say.
    ///
    /// # Errors
    /// [`Error::Data`] if it is nothing that is known, [`Error::Io`] if it cannot be read.
    pub fn of(dir: &Path) -> Result<Self> {
        const GIVE: &str = "give the folder with the data, or run `gemmnet data fetch` for CIFAR-10";
        match fs::metadata(dir) {
            Ok(kind) if kind.is_dir() => {}
            Ok(_) => return Err(Error::data(dir, "is not a folder", "give the folder that it lies in")),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::data(dir, "there is no such folder", GIVE));
            }
            Err(e) => return Err(Error::io("read", dir, e, GIVE)),
        }
        let of_python = dir.join("data_batch_1").exists() || dir.join("cifar-10-batches-py").exists();
        if cifar10::looks_like_cifar10(dir) || of_python {
            return Ok(Format::Cifar10);
        }
        if cifar100::is_there(dir) {
            return Ok(Format::Cifar100);
        }
        if idx::is_there(dir)? {
            return Ok(Format::Idx);
        }
        if arrays::is_there(dir)? {
            return Ok(Format::Arrays);
        }
        if scan::is_there(dir)? {
            return Ok(Format::Pictures);
        }
        Err(Error::data(
            dir,
            "holds no data that is known",
            "give a folder with a folder of JPEG, PNG, WebP or BMP pictures for each class, with CIFAR-10's or CIFAR-100's .bin \
             files, with train-images-idx3-ubyte and its siblings, or with x_train.npy and y_train.npy",
        ))
    }

    /// In words.
    pub fn describe(self) -> &'static str {
        match self {
            Format::Cifar10 => "CIFAR-10's binary files",
            Format::Cifar100 => "CIFAR-100's binary files",
            Format::Idx => "IDX files",
            Format::Arrays => "NumPy arrays",
            Format::Pictures => "a folder of pictures for each class",
        }
    }
}

/// Names in `dir`, sorted, so that nothing depends on the order in which the system lists them. Hidden ones are left out.
fn names(dir: &Path) -> Result<Vec<OsString>> {
    let unreadable = |e| Error::io("read", dir, e, "check the permissions of the folder and the disk");
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        if !is_hidden(&name) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Whether programs leave things of this name alone, as `.DS_Store` or `.ipynb_checkpoints`.
fn is_hidden(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().first() == Some(&b'.')
}

/// The file with names of classes beside IDX files and arrays, one a line.
const CLASS_NAMES: &str = "class_names.txt";

/// The names of `classes` classes: those in the file `name`, or their numbers if there is no such file.
fn class_names(dir: &Path, name: &str, classes: usize) -> Result<Vec<String>> {
    let path = dir.join(name);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Ok((0..classes).map(|class| class.to_string()).collect());
        }
        Err(e) => return Err(Error::io("read", path, e, "make it a text file with a name on each line, or remove it")),
    };
    let names = names_in(&text);
    if names.len() < classes {
        let problem = format!("names {} classes, the labels need {classes}", names.len());
        return Err(Error::data(path, problem, "write a name on each line, or remove the file"));
    }
    Ok(names)
}

/// The names in a text with one a line.
pub(crate) fn names_in(text: &str) -> Vec<String> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from).collect()
}

/// `dir`, or the first of these folders in it that is there.
fn or_inner(dir: &Path, inner: &[&str]) -> PathBuf {
    inner.iter().map(|name| dir.join(name)).find(|path| path.is_dir()).unwrap_or_else(|| dir.to_owned())
}
