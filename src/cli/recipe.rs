//! Level 7. Recipes: how a network is trained, in the words of the command line, of the presets and of a run's config.toml.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::{Table, Value};

use crate::data::{Augment, Batches, Fill, Flip, Normalization, Sampler};
use crate::error::{Error, Result};
use crate::optim::{Group, LearningRate, Schedule, Select, UpdateRule};
use crate::train::{Keep, SolverOptions};

/// A network and how to train it, to the last number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Recipe {
    pub(super) net: String,
    pub(super) init: String,
    pub(super) epochs: f64,
    pub(super) batch_size: usize,
    /// Groups of parameters with a rule of their own; the rest has the rule that follows.
    #[serde(default)]
    pub(super) group: Vec<String>,
    pub(super) optimizer: String,
    pub(super) learning_rate: f64,
    pub(super) schedule: String,
    pub(super) warmup_epochs: f64,
    pub(super) l2: f64,
    pub(super) clip_norm: Option<f64>,
    pub(super) ema: Option<f64>,
    pub(super) keep: KeepName,
    pub(super) sampler: SamplerName,
    pub(super) flip: FlipName,
    pub(super) shift: usize,
    pub(super) shift_fill: FillName,
    pub(super) cutout: usize,
    pub(super) normalize: NormalizationName,
}

