//! Level 7. Where the commands find their data, and how they open it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use crate::cli::output::{Output, thousands};
use crate::cli::{Stop, progress};
use crate::data::cifar10::{self, OFFICIAL_RECORDS};
use crate::data::fetch::{FetchOptions, MIRROR_VARIABLE};
use crate::data::files::{Format, arrays, cifar100, folder, idx};
use crate::data::pictures::{self, CLASS_NAMES, write_pictures};
use crate::data::places::{default_data_dir, find_cifar10};
use crate::data::{Cifar10, Dataset, Source, Split, written};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::network::Network;

/// Where data is read from, and what lies there.
#[derive(Debug)]
pub(in crate::cli) struct Folder {
    pub(in crate::cli) dir: PathBuf,
    pub(in crate::cli) format: Format,
    /// Keeps a folder of pictures that could go nowhere else.
    temporary: Option<TempDir>,
}

/// How pictures are to be read.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::cli) struct Wanted {
    /// Height and width; if none, by the data.
    pub(in crate::cli) size: Option<[usize; 2]>,
    /// Whether a broken one is an error.
    pub(in crate::cli) strict: bool,
}

/// Data that is open.
#[derive(Debug)]
pub(in crate::cli) struct Opened {
    pub(in crate::cli) source: Arc<dyn Source>,
    /// What it is, for results: `cifar10`, `cifar10-subset`, `pictures` (the built-in ones), `cifar100`, `idx`, `arrays` or
    /// `folders` (of pictures).
    pub(in crate::cli) kind: &'static str,
    /// Keeps decoded pictures that could go nowhere else.
    _temporary: Option<TempDir>,
}

impl Folder {
    /// A folder that was asked for.
    pub(in crate::cli) fn given(dir: PathBuf) -> Result<Self> {
        Ok(Folder { format: Format::of(&dir)?, dir, temporary: None })
    }

    /// CIFAR-10 where it can be found, or else, if `fetch`, downloaded; where that fails, the built-in pictures.
    pub(in crate::cli) fn find(fetch: bool, out: &Output) -> Result<Self, Stop> {
        let missing = match find_cifar10(None) {
            Ok(dir) => return Ok(Self::of_cifar10(dir)),
            Err(missing) => missing,
        };
        let reason = if fetch {
            out.note("CIFAR-10 is not on this machine; downloading it (170 MB; --no-fetch does without)");
            match progress::fetch(&FetchOptions { dir: default_data_dir(), url: None }, out) {
                Ok(dir) => return Ok(Self::of_cifar10(dir)),
                Err(error) => error,
            }
        } else {
            missing
        };
        let folder = Self::pictures()?;
        out.note(reason);
        out.note(format_args!(
            "Without CIFAR-10, this trains on the built-in pictures: ten classes of drawn shapes, in {}. Their accuracies \
             do not compare with CIFAR-10's. To get CIFAR-10, run `gemmnet data fetch` where there is a network, name \
             another address in {MIRROR_VARIABLE}, or give the folder with the six .bin files with --data-dir.",
            folder.dir.display()
        ));
        Ok(folder)
    }

    /// For a network that was trained to tell these classes apart: what was asked for with `--data-dir`, or where such
    /// data lies on this machine.
    pub(in crate::cli) fn of_classes(classes: &[String], data_dir: Option<&Path>) -> Result<Self> {
        match data_dir {
            Some(dir) => Self::given(dir.to_owned()),
            None if classes == CLASS_NAMES => Self::pictures(),
            None => find_cifar10(None).map(Self::of_cifar10),
        }
    }

    /// Where it is, if it will be there tomorrow.
    pub(in crate::cli) fn lasting(&self) -> Option<&Path> {
        self.temporary.is_none().then_some(&self.dir)
    }

    fn of_cifar10(dir: PathBuf) -> Self {
        Folder { dir, format: Format::Cifar10, temporary: None }
    }

    /// The built-in pictures, always the same ones: drawn once and kept in the cache folder, or in a temporary one if that
    /// cannot be written.
    fn pictures() -> Result<Self> {
        let dir = default_data_dir().join("pictures");
        let report = cifar10::verify(&dir);
        let complete = report.problems.is_empty() && report.batches.iter().all(|b| b.1 == pictures::DEFAULT_RECORDS);
        if complete || write_pictures(&dir, PICTURES_SEED, pictures::DEFAULT_RECORDS).is_ok() {
            return Ok(Self::of_cifar10(dir));
        }
        let temporary = temporary()?;
        write_pictures(temporary.path(), PICTURES_SEED, pictures::DEFAULT_RECORDS)?;
        let dir = temporary.path().to_owned();
        Ok(Folder { temporary: Some(temporary), ..Self::of_cifar10(dir) })
    }

    /// Pictures of the size that `network` takes; other data has the size that it has.
    pub(in crate::cli) fn like<T: Element>(&self, network: &Network<T>, strict: bool) -> Wanted {
        let [_, height, width] = network.input();
        Wanted { size: (self.format == Format::Pictures).then_some([height, width]), strict }
    }

