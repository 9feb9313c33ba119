//! Level 7. `gemmnet train`.

mod report;
mod start;

use std::io::LineWriter;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use serde_json::json;

use super::interrupt::Interrupt;
use super::output::Output;
use super::presets::{self, PRESETS, Preset};
use super::progress::bar;
use super::{CHECKPOINT, Global, Stop};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::profile;
use crate::train::{Event, Log, Report, Solver};

/// Train a network on CIFAR-10 or on data of your own
///
/// Starts from a preset; every option given beside it changes it. With --data-dir it trains on what lies there: a folder of
/// pictures for each class, or other files, and chooses by them what is not said. Without, on CIFAR-10, which is downloaded if
/// it is not on this machine; where there is no network, the built-in pictures take its place. After every epoch the network
/// is saved. Ctrl-C saves it too.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet train\n  gemmnet train --data-dir photos\n  \
                        gemmnet train --preset deep --epochs 10 --checkpoint deep.safetensors\n  \
                        gemmnet train --net '[conv32-relu-pool]x3-affine10' --init he --batch-size 100\n  \
                        gemmnet train --resume gemmnet.safetensors --epochs 12\n  \
                        gemmnet train --train-limit 100 --batch-size 50 --epochs 10 --no-fetch")]
pub(super) struct TrainArgs {
    /// Recipe to start from, one of those that --list-presets explains [default: sprint; three-layer-65 with a --net of
    /// one's own; own for data other than CIFAR-10]
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Explain the presets and stop [default: off]
    #[arg(long)]
    list_presets: bool,
    /// Network in notation, such as [conv32-relu-pool]x2-affine10 [default: the preset's]
    #[arg(long, value_name = "NOTATION")]
    net: Option<String>,
    /// Initial weights: gaussian:STD, he, xavier, orthogonal or dirac [default: the preset's]
    #[arg(long, value_name = "INIT")]
    init: Option<String>,
    /// Passes over the training images; parts of one are possible, such as 0.5 [default: the preset's]
    #[arg(long, value_name = "N")]
    epochs: Option<f64>,
    /// Save and end after this epoch of all of them; --resume goes on [default: the last one]
    #[arg(long, value_name = "EPOCH")]
    stop_after: Option<f64>,
    /// Images in a batch [default: the preset's]
    #[arg(long, value_name = "IMAGES")]
    batch_size: Option<usize>,
    /// Update rule of all parameters: sgd, momentum, nesterov, adagrad, rmsprop, adam or adamw [default: the preset's]
    #[arg(long, value_name = "RULE")]
    optimizer: Option<String>,
    /// Learning rate that the schedule multiplies, per step; rates of a preset's groups keep their proportion to it [default:
    /// the preset's]
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// Learning rate over time: constant, exp:FACTOR (per epoch), step:EPOCHS:FACTOR, linear[:EPOCHS] (to 0),
    /// cosine[:FINAL] or onecycle[:PEAK_AT:START:FINAL] [default: the preset's]
    #[arg(long, value_name = "SCHEDULE")]
    schedule: Option<String>,
    /// Epochs (or a fraction of one) of linear warm-up before the schedule [default: the preset's]
    #[arg(long, value_name = "EPOCHS")]
    warmup_epochs: Option<f64>,
    /// A group of parameters with a rule of its own, as SELECT=RULE[,NAME=VALUE]... or SELECT=frozen; SELECT is weight, bias,
    /// scale, or a pattern of names such as conv*.weight, RULE also muon for matrices; NAME is lr, l2, schedule or one of the
    /// rule's own numbers, such as momentum, beta1, epsilon, weight_decay, iterations, fixed_norm. May be given several
    /// times: the first that selects a parameter has it, and the other options are for the rest [default: the preset's]
    #[arg(long, value_name = "GROUP")]
    group: Vec<String>,
    /// Scale gradients down whose norm, over all parameters, is above this [default: never]
    #[arg(long, value_name = "NORM")]
    clip_norm: Option<f64>,
    /// Measure and keep a moving average of the weights with this decay, such as 0.999 [default: the weights themselves]
    #[arg(long, value_name = "DECAY")]
    ema: Option<f64>,
    /// Which network is kept for use, of those after each epoch [default: the preset's]
    #[arg(long, value_name = "WHICH")]
    keep: Option<KeepName>,
    /// L2 regularisation: the loss has this / 2 times the sum of squared weights added; groups of a preset with a decay of
    /// their own keep it [default: the preset's]
    #[arg(long, value_name = "STRENGTH")]
    l2: Option<f64>,
    /// How the images of an epoch are drawn [default: the preset's]
    #[arg(long, value_name = "HOW")]
    sampler: Option<SamplerName>,
    /// Mirror training images, half of them in each epoch; alone it means random [default: the preset's]
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "random")]
    flip: Option<FlipName>,
    /// Shift training images at random by up to this many pixels in each direction [default: the preset's]
    #[arg(long, value_name = "PIXELS")]
    shift: Option<usize>,
    /// What shows where an image was shifted away [default: the preset's]
    #[arg(long, value_name = "WHAT")]
    shift_fill: Option<FillName>,
    /// Blank a square of this side at a random place of every training image; 0 for none [default: the preset's]
    #[arg(long, value_name = "PIXELS")]
    cutout: Option<usize>,
    /// What is subtracted from the pixels, and whether they are scaled [default: the preset's]
    #[arg(long, value_name = "HOW")]
    normalize: Option<NormalizationName>,
    /// Train on the first N training images only [default: all]
    #[arg(long, value_name = "N")]
    train_limit: Option<usize>,
    /// Height and width in pixels that the pictures of a folder are resized to, from the middle, with antialiasing [default:
    /// 64, or less where pictures are smaller]
    #[arg(long, value_name = "PIXELS", conflicts_with = "resume")]
    image_size: Option<usize>,
    /// Refuse a folder with pictures that cannot be read [default: leave them out and name them]
    #[arg(long)]
    strict: bool,
    /// Numbers to compute with
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    dtype: Dtype,
    /// File to save to after every epoch; one that exists is replaced then [default: that of --resume, else
    /// gemmnet.safetensors]
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
    /// Go on with the training that was saved in this file, with its options; give the same data [default: start anew]
    #[arg(long, value_name = "FILE",
          conflicts_with_all = ["preset", "net", "init", "batch_size", "optimizer", "group", "clip_norm", "ema", "keep", "sampler", "normalize"])]
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
enum KeepName {
    /// The one with the best validation accuracy
    Best,
    /// The last one: for rates that fall to 0
    Last,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SamplerName {
    /// Shuffled anew in every epoch, none twice
    Shuffle,
    /// Every batch independently, with replacement, as CS231n does
    Replacement,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FlipName {
    /// None of them
    #[value(alias = "false")]
    None,
    /// Others in every epoch
    #[value(alias = "true")]
    Random,
    /// Each in every second epoch: half of them in the first, the other half in the next
    Alternating,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FillName {
    /// Zeros, which the mean has become
    Zeros,
    /// The image again, mirrored at its border
    Reflect,
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

impl TrainArgs {
    /// The recipe to start from; `own` says that the data is other than CIFAR-10.
    fn preset(&self, own: bool) -> Result<&'static Preset> {
        let default = match (own, &self.net) {
            (true, _) => presets::OWN.name,
            (false, Some(_)) => presets::PLAIN,
            (false, None) => presets::DEFAULT,
        };
        presets::find(self.preset.as_deref().unwrap_or(default))
    }
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
    if args.stop_after.is_some_and(|epoch| epoch.is_nan() || epoch <= 0.0) {
        return Err(Error::invalid("stop-after", "no epochs would be trained", "give more than 0").into());
    }
    let profiled = profile::wanted(args.profile)?;
    let checkpoint = args.checkpoint.as_ref().or(args.resume.as_ref()).map_or(Path::new(CHECKPOINT), PathBuf::as_path);
    let mut ready = match &args.resume {
        None => start::new::<T>(args, global, out)?,
        Some(from) => start::resumed::<T>(from, args, global, out)?,
    };
    check_writable(checkpoint)?;
    ready.solver.save_to(checkpoint);
    report::announce(&mut ready, args, checkpoint, out)?;
    if profiled {
        profile::start();
    }
    let watched = watch(&mut ready.solver, args, global, checkpoint, out);
    let rows = profiled.then(profile::stop);
    // after Ctrl-C too
    if let Some(rows) = &rows {
        out.line(report::profile_table(rows))?;
    }
    report::conclude(&mut ready, &watched?, checkpoint, rows.as_deref(), out)
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
    let until = args.stop_after.unwrap_or(solver.checkpoint().options.epochs);
    let result = solver.train_to(until, |event| {
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
    if report.stopped_early && interrupt.came() {
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
    let mut presets = Vec::new();
    for preset in &PRESETS {
        let default = match preset.name {
            presets::DEFAULT => " (the default)",
            _ if preset.name == presets::OWN.name => " (the default for data other than CIFAR-10)",
            _ => "",
        };
        let (recipe, net) = presets::example(preset);
        let arguments = recipe.arguments(&net);
        out.line(format_args!("{}{default}: {}\n    {arguments}", preset.name, preset.about))?;
        presets.push(json!({ "name": preset.name, "about": preset.about, "arguments": arguments }));
    }
    out.json(&json!({ "presets": presets }))
}
