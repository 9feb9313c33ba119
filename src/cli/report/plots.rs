//! Level 7. Curves as SVG that takes its colours and letters from the page.

use std::ops::Range;

use maud::{Markup, PreEscaped, html};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use super::numbers::short;

/// What the plot is drawn in. The letters suit a page of 360 pixels, and one where two plots are side by side.
const SIZE: [u32; 2] = [640, 360];
const LETTERS: u32 = 19;
/// The backend knows whole numbers only: this many for each of the above let curves be smooth.
const FINE: u32 = 4;
/// Points of a curve at most.
const MOST: usize = 2000;
/// A curve of so few points shows each.
const FEW: usize = 24;
/// Series look the same again after as many colours times dashes.
const COLOURS: usize = 6;
const DASHES: [&str; 5] = ["none", "8 4", "2 3", "10 3 2 3", "16 5"];
// The backend writes a colour of its own into each element, in place of which come the page's.
const INK: RGBColor = RGBColor(0, 0, 1);
const GRID: RGBColor = RGBColor(0, 0, 2);

/// A line through points.
pub(super) struct Curve {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
    /// Chooses colour and dash.
    pub(super) series: usize,
    /// Behind another that says it better.
    pub(super) faint: bool,
}

/// How values go up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    Linear,
    FromZero,
    Log,
    Percent,
}

/// Curves over one axis.
pub(super) struct Plot<'a> {
    /// What goes up.
    pub(super) title: &'a str,
    /// What goes to the right.
    pub(super) x: &'a str,
    pub(super) scale: Scale,
    pub(super) curves: Vec<Curve>,
    /// Points to look at, and the series of each.
    pub(super) marks: Vec<((f64, f64), usize)>,
    /// Whether a line goes through the points of a curve.
    pub(super) joined: bool,
}

impl Plot<'_> {
    /// The plot with its title, `caption` after it, and what each curve is if there are several; nothing if there are no
    /// points.
    pub(super) fn figure(mut self, caption: &str) -> Markup {
        for curve in &mut self.curves {
            curve.points.retain(|(x, y)| x.is_finite() && y.is_finite() && (self.scale != Scale::Log || *y > 0.0));
            curve.points = thinned(&curve.points, MOST);
        }
        self.curves.retain(|curve| !curve.points.is_empty());
        if self.curves.is_empty() {
            return html! {};
        }
        html! {
            figure.plot {
                figcaption { strong { (self.title) } " " span.quiet { "over " (self.x) (caption) } }
                (legend(&self.curves))
                (self.svg())
            }
        }
    }

    fn svg(&self) -> Markup {
        let [x, y] = [self.range(|point| point.0), self.range(|point| point.1)];
        let mut text = String::new();
        let drawn = match self.scale {
            Scale::Linear | Scale::FromZero | Scale::Percent => self.draw(x, self.padded(y), &mut text),
            Scale::Log => self.draw(x, (y.start * 0.9..y.end * 1.1).log_scale(), &mut text),
        };
        drawn.expect("a string takes all that is written");
        let inner = text.split_once('>').map_or("", |parts| parts.1).trim_end().trim_end_matches("</svg>");
        let [width, height] = SIZE.map(|side| side * FINE);
        html! {
            svg role="img" viewBox=(format!("0 0 {width} {height}")) {
                title { (self.title) " over " (self.x) }
                desc { (self.described()) }
                (PreEscaped(coloured(inner)))
            }
        }
    }

    /// What a reader hears who does not see.
    fn described(&self) -> String {
        let said = self.curves.iter().filter(|curve| !curve.faint).map(|curve| {
            let (first, last) = (curve.points[0], curve.points[curve.points.len() - 1]);
            let [from, to] = [first, last].map(|(x, y)| format!("{} at {}", self.label(y), short(x)));
            format!("{}: from {from} to {to}.", curve.name)
        });
        said.collect::<Vec<_>>().join(" ")
    }

    fn label(&self, y: f64) -> String {
        if self.scale == Scale::Percent { format!("{}%", short(100.0 * y)) } else { short(y) }
    }

    /// From the least to the largest of a coordinate.
    fn range(&self, coordinate: impl Fn(&(f64, f64)) -> f64) -> Range<f64> {
        let all = || self.curves.iter().flat_map(|curve| &curve.points).map(&coordinate);
        let (least, most) = (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
        // An axis needs a length.
        if least < most { least..most } else { least - 0.5 * least.abs().max(1e-3)..most + 0.5 * most.abs().max(1e-3) }
    }

    fn padded(&self, y: Range<f64>) -> Range<f64> {
        let room = 0.06 * (y.end - y.start);
        match self.scale {
            Scale::FromZero => y.start.min(0.0)..y.end + room,
            Scale::Percent => (y.start - room).max(0.0)..(y.end + room).min(1.0),
            Scale::Linear | Scale::Log => y.start - room..y.end + room,
        }
    }

    fn draw<Y>(&self, x: Range<f64>, y: Y, text: &mut String) -> Result<(), DrawingAreaErrorKind<std::io::Error>>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let fine = |pixels: u32| pixels * FINE;
        let root = SVGBackend::with_string(text, (fine(SIZE[0]), fine(SIZE[1]))).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin_top(fine(12))
            .margin_right(fine(32))
            .x_label_area_size(fine(56))
            .y_label_area_size(fine(84))
            .build_cartesian_2d(x, y)?;
        let letters = ("sans-serif", f64::from(fine(LETTERS)) * 1.24).into_font().color(&INK);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .set_all_tick_mark_size(fine(5))
            .x_labels(6)
            .y_labels(6)
            .x_desc(self.x)
            .label_style(letters)
            .axis_style(GRID)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .x_label_formatter(&|x| short(*x))
            .y_label_formatter(&|y| self.label(*y))
            .draw()?;
        for curve in &self.curves {
            let line = line_colour(curve.series).mix(if curve.faint { 0.4 } else { 1.0 });
            let width = if curve.faint { 1 } else { 2 };
            let points = curve.points.iter();
            chart.draw_series(LineSeries::new(points.copied().filter(|_| self.joined), line.stroke_width(width)))?;
            let dots = curve.points.iter().filter(|_| curve.points.len() <= FEW || !self.joined);
            chart.draw_series(dots.map(|dot| Circle::new(*dot, fine(4), dot_colour(curve.series).filled())))?;
        }
        let marks = self.marks.iter();
        chart.draw_series(marks.map(|(at, series)| Circle::new(*at, fine(9), dot_colour(*series).stroke_width(2))))?;
        root.present()
    }
}

