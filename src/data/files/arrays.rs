//! Level 5. Arrays in NumPy's files.
//!
//! `x_train.npy`, `y_train.npy` and, if there are any, `x_val`, `y_val`, `x_test` and `y_test`; or one `.npz` file with
//! arrays of these names. Images are `(N, C, H, W)`, or `(N, H, W)` for grey ones, of `uint8` or `float32`; labels are whole
//! numbers from 0, `(N)` or `(N, 1)`. `.npy` files are mapped, `.npz` files unpacked in memory.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use ndarray::ArrayViewD;
use ndarray_npy::{ViewElement, ViewNpyError, ViewNpyExt};
use zip::ZipArchive;
use zip::result::ZipError;

use super::stored::{Block, Stored, Values, key_of_index, splits};
use super::{CLASS_NAMES, class_names, names};
use crate::data::map::{Bytes, Map};
use crate::error::{Error, Result};

/// What to do about images that cannot be used.
const IMAGES: &str = "save uint8 or float32 images (N, C, H, W), or (N, H, W), by np.save";
/// What to do about labels that cannot be used.
const LABELS: &str = "save whole numbers from 0, one for each image, by np.save";
/// Bytes of a header, at most: those of plain arrays have a hundred, and what reads them goes as deep as they are nested.
const LONGEST_HEADER: usize = 1024;
/// A larger label is rather a mistake.
const MOST_CLASSES: usize = 1 << 16;
/// Of splits: training, validation, test.
const SUFFIXES: [&str; 3] = ["train", "val", "test"];

/// Whether there are training images, or something that may hold them, in `dir`.
pub(super) fn is_there(dir: &Path) -> Result<bool> {
    Ok(dir.join("x_train.npy").exists() || !archives(dir)?.is_empty())
}

/// The `.npz` files in `dir`.
fn archives(dir: &Path) -> Result<Vec<PathBuf>> {
    let all = names(dir)?.into_iter().map(|name| dir.join(name));
    Ok(all.filter(|path| path.extension().is_some_and(|ending| ending == "npz")).collect())
}

/// The arrays in `dir`: those of `x_train.npy` and its siblings, or of the one `.npz` file.
///
/// Classes are called by their numbers, from 0 to the largest label, or by the lines of `class_names.txt`.
///
/// # Errors
/// [`Error::Data`] or [`Error::Io`] with the first thing that is wrong.
pub fn open(dir: &Path) -> Result<Stored> {
    let mut from = From::find(dir)?;
    let (mut blocks, mut labels, mut lens) = (Vec::new(), Vec::new(), [0; 3]);
    let mut like: Option<([usize; 3], Values)> = None;
    for (suffix, len) in SUFFIXES.iter().zip(&mut lens) {
        let Some((path, bytes)) = from.array(&format!("x_{suffix}"))? else { continue };
        let (block, dim) = images(&path, bytes)?;
        let &mut (first_dim, first_values) = like.get_or_insert((dim, block.values));
        if dim != first_dim || block.values != first_values {
            let problem =
                format!("has images of {dim:?} as {:?}, x_train has {first_dim:?} as {first_values:?}", block.values);
            return Err(Error::data(path, problem, "give all splits images of one size and type"));
        }
        let name = format!("y_{suffix}");
        let Some((path, bytes)) = from.array(&name)? else {
            return Err(Error::data(path, format!("has no labels beside it: there is no {name}"), LABELS));
        };
        let of_split = self::labels(&path, &bytes)?;
        if of_split.len() != block.images {
            let problem = format!("has {} labels for {} images", of_split.len(), block.images);
            return Err(Error::data(path, problem, LABELS));
        }
        *len = block.images;
        labels.extend(of_split);
        blocks.push(block);
    }
    let Some((dim, values)) = like.filter(|_| lens[0] > 0) else {
        return Err(Error::data(from.path(), "has no array x_train", IMAGES));
    };
    let classes = labels.iter().max().map_or(0, |label| label + 1);
    let splits = splits(&labels, lens, key_of_index);
    let mut notes = Vec::new();
    if values == Values::Floats {
        notes.push(format!(
            "{}: pixels are floats; `gemmnet predict` gives a network pixels from 0 to 255, so train on that scale if it is to \
             see pictures",
            dir.display()
        ));
    }
    let class_names = class_names(dir, CLASS_NAMES, classes)?;
    Ok(Stored { dim, class_names, blocks, labels, splits, notes })
}

