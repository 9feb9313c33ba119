//! Level 5. Files mapped into memory.

use std::fs::{File, TryLockError};
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// The bytes of a file, mapped read only: they are read from the disk when they are first touched, and never copied.
///
/// # What is promised, and what is not
/// While the map lives, the file carries a shared advisory lock. A program that asks for an exclusive lock before it
/// writes waits, or is told; on Windows nobody can write at all. The length is compared once more after mapping, so a
/// file that grew or shrank while it was opened is an error. Replacing the file by its name (writing another one and
/// renaming it) is always safe: the map keeps the old one.
///
/// Where locks are advisory, a program that does not ask for them can still write, and a network file system may know no
/// locks. If such a program shortens the file, touching a lost page ends this process with SIGBUS. If it overwrites
/// bytes, they change under a `&[u8]`, which the rules of the language forbid: nothing here takes them for anything but
/// numbers, and whoever takes one for an index checks it then, but the compiler may assume that they stay. So: do not
/// change a file in place while it is mapped.
#[derive(Debug)]
pub(super) struct Map {
    bytes: Mmap,
    /// Holds the lock.
    _file: File,
}

impl Map {
    /// Maps `path`, a regular file that is not empty. `fix` says what to do with one that is none.
    pub(super) fn open(path: &Path, fix: &str) -> Result<Self> {
        let unreadable = |e| Error::io("read", path, e, format!("check its permissions and the disk, or {fix}"));
        // Before it is opened: opening a named pipe would wait for ever.
        let kind = std::fs::metadata(path).map_err(unreadable)?;
        if !kind.is_file() {
            let what = if kind.is_dir() { "is a folder, not a file" } else { "is not a regular file" };
            return Err(Error::data(path, what, format!("remove it and {fix}")));
        }
        let file = File::open(path).map_err(unreadable)?;
        // Another failure than this one is a file system without locks.
        if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
            return Err(Error::data(path, "is being written by another program", "wait until that has finished"));
        }
        let len = || file.metadata().map(|metadata| metadata.len()).map_err(unreadable);
        if len()? == 0 {
            return Err(Error::data(path, "is empty", fix));
        }
        // SAFETY: the file is opened read only and nothing here writes to the map; that nobody else does is what the
        // lock asks for, and what the documentation above leaves to the user where a lock does not help.
        let bytes = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        if len()? != bytes.len() as u64 {
            return Err(Error::data(path, "changed its length while it was opened", "wait until it is complete"));
        }
        Ok(Map { bytes, _file: file })
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The bytes of a file: mapped, or in memory where they are made or unpacked.
#[derive(Debug)]
pub(super) enum Bytes {
    Mapped(Map),
    Owned(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_locked_while_it_is_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("numbers");
        std::fs::write(&path, [1, 2, 3]).unwrap();
        let other = File::options().read(true).write(true).open(&path).unwrap();
        if other.lock().is_err() {
            eprintln!("skipped: no locks in {}", dir.path().display());
            return;
        }
        let message = Map::open(&path, "fetch it").unwrap_err().to_string();
        assert!(message.contains("numbers: is being written") && message.contains("wait"), "{message}");
        other.unlock().unwrap();

        let map = Map::open(&path, "fetch it").unwrap();
        assert_eq!(map[..], [1, 2, 3]);
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)), "a writer that asks is told");
        let second = Map::open(&path, "fetch it").unwrap();
        drop(map);
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)), "readers share the lock");
        drop(second);
        other.try_lock().unwrap();
    }

    #[test]
    fn a_file_that_is_replaced_stays_mapped_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("numbers");
        std::fs::write(&path, [1; 5000]).unwrap();
        let map = Map::open(&path, "fetch it").unwrap();
        std::fs::write(dir.path().join("new"), [2]).unwrap();
        std::fs::rename(dir.path().join("new"), &path).unwrap();
        assert_eq!(map[..], [1; 5000]);
        assert_eq!(Map::open(&path, "fetch it").unwrap()[..], [2]);
    }
}
