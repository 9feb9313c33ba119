//! Level 5. CIFAR-100's binary files (Krizhevsky 2009), read by memory map.
//!
//! A file is a row of records and nothing else: the coarse label, 0 to 19, the fine label, 0 to 99, then 3,072 bytes of
//! pixels as CIFAR-10's. The classes are the fine ones.

use std::path::{Path, PathBuf};

use super::stored::{Block, Stored, Values};
use super::{class_names, or_inner};
use crate::data::cifar10::{DIM, PIXELS, cut_record, held_out};
use crate::data::map::{Bytes, Map};
use crate::error::{Error, Result};

/// Bytes of a record: two labels and the image.
pub const RECORD: usize = 2 + PIXELS;
/// The file with training records.
pub const TRAIN: &str = "train.bin";
/// The file with test records.
pub const TEST: &str = "test.bin";
/// The file with the names of the classes, one a line.
pub const NAMES: &str = "fine_label_names.txt";
/// The folder that the official archive unpacks to.
pub const FOLDER: &str = "cifar-100-binary";

const COARSE: u8 = 20;
const FINE: u8 = 100;
const FIX: &str = "unpack https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz anew";

/// Whether `dir` or its subfolder `cifar-100-binary` holds one of the two files.
pub(super) fn is_there(dir: &Path) -> bool {
    let dir = folder(dir);
    dir.join(TRAIN).exists() || dir.join(TEST).exists()
}

fn folder(dir: &Path) -> PathBuf {
    if dir.join(TRAIN).exists() || dir.join(TEST).exists() { dir.to_owned() } else { or_inner(dir, &[FOLDER]) }
}

/// Maps `train.bin` and `test.bin` in `dir`, or in its subfolder `cifar-100-binary`, and checks their sizes and every label.
/// They need not have the official 50,000 and 10,000 records.
///
/// The last 2 % of the training records are the validation split, 1,000 of the official ones, as for CIFAR-10. The names of
/// the classes are those of `fine_label_names.txt`, or numbers.
///
/// # Errors
/// [`Error::Data`] or [`Error::Io`] with the first thing that is wrong.
pub fn open(dir: &Path) -> Result<Stored> {
    let dir = folder(dir);
    let (train, test) = (block(&dir.join(TRAIN))?, block(&dir.join(TEST))?);
    let labels = [&train, &test].into_iter().flat_map(|block| block.bytes.chunks_exact(RECORD));
    let labels = labels.map(|record| record[1].into()).collect();
    let (all, records) = (train.images + test.images, train.images);
    let kept = records - held_out(records);
    Ok(Stored {
        dim: DIM,
        class_names: class_names(&dir, NAMES, FINE.into())?,
        blocks: vec![train, test],
        labels,
        splits: [(0..kept).collect(), (kept..records).collect(), (records..all).collect()],
        notes: Vec::new(),
    })
}

fn block(path: &Path) -> Result<Block> {
    let map = Map::open(path, FIX)?;
    if let Some(problem) = cut_record(path, map.len(), RECORD, FIX) {
        return Err(problem);
    }
    let bad = |record: &[u8]| record[0] >= COARSE || record[1] >= FINE;
    if let Some((index, record)) = map.chunks_exact(RECORD).enumerate().find(|(_, record)| bad(record)) {
        let problem = format!(
            "record {index} has the labels {} and {}, coarse ones are 0 to {}, fine ones 0 to {}",
            record[0],
            record[1],
            COARSE - 1,
            FINE - 1
        );
        return Err(Error::data(path, problem, FIX));
    }
    let images = map.len() / RECORD;
    Ok(Block { bytes: Bytes::Mapped(map), start: 2, stride: RECORD, images, values: Values::Bytes })
}
