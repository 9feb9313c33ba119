//! Level 7. `gemmnet report`, and the report that every run ends with: web pages, each a file that needs nothing beside itself.

mod compare;
mod confusion;
mod curves;
mod data;
mod evaluate;
mod numbers;
mod page;
mod parts;
mod pictures;
mod plots;
mod search;

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::eval::{Any, load_any};
use super::output::Output;
use super::{Stop, runs};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::store::replace;
use crate::train::Model;
use data::{Evaluation, Filters, Run};

pub(super) use evaluate::evaluate;
pub(super) use search::{Found, Tried, search_page};

/// Make a page of a run to look at, or one that compares several
///
/// Curves, numbers, filters, confusions, the pictures that the network is most wrong about, where the time went, the configuration
/// and the machine, in one HTML file. A run that is not over shows what there is.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet report runs/1\n  gemmnet report runs/1 runs/2 runs/3 --out rates.html")]
pub(super) struct ReportArgs {
    /// Folders of runs
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// HTML file to write; one that exists is replaced [default: report.html in the folder of the run, comparison.html for
    /// several]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(super) fn run(args: &ReportArgs, out: &Output) -> Result<(), Stop> {
    let path = match (&args.out, &args.runs[..]) {
        (None, [dir]) => page_path(dir),
        (path, _) => path.clone().unwrap_or_else(|| "comparison.html".into()),
    };
    let page = match &args.runs[..] {
        [dir] => page_of(dir)?,
        dirs => {
            let runs = dirs.iter().map(|dir| read(dir)).collect::<Result<Vec<_>>>()?;
            compare::comparison(&format!("{} runs", runs.len()), &runs)
        }
    };
    replace(&path, page.as_bytes())?;
    out.line(format_args!("{} shows it", path.display()))?;
    let names: Vec<String> = args.runs.iter().map(|dir| dir.display().to_string()).collect();
    out.json(&json!({ "file": path.display().to_string(), "runs": names }))
}

/// Writes the report of a run into its folder.
pub(super) fn write(dir: &Path) -> Result<()> {
    replace(&page_path(dir), page_of(dir)?.as_bytes())
}

fn page_path(dir: &Path) -> PathBuf {
    dir.join("report.html")
}

fn page_of(dir: &Path) -> Result<String> {
    let path = dir.join(runs::EVALUATION);
    let evaluation: Option<Evaluation> = if path.is_file() {
        let text = text_of(&path)?;
        let fault =
            |e| Error::data(&path, format!("cannot be read ({e})"), "remove it, or train the run to its end again");
        Some(serde_json::from_str(&text).map_err(fault)?)
    } else {
        None
    };
    let filters = match runs::saved_network(Some(dir)).ok().map(|path| load_any(&path)).transpose()? {
        Some(Any::F32(model)) => first_filters(&model),
        Some(Any::F64(model)) => first_filters(&model),
        None => None,
    };
    Ok(page::page(&read(dir)?, evaluation.as_ref(), filters.as_ref()))
}

fn text_of(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e, "give the folder of a run"))
}

fn read(dir: &Path) -> Result<Run> {
    let (config, history) = (text_of(&runs::config(dir))?, text_of(&runs::history(dir))?);
    // A folder such as `.` has no name of its own.
    let named = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let name = named.file_name().unwrap_or(named.as_os_str()).to_string_lossy().into_owned();
    Ok(Run::new(&name, &config, &history))
}

/// Of the first convolution.
fn first_filters<T: Element>(model: &Model<T>) -> Option<Filters> {
    let params = model.network.params();
    let param = params.iter().find(|param| param.shape.len() == 4)?;
    let shape = <[usize; 4]>::try_from(&param.shape[..]).ok()?;
    let values = params.get(&param.name)?.iter().map(|value| value.f64() as f32).collect();
    Some(Filters { shape, values })
}
