//! Level 7. Which classes a network takes for which.

use maud::{Markup, html};

use super::data::{Evaluation, Picture, Run};
use super::numbers::{NONE, or_none, percent};
use super::parts::{cell, scroll, table};
use super::pictures::heat_map;
use crate::cli::output::{Align, thousands};

/// A table of more classes is too large to read: a picture and the most frequent mistakes say more.
const MOST_CLASSES: usize = 20;
/// Mistakes and classes listed then.
const LISTED: usize = 20;
/// From this share on a cell is dark.
const DARK: f64 = 0.55;

/// What is confused with what, and how many of each class are right.
pub(super) fn matrix(run: &Run, evaluation: &Evaluation) -> Markup {
    match evaluation.confusion.len() {
        0 => html! {},
        1..=MOST_CLASSES => Matrix::new(run, evaluation).table(),
        _ => overview(run, evaluation),
    }
}

/// The images that a network is most wrong about.
pub(super) fn worst(run: &Run, pictures: &[Picture]) -> Markup {
    if pictures.is_empty() {
        return html! {};
    }
    html! {
        ul.worst { @for picture in pictures { (wrong(run, picture)) } }
    }
}

fn wrong(run: &Run, picture: &Picture) -> Markup {
    let (label, predicted) = (run.class(picture.label), or_none(picture.predicted, |class| run.class(class)));
    let [seen, shown] = [picture.predicted_probability, picture.label_probability].map(|share| or_none(share, percent));
    let caption = html! {
        span { (label) " " small.quiet { (shown) } }
        strong { "→ " (predicted) " " small.quiet { (seen) } }
        small.quiet { "no. " (thousands(picture.index)) }
    };
    html! {
        li {
            img.pixels src=(picture.png) alt=(format!("{label}, taken for {predicted}"));
            p { (caption) }
        }
    }
}

/// Images of a class, and how many of them are right.
fn recall(evaluation: &Evaluation, class: usize) -> (usize, usize) {
    let row = &evaluation.confusion[class];
    let without = evaluation.unclassified.get(class).copied().unwrap_or(0);
    (row.iter().sum::<usize>() + without, row.get(class).copied().unwrap_or(0))
}

fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole as f64
}

/// The matrix in numbers.
struct Matrix<'a> {
    run: &'a Run,
    evaluation: &'a Evaluation,
    /// Whether images are without a class.
    lost: bool,
    /// The share of a class that is taken for one other, at most.
    most: f64,
}

impl<'a> Matrix<'a> {
    fn new(run: &'a Run, evaluation: &'a Evaluation) -> Self {
        let lost = evaluation.unclassified.iter().any(|&count| count > 0);
        let wrong = |class: usize| {
            let row = evaluation.confusion[class].iter().enumerate().filter(move |(seen, _)| *seen != class);
            share(row.map(|(_, &count)| count).max().unwrap_or(0), recall(evaluation, class).0.max(1))
        };
        let most = (0..evaluation.confusion.len()).map(wrong).fold(0.0, f64::max);
        Matrix { run, evaluation, lost, most }
    }

    fn table(&self) -> Markup {
        let rows = (0..self.evaluation.confusion.len()).map(|class| self.row(class));
        let table = html! {
            thead { (self.heads()) }
            tbody { @for row in rows { (row) } }
        };
        scroll("confusion matrix", &html! { table.confusion { (table) } })
    }

    fn heads(&self) -> Markup {
        html! {
            tr {
                td {}
                @for class in 0..self.evaluation.confusion.len() { (head(&self.run.class(class))) }
                @if self.lost { (head("no class")) }
                (head("recall"))
            }
        }
    }

    fn row(&self, class: usize) -> Markup {
        let (whole, right) = recall(self.evaluation, class);
        let cells = self.evaluation.confusion[class].iter().enumerate();
        html! {
            tr {
                th scope="row" { (self.run.class(class)) }
                @for (seen, &count) in cells { (self.heat(count, whole, seen == class)) }
                @if self.lost { td { (self.evaluation.unclassified.get(class).copied().unwrap_or(0)) } }
                td.recall { (percent(share(right, whole))) }
            }
        }
    }

