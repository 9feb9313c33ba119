//! Level 7. From arguments to a solver: a new training, or one that was saved.

use std::path::Path;

use super::{FillName, FlipName, KeepName, NormalizationName, SamplerName, TrainArgs};
use crate::cli::data::{Folder, Opened, Wanted, check_fits};
use crate::cli::output::Output;
use crate::cli::presets::{self, Facts, Preset};
use crate::cli::{Global, Stop};
use crate::data::files::Format;
use crate::data::{Augment, Batches, Dataset, Fill, Flip, Normalization, Sampler, Split};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::init::Init;
use crate::nn::network::Network;
use crate::nn::notation::NetworkSpec;
use crate::optim::{Group, LearningRate, Schedule, Select, UpdateRule};
use crate::train::{Checkpoint, Keep, Solver, SolverOptions, Trained};

/// A solver with its data: where that is from, and what it is.
pub(super) struct Ready<T: Element> {
    pub(super) solver: Solver<T>,
    pub(super) folder: Folder,
    pub(super) opened: Opened,
    /// The recipe of a new training, and what it says for data of one's own.
    pub(super) preset: Option<(&'static str, Option<String>)>,
}

/// A new training. What the user typed is checked before anything is downloaded or decoded.
pub(super) fn new<T: Element>(args: &TrainArgs, global: &Global, out: &Output) -> Result<Ready<T>, Stop> {
    let given = global.data_dir.clone().map(Folder::given).transpose()?;
    let own = given.as_ref().is_some_and(|folder| folder.format != Format::Cifar10);
    let preset = args.preset(own)?;
    args.net.as_deref().map(NetworkSpec::parse).transpose()?;
    let init: Init = args.init.as_deref().unwrap_or(preset.init).parse()?;
    options(args, preset, global)?;
    let network = |facts| network::<T>(args, preset, facts, init, global.seed());

    let wanted = Wanted { size: args.image_size.map(|side| [side; 2]), strict: args.strict };
    let (folder, opened, (recipe, net, network)) = if let Some(folder) = given {
        let opened = folder.open(wanted, out)?;
        let (dim, classes) = (opened.source.dim(), opened.source.class_names().len());
        let facts = Facts { dim, classes, images: opened.source.len(Split::Train) };
        (folder, opened, network(facts)?)
    } else {
        let made = network(Facts::CIFAR10)?;
        let folder = Folder::find(!args.no_fetch, out)?;
        let opened = folder.open(wanted, out)?;
        (folder, opened, made)
    };
    let normalization = match args.normalize {
        None => recipe.normalization,
        Some(NormalizationName::MeanImage) => Normalization::MeanImage,
        Some(NormalizationName::PerChannel) => Normalization::PerChannel,
    };
    let mut data = Dataset::new(opened.source.clone(), normalization)?;
    if let Some(samples) = args.train_limit {
        data = data.limit(Split::Train, samples)?;
    }
    let choice = (recipe.name == presets::OWN.name).then(|| recipe.arguments(&net));
    let solver = Solver::new(network, data, options(args, &recipe, global)?)?;
    Ok(Ready { solver, folder, opened, preset: Some((recipe.name, choice)) })
}

/// The recipe for such data, and the network that was asked for, or else the recipe's, in notation and made.
fn network<T: Element>(
    args: &TrainArgs,
    preset: &Preset,
    facts: Facts,
    init: Init,
    seed: u64,
) -> Result<(Preset, String, Network<T>)> {
    let (recipe, net) = preset.fit(facts);
    let net = args.net.clone().unwrap_or(net.into_owned());
    let network = Network::new(&NetworkSpec::parse(&net)?, facts.dim, init, seed)?;
    if network.classes() != facts.classes {
        let (scores, classes) = (network.classes(), facts.classes);
        let problem = format!("it gives {scores} scores, the data has {classes} classes");
        let last = format!("affine{scores}");
        let fix = match net.rsplit_once(&last) {
            Some((before, after)) => format!("end it with affine{classes}: --net '{before}affine{classes}{after}'"),
            None => format!("end it with affine{classes}"),
        };
        return Err(Error::invalid("network", problem, fix));
    }
    Ok((recipe, net, network))
}

fn options(args: &TrainArgs, preset: &Preset, global: &Global) -> Result<SolverOptions> {
    let options = SolverOptions {
        epochs: args.epochs.unwrap_or(preset.epochs),
        batch_size: args.batch_size.unwrap_or(preset.batch_size),
        groups: groups(args, preset)?,
        clip_norm: args.clip_norm,
        ema: args.ema,
        keep: match args.keep {
            None => preset.keep,
            Some(KeepName::Best) => Keep::Best,
            Some(KeepName::Last) => Keep::Last,
        },
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
    Ok(options)
}

/// A training that was saved, with the options that were given again.
pub(super) fn resumed<T: Element>(
    from: &Path,
    args: &TrainArgs,
    global: &Global,
    out: &Output,
) -> Result<Ready<T>, Stop> {
    let mut checkpoint = Checkpoint::<T>::load(from)?;
    let options = &mut checkpoint.options;
    if let Some(seed) = global.seed.filter(|&seed| seed != options.seed) {
        let problem = format!("{seed} is not that of the checkpoint, {}", options.seed);
        return Err(Error::invalid("seed", problem, "leave it out").into());
    }
    options.epochs = args.epochs.unwrap_or(options.epochs);
    options.augment = augment(args, options.augment.unwrap_or_default());
    options.verbose = false;
    // The rate that is asked for is that of the weights, or where several groups share them, of the first.
    let mut trained = options.groups.iter().filter(|group| !group.frozen);
    let main = trained.clone().find(|group| group.select == Select::WEIGHTS).or_else(|| trained.next());
    let main = main.map_or(1.0, |group| group.learning_rate.base());
    let groups = std::mem::take(&mut options.groups).into_iter();
    options.groups = groups.map(|group| regroup(group, args, main)).collect::<Result<_>>()?;
    let Trained { network, class_names, .. } = &checkpoint.trained;
    let folder = Folder::of_classes(class_names, global)?;
    let opened = folder.open(folder.like(network, args.strict), out)?;
    // The solver puts the checkpoint's normalisation in the place of this one.
    let mut data = Dataset::new(opened.source.clone(), Normalization::MeanImage)?;
    check_fits(&data, &folder, network, class_names, from)?;
    if let Some(samples) = args.train_limit {
        data = data.limit(Split::Train, samples)?;
    }
    Ok(Ready { solver: Solver::resume(checkpoint, data)?, folder, opened, preset: None })
}

/// The groups that were asked for, then one rule for the rest.
fn groups(args: &TrainArgs, preset: &Preset) -> Result<Vec<Group>> {
    let schedule: Schedule = preset.schedule.parse()?;
    let rate = LearningRate::new(preset.learning_rate, schedule, preset.warmup_epochs)?;
    let asked_rate = asked_rate(rate, args, preset.learning_rate)?;
    // A rule or groups of the user's own take the place of the preset's.
    let mut groups = if args.group.is_empty() && args.optimizer.is_none() {
        let of_preset = preset.groups.iter().map(|text| regroup(group(text, rate)?, args, preset.learning_rate));
        of_preset.collect::<Result<Vec<_>>>()?
    } else {
        args.group.iter().map(|text| group(text, asked_rate)).collect::<Result<Vec<_>>>()?
    };
    let rule: UpdateRule = args.optimizer.as_deref().unwrap_or(preset.optimizer).parse()?;
    let classic = Group::classic(rule, asked_rate, args.l2.unwrap_or(preset.l2));
    // A group of all weights leaves none to the rest.
    let all_weights = groups.iter().any(|group: &Group| group.select == Select::WEIGHTS);
    groups.extend(classic.into_iter().filter(|rest| !(all_weights && rest.select == Select::WEIGHTS)));
    Ok(groups)
}

/// `SELECT=RULE[,NAME=VALUE]...` or `SELECT=frozen`; the rate and its schedule are these where none is given.
fn group(text: &str, rate: LearningRate) -> Result<Group> {
    let (mut base, mut schedule, warmup) = (rate.base(), rate.schedule(), rate.warmup_epochs());
    let fault = |problem: String| {
        let fix = "write SELECT=RULE[,NAME=VALUE]..., such as conv*.weight=momentum,lr=0.05,momentum=0.8";
        Error::invalid("group", problem, fix)
    };
    let (select, how) = text.split_once('=').ok_or_else(|| fault(format!("`{text}` has no `=`")))?;
    let select: Select = select.trim().parse()?;
    let mut words = how.split(',').map(str::trim);
    let rule = words.next().unwrap_or_default();
    let frozen = rule == "frozen";
    let mut rule = if frozen { UpdateRule::Sgd } else { rule.parse()? };
    let (mut l2, mut own_schedule) = (0.0, false);
    for word in words {
        let (name, value) = word.split_once('=').ok_or_else(|| fault(format!("`{word}` in `{text}` has no `=`")))?;
        let number = || value.parse().map_err(|_| fault(format!("`{value}` in `{text}` is not a number")));
        match name {
            "lr" => base = number()?,
            "l2" => l2 = number()?,
            "schedule" => (schedule, own_schedule) = (value.parse()?, true),
            _ => {
                rule = rule.with(name, value).map_err(|_| fault(format!("`{word}` is no option of {}", rule.name())))?
            }
        }
    }
    if frozen {
        return Ok(Group::frozen(select));
    }
    let rate = LearningRate::new(base, schedule, if own_schedule { 0.0 } else { warmup })?;
    Ok(Group { l2, ..Group::new(select, rule, rate) })
}

/// A group of a checkpoint or a preset with the rate and decay that were asked for.
fn regroup(group: Group, args: &TrainArgs, main: f64) -> Result<Group> {
    let l2 = args.l2.filter(|_| group.select == Select::WEIGHTS).unwrap_or(group.l2);
    Ok(Group { l2, learning_rate: asked_rate(group.learning_rate, args, main)?, ..group })
}

/// A rate with what was asked for in its place: the rate that was asked for is that of groups of base `main`, and others
/// keep their proportion to it.
fn asked_rate(rate: LearningRate, args: &TrainArgs, main: f64) -> Result<LearningRate> {
    let base = rate.base();
    let proportional = |asked: f64| if base == main { asked } else { base / main * asked };
    LearningRate::new(
        args.learning_rate.map_or(base, proportional),
        args.schedule.as_deref().map_or(Ok(rate.schedule()), str::parse)?,
        args.warmup_epochs.unwrap_or(rate.warmup_epochs()),
    )
}

fn augment(args: &TrainArgs, base: Augment) -> Option<Augment> {
    let augment = Augment {
        flip: match args.flip {
            None => base.flip,
            Some(FlipName::None) => Flip::None,
            Some(FlipName::Random) => Flip::Random,
            Some(FlipName::Alternating) => Flip::Alternating,
        },
        shift: args.shift.unwrap_or(base.shift),
        fill: match args.shift_fill {
            None => base.fill,
            Some(FillName::Zeros) => Fill::Zeros,
            Some(FillName::Reflect) => Fill::Reflect,
        },
        cutout: args.cutout.unwrap_or(base.cutout),
    };
    (augment != Augment::default()).then_some(augment)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: TrainArgs,
    }

    fn groups_of(line: &str) -> Vec<Group> {
        let Line { args } = Line::parse_from(format!("train {line}").split(' '));
        groups(&args, args.preset(false).unwrap()).unwrap()
    }

    #[test]
    fn a_rate_that_is_asked_for_changes_those_of_a_presets_groups_in_proportion() {
        let preset = groups_of("--preset record");
        let asked = groups_of("--preset record --learning-rate 0.48 --schedule constant --l2 0.5");
        assert_eq!(asked.len(), preset.len());
        for (asked, preset) in asked.iter().zip(&preset) {
            let [new, old] = [asked, preset].map(|group| group.learning_rate.base());
            assert!((new - 2.0 * old).abs() <= 1e-12, "{:?}: {new}, not twice {old}", asked.select);
            assert_eq!(asked.learning_rate.schedule(), Schedule::Constant);
            let l2 = if asked.select == Select::WEIGHTS { 0.5 } else { preset.l2 };
            assert_eq!(asked.l2, l2, "{:?}", asked.select);
        }
    }

    #[test]
    fn groups_of_ones_own_keep_the_rates_that_they_name() {
        let own = groups_of("--preset record --group conv*.weight=sgd,lr=0.1 --group bias=sgd --learning-rate 0.5");
        let rates = own.iter().map(|group| group.learning_rate.base());
        assert_eq!(rates.collect::<Vec<_>>()[..3], [0.1, 0.5, 0.5]);
    }
}
