//! What the benches share: named shapes, seeded inputs, comparison with the naive twins.

use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput};
use gemmnet::Element;
use gemmnet::gradcheck::{rel_error, rel_error_norm};
use gemmnet::random::{Purpose, stream};
use gemmnet::shape::{Conv2d, Conv2dShape, Padding};
use ndarray::{Array, ArrayRef, Dimension, ShapeBuilder};
use rand::RngExt;
use rand_distr::StandardNormal;

/// Benches whose calls each do `work` operations: floating-point ones where there are products, else elements.
pub(crate) fn group<'a>(criterion: &'a mut Criterion, name: &str, work: usize) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(work as u64)).sample_size(30);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group
}

/// From here on the benches of this group take 20 ms and more per call: ten calls have to do.
pub(crate) fn slow(group: &mut BenchmarkGroup<'_, WallTime>) {
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
}

/// A convolution by name.
#[derive(Clone, Copy)]
pub(crate) struct ConvCase {
    pub(crate) name: &'static str,
    pub(crate) shape: Conv2dShape,
    pub(crate) conv: Conv2d,
}

fn conv_case(name: &'static str, x: [usize; 4], w: [usize; 4], stride: usize) -> ConvCase {
    let conv = Conv2d { stride: (stride, stride), padding: Padding::All(1), ..Conv2d::default() };
    ConvCase { name, shape: Conv2dShape::new(x, w, &conv).expect("the shapes of the table fit"), conv }
}

/// The convolution that CS231n times.
pub(crate) fn seed_conv() -> ConvCase {
    conv_case("seed", [100, 3, 31, 31], [25, 3, 3, 3], 2)
}

/// 3x3 convolutions of networks for 32x32 images, named by channels, filters, and side of the images.
pub(crate) fn network_convs() -> [ConvCase; 6] {
    [
        ("3-64@32", 500, 3, 64, 32),
        ("64-64@32", 100, 64, 64, 32),
        ("64-128@16", 100, 64, 128, 16),
        ("128-128@16", 100, 128, 128, 16),
        ("128-256@8", 100, 128, 256, 8),
        ("256-256@8", 100, 256, 256, 8),
    ]
    .map(|(name, images, channels, filters, side)| {
        conv_case(name, [images, channels, side, side], [filters, channels, 3, 3], 1)
    })
}

/// Standard normal values, always the same for the same `index`.
pub(crate) fn normal<T: Element, Sh: ShapeBuilder>(shape: Sh, index: u64) -> Array<T, Sh::Dim> {
    let mut rng = stream(0, Purpose::Example, 0, index);
    Array::from_shape_simple_fn(shape, || T::of(rng.sample(StandardNormal)))
}

/// Stops the bench unless `fast` is what `naive` is. In f64 element by element; in f32, where small elements have no
/// correct digits, as a whole.
#[track_caller]
pub(crate) fn assert_same<T: Element, D: Dimension>(naive: &ArrayRef<T, D>, fast: &ArrayRef<T, D>, what: &str) {
    let (error, limit) = match T::NAME {
        "f64" => (rel_error(naive, fast), 1e-9),
        _ => (rel_error_norm(naive, fast), 1e-4),
    };
    assert!(error <= limit, "{what} in {}: naive and fast differ by {error:.1e}, more than {limit:.0e}", T::NAME);
}

pub(crate) fn slice<T, D: Dimension>(array: &Array<T, D>) -> &[T] {
    array.as_slice().expect("made in standard layout")
}

pub(crate) fn slice_mut<T, D: Dimension>(array: &mut Array<T, D>) -> &mut [T] {
    array.as_slice_mut().expect("made in standard layout")
}