    /// A mistake is as dark as the most frequent one allows, or all of them would be pale.
    fn heat(&self, count: usize, whole: usize, right: bool) -> Markup {
        let part = share(count, whole.max(1));
        let shade = if right { part } else { DARK * part / self.most.max(f64::MIN_POSITIVE) };
        let style = format!("--share:{:.0}%", 100.0 * shade);
        html! {
            @if count == 0 {
                td.zero { "0" }
            } @else {
                td.hit[right].miss[!right].dark[shade > DARK] style=(style) { (count) }
            }
        }
    }
}

fn head(name: &str) -> Markup {
    html! { th.up scope="col" { span { (name) } } }
}

fn overview(run: &Run, evaluation: &Evaluation) -> Markup {
    let classes = evaluation.confusion.len();
    let shares: Vec<Vec<f64>> = (evaluation.confusion.iter().enumerate())
        .map(|(class, row)| row.iter().map(|&count| share(count, recall(evaluation, class).0.max(1))).collect())
        .collect();
    html! {
        figure.heat {
            figcaption { "The darker, the more of the row; the diagonal is right." }
            img.pixels src=(heat_map(&shares)) alt=(format!("confusion matrix of {classes} classes"));
        }
        div.pair {
            div { h3 { "Most frequent mistakes" } (mistakes(run, evaluation)) }
            div { h3 { "Classes least recognised" } (weakest(run, evaluation)) }
        }
    }
}

fn mistakes(run: &Run, evaluation: &Evaluation) -> Markup {
    let mut pairs: Vec<(usize, [usize; 2])> = (evaluation.confusion.iter().enumerate())
        .flat_map(|(label, row)| row.iter().enumerate().map(move |(seen, &count)| (count, [label, seen])))
        .filter(|(count, [label, seen])| *count > 0 && label != seen)
        .collect();
    pairs.sort_by_key(|(count, pair)| (std::cmp::Reverse(*count), *pair));
    let row = |&(count, [label, seen]): &(usize, [usize; 2])| {
        let part = share(count, recall(evaluation, label).0);
        vec![cell(&run.class(label)), cell(&format!("→ {}", run.class(seen))), html! { (count) }, cell(&percent(part))]
    };
    let rows: Vec<_> = pairs.iter().take(LISTED).map(row).collect();
    use Align::{Left, Right};
    table(
        "most frequent mistakes",
        &[("shown", Left), ("taken for", Left), ("images", Right), ("of the class", Right)],
        &rows,
    )
}

fn weakest(run: &Run, evaluation: &Evaluation) -> Markup {
    let mut classes: Vec<(usize, usize, usize)> = (0..evaluation.confusion.len())
        .map(|class| (class, recall(evaluation, class)))
        .filter_map(|(class, (whole, right))| (whole > 0).then_some((class, whole, right)))
        .collect();
    classes.sort_by(|a, b| share(a.2, a.1).total_cmp(&share(b.2, b.1)).then(a.0.cmp(&b.0)));
    let row = |&(class, whole, right): &(usize, usize, usize)| {
        vec![cell(&run.class(class)), html! { (right) " of " (whole) }, cell(&percent(share(right, whole)))]
    };
    let rows: Vec<_> = classes.iter().take(LISTED).map(row).collect();
    table(
        "classes least recognised",
        &[("class", Align::Left), ("right", Align::Right), ("recall", Align::Right)],
        &rows,
    )
}

/// How many of the images are right, in words.
pub(super) fn summary(evaluation: &Evaluation) -> String {
    let right: usize = (0..evaluation.confusion.len()).map(|class| recall(evaluation, class).1).sum();
    let part = if evaluation.images > 0 { percent(share(right, evaluation.images)) } else { NONE.to_owned() };
    format!(
        "The kept network on the {} validation images: {part} right. Rows say what an image shows, columns what it is taken for.",
        thousands(evaluation.images)
    )
}
