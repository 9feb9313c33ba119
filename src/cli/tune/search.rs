//! Level 7. The search: trials by rungs, in a folder that can be gone on with.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Plan;
use super::space::Candidate;
use crate::cli::interrupt::Interrupt;
use crate::cli::output::{Align, Output, Table};
use crate::cli::recipe::Recipe;
use crate::cli::report::{Found, Tried, search_page};
use crate::cli::runs::{self, Run};
use crate::cli::train::start::{self, Base, Ready, Said};
use crate::cli::train::{follow, report};
use crate::cli::{Stop, progress};
use crate::data::Split;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::store::replace;
use crate::train::{Checkpoint, Event};

/// Of the trials of a rung, one in so many goes on, and for so many times as long.
const ETA: usize = 3;

/// A recipe to try.
pub(super) struct Trial {
    pub(super) values: Candidate,
    pub(super) recipe: Recipe,
}

/// A stage of the search.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rung {
    /// How many trials take part.
    trials: usize,
    /// The part of its epochs that a trial is trained for.
    part: f64,
    seeds: usize,
}

/// The rungs from many short trainings to few whole ones; with a target, from one seed to all.
fn rungs(plan: &Plan) -> Vec<Rung> {
    let left = |rung: u32| (plan.trials / ETA.pow(rung)).max(1);
    let powers = |n: usize| n.checked_ilog(ETA).unwrap_or(0);
    if plan.target.is_some() {
        let last = powers(plan.seeds) + u32::from(plan.seeds > ETA.pow(powers(plan.seeds)));
        return (0..=last).map(|i| Rung { trials: left(i), part: 1.0, seeds: ETA.pow(i).min(plan.seeds) }).collect();
    }
    // So that there are several to choose from in the end.
    let last = if plan.trials < ETA { 0 } else { (powers(plan.trials) - 1).max(1) };
    (0..=last).map(|i| Rung { trials: left(i), part: (ETA as f64).powi(i as i32 - last as i32), seeds: 1 }).collect()
}

/// A line of results.jsonl.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) trial: usize,
    pub(super) seed: u64,
    /// Epochs that were trained.
    pub(super) epochs: f64,
    /// On the validation images; none if training failed.
    pub(super) accuracy: Option<f64>,
    /// Of training, from its beginning.
    pub(super) seconds: f64,
    pub(super) error: Option<String>,
}

/// What is known of a trial.
#[derive(Clone, Debug)]
struct Standing {
    trial: usize,
    seeds: usize,
    epochs: f64,
    /// The least of its seeds; none if one failed.
    accuracy: Option<f64>,
    /// The median of its seeds.
    seconds: f64,
}

impl Standing {
    /// Whether it is better than another: with a target, the fastest of those that reach it; else the most accurate.
    fn compare(&self, other: &Self, target: Option<f64>) -> Ordering {
        let accuracy = |s: &Self| s.accuracy.unwrap_or(f64::NEG_INFINITY);
        let reaches = |s: &Self| target.is_some_and(|target| accuracy(s) >= target);
        let by_accuracy = accuracy(other).total_cmp(&accuracy(self));
        reaches(other)
            .cmp(&reaches(self))
            .then_with(|| if reaches(self) { self.seconds.total_cmp(&other.seconds) } else { by_accuracy })
    }
}

pub(super) struct Search<'a> {
    dir: PathBuf,
    plan: Plan,
    base: Base,
    said: &'a Said<'a>,
    trials: Vec<Trial>,
    outcomes: Vec<Outcome>,
    /// Where they are kept.
    results: File,
    interrupt: Interrupt,
}

impl<'a> Search<'a> {
    /// In this folder, with what is known there.
    pub(super) fn open(dir: PathBuf, plan: Plan, base: Base, said: &'a Said<'a>, trials: Vec<Trial>) -> Result<Self> {
        let path = results(&dir);
        let outcomes: Vec<Outcome> = if path.exists() { runs::lines(&path)? } else { Vec::new() };
        // Without what a crash has left of the last line.
        let results = runs::rewrite(&path, &outcomes)?;
        let interrupt = Interrupt::listen();
        Ok(Search { dir, plan, base, said, trials, outcomes, results, interrupt })
    }

