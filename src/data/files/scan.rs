//! Level 5. Which pictures of which classes lie in a folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};
use walkdir::WalkDir;

use super::{is_hidden, names};
use crate::error::{Error, Result};

/// Endings of the files that are taken, in lower case.
const ENDINGS: [&str; 5] = ["jpg", "jpeg", "png", "webp", "bmp"];
/// The folders of each split, of which the first is made.
const PARTS: [&[&str]; 3] = [&["train"], &["val", "valid", "validation"], &["test"]];
/// Folders above the pictures, below the class: more are rather a mistake, or a disk.
const DEEPEST: usize = 32;

/// The pictures of a folder, in an order that depends on nothing but their names.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) classes: Vec<String>,
    /// Split by split, in each class by class, in each by path.
    pub(super) pictures: Vec<Picture>,
    /// Files that are no pictures by their names, and the first of them.
    pub(super) others: (usize, Option<PathBuf>),
    /// Of paths, sizes and times.
    pub(super) fingerprint: [u8; 32],
}

/// A picture that was found.
#[derive(Debug)]
pub(super) struct Picture {
    /// Below the folder.
    pub(super) path: PathBuf,
    pub(super) class: usize,
    /// 0 for training, or all; 1 for validation; 2 for tests.
    pub(super) part: usize,
    size: u64,
    /// Since 1970, in nanoseconds.
    modified: u128,
}

impl Picture {
    /// By which pictures are drawn for a split: it depends on the path alone, so that a picture more or less moves no others.
    pub(super) fn key(&self) -> u64 {
        let digest = Sha256::digest(portable(&self.path));
        u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"))
    }
}

/// The bytes of a path, the same on all systems.
fn portable(path: &Path) -> Vec<u8> {
    path.iter().map(|name| name.as_encoded_bytes()).collect::<Vec<_>>().join(&b'/')
}

/// Whether there are folders in `dir`.
pub(super) fn is_there(dir: &Path) -> Result<bool> {
    Ok(!folders(dir)?.is_empty() || names(dir)?.iter().any(|name| is_picture(Path::new(name))))
}

/// The names of the folders in `dir`, sorted by code point.
fn folders(dir: &Path) -> Result<Vec<String>> {
    let folder = |name: &std::ffi::OsString| fs::metadata(dir.join(name)).is_ok_and(|kind| kind.is_dir());
    let all = names(dir)?.into_iter().filter(folder);
    all.map(|name| {
        name.into_string().map_err(|name| {
            Error::data(dir.join(name), "has a name that is not Unicode", "rename the folder: it names a class")
        })
    })
    .collect()
}

fn is_picture(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ENDINGS.iter().any(|known| ending.eq_ignore_ascii_case(known)))
}

/// The folder of each split in `dir`, if it has splits: folders of these names and no others.
fn parts(dir: &Path, folders: &[String]) -> Result<Option<[Option<PathBuf>; 3]>> {
    let is_part = |name: &String| PARTS.iter().flat_map(|names| names.iter()).any(|part| name == part);
    if !folders.iter().any(|name| name == PARTS[0][0]) || !folders.iter().all(is_part) {
        return Ok(None);
    }
    let mut found = [const { None }; 3];
    for (names, found) in PARTS.iter().zip(&mut found) {
        let mut there = names.iter().filter(|name| folders.iter().any(|folder| folder == *name));
        *found = there.next().map(|name| dir.join(name));
        if let Some(second) = there.next() {
            let problem = format!("holds both {} and {second}", names[0]);
            return Err(Error::data(dir, problem, "keep one folder for validation"));
        }
    }
    Ok(Some(found))
}

/// Finds all pictures in `dir`, as torchvision's ImageFolder does: `class/**/picture`, or with `train`, `val` and `test` above
/// the classes. Files and folders whose names begin with a dot are left out.
pub(super) fn scan(dir: &Path) -> Result<Listing> {
    let folders = folders(dir)?;
    let parts = parts(dir, &folders)?.unwrap_or_else(|| [Some(dir.to_owned()), None, None]);
    let mut listing = Listing { classes: Vec::new(), pictures: Vec::new(), others: (0, None), fingerprint: [0; 32] };
    for (part, root) in parts.iter().enumerate() {
        let Some(root) = root else { continue };
        let classes = self::folders(root)?;
        if part == 0 {
            if classes.is_empty() {
                let fix = "put the pictures of each class into a folder with the class's name";
                return Err(Error::data(root, "holds no folders of classes", fix));
            }
            listing.classes = classes.clone();
        }
        for name in classes {
            let Some(class) = listing.classes.iter().position(|known| *known == name) else {
                let fix = "give it training pictures, or remove the folder";
                return Err(Error::data(root.join(name), "is of a class without training pictures", fix));
            };
            let before = listing.pictures.len();
            add(dir, &root.join(&name), class, part, &mut listing)?;
            if part == 0 && listing.pictures.len() == before {
                let fix = "add some, or remove the folder";
                return Err(Error::data(root.join(name), "has no JPEG, PNG, WebP or BMP pictures", fix));
            }
        }
    }
    listing.pictures.sort_by_cached_key(|picture| (picture.part, picture.class, portable(&picture.path)));
    let mut digest = Sha256::new();
    for Picture { path, size, modified, .. } in &listing.pictures {
        digest.update(portable(path));
        digest.update([0]);
        digest.update(size.to_le_bytes());
        digest.update(modified.to_le_bytes());
    }
    listing.fingerprint = digest.finalize().into();
    Ok(listing)
}

/// Adds the pictures below `folder`.
fn add(dir: &Path, folder: &Path, class: usize, part: usize, listing: &mut Listing) -> Result<()> {
    let walk = WalkDir::new(folder).follow_links(true).min_depth(1).max_depth(DEEPEST);
    for entry in walk.into_iter().filter_entry(|entry| !is_hidden(entry.file_name())) {
        let fix = "mend the file or the link, or remove it";
        let entry = entry.map_err(|e| Error::data(e.path().unwrap_or(folder), format!("cannot be read ({e})"), fix))?;
        if entry.file_type().is_dir() {
            continue;
        }
        let path = entry.path().strip_prefix(dir).unwrap_or(entry.path()).to_owned();
        if !is_picture(&path) || !entry.file_type().is_file() {
            listing.others.0 += 1;
            // The first by name, whatever the order in which they come.
            if listing.others.1.as_ref().is_none_or(|first| path < *first) {
                listing.others.1 = Some(path);
            }
            continue;
        }
        let about = entry.metadata().map_err(|e| Error::io("read", entry.path(), e.into(), fix))?;
        let modified = about.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let modified = modified.map_or(0, |time| time.as_nanos());
        listing.pictures.push(Picture { path, class, part, size: about.len(), modified });
    }
    Ok(())
}