/// Says which line is whose, if there are several.
fn legend(curves: &[Curve]) -> Markup {
    html! {
        @if curves.len() > 1 {
            ul.legend { (entries(curves)) }
        }
    }
}

fn entries(curves: &[Curve]) -> Markup {
    html! {
        @for curve in curves {
            li { (key(curve.series, curve.faint)) (curve.name) }
        }
    }
}

/// A piece of a series' line.
pub(super) fn key(series: usize, faint: bool) -> Markup {
    html! {
        svg.key viewBox="0 0 32 8" aria-hidden="true" {
            line x1="0" y1="4" x2="32" y2="4" stroke-width="2.5" opacity=[faint.then_some("0.4")]
                stroke=(colour(series)) stroke-dasharray=(dash(series));
        }
    }
}

fn colour(series: usize) -> String {
    format!("var(--series-{})", series % COLOURS + 1)
}

fn dash(series: usize) -> &'static str {
    DASHES[series % DASHES.len()]
}

fn line_colour(series: usize) -> RGBColor {
    RGBColor(0, 1, (series % (COLOURS * DASHES.len())) as u8)
}

fn dot_colour(series: usize) -> RGBColor {
    RGBColor(0, 2, (series % COLOURS) as u8)
}

/// The page's colours in place of the backend's.
fn coloured(svg: &str) -> String {
    let written = |RGBColor(r, g, b): RGBColor| format!("\"#{r:02X}{g:02X}{b:02X}\"");
    let mut svg = svg.replace(&written(INK), "\"var(--quiet)\"").replace(&written(GRID), "\"var(--line)\"");
    for series in 0..COLOURS * DASHES.len() {
        let line = format!("\"{}\" stroke-dasharray=\"{}\"", colour(series), dash(series));
        svg = svg.replace(&written(line_colour(series)), &line);
        svg = svg.replace(&written(dot_colour(series)), &format!("\"{}\"", colour(series)));
    }
    svg
}

