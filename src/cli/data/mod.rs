//! Level 7. `gemmnet data`, and where the other commands find their data.

mod open;
mod show;
mod verify;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::output::Output;
use super::{Global, Stop, progress};
use crate::data::fetch::FetchOptions;
use crate::data::pictures::{self, write_pictures};
use crate::data::places::{default_data_dir, find_cifar10};
use crate::error::Result;

pub(super) use open::{Folder, Opened, Wanted, check_fits, imbalance, small_test};
pub(super) use verify::check;

/// Data: download CIFAR-10, check and show what lies in a folder; and the built-in pictures
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet data fetch\n  gemmnet data verify photos\n  \
                        gemmnet data show photos --out photos.png\n  \
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
    /// List what a folder holds, in any of the formats that `train` takes, and what is wrong with it
    Verify {
        /// The folder [default: --data-dir, else where `train` would look]
        dir: Option<PathBuf>,
    },
    /// Draw some images of each class on one sheet, with the names of the classes and how many images they have
    Show {
        /// The folder [default: --data-dir, else where `train` would look]
        dir: Option<PathBuf>,
        /// PNG file to write; one that exists is replaced
        #[arg(long, value_name = "FILE", default_value = "contact-sheet.png")]
        out: PathBuf,
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
        DataCommand::Verify { dir } => verify::run(&find_cifar10(dir.as_deref().or(global.data_dir.as_deref()))?, out),
        DataCommand::Show { dir, out: sheet } => {
            show::run(find_cifar10(dir.as_deref().or(global.data_dir.as_deref()))?, sheet, out)
        }
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
