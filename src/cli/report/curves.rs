//! Level 7. The plots of runs: of one with all its curves, of several one over another.

use maud::{Markup, html};

use super::data::{Epoch, Run};
use super::plots::{Curve, Plot, Scale, smoothed};

/// Of losses this far from each other, the small ones are seen on a logarithmic axis only.
const WIDE: f64 = 25.0;

type Points = Vec<(f64, f64)>;

/// Everything that a run measures while it trains.
pub(super) fn of_run(run: &Run) -> Markup {
    let runs = std::slice::from_ref(run);
    let (unit, seconds) = clock(runs);
    plots([
        loss_of_run(run),
        learning_rates(runs),
        accuracies(run, "epochs", |epoch| epoch.epoch),
        accuracies(run, unit, |epoch| epoch.seconds / seconds),
    ])
}

/// The same curve of each run in one plot.
pub(super) fn of_runs(runs: &[Run]) -> Markup {
    let (unit, seconds) = clock(runs);
    plots([
        validation(runs, "epochs", |epoch| epoch.epoch),
        validation(runs, unit, |epoch| epoch.seconds / seconds),
        mean_losses(runs),
        learning_rates(runs),
    ])
}

fn plots(figures: [Markup; 4]) -> Markup {
    html! {
        @if figures.iter().any(|figure| !figure.0.is_empty()) {
            div.plots { @for figure in figures { (figure) } }
        } @else {
            p.quiet { "Nothing is measured yet." }
        }
    }
}

fn loss_of_run(run: &Run) -> Markup {
    let (each, window) = (losses(run), window(run));
    let mean = smoothed(&each, window);
    let (scale, caption) = loss_scale(std::slice::from_ref(&mean));
    let mut curves = vec![curve("each iteration", each, 0, window > 1)];
    if window > 1 {
        curves.push(curve(&format!("mean of {window} iterations"), mean, 0, false));
    }
    Plot { title: "Loss", x: "iterations", scale, curves, marks: Vec::new(), joined: true }.figure(caption)
}

fn accuracies(run: &Run, x: &str, at: impl Fn(&Epoch) -> f64) -> Markup {
    let points = |value: fn(&Epoch) -> f64| run.epochs.iter().map(|epoch| (at(epoch), value(epoch))).collect();
    let curves = vec![
        curve("validation", points(|epoch| epoch.val_accuracy), 0, false),
        curve("training", points(|epoch| epoch.train_accuracy), 1, false),
    ];
    let kept = run.kept().and_then(|kept| run.epochs.iter().find(|epoch| epoch.epoch == kept.0));
    let marks: Vec<_> = kept.map(|epoch| ((at(epoch), epoch.val_accuracy), 0)).into_iter().collect();
    let caption = if marks.is_empty() { "" } else { "; ring: the one kept" };
    Plot { title: "Accuracy", x, scale: Scale::Percent, curves, marks, joined: true }.figure(caption)
}

/// A curve of each run.
fn together(
    runs: &[Run],
    title: &str,
    [x, caption]: [&str; 2],
    scale: Scale,
    points: impl Fn(&Run) -> Points,
) -> Markup {
    let curves = runs.iter().enumerate().map(|(i, run)| curve(&run.name, points(run), i, false)).collect();
    Plot { title, x, scale, curves, marks: Vec::new(), joined: true }.figure(caption)
}

fn validation(runs: &[Run], x: &str, at: impl Fn(&Epoch) -> f64) -> Markup {
    let points = |run: &Run| run.epochs.iter().map(|epoch| (at(epoch), epoch.val_accuracy)).collect();
    together(runs, "Validation accuracy", [x, ""], Scale::Percent, points)
}

fn learning_rates(runs: &[Run]) -> Markup {
    let points = |run: &Run| run.steps.iter().map(|step| (step.step as f64, step.learning_rate)).collect();
    together(runs, "Learning rate", ["iterations", ""], Scale::FromZero, points)
}

fn mean_losses(runs: &[Run]) -> Markup {
    let mean = |run: &Run| smoothed(&losses(run), window(run));
    let (scale, more) = loss_scale(&runs.iter().map(mean).collect::<Vec<_>>());
    let caption = format!("; each point the mean of some around it{more}");
    together(runs, "Loss", ["iterations", &caption], scale, mean)
}

fn curve(name: &str, points: Points, series: usize, faint: bool) -> Curve {
    Curve { name: name.to_owned(), points, series, faint }
}

fn losses(run: &Run) -> Points {
    run.steps.iter().map(|step| (step.step as f64, step.loss)).collect()
}

/// Iterations over which the loss of a run is smoothed: odd, so that as many are on either side.
fn window(run: &Run) -> usize {
    (run.steps.len() / 80).min(250) * 2 + 1
}

fn loss_scale(curves: &[Points]) -> (Scale, &'static str) {
    let all = || curves.iter().flat_map(|points| points.iter()).map(|point| point.1);
    let (least, most) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    if least > 0.0 && most > WIDE * least { (Scale::Log, ", logarithmic") } else { (Scale::Linear, "") }
}

/// What time is written in, and how many seconds that is.
fn clock(runs: &[Run]) -> (&'static str, f64) {
    match runs.iter().filter_map(Run::seconds).fold(0.0, f64::max) {
        ..600.0 => ("seconds of training", 1.0),
        600.0..18_000.0 => ("minutes of training", 60.0),
        _ => ("hours of training", 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::data::tests::{START, epoch, step};
    use super::*;

    #[test]
    fn a_loss_is_logarithmic_only_where_that_helps() {
        let points = |values: [f64; 2]| values.map(|value| (0.0, value)).to_vec();
        assert_eq!(loss_scale(&[points([2.3, 0.8])]).0, Scale::Linear);
        assert_eq!(loss_scale(&[points([2.3, 0.8]), points([1.0, 0.01])]).0, Scale::Log);
        assert_eq!(loss_scale(&[points([2.3, 0.0])]).0, Scale::Linear, "a logarithm has no zero");
        assert_eq!(loss_scale(&[]).0, Scale::Linear);
    }

    #[test]
    fn names_of_runs_are_escaped_in_legends() {
        let lines = [START, &step(1, "1.0"), &step(2, "1.0"), &epoch(0, 0.1, true), &epoch(2, 0.2, true)].join("\n");
        let runs = ["<b>", "c"].map(|name| Run::new(name, "", &lines));
        let plots = of_runs(&runs).into_string();
        assert!(plots.contains("&lt;b&gt;") && !plots.contains("<b>"));
    }

    #[test]
    fn the_kept_network_has_a_ring() {
        let lines = [START, &epoch(0, 0.1, true), &epoch(2, 0.4, true), &epoch(4, 0.2, false)].join("\n");
        assert!(of_run(&Run::new("a", "", &lines)).into_string().contains("ring"));
    }
}
