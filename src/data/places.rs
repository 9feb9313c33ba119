//! Level 5. Where data lies on this machine.

use std::path::{Path, PathBuf};

use etcetera::BaseStrategy;

use super::cifar10;
use crate::error::{Error, Result};

/// The environment variable with the folder for data.
pub const DATA_DIR_VARIABLE: &str = "GEMMNET_DATA_DIR";

/// Where downloaded data goes: `GEMMNET_DATA_DIR` if set, else `gemmnet` in the user's cache folder
/// (`$XDG_CACHE_HOME` or `~/.cache`), else, for a user without a home, `data`.
pub fn default_data_dir() -> PathBuf {
    from_environment().or_else(in_cache).unwrap_or_else(|| PathBuf::from("data"))
}

/// The folder with CIFAR-10's batches: `explicit` if given, else the first that holds any of `GEMMNET_DATA_DIR`, `data`
/// and `gemmnet` in the user's cache folder. Whether the batches are whole is for
/// [`Cifar10::open`](super::Cifar10::open) to say.
///
/// # Errors
/// [`Error::Data`] if none does, with what to do.
pub fn find_cifar10(explicit: Option<&Path>) -> Result<PathBuf> {
    match explicit {
        Some(dir) => Ok(dir.to_path_buf()),
        None => first_with_batches(
            &[from_environment(), Some(PathBuf::from("data")), in_cache()].into_iter().flatten().collect::<Vec<_>>(),
        ),
    }
}

fn first_with_batches(candidates: &[PathBuf]) -> Result<PathBuf> {
    candidates.iter().find(|dir| cifar10::looks_like_cifar10(dir)).cloned().ok_or_else(|| {
        let looked: Vec<_> = candidates.iter().map(|dir| dir.display().to_string()).collect();
        Error::data(
            cifar10::FOLDER,
            format!("not found (looked in {})", looked.join(", ")),
            "run `gemmnet data fetch`, or name the folder with the six .bin files with --data-dir",
        )
    })
}

fn from_environment() -> Option<PathBuf> {
    std::env::var_os(DATA_DIR_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn in_cache() -> Option<PathBuf> {
    etcetera::choose_base_strategy().ok().map(|places| places.cache_dir().join("gemmnet"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_folder_with_batches_wins() {
        let root = tempfile::tempdir().unwrap();
        let dirs = ["empty", "inner", "flat"].map(|name| root.path().join(name));
        for dir in [&dirs[0], &dirs[1].join(cifar10::FOLDER), &dirs[2]] {
            std::fs::create_dir_all(dir).unwrap();
        }
        let message = first_with_batches(&dirs).unwrap_err().to_string();
        for part in ["empty, ", "flat)", "gemmnet data fetch", "--data-dir"] {
            assert!(message.contains(part), "{message}");
        }
        std::fs::write(dirs[2].join(cifar10::TEST_BATCH), []).unwrap();
        assert_eq!(first_with_batches(&dirs).unwrap(), dirs[2]);
        std::fs::write(dirs[1].join(cifar10::FOLDER).join(cifar10::TEST_BATCH), []).unwrap();
        assert_eq!(first_with_batches(&dirs).unwrap(), dirs[1]);
        assert_eq!(find_cifar10(Some(&dirs[0])).unwrap(), dirs[0], "what was asked for is not second-guessed");
    }
}
