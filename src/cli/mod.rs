//! Level 7. The command line: arguments, dispatch, exit codes.
//!
//! | exit code | when |
//! | --- | --- |
//! | 0 | done |
//! | 1 | something failed: a file, the network, a check, the training |
//! | 2 | the arguments make no sense |
//! | 130 | interrupted by Ctrl-C |
//! | 141 | whoever read the output stopped reading |

mod bench;
mod data;
mod doctor;
mod eval;
mod export;
mod fault;
mod gradcheck;
mod import;
mod interrupt;
mod output;
mod predict;
mod presets;
mod progress;
mod recipe;
mod report;
mod runs;
mod summary;
mod train;
mod tune;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::error::Error;
use crate::simd::Isa;
use crate::{blas, parallel};
use output::Output;
#[cfg(fuzzing)]
pub use recipe::configs_again;

const EXAMPLES: &str = "\
Examples:
  gemmnet train                              the three-layer network that passes 65 % on CIFAR-10
  gemmnet train --preset deep --epochs 3     another recipe, shortened
  gemmnet train --net '[conv32-relu-pool]x3-affine10' --init he
  gemmnet eval                               the network of the last run
  gemmnet bench                              naive against fast layers
  gemmnet doctor                             what this machine offers";

/// Convolutional networks on CPUs: trains, checks and measures them.
#[derive(Debug, Parser)]
#[command(name = "gemmnet", version, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
struct Global {
    /// Number of threads [default: GEMMNET_NUM_THREADS, else one per core]. Results do not depend on it
    #[arg(long, global = true, value_name = "N", help_heading = "Global options")]
    threads: Option<usize>,
    /// Print one JSON object as the last line of stdout, and everything else to stderr [default: off]
    #[arg(long, global = true, help_heading = "Global options")]
    json: bool,
    /// Folder with data: CIFAR-10's or CIFAR-100's binary files, a folder of JPEG, PNG, WebP or BMP pictures for each class
    /// (with train, val and test above the classes if there are such folders), IDX files as MNIST's, or NumPy arrays x_train.npy,
    /// y_train.npy and so on [default: the first with CIFAR-10 of GEMMNET_DATA_DIR, ./data, and gemmnet in the user's cache
    /// folder]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    data_dir: Option<PathBuf>,
    /// Seed of all that is random: the same one gives the same results, to the bit [default: 0; with --resume or --config what the run had]
    #[arg(long, global = true, value_name = "N", help_heading = "Global options")]
    seed: Option<u64>,
}

impl Global {
    /// For commands that have no other source of it than this option.
    fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Train(Box<train::TrainArgs>),
    Tune(Box<tune::TuneArgs>),
    Eval(eval::EvalArgs),
    Report(report::ReportArgs),
    Predict(predict::PredictArgs),
    Export(export::ExportArgs),
    Import(import::ImportArgs),
    Gradcheck(gradcheck::GradcheckArgs),
    Bench(bench::BenchArgs),
    Summary(summary::SummaryArgs),
    Data(data::DataArgs),
    Doctor(doctor::DoctorArgs),
}

/// Why a command ended early or without success.
#[derive(Debug)]
enum Stop {
    /// Something failed or was asked wrongly.
    Error(Error),
    /// Training failed; where it can go on, as a part of a sentence.
    Training { error: Error, last: String },
    /// What the command checked is not as it should be; one line that says what.
    Check(String),
    /// Ctrl-C; all is said.
    Interrupted,
    /// The report cannot be written.
    Output(io::Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Error(error)
    }
}

/// `[C, H, W]` of images, as an argument.
#[derive(Clone, Copy, Debug)]
struct Size([usize; 3]);

fn size(text: &str) -> Result<Size, String> {
    let sizes: Option<Vec<usize>> = text.split('x').map(|size| size.parse().ok().filter(|&size| size > 0)).collect();
    let sizes = sizes.and_then(|sizes| sizes.try_into().ok());
    sizes.map(Size).ok_or_else(|| "give channels, height and width, such as 3x224x224".to_owned())
}

/// Runs the program on the arguments of this process.
pub fn main() -> ExitCode {
    // SAFETY: the program has one thread, this one, and has done nothing yet.
    unsafe { blas::choose_kernels() };
    let cli = match parse() {
        Ok(cli) => cli,
        Err(message) => return answer(&message).into(),
    };
    let out = Output::new(cli.global.json);
    let result = run(&cli, &out);
    out.finish_bar();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(stop) => complain(&stop, &out).into(),
    }
}

