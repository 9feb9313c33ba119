//! Level 5. Pictures in a folder for each class, decoded once and kept as arrays.
//!
//! What is kept, in a cache folder, is `images.npy` (`uint8`, `(N, C, H, W)`), `labels.npy` (`int64`, `(N)`) and `meta.json`,
//! in a folder called by a fingerprint of the pictures' paths, sizes and times, of the size they are resized to and of what
//! decodes them. It appears when it is complete, or not at all; when a picture changes another one takes its place.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ndarray::Array1;
use ndarray_npy::WriteNpyExt;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::arrays;
use super::decode::{DECODER, RESIZE, dimensions, read_picture};
use super::scan::{Listing, scan};
use super::stored::{Stored, splits};
use crate::data::map::{Bytes, Map};
use crate::error::{Error, Result};
use crate::parallel::{current_threads, for_each_chunk_mut};

/// Height and width of pictures if nothing is said, unless they are smaller.
pub const DEFAULT_SIZE: usize = 64;
/// Below this, networks see nothing.
const SMALLEST: usize = 8;
/// Above this, no network of today would end.
const LARGEST: usize = 4096;
/// Pictures whose heads are read to find their size.
const PROBED: usize = 100;
/// Pictures that a thread decodes before what all of them decoded is written.
const PER_THREAD: usize = 16;
/// Names of broken pictures in a note.
const NAMED: usize = 5;
/// Bytes of the header of `images.npy`.
const HEADER: usize = 128;
/// What a run that was killed left behind is removed after this time: another one may still be writing.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);

const IMAGES: &str = "images.npy";
const LABELS: &str = "labels.npy";
const META: &str = "meta.json";
const BUILDING: &str = "building-";

/// How pictures are to be read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Height and width; if none, 64 for both, or less if half of the pictures are smaller.
    pub size: Option<[usize; 2]>,
    /// Whether a picture that cannot be read is an error; otherwise it is left out, and a note names it.
    pub strict: bool,
}

/// How far [`open`] has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Pictures that are decoded.
    pub done: usize,
    /// All pictures.
    pub total: usize,
}

/// What `meta.json` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    folder: String,
    classes: Vec<String>,
    /// `[C, H, W]`
    dim: [usize; 3],
    /// Pictures for training, validation and tests, in this order in the arrays; all in the first if the folder has no such
    /// parts.
    parts: [usize; 3],
    resize: String,
    decoder: String,
    fingerprint: String,
    /// Pictures that cannot be read.
    broken: Vec<Broken>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Broken {
    /// Its place among all pictures, sorted.
    index: usize,
    /// What is wrong with it, in one line.
    problem: String,
}

