//! Level 7. What `gemmnet train` says before and after.

use std::path::Path;

use serde_json::json;

use super::TrainArgs;
use super::start::Ready;
use crate::cli::Stop;
use crate::cli::data::{imbalance, small_test};
use crate::cli::output::{Align, Output, Table, thousands};
use crate::data::files::Format;
use crate::data::{Split, Views, written};
use crate::element::Element;
use crate::parallel::current_threads;
use crate::profile::Row;
use crate::train::{Report, accuracy};

/// What is about to be trained.
pub(super) fn announce<T: Element>(
    ready: &mut Ready<T>,
    args: &TrainArgs,
    checkpoint: &Path,
    out: &Output,
) -> Result<(), Stop> {
    let Ready { solver, folder, opened, preset } = ready;
    let data = solver.data();
    let notes = data.notes().iter().cloned().chain(imbalance(&*opened.source));
    notes.for_each(|note| out.note(format_args!("note: {note}")));
    if args.quiet {
        return Ok(());
    }
    if folder.format != Format::Cifar10 {
        let [train, validation, test] = Split::ALL.map(|split| thousands(data.len(split)));
        out.line(format_args!(
            "{} holds {}: {train} images for training, {validation} for validation, {test} for tests, of {} in {} classes",
            folder.dir.display(),
            folder.format.describe(),
            written(data.dim()),
            data.classes()
        ))?;
    }
    if let Some((name, Some(choice))) = preset {
        out.line(format_args!("recipe `{name}`, chosen by the data where nothing was said: {choice}"))?;
    }
    if args.resume.is_none() && checkpoint.exists() {
        let file = checkpoint.display();
        out.note(format_args!("note: {file} will be replaced after the first epoch, or by Ctrl-C"));
    }
    let network = solver.network_mut();
    let what = format!("{}: {} parameters", network.spec(), thousands(network.params().count()));
    let options = &solver.checkpoint().options;
    out.line(format_args!(
        "{what}, {}, {} epoch(s) of {} images in batches of {}, from {}",
        T::NAME,
        options.epochs,
        thousands(solver.data().len(Split::Train)),
        options.batch_size,
        folder.dir.display()
    ))
}

/// How it went; `rows` is the profile, if there is one.
pub(super) fn conclude<T: Element>(
    ready: &mut Ready<T>,
    report: &Report,
    checkpoint: &Path,
    rows: Option<&[Row]>,
    out: &Output,
) -> Result<(), Stop> {
    let Ready { solver, folder, opened, preset } = ready;
    let (options, data) = (solver.checkpoint().options.clone(), solver.data().clone());
    let mut measure = |data| accuracy(solver.network_mut(), data, Split::Test, options.batch_size, Views::One);
    let tests = match small_test(&data)? {
        Some(small) => Some((measure(&small)?, measure(&data)?, small.len(Split::Test))),
        None => None,
    };
    out.line(format_args!(
        "validation accuracy: {:.4}, of the network that is kept, after epoch {}; {:.4} in the end ({} images)",
        report.kept_val_accuracy,
        report.kept_epoch,
        report.final_val_accuracy,
        thousands(data.len(Split::Validation))
    ))?;
    match tests {
        Some((test, test_full, small)) => out.line(format_args!(
            "test accuracy: {test:.4} on the first {} images, {test_full:.4} on all {}",
            thousands(small),
            thousands(data.len(Split::Test))
        ))?,
        None => out.line("test accuracy: none, the data has no images for tests")?,
    }
    let (seconds, speed, threads) = (report.train_seconds, report.images_per_second, current_threads());
    let file = checkpoint.display();
    out.line(format_args!(
        "{seconds:.1} s of training, {speed:.0} images/s, {threads} thread(s); the network is in {file}"
    ))?;
    let (network, history) = (solver.network_mut().spec().to_string(), solver.history());
    let mut object = json!({
        "kept_val_accuracy": report.kept_val_accuracy,
        "kept_epoch": report.kept_epoch,
        "final_val_accuracy": report.final_val_accuracy,
        "final_train_accuracy": report.final_train_accuracy,
        "final_loss": history.loss.last(),
        "test_accuracy": tests.map(|tests| tests.1),
        "test_1000_accuracy": tests.map(|tests| tests.0),
        "val_accuracy": history.val_accuracy,
        "train_accuracy": history.train_accuracy,
        "train_seconds": seconds,
        "images_per_second": speed,
        "network": network,
        "preset": preset.as_ref().map(|preset| preset.0),
        "epochs": whole_or_not(options.epochs),
        "steps": report.steps,
        "dtype": T::NAME,
        "seed": options.seed,
        "threads": threads,
        "data": opened.kind,
        "data_dir": folder.dir.display().to_string(),
        "checkpoint": file.to_string(),
    });
    object["parameters"] = solver.network_mut().params().count().into();
    if let Some(rows) = rows {
        object["profile"] = rows.iter().map(profile_json).collect();
    }
    out.json(&object)
}

/// A number of epochs, which is whole most of the time.
fn whole_or_not(epochs: f64) -> serde_json::Value {
    if epochs.fract() == 0.0 { json!(epochs as u64) } else { json!(epochs) }
}

/// Where the time went; [`crate::profile`] says how operations and bytes are counted.
pub(super) fn profile_table(rows: &[Row]) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("operation", Left),
        ("phase", Left),
        ("seconds", Right),
        ("share", Right),
        ("calls", Right),
        ("GFLOP/s", Right),
        ("MB/call", Right),
        ("GB/s", Right),
    ]);
    let total: f64 = rows.iter().map(|row| row.time.as_secs_f64()).sum();
    for row in rows {
        let (seconds, bytes) = (row.time.as_secs_f64(), row.bytes as f64);
        table.row([
            row.op.clone(),
            row.phase.name().to_owned(),
            format!("{seconds:.3}"),
            format!("{:.1} %", 100.0 * seconds / total),
            row.calls.to_string(),
            if row.flops > 0 { format!("{:.1}", row.flops as f64 / seconds / 1e9) } else { String::new() },
            format!("{:.2}", bytes / row.calls as f64 / 1e6),
            format!("{:.1}", bytes / seconds / 1e9),
        ]);
    }
    table.row(["total".into(), String::new(), format!("{total:.3}")].into_iter().chain(vec![String::new(); 5]));
    table
}

fn profile_json(row: &Row) -> serde_json::Value {
    json!({
        "operation": row.op,
        "phase": row.phase.name(),
        "seconds": row.time.as_secs_f64(),
        "calls": row.calls,
        "flops": row.flops,
        "bytes": row.bytes,
    })
}
