//! Level 7. `gemmnet data`, and where the other commands find their data.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde_json::json;
use tempfile::TempDir;

use super::output::Output;
use super::{Global, Stop, progress};
use crate::data::cifar10::{self, OFFICIAL_RECORDS};
use crate::data::fetch::{FetchOptions, MIRROR_VARIABLE};
use crate::data::pictures::{self, CLASS_NAMES, write_pictures};
use crate::data::places::{default_data_dir, find_cifar10};
use crate::data::{Cifar10, Dataset, Normalization, Source, Split, written};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::network::Network;

/// CIFAR-10: download, check; and the built-in pictures
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet data fetch\n  gemmnet data verify --data-dir cifar-10-batches-bin\n  \
                        gemmnet data pictures pictures --records 500")]
pub(super) struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    /// Download CIFAR-10 (170 MB) into --data-dir or the user's cache folder; goes on where an earlier run stopped
    Fetch {
        /// Another address of cifar-10-binary.tar.gz [default: GEMMNET_CIFAR10_URL, else the official one]
        #[arg(long, visible_alias = "url", value_name = "URL")]
        mirror: Option<String>,
    },
    /// List everything that is wrong with a folder of batches
    Verify {
        /// The folder [default: --data-dir, else where `train` would look]
        dir: Option<PathBuf>,
    },
    /// Draw the built-in data set, ten classes of 32x32 pictures, as CIFAR-10 files
    Pictures {
        /// The folder to write to; it is made if need be
        dir: PathBuf,
        /// Pictures in each of the six files, 3,073 bytes each
        #[arg(long, value_name = "N", default_value_t = pictures::DEFAULT_RECORDS)]
        records: usize,
    },
}

pub(super) fn run(args: &DataArgs, global: &Global, out: &Output) -> Result<(), Stop> {
    match &args.command {
        DataCommand::Fetch { mirror } => {
            let dir = global.data_dir.clone().unwrap_or_else(default_data_dir);
            let folder = progress::fetch(&FetchOptions { dir, url: mirror.clone() }, out)?;
            out.line(format_args!("CIFAR-10 is in {}", folder.display()))?;
            out.json(&json!({ "dir": folder.display().to_string() }))
        }
        DataCommand::Verify { dir } => verify(&find_cifar10(dir.as_deref().or(global.data_dir.as_deref()))?, out),
        DataCommand::Pictures { dir, records } => {
            write_pictures(dir, global.seed(), *records)?;
            out.line(format_args!(
                "6 files of {records} pictures are in {0}; train on them with --data-dir {0}",
                dir.display()
            ))?;
            out.json(&json!({ "dir": dir.display().to_string(), "records": records, "seed": global.seed() }))
        }
    }
}

fn verify(dir: &Path, out: &Output) -> Result<(), Stop> {
    let report = cifar10::verify(dir);
    for (name, records) in &report.batches {
        out.line(format_args!("{name}: {records} records, every label from 0 to 9"))?;
    }
    for problem in &report.problems {
        out.line(problem)?;
    }
    let batches: serde_json::Map<_, _> =
        report.batches.iter().map(|(name, records)| ((*name).to_owned(), json!(records))).collect();
    let problems: Vec<_> = report.problems.iter().map(Error::to_string).collect();
    out.json(&json!({
        "dir": report.dir.display().to_string(),
        "batches": batches,
        "problems": problems,
        "official_size": report.has_official_size(),
    }))?;
    match report.problems.len() {
        0 if report.has_official_size() => out.line("six batches of CIFAR-10's size"),
        0 => out.line("six sound batches, not of CIFAR-10's size"),
        n => Err(Stop::Check(format!(
            "{}: {n} problem(s), listed above; mend them or run `gemmnet data fetch`",
            report.dir.display()
        ))),
    }
}

/// Where data is read from.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) dir: PathBuf,
    /// Keeps a folder of pictures that could go nowhere else.
    _temporary: Option<TempDir>,
}

impl Folder {
    /// What was asked for with `--data-dir`; or CIFAR-10 where it can be found, or else, if `fetch`, downloaded; where
    /// that fails, the built-in pictures.
    pub(super) fn find(global: &Global, fetch: bool, out: &Output) -> Result<Self, Stop> {
        let missing = match find_cifar10(global.data_dir.as_deref()) {
            Ok(dir) => return Ok(Self::lasting(dir)),
            Err(missing) => missing,
        };
        let reason = if fetch {
            out.note("CIFAR-10 is not on this machine; downloading it (170 MB; --no-fetch does without)");
            match progress::fetch(&FetchOptions { dir: default_data_dir(), url: None }, out) {
                Ok(dir) => return Ok(Self::lasting(dir)),
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
    pub(super) fn of_classes(classes: &[String], global: &Global) -> Result<Self> {
        match &global.data_dir {
            None if classes == CLASS_NAMES => Self::pictures(),
            dir => find_cifar10(dir.as_deref()).map(Self::lasting),
        }
    }

    fn lasting(dir: PathBuf) -> Self {
        Folder { dir, _temporary: None }
    }

    /// The built-in pictures, always the same ones: drawn once and kept in the cache folder, or in a temporary one if that
    /// cannot be written.
    fn pictures() -> Result<Self> {
        let dir = default_data_dir().join("pictures");
        let report = cifar10::verify(&dir);
        let complete = report.problems.is_empty() && report.batches.iter().all(|b| b.1 == pictures::DEFAULT_RECORDS);
        if complete || write_pictures(&dir, PICTURES_SEED, pictures::DEFAULT_RECORDS).is_ok() {
            return Ok(Self::lasting(dir));
        }
        let temporary = TempDir::with_prefix("gemmnet-").map_err(|e| {
            let fix = "give a folder that can be written as TMPDIR or GEMMNET_DATA_DIR";
            Error::io("create a folder in", std::env::temp_dir(), e, fix)
        })?;
        write_pictures(temporary.path(), PICTURES_SEED, pictures::DEFAULT_RECORDS)?;
        Ok(Folder { dir: temporary.path().to_owned(), _temporary: Some(temporary) })
    }

    /// The data, and what it is, for results: `cifar10`, `cifar10-subset` or `pictures`.
    pub(super) fn open(&self, normalization: Normalization) -> Result<(Dataset, &'static str)> {
        let files = Cifar10::open(&self.dir)?;
        let official = files.train().iter().chain([files.test()]).all(|batch| batch.len() == OFFICIAL_RECORDS);
        let kind = match (files.class_names() == CLASS_NAMES, official) {
            (true, _) => "pictures",
            (false, true) => "cifar10",
            (false, false) => "cifar10-subset",
        };
        Ok((Dataset::new(Arc::new(files), normalization)?, kind))
    }
}

/// The first 1,000 test images, as in CS231n, or all if there are fewer.
pub(super) fn small_test(data: &Dataset) -> Result<Dataset> {
    data.clone().limit(Split::Test, data.len(Split::Test).min(1_000))
}

/// Whether `data` has the size and the classes that the network in `checkpoint` was trained for.
pub(super) fn check_fits<T: Element>(
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

/// The pictures are a data set, not an experiment: `--seed` does not change them.
const PICTURES_SEED: u64 = 0;
