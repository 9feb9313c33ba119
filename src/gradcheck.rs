//! Level 1. Numeric gradients, to check analytic ones against; knows no layer.
//!
//! For people who come from CS231n: [`numeric_gradient`] is its `eval_numerical_gradient`, [`numeric_gradient_array`] its
//! `eval_numerical_gradient_array`, and [`rel_error`] its `rel_error`.
//!
//! A layer of your own is checked like this, in `f64` and with a random `dout` (with a constant one, mistakes cancel):
//!
//! ```
//! use gemmnet::gradcheck::{check, numeric_gradient_array};
//! use ndarray::{Array2, array};
//!
//! // out = x * |x|, whose derivative is 2 |x|.
//! fn forward(x: &Array2<f64>) -> Array2<f64> {
//!     x * &x.abs()
//! }
//! fn backward(dout: &Array2<f64>, x: &Array2<f64>) -> Array2<f64> {
//!     dout * &(2.0 * x.abs())
//! }
//!
//! let x = array![[0.3, -1.2], [2.0, 0.7]];
//! let dout = array![[0.5, 1.5], [-2.0, 0.9]];
//! let numeric = numeric_gradient_array(|x| forward(&x.to_owned()), x.view(), dout.view());
//! let report = check("dx", &backward(&dout, &x), &numeric);
//! assert!(report.max_rel_error < 1e-8, "{report}");
//! assert_eq!(report.skipped, 0);
//! ```
//!
//! # Kinks
//! At the corner of a ReLU, or where two values compete in a max pool, a function has no derivative, and a centred
//! difference across the corner mixes the slopes of its two sides. Such points are recognised from the function's values
//! alone, never from the gradient that is being checked, so a wrong gradient cannot excuse itself: they are marked,
//! left out of the error, and counted.
//!
//! With the step `h`, the differences over `h` and over `h / 2` must agree. A function that is smooth around `x` has
//!
//! ```text
//! odd  = [f(x+h) - f(x-h)] - 2 [f(x+h/2) - f(x-h/2)]                           = f'''(x) h^3 / 4 + ...
//! even = [f(x+h) - 2 f(x) + f(x-h)] - 4 [f(x+h/2) - 2 f(x) + f(x-h/2)]         = f''''(x) h^4 / 16 + ...
//! ```
//!
//! both far below rounding, while slopes that differ by `J` across a corner at distance `t < h` falsify the gradient by
//! `e = J (h - t) / (2 h)` and make the larger of |odd| and |even| at least `e h / 2`, wherever in the interval the
//! corner lies. So a corner that goes unnoticed falsifies the gradient by little more than rounding does anyhow.

use std::fmt;

use ndarray::{Array, Array0, ArrayRef, ArrayView, Dimension, IntoDimension, Zip, arr0};

use crate::element::Element;

/// The usual step of the differences. Much shorter, and rounding dominates; much longer, and more kinks are crossed.
pub const STEP: f64 = 1e-5;

/// Disagreement of the differences that curvature may cause, relative to how much the function changes over the step.
const CURVATURE: f64 = 1e-6;

/// Disagreement of the differences that rounding may cause, relative to the largest output (or to 1): a thousand
/// roundings. Over [`STEP`] it is a gradient of 1e-8, below which [`rel_error`] does not distinguish either.
const ROUNDING: f64 = 1000.0 * f64::EPSILON;

/// Step that [`numeric_gradient_array`] tries first: rounding, relative to the step, is a hundredth. It is taken where the
/// function is straight, as layers are in their weights, so that the length costs nothing.
const LONG_STEP: f64 = 100.0 * STEP;

/// Disagreement of the differences, relative to the largest output (or to 1), below which a function is straight: over
/// [`LONG_STEP`] it falsifies the gradient by no more than a single rounding does over [`STEP`].
const STRAIGHT: f64 = 100.0 * f64::EPSILON;

/// A gradient by centred differences.
#[derive(Clone, Debug, PartialEq)]
pub struct NumericGradient<D: Dimension> {
    /// The gradient, in the shape of `x`.
    pub gradient: Array<f64, D>,
    /// Where the gradient means nothing, because the function has a kink within the step: a jump, a corner, or a corner
    /// of its slope, as `x * |x|` has at 0.
    pub kink: Array<bool, D>,
}

impl<D: Dimension> NumericGradient<D> {
    /// Number of points beside a kink.
    pub fn skipped(&self) -> usize {
        self.kink.iter().filter(|&&kink| kink).count()
    }
}

