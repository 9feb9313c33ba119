//! What the targets share: files of a folder from one input, safetensors files from text, and what must hold of what was read.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use gemmnet::data::{Dataset, Draw, Normalization, Source, Split};
use gemmnet::nn::network::Network;
use gemmnet::nn::notation::{LayerSpec, NetworkSpec};
use gemmnet::shape::Padding;
use gemmnet::{Element, Error};

/// Files that one input makes of itself are no larger.
const LARGEST_FILE: usize = 1 << 16;
/// Sizes of layers in networks that are run: larger ones are no error, but take memory and time.
const LARGEST_SIZE: usize = 32;

/// A folder in memory where there is one, else on the disk.
pub fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a folder for the files of an input")
}

thread_local! {
    static FOLDER: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
}

/// A folder of this process, emptied.
pub fn empty_folder() -> PathBuf {
    FOLDER.with_borrow_mut(|slot| {
        let path = slot.get_or_insert_with(folder).path().to_owned();
        for entry in fs::read_dir(&path).expect("our folder").flatten() {
            let gone =
                if entry.path().is_dir() { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
            gone.expect("our own file");
        }
        path
    })
}

/// Cuts an input into files: a byte that chooses a name, two of the file's size, two of how many bytes follow; zeros fill it up.
pub fn files<'n, 'd>(mut data: &'d [u8], names: &[&'n str]) -> Vec<(&'n str, std::borrow::Cow<'d, [u8]>)> {
    let mut files = Vec::new();
    while let [name, s0, s1, l0, l1, rest @ ..] = data {
        let (size, len) = (usize::from(u16::from_le_bytes([*s0, *s1])), usize::from(u16::from_le_bytes([*l0, *l1])));
        let (bytes, after) = rest.split_at(len.min(rest.len()));
        let name = names[usize::from(*name) % names.len()];
        files.push((
            name,
            if size <= bytes.len() {
                bytes.into()
            } else {
                let mut filled = bytes.to_vec();
                filled.resize(size.min(LARGEST_FILE), 0);
                filled.into()
            },
        ));
        data = after;
    }
    files
}