/// The pictures in `dir`, `class/**/picture` or with `train`, `val` and `test` above the classes: coloured, of three channels.
/// They are decoded and resized by [`read_picture`], in parallel, and kept in the folder `cache`, which is made if need be;
/// those that are kept there are used if no picture has changed since. Classes are sorted by code point.
///
/// `progress` is called while pictures are decoded, not if they need not be.
///
/// # Errors
/// [`Error::Invalid`] for a size of less than 8 or more than 4096; [`Error::Data`] for a class without pictures, or if a picture is broken and
/// [`Options::strict`] is set; [`Error::Io`] if the cache cannot be written.
pub fn open(dir: &Path, options: Options, cache: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Stored> {
    let listing = scan(dir)?;
    let [height, width] = match options.size {
        Some(size) => size,
        None => [fitting_size(dir, &listing); 2],
    };
    let sizes = SMALLEST..=LARGEST;
    if !sizes.contains(&height) || !sizes.contains(&width) {
        let problem = format!("{width}x{height} pixels are too few to see anything, or too many to compute with");
        return Err(Error::invalid("image size", problem, format!("give {SMALLEST} to {LARGEST}")));
    }
    let dim = [3, height, width];
    let place = Place::of(dir, &listing, dim, cache)?;
    let kept = match place.meta() {
        Some(meta) => place.open(dir, &listing, meta, options.strict),
        None => {
            tracing::debug!(folder = %place.folder.display(), "decoding pictures: none are kept of this folder as it is");
            return place.build(dir, &listing, dim, options.strict, progress);
        }
    };
    match kept {
        // What is kept is not whole: make it anew.
        Err(ref error @ (Error::Data { ref path, .. } | Error::Io { ref path, .. }))
            if path.starts_with(&place.folder) =>
        {
            tracing::warn!(%error, "decoding pictures anew");
            let _ = fs::remove_dir_all(&place.folder);
            place.build(dir, &listing, dim, options.strict, progress)
        }
        other => other,
    }
}

/// What [`verify`] found.
#[derive(Debug)]
pub struct Report {
    /// Everything wrong with the pictures, one line each.
    pub problems: Vec<Error>,
    /// The classes, and how many whole pictures each has.
    pub counts: Vec<(String, usize)>,
}

/// Decodes all pictures in `dir`, keeps none, and lists those that are broken.
///
/// # Errors
/// [`Error::Data`] or [`Error::Io`] if the folder cannot be used at all.
pub fn verify(dir: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Report> {
    let listing = scan(dir)?;
    let mut counts: Vec<_> = listing.classes.iter().map(|name| (name.clone(), 0)).collect();
    let mut problems = Vec::new();
    decode_all(dir, &listing, [3, SMALLEST, SMALLEST], progress, &mut |index, decoded| {
        match decoded {
            Ok(_) => counts[listing.pictures[index].class].1 += 1,
            Err(problem) => problems.push(problem),
        }
        Ok(())
    })?;
    Ok(Report { problems, counts })
}

/// [`DEFAULT_SIZE`], or the shorter side of the picture in the middle, by that, if it is smaller; a multiple of 4.
fn fitting_size(dir: &Path, listing: &Listing) -> usize {
    let step = listing.pictures.len().div_ceil(PROBED).max(1);
    let probed = listing.pictures.iter().step_by(step);
    let sides = probed.filter_map(|picture| dimensions(&dir.join(&picture.path)).ok()).map(|(w, h)| w.min(h) as usize);
    let mut sides: Vec<usize> = sides.collect();
    sides.sort_unstable();
    let middle = sides.get(sides.len() / 2).copied().unwrap_or(DEFAULT_SIZE);
    (middle / 4 * 4).clamp(SMALLEST, DEFAULT_SIZE)
}

/// Decodes all pictures and hands them out in order.
fn decode_all(
    dir: &Path,
    listing: &Listing,
    dim: [usize; 3],
    progress: &mut dyn FnMut(Progress),
    take: &mut dyn FnMut(usize, Result<Vec<u8>>) -> Result<()>,
) -> Result<()> {
    let total = listing.pictures.len();
    let mut index = 0;
    for pictures in listing.pictures.chunks(PER_THREAD * current_threads()) {
        let mut decoded: Vec<Option<Result<Vec<u8>>>> = pictures.iter().map(|_| None).collect();
        for_each_chunk_mut(&mut decoded, 1, |i, slot| slot[0] = Some(read_picture(&dir.join(&pictures[i].path), dim)));
        for decoded in decoded.into_iter().flatten() {
            take(index, decoded)?;
            index += 1;
        }
        progress(Progress { done: index, total });
    }
    Ok(())
}

/// Where the arrays of a folder are kept.
struct Place {
    /// Of all that is kept of a folder in this size.
    outer: PathBuf,
    /// Of these very pictures.
    folder: PathBuf,
    fingerprint: String,
}

impl Place {
    fn of(dir: &Path, listing: &Listing, dim: [usize; 3], cache: &Path) -> Result<Self> {
        let whole = fs::canonicalize(dir).map_err(|e| Error::io("read", dir, e, "check its permissions"))?;
        let name = hex(&Sha256::digest(whole.as_os_str().as_encoded_bytes()))[..16].to_owned();
        let mut digest = Sha256::new();
        digest.update(listing.fingerprint);
        digest.update(format!("{dim:?} {RESIZE} {DECODER}"));
        let fingerprint = hex(&digest.finalize())[..32].to_owned();
        let outer = cache.join(format!("{name}-{}x{}", dim[1], dim[2]));
        Ok(Place { folder: outer.join(&fingerprint), outer, fingerprint })
    }

    /// What is kept, if it is there and ours.
    fn meta(&self) -> Option<Meta> {
        let meta: Meta = serde_json::from_slice(&fs::read(self.folder.join(META)).ok()?).ok()?;
        (meta.fingerprint == self.fingerprint).then_some(meta)
    }

    fn open(&self, dir: &Path, listing: &Listing, meta: Meta, strict: bool) -> Result<Stored> {
        const FIX: &str = "remove the folder that it lies in; it is made anew";
        let in_order = meta.broken.is_sorted_by(|one, next| one.index < next.index);
        if !in_order || meta.broken.last().is_some_and(|last| last.index >= listing.pictures.len()) {
            return Err(Error::data(self.folder.join(META), "names pictures that are not there", FIX));
        }
        if let Some(first) = meta.broken.first().filter(|_| strict) {
            return Err(refused(&dir.join(&listing.pictures[first.index].path), &first.problem));
        }
        let map = |name| Map::open(&self.folder.join(name), FIX).map(Bytes::Mapped);
        let (block, dim) = arrays::images(&self.folder.join(IMAGES), map(IMAGES)?)?;
        let labels = arrays::labels(&self.folder.join(LABELS), &map(LABELS)?)?;
        let broken: Vec<usize> = meta.broken.iter().map(|broken| broken.index).collect();
        let whole = listing.pictures.iter().enumerate().filter(|(index, _)| broken.binary_search(index).is_err());
        let keys: Vec<u64> = whole.map(|(_, picture)| picture.key()).collect();
        let n = meta.parts.iter().try_fold(0_usize, |n, &part| n.checked_add(part));
        let in_range = labels.iter().all(|&label| label < meta.classes.len());
        if n != Some(block.images)
            || labels.len() != block.images
            || keys.len() != block.images
            || dim != meta.dim
            || !in_range
        {
            return Err(Error::data(self.folder.join(META), "does not fit the arrays beside it", FIX));
        }
        let notes = notes(dir, listing, &meta);
        let splits = splits(&labels, meta.parts, |index| keys[index]);
        Ok(Stored { dim, class_names: meta.classes, blocks: vec![block], labels, splits, notes })
    }

    /// Decodes the pictures, keeps them, and removes what was kept of the folder as it was before.
    fn build(
        &self,
        dir: &Path,
        listing: &Listing,
        dim: [usize; 3],
        strict: bool,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Stored> {
        let megabytes = (listing.pictures.len() * dim.iter().product::<usize>()).div_ceil(1_000_000);
        let failed = |e| {
            let fix =
                format!("give a folder that can be written, with {megabytes} MB of free space, as GEMMNET_DATA_DIR");
            Error::io("write", &self.outer, e, fix)
        };
        fs::create_dir_all(&self.outer).map_err(failed)?;
        self.remove_all_but(None);
        let building = tempfile::Builder::new().prefix(BUILDING).tempdir_in(&self.outer).map_err(failed)?;
        let mut arrays = Writer::new(building.path()).map_err(failed)?;
        let mut parts = [0; 3];
        let mut broken = Vec::new();
        decode_all(dir, listing, dim, progress, &mut |index, decoded| {
            let picture = &listing.pictures[index];
            match decoded {
                Ok(pixels) => {
                    parts[picture.part] += 1;
                    arrays.push(&pixels, picture.class).map_err(failed)
                }
                Err(problem) if strict => Err(refused(&dir.join(&picture.path), &problem.to_string())),
                Err(problem) => {
                    broken.push(Broken { index, problem: problem.to_string() });
                    Ok(())
                }
            }
        })?;
        check_classes(dir, listing, &arrays.labels, &broken)?;
        let meta = Meta {
            folder: dir.display().to_string(),
            classes: listing.classes.clone(),
            dim,
            parts,
            resize: RESIZE.into(),
            decoder: DECODER.into(),
            fingerprint: self.fingerprint.clone(),
            broken,
        };
        arrays.finish(dim, &meta).map_err(failed)?;
        if fs::rename(building.path(), &self.folder).is_err() && self.meta().is_none() {
            // What is in its place is not whole; if it is, another run was as fast.
            let _ = fs::remove_dir_all(&self.folder);
            fs::rename(building.path(), &self.folder).map_err(failed)?;
        }
        self.remove_all_but(Some(&self.folder));
        self.open(dir, listing, meta, strict)
    }

    /// Removes what is kept of the folder as it was, and what is left of runs that were killed. It may stay: it is only in
    /// the way.
    fn remove_all_but(&self, keep: Option<&Path>) {
        for entry in fs::read_dir(&self.outer).into_iter().flatten().flatten() {
            let building = entry.file_name().as_encoded_bytes().starts_with(BUILDING.as_bytes());
            let age = || entry.metadata().and_then(|about| about.modified()).ok().and_then(|time| time.elapsed().ok());
            let stale = if building {
                age().is_some_and(|age| age > STALE)
            } else {
                keep.is_some_and(|keep| entry.path() != keep)
            };
            if stale {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// The arrays as they are written.
struct Writer {
    folder: PathBuf,
    images: BufWriter<File>,
    labels: Vec<i64>,
}

impl Writer {
    fn new(folder: &Path) -> io::Result<Self> {
        let mut images = BufWriter::new(File::create(folder.join(IMAGES))?);
        // How many there are is known in the end.
        images.write_all(&[0; HEADER])?;
        Ok(Writer { folder: folder.to_owned(), images, labels: Vec::new() })
    }

    fn push(&mut self, pixels: &[u8], class: usize) -> io::Result<()> {
        self.labels.push(class as i64);
        self.images.write_all(pixels)
    }

    fn finish(self, [c, h, w]: [usize; 3], meta: &Meta) -> io::Result<()> {
        let mut images = self.images.into_inner().map_err(io::IntoInnerError::into_error)?;
        let shape = (self.labels.len(), c, h, w);
        let text = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape:?}, }}");
        // The magic, version 1.0, the length of what follows, and the text, filled up by spaces to a line.
        let header = [b"\x93NUMPY\x01\x00", &((HEADER - 10) as u16).to_le_bytes()[..]].concat();
        images.seek(SeekFrom::Start(0))?;
        images.write_all(&header)?;
        images.write_all(format!("{text:<width$}\n", width = HEADER - 11).as_bytes())?;
        images.sync_all()?;
        let mut labels = BufWriter::new(File::create(self.folder.join(LABELS))?);
        Array1::from(self.labels).write_npy(&mut labels).map_err(io::Error::other)?;
        labels.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        let mut file = File::create(self.folder.join(META))?;
        file.write_all(serde_json::to_string_pretty(meta).map_err(io::Error::other)?.as_bytes())?;
        file.sync_all()
    }
}

/// Whether every class has a picture for training that can be read.
fn check_classes(dir: &Path, listing: &Listing, labels: &[i64], broken: &[Broken]) -> Result<()> {
    for (class, name) in listing.classes.iter().enumerate() {
        if !labels.contains(&(class as i64)) {
            let reason = broken.iter().find(|broken| listing.pictures[broken.index].class == class);
            let reason = reason.map_or(String::new(), |broken| format!(", the first: {}", broken.problem));
            let problem = format!("has no picture of the class `{name}` that can be read{reason}");
            return Err(Error::data(dir, problem, "mend some, or remove the folder of the class"));
        }
    }
    Ok(())
}

/// The error of a broken picture where all have to be whole; `problem` has its path and a fix already.
fn refused(path: &Path, problem: &str) -> Error {
    let name = path.display().to_string();
    let reason = problem.split("; ").next().unwrap_or(problem);
    let reason = reason.strip_prefix(&format!("{name}: ")).unwrap_or(reason);
    Error::data(path, reason, "replace or remove it, or leave --strict out: then it is not used")
}

fn notes(dir: &Path, listing: &Listing, meta: &Meta) -> Vec<String> {
    let mut notes = Vec::new();
    let some = |names: &[String], n: usize| {
        let more = if n > names.len() { format!(" and {} more", n - names.len()) } else { String::new() };
        format!("{}{more}", names.join(", "))
    };
    if !meta.broken.is_empty() {
        let path = |broken: &Broken| listing.pictures[broken.index].path.display().to_string();
        let named: Vec<_> = meta.broken.iter().take(NAMED).map(path).collect();
        let n = meta.broken.len();
        notes.push(format!(
            "{}: {n} of {} pictures cannot be read and are left out: {} (`gemmnet data verify {0}` says why; --strict refuses \
             them)",
            dir.display(),
            listing.pictures.len(),
            some(&named, n)
        ));
    }
    if let (n @ 1.., Some(first)) = &listing.others {
        let named = [first.display().to_string()];
        notes.push(format!(
            "{}: {n} file(s) are left out, which are no JPEG, PNG, WebP or BMP by their names: {}",
            dir.display(),
            some(&named, *n)
        ));
    }
    notes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
