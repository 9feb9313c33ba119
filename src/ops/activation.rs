//! Level 3. Pointwise nonlinearities.
//!
//! [`Activation::apply`] and [`Activation::slope`] are the formulas for one value, to be inlined into fused kernels;
//! [`Activation::apply_slice`] and [`Activation::backward_slice`] run them over slices in loops that the compiler
//! vectorises; [`activation_forward`] and [`activation_backward`] are the forms over arrays.
//!
//! NaN in gives NaN out, in ReLU too: a training that diverged must show, and not be cut off at zero.

use std::f64::consts::LOG2_E;
use std::fmt;
use std::str::FromStr;

use ndarray::{Array, ArrayRef, Dimension};

use crate::element::{Element, Kind};
use crate::error::{Error, Result, check_shape};
use crate::ops::layout::{row_major, slice_mut};
use crate::parallel::for_each_chunk_mut;
use crate::simd::vectorized;

/// A pointwise nonlinearity.
///
/// `Display` and `FromStr` use the names of the [network notation](crate::nn::notation): `relu`, `leaky` (slope 0.01),
/// `leaky0.2`, `silu`, `gelu`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `max(z, 0)`
    Relu,
    /// `z` where positive, else `slope * z`.
    LeakyRelu {
        /// Slope for negative input, 0 to 1.
        slope: f64,
    },
    /// `z * sigmoid(z)` (Elfwing et al. 2017).
    Silu,
    /// `z * Phi(z)`, in its tanh approximation (Hendrycks & Gimpel 2016), which PyTorch calls `approximate="tanh"`. It differs
    /// from the form with the error function by 4.8e-4 at most, its slope by 8.7e-4. In `f32` the approximation itself is
    /// computed within 2e-7 `max(1, |z|)`, its slope within 2e-6.
    Gelu,
}

/// sqrt(2 / pi), the scale of GELU's tanh.
const GELU_SCALE: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
/// The weight of the cubic term in GELU's tanh.
const GELU_CUBIC: f64 = 0.044715;
/// `-2 u / ln 2` for small `z`, by `z`: what [`sigmoid_of_power`] takes.
const GELU_POWER: f64 = -2.0 * GELU_SCALE * LOG2_E;

impl Activation {
    /// Names in the notation; the first of several is the one to print.
    pub(crate) const NAMES: [(&str, Activation); 5] = [
        ("relu", Activation::Relu),
        ("leaky", Activation::LeakyRelu { slope: 0.01 }),
        ("leakyrelu", Activation::LeakyRelu { slope: 0.01 }),
        ("silu", Activation::Silu),
        ("gelu", Activation::Gelu),
    ];