/// The opposite of [`files`]: for seeds.
pub fn pack(files: &[(u8, &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    for (name, bytes) in files {
        let kept = bytes.len() - bytes.iter().rev().take_while(|&&byte| byte == 0).count();
        data.push(*name);
        data.extend((bytes.len() as u16).to_le_bytes());
        data.extend((kept as u16).to_le_bytes());
        data.extend(&bytes[..kept]);
    }
    data
}

/// What separates the parts of an input that is text: never a byte of UTF-8.
pub const SEPARATOR: u8 = 0xff;

/// The bytes of a safetensors file. An input that begins with [`SEPARATOR`] is parts: our entry of the metadata (none if it is
/// empty), then lines `name dtype 2,3` with a tensor each, then values, which are repeated as often as need be. Any other input
/// is the file itself.
pub fn archive(data: &[u8]) -> Vec<u8> {
    let Some(data) = data.strip_prefix(&[SEPARATOR]) else { return data.to_vec() };
    let mut parts = data.splitn(3, |&byte| byte == SEPARATOR);
    let text = |part: Option<&[u8]>| String::from_utf8_lossy(part.unwrap_or_default()).into_owned();
    let (json, lines, values) = (text(parts.next()), text(parts.next()), parts.next().unwrap_or_default());
    let mut header = serde_json::Map::new();
    if !json.is_empty() {
        header.insert("__metadata__".into(), serde_json::json!({ "gemmnet": json }));
    }
    let mut end = 0_usize;
    for line in lines.lines() {
        let mut words = line.rsplitn(3, ' ');
        let (shape, dtype, name) = (words.next(), words.next(), words.next());
        let shape: Vec<usize> = shape.unwrap_or_default().split(',').filter_map(|size| size.parse().ok()).collect();
        let size = if dtype == Some("F64") { 8 } else { 4 };
        let len = shape.iter().try_fold(size, |len: usize, &n| len.checked_mul(n));
        let Some(new_end) = len.and_then(|len| end.checked_add(len)).filter(|&end| end <= LARGEST_FILE) else {
            continue;
        };
        let tensor = serde_json::json!({
            "dtype": dtype.unwrap_or_default(), "shape": shape, "data_offsets": [end, new_end]
        });
        if header.insert(name.unwrap_or_default().to_owned(), tensor).is_none() {
            end = new_end;
        }
    }
    let mut header = serde_json::to_vec(&header).expect("a map of text has a JSON form");
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    let values = if values.is_empty() { &[0] } else { values };
    file.extend(values.iter().copied().cycle().take(end));
    file
}

/// The parts of a safetensors file, as [`archive`] puts it together: for seeds.
pub fn parts(file: &[u8]) -> Vec<u8> {
    let len = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let mut header: serde_json::Map<_, _> = serde_json::from_slice(&file[8..8 + len]).expect("a header");
    let metadata = header.remove("__metadata__").map(|data| data["gemmnet"].as_str().unwrap_or_default().to_owned());
    let mut tensors: Vec<_> = header.into_iter().collect();
    tensors.sort_by_key(|(_, tensor)| tensor["data_offsets"][0].as_u64());
    let mut lines = String::new();
    for (name, tensor) in tensors {
        let shape: Vec<_> = tensor["shape"].as_array().into_iter().flatten().map(ToString::to_string).collect();
        lines += &format!("{name} {} {}\n", tensor["dtype"].as_str().unwrap_or_default(), shape.join(","));
    }
    let metadata = metadata.unwrap_or_default();
    let values = &file[8 + len..][..64.min(file.len() - 8 - len)];
    [&[SEPARATOR], metadata.as_bytes(), &[SEPARATOR], lines.as_bytes(), &[SEPARATOR], values].concat()
}

/// Whether to say what comes of each input: with `GEMMNET_FUZZ_SHOW` set.
static SHOW: LazyLock<bool> = LazyLock::new(|| std::env::var_os("GEMMNET_FUZZ_SHOW").is_some());

/// Says that an input was taken, as what.
pub fn taken(what: impl std::fmt::Display) {
    if *SHOW {
        eprintln!("taken: {what}");
    }
}

/// Errors are one line that a terminal takes for text. File names are left out: they are this system's.
pub fn check_error(error: &Error) {
    let text = error.to_string();
    if *SHOW {
        eprintln!("refused: {text}");
    }
    assert!(!text.is_empty() && !text.contains(char::is_control), "an error of {text:?}");
}

/// What a reader has opened, or why not.
pub fn check_opened(opened: Result<impl Source + 'static, Error>) {
    match opened {
        Ok(source) => check_source(source),
        Err(error) => check_error(&error),
    }
}

/// Whatever a source says it has is there: sizes, labels below the number of classes, and batches of them, normalised.
pub fn check_source(source: impl Source + 'static) {
    let (dim, classes) = (source.dim(), source.class_names().len());
    let len: usize = dim.iter().product();
    assert!(len > 0, "images of {dim:?}");
    for split in Split::ALL {
        for index in 0..source.len(split) {
            let (image, label) = source.image(split, index);
            assert_eq!(image.len(), len);
            assert!(label < classes, "label {label} of {classes}");
        }
    }
    let source: Arc<dyn Source> = Arc::new(source);
    for normalization in [Normalization::MeanImage, Normalization::PerChannel] {
        match Dataset::new(source.clone(), normalization) {
            Ok(data) => check_data(&data),
            Err(error) => check_error(&error),
        }
    }
}

fn check_data(data: &Dataset) {
    taken(format_args!("{:?}, of each split {:?}", data.dim(), Split::ALL.map(|split| data.len(split))));
    for split in Split::ALL {
        let n = data.len(split);
        let indices = if n > 4 { vec![0, 1, n - 2, n - 1] } else { (0..n).collect() };
        let (mut x, mut y) = (vec![0_f32; indices.len() * data.image_len()], vec![0; indices.len()]);
        data.fill_batch(Draw::plain(split), &indices, &mut x, &mut y).expect("a batch of images that are there");
    }
}

/// Whether a network of these layers is small enough to be made and run: larger ones are no error.
pub fn is_small(spec: &NetworkSpec) -> bool {
    let small = |sizes: &[usize]| sizes.iter().all(|&size| size <= LARGEST_SIZE);
    let little = |padding| match padding {
        Padding::All(n) => small(&[n]),
        Padding::Sides { top, bottom, left, right } => small(&[top, bottom, left, right]),
        Padding::Same | Padding::Valid => true,
    };
    fn all(layers: &[LayerSpec], what: &impl Fn(&LayerSpec) -> bool) -> bool {
        layers.iter().all(|layer| match layer {
            LayerSpec::Residual(inside) => all(inside, what),
            layer => what(layer),
        })
    }
    fn count(layers: &[LayerSpec]) -> usize {
        layers.iter().map(|layer| if let LayerSpec::Residual(inside) = layer { 2 + count(inside) } else { 1 }).sum()
    }
    count(&spec.layers) <= 64
        && all(&spec.layers, &|layer| match layer {
            LayerSpec::Conv { filters, kernel, conv, .. } => {
                small(&[*filters, kernel.0, kernel.1]) && little(conv.padding)
            }
            LayerSpec::Affine { outputs, .. } => small(&[*outputs]),
            LayerSpec::MaxPool(pool) | LayerSpec::AvgPool(pool) => little(pool.padding),
            _ => true,
        })
}

/// Whether an image goes through a network in little time and memory.
pub fn is_quick<T: Element>(network: &Network<T>) -> bool {
    let sum = |values: Vec<usize>| values.into_iter().fold(0, usize::saturating_add);
    let summary = network.summary();
    sum(summary.iter().map(|step| step.output.iter().product()).collect()) <= 1 << 18
        && sum(summary.iter().map(|step| step.multiply_adds).collect()) <= 1 << 22
        && network.input().iter().product::<usize>() <= 1 << 16
}
