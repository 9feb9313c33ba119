//! Level 7. What `gemmnet train` says before and after.

use std::path::Path;

use serde_json::json;

use super::TrainArgs;
use super::start::{Place, Ready};
use crate::blas;
use crate::cli::data::{imbalance, small_test};
use crate::cli::output::{Align, Output, Table, thousands};
use crate::cli::report::{self as page, evaluate};
use crate::cli::runs::events::{End, Entry, Images, Operation, Start};
use crate::cli::runs::{self, Run};
use crate::cli::{Stop, presets};
use crate::data::files::Format;
use crate::data::{Split, Views, written};
use crate::element::Element;
use crate::error::Result;
use crate::parallel::current_threads;
use crate::profile::Row;
use crate::simd::Isa;
use crate::train::{Report, Solver, accuracy};

/// What is about to be trained.
pub(super) fn announce<T: Element>(
    ready: &mut Ready<T>,
    args: &TrainArgs,
    run: &Path,
    out: &Output,
) -> Result<(), Stop> {
    let Ready { solver, place, preset, recipe, .. } = ready;
    let Place { folder, opened } = &**place;
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
    if preset.is_some_and(|preset| preset.name == presets::OWN) {
        let (name, choice) = (presets::OWN, recipe.arguments());
        out.line(format_args!("recipe `{name}`, chosen by the data where nothing was said: {choice}"))?;
    }
    let network = solver.network_mut();
    let what = format!("{}: {} parameters", network.spec(), thousands(network.params().count()));
    let options = &solver.checkpoint().options;
    out.line(format_args!(
        "{what}, {}, {} epoch(s) of {} images in batches of {}, from {}, to {}",
        T::NAME,
        options.epochs,
        thousands(solver.data().len(Split::Train)),
        options.batch_size,
        folder.dir.display(),
        run.display()
    ))
}

/// What the history says first.
pub(in crate::cli) fn start<T: Element>(ready: &mut Ready<T>) -> Entry {
    let Ready { solver, place, preset, .. } = ready;
    let Place { folder, opened } = &**place;
    let (network, parameters) = (solver.network_mut().spec().to_string(), solver.network_mut().params().count());
    let (data, checkpoint) = (solver.data(), solver.checkpoint());
    let [train, validation, test] = Split::ALL.map(|split| data.len(split));
    let blas = blas::setup();
    Entry::Start(Box::new(Start {
        step: checkpoint.step(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        threads: current_threads(),
        processor: processor(),
        vectors: Isa::used().to_string(),
        blas: format!("{} ({})", blas.name, blas.core),
        dtype: T::NAME.to_owned(),
        network,
        parameters,
        preset: preset.map(|preset| preset.name.clone()),
        seed: checkpoint.options.seed,
        data: opened.kind.to_owned(),
        data_dir: folder.dir.display().to_string(),
        image: data.dim(),
        images: Images { train, validation, test },
        classes: data.class_names().to_vec(),
        steps: solver.steps(),
        steps_per_epoch: solver.steps_per_epoch(),
    }))
}

/// What the system calls the processor.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// How it went; `profile` is where the time went, and whether that is to be shown.
pub(super) fn conclude<T: Element>(
    ready: &mut Ready<T>,
    report: &Report,
    run: &mut Run,
    (rows, show): (&[Row], bool),
    out: &Output,
) -> Result<(), Stop> {
    let Ready { solver, place, preset, .. } = ready;
    let Place { folder, opened } = &**place;
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
    write_down(solver, report, run, tests.map(|tests| tests.1), rows)?;
    let dir = run.dir().display();
    out.line(format_args!(
        "{seconds:.1} s of training, {speed:.0} images/s, {threads} thread(s); the network and the report are in {dir}"
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
        "preset": preset.map(|preset| &preset.name),
        "epochs": whole_or_not(options.epochs),
        "steps": report.steps,
        "dtype": T::NAME,
        "seed": options.seed,
        "threads": threads,
        "data": opened.kind,
        "data_dir": folder.dir.display().to_string(),
        "run": dir.to_string(),
    });
    object["parameters"] = solver.network_mut().params().count().into();
    if show {
        object["profile"] = rows.iter().map(|row| json!(Operation::from(row))).collect();
    }
    out.json(&object)
}

/// The end of the history, what the network makes of the validation images, and the page.
fn write_down<T: Element>(
    solver: &mut Solver<T>,
    report: &Report,
    run: &mut Run,
    test_accuracy: Option<f64>,
    rows: &[Row],
) -> Result<()> {
    let (epochs, batch_size) = (solver.checkpoint().options.epochs, solver.checkpoint().options.batch_size);
    if !report.stopped_early {
        run.record(&Entry::End(Box::new(End {
            step: report.steps,
            kept_epoch: epochs.min(report.kept_epoch as f64),
            kept_val_accuracy: report.kept_val_accuracy,
            test_accuracy,
            seconds: run.seconds,
            images_per_second: report.images_per_second,
            profile: rows.iter().map(Operation::from).collect(),
        })))?;
    }
    let data = solver.data().clone();
    let evaluation = evaluate(solver.network_mut(), &data, batch_size)?;
    run.write(runs::EVALUATION, serde_json::to_string(&evaluation).expect("plain data has a JSON form").as_bytes())?;
    page::write(run.dir())
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
