//! Level 4. How the learning rate changes during training.

use std::f64::consts::PI;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Where in training a step is. Constant rates need none: [`Progress::default`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The step, from 0.
    pub step: usize,
    /// Steps in an epoch.
    pub steps_per_epoch: usize,
    /// Steps of the whole training.
    pub steps: usize,
}

/// The learning rate as a fraction of its base, over training. `e` counts finished epochs and `p` is the fraction of
/// the steps that are done, both from the end of the warm-up.
///
/// As text: `constant`, `exp:0.9`, `step:5:0.1`, `linear` or `linear:3`, `cosine` or `cosine:0.01`, `onecycle` or
/// `onecycle:0.23:0.2:0.07`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Schedule {
    /// 1
    Constant,
    /// `factor^e`: CS231n's `lr_decay`. Text: `exp:FACTOR`.
    Exponential {
        /// Above 0.
        factor: f64,
    },
    /// `factor^floor(e / every_epochs)`. Text: `step:EPOCHS:FACTOR`.
    Step {
        /// 1 or more.
        every_epochs: usize,
        /// Above 0.
        factor: f64,
    },
    /// In a straight line from 1 at the first step to 0: at the end, or after so many epochs and from then on. Text:
    /// `linear` or `linear:EPOCHS`.
    Linear {
        /// Where it gets to 0, above 0; `None` for the end.
        epochs: Option<f64>,
    },
    /// `final + (1 - final) (1 + cos(pi p)) / 2`: half a cosine wave down (Loshchilov & Hutter 2017, without restarts).
    /// Text: `cosine` for a final fraction of 0, or `cosine:FINAL`.
    Cosine {
        /// Approached at the end, 0 to 1.
        final_fraction: f64,
    },
    /// In straight lines from `start` at `p = 0` up to 1 at `p = peak_at` and down to `final` at `p = 1` (Smith 2018).
    /// It warms up itself. Text: `onecycle:PEAK_AT:START:FINAL`; `onecycle` is `onecycle:0.23:0.2:0.07`, found for
    /// CIFAR-10 by Jordan (2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU").
    OneCycle {
        /// Where the peak is, as a fraction of all steps, 0 to 1.
        peak_at: f64,
        /// At the first step, 0 to 1.
        start_fraction: f64,
        /// Approached at the end, 0 to 1.
        final_fraction: f64,
    },
}

impl Schedule {
    const ONE_CYCLE: Schedule = Schedule::OneCycle { peak_at: 0.23, start_fraction: 0.2, final_fraction: 0.07 };

    fn check(self) -> Result<()> {
        let require = |what: &str, value: f64, good: bool, fix: &str| {
            if good {
                return Ok(());
            }
            Err(Error::invalid("learning-rate schedule", format!("{what} {value} in `{self}` is out of range"), fix))
        };
        let factor = |value: f64| {
            require("factor", value, value > 0.0 && value.is_finite(), "give a factor above 0, such as 0.9")
        };
        let fraction = |what, value| require(what, value, (0.0..=1.0).contains(&value), "give a fraction from 0 to 1");
        match self {
            Schedule::Constant => Ok(()),
            Schedule::Exponential { factor: f } => factor(f),
            Schedule::Step { every_epochs, factor: f } => {
                require("number of epochs", every_epochs as f64, every_epochs > 0, "give 1 epoch or more")?;
                factor(f)
            }
            Schedule::Linear { epochs: None } => Ok(()),
            Schedule::Linear { epochs: Some(n) } => {
                require("number of epochs", n, n > 0.0 && n.is_finite(), "give more than 0 epochs, such as 3 or 0.5")
            }
            Schedule::Cosine { final_fraction } => fraction("final fraction", final_fraction),
            Schedule::OneCycle { peak_at, start_fraction, final_fraction } => {
                fraction("place of the peak", peak_at)?;
                fraction("start fraction", start_fraction)?;
                fraction("final fraction", final_fraction)
            }
        }
    }