fn parse() -> Result<Cli, clap::Error> {
    // A number below 0 is a number that a check refuses, not an option that is not there.
    fn with_numbers(command: clap::Command) -> clap::Command {
        command.allow_negative_numbers(true).mut_subcommands(with_numbers)
    }
    let mut command = with_numbers(Cli::command());
    let matches = command.try_get_matches_from_mut(std::env::args_os())?;
    Cli::from_arg_matches(&matches).map_err(|e| e.format(&mut command))
}

/// Prints what clap has to say, and returns the exit code: help and version are no errors.
fn answer(message: &clap::Error) -> u8 {
    use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;

    if !message.use_stderr() {
        return if message.print().is_ok() { 0 } else { BROKEN_PIPE };
    }
    // Without stderr there is nobody to tell.
    if message.kind() == DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = message.print();
    } else {
        let _ = writeln!(io::stderr(), "{}", one_line(&message.to_string()));
    }
    2
}

/// clap's words in one line, as all errors are here; usage is what `--help` is for.
fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("Usage:"));
    let line = lines.collect::<Vec<_>>().join("; ").replace(":; ", ": ").replace("; [", " [");
    // The standard library's words for what is no number.
    line.replace("invalid digit found in string", "give a whole number from 0 up")
        .replace("invalid float literal", "give a number")
}

/// As if ended by SIGINT: 128 + 2.
const INTERRUPTED: u8 = 130;
/// As if ended by SIGPIPE: 128 + 13.
const BROKEN_PIPE: u8 = 141;

fn run(cli: &Cli, out: &Output) -> Result<(), Stop> {
    let global = &cli.global;
    log()?;
    Isa::limit()?;
    let threads = parallel::thread_count(global.threads)?;
    parallel::with_threads(threads, || match &cli.command {
        Command::Train(args) => train::run(args, global, out),
        Command::Tune(args) => tune::run(args, global, out),
        Command::Report(args) => report::run(args, out),
        Command::Eval(args) => eval::run(args, global, out),
        Command::Predict(args) => predict::run(args, out),
        Command::Export(args) => export::run(args, out),
        Command::Import(args) => import::run(args, out),
        Command::Gradcheck(args) => gradcheck::run(args, global, out),
        Command::Bench(args) => bench::run(args, global, out),
        Command::Summary(args) => summary::run(args, out),
        Command::Data(args) => data::run(args, global, out),
        Command::Doctor(args) => doctor::run(args, global, out),
    })?
}

/// What the library logs goes to stderr, as far as `GEMMNET_LOG` asks for it.
fn log() -> Result<(), Error> {
    let asked = std::env::var("GEMMNET_LOG").unwrap_or_else(|_| "warn".to_owned());
    let filter: Targets = asked.parse().map_err(|_| {
        let fix = "set it to error, warn, info, debug or trace, or to parts and levels such as gemmnet::train=debug";
        Error::invalid("GEMMNET_LOG", format!("`{asked}` is no level"), fix)
    })?;
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    // Where a program has a subscriber already, that stays.
    let _ = tracing_subscriber::registry().with(lines).with(filter).try_init();
    Ok(())
}

/// Says what went wrong and returns the exit code.
fn complain(stop: &Stop, out: &Output) -> u8 {
    match stop {
        Stop::Error(error) => {
            out.note(format_args!("error: {error}"));
            if let Some(pointer) = error.notation_pointer() {
                out.note(pointer);
            }
            if error.is_usage() { 2 } else { 1 }
        }
        Stop::Training { error, last } => {
            out.note(format_args!("error: {error}; {last}"));
            if error.is_usage() { 2 } else { 1 }
        }
        Stop::Check(problem) => {
            out.note(format_args!("error: {problem}"));
            1
        }
        Stop::Interrupted => INTERRUPTED,
        Stop::Output(reason) if reason.kind() == io::ErrorKind::BrokenPipe => BROKEN_PIPE,
        Stop::Output(reason) => {
            out.note(format_args!("error: cannot write to stdout: {reason}; check where it leads"));
            1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    /// Every option says what it is and what it is without being given.
    #[test]
    fn every_option_is_explained() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{} has no description", command.get_name());
            for arg in command.get_arguments().filter(|arg| !["help", "version"].contains(&arg.get_id().as_str())) {
                let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
                let has_default = help.contains("[default: ") || !arg.get_default_values().is_empty();
                assert!(!help.is_empty(), "{} {} has no help", command.get_name(), arg.get_id());
                assert!(has_default || arg.is_required_set(), "{} {}: {help}", command.get_name(), arg.get_id());
            }
            command.get_subcommands().filter(|command| command.get_name() != "help").for_each(check);
        }
        check(&Cli::command());
    }
}
