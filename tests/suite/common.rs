//! What the integration tests share: comparison of arrays, random arrays, golden numbers.

use std::collections::HashMap;
use std::path::Path;

use gemmnet::Element;
use gemmnet::random::{Purpose, stream};
use gemmnet::shape::{Conv2d, Padding, Pool2d};
use ndarray::{Array, ArrayD, ArrayRef, Dimension, IntoDimension, ShapeBuilder};
use rand::RngExt;
use rand_distr::StandardNormal;
use serde::Deserialize;

/// Fails unless `got` has the shape of `want` and all its values: within `rel * sqrt(terms) * max |want|`, where `terms`
/// is the number of terms that were summed for one value (their roundings add up like a random walk), and `rel` the
/// uncertainty of one of them. What is not finite fails. `what` says what was compared.
#[track_caller]
pub(crate) fn assert_close<T: Element, D: Dimension>(
    got: &ArrayRef<T, D>,
    want: &ArrayRef<T, D>,
    rel: f64,
    terms: usize,
    what: &str,
) {
    assert_eq!(got.shape(), want.shape(), "{what}: the shapes differ (left is what came, right what was expected)");
    let sizes = want.iter().map(|value| value.f64().abs()).filter(|size| size.is_finite());
    let largest = sizes.fold(0.0, f64::max);
    let tolerance = rel * (terms.max(1) as f64).sqrt() * largest;
    let (mut outside, count) = (0, want.len());
    let mut worst: Option<(f64, Vec<usize>, T, T)> = None;
    for ((index, &got), &want) in got.indexed_iter().zip(want) {
        let difference = (got.f64() - want.f64()).abs();
        if difference <= tolerance {
            continue;
        }
        outside += 1;
        // The first NaN stays the worst.
        if worst.as_ref().is_none_or(|(most, ..)| !most.is_nan() && (difference.is_nan() || difference > *most)) {
            worst = Some((difference, index.into_dimension().slice().to_vec(), got, want));
        }
    }
    if let Some((difference, index, got, want)) = worst {
        panic!(
            "{what}: {outside} of {count} values are not within {tolerance:.1e}; the worst is at {index:?}: got {got:e}, expected {want:e}, difference {difference:.1e}"
        );
    }
}

/// Standard normal values, the same for the same seed.
pub(crate) fn random_array<T: Element, Sh: ShapeBuilder>(shape: Sh, seed: u64) -> Array<T, Sh::Dim> {
    let mut rng = stream(seed, Purpose::Example, 0, 0);
    Array::from_shape_simple_fn(shape, || T::of(rng.sample(StandardNormal)))
}

/// One case of a file in `tests/golden`, written by `scripts/gen_golden.py`.
#[derive(Deserialize)]
pub(crate) struct Golden {
    /// Name within its file.
    pub(crate) name: String,
    /// Options of the operation.
    pub(crate) params: serde_json::Value,
    arrays: HashMap<String, GoldenArray>,
}

#[derive(Deserialize)]
struct GoldenArray {
    shape: Vec<usize>,
    values: Vec<f64>,
}

#[derive(Deserialize)]
struct GoldenFile {
    cases: Vec<Golden>,
}

/// All cases of `tests/golden/<family>.json`.
pub(crate) fn golden(family: &str) -> Vec<Golden> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family).with_extension("json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file: GoldenFile = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert!(!file.cases.is_empty(), "{} has no cases", path.display());
    file.cases
}

impl Golden {
    /// The array called `key`.
    pub(crate) fn array<D: Dimension>(&self, key: &str) -> Array<f64, D> {
        self.optional(key).unwrap_or_else(|| panic!("case '{}' has no array '{key}'", self.name))
    }

    /// The array called `key`, if this case has one.
    pub(crate) fn optional<D: Dimension>(&self, key: &str) -> Option<Array<f64, D>> {
        let array = self.arrays.get(key)?;
        let array = ArrayD::from_shape_vec(array.shape.clone(), array.values.clone()).expect("shape fits values");
        Some(array.into_dimensionality().unwrap_or_else(|e| panic!("case '{}', array '{key}': {e}", self.name)))
    }

    /// The names of the arrays that are called `kind NAME`.
    pub(crate) fn names(&self, kind: &str) -> impl Iterator<Item = &str> {
        self.arrays.keys().filter_map(move |key| key.strip_prefix(kind)?.strip_prefix(' '))
    }

    /// Number of axes of the array called `key`.
    pub(crate) fn dimensions(&self, key: &str) -> usize {
        self.arrays[key].shape.len()
    }

    /// The parameter called `key`, as whatever type it is read into.
    pub(crate) fn param<P: for<'de> Deserialize<'de>>(&self, key: &str) -> P {
        P::deserialize(&self.params[key]).unwrap_or_else(|e| panic!("case '{}', parameter '{key}': {e}", self.name))
    }

    /// Options of a `conv2d` case.
    pub(crate) fn conv(&self) -> Conv2d {
        Conv2d {
            stride: self.param("stride"),
            padding: self.padding(),
            dilation: self.param("dilation"),
            groups: self.param("groups"),
            ..Conv2d::default()
        }
    }

    /// Window of a pooling case.
    pub(crate) fn pool(&self) -> Pool2d {
        Pool2d { window: self.param("window"), stride: self.param("stride"), padding: self.padding() }
    }

    fn padding(&self) -> Padding {
        let [top, bottom, left, right] = self.param("padding");
        Padding::Sides { top, bottom, left, right }
    }
}
