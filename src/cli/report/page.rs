//! Level 7. The page about one run.

use maud::{Markup, html};

use super::confusion::{matrix, summary, worst};
use super::curves::of_run;
use super::data::{Evaluation, Filters, Operation, Run, Start};
use super::numbers::{NONE, count, duration, or_none, percent, rounded, short};
use super::parts::{self, cell, configuration, document, machine, notes, section, state, table, tile};
use super::pictures::contact_sheet;
use crate::cli::output::{Align, thousands};

/// A page that shows a run and, if there are such, what its network makes of the validation images and its first filters.
pub(in crate::cli) fn page(run: &Run, evaluation: Option<&Evaluation>, filters: Option<&Filters>) -> String {
    let curves = of_run(run);
    let images = evaluation.map(summary).unwrap_or_default();
    let confused = evaluation.map_or_else(|| html! {}, |evaluation| matrix(run, evaluation));
    let pictures = evaluation.map_or_else(|| html! {}, |evaluation| worst(run, &evaluation.worst));
    let sheet = filters.map_or_else(|| html! {}, first_layer);
    let operations = run.end.as_ref().map_or(&[][..], |end| &end.profile);
    document(
        &format!("{} – gemmnet", run.name),
        &html! {
            (heading(run))
            (section("Training", "", &curves))
            (section("Classes", &images, &confused))
            (section("Most wrong", "Validation images whose right class it holds least probable.", &pictures))
            (section("First layer", "What its filters look for.", &sheet))
            (section("Time", "Where the seconds of training went.", &profile(operations)))
            (section("Data", "", &parts::data(run)))
            (section("Machine", "", &machine(run)))
            (section("Configuration", "", &configuration(run)))
        },
    )
}

/// Name, network and the numbers that matter most.
fn heading(run: &Run) -> Markup {
    let network = run.start().map(|start| html! { p.network { code { (start.network) } } });
    html! {
        header.title {
            p.eyebrow { "gemmnet training " (state(run)) }
            h1 { (run.name) }
            @if let Some(network) = network { (network) }
            (notes(run))
            dl.tiles { (tiles(run)) }
        }
    }
}

fn tiles(run: &Run) -> Markup {
    let (start, kept) = (run.start(), run.kept());
    let about = |what: fn(&Start) -> String| start.map(what).unwrap_or_default();
    let after = kept.map(|kept| format!("after epoch {}", short(kept.0))).unwrap_or_default();
    let test = about(|start| format!("of {} images", thousands(start.images.test)));
    let iterations = format!("{} iterations", thousands(run.done()));
    let speed = run.end.as_ref().map(|end| end.images_per_second);
    let threads = about(|start| format!("{} thread(s)", start.threads));
    let parameters = or_none(start, |start| rounded(start.parameters));
    html! {
        (tile("validation accuracy", &or_none(kept, |kept| percent(kept.1)), &after))
        (tile("test accuracy", &or_none(run.test_accuracy(), percent), &test))
        (tile("time", &or_none(run.seconds(), duration), &iterations))
        (tile("images per second", &or_none(speed, count), &threads))
        (tile("parameters", &parameters, &about(|start| thousands(start.parameters))))
    }
}

fn first_layer(filters: &Filters) -> Markup {
    let [count, channels, height, width] = filters.shape;
    if filters.values.is_empty() {
        return html! {};
    }
    let (sheet, pixels) = contact_sheet(filters);
    let shown = if channels == 3 { "in colour" } else { "their first channel" };
    html! {
        figure.sheet {
            img.pixels src=(sheet) style=(format!("max-width:{}px", 2 * pixels))
                alt=(format!("{count} filters of {height} × {width} weights"));
            figcaption.quiet {
                (thousands(count)) " filters of " (height) " × " (width) " weights, " (shown) ". Grey is 0; each filter's largest weight fills the range."
            }
        }
    }
}