    /// The fraction of the base rate; `at` counts from the end of the warm-up.
    fn fraction(self, at: Progress) -> f64 {
        let epoch = at.step / at.steps_per_epoch.max(1);
        let progress = (at.step as f64 / at.steps.max(1) as f64).min(1.0);
        let line = |from: f64, to: f64, t: f64| from + (to - from) * t;
        match self {
            Schedule::Constant => 1.0,
            Schedule::Exponential { factor } => factor.powf(epoch as f64),
            Schedule::Step { every_epochs, factor } => factor.powf((epoch / every_epochs) as f64),
            Schedule::Linear { epochs: None } => 1.0 - progress,
            Schedule::Linear { epochs: Some(epochs) } => {
                let steps = (epochs * at.steps_per_epoch as f64).ceil().max(1.0);
                (1.0 - at.step as f64 / steps).max(0.0)
            }
            Schedule::Cosine { final_fraction } => line(final_fraction, 1.0, 0.5 * (1.0 + (PI * progress).cos())),
            Schedule::OneCycle { peak_at, start_fraction, final_fraction } => {
                if progress < peak_at {
                    line(start_fraction, 1.0, progress / peak_at)
                } else if peak_at < 1.0 {
                    line(1.0, final_fraction, (progress - peak_at) / (1.0 - peak_at))
                } else {
                    1.0
                }
            }
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Schedule::Constant => write!(f, "constant"),
            Schedule::Exponential { factor } => write!(f, "exp:{factor}"),
            Schedule::Step { every_epochs, factor } => write!(f, "step:{every_epochs}:{factor}"),
            Schedule::Linear { epochs: None } => write!(f, "linear"),
            Schedule::Linear { epochs: Some(epochs) } => write!(f, "linear:{epochs}"),
            Schedule::Cosine { final_fraction: 0.0 } => write!(f, "cosine"),
            Schedule::Cosine { final_fraction } => write!(f, "cosine:{final_fraction}"),
            schedule if *schedule == Self::ONE_CYCLE => write!(f, "onecycle"),
            Schedule::OneCycle { peak_at, start_fraction, final_fraction } => {
                write!(f, "onecycle:{peak_at}:{start_fraction}:{final_fraction}")
            }
        }
    }
}

impl FromStr for Schedule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let error = |problem: String| {
            let fix = "write constant, exp:FACTOR, step:EPOCHS:FACTOR, linear[:EPOCHS], cosine[:FINAL] or onecycle[:PEAK_AT:START:FINAL]";
            Error::invalid("learning-rate schedule", problem, fix)
        };
        let number =
            |field: &str| field.parse::<f64>().map_err(|_| error(format!("`{field}` in `{text}` is not a number")));
        let fields: Vec<&str> = text.split(':').collect();
        let schedule = match fields[..] {
            ["constant"] => Schedule::Constant,
            ["exp", factor] => Schedule::Exponential { factor: number(factor)? },
            ["step", epochs, factor] => Schedule::Step {
                every_epochs: epochs
                    .parse()
                    .map_err(|_| error(format!("`{epochs}` in `{text}` is not a whole number of epochs")))?,
                factor: number(factor)?,
            },
            ["linear"] => Schedule::Linear { epochs: None },
            ["linear", epochs] => Schedule::Linear { epochs: Some(number(epochs)?) },
            ["cosine"] => Schedule::Cosine { final_fraction: 0.0 },
            ["cosine", end] => Schedule::Cosine { final_fraction: number(end)? },
            ["onecycle"] => Self::ONE_CYCLE,
            ["onecycle", peak_at, start, end] => Schedule::OneCycle {
                peak_at: number(peak_at)?,
                start_fraction: number(start)?,
                final_fraction: number(end)?,
            },
            _ => return Err(error(format!("`{text}` is not one"))),
        };
        schedule.check()?;
        Ok(schedule)
    }
}

impl TryFrom<String> for Schedule {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Schedule> for String {
    fn from(schedule: Schedule) -> String {
        schedule.to_string()
    }
}

/// The learning rate of every step: a linear warm-up to the base rate (Goyal et al. 2017), then a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct LearningRate {
    base: f64,
    schedule: Schedule,
    warmup_epochs: f64,
}

/// What a file says, before [`LearningRate::new`] has looked at it.
#[derive(Deserialize)]
#[serde(rename = "LearningRate", deny_unknown_fields)]
struct Unchecked {
    base: f64,
    schedule: Schedule,
    warmup_epochs: f64,
}

impl TryFrom<Unchecked> for LearningRate {
    type Error = Error;

    fn try_from(Unchecked { base, schedule, warmup_epochs }: Unchecked) -> Result<Self> {
        Self::new(base, schedule, warmup_epochs)
    }
}

impl LearningRate {
    /// Warm-up to the rate `base` for `warmup_epochs` epochs (0 for none, fractions allowed), then `schedule`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a base that is not a positive number, a warm-up that is not a number from 0 up, a
    /// schedule with a value out of its range, or a warm-up before [`Schedule::OneCycle`], which has its own.
    pub fn new(base: f64, schedule: Schedule, warmup_epochs: f64) -> Result<Self> {
        if !(base > 0.0 && base.is_finite()) {
            return Err(Error::invalid(
                "learning rate",
                format!("{base} is not a positive number"),
                "1e-3 is usual for Adam, 1e-2 for SGD with momentum",
            ));
        }
        if !(warmup_epochs >= 0.0 && warmup_epochs.is_finite()) {
            return Err(Error::invalid(
                "warm-up",
                format!("{warmup_epochs} is not a number of epochs"),
                "give 0 or more",
            ));
        }
        schedule.check()?;
        if warmup_epochs > 0.0 && matches!(schedule, Schedule::OneCycle { .. }) {
            return Err(Error::invalid(
                "warm-up",
                format!("{warmup_epochs} epochs before `{schedule}`, which warms up itself"),
                "leave the warm-up at 0 or choose another schedule",
            ));
        }
        Ok(LearningRate { base, schedule, warmup_epochs })
    }

