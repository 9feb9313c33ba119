//! Level 7. `gemmnet train`.

pub(super) mod report;
pub(super) mod start;

use std::io::LineWriter;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use indicatif::ProgressBar;
use serde_json::json;

use super::interrupt::Interrupt;
use super::output::Output;
use super::presets;
use super::progress::bar;
use super::recipe::{Choices, Dtype};
use super::runs::events::{Entry, Epoch, Step};
use super::runs::{self, Run};
use super::{Global, Stop, fault};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::profile;
use crate::train::{Event, Log, Report, Solver};
use start::Said;

/// Train a network on CIFAR-10 or on data of your own
///
/// Starts from a preset; every option given beside it changes it. With --data-dir it trains on what lies there: a folder of
/// pictures for each class, or other files, and chooses by them what is not said. Without, on CIFAR-10, which is downloaded if
/// it is not on this machine; where there is no network, the built-in pictures take its place. A run is a folder: after every
/// epoch, and by Ctrl-C, it gets a checkpoint to go on from, and in the end a report to look at.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet train\n  gemmnet train --data-dir photos\n  \
                        gemmnet train --preset deep --epochs 10 --run runs/deep\n  \
                        gemmnet train --net '[conv32-relu-pool]x3-affine10' --init he --batch-size 100\n  \
                        gemmnet train --resume runs/deep --epochs 12\n  \
                        gemmnet train --train-limit 100 --batch-size 50 --epochs 10 --no-fetch")]
pub(super) struct TrainArgs {
    /// Recipe to start from, one of those that --list-presets explains [default: sprint; three-layer-65 with a --net of
    /// one's own; own for data other than CIFAR-10]
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Explain the presets and stop [default: off]
    #[arg(long)]
    list_presets: bool,
    /// A file that says what is not said here: the config.toml of a run, or one with some of its keys, which are the long
    /// options [default: none]
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    config: Option<PathBuf>,
    #[command(flatten)]
    choices: Choices,
    /// Save and end after this epoch of all of them; --resume goes on [default: the last one]
    #[arg(long, value_name = "EPOCH")]
    stop_after: Option<f64>,
    /// Folder of the run, which is made: its config.toml, history.jsonl, model.safetensors, checkpoints and report.html
    /// [default: with --resume that of the run, else runs/1 or the next number that is free]
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    run: Option<PathBuf>,
    /// Checkpoints that stay, the last ones, of one after every epoch
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    checkpoints: usize,
    /// Go on with the run in this folder where its last checkpoint was, with its options and data [default: start anew]
    #[arg(long, value_name = "DIR",
          conflicts_with_all = ["preset", "net", "init", "batch_size", "optimizer", "group", "clip_norm", "ema", "keep", "sampler", "normalize", "dtype", "image_size"])]
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

pub(super) fn run(args: &TrainArgs, global: &Global, out: &Output) -> Result<(), Stop> {
    if args.list_presets {
        return list_presets(out);
    }
    let (config, resume) = (args.config.as_deref(), args.resume.as_deref());
    let said = Said::new(&args.choices, args.preset.as_deref(), config, resume, global)?;
    match said.dtype() {
        Dtype::F32 => train::<f32>(args, &said, out),
        Dtype::F64 => train::<f64>(args, &said, out),
    }
}

fn train<T: Element>(args: &TrainArgs, said: &Said<'_>, out: &Output) -> Result<(), Stop> {
    if args.print_every == 0 {
        return Err(Error::invalid("print-every", "every 0 iterations is not possible", "give 1 or more").into());
    }
    if args.stop_after.is_some_and(|epoch| epoch.is_nan() || epoch <= 0.0) {
        return Err(Error::invalid("stop-after", "no epochs would be trained", "give more than 0").into());
    }
    let show_profile = profile::wanted(args.profile)?;
    let (mut ready, mut run) = if let Some(dir) = &args.resume {
        let mut run = Run::open(dir)?;
        let ready = start::resumed::<T>(dir, said, out)?;
        run.go_on_after(ready.solver.checkpoint().step())?;
        (ready, run)
    } else {
        let ready = start::new::<T>(said, !args.no_fetch, out)?;
        (ready, Run::create(&runs::new_folder(args.run.as_deref(), runs::RUNS)?)?)
    };
    run.write_config(&ready.config, ready.solver.checkpoint().step())?;
    run.record(&report::start(&mut ready))?;
    ready.solver.save_with(run.saver(args.checkpoints));
    report::announce(&mut ready, args, run.dir(), out)?;
    profile::start();
    let watched = watch(&mut ready.solver, args, &mut run, out);
    let rows = profile::stop();
    if watched.is_err() && args.resume.is_none() && ready.solver.checkpoint().step() == 0 {
        run.discard();
    }
    // after Ctrl-C too
    if show_profile {
        out.line(report::profile_table(&rows))?;
    }
    report::conclude(&mut ready, &watched?, &mut run, (&rows, show_profile), out)
}

