//! Level 5. CIFAR-10's binary batches (Krizhevsky 2009), read by memory map.
//!
//! A batch file is a row of records and nothing else: one byte of label, 0 to 9, then 3,072 bytes of pixels, 32 x 32 of
//! red, then green, then blue, each row by row from the top. That is `(C, H, W)` already, so a record needs no unpacking.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::map::{Bytes, Map};
use super::source::{Image, Source, Split};
use crate::error::{Error, Result};

/// Colour channels of an image: red, green, blue.
pub const CHANNELS: usize = 3;
/// Height and width of an image in pixels.
pub const SIDE: usize = 32;
/// Values of an image, `CHANNELS * SIDE * SIDE`.
pub const PIXELS: usize = CHANNELS * SIDE * SIDE;
/// `[C, H, W]` of an image.
pub const DIM: [usize; 3] = [CHANNELS, SIDE, SIDE];
/// Bytes of a record: the label and the image.
pub const RECORD: usize = 1 + PIXELS;
/// Classes: labels are 0 to 9.
pub const CLASSES: usize = 10;
/// The batches with training records, in order.
pub const TRAIN_BATCHES: [&str; 5] =
    ["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"];
/// The batch with test records.
pub const TEST_BATCH: &str = "test_batch.bin";
/// Records in each of the six official batches.
pub const OFFICIAL_RECORDS: usize = 10_000;
/// Training records of the official files.
const OFFICIAL_TRAIN: usize = TRAIN_BATCHES.len() * OFFICIAL_RECORDS;
/// The folder that the official archive unpacks to.
pub const FOLDER: &str = "cifar-10-batches-bin";
/// The file with the names of the classes, one a line.
pub const NAMES: &str = "batches.meta.txt";

const OFFICIAL_NAMES: [&str; CLASSES] =
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
const GIVE: &str = "give the folder that holds data_batch_1.bin and its five siblings, or run `gemmnet data fetch`";
const FETCH: &str = "run `gemmnet data fetch` or restore the file from where it came";

/// Image and label of one record.
pub type Record<'a> = (&'a [u8; PIXELS], u8);

/// What is wrong with a file of `len` bytes that is a row of records, if the last is not whole.
pub(super) fn cut_record(path: &Path, len: usize, record: usize, fix: &str) -> Option<Error> {
    let over = len % record;
    (over > 0).then(|| {
        let problem = format!(
            "has {len} bytes, which is {} records of {record} bytes and {over} bytes over: it looks truncated",
            len / record
        );
        Error::data(path, problem, fix)
    })
}

/// How many of so many training records are held out for validation, the last ones: 1,000 of 50,000.
pub(super) fn held_out(records: usize) -> usize {
    (records / 50).max(1)
}

/// Whole records in CIFAR-10's layout: a mapped file, or bytes in memory.
#[derive(Debug)]
pub struct Records(Bytes);

impl Records {
    /// Records in memory; `bytes` holds a label and [`PIXELS`] bytes, and so on.
    ///
    /// # Panics
    /// If the last record is not whole.
    pub(super) fn from_bytes(bytes: Vec<u8>) -> Self {
        assert!(bytes.len().is_multiple_of(RECORD), "{} bytes are not whole records", bytes.len());
        Records(Bytes::Owned(bytes))
    }

    /// Maps a batch file, unless something is wrong with it: then says all that is wrong.
    fn map(path: &Path) -> Result<Self, Vec<Error>> {
        let map = Map::open(path, FETCH).map_err(|problem| vec![problem])?;
        let mut problems = Vec::new();
        problems.extend(cut_record(path, map.len(), RECORD, FETCH));
        let mut wrong = map.chunks_exact(RECORD).map(|record| record[0]).enumerate().filter(|r| r.1 >= CLASSES as u8);
        if let Some((index, label)) = wrong.next() {
            let others = match wrong.count() {
                0 => String::new(),
                n => format!(" (and {n} more such records)"),
            };
            let problem = format!("record {index} has label {label}, labels are 0 to {}{others}", CLASSES - 1);
            problems.push(Error::data(path, problem, FETCH));
        }
        if problems.is_empty() { Ok(Records(Bytes::Mapped(map))) } else { Err(problems) }
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.0.len() / RECORD
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Record `index`, from 0.
    ///
    /// # Panics
    /// If there is no such record.
    pub fn get(&self, index: usize) -> Record<'_> {
        let record = &self.0[index * RECORD..][..RECORD];
        let (label, pixels) = record.split_first_chunk::<1>().expect("a record starts with its label");
        (pixels.try_into().expect("a record holds one image"), label[0])
    }
}

