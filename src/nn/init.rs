//! Level 5. Initial weights.

use std::fmt;
use std::str::FromStr;

use rand::RngExt;
use rand_distr::StandardNormal;
use serde::{Deserialize, Serialize};

use crate::element::Element;
use crate::error::{Error, Result};
use crate::random::ChaCha8Rng;

/// How weights are drawn. Biases start at 0, batchnorm's gamma at 1, its beta at 0.
///
/// `fan_in` is the number of inputs that one output sums, `fan_out` the number of outputs that one input reaches (at
/// stride 1): `C / groups * KH * KW` and `F * KH * KW` for filters `(F, C / groups, KH, KW)`, `D` and `M` for affine
/// weights `(D, M)`.
///
/// As text: `gaussian:0.001`, `he`, `xavier`, `orthogonal`, `dirac`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Init {
    /// Normal with this standard deviation (the seed's `weight_scale`).
    Gaussian {
        /// Standard deviation, 0 or more.
        std: f64,
    },
    /// Normal with standard deviation sqrt(2 / fan_in) (He et al. 2015).
    He,
    /// Uniform within sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio 2010).
    Xavier,
    /// Orthogonal rows or columns (Saxe et al. 2014), by QR.
    ///
    /// The weights as a matrix `(F, fan_in)` or `(D, M)` are sqrt(2), the gain that makes up for ReLU, times a matrix
    /// whose rows or columns, whichever are fewer, are orthonormal: the Q of a Gaussian matrix, its signs fixed by the
    /// diagonal of R, so that every such matrix is equally likely (Mezzadri 2007). In `f64` for every element type. The
    /// last bits depend on the BLAS library and the processor.
    #[cfg(feature = "blas")]
    Orthogonal,
    /// Partial identity (Zagoruyko & Komodakis 2017; Jordan 2024, arXiv 2404.00498): of `F` filters over `C` channels the first
    /// `min(F, C)` pass on one channel each, by a 1 at the centre; the others are uniform within 1 / sqrt(fan_in). Affine
    /// weights are uniform with variance 1, for scores that are divided by the number of inputs, such as `affine10b0-div256`.
    Dirac,
}

impl Init {
    /// Draws weights of this `shape`, `(F, C / groups, KH, KW)` or `(D, M)`, into `out`, row-major.
    ///
    /// Numbers are drawn in `f64` and rounded: both element types get the same ones from the same stream.
    ///
    /// # Errors
    /// [`Error::Shape`] for a shape of neither kind, [`Error::Invalid`] for a standard deviation that is not a number
    /// from 0 up, or if LAPACK refuses the matrix.
    ///
    /// # Panics
    /// If `out` does not hold exactly the elements of `shape`.
    pub fn fill<T: Element>(self, shape: &[usize], rng: &mut ChaCha8Rng, out: &mut [T]) -> Result<()> {
        let (fan_in, fan_out) = match *shape {
            [d, m] => (d, m),
            [f, c, kh, kw] => (c * kh * kw, f * kh * kw),
            _ => {
                let expected = "(F, C / groups, KH, KW) or (D, M)".into();
                return Err(Error::Shape { op: "initialisation", what: "weights", expected, got: shape.to_vec() });
            }
        };
        assert_eq!(out.len(), shape.iter().product::<usize>(), "room for weights of shape {shape:?}");
        self.check()?;
        match self {
            Init::Gaussian { std } => gaussian(std, rng, out),
            Init::He => gaussian((2.0 / fan_in as f64).sqrt(), rng, out),
            Init::Xavier => uniform((6.0 / (fan_in + fan_out) as f64).sqrt(), rng, out),
            Init::Dirac => match *shape {
                [_, channels, kh, kw] => {
                    uniform((1.0 / fan_in as f64).sqrt(), rng, out);
                    for (i, filter) in out.chunks_exact_mut(fan_in.max(1)).take(channels).enumerate() {
                        filter.fill(T::zero());
                        filter[(i * kh + kh / 2) * kw + kw / 2] = T::one();
                    }
                }
                _ => uniform(3.0_f64.sqrt(), rng, out),
            },
            #[cfg(feature = "blas")]
            Init::Orthogonal => orthogonal(shape[0], shape[1..].iter().product(), rng, out)?,
        }
        Ok(())
    }

    fn check(self) -> Result<()> {
        match self {
            Init::Gaussian { std } if !(std >= 0.0 && std.is_finite()) => Err(Error::invalid(
                "initialisation",
                format!("standard deviation {std} is not a number from 0 up"),
                "1e-3 and 1e-2 are usual",
            )),
            _ => Ok(()),
        }
    }
}

fn gaussian<T: Element>(std: f64, rng: &mut ChaCha8Rng, out: &mut [T]) {
    out.fill_with(|| T::of(std * rng.sample::<f64, _>(StandardNormal)));
}

fn uniform<T: Element>(limit: f64, rng: &mut ChaCha8Rng, out: &mut [T]) {
    out.fill_with(|| T::of(limit * (2.0 * rng.random::<f64>() - 1.0)));
}

