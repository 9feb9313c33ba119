//! Level 7. The page of a search.

use std::collections::BTreeMap;

use maud::html;

use super::parts::{cell, document, section, table, tile};
use super::plots::{Curve, Plot, Scale};
use crate::cli::output::Align;

/// One training of a search.
pub(in crate::cli) struct Tried {
    /// The values that it was trained with, in the order of the keys.
    pub(in crate::cli) values: Vec<String>,
    /// How far it was trained, in words: trainings of the same are drawn alike.
    pub(in crate::cli) extent: String,
    /// On the validation images; none if it failed.
    pub(in crate::cli) accuracy: Option<f64>,
}

/// What a search did.
pub(in crate::cli) struct Found<'a> {
    pub(in crate::cli) name: &'a str,
    /// What is varied.
    pub(in crate::cli) keys: Vec<&'a str>,
    /// In the order of their trials.
    pub(in crate::cli) tried: Vec<Tried>,
    /// Heads and rows of the table of trials, the best first.
    pub(in crate::cli) heads: Vec<&'a str>,
    pub(in crate::cli) rows: Vec<Vec<String>>,
    /// Number, its name, and more about it.
    pub(in crate::cli) tiles: Vec<[String; 3]>,
    /// The command that trains the best.
    pub(in crate::cli) command: String,
}

/// A page with accuracy over each value that was varied, and the table.
pub(in crate::cli) fn search_page(found: &Found<'_>) -> String {
    let align = |column| if column == 0 { Align::Left } else { Align::Right };
    let columns: Vec<_> = found.heads.iter().enumerate().map(|(column, head)| (*head, align(column))).collect();
    let rows: Vec<_> = found.rows.iter().map(|row| row.iter().map(|text| cell(text)).collect()).collect();
    let plots = html! { div.plots { @for key in 0..found.keys.len() { (over(found, key)) } } };
    document(
        &format!("{} – gemmnet", found.name),
        &html! {
            header.title {
                p.eyebrow { "gemmnet search" }
                h1 { (found.name) }
                dl.tiles { @for [number, name, more] in &found.tiles { (tile(name, number, more)) } }
            }
            (section("Values", "Validation accuracy over each of what was varied.", &plots))
            (section("Trials", "The best first.", &table("trials", &columns, &rows)))
            (section("The best", "", &html! { pre { code { (found.command) } } }))
        },
    )
}

/// Accuracy over one key; of numbers over several orders of magnitude, their logarithm.
fn over(found: &Found<'_>, key: usize) -> maud::Markup {
    let values = || found.tried.iter().map(|tried| tried.values[key].as_str());
    let numbers: Option<Vec<f64>> = values().map(|value| value.parse().ok()).collect();
    let mut names: Vec<&str> = values().collect();
    names.sort_unstable();
    names.dedup();
    let (x, at): (String, Vec<f64>) = match numbers {
        Some(numbers) => {
            let (least, most) = numbers.iter().fold((f64::INFINITY, 0.0_f64), |(a, b), &x| (a.min(x), b.max(x)));
            if least > 0.0 && most > 20.0 * least {
                (format!("{} (its power of ten)", found.keys[key]), numbers.iter().map(|x| x.log10()).collect())
            } else {
                (found.keys[key].to_owned(), numbers)
            }
        }
        None => {
            let numbered: Vec<String> =
                names.iter().enumerate().map(|(i, name)| format!("{} is {name}", i + 1)).collect();
            let place = |value| names.iter().position(|name| *name == value).map_or(0.0, |i| (i + 1) as f64);
            (format!("{}: {}", found.keys[key], numbered.join(", ")), values().map(place).collect())
        }
    };
    let mut series: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for (tried, at) in found.tried.iter().zip(at) {
        series.entry(&tried.extent).or_default().extend(tried.accuracy.map(|accuracy| (at, accuracy)));
    }
    let curves = series.into_iter().enumerate();
    let curves = curves.map(|(series, (name, points))| Curve { name: name.to_owned(), points, series, faint: false });
    let curves = curves.collect();
    Plot { title: "Accuracy", x: &x, scale: Scale::Percent, curves, marks: Vec::new(), joined: false }.figure("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_is_drawn_over_numbers_and_names() {
        let tried = |rate: &str, schedule: &str, accuracy| Tried {
            values: vec![rate.into(), schedule.into()],
            extent: "0.3 epochs".into(),
            accuracy,
        };
        let found = Found {
            name: "<1>",
            keys: vec!["learning-rate", "schedule"],
            tried: vec![
                tried("0.001", "linear", Some(0.5)),
                tried("0.1", "constant", Some(0.4)),
                tried("0.05", "linear", None),
            ],
            heads: vec!["trial", "accuracy"],
            rows: vec![vec!["0".into(), "0.5".into()]],
            tiles: vec![["50 %".into(), "accuracy".into(), "of trial 0".into()]],
            command: "gemmnet train --config 'best.toml'".into(),
        };
        let page = search_page(&found);
        for part in [
            "&lt;1&gt;",
            "learning-rate (its power of ten)",
            "schedule: 1 is constant, 2 is linear",
            "from 50% at -3 to 40% at -1",
            "--config",
        ] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
        assert_eq!(page.matches("<circle").count(), 4, "two trials, twice");
    }
}
