//! Level 7. What pages are put together from.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::data::Run;
use super::numbers::{NONE, count};
use crate::cli::output::{Align, thousands};

const STYLE: &str = include_str!("style.css");

/// A whole page, which needs nothing beside itself.
pub(super) fn document(title: &str, content: &Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            (head(title))
            body { main { (content) } }
        }
    };
    page.into_string()
}

fn head(title: &str) -> Markup {
    html! {
        head {
            meta charset="utf-8";
            meta name="viewport" content="width=device-width, initial-scale=1";
            meta name="color-scheme" content="light dark";
            title { (title) }
            style { (PreEscaped(STYLE)) }
        }
    }
}

/// A part of the page, its title beside it where there is room; left out if there is nothing in it.
pub(super) fn section(title: &str, note: &str, content: &Markup) -> Markup {
    if content.0.is_empty() {
        return html! {};
    }
    html! {
        section {
            header { h2 { (title) } p.quiet { (note) } }
            div.content { (content) }
        }
    }
}

/// A number in large, its name above it and more about it below.
pub(super) fn tile(name: &str, number: &str, more: &str) -> Markup {
    html! {
        div.tile {
            dt { (name) }
            dd.number { (number) }
            dd.quiet { (more) }
        }
    }
}

/// Names and what they stand for; without those of which nothing is known.
pub(super) fn facts(facts: &[(&str, String)]) -> Markup {
    let known = facts.iter().filter(|fact| !fact.1.is_empty());
    let known = known.map(|(name, fact)| html! { div { dt { (name) } dd { (fact) } } });
    html! {
        dl.facts { @for fact in known { (fact) } }
    }
}

/// A column of a table: its head, and how its cells are set.
pub(super) type Column<'a> = (&'a str, Align);

/// A table; the first cell of a row names it.
pub(super) fn table(name: &str, columns: &[Column<'_>], rows: &[Vec<Markup>]) -> Markup {
    let table = html! {
        thead { (heads(columns)) }
        tbody { @for row in rows { (cells(columns, row)) } }
    };
    scroll(name, &html! { table { (table) } })
}

/// What scrolls by itself where it is wider than the page, also for who has no mouse.
pub(super) fn scroll(name: &str, content: &Markup) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-label=(name) { (content) }
    }
}

fn heads(columns: &[Column<'_>]) -> Markup {
    html! {
        tr { @for (name, align) in columns { th.right[*align == Align::Right] scope="col" { (name) } } }
    }
}

fn cells(columns: &[Column<'_>], row: &[Markup]) -> Markup {
    let rest = columns.iter().zip(row).skip(1);
    html! {
        tr {
            th scope="row" { (row[0]) }
            @for ((_, align), cell) in rest { td.right[*align == Align::Right] { (cell) } }
        }
    }
}

/// Text as a cell.
pub(super) fn cell(text: &str) -> Markup {
    html! { (text) }
}

/// The configuration as it stands in its file.
pub(super) fn configuration(run: &Run) -> Markup {
    html! {
        @if !run.config.trim().is_empty() {
            details {
                summary { "config.toml" }
                pre { (run.config.trim()) }
            }
        }
    }
}

/// What is unusual about a run, for its reader to know.
pub(super) fn notes(run: &Run) -> Markup {
    let resumed: Vec<String> = run.starts.iter().skip(1).map(|start| thousands(start.step)).collect();
    html! {
        @if !resumed.is_empty() { p.note { "Resumed after iteration " (resumed.join(", ")) "." } }
        @if run.unread > 0 { p.note { (thousands(run.unread)) " line(s) of the history cannot be read and are left out." } }
    }
}

/// Whether it is over, and if not, how far it is.
pub(super) fn state(run: &Run) -> Markup {
    html! {
        @if run.end.is_some() {
            span.state.over { "finished" }
        } @else if let Some(start) = run.start() {
            span.state { "not over: " (thousands(run.done())) " of " (thousands(start.steps)) " iterations" }
        } @else {
            span.state { "not over" }
        }
    }
}

/// The machine and how it computes.
pub(super) fn machine(run: &Run) -> Markup {
    let Some(start) = run.start() else { return html! {} };
    facts(&[
        ("processor", start.processor.clone()),
        ("threads", start.threads.to_string()),
        ("vectors", start.vectors.clone()),
        ("matrix products", start.blas.clone()),
        ("numbers", start.dtype.clone()),
        ("gemmnet", start.version.clone()),
    ])
}

/// The data and how it is gone through.
pub(super) fn data(run: &Run) -> Markup {
    let Some(start) = run.start() else { return html! {} };
    let [channels, height, width] = start.image;
    let images = start.images;
    let [train, validation, test] = [images.train, images.validation, images.test].map(thousands);
    let epochs = start.steps as f64 / start.steps_per_epoch.max(1) as f64;
    facts(&[
        ("data", start.data.clone()),
        ("folder", start.data_dir.clone()),
        ("images", format!("{train} for training, {validation} for validation, {test} for tests")),
        ("size", format!("{width} × {height} pixels, {channels} channel(s)")),
        ("classes", thousands(start.classes.len())),
        ("iterations", format!("{}, {} an epoch", thousands(start.steps), thousands(start.steps_per_epoch))),
        ("epochs", if epochs.fract() == 0.0 { count(epochs) } else { format!("{epochs:.2}") }),
        ("preset", start.preset.clone().unwrap_or_else(|| NONE.to_owned())),
        ("seed", start.seed.to_string()),
    ])
}