    /// The activation of this name, with its default slope.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(n, _)| *n == name).map(|&(_, activation)| activation)
    }

    /// Name and default of the same kind of activation.
    fn entry(self) -> (&'static str, Self) {
        let kind = std::mem::discriminant(&self);
        let entry = Self::NAMES.into_iter().find(|(_, a)| std::mem::discriminant(a) == kind);
        entry.expect("every kind of activation has a name")
    }

    /// Its name in the notation, without the slope: `relu`, `leaky`, `silu`, `gelu`.
    pub fn name(self) -> &'static str {
        self.entry().0
    }

    /// Whether the derivative jumps at z = 0, where a numeric gradient would be wrong.
    pub fn kinks(self) -> bool {
        matches!(self, Activation::Relu | Activation::LeakyRelu { .. })
    }

    /// The activation of `z`.
    ///
    /// GELU is `z / 2 (1 + tanh(u))` with `u = sqrt(2 / pi) (z + 0.044715 z^3)`, which equals `z sigmoid(2 u)`.
    #[inline(always)]
    pub fn apply<T: Element>(self, z: T) -> T {
        match self {
            Activation::Relu => {
                if z <= T::zero() {
                    T::zero()
                } else {
                    z
                }
            }
            Activation::LeakyRelu { slope } => {
                if z <= T::zero() {
                    T::of(slope) * z
                } else {
                    z
                }
            }
            Activation::Silu => z * sigmoid(z),
            Activation::Gelu => {
                z * sigmoid_of_power(z * (T::of(GELU_POWER) + T::of(GELU_POWER * GELU_CUBIC) * (z * z)))
            }
        }
    }

    /// The derivative at `z`; at a kink the one from the left, which is 0 for ReLU.
    ///
    /// With `s` the sigmoid of `v`, the derivative of `z s` is `s + z s (1 - s) v'`; SiLU has `v = z`, GELU `v = 2 u`.
    #[inline(always)]
    pub fn slope<T: Element>(self, z: T) -> T {
        let one = T::one();
        match self {
            Activation::Relu => {
                if z <= T::zero() {
                    T::zero()
                } else {
                    one
                }
            }
            Activation::LeakyRelu { slope } => {
                if z <= T::zero() {
                    T::of(slope)
                } else {
                    one
                }
            }
            Activation::Silu => {
                let s = sigmoid(z);
                s + z * s * (one - s)
            }
            Activation::Gelu => {
                // Beyond 20 the slope is 0 or 1 in either type, and the square below would overflow.
                let z = clamp(z, T::of(-20.0), T::of(20.0));
                let z2 = z * z;
                let s = sigmoid_of_power(z * (T::of(GELU_POWER) + T::of(GELU_POWER * GELU_CUBIC) * z2));
                let v = T::of(2.0 * GELU_SCALE) + T::of(6.0 * GELU_SCALE * GELU_CUBIC) * z2;
                s + z * s * (one - s) * v
            }
        }
    }

    /// `out = activation(z)`, value by value, on the calling thread.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn apply_slice<T: Element>(self, z: &[T], out: &mut [T]) {
        assert_eq!(z.len(), out.len(), "an activation keeps the number of values");
        vectorized!(self.specialised(
            #[inline(always)]
            |activation| {
                for (out, &z) in out.iter_mut().zip(z) {
                    *out = activation.apply(z);
                }
            },
        ));
    }

    /// `dz = dout * slope(z)`, value by value, on the calling thread; `z` is the input of the forward pass.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn backward_slice<T: Element>(self, z: &[T], dout: &[T], dz: &mut [T]) {
        assert_eq!(z.len(), dz.len(), "an activation keeps the number of values");
        assert_eq!(dout.len(), dz.len(), "the gradient has one value per output");
        vectorized!(self.specialised(
            #[inline(always)]
            |activation| {
                for ((dz, &z), &dout) in dz.iter_mut().zip(z).zip(dout) {
                    *dz = dout * activation.slope(z);
                }
            },
        ));
    }

    /// Runs `work` with an activation whose kind is known where it is inlined, so that a loop in it has no branch.
    #[inline(always)]
    pub(crate) fn specialised(self, work: impl FnOnce(Activation)) {
        match self {
            Activation::Relu => work(Activation::Relu),
            Activation::LeakyRelu { slope } => work(Activation::LeakyRelu { slope }),
            Activation::Silu => work(Activation::Silu),
            Activation::Gelu => work(Activation::Gelu),
        }
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, default) = self.entry();
        match self {
            Activation::LeakyRelu { slope } if *self != default => write!(f, "{name}{slope}"),
            _ => f.write_str(name),
        }
    }
}

impl FromStr for Activation {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let lower = text.trim().to_ascii_lowercase();
        let (name, number) = lower.split_at(lower.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(lower.len()));
        match (Self::named(name), number.parse()) {
            (Some(activation), _) if number.is_empty() => Ok(activation),
            (Some(Activation::LeakyRelu { .. }), Ok(slope)) if (0.0..=1.0).contains(&slope) => {
                Ok(Activation::LeakyRelu { slope })
            }
            _ => Err(Error::invalid(
                "activation",
                format!("`{text}` is not one"),
                "choose relu, leaky, leaky0.2 (slope 0 to 1), silu or gelu",
            )),
        }
    }
}

/// `1 / (1 + e^-z)`; exactly 0 and 1 far out.
#[inline(always)]
fn sigmoid<T: Element>(z: T) -> T {
    sigmoid_of_power(T::of(-LOG2_E) * z)
}

/// `1 / (1 + 2^t)`, which is `sigmoid(-t ln 2)`.
#[inline(always)]
fn sigmoid_of_power<T: Element>(t: T) -> T {
    T::one() / (T::one() + exp2(t))
}