/// Where arrays are.
enum From {
    Folder(PathBuf),
    Archive(PathBuf, ZipArchive<File>),
}

impl From {
    fn find(dir: &Path) -> Result<Self> {
        let archives = archives(dir)?;
        if dir.join("x_train.npy").exists() || archives.is_empty() {
            return Ok(From::Folder(dir.to_owned()));
        }
        let [path] = &archives[..] else {
            let [first, second] =
                [&archives[0], &archives[1]].map(|path| path.file_name().unwrap_or_default().display());
            let problem = format!("holds {first} and {second}: which one is meant?");
            return Err(Error::data(dir, problem, "give a folder with one .npz file"));
        };
        let file = File::open(path).map_err(|e| Error::io("read", path, e, "check its permissions"))?;
        let archive = ZipArchive::new(file).map_err(|e| damaged(path, &e))?;
        Ok(From::Archive(path.clone(), archive))
    }

    fn path(&self) -> &Path {
        match self {
            From::Folder(path) | From::Archive(path, _) => path,
        }
    }

    /// The file of an array, if it is there, and what to call it.
    fn array(&mut self, name: &str) -> Result<Option<(PathBuf, Bytes)>> {
        match self {
            From::Folder(dir) => {
                let path = dir.join(format!("{name}.npy"));
                if path.symlink_metadata().is_err() {
                    return Ok(None);
                }
                let map = Map::open(&path, "save it by np.save")?;
                Ok(Some((path, Bytes::Mapped(map))))
            }
            From::Archive(path, archive) => {
                let mut member = match archive.by_name(&format!("{name}.npy")) {
                    Ok(member) => member,
                    Err(ZipError::FileNotFound) => return Ok(None),
                    Err(e) => return Err(damaged(path, &e)),
                };
                let mut bytes = Vec::new();
                member.read_to_end(&mut bytes).map_err(|e| damaged(path, &e))?;
                Ok(Some((path.join(name), Bytes::Owned(bytes))))
            }
        }
    }
}

fn damaged(path: &Path, error: &dyn std::error::Error) -> Error {
    Error::data(path, format!("is no whole .npz file ({error})"), "save it again by np.savez or np.savez_compressed")
}

/// The images of a `.npy` file, where they lie, and their size.
pub(super) fn images(path: &Path, bytes: Bytes) -> Result<(Block, [usize; 3])> {
    check_header(path, &bytes, IMAGES)?;
    let (start, shape, values) = if let Some(view) = view::<u8>(path, &bytes, IMAGES)? {
        (start(&view, &bytes), shape(path, &view)?, Values::Bytes)
    } else if let Some(view) = view::<f32>(path, &bytes, IMAGES)? {
        (start(&view, &bytes), shape(path, &view)?, Values::Floats)
    } else {
        return Err(Error::data(path, "holds neither uint8 nor float32", IMAGES));
    };
    let [n, channels, height, width] = match shape[..] {
        [n, h, w] => [n, 1, h, w],
        // Channels behind the pixels are no small number of rows.
        [n, h, w, c @ (1 | 3 | 4)] if h > 4 => {
            let problem = format!("has the shape ({n}, {h}, {w}, {c}), which looks like (N, H, W, C)");
            return Err(Error::data(path, problem, "save x.transpose(0, 3, 1, 2).copy()"));
        }
        [n, c, h, w] => [n, c, h, w],
        _ => {
            let problem = format!("has {} axes {shape:?}, images have 4, or 3 if they are grey", shape.len());
            return Err(Error::data(path, problem, IMAGES));
        }
    };
    if n == 0 || channels * height * width == 0 {
        return Err(Error::data(path, format!("has no pixels: its shape is {shape:?}"), IMAGES));
    }
    let size = if values == Values::Floats { size_of::<f32>() } else { 1 };
    let stride = channels * height * width * size;
    Ok((Block { bytes, start, stride, images: n, values }, [channels, height, width]))
}