    pub(super) fn run<T: Element>(mut self, out: &Output) -> Result<(), Stop> {
        let dir = self.dir.display().to_string();
        out.line(format_args!("{} trials, from {} to {dir}", self.trials.len(), self.base.place.folder.dir.display()))?;
        let mut alive: Vec<usize> = (0..self.trials.len()).collect();
        let rungs = rungs(&self.plan);
        for (i, rung) in rungs.iter().enumerate() {
            alive.truncate(rung.trials);
            let next = rungs.get(i + 1).map_or(0, |next| next.trials);
            for place in 0..alive.len() {
                self.climb::<T>(alive[place], rung, out)?;
                self.forget(&self.ranked(&alive[..=place]), next)?;
            }
            alive = self.ranked(&alive).into_iter().map(|standing| standing.trial).collect();
        }
        self.conclude(alive[0], out)
    }

    /// Trains a trial as far as a rung asks for.
    fn climb<T: Element>(&mut self, trial: usize, rung: &Rung, out: &Output) -> Result<(), Stop> {
        let epochs = self.trials[trial].recipe.epochs * rung.part;
        for seed in (0..rung.seeds as u64).map(|i| self.said.seed.wrapping_add(i)) {
            let known = |o: &Outcome| (o.trial, o.seed) == (trial, seed) && (o.error.is_some() || o.epochs >= epochs);
            if self.outcomes.iter().any(known) {
                continue;
            }
            let outcome = self.train::<T>(trial, seed, epochs, out)?;
            let accuracy = written(outcome.accuracy);
            let said: Vec<_> = self.trials[trial].values.iter().map(|(key, value)| format!("{key}={value}")).collect();
            out.line(format_args!(
                "trial {trial:3}, seed {seed}, {epochs:.2} epochs: validation accuracy {accuracy}, {:.1} s  {}",
                outcome.seconds,
                said.join(" ")
            ))?;
            self.keep(outcome)?;
        }
        Ok(())
    }

    fn keep(&mut self, outcome: Outcome) -> Result<()> {
        runs::append(&mut self.results, &results(&self.dir), &outcome, true)?;
        self.outcomes.push(outcome);
        Ok(())
    }

    fn trial_dir(&self, trial: usize, seed: u64) -> PathBuf {
        self.dir.join("trials").join(format!("{trial}-{seed}"))
    }

    /// Trains a trial from where it stands up to an epoch.
    fn train<T: Element>(&self, trial: usize, seed: u64, until: f64, out: &Output) -> Result<Outcome, Stop> {
        let dir = self.trial_dir(trial, seed);
        let (mut ready, mut run) = self.ready::<T>(trial, seed, &dir)?;
        run.write_config(&ready.config, ready.solver.checkpoint().step())?;
        run.record(&report::start(&mut ready))?;
        ready.solver.save_with(run.saver(1));
        let bar = out.is_watched().then(|| {
            let bar = progress::bar(0, "trial {prefix}  {msg}  {bar:25} {pos}/{len}  {eta} left");
            bar.set_prefix(trial.to_string());
            out.show_bar(bar.clone());
            bar
        });
        let last = ready.solver.steps() as f64 * until / ready.recipe.epochs;
        let watched = follow(&mut ready.solver, &mut run, until, |event| {
            if let (Some(bar), Event::Step { step, loss, .. }) = (&bar, event) {
                bar.set_length(last as u64);
                bar.set_position(*step as u64);
                bar.set_message(format!("loss {loss:.4}"));
            }
            Ok(self.interrupt.came())
        });
        out.finish_bar();
        let outcome = |accuracy, error| Outcome { trial, seed, epochs: until, accuracy, seconds: run.seconds, error };
        match watched {
            Ok(_) if self.interrupt.came() => {
                out.note(format_args!("stopped and saved; to go on: gemmnet tune --resume {}", self.dir.display()));
                Err(Stop::Interrupted)
            }
            Ok(report) if report.stopped_early => {
                Ok(outcome(Some(ready.solver.accuracy_now(Split::Validation)?), None))
            }
            Ok(report) => Ok(outcome(Some(report.kept_val_accuracy), None)),
            // A rate that is too large is a result.
            Err(Stop::Training { error: error @ Error::Diverged { .. }, .. }) => {
                Ok(outcome(None, Some(error.to_string())))
            }
            Err(stop) => Err(stop),
        }
    }