#[cfg(feature = "blas")]
fn orthogonal<T: Element>(rows: usize, cols: usize, rng: &mut ChaCha8Rng, out: &mut [T]) -> Result<()> {
    use ndarray::{Array2, ShapeBuilder};
    use ndarray_linalg::QRInto;

    if out.is_empty() {
        return Ok(());
    }
    // LAPACK runs on OpenBLAS too: with the kernels and the one thread that `blas` chooses.
    crate::blas::setup();
    let (tall, narrow) = (rows.max(cols), rows.min(cols));
    let normal = Array2::from_shape_simple_fn((tall, narrow).f(), || rng.sample::<f64, _>(StandardNormal));
    let (mut q, r) = normal.qr_into().map_err(|e| {
        let problem = format!("LAPACK refuses the QR decomposition of a {tall} x {narrow} matrix: {e}");
        Error::invalid("initialisation", problem, "choose `he`")
    })?;
    let gain = std::f64::consts::SQRT_2;
    for (mut column, &diagonal) in q.columns_mut().into_iter().zip(r.diag()) {
        column *= gain.copysign(diagonal);
    }
    let weights = if rows < cols { q.t() } else { q.view() };
    for (out, &weight) in out.iter_mut().zip(weights) {
        *out = T::of(weight);
    }
    Ok(())
}

impl fmt::Display for Init {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Init::Gaussian { std } => write!(f, "gaussian:{std}"),
            Init::He => write!(f, "he"),
            Init::Xavier => write!(f, "xavier"),
            #[cfg(feature = "blas")]
            Init::Orthogonal => write!(f, "orthogonal"),
            Init::Dirac => write!(f, "dirac"),
        }
    }
}

impl FromStr for Init {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let error = |problem: String| {
            Error::invalid("initialisation", problem, "write gaussian:STD, he, xavier, orthogonal or dirac")
        };
        let init = match text {
            "he" => Init::He,
            "xavier" => Init::Xavier,
            "dirac" => Init::Dirac,
            #[cfg(feature = "blas")]
            "orthogonal" => Init::Orthogonal,
            #[cfg(not(feature = "blas"))]
            "orthogonal" => {
                let problem = "`orthogonal` needs LAPACK, which this build is without";
                return Err(Error::invalid("initialisation", problem, "build with openblas-system, or choose `he`"));
            }
            _ => match text.strip_prefix("gaussian:").map(str::parse) {
                Some(Ok(std)) => Init::Gaussian { std },
                Some(Err(_)) => return Err(error(format!("the standard deviation in `{text}` is not a number"))),
                None => return Err(error(format!("`{text}` is not one"))),
            },
        };
        init.check()?;
        Ok(init)
    }
}

impl TryFrom<String> for Init {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Init> for String {
    fn from(init: Init) -> String {
        init.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, stream};

    fn draw<T: Element>(init: Init, shape: &[usize], seed: u64) -> Vec<T> {
        let mut out = vec![T::nan(); shape.iter().product()];
        init.fill(shape, &mut stream(seed, Purpose::Init, 0, 0), &mut out).unwrap();
        out
    }

    const EVERY: &[Init] = &[
        Init::Gaussian { std: 0.01 },
        Init::He,
        Init::Xavier,
        #[cfg(feature = "blas")]
        Init::Orthogonal,
        Init::Dirac,
    ];

    /// Mean, standard deviation and reach of each distribution, with the fans of both kinds of weights.
    #[test]
    fn moments_are_those_of_the_papers() {
        for (init, shape, std) in [
            (Init::Gaussian { std: 0.05 }, &[300, 200][..], 0.05),
            (Init::Gaussian { std: 0.0 }, &[3, 2], 0.0),
            (Init::He, &[300, 200], (2.0_f64 / 300.0).sqrt()),
            (Init::He, &[128, 32, 5, 3], (2.0_f64 / (32.0 * 15.0)).sqrt()),
            (Init::Xavier, &[300, 200], (2.0_f64 / 500.0).sqrt()),
            (Init::Xavier, &[128, 32, 5, 3], (2.0_f64 / (160.0 * 15.0)).sqrt()),
        ] {
            let w: Vec<f64> = draw(init, shape, 7);
            let n = w.len() as f64;
            let mean = w.iter().sum::<f64>() / n;
            let got = (w.iter().map(|w| (w - mean).powi(2)).sum::<f64>() / n).sqrt();
            // Five standard errors.
            assert!(mean.abs() <= 5.0 * std / n.sqrt(), "{init} {shape:?}: mean {mean}");
            assert!((got - std).abs() <= 5.0 * std / (2.0 * n).sqrt(), "{init} {shape:?}: std {got}, not {std}");
            // A uniform distribution ends at sqrt(3) standard deviations; 60 000 normal numbers reach beyond 3.5.
            let reach = w.iter().fold(0.0_f64, |reach, w| reach.max(w.abs())) / std;
            match init {
                Init::Xavier => assert!((1.73..=3.0_f64.sqrt()).contains(&reach), "{shape:?}: {reach}"),
                _ => assert!(std == 0.0 || reach > 3.5, "{init} {shape:?}: {reach}"),
            }
        }
    }