/// Where the values of a view begin.
fn start<T>(view: &ArrayViewD<'_, T>, bytes: &[u8]) -> usize {
    view.as_ptr().addr() - bytes.as_ptr().addr()
}

/// The shape of an array whose last axis is the fastest.
fn shape<T>(path: &Path, view: &ArrayViewD<'_, T>) -> Result<Vec<usize>> {
    if !view.is_standard_layout() {
        return Err(Error::data(path, "is in Fortran's order", "save np.ascontiguousarray of it"));
    }
    Ok(view.shape().to_vec())
}

/// The labels in a `.npy` file.
pub(super) fn labels(path: &Path, bytes: &[u8]) -> Result<Vec<usize>> {
    check_header(path, bytes, LABELS)?;
    macro_rules! first_of {
        ($($type:ty),*) => {
            $(if let Some(view) = view::<$type>(path, bytes, LABELS)? {
                return indices(path, &view);
            })*
        };
    }
    first_of!(u8, i64, i32, u16, i16, u32, u64, i8);
    Err(Error::data(path, "holds no whole numbers", LABELS))
}

fn indices<L: Copy + TryInto<usize> + std::fmt::Display>(path: &Path, view: &ArrayViewD<'_, L>) -> Result<Vec<usize>> {
    match view.shape() {
        [_] | [_, 1] => {}
        other => {
            return Err(Error::data(path, format!("has the shape {other:?}, labels are (N) or (N, 1)"), LABELS));
        }
    }
    let label = |(index, &label): (usize, &L)| {
        let usable = label.try_into().ok().filter(|&label| label < MOST_CLASSES);
        usable.ok_or_else(|| {
            let problem = format!("label {index} is {label}, labels are 0 to {}", MOST_CLASSES - 1);
            Error::data(path, problem, "number the classes from 0")
        })
    };
    view.iter().enumerate().map(label).collect()
}

/// The array in a `.npy` file if it is of this type.
fn view<'a, T: ViewElement>(path: &Path, bytes: &'a [u8], fix: &str) -> Result<Option<ArrayViewD<'a, T>>> {
    match ArrayViewD::<T>::view_npy(bytes) {
        Ok(view) => Ok(Some(view)),
        Err(ViewNpyError::WrongDescriptor(_)) => Ok(None),
        Err(ViewNpyError::NonNativeEndian) => {
            Err(Error::data(path, "has its bytes in the order of other machines", fix))
        }
        Err(ViewNpyError::MissingBytes(n)) => {
            Err(Error::data(path, format!("lacks {n} bytes: it looks truncated"), fix))
        }
        Err(e) => Err(Error::data(path, format!("is no .npy file that can be read ({})", one_line(&e)), fix)),
    }
}

/// The message of another library, which may have several lines.
fn one_line(error: &dyn std::error::Error) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a header is as those of plain arrays are: nothing is allocated or parsed before that is known, and what parses it
/// panics at a shape that no memory holds if one of its sizes is 0.
fn check_header(path: &Path, bytes: &[u8], fix: &str) -> Result<()> {
    let (start, len) = match bytes {
        [_, _, _, _, _, _, 1, _, a, b, ..] => (10, u16::from_le_bytes([*a, *b]).into()),
        [_, _, _, _, _, _, _, _, a, b, c, d, ..] => (12, u32::from_le_bytes([*a, *b, *c, *d]) as usize),
        _ => (0, 0),
    };
    let header = bytes.get(start..).and_then(|rest| rest.get(..len)).filter(|_| len <= LONGEST_HEADER);
    if let Some(text) =
        header.and_then(|header| str::from_utf8(header).ok()).filter(|_| bytes.starts_with(b"\x93NUMPY"))
    {
        let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        let numbers = words.filter(|word| word.starts_with(|letter: char| letter.is_ascii_digit()));
        let mut sizes = numbers.map(|number| number.parse().unwrap_or(usize::MAX)).filter(|&size| size > 0);
        // The bytes of a number are no more than 16.
        if sizes.try_fold(16_usize, usize::checked_mul).is_some_and(|bytes| isize::try_from(bytes).is_ok()) {
            return Ok(());
        }
    }
    Err(Error::data(path, "is no .npy file of a plain array", fix))
}