/// At most `most` points, of which the first and the last, and of each piece the least and the largest, so that no peak is
/// lost.
pub(super) fn thinned(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    if points.len() <= most {
        return points.to_vec();
    }
    let inner = &points[1..points.len() - 1];
    let mut kept = vec![points[0]];
    for piece in inner.chunks(inner.len().div_ceil((most - 2) / 2)) {
        let least = (0..piece.len()).min_by(|&a, &b| piece[a].1.total_cmp(&piece[b].1));
        let largest = (0..piece.len()).max_by(|&a, &b| piece[a].1.total_cmp(&piece[b].1));
        let (first, second) = (least.min(largest), least.max(largest));
        kept.extend(first.map(|i| piece[i]));
        kept.extend(second.filter(|_| first != second).map(|i| piece[i]));
    }
    kept.push(points[points.len() - 1]);
    kept
}

/// The mean of `window` points around each; of fewer at both ends.
pub(super) fn smoothed(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let sums: Vec<f64> = std::iter::once(0.0)
        .chain(points.iter().scan(0.0, |sum, point| {
            *sum += point.1;
            Some(*sum)
        }))
        .collect();
    let mean = |i: usize| {
        // As many on either side.
        let side = (window / 2).min(i).min(points.len() - 1 - i);
        (sums[i + side + 1] - sums[i - side]) / (2 * side + 1) as f64
    };
    points.iter().enumerate().map(|(i, point)| (point.0, mean(i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize) -> Vec<(f64, f64)> {
        (0..n).map(|i| (i as f64, (i as f64 * 0.37).sin())).collect()
    }

    fn figure(scale: Scale, points: Vec<(f64, f64)>) -> String {
        let curves = vec![Curve { name: "a".into(), points, series: 1, faint: false }];
        Plot { title: "loss", x: "step", scale, curves, marks: Vec::new(), joined: true }.figure("").into_string()
    }

    #[test]
    fn thinning_keeps_extremes_and_ends_in_order() {
        let mut points = wave(100_000);
        points[54_321].1 = 50.0;
        points[12_345].1 = -50.0;
        let thin = thinned(&points, MOST);
        assert!(thin.len() <= MOST && thin.len() > MOST / 2, "{}", thin.len());
        assert!(thin.contains(&points[54_321]) && thin.contains(&points[12_345]));
        assert_eq!((thin[0], thin[thin.len() - 1]), (points[0], points[99_999]));
        assert!(thin.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(thinned(&points[..MOST], MOST), points[..MOST]);
    }

    #[test]
    fn a_mean_is_of_as_many_on_either_side() {
        let line: Vec<(f64, f64)> = (0..9).map(|i| (f64::from(i), 2.0 * f64::from(i))).collect();
        assert_eq!(smoothed(&line, 5), line, "a straight line stays");
        let peak = smoothed(&[(0.0, 0.0), (1.0, 3.0), (2.0, 0.0)], 3);
        assert_eq!(peak, [(0.0, 0.0), (1.0, 1.0), (2.0, 0.0)]);
        assert!(smoothed(&[], 3).is_empty());
    }

    #[test]
    fn colours_are_the_pages_and_nothing_is_loaded() {
        for scale in [Scale::Linear, Scale::FromZero, Scale::Percent, Scale::Log] {
            let svg = figure(scale, wave(3000));
            assert!(svg.contains("var(--series-2)") && svg.contains("var(--line)"));
            assert!(!svg.contains("\"#") && !svg.contains("http") && !svg.contains("NaN"), "{scale:?}");
        }
    }

    #[test]
    fn odd_points_are_left_out_and_single_ones_are_seen() {
        assert_eq!(figure(Scale::Linear, vec![(0.0, f64::NAN), (1.0, f64::INFINITY)]), "");
        for scale in [Scale::Linear, Scale::FromZero, Scale::Percent, Scale::Log] {
            let svg = figure(scale, vec![(1.0, 0.5), (2.0, f64::NAN)]);
            assert!(svg.contains("<circle"), "{scale:?}");
            figure(scale, vec![(0.0, 0.0), (0.0, 0.0)]);
            figure(scale, vec![(0.0, 0.1), (1e9, 1e12)]);
        }
    }
}