/// Gradient of the number `f(x)` with respect to every value of `x`: `(f(x + h) - f(x - h)) / 2h`, with `h` the `step`
/// (usually [`STEP`]) times `max(1, |value|)`. Calls `f` four times per value. CS231n's `eval_numerical_gradient`.
///
/// # Panics
/// If `step` is not positive.
pub fn numeric_gradient<D: Dimension>(
    mut f: impl FnMut(ArrayView<f64, D>) -> f64,
    x: ArrayView<f64, D>,
    step: f64,
) -> NumericGradient<D> {
    assert!(step > 0.0, "the step is {step}, not a positive number");
    let one: Array0<f64> = arr0(1.0);
    centred_differences(|x| arr0(f(x)), x, one.view(), &[step])
}

/// Gradient of `sum of dout * f(x)` with respect to every value of `x`, for an `f` that returns an array in the shape of
/// `dout`: what a layer's backward pass computes. More accurate than [`numeric_gradient`] of the sum, and better at finding
/// kinks, because differences are taken of each output before they are added up. The step is [`STEP`], or a hundred
/// times that where `f` is straight. Calls `f` four times per value, eight times where it is curved. CS231n's
/// `eval_numerical_gradient_array`.
///
/// # Panics
/// If `f` returns another shape than that of `dout`.
pub fn numeric_gradient_array<D: Dimension, D2: Dimension>(
    f: impl FnMut(ArrayView<f64, D>) -> Array<f64, D2>,
    x: ArrayView<f64, D>,
    dout: ArrayView<f64, D2>,
) -> NumericGradient<D> {
    centred_differences(f, x, dout, &[LONG_STEP, STEP])
}

/// Centred differences over the first of `steps` over which the function is straight, else over the last.
fn centred_differences<D: Dimension, D2: Dimension>(
    mut f: impl FnMut(ArrayView<f64, D>) -> Array<f64, D2>,
    x: ArrayView<f64, D>,
    dout: ArrayView<f64, D2>,
    steps: &[f64],
) -> NumericGradient<D> {
    let mut x = x.as_standard_layout().into_owned();
    let centre = f(x.view());
    assert_eq!(centre.shape(), dout.shape(), "the function's output must have the shape of dout");
    let size = centre.iter().fold(1.0, |largest: f64, value| largest.max(value.abs()));

    let mut gradient = Array::zeros(x.raw_dim());
    let mut kink = Array::from_elem(x.raw_dim(), false);
    for (k, (gradient, kink)) in gradient.iter_mut().zip(&mut kink).enumerate() {
        let value = flat(&mut x)[k];
        for step in steps {
            // Rounded so that the four points are (but for a change of exponent) where they should be, and not beside it.
            let half = (value + step * value.abs().max(1.0) / 2.0) - value;
            let [left, near_left, near_right, right] = [-2.0, -1.0, 1.0, 2.0].map(|halves| {
                flat(&mut x)[k] = value + halves * half;
                f(x.view())
            });
            let width = (value + 2.0 * half) - (value - 2.0 * half);
            (*gradient, *kink) = (0.0, false);
            let mut straight = true;
            Zip::from(&centre).and(&left).and(&near_left).and(&near_right).and(&right).and(&dout).for_each(
                |&centre, &left, &near_left, &near_right, &right, &dout| {
                    *gradient += (right - left) / width * dout;
                    let odd = (right - left) - 2.0 * (near_right - near_left);
                    let even = (right - 2.0 * centre + left) - 4.0 * (near_right - 2.0 * centre + near_left);
                    let disagreement = odd.abs().max(even.abs());
                    let change = (right - centre).abs() + (centre - left).abs();
                    straight &= disagreement <= STRAIGHT * size;
                    *kink |= dout != 0.0 && disagreement > CURVATURE * change + ROUNDING * size;
                },
            );
            if straight {
                break;
            }
        }
        flat(&mut x)[k] = value;
    }
    NumericGradient { gradient, kink }
}

/// The values of an array in standard layout.
fn flat<D: Dimension>(x: &mut Array<f64, D>) -> &mut [f64] {
    x.as_slice_mut().expect("an owned array in standard layout is contiguous")
}