/// Limits `z` to `low..=high`; NaN stays, which `Float::max` would replace. Each choice is what an instruction does.
#[inline(always)]
fn clamp<T: Element>(z: T, low: T, high: T) -> T {
    let z = if z < low { low } else { z };
    if z > high { high } else { z }
}

/// `2^x`: [`exp2_f32`] for `f32`, the system's for `f64`, which only checks gradients.
#[inline(always)]
fn exp2<T: Element>(x: T) -> T {
    if T::KIND == Kind::F32 {
        // Through f64 and back is exact, and the compiler removes it.
        T::of(f64::from(exp2_f32(x.f64() as f32)))
    } else {
        x.exp2()
    }
}

/// `2^x` within 2 units in the last place, without branches or calls, so that loops over it vectorise.
///
/// With `n = round(x)` and `r = x - n`, `2^x = 2^n 2^r` and `|r| <= 1/2`. The polynomial for `2^r` is 1 at 0, and otherwise that of
/// degree 6 whose largest relative error is least (Remez 1934), 2.6e-9 before its coefficients are rounded. Below -126.5 (where denormals would begin) the result is 0,
/// from 127.5 on infinite.
#[inline(always)]
fn exp2_f32(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits of the sum.
    const SHIFT: f32 = 12_582_912.0;
    const LN_2: f32 = std::f32::consts::LN_2;
    const COEFFICIENTS: [f32; 7] =
        [1.559_467_8e-4, 1.340_664_4e-3, 9.617_693e-3, 5.550_310_6e-2, 0.240_226_53, LN_2, 1.0];

    let x = clamp(x, -127.0, 128.0);
    let shifted = x + SHIFT;
    let r = x - (shifted - SHIFT);
    let mut series = COEFFICIENTS[0];
    for coefficient in &COEFFICIENTS[1..] {
        series = series * r + coefficient;
    }
    // 2^n by its exponent bits; the clamp leaves n in -127..=128, whose ends are 0 and infinity.
    let exponent = shifted.to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(127);
    series * f32::from_bits(exponent << 23)
}

/// Values per piece of the array forms.
const PIECE: usize = 1 << 14;

/// The activation of every value of `x`, of any shape.
pub fn activation_forward<T: Element, D: Dimension>(x: &ArrayRef<T, D>, activation: Activation) -> Array<T, D> {
    let mut out = Array::zeros(x.raw_dim());
    let x = row_major(x.view());
    for_each_chunk_mut(slice_mut(&mut out), PIECE, |i, out| {
        activation.apply_slice(&x[i * PIECE..][..out.len()], out);
    });
    out
}

/// The gradient by `x` of [`activation_forward`], from the gradient by its output, `dout`.
///
/// # Errors
/// [`Error::Shape`] unless `dout` has the shape of `x`.
pub fn activation_backward<T: Element, D: Dimension>(
    dout: &ArrayRef<T, D>,
    x: &ArrayRef<T, D>,
    activation: Activation,
) -> Result<Array<T, D>> {
    check_shape(activation.name(), "dout", dout.shape(), x.shape())?;
    let mut dx = Array::zeros(x.raw_dim());
    let (x, dout) = (row_major(x.view()), row_major(dout.view()));
    for_each_chunk_mut(slice_mut(&mut dx), PIECE, |i, dx| {
        let start = i * PIECE;
        activation.backward_slice(&x[start..][..dx.len()], &dout[start..][..dx.len()], dx);
    });
    Ok(dx)
}

/// `max(x, 0)` of every value: [`activation_forward`] with [`Activation::Relu`].
pub fn relu_forward<T: Element, D: Dimension>(x: &ArrayRef<T, D>) -> Array<T, D> {
    activation_forward(x, Activation::Relu)
}