/// What is said about a training on the command line or in a config.toml; what is not said is another's to say.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Choices {
    /// `--data-dir` and `--seed`, which are options of every command.
    #[arg(skip)]
    pub(super) data_dir: Option<PathBuf>,
    #[arg(skip)]
    #[serde(default, with = "any_seed")]
    pub(super) seed: Option<u64>,
    /// Network in notation, such as [conv32-relu-pool]x2-affine10 [default: the preset's]
    #[arg(long, value_name = "NOTATION")]
    pub(super) net: Option<String>,
    /// Initial weights: gaussian:STD, he, xavier, orthogonal or dirac [default: the preset's]
    #[arg(long, value_name = "INIT")]
    pub(super) init: Option<String>,
    /// Passes over the training images; parts of one are possible, such as 0.5 [default: the preset's]
    #[arg(long, value_name = "N")]
    pub(super) epochs: Option<f64>,
    /// Images in a batch [default: the preset's]
    #[arg(long, value_name = "IMAGES")]
    pub(super) batch_size: Option<usize>,
    /// A group of parameters with a rule of its own, as SELECT=RULE[,NAME=VALUE]... or SELECT=frozen; SELECT is weight, bias,
    /// scale, or a pattern of names such as conv*.weight, RULE also muon for matrices; NAME is lr, l2, schedule or one of the
    /// rule's own numbers, such as momentum, beta1, epsilon, weight_decay, iterations, fixed_norm. May be given several
    /// times: the first that selects a parameter has it, and the other options are for the rest [default: the preset's]
    #[arg(long, value_name = "GROUP")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) group: Vec<String>,
    /// Update rule of all parameters: sgd, momentum, nesterov, adagrad, rmsprop, adam or adamw [default: the preset's]
    #[arg(long, value_name = "RULE")]
    pub(super) optimizer: Option<String>,
    /// Learning rate that the schedule multiplies, per step; rates of a preset's groups keep their proportion to it [default:
    /// the preset's]
    #[arg(long, value_name = "RATE")]
    pub(super) learning_rate: Option<f64>,
    /// Learning rate over time: constant, exp:FACTOR (per epoch), step:EPOCHS:FACTOR, linear[:EPOCHS] (to 0),
    /// cosine[:FINAL] or onecycle[:PEAK_AT:START:FINAL] [default: the preset's]
    #[arg(long, value_name = "SCHEDULE")]
    pub(super) schedule: Option<String>,
    /// Epochs (or a fraction of one) of linear warm-up before the schedule [default: the preset's]
    #[arg(long, value_name = "EPOCHS")]
    pub(super) warmup_epochs: Option<f64>,
    /// L2 regularisation: the loss has this / 2 times the sum of squared weights added; groups of a preset with a decay of
    /// their own keep it [default: the preset's]
    #[arg(long, value_name = "STRENGTH")]
    pub(super) l2: Option<f64>,
    /// Scale gradients down whose norm, over all parameters, is above this [default: never]
    #[arg(long, value_name = "NORM")]
    pub(super) clip_norm: Option<f64>,
    /// Measure and keep a moving average of the weights with this decay, such as 0.999 [default: the weights themselves]
    #[arg(long, value_name = "DECAY")]
    pub(super) ema: Option<f64>,
    /// Which network is kept for use, of those after each epoch [default: the preset's]
    #[arg(long, value_name = "WHICH")]
    pub(super) keep: Option<KeepName>,
    /// How the images of an epoch are drawn [default: the preset's]
    #[arg(long, value_name = "HOW")]
    pub(super) sampler: Option<SamplerName>,
    /// Mirror training images, half of them in each epoch; alone it means random [default: the preset's]
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "random")]
    pub(super) flip: Option<FlipName>,
    /// Shift training images at random by up to this many pixels in each direction [default: the preset's]
    #[arg(long, value_name = "PIXELS")]
    pub(super) shift: Option<usize>,
    /// What shows where an image was shifted away [default: the preset's]
    #[arg(long, value_name = "WHAT")]
    pub(super) shift_fill: Option<FillName>,
    /// Blank a square of this side at a random place of every training image; 0 for none [default: the preset's]
    #[arg(long, value_name = "PIXELS")]
    pub(super) cutout: Option<usize>,
    /// What is subtracted from the pixels, and whether they are scaled [default: the preset's]
    #[arg(long, value_name = "HOW")]
    pub(super) normalize: Option<NormalizationName>,
    /// Numbers to compute with [default: f32]
    #[arg(long, value_name = "TYPE")]
    pub(super) dtype: Option<Dtype>,
    /// Train on the first N training images only [default: all]
    #[arg(long, value_name = "N")]
    pub(super) train_limit: Option<usize>,
    /// Height and width in pixels that the pictures of a folder are resized to, from the middle, with antialiasing [default:
    /// 64, or less where pictures are smaller]
    #[arg(long, value_name = "PIXELS")]
    pub(super) image_size: Option<usize>,
    /// Refuse a folder with pictures that cannot be read [default: leave them out and name them]
    #[arg(long)]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) strict: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum KeepName {
    /// The one with the best validation accuracy
    Best,
    /// The last one: for rates that fall to 0
    Last,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum SamplerName {
    /// Shuffled anew in every epoch, none twice
    Shuffle,
    /// Every batch independently, with replacement, as CS231n does
    Replacement,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum FlipName {
    /// None of them
    #[value(alias = "false")]
    None,
    /// Others in every epoch
    #[value(alias = "true")]
    Random,
    /// Each in every second epoch: half of them in the first, the other half in the next
    Alternating,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum FillName {
    /// Zeros, which the mean has become
    Zeros,
    /// The image again, mirrored at its border
    Reflect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum NormalizationName {
    /// Subtract the mean of the training images, pixel by pixel
    MeanImage,
    /// Subtract each channel's mean and divide by its standard deviation
    PerChannel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Dtype {
    /// 32 bits: twice as fast
    F32,
    /// 64 bits: for comparing results
    F64,
}

/// TOML has no unsigned numbers: a seed that is too large for a signed one is text.
mod any_seed {
    use super::*;

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Seed {
        Number(u64),
        Text(String),
    }

    pub(super) fn serialize<S: Serializer>(seed: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
        match seed.map(|seed| (i64::try_from(seed), seed)) {
            None => to.serialize_none(),
            Some((Ok(number), _)) => to.serialize_some(&number),
            Some((Err(_), seed)) => to.serialize_some(&seed.to_string()),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
        match Option::<Seed>::deserialize(from)? {
            None => Ok(None),
            Some(Seed::Number(seed)) => Ok(Some(seed)),
            Some(Seed::Text(text)) => text.parse().map(Some).map_err(serde::de::Error::custom),
        }
    }
}

impl Choices {
    /// Reads a config.toml: one that a run has written, or some keys of one.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let fix = "give the config.toml of a run, or a file with some of its keys";
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e, fix))?;
        toml::from_str(&text).map_err(|e| {
            let line = e.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
            let problem = format!("line {line} cannot be read: {}", e.message().replace('\n', " "));
            Error::data(
                path,
                problem,
                "keys are the long options of `gemmnet train --help`, such as learning-rate = 0.01",
            )
        })
    }

    /// Whether a value is given for this key.
    pub(super) fn says(&self, key: &str) -> bool {
        table(self).is_ok_and(|said| said.contains_key(key))
    }

    /// Whether this word stands in braces in one of the values, to be filled in.
    pub(super) fn has_blank(&self, word: &str) -> bool {
        self.text().is_ok_and(|text| text.contains(&blank(word)))
    }

    /// The text of such a file.
    pub(super) fn text(&self) -> Result<String> {
        toml::to_string(self).map_err(too_large)
    }

    /// The recipe that such a file holds; `path` is its name.
    pub(super) fn recipe(&self, path: &Path) -> Result<Recipe> {
        table(self)?.try_into().map_err(|e: toml::de::Error| {
            let problem = format!("does not say all of a recipe: {}", e.message());
            Error::data(path, problem, "give the config.toml of a run as the run wrote it")
        })
    }
}

/// A word in braces, for which a search puts in values.
pub(super) fn blank(word: &str) -> String {
    format!("{{{word}}}")
}

/// Only numbers beyond TOML's have no place in it.
fn too_large(e: toml::ser::Error) -> Error {
    Error::invalid("options", format!("a value is too large ({e})"), "give a smaller one")
}

/// For the fuzz target `config`, since nothing here is public: what is made of such a file with each preset, as a run would
/// write it down.
#[cfg(fuzzing)]
pub fn configs_again(path: &Path) -> Result<Vec<Result<String>>> {
    let said = Choices::read(path)?;
    let again = |preset: &super::presets::Preset| {
        let recipe = preset.example().with(&said)?;
        recipe.options(said.seed.unwrap_or(0))?;
        recipe.arguments();
        let Choices { data_dir, seed, dtype, train_limit, image_size, strict, .. } = said.clone();
        Choices { data_dir, seed, dtype, train_limit, image_size, strict, ..recipe.choices() }.text()
    };
    Ok(super::presets::all().iter().map(again).collect())
}

/// The keys and values of a recipe or of choices.
fn table(of: &impl Serialize) -> Result<Table> {
    Table::try_from(of).map_err(too_large)
}

impl Recipe {
    /// The recipe with what is said in its place.
    ///
    /// A rule or groups of the user's own take the place of all groups; otherwise a rate that is given changes those of the
    /// groups in proportion.
    pub(super) fn with(&self, choices: &Choices) -> Result<Self> {
        let group = if choices.group.is_empty() && choices.optimizer.is_none() {
            self.group.iter().map(|text| self.regroup(text, choices)).collect()
        } else {
            choices.group.clone()
        };
        let mut all = table(self)?;
        all.extend(table(choices)?);
        let fault = |e: toml::de::Error| Error::invalid("options", e.message(), "see `gemmnet train --help`");
        Ok(Recipe { group, ..all.try_into().map_err(fault)? })
    }

    /// A group's text with the rate, schedule and decay that are given; one with a mistake stays as it is.
    fn regroup(&self, text: &str, choices: &Choices) -> String {
        let Some((select, how)) = text.split_once('=') else { return text.to_owned() };
        let mut words: Vec<String> = how.split(',').map(str::to_owned).collect();
        if let (Some(rate), true) = (choices.learning_rate, self.learning_rate > 0.0) {
            for word in words.iter_mut().filter(|word| word.starts_with("lr=")) {
                let Ok(own) = word[3..].parse::<f64>() else { continue };
                *word =
                    format!("lr={}", if own == self.learning_rate { rate } else { own / self.learning_rate * rate });
            }
        }
        if choices.schedule.is_some() {
            words.retain(|word| !word.starts_with("schedule="));
        }
        let of_weights = select.parse::<Select>().is_ok_and(|select| select == Select::WEIGHTS);
        if let (Some(l2), true) = (choices.l2, of_weights && words[0] != "frozen") {
            words.retain(|word| !word.starts_with("l2="));
            words.push(format!("l2={l2}"));
        }
        format!("{select}={}", words.join(","))
    }

    /// All that there is to say about a training with this recipe, except where its data is.
    pub(super) fn choices(&self) -> Choices {
        let all = table(self).and_then(|table| {
            table.try_into().map_err(|e: toml::de::Error| Error::invalid("recipe", e.to_string(), ""))
        });
        all.expect("choices have every key of a recipe")
    }

    /// The options of `train` that say the same.
    pub(super) fn arguments(&self) -> String {
        let augment = self.augment();
        let mut words = Vec::new();
        for (key, value) in table(self).expect("a recipe's numbers were read from TOML") {
            // What has no effect is left out.
            let idle = (key == "shift-fill" && augment.fill == Fill::Zeros) || (key == "cutout" && augment.cutout == 0);
            match value {
                _ if idle => {}
                Value::Array(groups) => {
                    words.extend(groups.iter().map(|group| format!("--{key} {}", group.as_str().unwrap_or_default())));
                }
                Value::String(text) if key == "net" => words.push(format!("--net '{text}'")),
                Value::String(text) if key == "flip" => words.push(format!("--flip={text}")),
                Value::String(text) => words.push(format!("--{key} {text}")),
                Value::Float(number) => words.push(format!("--{key} {number}")),
                other => words.push(format!("--{key} {other}")),
            }
        }
        words.join(" ")
    }

    /// How the solver trains by this recipe.
    pub(super) fn options(&self, seed: u64) -> Result<SolverOptions> {
        let augment = self.augment();
        let options = SolverOptions {
            epochs: self.epochs,
            batch_size: self.batch_size,
            groups: self.groups()?,
            clip_norm: self.clip_norm,
            ema: self.ema,
            keep: match self.keep {
                KeepName::Best => Keep::Best,
                KeepName::Last => Keep::Last,
            },
            sampler: match self.sampler {
                SamplerName::Shuffle => Sampler::ShuffledEpochs,
                SamplerName::Replacement => Sampler::WithReplacement,
            },
            augment: (augment != Augment::default()).then_some(augment),
            seed,
            verbose: false,
            ..SolverOptions::default()
        };
        Batches::new(1, options.batch_size)?;
        Ok(options)
    }

    pub(super) fn normalization(&self) -> Normalization {
        match self.normalize {
            NormalizationName::MeanImage => Normalization::MeanImage,
            NormalizationName::PerChannel => Normalization::PerChannel,
        }
    }

    fn augment(&self) -> Augment {
        Augment {
            flip: match self.flip {
                FlipName::None => Flip::None,
                FlipName::Random => Flip::Random,
                FlipName::Alternating => Flip::Alternating,
            },
            shift: self.shift,
            fill: match self.shift_fill {
                FillName::Zeros => Fill::Zeros,
                FillName::Reflect => Fill::Reflect,
            },
            cutout: self.cutout,
        }
    }

    /// The groups, then one rule for the rest.
    fn groups(&self) -> Result<Vec<Group>> {
        let rate = LearningRate::new(self.learning_rate, self.schedule.parse()?, self.warmup_epochs)?;
        let mut groups = self.group.iter().map(|text| group(text, rate)).collect::<Result<Vec<_>>>()?;
        let classic = Group::classic(self.optimizer.parse()?, rate, self.l2);
        // A group of all weights leaves none to the rest.
        let all_weights = groups.iter().any(|group| group.select == Select::WEIGHTS);
        groups.extend(classic.into_iter().filter(|rest| !(all_weights && rest.select == Select::WEIGHTS)));
        Ok(groups)
    }
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
            "schedule" => (schedule, own_schedule) = (value.parse::<Schedule>()?, true),
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::presets;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        choices: Choices,
    }

    fn asked(preset: &str, line: &str) -> Recipe {
        let Line { choices } = Line::parse_from(format!("train {line}").split_whitespace());
        presets::find(preset).unwrap().example().with(&choices).unwrap()
    }

    #[test]
    fn a_rate_that_is_asked_for_changes_those_of_a_presets_groups_in_proportion() {
        let preset = asked("record", "").groups().unwrap();
        let changed = asked("record", "--learning-rate 0.48 --schedule constant --l2 0.5").groups().unwrap();
        assert_eq!(changed.len(), preset.len());
        for (asked, preset) in changed.iter().zip(&preset) {
            let [new, old] = [asked, preset].map(|group| group.learning_rate.base());
            assert!((new - 2.0 * old).abs() <= 1e-12, "{:?}: {new}, not twice {old}", asked.select);
            assert_eq!(asked.learning_rate.schedule(), Schedule::Constant);
            let l2 = if asked.select == Select::WEIGHTS { 0.5 } else { preset.l2 };
            assert_eq!(asked.l2, l2, "{:?}", asked.select);
        }
    }

    #[test]
    fn groups_of_ones_own_keep_the_rates_that_they_name() {
        let own = asked("record", "--group conv*.weight=sgd,lr=0.1 --group bias=sgd --learning-rate 0.5");
        let groups = own.groups().unwrap();
        let rates = groups.iter().map(|group| group.learning_rate.base());
        assert_eq!(rates.collect::<Vec<_>>()[..3], [0.1, 0.5, 0.5]);
    }

    /// What a run writes into its config.toml is what it read: every number, every group, any seed.
    #[test]
    fn a_config_says_the_recipe_again() {
        for preset in presets::all() {
            for line in ["", "--learning-rate 0.3 --l2 0.1 --ema 0.99 --clip-norm 2 --cutout 3", "--optimizer sgd"] {
                let recipe = asked(&preset.name, line);
                for seed in [0, 7, u64::MAX] {
                    let said = Choices { seed: Some(seed), ..recipe.choices() };
                    let text = toml::to_string(&said).unwrap();
                    let read: Choices = toml::from_str(&text).unwrap();
                    assert_eq!(read.seed, Some(seed));
                    assert_eq!(read.recipe(Path::new("config.toml")).unwrap(), recipe, "{text}");
                    // Also in the place of any other.
                    assert_eq!(presets::find("deep").unwrap().recipe.with(&read).unwrap(), recipe);
                }
                let words = recipe.arguments().replace('\'', "");
                assert_eq!(asked("three-layer", &words), recipe, "{words}");
            }
        }
    }

    #[test]
    fn a_config_that_cannot_be_read_says_where() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        let message = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Choices::read(&path).unwrap_err().to_string()
        };
        assert!(
            message("epochs = 1\nlerning-rate = 0.1\n").contains("line 2 cannot be read: unknown field `lerning-rate`")
        );
        assert!(message("epochs = 'many'").contains("line 1"));
        assert!(message("= 3").contains("keys are the long options"));
        std::fs::write(&path, "epochs = 2").unwrap();
        let partial = Choices::read(&path).unwrap();
        assert!(
            partial
                .recipe(&path)
                .unwrap_err()
                .to_string()
                .contains("does not say all of a recipe: missing field `net`")
        );
    }
}
