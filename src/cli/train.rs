//! Level 7. `gemmnet train`.

use std::io::LineWriter;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use serde_json::json;

use super::data::{Folder, check_fits, small_test};
use super::interrupt::Interrupt;
use super::output::{Align, Output, Table, thousands};
use super::presets::{self, PRESETS};
use super::progress::bar;
use super::{CHECKPOINT, Global, Stop};
use crate::data::cifar10::DIM;
use crate::data::{Augment, Batches, Normalization, Sampler, Split};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::init::Init;
use crate::nn::network::Network;
use crate::nn::notation::NetworkSpec;
use crate::optim::{LearningRate, Schedule, UpdateRule};
use crate::profile::{self, Row};
use crate::train::{Checkpoint, Event, Log, Report, Solver, SolverOptions, accuracy};

/// Train a network on CIFAR-10
///
/// Starts from a preset; every option given beside it changes it. Without CIFAR-10 on this machine it is downloaded; where
/// there is no network, the built-in pictures take its place. After every epoch the network is saved. Ctrl-C saves it too.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  gemmnet train\n  gemmnet train --preset deep --epochs 10 --checkpoint deep.safetensors\n  \
                        gemmnet train --net '[conv32-relu-pool]x3-affine10' --init he --batch-size 100\n  \
                        gemmnet train --resume gemmnet.safetensors --epochs 12\n  \
                        gemmnet train --train-limit 100 --batch-size 50 --epochs 10 --no-fetch"
)]
pub(super) struct TrainArgs {
    /// Recipe to start from: three-layer, three-layer-65 or deep
    #[arg(long, value_name = "NAME", default_value = presets::DEFAULT)]
    preset: String,
    /// Explain the presets and stop [default: off]
    #[arg(long)]
    list_presets: bool,
    /// Network in notation, such as [conv32-relu-pool]x2-affine10 [default: the preset's]
    #[arg(long, value_name = "NOTATION")]
    net: Option<String>,
    /// Initial weights: gaussian:STD, he, xavier or orthogonal [default: the preset's]
    #[arg(long, value_name = "INIT")]
    init: Option<String>,
    /// Passes over the training images [default: the preset's]
    #[arg(long, value_name = "N")]
    epochs: Option<usize>,
    /// Images in a batch [default: the preset's]
    #[arg(long, value_name = "IMAGES")]
    batch_size: Option<usize>,
    /// Update rule: sgd, momentum, nesterov, adagrad, rmsprop, adam or adamw [default: the preset's]
    #[arg(long, value_name = "RULE")]
    optimizer: Option<String>,
    /// Learning rate that the schedule multiplies, per step [default: the preset's]
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// Learning rate over time: constant, exp:FACTOR (per epoch), step:EPOCHS:FACTOR, cosine[:FINAL] or
    /// onecycle[:PEAK_AT:START:FINAL] [default: the preset's]
    #[arg(long, value_name = "SCHEDULE")]
    schedule: Option<String>,
    /// Epochs (or a fraction of one) of linear warm-up before the schedule [default: the preset's]
    #[arg(long, value_name = "EPOCHS")]
    warmup_epochs: Option<f64>,
    /// L2 regularisation: the loss has this / 2 times the sum of squared weights added [default: the preset's]
    #[arg(long, value_name = "STRENGTH")]
    l2: Option<f64>,
    /// How the images of an epoch are drawn [default: the preset's]
    #[arg(long, value_name = "HOW")]
    sampler: Option<SamplerName>,
    /// Mirror training images at random, half of them in each epoch [default: the preset's]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    flip: Option<bool>,
    /// Shift training images at random by up to this many pixels in each direction [default: the preset's]
    #[arg(long, value_name = "PIXELS")]
    shift: Option<usize>,
    /// What is subtracted from the pixels, and whether they are scaled [default: the preset's]
    #[arg(long, value_name = "HOW")]
    normalize: Option<NormalizationName>,
    /// Train on the first N training images only [default: all]
    #[arg(long, value_name = "N")]
    train_limit: Option<usize>,
    /// Numbers to compute with
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    dtype: Dtype,
    /// File to save to after every epoch; one that exists is replaced then [default: that of --resume, else
    /// gemmnet.safetensors]
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
    /// Go on with the training that was saved in this file, with its options; give the same data [default: start anew]
    #[arg(long, value_name = "FILE",
          conflicts_with_all = ["preset", "net", "init", "batch_size", "optimizer", "sampler", "normalize"])]
    resume: Option<PathBuf>,
    /// Iterations from one line about the loss to the next, where there is no progress bar
    #[arg(long, value_name = "N", default_value_t = 20)]
    print_every: usize,
    /// No progress, only the result [default: off]
    #[arg(long)]
    quiet: bool,
    /// Show at the end where the time of training went; GEMMNET_PROFILE=1 does too [default: off]
    #[arg(long)]
    profile: bool,
    /// Do not try to download CIFAR-10 [default: try]
    #[arg(long)]
    no_fetch: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SamplerName {
    /// Shuffled anew in every epoch, none twice
    Shuffle,
    /// Every batch independently, with replacement, as CS231n does
    Replacement,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum NormalizationName {
    /// Subtract the mean of the training images, pixel by pixel
    MeanImage,
    /// Subtract each channel's mean and divide by its standard deviation
    PerChannel,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    /// 32 bits: twice as fast
    F32,
    /// 64 bits: for comparing results
    F64,
}

pub(super) fn run(args: &TrainArgs, global: &Global, out: &Output) -> Result<(), Stop> {
    if args.list_presets {
        return list_presets(out);
    }
    match args.dtype {
        Dtype::F32 => train::<f32>(args, global, out),
        Dtype::F64 => train::<f64>(args, global, out),
    }
}

fn train<T: Element>(args: &TrainArgs, global: &Global, out: &Output) -> Result<(), Stop> {
    if args.print_every == 0 {
        return Err(Error::invalid("print-every", "every 0 iterations is not possible", "give 1 or more").into());
    }
    let profiled = profile::wanted(args.profile)?;
    let checkpoint = args.checkpoint.as_ref().or(args.resume.as_ref()).map_or(Path::new(CHECKPOINT), PathBuf::as_path);
    let (mut solver, folder, data_kind) = match &args.resume {
        None => start::<T>(args, global, out)?,
        Some(from) => resume::<T>(from, args, global)?,
    };
    check_writable(checkpoint)?;
    solver.save_to(checkpoint);

    let options = solver.checkpoint().options.clone();
    let data = solver.data().clone();
    let network = solver.network_mut().spec().to_string();
    let parameters = solver.network_mut().params().count();
    data.notes().iter().for_each(|note| out.note(format_args!("note: {note}")));
    if !args.quiet {
        if args.resume.is_none() && checkpoint.exists() {
            out.note(format_args!(
                "note: {} will be replaced after the first epoch, or by Ctrl-C",
                checkpoint.display()
            ));
        }
        out.line(format_args!(
            "{network}: {} parameters, {}, {} epoch(s) of {} images in batches of {}, from {}",
            thousands(parameters),
            T::NAME,
            options.epochs,
            thousands(data.len(Split::Train)),
            options.batch_size,
            folder.dir.display()
        ))?;
    }
    if profiled {
        profile::start();
    }
    let watched = watch(&mut solver, args, global, checkpoint, out);
    let rows = profiled.then(profile::stop);
    // after Ctrl-C too
    if let Some(rows) = &rows {
        out.line(profile_table(rows))?;
    }
    let report = watched?;

    let small = small_test(&data)?;
    let mut measure = |data| accuracy(solver.network_mut(), data, Split::Test, options.batch_size);
    let (test, test_full) = (measure(&small)?, measure(&data)?);
    let history = solver.history();
    out.line(format_args!(
        "validation accuracy: {:.4}, the best, after epoch {}; {:.4} in the end ({} images)",
        report.best_val_accuracy,
        report.best_epoch,
        report.final_val_accuracy,
        thousands(data.len(Split::Validation))
    ))?;
    out.line(format_args!(
        "test accuracy of the best: {test:.4} on the first {} images, {test_full:.4} on all {}",
        thousands(small.len(Split::Test)),
        thousands(data.len(Split::Test))
    ))?;
    out.line(format_args!(
        "{:.1} s of training, {:.0} images/s, {} thread(s); the network is in {}",
        report.train_seconds,
        report.images_per_second,
        rayon::current_num_threads(),
        checkpoint.display()
    ))?;
    let mut object = json!({
        "best_val_accuracy": report.best_val_accuracy,
        "best_epoch": report.best_epoch,
        "final_val_accuracy": report.final_val_accuracy,
        "final_train_accuracy": report.final_train_accuracy,
        "final_loss": history.loss.last(),
        "test_accuracy": test_full,
        "test_1000_accuracy": test,
        "val_accuracy": history.val_accuracy,
        "train_accuracy": history.train_accuracy,
        "train_seconds": report.train_seconds,
        "images_per_second": report.images_per_second,
        "parameters": parameters,
        "network": network,
        "preset": args.resume.is_none().then_some(&args.preset),
        "epochs": options.epochs,
        "steps": report.steps,
        "dtype": T::NAME,
        "seed": options.seed,
        "threads": rayon::current_num_threads(),
        "data": data_kind,
        "data_dir": folder.dir.display().to_string(),
        "checkpoint": checkpoint.display().to_string(),
    });
    if let Some(rows) = &rows {
        object["profile"] = rows.iter().map(profile_json).collect();
    }
    out.json(&object)
}

/// Where the time went; [`profile`] says how operations and bytes are counted.
fn profile_table(rows: &[Row]) -> Table {
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

/// A solver with its data: where that is from, and what it is.
type Ready<T> = (Solver<T>, Folder, &'static str);

/// A new training. What the user typed is checked before anything is downloaded.
fn start<T: Element>(args: &TrainArgs, global: &Global, out: &Output) -> Result<Ready<T>, Stop> {
    let preset = presets::find(&args.preset)?;
    let spec = NetworkSpec::parse(args.net.as_deref().unwrap_or(preset.net))?;
    let init: Init = args.init.as_deref().unwrap_or(preset.init).parse()?;
    let network = Network::<T>::new(&spec, DIM, init, global.seed())?;
    let schedule: Schedule = args.schedule.as_deref().unwrap_or(preset.schedule).parse()?;
    let base = args.learning_rate.unwrap_or(preset.learning_rate);
    let options = SolverOptions {
        epochs: args.epochs.unwrap_or(preset.epochs),
        batch_size: args.batch_size.unwrap_or(preset.batch_size),
        rule: args.optimizer.as_deref().unwrap_or(preset.optimizer).parse::<UpdateRule>()?,
        learning_rate: LearningRate::new(base, schedule, args.warmup_epochs.unwrap_or(preset.warmup_epochs))?,
        l2: args.l2.unwrap_or(preset.l2),
        sampler: match args.sampler {
            None => preset.sampler,
            Some(SamplerName::Shuffle) => Sampler::ShuffledEpochs,
            Some(SamplerName::Replacement) => Sampler::WithReplacement,
        },
        augment: augment(args, preset.augment),
        seed: global.seed(),
        verbose: false,
        ..SolverOptions::default()
    };
    Batches::new(1, options.batch_size)?;
    let normalization = match args.normalize {
        None => preset.normalization,
        Some(NormalizationName::MeanImage) => Normalization::MeanImage,
        Some(NormalizationName::PerChannel) => Normalization::PerChannel,
    };

    let folder = Folder::find(global, !args.no_fetch, out)?;
    let (mut data, kind) = folder.open(normalization)?;
    if let Some(samples) = args.train_limit {
        data = data.limit(Split::Train, samples)?;
    }
    Ok((Solver::new(network, data, options)?, folder, kind))
}

/// A training that was saved, with the options that were given again.
fn resume<T: Element>(from: &Path, args: &TrainArgs, global: &Global) -> Result<Ready<T>, Stop> {
    let mut checkpoint = Checkpoint::<T>::load(from)?;
    let options = &mut checkpoint.options;
    if let Some(seed) = global.seed.filter(|&seed| seed != options.seed) {
        let problem = format!("{seed} is not that of the checkpoint, {}", options.seed);
        return Err(Error::invalid("seed", problem, "leave it out").into());
    }
    options.epochs = args.epochs.unwrap_or(options.epochs);
    options.l2 = args.l2.unwrap_or(options.l2);
    options.augment = augment(args, options.augment.unwrap_or_default());
    options.verbose = false;
    if args.learning_rate.is_some() || args.schedule.is_some() || args.warmup_epochs.is_some() {
        let schedule = match &args.schedule {
            Some(schedule) => schedule.parse()?,
            None => options.learning_rate.schedule(),
        };
        options.learning_rate = LearningRate::new(
            args.learning_rate.unwrap_or(options.learning_rate.base()),
            schedule,
            args.warmup_epochs.unwrap_or(options.learning_rate.warmup_epochs()),
        )?;
    }
    let folder = Folder::of_classes(&checkpoint.trained.class_names, global)?;
    // The solver puts the checkpoint's normalisation in the place of this one.
    let (mut data, kind) = folder.open(Normalization::MeanImage)?;
    check_fits(&data, &folder, &checkpoint.trained, from)?;
    if let Some(samples) = args.train_limit {
        data = data.limit(Split::Train, samples)?;
    }
    Ok((Solver::resume(checkpoint, data)?, folder, kind))
}

fn augment(args: &TrainArgs, base: Augment) -> Option<Augment> {
    let augment = Augment { flip: args.flip.unwrap_or(base.flip), shift: args.shift.unwrap_or(base.shift) };
    (augment != Augment::default()).then_some(augment)
}

/// Whether a file can be made beside `path`: better to know now than after the first epoch.
fn check_writable(path: &Path) -> Result<()> {
    let fix = "choose a file in a folder that exists and can be written with --checkpoint";
    if path.is_dir() {
        return Err(Error::data(path, "is a folder, not a file to save to", fix));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    tempfile::tempfile_in(folder).map_err(|e| Error::io("write", path, e, fix))?;
    Ok(())
}

/// Trains and shows how it goes, until the end or Ctrl-C.
fn watch<T: Element>(
    solver: &mut Solver<T>,
    args: &TrainArgs,
    global: &Global,
    checkpoint: &Path,
    out: &Output,
) -> Result<Report, Stop> {
    let interrupt = Interrupt::listen();
    let bar = (!args.quiet && out.is_watched()).then(|| {
        let bar = bar(0, "{msg}  {bar:25} {pos}/{len}  {eta} left");
        out.show_bar(bar.clone());
        bar
    });
    let mut log = Log::new(LineWriter::new(out), args.print_every);
    let mut unwritten = None;
    let result = solver.train(|event| {
        let written = match (&bar, event) {
            _ if args.quiet => Ok(()),
            (Some(bar), Event::Step { .. }) => {
                show(bar, event);
                Ok(())
            }
            _ => log.write(event),
        };
        unwritten = written.err();
        if unwritten.is_some() || interrupt.came() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    out.finish_bar();
    if let Some(reason) = unwritten {
        return Err(Stop::Output(reason));
    }
    let report = result?;
    if report.stopped_early {
        let mut command = format!("gemmnet train --resume {}", checkpoint.display());
        let limit = args.train_limit.map(|n| format!(" --train-limit {n}"));
        let data_dir = global.data_dir.as_ref().map(|dir| format!(" --data-dir {}", dir.display()));
        let dtype = (T::NAME != f32::NAME).then(|| format!(" --dtype {}", T::NAME));
        command.extend([limit, data_dir, dtype].into_iter().flatten());
        out.note(format_args!("stopped after iteration {} and saved; to go on: {command}", report.steps));
        return Err(Stop::Interrupted);
    }
    Ok(report)
}

/// Brings the bar up to date.
fn show(bar: &ProgressBar, event: &Event) {
    if let Event::Step { epoch, epochs, step, steps, loss, images_per_second, .. } = *event {
        if bar.length() == Some(0) {
            bar.set_length(steps as u64);
            // Iterations before a checkpoint say nothing about the speed.
            bar.set_position(step as u64);
            bar.reset_eta();
        }
        bar.set_position(step as u64);
        bar.set_message(format!("epoch {epoch}/{epochs}  loss {loss:.4}  {images_per_second:.0} images/s"));
    }
}

fn list_presets(out: &Output) -> Result<(), Stop> {
    for preset in &PRESETS {
        let default = if preset.name == presets::DEFAULT { " (the default)" } else { "" };
        out.line(format_args!("{}{default}: {}\n    {}", preset.name, preset.about, preset.arguments()))?;
    }
    let presets: Vec<_> = PRESETS
        .map(|preset| json!({ "name": preset.name, "about": preset.about, "arguments": preset.arguments() }))
        .into();
    out.json(&json!({ "presets": presets }))
}