/// Records of training and test batches, and which of them belong to which split.
///
/// Of the official 50,000 training records, the first 49,000 are the training split and the last 1,000 the validation
/// split, as in CS231n. That is 2 %, and other numbers of records are split alike, with at least one for validation.
#[derive(Debug)]
pub(super) struct Splits {
    pub(super) train: Vec<Records>,
    pub(super) test: Records,
}

impl Splits {
    /// Records of all training batches.
    fn records(&self) -> usize {
        self.train.iter().map(Records::len).sum()
    }

    /// How many of them are held out for validation.
    fn held_out(&self) -> usize {
        held_out(self.records())
    }

    pub(super) fn len(&self, split: Split) -> usize {
        match split {
            Split::Train => self.records() - self.held_out(),
            Split::Validation => self.held_out(),
            Split::Test => self.test.len(),
        }
    }

    pub(super) fn image(&self, split: Split, index: usize) -> (Image<'_>, usize) {
        let (pixels, label) = match split {
            Split::Train => self.training_record(index),
            Split::Validation => self.training_record(self.len(Split::Train) + index),
            Split::Test => self.test.get(index),
        };
        (Image::Bytes(pixels), label.into())
    }

    /// Record `index` of all training batches, numbered through.
    fn training_record(&self, index: usize) -> Record<'_> {
        let mut rest = index;
        for records in &self.train {
            if rest < records.len() {
                return records.get(rest);
            }
            rest -= records.len();
        }
        panic!("there is no record {index} among {}", self.records());
    }
}

/// The six batches of a folder, mapped: a [`Source`].
///
/// Of the official 50,000 training records, the first 49,000 are the training split and the last 1,000 the validation
/// split, as in CS231n. That is 2 %, and other numbers of records are split alike, with at least one for validation; its
/// notes then say so. The test split is the whole test batch.
#[derive(Debug)]
pub struct Cifar10 {
    dir: PathBuf,
    splits: Splits,
    class_names: Vec<String>,
    notes: Vec<String>,
}

impl Cifar10 {
    /// Maps the batches in `dir`, or in its subfolder `cifar-10-batches-bin`, and checks their sizes and every label. The
    /// batches need not have the official 10,000 records each.
    ///
    /// The files are mapped, not copied, and must stay as they are while they are open. What is promised: they are opened
    /// read only and locked for reading, so that a program that asks for a lock before it writes is kept out; a file that
    /// changes its length while it is opened is an error; a file that is replaced by its name stays as it was. What is
    /// not: a program that asks for no lock can still change a file in place (on Unix). If it shortens the file, reading
    /// what is lost ends this process (SIGBUS). If it overwrites records, pixels and labels change under shared
    /// references, which Rust's rules forbid; this crate takes pixels for numbers only and checks a label again where it is
    /// an index, but does not promise that nothing else happens.
    ///
    /// # Errors
    /// [`Error::Data`] or [`Error::Io`] with the first problem; [`verify`] lists them all.
    pub fn open(dir: &Path) -> Result<Self> {
        let (dir, batches, problems) = check(dir);
        if let Some(problem) = problems.into_iter().next() {
            return Err(problem);
        }
        let mut train: Vec<_> = batches.into_iter().map(|(_, records)| records).collect();
        let test = train.pop().expect("without problems there are six batches");
        let splits = Splits { train, test };
        let mut notes = Vec::new();
        if splits.records() != OFFICIAL_TRAIN {
            notes.push(format!(
                "{} holds {} training records, not CIFAR-10's {OFFICIAL_TRAIN}: the last 2 % ({}) are for validation, the \
                 other {} for training",
                dir.display(),
                splits.records(),
                splits.len(Split::Validation),
                splits.len(Split::Train)
            ));
        }
        Ok(Cifar10 { class_names: read_names(&dir), dir, splits, notes })
    }

    /// The folder with the batches.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The five training batches, in order.
    pub fn train(&self) -> &[Records] {
        &self.splits.train
    }

    /// The test batch.
    pub fn test(&self) -> &Records {
        &self.splits.test
    }
}