/// Trains, writes down and shows how it goes, until the end or Ctrl-C.
fn watch<T: Element>(solver: &mut Solver<T>, args: &TrainArgs, run: &mut Run, out: &Output) -> Result<Report, Stop> {
    let interrupt = Interrupt::listen();
    let bar = (!args.quiet && out.is_watched()).then(|| {
        let bar = bar(0, "{msg}  {bar:25} {pos}/{len}  {eta} left");
        out.show_bar(bar.clone());
        bar
    });
    let mut log = Log::new(LineWriter::new(out), args.print_every);
    let mut show = |event: &Event| match (&bar, event) {
        _ if args.quiet => Ok(()),
        (Some(bar), Event::Step { .. }) => {
            show(bar, event);
            Ok(())
        }
        _ => log.write(event).map_err(Stop::Output),
    };
    let until = args.stop_after.unwrap_or(solver.checkpoint().options.epochs);
    let report = follow(solver, run, until, |event| show(event).map(|()| interrupt.came()));
    out.finish_bar();
    let report = report?;
    if report.stopped_early && interrupt.came() {
        let dir = run.dir().display();
        out.note(format_args!(
            "stopped after iteration {} and saved; to go on: gemmnet train --resume {dir}",
            report.steps
        ));
        return Err(Stop::Interrupted);
    }
    Ok(report)
}

/// Trains up to an epoch and writes into the run's history what happens. `watch` sees it too, and ends training if it says so.
pub(super) fn follow<T: Element>(
    solver: &mut Solver<T>,
    run: &mut Run,
    until: f64,
    mut watch: impl FnMut(&Event) -> Result<bool, Stop>,
) -> Result<Report, Stop> {
    let dir = run.dir().display();
    fault::explain(format!("; restore it, then go on with the last good checkpoint: gemmnet train --resume {dir}"));
    let mut recorder = Recorder { before: run.seconds, step: solver.checkpoint().step(), seconds: run.seconds };
    let mut unwritten = None;
    let result = solver.train_to(until, |event| {
        let ends = watch(event).and_then(|ends| Ok(run.record(&recorder.entry(event)).map(|()| ends)?));
        match ends {
            Ok(false) => ControlFlow::Continue(()),
            Ok(true) => ControlFlow::Break(()),
            Err(stop) => {
                unwritten = Some(stop);
                ControlFlow::Break(())
            }
        }
    });
    run.seconds = recorder.seconds;
    match (unwritten, result) {
        (Some(stop), _) => Err(stop),
        (None, Err(error)) => Err(Stop::Training { error, last: last_good(run.dir()) }),
        (None, Ok(report)) => Ok(report),
    }
}

/// Where training that failed can go on, as a part of a sentence.
fn last_good(dir: &Path) -> String {
    match runs::newest_checkpoint(dir) {
        Ok(path) => format!(
            "the last good checkpoint is {}, and gemmnet train --resume {} goes on from it, with another --learning-rate if given",
            path.display(),
            dir.display()
        ),
        Err(_) => "there is no checkpoint yet: begin anew".to_owned(),
    }
}

/// Turns events into entries of the history.
#[derive(Debug)]
struct Recorder {
    /// Seconds of training before it went on.
    before: f64,
    step: usize,
    seconds: f64,
}

impl Recorder {
    fn entry(&mut self, event: &Event) -> Entry {
        match *event {
            Event::Step { step, loss, learning_rate, seconds, .. } => {
                (self.step, self.seconds) = (step, self.before + seconds);
                fault::STEP.store(step, Ordering::Relaxed);
                Entry::Step(Step { step, loss, learning_rate, seconds: self.seconds })
            }
            Event::Epoch { epoch, epochs, train_accuracy, val_accuracy, kept } => {
                let (step, epoch, seconds) = (self.step, epochs.min(epoch as f64), self.seconds);
                Entry::Epoch(Epoch { step, epoch, train_accuracy, val_accuracy, kept, seconds })
            }
        }
    }
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
    for preset in presets::all() {
        let default = match preset.name.as_str() {
            presets::DEFAULT => " (the default)",
            presets::OWN => " (the default for data other than CIFAR-10)",
            _ => "",
        };
        let arguments = preset.example().arguments();
        out.line(format_args!("{}{default}: {}\n    {arguments}", preset.name, preset.about))?;
        presets.push(json!({ "name": preset.name, "about": preset.about, "arguments": arguments }));
    }
    out.json(&json!({ "presets": presets }))
}