    /// The same stream gives the same weights, in both types; another stream gives others.
    #[test]
    fn weights_depend_on_the_stream_alone() {
        for &init in EVERY {
            let shape = [8, 3, 3, 3];
            let first: Vec<f64> = draw(init, &shape, 1);
            assert_eq!(first, draw::<f64>(init, &shape, 1), "{init}");
            assert_eq!(first.iter().map(|&w| w as f32).collect::<Vec<_>>(), draw::<f32>(init, &shape, 1), "{init}");
            assert_ne!(first, draw::<f64>(init, &shape, 2), "{init}");
        }
    }

    /// Filters that pass on one channel each, then others within 1 / sqrt(fan_in); affine weights of variance 1.
    #[test]
    fn dirac_is_the_identity_as_far_as_it_goes() {
        for [f, c, kh, kw] in [[8, 3, 3, 3], [2, 5, 1, 1], [6, 6, 5, 3]] {
            let w: Vec<f64> = draw(Init::Dirac, &[f, c, kh, kw], 4);
            let fan_in = c * kh * kw;
            for (i, filter) in w.chunks_exact(fan_in).enumerate() {
                let ones: Vec<usize> = (0..fan_in).filter(|&k| filter[k] == 1.0).collect();
                if i < c {
                    assert_eq!(ones, [(i * kh + kh / 2) * kw + kw / 2], "{f} x {c}, filter {i}");
                    assert_eq!(filter.iter().sum::<f64>(), 1.0);
                } else {
                    assert!(filter.iter().all(|w| w.abs() <= (fan_in as f64).sqrt().recip() && *w != 0.0));
                }
            }
        }
        let w: Vec<f64> = draw(Init::Dirac, &[300, 100], 4);
        let variance = w.iter().map(|w| w * w).sum::<f64>() / w.len() as f64;
        assert!((variance - 1.0).abs() <= 0.03, "{variance}");
    }

    /// WᵀW or WWᵀ, whichever is smaller, is 2 I: wide, tall and square, filters and affine weights.
    #[cfg(feature = "blas")]
    #[test]
    fn orthogonal_weights_are_orthogonal() {
        for shape in [&[40, 7][..], &[7, 40], &[16, 16], &[32, 3, 3, 3], &[8, 16, 3, 3], &[1, 5], &[5, 1], &[0, 4]] {
            let (rows, cols) = (shape[0], shape[1..].iter().product());
            let w = ndarray::Array2::from_shape_vec((rows, cols), draw::<f64>(Init::Orthogonal, shape, 3)).unwrap();
            let gram = if rows < cols { w.dot(&w.t()) } else { w.t().dot(&w) };
            for ((i, j), &product) in gram.indexed_iter() {
                let expected = if i == j { 2.0 } else { 0.0 };
                assert!((product - expected).abs() <= 1e-13, "{shape:?}: product of {i} and {j} is {product}");
            }
        }
    }

    /// Householder's Q alone has a diagonal of one sign; over all orthogonal matrices both are as likely.
    #[cfg(feature = "blas")]
    #[test]
    fn orthogonal_signs_are_even() {
        let positive = (0..400).filter(|&seed| draw::<f64>(Init::Orthogonal, &[3, 3], seed)[0] > 0.0).count();
        assert!((150..=250).contains(&positive), "{positive} of 400");
    }

    #[test]
    fn text_round_trips() {
        for text in [
            "gaussian:0.001",
            "he",
            "xavier",
            #[cfg(feature = "blas")]
            "orthogonal",
            "dirac",
        ] {
            let init: Init = text.parse().unwrap();
            assert_eq!(init.to_string(), text);
            let json = serde_json::to_string(&init).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<Init>(&json).unwrap(), init);
        }
    }

    #[test]
    fn wrong_text_is_an_error() {
        for (text, part) in [
            ("", "`` is not one"),
            ("kaiming", "`kaiming` is not one; write gaussian:STD, he"),
            ("gaussian", "`gaussian` is not one"),
            ("gaussian:", "in `gaussian:` is not a number"),
            ("gaussian:-1", "standard deviation -1"),
            ("gaussian:nan", "standard deviation NaN"),
            #[cfg(not(feature = "blas"))]
            ("orthogonal", "needs LAPACK"),
        ] {
            let message = text.parse::<Init>().unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn weights_of_no_kind_are_an_error() {
        let mut rng = stream(0, Purpose::Init, 0, 0);
        let error = Init::He.fill::<f32>(&[3], &mut rng, &mut [0.0; 3]).unwrap_err().to_string();
        assert!(error.contains("[3]") && error.contains("(D, M)"), "{error}");
        let error = Init::Gaussian { std: f64::INFINITY }.fill::<f32>(&[1, 1], &mut rng, &mut [0.0]).unwrap_err();
        assert!(error.to_string().contains("inf"), "{error}");
    }
}