impl Source for Cifar10 {
    fn dim(&self) -> [usize; 3] {
        DIM
    }

    /// Those of `batches.meta.txt`, or the official ones if there is no such file.
    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn len(&self, split: Split) -> usize {
        self.splits.len(split)
    }

    fn image(&self, split: Split, index: usize) -> (Image<'_>, usize) {
        self.splits.image(split, index)
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }
}

/// What [`verify`] found.
#[derive(Debug)]
pub struct Report {
    /// The folder with the batches: the one asked for, or its subfolder.
    pub dir: PathBuf,
    /// Everything wrong with the batches, one line each.
    pub problems: Vec<Error>,
    /// The batches without a problem, with their numbers of records.
    pub batches: Vec<(&'static str, usize)>,
}

impl Report {
    /// Whether there are six faultless batches of the official size, 10,000 records each. (It says nothing of the
    /// pixels: what `gemmnet data fetch` downloads is checked by its SHA-256.)
    pub fn has_official_size(&self) -> bool {
        self.problems.is_empty() && self.batches.iter().all(|b| b.1 == OFFICIAL_RECORDS)
    }
}

/// Lists every problem of the batches in `dir`, or in its subfolder `cifar-10-batches-bin`.
pub fn verify(dir: &Path) -> Report {
    let (dir, batches, problems) = check(dir);
    Report { dir, problems, batches: batches.into_iter().map(|(name, records)| (name, records.len())).collect() }
}

/// Whether `dir` or its subfolder `cifar-10-batches-bin` holds at least one of the six batches.
pub fn looks_like_cifar10(dir: &Path) -> bool {
    let dir = batch_dir(dir);
    batch_names().any(|name| dir.join(name).exists())
}

/// The folder with the batches, the faultless batches in order, and all that is wrong.
fn check(dir: &Path) -> (PathBuf, Vec<(&'static str, Records)>, Vec<Error>) {
    let dir = batch_dir(dir);
    if let Err(problem) = check_folder(&dir) {
        return (dir, Vec::new(), vec![problem]);
    }
    let (mut batches, mut problems, mut missing) = (Vec::new(), Vec::new(), Vec::new());
    for name in batch_names() {
        let path = dir.join(name);
        // A link that leads nowhere is not missing, it is broken: let `map` say what the system says.
        if path.symlink_metadata().is_err_and(|e| e.kind() == ErrorKind::NotFound) {
            missing.push(name);
            continue;
        }
        match Records::map(&path) {
            Ok(records) => batches.push((name, records)),
            Err(more) => problems.extend(more),
        }
    }
    if !missing.is_empty() {
        problems.insert(0, describe_missing(&dir, &missing));
    }
    (dir, batches, problems)
}

fn check_folder(dir: &Path) -> Result<()> {
    match std::fs::metadata(dir) {
        Ok(kind) if kind.is_dir() => Ok(()),
        Ok(_) => Err(Error::data(dir, "is not a folder", GIVE)),
        Err(e) if e.kind() == ErrorKind::NotFound => Err(Error::data(dir, "there is no such folder", GIVE)),
        Err(e) => Err(Error::io("read", dir, e, GIVE)),
    }
}

fn describe_missing(dir: &Path, missing: &[&str]) -> Error {
    if missing.len() <= TRAIN_BATCHES.len() {
        return Error::data(dir, format!("{} missing", missing.join(", ")), FETCH);
    }
    if dir.join("data_batch_1").exists() || dir.join("cifar-10-batches-py").exists() {
        return Error::data(dir, "holds the Python version of CIFAR-10, not the binary version", GIVE);
    }
    Error::data(dir, "holds none of CIFAR-10's six binary batches", GIVE)
}

fn batch_names() -> impl Iterator<Item = &'static str> {
    TRAIN_BATCHES.into_iter().chain([TEST_BATCH])
}

fn batch_dir(dir: &Path) -> PathBuf {
    let inner = dir.join(FOLDER);
    if inner.is_dir() && !batch_names().any(|name| dir.join(name).exists()) { inner } else { dir.to_path_buf() }
}

/// The names in the folder's list, which has blank lines at its end; the official names if it does not name ten classes.
pub(super) fn read_names(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join(NAMES)).unwrap_or_default();
    let names: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from).collect();
    if names.len() == CLASSES { names } else { OFFICIAL_NAMES.map(String::from).to_vec() }
}
