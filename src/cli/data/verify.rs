//! Level 7. `gemmnet data verify`: what a folder holds, and what is wrong with it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::open::{Folder, Wanted, counts, imbalance};
use crate::cli::output::{Output, thousands};
use crate::cli::{Stop, progress};
use crate::data::files::{Format, folder};
use crate::data::{Split, cifar10, written};
use crate::error::{Error, Result};

/// What is said of a folder.
pub(in crate::cli) struct Checked {
    pub(in crate::cli) dir: PathBuf,
    pub(in crate::cli) format: Format,
    /// What it holds.
    lines: Vec<String>,
    pub(in crate::cli) problems: Vec<Error>,
    /// All of it, in a few words, if there are no problems.
    pub(in crate::cli) state: String,
    /// What is to be done if there are some.
    fix: &'static str,
    /// What else a program may want to know.
    more: Value,
}

pub(super) fn run(dir: &Path, out: &Output) -> Result<(), Stop> {
    let checked = check(dir, out)?;
    for line in &checked.lines {
        out.line(line)?;
    }
    for problem in &checked.problems {
        out.line(problem)?;
    }
    let mut object = checked.more;
    object["dir"] = checked.dir.display().to_string().into();
    object["format"] = checked.format.describe().into();
    object["problems"] = checked.problems.iter().map(Error::to_string).collect::<Vec<_>>().into();
    out.json(&object)?;
    match checked.problems.len() {
        0 => out.line(checked.state),
        n => Err(Stop::Check(format!("{}: {n} problem(s), listed above; {}", checked.dir.display(), checked.fix))),
    }
}

/// Looks at everything in a folder.
pub(in crate::cli) fn check(dir: &Path, out: &Output) -> Result<Checked> {
    match Format::of(dir) {
        Ok(Format::Cifar10) => Ok(batches(dir)),
        Ok(Format::Pictures) => pictures(dir, out),
        Ok(format) => Ok(other(dir, format, out)),
        // What is wrong with the folder itself is a problem of the data, too.
        Err(problem) => {
            let checked = nothing(dir, Format::Cifar10);
            Ok(Checked { problems: vec![problem], ..checked })
        }
    }
}

fn nothing(dir: &Path, format: Format) -> Checked {
    let (lines, problems) = (Vec::new(), Vec::new());
    Checked { dir: dir.to_owned(), format, lines, problems, state: String::new(), fix: "mend them", more: json!({}) }
}

fn batches(dir: &Path) -> Checked {
    let report = cifar10::verify(dir);
    let batches: serde_json::Map<_, _> =
        report.batches.iter().map(|(name, records)| ((*name).to_owned(), json!(records))).collect();
    let lines = report.batches.iter();
    let lines = lines.map(|(name, records)| format!("{name}: {records} records, every label from 0 to 9")).collect();
    let official = report.has_official_size();
    let records: usize = report.batches.iter().map(|(_, records)| records).sum();
    let state = if official {
        "six batches of CIFAR-10's size".into()
    } else {
        format!("{records} records, not CIFAR-10's 60000")
    };
    Checked {
        dir: report.dir,
        format: Format::Cifar10,
        lines,
        problems: report.problems,
        state,
        fix: "mend them or run `gemmnet data fetch`",
        more: json!({ "batches": batches, "official_size": official }),
    }
}

fn pictures(dir: &Path, out: &Output) -> Result<Checked> {
    let checked = nothing(dir, Format::Pictures);
    match progress::decoding(out, |progress| folder::verify(dir, progress)) {
        Err(problem) => Ok(Checked { problems: vec![problem], ..checked }),
        Ok(folder::Report { problems, counts }) => {
            let lines = counts.iter().map(|(name, n)| format!("{name}: {} pictures", thousands(*n))).collect();
            let whole = counts.iter().map(|(_, n)| n).sum();
            let state = format!("{} whole pictures in {} classes", thousands(whole), counts.len());
            let classes: serde_json::Map<_, _> = counts.into_iter().map(|(name, n)| (name, n.into())).collect();
            let fix = "mend or remove them; `gemmnet train` leaves them out";
            Ok(Checked { lines, problems, state, fix, more: json!({ "classes": classes }), ..checked })
        }
    }
}

fn other(dir: &Path, format: Format, out: &Output) -> Checked {
    let checked = nothing(dir, format);
    let opened = Folder::given(dir.to_owned()).and_then(|folder| folder.open(Wanted::default(), out));
    let source = match opened {
        Ok(opened) => opened.source,
        Err(problem) => return Checked { problems: vec![problem], ..checked },
    };
    let names = ["training", "validation", "tests"];
    let mut lines: Vec<String> = (names.iter().zip(Split::ALL))
        .map(|(name, split)| format!("{} images for {name}", thousands(source.len(split))))
        .collect();
    lines.extend(imbalance(&*source));
    let classes: serde_json::Map<_, _> = (source.class_names().iter().cloned())
        .zip(
            Split::ALL
                .map(|split| counts(&*source, split))
                .iter()
                .fold(vec![0; source.class_names().len()], |sum, counts| {
                    sum.iter().zip(counts).map(|(a, b)| a + b).collect()
                }),
        )
        .map(|(name, n): (String, usize)| (name, n.into()))
        .collect();
    let state = format!("{} of {} in {} classes", format.describe(), written(source.dim()), source.class_names().len());
    let images = Split::ALL.map(|split| source.len(split));
    let more = json!({ "classes": classes, "train": images[0], "validation": images[1], "test": images[2] });
    Checked { lines, state, more, ..checked }
}
