//! Level 7. The page about several runs.

use std::collections::BTreeMap;

use maud::{Markup, html};

use super::curves::of_runs;
use super::data::Run;
use super::numbers::{NONE, count, or_none, percent, rounded, short};
use super::parts::{configuration, document, facts, notes, section, state, table};
use super::plots::key;
use crate::cli::output::{Align, thousands};

/// A page that shows runs beside each other.
pub(in crate::cli) fn comparison(title: &str, runs: &[Run]) -> String {
    document(
        &format!("{title} – gemmnet"),
        &html! {
            header.title {
                p.eyebrow { "gemmnet comparison" }
                h1 { (title) }
                p.quiet { (thousands(runs.len())) " runs side by side. The best of a column is marked." }
            }
            (section("Numbers", "", &numbers(runs)))
            (section("Training", "", &of_runs(runs)))
            (section("Differences", "What the configurations do not agree on.", &differences(runs)))
            @for (series, run) in runs.iter().enumerate() { (one(series, run)) }
        },
    )
}

/// A column of numbers, and which of them are the best.
struct Numbers<'a> {
    name: &'a str,
    values: Vec<Option<f64>>,
    better: Better,
    write: fn(f64) -> String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Better {
    Most,
    Least,
    Neither,
}

impl Numbers<'_> {
    /// Nothing is best if nothing else is there, or if all are the same.
    fn best(&self) -> Option<f64> {
        let known = || self.values.iter().flatten().copied().filter(|value| value.is_finite());
        let (least, most) = (known().reduce(f64::min)?, known().reduce(f64::max)?);
        match self.better {
            Better::Most if least < most => Some(most),
            Better::Least if least < most => Some(least),
            _ => None,
        }
    }

    fn cell(&self, row: usize) -> Markup {
        let value = self.values[row];
        let text = or_none(value, self.write);
        html! {
            @if value.is_some() && value == self.best() {
                strong.best { (text) span.hidden { " (best)" } }
            } @else {
                (text)
            }
        }
    }
}

fn columns(runs: &[Run]) -> Vec<Numbers<'static>> {
    use Better::{Least, Most, Neither};
    let column = |name, better, write, value: fn(&Run) -> Option<f64>| {
        let values = runs.iter().map(value).collect();
        Numbers { name, values, better, write }
    };
    vec![
        column("validation", Most, percent, |run| run.kept().map(|kept| kept.1)),
        column("test", Most, percent, Run::test_accuracy),
        column("kept epoch", Neither, short, |run| run.kept().map(|kept| kept.0)),
        // Whoever is not over is not fast.
        column("seconds", Least, |seconds| format!("{seconds:.1}"), |run| run.end.as_ref().map(|end| end.seconds)),
        column("images/s", Most, count, |run| run.end.as_ref().map(|end| end.images_per_second)),
        column("iterations", Neither, count, |run| Some(run.done() as f64)),
        column("parameters", Neither, |number| rounded(number as usize), |run| Some(run.start()?.parameters as f64)),
    ]
}

fn numbers(runs: &[Run]) -> Markup {
    let columns = columns(runs);
    let heads: Vec<_> =
        std::iter::once(("run", Align::Left)).chain(columns.iter().map(|column| (column.name, Align::Right))).collect();
    let row = |(row, run): (usize, &Run)| {
        let name = html! { (key(row, false)) (run.name) };
        std::iter::once(name).chain(columns.iter().map(|column| column.cell(row))).collect()
    };
    table("numbers of the runs", &heads, &runs.iter().enumerate().map(row).collect::<Vec<_>>())
}

/// A key of configurations, and what it is in each.
type Entry = (String, Vec<Option<String>>);

/// What is not the same in all configurations.
fn different(configs: &[&str]) -> Result<Vec<Entry>, toml::de::Error> {
    let mut all: BTreeMap<String, Vec<Option<String>>> = BTreeMap::new();
    for (place, config) in configs.iter().enumerate() {
        let mut flat = Vec::new();
        flatten("", config.parse::<toml::Table>()?, &mut flat);
        for (key, value) in flat {
            all.entry(key).or_insert_with(|| vec![None; configs.len()])[place] = Some(value);
        }
    }
    Ok(all.into_iter().filter(|(_, values)| values.iter().any(|value| *value != values[0])).collect())
}