/// Largest relative error between two arrays, element by element: `|a - b| / max(1e-8, |a| + |b|)`, between 0 (equal) and
/// 1 (opposite signs). NaN if anything is NaN or infinite, and if the arrays are empty, so that `error < tolerance` fails.
/// CS231n's `rel_error`.
///
/// # Panics
/// If the shapes differ.
pub fn rel_error<T: Element, D: Dimension>(a: &ArrayRef<T, D>, b: &ArrayRef<T, D>) -> f64 {
    assert_eq!(a.shape(), b.shape(), "only arrays of one shape can be compared");
    let errors = a.iter().zip(b).map(|(a, b)| element_error(a.f64(), b.f64()));
    errors.reduce(|worst, error| if worst.is_nan() || worst > error { worst } else { error }).unwrap_or(f64::NAN)
}

fn element_error(a: f64, b: f64) -> f64 {
    (a - b).abs() / (a.abs() + b.abs()).max(1e-8)
}

/// Relative error of `b` as a whole, in the Euclidean norm: `|a - b| / |a|`. For `f32`, where single values near 0 have no
/// correct digits. 0 if both are all zeros; NaN if anything is NaN, so that `error < tolerance` fails.
///
/// # Panics
/// If the shapes differ.
pub fn rel_error_norm<T: Element, D: Dimension>(a: &ArrayRef<T, D>, b: &ArrayRef<T, D>) -> f64 {
    assert_eq!(a.shape(), b.shape(), "only arrays of one shape can be compared");
    let difference = a.iter().zip(b).map(|(a, b)| (a.f64() - b.f64()).powi(2)).sum::<f64>().sqrt();
    let norm = a.iter().map(|a| a.f64().powi(2)).sum::<f64>().sqrt();
    if difference == 0.0 { 0.0 } else { difference / norm }
}

/// How an analytic gradient compares with a numeric one. `Display` is one line.
#[derive(Clone, Debug, PartialEq)]
pub struct GradReport {
    /// What the gradient is of.
    pub name: String,
    /// Largest [`rel_error`] over the points that were checked; NaN if one of them is NaN, or none was left to check.
    pub max_rel_error: f64,
    /// Where it is.
    pub worst_index: Vec<usize>,
    /// The analytic and the numeric gradient there.
    pub worst: (f64, f64),
    /// Number of points that were checked.
    pub checked: usize,
    /// Number of points left out because they are beside a kink.
    pub skipped: usize,
}

/// Compares an analytic gradient, called `name`, with a numeric one, except beside kinks.
///
/// # Panics
/// If the shapes differ.
pub fn check<D: Dimension>(name: &str, analytic: &ArrayRef<f64, D>, numeric: &NumericGradient<D>) -> GradReport {
    assert_eq!(analytic.shape(), numeric.gradient.shape(), "{name}: the gradients have different shapes");
    let mut report = GradReport {
        name: name.to_owned(),
        max_rel_error: f64::NAN,
        worst_index: Vec::new(),
        worst: (f64::NAN, f64::NAN),
        checked: 0,
        skipped: numeric.skipped(),
    };
    for (((index, &analytic), &numeric), &kink) in analytic.indexed_iter().zip(&numeric.gradient).zip(&numeric.kink) {
        if kink {
            continue;
        }
        let error = element_error(analytic, numeric);
        // The first NaN stays the worst.
        if report.checked == 0 || !report.max_rel_error.is_nan() && (error.is_nan() || error > report.max_rel_error) {
            report.max_rel_error = error;
            report.worst_index = index.into_dimension().slice().to_vec();
            report.worst = (analytic, numeric);
        }
        report.checked += 1;
    }
    report
}

