//! Level 7. `gemmnet tune`: random search by successive halving (Jamieson & Talwalkar 2016, "Non-stochastic Best Arm
//! Identification and Hyperparameter Optimization").

mod search;
mod space;

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::output::Output;
use super::recipe::{Choices, Dtype, Recipe};
use super::train::start::{self, Base, Said};
use super::{Global, Stop, runs};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::random::{Purpose, stream};
use crate::store::replace;
use search::{Search, Trial};
use space::Vary;

/// Search for a recipe: many are begun, and the better part goes on
///
/// Trials are drawn at random and trained for a part of the epochs; the best third goes on for three times as long, until the last
/// are trained to the end and the best is known by its validation accuracy. With --target every trial is trained to the end,
/// those that reach the target with more seeds, and the best is the fastest that reaches it with all of them. The folder of the
/// search keeps what every trial did, its best recipe as best.toml for `gemmnet train --config`, and report.html to look at.
/// Ctrl-C and crashes lose nothing: --resume goes on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet tune --preset three-layer-65 --epochs 1\n  \
        gemmnet tune --preset deep --vary learning-rate=1e-4..1e-2 --vary batch-size=50,100 --trials 9\n  \
        gemmnet tune --net 'conv{a}-relu-pool-affine{b}-relu-affine10' --vary a=16,32,64 --vary b=100,500\n  \
        gemmnet tune --preset sprint --vary epochs=0.1..0.5 --vary batch-size=100,125,250 --target 0.65 --seeds 9\n  \
        gemmnet tune --resume tune/1")]
pub(super) struct TuneArgs {
    /// Recipe to start from [default: as of `train`]
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// A file with what is not said here, as of `train` [default: none]
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    config: Option<PathBuf>,
    #[command(flatten)]
    choices: Choices,
    /// What trials differ in, as KEY=LOW..HIGH, drawn evenly by orders of magnitude, or KEY=A,B,C; KEY is a long option of
    /// `train` that is not given as one, width for a factor of all widths, or a word that stands in braces in --net, --init,
    /// --schedule or --group. May be given several times [default: learning-rate=1e-5..1e-1 l2=1e-6..1e-2
    /// batch-size=50,100,200,500 width=0.5,1,2, without those that are given as options]
    #[arg(long, value_name = "KEY=VALUES")]
    vary: Vec<String>,
    /// Trials to begin with
    #[arg(long, value_name = "N", default_value_t = 27)]
    trials: usize,
    /// Validation accuracy to reach, in as few seconds as possible [default: the best accuracy is looked for]
    #[arg(long, value_name = "ACCURACY")]
    target: Option<f64>,
    /// With --target: seeds that the last trials are trained with
    #[arg(long, value_name = "N", default_value_t = 3)]
    seeds: usize,
    /// Folder of the search, which is made [default: with --resume that of the search, else tune/1 or the next number that is
    /// free]
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    run: Option<PathBuf>,
    /// Go on with the search in this folder [default: start anew]
    #[arg(long, value_name = "DIR",
          conflicts_with_all = ["preset", "net", "init", "epochs", "batch_size", "optimizer", "group", "learning_rate", "schedule", "warmup_epochs", "l2", "clip_norm", "ema", "keep", "sampler", "flip", "shift", "shift_fill", "cutout", "normalize", "dtype", "train_limit", "image_size", "vary", "trials", "target", "seeds"])]
    resume: Option<PathBuf>,
    /// Do not try to download CIFAR-10 [default: try]
    #[arg(long)]
    no_fetch: bool,
}

/// What a search looks for: `search.toml`. The recipe that it starts from is in `config.toml` beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Plan {
    vary: Vec<String>,
    trials: usize,
    target: Option<f64>,
    seeds: usize,
}

impl Plan {
    fn new(args: &TuneArgs) -> Result<Self> {
        if args.trials == 0 || args.seeds == 0 {
            return Err(Error::invalid("tune", "0 trials or seeds find nothing", "give 1 or more"));
        }
        if args.target.is_some_and(|target| !(0.0..=1.0).contains(&target)) {
            return Err(Error::invalid("target", "an accuracy is from 0 to 1", "give one such as 0.65"));
        }
        let mut plan = Plan { vary: args.vary.clone(), trials: args.trials, target: args.target, seeds: args.seeds };
        let is_said = |vary: &Vary| args.choices.says(&vary.key) && !args.choices.has_blank(&vary.key);
        if let Some((text, _)) = plan.vary.iter().zip(plan.space()?).find(|(_, vary)| is_said(vary)) {
            let problem = format!("`{text}` is also given as an option, which has one value");
            return Err(Error::invalid("--vary", problem, "leave one of the two out"));
        }
        if plan.vary.is_empty() {
            // What is said stays as it is.
            let is_open = |text: &&str| !is_said(&text.parse().expect("the defaults can be read"));
            plan.vary = space::DEFAULT.into_iter().filter(is_open).map(str::to_owned).collect();
        }
        Ok(plan)
    }

    fn read(dir: &Path) -> Result<Self> {
        let (path, fix) = (dir.join(PLAN), "give the folder of a search, which `gemmnet tune` has made");
        let text = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e, fix))?;
        toml::from_str(&text).map_err(|e| Error::data(&path, format!("cannot be read: {}", e.message()), fix))
    }

    fn space(&self) -> Result<Vec<Vary>> {
        self.vary.iter().map(|text| text.parse()).collect()
    }
}

const PLAN: &str = "search.toml";

pub(super) fn run(args: &TuneArgs, global: &Global, out: &Output) -> Result<(), Stop> {
    let plan = args.resume.as_deref().map_or_else(|| Plan::new(args), Plan::read)?;
    let (config, resume) = (args.config.as_deref(), args.resume.as_deref());
    let said = Said::new(&args.choices, args.preset.as_deref(), config, resume, global)?;
    match said.dtype() {
        Dtype::F32 => tune::<f32>(args, plan, &said, out),
        Dtype::F64 => tune::<f64>(args, plan, &said, out),
    }
}

fn tune<T: Element>(args: &TuneArgs, plan: Plan, said: &Said<'_>, out: &Output) -> Result<(), Stop> {
    let space = plan.space()?;
    let drawn = space::candidates(&space, plan.trials, stream(said.seed, Purpose::Trial, 0, 0));
    let recipes = |base: &Recipe| drawn.iter().map(|values| space::recipe(base, values)).collect::<Result<Vec<_>>>();
    // The first one, so that what the user typed is checked before anything is downloaded.
    let check = |base: &Recipe, facts| start::check::<T>(&space::recipe(base, &drawn[0])?, facts, said.seed);
    let base = Base::open(said, !args.no_fetch, check, out)?;
    let recipes = recipes(&base.recipe)?;
    recipes.iter().try_for_each(|recipe| start::check::<T>(recipe, Some(base.place.facts()), said.seed))?;

    let dir = match &args.resume {
        Some(dir) => dir.clone(),
        None => {
            // A search that cannot begin leaves no folder.
            base.ready::<T>(recipes[0].clone(), said, said.seed)?;
            let dir = runs::new_folder(args.run.as_deref(), "tune")?;
            let config = start::config(&base.recipe, said, &base.place, said.seed)?;
            replace(&runs::config(&dir), config.as_bytes())?;
            replace(&dir.join(PLAN), toml::to_string(&plan).expect("a plan has a TOML form").as_bytes())?;
            dir
        }
    };
    let trials = drawn.into_iter().zip(recipes).map(|(values, recipe)| Trial { values, recipe }).collect();
    Search::open(dir, plan, base, said, trials)?.run::<T>(out)
}