/// Keys of tables within tables, with dots between.
fn flatten(before: &str, table: toml::Table, flat: &mut Vec<(String, String)>) {
    for (key, value) in table {
        let key = format!("{before}{key}");
        match value {
            toml::Value::Table(inner) => flatten(&format!("{key}."), inner, flat),
            toml::Value::String(text) => flat.push((key, text)),
            other => flat.push((key, other.to_string())),
        }
    }
}

fn differences(runs: &[Run]) -> Markup {
    let configs: Vec<&str> = runs.iter().map(|run| run.config.as_str()).collect();
    let different = match different(&configs) {
        Ok(different) => different,
        Err(error) => return html! { p.note { "A configuration cannot be read: " (error.message()) "." } },
    };
    if different.is_empty() {
        return html! { p { "None: the configurations are the same." } };
    }
    let heads: Vec<_> = std::iter::once("key")
        .chain(runs.iter().map(|run| run.name.as_str()))
        .map(|name| (name, Align::Left))
        .collect();
    let value = |value: Option<String>| html! { code { (value.as_deref().unwrap_or(NONE)) } };
    let row =
        |(key, values): Entry| std::iter::once(html! { code { (key) } }).chain(values.into_iter().map(value)).collect();
    table("differences of the configurations", &heads, &different.into_iter().map(row).collect::<Vec<_>>())
}

/// What is to be said of a run by itself.
fn one(series: usize, run: &Run) -> Markup {
    html! {
        section {
            header { h2 { (key(series, false)) (run.name) } p { (state(run)) } }
            div.content {
                (notes(run))
                (brief(run))
                (configuration(run))
            }
        }
    }
}

fn brief(run: &Run) -> Markup {
    let Some(start) = run.start() else { return html! {} };
    let [train, validation, test] = [start.images.train, start.images.validation, start.images.test].map(thousands);
    let classes = start.classes.len();
    facts(&[
        ("network", start.network.clone()),
        ("data", format!("{}: {train} + {validation} + {test} images of {classes} classes", start.data)),
        ("machine", format!("{}, {} thread(s), {}, {}", start.processor, start.threads, start.blas, start.dtype)),
    ])
}

#[cfg(test)]
mod tests {
    use super::super::data::tests::{START, end, epoch, step};
    use super::*;

    fn run(name: &str, config: &str, last: &str) -> Run {
        let lines = [START, &step(1, "2.0"), &step(2, "1.0"), &epoch(2, 0.5, true), last];
        Run::new(name, config, &lines.join("\n"))
    }

    fn marked(page: &str) -> Vec<&str> {
        page.split("<strong class=\"best\">").skip(1).filter_map(|rest| rest.split('<').next()).collect()
    }

    #[test]
    fn the_best_of_each_column_is_marked_and_no_other() {
        let runs = [
            run("a", "", &end(0.6, "0.7", 3.0)),
            run("b", "", &end(0.8, "0.5", 2.0)),
            run("c", "", &end(0.8, "null", 9.0)),
            run("not over", "", ""),
        ];
        // Two are as good on the validation images; all are as fast by images.
        assert_eq!(marked(&numbers(&runs).into_string()), ["70.0\u{a0}%", "80.0\u{a0}%", "2.0", "80.0\u{a0}%"]);
        assert!(marked(&numbers(&runs[..1]).into_string()).is_empty(), "one by itself is not the best");
    }

    #[test]
    fn differences_are_keys_whose_values_differ() {
        let first = "seed = 0\nnet = \"a\"\n[optimizer]\nname = \"adam\"\nbeta = [0.9, 0.99]";
        let second = "seed = 1\nnet = \"a\"\nepochs = 2.5\n[optimizer]\nname = \"sgd\"\nbeta = [0.9, 0.99]";
        let some = |text: &str| Some(text.to_owned());
        let want = [
            ("epochs".to_owned(), vec![None, some("2.5")]),
            ("optimizer.name".to_owned(), vec![some("adam"), some("sgd")]),
            ("seed".to_owned(), vec![some("0"), some("1")]),
        ];
        assert_eq!(different(&[first, second]).expect("TOML"), want);
        assert!(different(&[first, "a = = 1"]).is_err());
    }

    #[test]
    fn odd_runs_can_be_compared() {
        let empty = Run::new("<u>", "", "");
        let odd = run("b", "no toml", "");
        for runs in [vec![], vec![empty.clone()], vec![empty, odd]] {
            let page = comparison("<script>", &runs);
            for no in ["<script", "<u>", "http", "NaN", "inf"] {
                assert!(!page.contains(no), "{no}");
            }
        }
    }
}