impl fmt::Display for GradReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GradReport { name, max_rel_error, worst_index, worst: (analytic, numeric), checked, skipped } = self;
        write!(f, "{name}: relative error {max_rel_error:.2e}")?;
        if *checked > 0 {
            write!(f, " at {worst_index:?} (analytic {analytic:e}, numeric {numeric:e})")?;
        }
        write!(f, ", {checked} points checked, {skipped} beside a kink skipped")
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Array2, array};

    use super::*;

    /// Gradient of a function of one variable at each of `points`, by the scalar form.
    fn at_points(f: impl Fn(f64) -> f64, points: &[f64]) -> NumericGradient<ndarray::Ix1> {
        let each = points.iter().map(|&point| numeric_gradient(|x| f(x[0]), array![point].view(), STEP));
        let (gradient, kink) = each.map(|numeric| (numeric.gradient[0], numeric.kink[0])).unzip();
        NumericGradient { gradient: Array1::from_vec(gradient), kink: Array1::from_vec(kink) }
    }

    type Function = fn(f64) -> f64;

    #[test]
    fn smooth_functions_are_accurate_and_never_skipped() {
        let points: Vec<f64> = (-80..=80).map(|i| f64::from(i) * 0.05).collect();
        let positive: Vec<f64> = (1..=160).map(|i| f64::from(i) * 0.05).collect();
        let table: [(&str, Function, Function, &[f64]); 8] = [
            ("exp", f64::exp, f64::exp, &points),
            ("x^3", |x| x.powi(3), |x| 3.0 * x * x, &points[..80]),
            ("x^3 beyond its saddle", |x| x.powi(3), |x| 3.0 * x * x, &points[81..]),
            ("1/x", f64::recip, |x| -1.0 / (x * x), &positive),
            ("ln", f64::ln, f64::recip, &positive),
            ("1e6 sin", |x| 1e6 * x.sin(), |x| 1e6 * x.cos(), &points),
            ("1e-3 tanh", |x| 1e-3 * x.tanh(), |x| 1e-3 / x.cosh().powi(2), &points),
            ("far from 0", |x| (x - 5e4).powi(2), |x| 2.0 * (x - 5e4), &[1e5, -1e5, 3e4]),
        ];
        for (name, f, derivative, points) in table {
            let analytic = points.iter().map(|&x| derivative(x)).collect::<Array1<f64>>();
            let report = check(name, &analytic, &at_points(f, points));
            assert!(report.max_rel_error < 1e-6, "{report}");
            assert_eq!((report.checked, report.skipped), (points.len(), 0), "{report}");
        }
        // Where the derivative is 0 a difference leaves h^2; that is not a kink either.
        let saddle = at_points(|x| x.powi(3), &[0.0]);
        assert!(saddle.gradient[0] < 2.0 * STEP * STEP && !saddle.kink[0], "{saddle:?}");
    }

    #[test]
    fn kinks_are_found_wherever_they_lie_within_the_step() {
        let table: [(&str, Function); 5] = [
            ("relu", |x| x.max(0.0)),
            ("leaky relu", |x| if x > 0.0 { x } else { 0.99 * x }),
            ("|x|", f64::abs),
            ("max of smooth functions", |x| (3.0 + 2.0 * x).max(3.0 * x.exp())),
            ("jump", |x| if x > 0.0 { 1.0 } else { 0.0 }),
        ];
        // A third of the step and a quarter are where one of the two differences vanishes or both are smallest.
        let near: Vec<f64> = [0.0, 0.1, 0.25, 1.0 / 3.0, 0.5, 0.75, 0.9, 0.99].map(|t| t * STEP).to_vec();
        let far = [1.01 * STEP, 2.0 * STEP, 0.5];
        for (name, f) in table {
            for t in &near {
                assert!(at_points(f, &[*t, -t]).kink.iter().all(|&kink| kink), "{name} at +-{t:e}");
            }
            for t in far {
                assert!(at_points(f, &[t, -t]).kink.iter().all(|&kink| !kink), "{name} at +-{t:e}");
            }
        }
    }

    #[test]
    fn a_kink_of_one_output_among_many_is_found() {
        // Row sums of relu(x), where x[0, 1] is on the corner and x[1, 0] close to it.
        let x = array![[1.0, 0.0, -3.0], [4e-6, 100.0, -0.5]];
        let f = |x: ArrayView<f64, ndarray::Ix2>| x.mapv(|x| x.max(0.0)).sum_axis(ndarray::Axis(1));
        let numeric = numeric_gradient_array(f, x.view(), array![1.0, 1e-3].view());
        assert_eq!(numeric.kink, array![[false, true, false], [true, false, false]]);
        // What does not count in the sum does not matter.
        let numeric = numeric_gradient_array(f, x.view(), array![1.0, 0.0].view());
        assert_eq!(numeric.kink, array![[false, true, false], [false, false, false]]);
    }

    #[test]
    fn the_long_step_is_not_taken_across_a_kink() {
        let x = array![0.5 * LONG_STEP, -0.5 * LONG_STEP, 0.99 * LONG_STEP, 1.5 * STEP];
        let dout = array![1.0, 2.0, 3.0, 4.0];
        let numeric = numeric_gradient_array(|x| x.mapv(|x| x.max(0.0)), x.view(), dout.view());
        let report = check("dx", &array![1.0, 0.0, 3.0, 4.0], &numeric);
        assert!(report.max_rel_error < 1e-9 && report.skipped == 0, "{report}");
    }

    #[test]
    fn sums_with_cancellation_are_not_taken_for_kinks() {
        // Outputs are sums of a thousand products, some of them almost 0 beside terms of order 1.
        let x = Array2::from_shape_fn((1, 1000), |(_, d)| (1.7 * d as f64).sin());
        let w = Array2::from_shape_fn((1000, 20), |(d, m)| (0.3 * (d * d + 7 * m * d) as f64).sin());
        let dout = Array2::from_shape_fn((1, 20), |(_, m)| (0.9 * m as f64).cos());
        let numeric = numeric_gradient_array(|x| x.dot(&w), x.view(), dout.view());
        let report = check("dx", &dout.dot(&w.t()), &numeric);
        assert!(report.max_rel_error < 1e-8 && report.skipped == 0, "{report}");
    }

    #[test]
    fn steps_are_exact_so_copied_values_have_no_error() {
        let x = array![0.1, -3.7, 1e-7, 123.456, -1e9];
        let dout = array![1.1, -0.3, 1e-6, 7.0, 2.0];
        let numeric = numeric_gradient_array(|x| x.to_owned(), x.view(), dout.view());
        assert!(rel_error(&dout, &numeric.gradient) < 1e-15, "{numeric:?}");
    }

    #[test]
    fn a_wrong_gradient_is_reported_with_its_place() {
        let x = array![[0.3, 0.1], [-1.2, 2.0]];
        let dout = array![[1.0, 2.0], [3.0, 4.0]];
        let numeric = numeric_gradient_array(|x| x.mapv(|x| x.max(0.0) * x), x.view(), dout.view());
        let right = &dout * &x.mapv(|x| 2.0 * x.max(0.0));
        assert!(check("dx", &right, &numeric).max_rel_error < 1e-8);
        for wrong in [1.001, 0.0, -1.0, f64::NAN, f64::INFINITY] {
            let mut analytic = right.clone();
            analytic[[1, 1]] *= wrong;
            let report = check("dx", &analytic, &numeric);
            assert!(report.max_rel_error.is_nan() || report.max_rel_error > 1e-4, "{report}");
            assert_eq!((report.worst_index.as_slice(), report.checked), (&[1, 1][..], 4), "{report}");
        }
        // A function that is not a number there is not excused as a kink.
        let numeric = numeric_gradient(|x| x[0].sqrt() + x[1], array![-1.0, 1.0].view(), STEP);
        let report = check("dx", &array![0.0, 1.0], &numeric);
        assert!(report.max_rel_error.is_nan() && report.skipped == 0, "{report}");
    }

    #[test]
    fn a_check_of_nothing_does_not_pass() {
        let numeric = numeric_gradient(|x| x[0].abs(), array![0.0].view(), STEP);
        let report = check("dx", &array![0.0], &numeric);
        assert!(report.max_rel_error.is_nan() && report.skipped == 1, "{report}");
        assert_eq!(report.to_string(), "dx: relative error NaN, 0 points checked, 1 beside a kink skipped");
    }

    #[test]
    fn relative_errors_see_nan_wherever_it_is() {
        assert_eq!(rel_error(&array![1.0, 3.0], &array![1.0, 1.0]), 0.5);
        assert_eq!(rel_error(&array![0.0], &array![1e-9]), 0.1, "the floor is 1e-8");
        assert_eq!(rel_error_norm(&array![3.0_f32, 4.0], &array![3.0, 4.5]), 0.1);
        assert_eq!(rel_error_norm(&array![0.0], &array![0.0]), 0.0);
        assert_eq!(rel_error_norm(&array![0.0], &array![1.0]), f64::INFINITY);
        for (a, b) in
            [([1.0, f64::NAN, 1.0], [1.0; 3]), ([1.0; 3], [1.0, 2.0, f64::NAN]), ([f64::NAN, 1.0, 1.0], [2.0; 3])]
        {
            assert!(rel_error(&array![a[0], a[1], a[2]], &array![b[0], b[1], b[2]]).is_nan(), "{a:?} {b:?}");
            assert!(rel_error_norm(&array![a[0], a[1], a[2]], &array![b[0], b[1], b[2]]).is_nan(), "{a:?} {b:?}");
        }
    }
}