    /// Opens the data; pictures are decoded, with a progress bar, unless they were before.
    pub(in crate::cli) fn open(&self, wanted: Wanted, out: &Output) -> Result<Opened> {
        if self.format != Format::Pictures && wanted.size.is_some() {
            let problem = format!("{} holds {}, which are not resized", self.dir.display(), self.format.describe());
            return Err(Error::invalid("image-size", problem, "leave it out; only folders of pictures have a choice"));
        }
        let opened = |source, kind| Opened { source, kind, _temporary: None };
        Ok(match self.format {
            Format::Cifar10 => {
                let files = Cifar10::open(&self.dir)?;
                let kind = kind(&files);
                opened(Arc::new(files), kind)
            }
            Format::Cifar100 => opened(Arc::new(cifar100::open(&self.dir)?), "cifar100"),
            Format::Idx => opened(Arc::new(idx::open(&self.dir)?), "idx"),
            Format::Arrays => opened(Arc::new(arrays::open(&self.dir)?), "arrays"),
            Format::Pictures => {
                let (cache, temporary) = cache(out)?;
                let options = folder::Options { size: wanted.size, strict: wanted.strict };
                let source = progress::decoding(out, |progress| folder::open(&self.dir, options, &cache, progress))?;
                Opened { source: Arc::new(source), kind: "folders", _temporary: temporary }
            }
        })
    }
}

fn kind(files: &Cifar10) -> &'static str {
    let official = files.train().iter().chain([files.test()]).all(|batch| batch.len() == OFFICIAL_RECORDS);
    match (files.class_names() == CLASS_NAMES, official) {
        (true, _) => "pictures",
        (false, true) => "cifar10",
        (false, false) => "cifar10-subset",
    }
}

/// Where decoded pictures are kept: in the cache folder, or in a temporary one if that cannot be written.
fn cache(out: &Output) -> Result<(PathBuf, Option<TempDir>)> {
    let dir = default_data_dir().join("folders");
    if std::fs::create_dir_all(&dir).and_then(|()| tempfile::tempfile_in(&dir)).is_ok() {
        return Ok((dir, None));
    }
    let temporary = temporary()?;
    out.note(format_args!(
        "note: {} cannot be written, so pictures are decoded anew each time; name a folder in GEMMNET_DATA_DIR",
        dir.display()
    ));
    Ok((temporary.path().to_owned(), Some(temporary)))
}

fn temporary() -> Result<TempDir> {
    TempDir::with_prefix("gemmnet-").map_err(|e| {
        let fix = "give a folder that can be written as TMPDIR or GEMMNET_DATA_DIR";
        Error::io("create a folder in", std::env::temp_dir(), e, fix)
    })
}

/// The first 1,000 test images, as in CS231n, or all if there are fewer; none if there are none.
pub(in crate::cli) fn small_test(data: &Dataset) -> Result<Option<Dataset>> {
    match data.len(Split::Test) {
        0 => Ok(None),
        images => data.clone().limit(Split::Test, images.min(1_000)).map(Some),
    }
}

/// Whether `data` has the size and the classes that the network in `checkpoint` was trained for.
pub(in crate::cli) fn check_fits<T: Element>(
    data: &Dataset,
    folder: &Folder,
    network: &Network<T>,
    names: &[String],
    checkpoint: &Path,
) -> Result<()> {
    let few = |names: &[String]| names[..names.len().min(3)].join(", ");
    let dim = network.input();
    let (here, there) = if data.dim() != dim {
        (format!("images of {}", written(data.dim())), written(dim))
    } else if names.is_empty() && data.classes() != network.classes() {
        (format!("{} classes", data.classes()), network.classes().to_string())
    } else if !names.is_empty() && data.class_names() != names {
        (format!("other classes ({}, ...)", few(data.class_names())), format!("({}, ...)", few(names)))
    } else {
        return Ok(());
    };
    let problem = format!("has {here}, the network in {} was trained on {there}", checkpoint.display());
    Err(Error::data(&folder.dir, problem, "give the data that it was trained on with --data-dir"))
}

/// Images of a split by class.
pub(super) fn counts(source: &dyn Source, split: Split) -> Vec<usize> {
    let mut counts = vec![0; source.class_names().len()];
    (0..source.len(split)).for_each(|index| counts[source.image(split, index).1] += 1);
    counts
}

/// A class is said to be rare if another has so many times its training images.
const IMBALANCE: usize = 3;

/// A sentence about classes of which one has far more training images than another.
pub(in crate::cli) fn imbalance(source: &dyn Source) -> Option<String> {
    let counts = counts(source, Split::Train);
    let most = (0..counts.len()).max_by_key(|&class| (counts[class], std::cmp::Reverse(class)))?;
    let least = (0..counts.len()).min_by_key(|&class| (counts[class], class))?;
    let name = |class: usize| &source.class_names()[class];
    (counts[most] >= IMBALANCE * counts[least].max(1)).then(|| {
        format!(
            "classes have from {} ({}) to {} ({}) training images: the accuracy of all says little about the rare ones; \
             `gemmnet eval` shows each",
            thousands(counts[least]),
            name(least),
            thousands(counts[most]),
            name(most)
        )
    })
}

/// The pictures are a data set, not an experiment: `--seed` does not change them.
const PICTURES_SEED: u64 = 0;
