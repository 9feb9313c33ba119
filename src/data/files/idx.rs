//! Level 5. IDX files, as those of MNIST (LeCun et al. 1998) and its kin, plain by memory map or compressed by gzip.
//!
//! A file begins with a magic number, two bytes of 0, a type (8 for bytes) and the number of sizes; then the sizes, 32 bits
//! each, big end first; then the values. Images are bytes `(N, H, W)`, labels bytes `(N)`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use super::stored::{Block, Stored, Values, key_of_index, splits};
use super::{CLASS_NAMES, class_names, names};
use crate::data::map::{Bytes, Map};
use crate::error::{Error, Result};

const FIX: &str = "restore the file from where it came";
/// Folders below the one that is asked for in which the files may lie, as torchvision puts them there.
const INNER: [&str; 2] = ["raw", "MNIST/raw"];

/// Whether there are training images in `dir`.
pub(super) fn is_there(dir: &Path) -> Result<bool> {
    Ok(folder(dir)?.is_some())
}

/// The folder with the training images: `dir`, or one below it.
fn folder(dir: &Path) -> Result<Option<PathBuf>> {
    for dir in [dir.to_owned()].into_iter().chain(INNER.map(|inner| dir.join(inner))) {
        if dir.is_dir() && find(&dir, &["train"], "images", 3)?.is_some() {
            return Ok(Some(dir));
        }
    }
    Ok(None)
}

/// The file of `dir` called `[PREFIX]PART-WHAT-idxN-ubyte[.gz]`, or with a dot before `idx`; the one that is not compressed
/// if both are there.
fn find(dir: &Path, parts: &[&str], what: &str, axes: u8) -> Result<Option<PathBuf>> {
    let endings: Vec<_> = (parts.iter())
        .flat_map(|part| ["-", "."].map(|joint| format!("{part}-{what}{joint}idx{axes}-ubyte")))
        .collect();
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for name in names(dir)? {
        let text = name.to_string_lossy();
        let plain = text.strip_suffix(".gz").unwrap_or(&text);
        // Names are sorted, so the compressed one comes later.
        if endings.iter().any(|ending| plain.ends_with(ending)) && found.iter().all(|(other, _)| other != plain) {
            found.push((plain.to_owned(), dir.join(&name)));
        }
    }
    if let [(first, _), (second, _), ..] = &found[..] {
        let problem = format!("holds `{first}` and `{second}`, which are of two data sets");
        return Err(Error::data(dir, problem, "move the files of each data set to a folder of their own"));
    }
    Ok(found.pop().map(|(_, path)| path))
}

/// The files in `dir`, or in its subfolders `raw` and `MNIST/raw`: images and labels for training (`train-`), and perhaps
/// for tests (`t10k-` or `test-`).
///
/// Classes are called by their numbers, from 0 to the largest label, or by the lines of `class_names.txt`.
///
/// # Errors
/// [`Error::Data`] or [`Error::Io`] with the first thing that is wrong.
pub fn open(dir: &Path) -> Result<Stored> {
    let dir = folder(dir)?.unwrap_or_else(|| dir.to_owned());
    let train = part(&dir, &["train"])?
        .ok_or_else(|| Error::data(&dir, "holds no train-images-idx3-ubyte", "give the folder with that file"))?;
    let test = part(&dir, &["t10k", "test"])?;
    let (dim, mut labels) = (train.dim, train.labels);
    let lens = [labels.len(), 0, test.as_ref().map_or(0, |test| test.labels.len())];
    let mut blocks = vec![train.block];
    if let Some(test) = test {
        if test.dim != dim {
            let [there, here] = [test.dim, dim].map(|[_, height, width]| format!("{width}x{height}"));
            let problem = format!("has test images of {there} pixels and training images of {here}");
            return Err(Error::data(&dir, problem, "put files of one data set there"));
        }
        labels.extend(test.labels);
        blocks.push(test.block);
    }
    let classes = labels.iter().max().map_or(0, |label| label + 1);
    let splits = splits(&labels, lens, key_of_index);
    let class_names = class_names(&dir, CLASS_NAMES, classes)?;
    Ok(Stored { dim, class_names, blocks, labels, splits, notes: Vec::new() })
}

