//! Level 6. From arguments to a solver: a new training, or one that was saved.

use std::path::Path;

use super::{NormalizationName, SamplerName, TrainArgs};
use crate::cli::data::{Folder, check_fits};
use crate::cli::output::Output;
use crate::cli::presets::{self, Preset};
use crate::cli::{Global, Stop};
use crate::data::cifar10::DIM;
use crate::data::{Augment, Batches, Normalization, Sampler, Split};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::init::Init;
use crate::nn::network::Network;
use crate::nn::notation::NetworkSpec;
use crate::optim::{Group, LearningRate, Schedule, Select, UpdateRule};
use crate::train::{Checkpoint, Solver, SolverOptions};

/// A solver with its data: where that is from, and what it is.
pub(super) struct Ready<T: Element> {
    pub(super) solver: Solver<T>,
    pub(super) folder: Folder,
    pub(super) data_kind: &'static str,
}

/// A new training. What the user typed is checked before anything is downloaded.
pub(super) fn new<T: Element>(args: &TrainArgs, global: &Global, out: &Output) -> Result<Ready<T>, Stop> {
    let preset = presets::find(&args.preset)?;
    let spec = NetworkSpec::parse(args.net.as_deref().unwrap_or(preset.net))?;
    let init: Init = args.init.as_deref().unwrap_or(preset.init).parse()?;
    let network = Network::<T>::new(&spec, DIM, init, global.seed())?;
    let options = SolverOptions {
        epochs: args.epochs.unwrap_or(preset.epochs),
        batch_size: args.batch_size.unwrap_or(preset.batch_size),
        groups: groups(args, preset)?,
        clip_norm: args.clip_norm,
        ema: args.ema,
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
    let (mut data, data_kind) = folder.open(normalization)?;
    if let Some(samples) = args.train_limit {
        data = data.limit(Split::Train, samples)?;
    }
    Ok(Ready { solver: Solver::new(network, data, options)?, folder, data_kind })
}

/// A training that was saved, with the options that were given again.
pub(super) fn resumed<T: Element>(from: &Path, args: &TrainArgs, global: &Global) -> Result<Ready<T>, Stop> {
    let mut checkpoint = Checkpoint::<T>::load(from)?;
    let options = &mut checkpoint.options;
    if let Some(seed) = global.seed.filter(|&seed| seed != options.seed) {
        let problem = format!("{seed} is not that of the checkpoint, {}", options.seed);
        return Err(Error::invalid("seed", problem, "leave it out").into());
    }
    options.epochs = args.epochs.unwrap_or(options.epochs);
    options.augment = augment(args, options.augment.unwrap_or_default());
    options.verbose = false;
    options.groups.iter_mut().try_for_each(|group| regroup(group, args))?;
    let folder = Folder::of_classes(&checkpoint.trained.class_names, global)?;
    // The solver puts the checkpoint's normalisation in the place of this one.
    let (mut data, data_kind) = folder.open(Normalization::MeanImage)?;
    check_fits(&data, &folder, &checkpoint.trained, from)?;
    if let Some(samples) = args.train_limit {
        data = data.limit(Split::Train, samples)?;
    }
    Ok(Ready { solver: Solver::resume(checkpoint, data)?, folder, data_kind })
}

/// The groups that were asked for, then one rule for the rest.
fn groups(args: &TrainArgs, preset: &Preset) -> Result<Vec<Group>> {
    let schedule: Schedule = args.schedule.as_deref().unwrap_or(preset.schedule).parse()?;
    let warmup = args.warmup_epochs.unwrap_or(preset.warmup_epochs);
    let base = args.learning_rate.unwrap_or(preset.learning_rate);
    let rate = |base| LearningRate::new(base, schedule, warmup);
    let mut groups = Vec::new();
    for text in &args.group {
        groups.push(group(text, base, &rate)?);
    }
    let rule: UpdateRule = args.optimizer.as_deref().unwrap_or(preset.optimizer).parse()?;
    let classic = Group::classic(rule, rate(base)?, args.l2.unwrap_or(preset.l2));
    // A group of all weights leaves none to the rest.
    let all_weights = groups.iter().any(|group: &Group| group.select == Select::WEIGHTS);
    groups.extend(classic.into_iter().filter(|rest| !(all_weights && rest.select == Select::WEIGHTS)));
    Ok(groups)
}

/// `SELECT=RULE[,lr=RATE][,l2=STRENGTH]` or `SELECT=frozen`; `base` is the rate where none is given.
fn group(text: &str, base: f64, rate: &impl Fn(f64) -> Result<LearningRate>) -> Result<Group> {
    let fault = |problem: String| {
        Error::invalid(
            "group",
            problem,
            "write SELECT=RULE[,lr=RATE][,l2=STRENGTH], such as conv*.weight=momentum,lr=0.05",
        )
    };
    let (select, how) = text.split_once('=').ok_or_else(|| fault(format!("`{text}` has no `=`")))?;
    let select: Select = select.trim().parse()?;
    let mut words = how.split(',').map(str::trim);
    let rule = words.next().unwrap_or_default();
    let (mut base, mut l2) = (base, 0.0);
    for word in words {
        let (name, value) = word.split_once('=').ok_or_else(|| fault(format!("`{word}` in `{text}` has no `=`")))?;
        let value = value.parse().map_err(|_| fault(format!("`{value}` in `{text}` is not a number")))?;
        match name {
            "lr" => base = value,
            "l2" => l2 = value,
            _ => return Err(fault(format!("`{text}` has no option `{name}`"))),
        }
    }
    if rule == "frozen" {
        return Ok(Group::frozen(select));
    }
    Ok(Group { l2, ..Group::new(select, rule.parse()?, rate(base)?) })
}

/// Gives a group of a checkpoint the rate and decay that were given again.
fn regroup(group: &mut Group, args: &TrainArgs) -> Result<()> {
    if group.select == Select::WEIGHTS {
        group.l2 = args.l2.unwrap_or(group.l2);
    }
    let schedule = args.schedule.as_deref().map_or(Ok(group.learning_rate.schedule()), str::parse)?;
    group.learning_rate = LearningRate::new(
        args.learning_rate.unwrap_or(group.learning_rate.base()),
        schedule,
        args.warmup_epochs.unwrap_or(group.learning_rate.warmup_epochs()),
    )?;
    Ok(())
}

fn augment(args: &TrainArgs, base: Augment) -> Option<Augment> {
    let augment = Augment { flip: args.flip.unwrap_or(base.flip), shift: args.shift.unwrap_or(base.shift) };
    (augment != Augment::default()).then_some(augment)
}