/// `dout` where `x > 0`, else 0: [`activation_backward`] with [`Activation::Relu`].
///
/// # Errors
/// [`Error::Shape`] unless `dout` has the shape of `x`.
pub fn relu_backward<T: Element, D: Dimension>(dout: &ArrayRef<T, D>, x: &ArrayRef<T, D>) -> Result<Array<T, D>> {
    activation_backward(dout, x, Activation::Relu)
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Array2, array};
    use rand::RngExt;

    use super::*;
    use crate::random::{Purpose, stream};

    const ALL: [Activation; 4] =
        [Activation::Relu, Activation::LeakyRelu { slope: 0.2 }, Activation::Silu, Activation::Gelu];

    fn assert_near(got: f64, want: f64, tolerance: f64, what: impl fmt::Display) {
        assert!((got - want).abs() <= tolerance, "{what}: got {got}, want {want}");
    }

    #[test]
    fn values_match_the_published_formulas() {
        // SiLU and GELU by the formulas in double precision: x / (1 + e^-x) and x / 2 (1 + tanh(...)).
        for (activation, z, want) in [
            (Activation::Relu, -2.0, 0.0),
            (Activation::Relu, 3.0, 3.0),
            (Activation::LeakyRelu { slope: 0.01 }, -2.0, -0.02),
            (Activation::LeakyRelu { slope: 0.01 }, 3.0, 3.0),
            (Activation::Silu, -1.0, -0.268_941_421_369_995),
            (Activation::Silu, 2.0, 1.761_594_155_955_765),
            (Activation::Gelu, -1.0, -0.158_808_009_391_723),
            (Activation::Gelu, 2.0, 1.954_597_694_087_775),
        ] {
            assert_near(activation.apply(z), want, 1e-14, format!("{activation}({z})"));
            assert_near(activation.apply(z as f32).f64(), want, 3e-7, format!("{activation}({z}) in f32"));
        }
    }

    /// The bounds that the docs of GELU state.
    #[test]
    fn in_single_precision_gelu_errs_as_little_as_is_said() {
        for i in -1_200_000..=1_200_000 {
            let z = i as f32 * 1e-5;
            let (value, slope) = (Activation::Gelu.apply(f64::from(z)), Activation::Gelu.slope(f64::from(z)));
            let size = f64::from(z.abs().max(1.0));
            assert_near(Activation::Gelu.apply(z).f64(), value, 2e-7 * size, format!("gelu({z})"));
            assert_near(Activation::Gelu.slope(z).f64(), slope, 2e-6, format!("slope of gelu at {z}"));
        }
    }

    #[test]
    fn slopes_match_central_differences() {
        let h = 1e-5;
        for activation in ALL {
            let mut checked = 0;
            for i in -600..=600 {
                let z = f64::from(i) * 0.01;
                if activation.kinks() && z.abs() <= h {
                    continue;
                }
                let numeric = (activation.apply(z + h) - activation.apply(z - h)) / (2.0 * h);
                assert_near(activation.slope(z), numeric, 1e-9, format!("{activation} at {z}"));
                assert_near(activation.slope(z as f32).f64(), numeric, 2e-6, format!("{activation} at {z} in f32"));
                checked += 1;
            }
            assert!(checked >= 1200, "{activation}: only {checked} points were not kinks");
        }
    }

    #[test]
    fn at_a_kink_the_slope_is_the_one_from_the_left() {
        for zero in [0.0_f32, -0.0] {
            assert_eq!(Activation::Relu.slope(zero), 0.0);
            assert_eq!(Activation::LeakyRelu { slope: 0.25 }.slope(zero), 0.25);
        }
    }

    #[test]
    fn nan_survives_and_huge_values_make_none() {
        fn check<T: Element>() {
            for activation in ALL {
                assert!(activation.apply(T::nan()).is_nan(), "{activation} hides NaN");
                for z in [T::max_value(), T::min_value(), T::of(1e15), T::of(-1e15)] {
                    let (value, slope) = (activation.apply(z), activation.slope(z));
                    let low = if let Activation::LeakyRelu { slope } = activation { T::of(slope) } else { T::zero() };
                    let want = if z > T::zero() { T::one() } else { low };
                    assert_near((value / z).f64(), want.f64(), 1e-12, format!("{activation}({z:e}) / z"));
                    assert_near(slope.f64(), want.f64(), 1e-12, format!("{activation}'({z:e})"));
                }
            }
        }
        check::<f32>();
        check::<f64>();
    }

    #[test]
    fn fast_powers_are_accurate_rising_and_have_exact_limits() {
        let mut before = 0.0;
        for i in 0..=2_534_000 {
            let x = (f64::from(i) * 1e-4 - 126.0) as f32;
            let (got, want) = (exp2_f32(x), f64::from(x).exp2());
            assert_near(f64::from(got) / want, 1.0, 1.5e-7, format!("2^{x}"));
            assert!(got > before, "2^{x} = {got} does not rise from {before}");
            before = got;
        }
        assert_eq!(exp2_f32(0.0), 1.0);
        for x in [-127.0, -1e30, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp2_f32(x), 0.0, "2^{x}");
            assert_eq!((sigmoid(x), sigmoid(-x)), (0.0, 1.0), "sigmoid({x})");
        }
        for x in [127.6, 1e30, f32::MAX, f32::INFINITY] {
            assert_eq!(exp2_f32(x), f32::INFINITY, "2^{x}");
        }
        assert!(exp2_f32(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan());
    }

    #[test]
    fn slices_are_the_scalar_formulas() {
        let mut random = stream(1, Purpose::Example, 0, 0);
        let z: Vec<f32> = (0..101).map(|_| random.random_range(-8.0..8.0)).collect();
        let dout: Vec<f32> = (0..101).map(|_| random.random_range(-1.0..1.0)).collect();
        for activation in ALL {
            let (mut out, mut dz) = (vec![f32::NAN; 101], vec![f32::NAN; 101]);
            activation.apply_slice(&z, &mut out);
            activation.backward_slice(&z, &dout, &mut dz);
            for i in 0..z.len() {
                assert_near(out[i].f64(), activation.apply(z[i]).f64(), 1e-6, format!("{activation} out {i}"));
                assert_near(
                    dz[i].f64(),
                    (dout[i] * activation.slope(z[i])).f64(),
                    1e-6,
                    format!("{activation} dz {i}"),
                );
            }
        }
    }

    #[test]
    fn arrays_of_any_layout_and_more_than_one_piece() {
        let x = Array2::from_shape_fn((3, PIECE), |(i, j)| (i * PIECE + j) as f64 * 1e-4 - 2.0);
        let dout = x.mapv(|v| v * v - 1.0);
        for activation in ALL {
            let want = x.mapv(|z| activation.apply(z));
            assert_eq!(activation_forward(&x, activation), want);
            assert_eq!(activation_forward(&x.t(), activation), want.t());
            let want = ndarray::Zip::from(&x).and(&dout).map_collect(|&z, &d| d * activation.slope(z));
            assert_eq!(activation_backward(&dout, &x, activation).unwrap(), want);
            assert_eq!(activation_backward(&dout.t(), &x.t(), activation).unwrap(), want.t());
        }
        assert_eq!(relu_forward(&array![[-1.0_f32, 0.0], [2.0, f32::MIN_POSITIVE]])[[1, 0]], 2.0);
        assert_eq!(relu_backward(&array![3.0_f32, 4.0, 5.0], &array![-1.0, 0.0, 1.0]).unwrap(), array![0.0, 0.0, 5.0]);
        let error = relu_backward(&Array1::<f32>::zeros(3), &Array1::zeros(4)).unwrap_err();
        assert!(matches!(&error, Error::Shape { op: "relu", what: "dout", got, .. } if *got == [3]), "{error}");
    }

    #[test]
    fn names_are_read_and_printed() {
        for (text, activation, printed) in [
            ("relu", Activation::Relu, "relu"),
            (" ReLU ", Activation::Relu, "relu"),
            ("leaky", Activation::LeakyRelu { slope: 0.01 }, "leaky"),
            ("leakyrelu0.010", Activation::LeakyRelu { slope: 0.01 }, "leaky"),
            ("leaky0.2", Activation::LeakyRelu { slope: 0.2 }, "leaky0.2"),
            ("silu", Activation::Silu, "silu"),
            ("gelu", Activation::Gelu, "gelu"),
        ] {
            assert_eq!(text.parse::<Activation>().unwrap(), activation, "{text}");
            assert_eq!(activation.to_string(), printed);
        }
        for text in ["", "tanh", "relu2", "leaky1.5", "leaky-1", "leaky0.2x", "leakynan"] {
            let error = text.parse::<Activation>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")) && error.contains("choose relu"), "{error}");
        }
    }
}