struct Part {
    dim: [usize; 3],
    block: Block,
    labels: Vec<usize>,
}

/// Images and labels of a split, if the images are there.
fn part(dir: &Path, names: &[&str]) -> Result<Option<Part>> {
    let Some(images) = find(dir, names, "images", 3)? else { return Ok(None) };
    let Some(labels) = find(dir, names, "labels", 1)? else {
        let problem = "has no labels beside it";
        return Err(Error::data(images, problem, format!("put {}-labels-idx1-ubyte into the same folder", names[0])));
    };
    let (values, [n, height, width]) = read(&images)?;
    if height == 0 || width == 0 || n == 0 {
        return Err(Error::data(images, format!("holds {n} images of {width}x{height} pixels"), FIX));
    }
    let stride = height * width;
    let block = Block { start: values.start, bytes: values.bytes, stride, images: n, values: Values::Bytes };
    let (of_labels, [count]) = read(&labels)?;
    if count != n {
        let problem = format!("holds {count} labels for {n} images");
        return Err(Error::data(labels, problem, "put files of one data set there"));
    }
    let labels = of_labels.bytes[of_labels.start..].iter().map(|&label| label.into()).collect();
    Ok(Some(Part { dim: [1, height, width], block, labels }))
}

/// A file whose header is as it should be, and where its values start.
struct Content {
    bytes: Bytes,
    start: usize,
}

/// Opens a file of bytes with `AXES` sizes.
fn read<const AXES: usize>(path: &Path) -> Result<(Content, [usize; AXES])> {
    let start = 4 + 4 * AXES;
    if path.extension().is_none_or(|ending| ending != "gz") {
        let map = Map::open(path, FIX)?;
        let (sizes, len) = header(path, &map[..start.min(map.len())])?;
        check_len(path, map.len(), len)?;
        return Ok((Content { bytes: Bytes::Mapped(map), start }, sizes));
    }
    let broken = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::NotFound => Error::io("read", path, e, FIX),
        _ => Error::data(path, format!("is no whole gzip file ({e})"), FIX),
    };
    let mut from = MultiGzDecoder::new(File::open(path).map_err(broken)?);
    let mut bytes = Vec::new();
    from.by_ref().take(start as u64).read_to_end(&mut bytes).map_err(broken)?;
    let (sizes, len) = header(path, &bytes)?;
    // What the header says is asked for only as it arrives; one byte more shows a file that is too long.
    from.take((len - start) as u64 + 1).read_to_end(&mut bytes).map_err(broken)?;
    check_len(path, bytes.len(), len)?;
    Ok((Content { bytes: Bytes::Owned(bytes), start }, sizes))
}

/// The sizes that the header at the start of a file gives, and the bytes that the file then has.
fn header<const AXES: usize>(path: &Path, bytes: &[u8]) -> Result<([usize; AXES], usize)> {
    let words: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_be_bytes(*word)).collect();
    let magic = 0x0800 + AXES as u32;
    let Some((&first, sizes)) = words.split_first().filter(|_| words.len() == 1 + AXES) else {
        return Err(Error::data(path, format!("has {} bytes, too few for a header", bytes.len()), FIX));
    };
    if first != magic {
        let problem =
            format!("begins with the number {first:#010x}, not {magic:#010x}: it holds no bytes in {AXES} axes");
        return Err(Error::data(path, problem, FIX));
    }
    let sizes: [usize; AXES] = std::array::from_fn(|axis| sizes[axis] as usize);
    let len = sizes
        .iter()
        .try_fold(1_usize, |len, &size| len.checked_mul(size))
        .and_then(|len| len.checked_add(4 + 4 * AXES));
    let len = len.ok_or_else(|| Error::data(path, format!("claims to hold {sizes:?} values"), FIX))?;
    Ok((sizes, len))
}

fn check_len(path: &Path, got: usize, wanted: usize) -> Result<()> {
    match got.cmp(&wanted) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => {
            let problem = format!("has {got} bytes, its header says {wanted}: it looks truncated");
            Err(Error::data(path, problem, FIX))
        }
        std::cmp::Ordering::Greater => {
            Err(Error::data(path, format!("has more bytes than the {wanted} of its header"), FIX))
        }
    }
}