    /// A trial before its first iteration, or where it was saved.
    fn ready<T: Element>(&self, trial: usize, seed: u64, dir: &Path) -> Result<(Ready<T>, Run)> {
        let recipe = self.trials[trial].recipe.clone();
        if let Ok(path) = runs::newest_checkpoint(dir) {
            let mut run = Run::open(dir)?;
            let ready = self.base.resumed(recipe, self.said, Checkpoint::load(&path)?)?;
            run.go_on_after(ready.solver.checkpoint().step())?;
            return Ok((ready, run));
        }
        let unmade = |e| Error::io("create", dir, e, "check who may write into the folder of the search");
        if dir.exists() {
            // It ended before its first checkpoint.
            fs::remove_dir_all(dir).map_err(unmade)?;
        }
        fs::create_dir_all(dir).map_err(unmade)?;
        Ok((self.base.ready(recipe, self.said, seed)?, Run::create(dir)?))
    }

    /// What is known of these trials, the best first.
    fn ranked(&self, trials: &[usize]) -> Vec<Standing> {
        let mut ranked: Vec<Standing> = trials.iter().filter_map(|&trial| self.standing(trial)).collect();
        ranked.sort_by(|a, b| a.compare(b, self.plan.target));
        ranked
    }

    fn standing(&self, trial: usize) -> Option<Standing> {
        let of_trial = || self.outcomes.iter().filter(|outcome| outcome.trial == trial);
        let epochs = of_trial().map(|outcome| outcome.epochs).reduce(f64::max)?;
        let last: Vec<&Outcome> = of_trial().filter(|outcome| outcome.epochs == epochs).collect();
        let accuracies: Option<Vec<f64>> = last.iter().map(|outcome| outcome.accuracy).collect();
        let mut seconds: Vec<f64> = last.iter().map(|outcome| outcome.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        let accuracy = accuracies.and_then(|all| all.into_iter().reduce(f64::min));
        Some(Standing { trial, seeds: last.len(), epochs, accuracy, seconds: seconds[seconds.len() / 2] })
    }

    /// Removes the checkpoints of trials that cannot be among the `next` best of a rung any more.
    fn forget(&self, ranked: &[Standing], next: usize) -> Result<()> {
        if next == 0 || self.plan.target.is_some() {
            return Ok(());
        }
        for standing in ranked.iter().skip(next) {
            let dir = self.trial_dir(standing.trial, self.said.seed).join("checkpoints");
            if dir.exists() {
                let fix = "check who may write into the folder of the search";
                fs::remove_dir_all(&dir).map_err(|e| Error::io("remove", &dir, e, fix))?;
            }
        }
        Ok(())
    }

    /// Says what was found.
    fn conclude(&self, best: usize, out: &Output) -> Result<(), Stop> {
        let all: Vec<usize> = (0..self.trials.len()).collect();
        let mut ranked = self.ranked(&all);
        // What was trained for longer is known better.
        ranked.sort_by(|a, b| b.epochs.total_cmp(&a.epochs).then_with(|| b.seeds.cmp(&a.seeds)));
        let heads = ["trial", "epochs", "seeds", "accuracy", "seconds"].into_iter().chain(self.keys());
        let heads: Vec<&str> = heads.collect();
        let rows: Vec<Vec<String>> = ranked.iter().map(|standing| self.row(standing)).collect();
        let mut table = Table::new(heads.iter().map(|name| (*name, Align::Right)));
        rows.iter().for_each(|row| table.row(row.iter().cloned()));
        out.line(table)?;

        let standing = self.standing(best).expect("the best was trained");
        let accuracy = standing.accuracy.ok_or_else(|| {
            let problem = "every trial failed: their losses became infinite";
            Error::invalid("tune", problem, "let it vary over smaller learning rates")
        })?;
        let path = self.dir.join("best.toml");
        let text = start::config(&self.trials[best].recipe, self.said, &self.base.place, self.said.seed)?;
        replace(&path, text.as_bytes())?;
        let command = format!("gemmnet train --config {}", path.display());
        let page = self.page(&standing, accuracy, (heads, rows), &command);
        replace(&self.dir.join("report.html"), page.as_bytes())?;
        let reached = match self.plan.target {
            Some(target) if accuracy < target => format!("; none reached {target}"),
            _ => String::new(),
        };
        out.line(format_args!(
            "best: trial {best}, validation accuracy {accuracy:.4} in {:.1} s{reached}; to train it: {command}",
            standing.seconds,
        ))?;
        out.json(&json!({
            "best": best,
            "accuracy": accuracy,
            "seconds": standing.seconds,
            "values": self.trials[best].values.iter().cloned().collect::<BTreeMap<_, _>>(),
            "arguments": self.trials[best].recipe.arguments(),
            "trials": self.trials.len(),
            "run": self.dir.display().to_string(),
        }))
    }

    fn keys(&self) -> Vec<&str> {
        self.trials[0].values.iter().map(|(key, _)| key.as_str()).collect()
    }

    fn values(&self, trial: usize) -> impl Iterator<Item = String> {
        self.trials[trial].values.iter().map(|(_, value)| value.clone())
    }

    fn row(&self, standing: &Standing) -> Vec<String> {
        let Standing { trial, seeds, epochs, accuracy, seconds } = standing;
        let (epochs, accuracy, seconds) = (format!("{epochs:.2}"), written(*accuracy), format!("{seconds:.1}"));
        let known = [trial.to_string(), epochs, seeds.to_string(), accuracy, seconds];
        known.into_iter().chain(self.values(*trial)).collect()
    }

    fn page(&self, best: &Standing, accuracy: f64, table: (Vec<&str>, Vec<Vec<String>>), command: &str) -> String {
        let tried = |outcome: &Outcome| Tried {
            values: self.values(outcome.trial).collect(),
            extent: match self.plan.target {
                Some(_) => format!("seed {}", outcome.seed),
                None => format!("{:.2} epochs", outcome.epochs),
            },
            accuracy: outcome.accuracy,
        };
        let seconds: f64 = self.outcomes.iter().map(|outcome| outcome.seconds).sum();
        let tile = |number: String, name: &str, more: String| [number, name.to_owned(), more];
        search_page(&Found {
            name: &self.dir.display().to_string(),
            keys: self.keys(),
            tried: self.outcomes.iter().map(tried).collect(),
            heads: table.0,
            rows: table.1,
            tiles: vec![
                tile(
                    format!("{:.1} %", 100.0 * accuracy),
                    "best validation accuracy",
                    format!("of trial {}", best.trial),
                ),
                tile(format!("{:.1} s", best.seconds), "its training", format!("{} seed(s)", best.seeds)),
                tile(self.trials.len().to_string(), "trials", format!("{seconds:.0} s of training in all")),
            ],
            command: command.to_owned(),
        })
    }
}

fn written(accuracy: Option<f64>) -> String {
    accuracy.map_or("failed".to_owned(), |accuracy| format!("{accuracy:.4}"))
}

fn results(dir: &Path) -> PathBuf {
    dir.join("results.jsonl")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rungs_go_from_many_to_few() {
        let plan = |trials, target, seeds| Plan { vary: Vec::new(), trials, target, seeds };
        let shape = |plan: &Plan| rungs(plan).iter().map(|rung| (rung.trials, rung.seeds)).collect::<Vec<_>>();
        assert_eq!(shape(&plan(27, None, 3)), [(27, 1), (9, 1), (3, 1)]);
        assert_eq!(rungs(&plan(27, None, 3))[0].part, 1.0 / 9.0);
        for (trials, shaped) in [(1, vec![1]), (2, vec![2]), (3, vec![3, 1]), (9, vec![9, 3]), (10, vec![10, 3])] {
            let rungs = rungs(&plan(trials, None, 3));
            assert_eq!(rungs.iter().map(|rung| rung.trials).collect::<Vec<_>>(), shaped);
            assert_eq!(rungs.last().unwrap().part, 1.0, "the last are whole trainings");
        }
        assert_eq!(shape(&plan(27, Some(0.65), 5)), [(27, 1), (9, 3), (3, 5)]);
        assert_eq!(shape(&plan(4, Some(0.65), 1)), [(4, 1)]);
    }

    #[test]
    fn the_fastest_that_reaches_the_target_is_the_best() {
        let standing = |trial, accuracy, seconds| Standing { trial, seeds: 1, epochs: 1.0, accuracy, seconds };
        let all = [
            standing(0, Some(0.7), 9.0),
            standing(1, Some(0.66), 4.0),
            standing(2, Some(0.5), 1.0),
            standing(3, None, 0.1),
        ];
        let order = |target| {
            let mut sorted = all.to_vec();
            sorted.sort_by(|a, b| a.compare(b, target));
            sorted.iter().map(|standing| standing.trial).collect::<Vec<_>>()
        };
        assert_eq!(order(Some(0.65)), [1, 0, 2, 3]);
        assert_eq!(order(None), [0, 1, 2, 3]);
    }
}