    /// The same rate in every step.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not a positive number.
    pub fn constant(rate: f64) -> Result<Self> {
        Self::new(rate, Schedule::Constant, 0.0)
    }

    /// The rate at the end of the warm-up.
    pub fn base(&self) -> f64 {
        self.base
    }

    /// What follows the warm-up.
    pub fn schedule(&self) -> Schedule {
        self.schedule
    }

    /// Length of the warm-up in epochs.
    pub fn warmup_epochs(&self) -> f64 {
        self.warmup_epochs
    }

    /// The rate of a step. With a warm-up of `W` steps, `base * (step + 1) / W` while `step < W`; then `base` times the
    /// schedule's fraction, which counts steps from `W` on.
    pub fn at(&self, at: Progress) -> f64 {
        let warmup = (self.warmup_epochs * at.steps_per_epoch as f64).round() as usize;
        if at.step < warmup {
            return self.base * (at.step + 1) as f64 / warmup as f64;
        }
        let after = Progress { step: at.step - warmup, steps: at.steps.saturating_sub(warmup), ..at };
        self.base * self.schedule.fraction(after)
    }

    /// Whether the rate is 0 at this step and all later ones.
    pub fn has_ended(&self, at: Progress) -> bool {
        matches!(self.schedule, Schedule::Linear { epochs: Some(_) }) && self.at(at) == 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(schedule: &str, warmup_epochs: f64, step: usize) -> f64 {
        let at = Progress { step, steps_per_epoch: 10, steps: 100 };
        LearningRate::new(2.0, schedule.parse().unwrap(), warmup_epochs).unwrap().at(at)
    }

    /// Each formula at its corners and in between; base 2, 10 epochs of 10 steps.
    #[test]
    fn rates_follow_the_formulas() {
        for (schedule, warmup, step, expected) in [
            ("constant", 0.0, 0, 2.0),
            ("constant", 0.0, 99, 2.0),
            ("constant", 0.5, 0, 0.4),
            ("constant", 0.5, 4, 2.0),
            ("constant", 0.5, 5, 2.0),
            ("exp:0.9", 0.0, 9, 2.0),
            ("exp:0.9", 0.0, 10, 1.8),
            ("exp:0.9", 0.0, 29, 2.0 * 0.81),
            ("exp:0.9", 2.0, 20, 2.0),
            ("exp:0.9", 2.0, 30, 1.8),
            ("step:3:0.1", 0.0, 29, 2.0),
            ("step:3:0.1", 0.0, 30, 0.2),
            ("step:3:0.1", 0.0, 60, 0.02),
            ("linear", 0.0, 0, 2.0),
            ("linear", 0.0, 75, 0.5),
            ("linear", 5.0, 75, 1.0),
            ("linear:3", 0.0, 0, 2.0),
            ("linear:3", 0.0, 15, 1.0),
            ("linear:0.25", 0.0, 1, 2.0 * (1.0 - 1.0 / 3.0)),
            ("linear:3", 0.0, 30, 0.0),
            ("linear:3", 0.0, 99, 0.0),
            ("linear:3", 1.0, 10, 2.0),
            ("cosine", 0.0, 0, 2.0),
            ("cosine", 0.0, 50, 1.0),
            ("cosine", 0.0, 25, 1.0 + 0.5_f64.sqrt()),
            ("cosine", 0.0, 100, 0.0),
            ("cosine", 2.0, 19, 2.0),
            ("cosine", 2.0, 20, 2.0),
            ("cosine", 2.0, 60, 1.0),
            ("cosine:0.1", 0.0, 50, 1.1),
            ("cosine:0.1", 0.0, 100, 0.2),
            ("cosine:0.1", 0.0, 150, 0.2),
            ("onecycle:0.25:0.2:0.1", 0.0, 0, 0.4),
            ("onecycle:0.25:0.2:0.1", 0.0, 10, 2.0 * (0.2 + 0.8 * 0.4)),
            ("onecycle:0.25:0.2:0.1", 0.0, 25, 2.0),
            ("onecycle:0.25:0.2:0.1", 0.0, 40, 2.0 * (1.0 - 0.9 * 0.2)),
            ("onecycle:0.25:0.2:0.1", 0.0, 100, 0.2),
            ("onecycle:0:0.2:0.1", 0.0, 0, 2.0),
            ("onecycle:1:0.2:0.1", 0.0, 100, 2.0),
        ] {
            let got = rate(schedule, warmup, step);
            assert!(
                (got - expected).abs() <= 1e-12,
                "{schedule}, warm-up {warmup}, step {step}: {got}, not {expected}"
            );
        }
    }

    #[test]
    fn only_a_line_that_ends_before_training_has_an_end() {
        for (schedule, step, ended) in [
            ("linear:3", 29, false),
            ("linear:3", 30, true),
            ("linear:3", 99, true),
            ("linear", 100, false),
            ("cosine", 100, false),
            ("step:1:0.5", 99, false),
        ] {
            let rate = LearningRate::new(1.0, schedule.parse().unwrap(), 0.0).unwrap();
            assert_eq!(
                rate.has_ended(Progress { step, steps_per_epoch: 10, steps: 100 }),
                ended,
                "{schedule} at {step}"
            );
        }
    }

    /// A run too short for an epoch, or none at all, still has a rate.
    #[test]
    fn degenerate_lengths_give_a_rate() {
        for schedule in ["constant", "exp:0.9", "step:1:0.5", "cosine:0.1", "onecycle"] {
            for warmup in [0.0, 1.5] {
                let Ok(rates) = LearningRate::new(1.0, schedule.parse().unwrap(), warmup) else { continue };
                for (step, steps_per_epoch, steps) in [(0, 0, 0), (0, 1, 1), (5, 1, 1), (1, 4, 2)] {
                    let rate = rates.at(Progress { step, steps_per_epoch, steps });
                    assert!(rate > 0.0 && rate <= 1.0, "{schedule} at {step}/{steps}: {rate}");
                }
            }
        }
    }

    /// Text and serde are the same notation, both ways: command lines and checkpoints.
    #[test]
    fn text_round_trips() {
        for text in [
            "constant",
            "exp:0.9",
            "step:5:0.1",
            "linear",
            "linear:0.5",
            "cosine",
            "cosine:0.01",
            "onecycle",
            "onecycle:0.3:0.04:0",
        ] {
            let schedule: Schedule = text.parse().unwrap();
            assert_eq!(schedule.to_string(), text);
            let rates = LearningRate::new(1e-3, schedule, 0.0).unwrap();
            let json = serde_json::to_string(&rates).unwrap();
            assert!(json.contains(&format!("{text:?}")), "{json}");
            assert_eq!(serde_json::from_str::<LearningRate>(&json).unwrap(), rates);
        }
        assert_eq!("onecycle:0.23:0.2:0.07".parse::<Schedule>().unwrap().to_string(), "onecycle");
    }

    /// The message holds the value at fault.
    #[test]
    fn wrong_text_is_an_error() {
        for (text, part) in [
            ("", "`` is not one"),
            ("line", "`line` is not one"),
            ("linear:0", "number of epochs 0"),
            ("linear:nan", "number of epochs NaN"),
            ("exp", "exp:FACTOR"),
            ("exp:x", "`x` in `exp:x` is not a number"),
            ("exp:0", "factor 0"),
            ("exp:inf", "factor inf"),
            ("exp:nan", "factor NaN"),
            ("step:0:0.1", "number of epochs 0"),
            ("step:1.5:0.1", "`1.5` in `step:1.5:0.1` is not a whole number"),
            ("step:2:-1", "factor -1"),
            ("cosine:1.1", "final fraction 1.1"),
            ("cosine:nan", "final fraction NaN"),
            ("onecycle:0.5", "`onecycle:0.5` is not one"),
            ("onecycle:2:0:0", "place of the peak 2"),
            ("onecycle:0.5:-0.1:0", "start fraction -0.1"),
            ("onecycle:0.5:0.1:7", "final fraction 7"),
        ] {
            let message = text.parse::<Schedule>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn impossible_rates_are_errors() {
        for (base, schedule, warmup, part) in [
            (0.0, Schedule::Constant, 0.0, "0 is not a positive number"),
            (-1.0, Schedule::Constant, 0.0, "-1 is not"),
            (f64::NAN, Schedule::Constant, 0.0, "NaN is not"),
            (f64::INFINITY, Schedule::Constant, 0.0, "inf is not"),
            (1.0, Schedule::Constant, -0.5, "-0.5 is not a number of epochs"),
            (1.0, Schedule::Constant, f64::NAN, "NaN is not a number of epochs"),
            (1.0, Schedule::Exponential { factor: -2.0 }, 0.0, "factor -2"),
            (1.0, Schedule::ONE_CYCLE, 1.0, "warms up itself"),
        ] {
            let message = LearningRate::new(base, schedule, warmup).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        let json = r#"{"base": 0.0, "schedule": "constant", "warmup_epochs": 0.0}"#;
        assert!(serde_json::from_str::<LearningRate>(json).is_err(), "a file is checked too");
    }
}