/// Where the time went. Operations and bytes are those that the profile counts.
fn profile(operations: &[Operation]) -> Markup {
    use Align::{Left, Right};
    if operations.is_empty() {
        return html! {};
    }
    let total: f64 = operations.iter().map(|operation| operation.seconds).sum();
    let rate = |amount: u64, seconds: f64| match amount {
        1.. if seconds > 0.0 => format!("{:.1}", amount as f64 / seconds / 1e9),
        _ => NONE.to_owned(),
    };
    let row = |operation: &Operation| {
        let Operation { seconds, calls, flops, bytes, .. } = *operation;
        vec![
            html! { code { (operation.operation) } },
            cell(&operation.phase),
            bar(if total > 0.0 { seconds / total } else { 0.0 }),
            cell(&format!("{seconds:.3}")),
            cell(&thousands(calls as usize)),
            cell(&rate(flops, seconds)),
            cell(&rate(bytes, seconds)),
        ]
    };
    let columns = [
        ("operation", Left),
        ("phase", Left),
        ("share", Left),
        ("seconds", Right),
        ("calls", Right),
        ("GFLOP/s", Right),
        ("GB/s", Right),
    ];
    table("time by operation", &columns, &operations.iter().map(row).collect::<Vec<_>>())
}

/// A share as a number, and a bar beneath it.
fn bar(share: f64) -> Markup {
    html! {
        span.bar style=(format!("--share:{:.1}%", 100.0 * share)) { (percent(share)) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::data::tests::{START, end, epoch, step};
    use super::super::data::{Picture, Run};
    use super::super::pictures::picture;
    use super::*;

    fn evaluation(classes: usize) -> Evaluation {
        let row = |class| (0..classes).map(|seen| if seen == class { 3 } else { (seen + class) % 2 }).collect();
        let shown = |predicted| Picture {
            index: 1234,
            label: 1,
            predicted,
            label_probability: Some(0.01),
            predicted_probability: None,
            png: picture([3, 2, 2], &[7; 12]),
        };
        Evaluation {
            images: 10,
            confusion: (0..classes).map(row).collect(),
            unclassified: (0..classes).map(|class| class % 2).collect(),
            worst: vec![shown(Some(0)), shown(None), shown(Some(1000))],
        }
    }

    fn run(lines: &[&str]) -> Run {
        Run::new("<i>name</i>", "text = \"<script>2</script>\"", &lines.join("\n"))
    }

    #[test]
    fn what_users_name_is_escaped_and_nothing_is_loaded() {
        let lines = [START, &step(1, "2.0"), &step(2, "1.0"), &epoch(2, 0.5, true), &end(0.5, "0.4", 2.0)];
        let filters = Filters { shape: [2, 3, 3, 3], values: vec![0.5; 54] };
        for classes in [2, 30] {
            let page = page(&run(&lines), Some(&evaluation(classes)), Some(&filters));
            assert!(
                page.contains("&lt;script&gt;alert(1)")
                    && page.contains("&lt;script&gt;2")
                    && page.contains("&lt;i&gt;")
            );
            for no in ["<script", "<i>", "http", "url(", "@import", "NaN"] {
                assert!(!page.contains(no), "{no}");
            }
        }
    }

    #[test]
    fn odd_runs_have_a_page() {
        let nothing = Evaluation { images: 0, confusion: Vec::new(), unclassified: Vec::new(), worst: Vec::new() };
        let empty = Evaluation { confusion: vec![vec![0; 2]; 2], ..nothing.clone() };
        let none = Filters { shape: [0, 3, 3, 3], values: Vec::new() };
        let (step, epoch) = (step(1, "null"), epoch(0, 0.1, true));
        let cases = [&[][..], &[START], &[START, "{"], &[START, &step, &epoch]];
        for lines in cases {
            for evaluation in [&nothing, &empty] {
                let page = page(&run(lines), Some(evaluation), Some(&none));
                assert!(page.contains("not over") && !page.contains("NaN"));
            }
        }
        let over = page(&run(&[START, &end(0.5, "null", 0.0)]), None, None);
        assert!(over.contains("finished") && !over.contains("NaN") && !over.contains("inf"));
    }

    #[test]
    fn a_recall_counts_images_without_a_class() {
        let page = page(&run(&[START]), Some(&evaluation(2)), None);
        // 3 right of 3 + 1 + 1.
        assert!(page.contains("60.0\u{a0}%") && page.contains("no class"));
    }
}
