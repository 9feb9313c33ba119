//! Every fast operation against its naive twin.
//!
//! One reference serves both types: the naive twin in `f64`, on values that `f32` represents exactly. Tolerances:
//!
//! - `f64`: every value within [`F64`]` * sqrt(terms) * max |want|`, where `terms` are the terms of its sum;
//! - `f32`: [`F32`] in the Euclidean norm of the whole array, since single values near 0 have no correct digits;
//! - sums of products of standard normal values, as in convolutions, in either type: every value within
//!   `4 epsilon (terms + 8)`. The sum and the errors made on the way each grow like a random walk, so their product grows
//!   like `terms`; what a sum loses when it cancels does not count.

use crate::common::{assert_close, random_array};
use gemmnet::gradcheck::{rel_error, rel_error_norm};
use gemmnet::naive;
use gemmnet::ops::Mode;
use gemmnet::ops::affine::{AffineGradsMut, AffineShape, affine_backward, affine_backward_into, affine_forward};
use gemmnet::ops::batchnorm::{
    BatchNorm, NormGradsMut, ScaleShift, Statistics, batchnorm_backward, batchnorm_forward, spatial_batchnorm_backward,
    spatial_batchnorm_backward_into, spatial_batchnorm_forward, spatial_batchnorm_forward_into,
};
use gemmnet::ops::conv::{
    ConvGradsMut, ConvInput, ConvPlan, Filters, conv2d_backward, conv2d_backward_into, conv2d_forward,
    conv2d_forward_into,
};
use gemmnet::ops::loss::{check_labels, softmax_cross_entropy, softmax_cross_entropy_into, svm_hinge, svm_hinge_into};
use gemmnet::ops::pool::{
    avg_pool2d_backward, avg_pool2d_forward, global_avg_pool_backward, global_avg_pool_forward, max_pool2d_backward,
    max_pool2d_forward,
};
use gemmnet::parallel::with_threads;
use gemmnet::shape::{Conv2d, Conv2dShape, Padding, Pool2d, Pool2dShape};
use gemmnet::workspace::Workspace;
use gemmnet::{Element, Error, Result};
use ndarray::{Array, Array1, Array2, Array4, ArrayRef, ArrayView1, Dimension, ShapeBuilder, array, s};
use proptest::prelude::*;

/// A few roundings for each term of a sum.
const F64: f64 = 8.0 * f64::EPSILON;
/// Some twenty roundings; sums of thousands of terms stay within it, because blocked summation errs little.
const F32: f64 = 2e-6;

/// Standard normal values that `f32` represents.
fn normal<Sh: ShapeBuilder>(shape: Sh, seed: u64) -> Array<f64, Sh::Dim> {
    random_array::<f32, _>(shape, seed).mapv(f64::from)
}

/// The integers -1, 0 and 1: most windows of a pool have ties.
fn ties<Sh: ShapeBuilder>(shape: Sh, seed: u64) -> Array<f64, Sh::Dim> {
    random_array::<f64, _>(shape, seed).mapv(|v| v.round().clamp(-1.0, 1.0))
}

fn to<T: Element, D: Dimension>(values: &ArrayRef<f64, D>) -> Array<T, D> {
    values.mapv(T::of)
}

/// Compares with the tolerances above, `slack` times as wide.
#[track_caller]
fn assert_twins<T: Element, D: Dimension>(
    got: &ArrayRef<T, D>,
    want: &ArrayRef<f64, D>,
    terms: usize,
    slack: f64,
    what: &str,
) {
    let got = got.mapv(T::f64);
    if T::NAME == "f64" {
        assert_close(&got, want, slack * F64, terms, what);
    } else {
        let error = rel_error_norm(want, &got);
        assert!(error <= slack * F32, "{what}: in norm the {} result is off by {error:e}", T::NAME);
    }
}

/// Compares sums of `terms` products of standard normal values.
#[track_caller]
fn assert_sums<T: Element, D: Dimension>(got: &ArrayRef<T, D>, want: &ArrayRef<f64, D>, terms: usize, what: &str) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    let tolerance = 4.0 * T::epsilon().f64() * (terms + 8) as f64;
    for ((index, got), want) in got.indexed_iter().zip(want) {
        let difference = (got.f64() - want).abs();
        assert!(difference <= tolerance, "{what} at {index:?}: got {got}, expected {want}, difference {difference:e}");
    }
}

fn sides(top: usize, bottom: usize, left: usize, right: usize) -> Padding {
    Padding::Sides { top, bottom, left, right }
}

// ---------------------------------------------------------------------------------------------------------- convolution

struct ConvCase {
    why: &'static str,
    x: [usize; 4],
    w: [usize; 4],
    conv: Conv2d,
}

fn check_conv(ConvCase { why, x, w, conv }: &ConvCase) {
    let shape = Conv2dShape::new(*x, *w, conv).unwrap();
    let (xs, ws, bs) = (normal(*x, 1), normal(*w, 2), normal(shape.filters(), 3));
    let dout = normal(shape.out(), 4);
    let out = naive::conv2d_forward(xs.view(), ws.view(), Some(bs.view()), conv).unwrap();
    let grads = naive::conv2d_backward(dout.view(), xs.view(), ws.view(), conv).unwrap();
    check_conv_as::<f64>(why, &shape, conv, [&xs, &ws, &dout], &bs, &out, &grads);
    check_conv_as::<f32>(why, &shape, conv, [&xs, &ws, &dout], &bs, &out, &grads);
}

fn check_conv_as<T: Element>(
    why: &str,
    shape: &Conv2dShape,
    conv: &Conv2d,
    [x, w, dout]: [&Array4<f64>; 3],
    b: &Array1<f64>,
    out: &Array4<f64>,
    grads: &gemmnet::ops::conv::Conv2dGrads<f64>,
) {
    let what = |part| format!("{why}: {} {part} of x {:?}, w {:?}, {conv:?}", T::NAME, shape.x(), shape.w());
    let (x, w, dout, b) = (to::<T, _>(x), to(w), to(dout), to(b));
    let (column, positions) = (shape.column(), shape.images() * shape.out_plane());
    let windows = shape.rows().window() * shape.cols().window() * shape.filters();
    let got = conv2d_forward(x.view(), w.view(), Some(b.view()), conv).unwrap();
    assert_sums(&got, out, column + 1, &what("out"));
    let got = conv2d_backward(dout.view(), x.view(), w.view(), conv).unwrap();
    assert_sums(&got.dx, &grads.dx, windows, &what("dx"));
    assert_sums(&got.dw, &grads.dw, positions, &what("dw"));
    assert_sums(&got.db, &grads.db, positions, &what("db"));
}

#[test]
fn convolution_under_every_stride_padding_dilation_group_and_filter() {
    for stride in [(1, 1), (2, 1), (1, 3), (3, 2)] {
        for padding in [Padding::Valid, Padding::Same, Padding::All(1), Padding::All(2), sides(2, 0, 1, 3)] {
            for dilation in [(1, 1), (2, 1), (1, 3)] {
                for (filters, groups) in [(6, 1), (6, 2), (8, 4)] {
                    for kernel in [(3, 3), (2, 4), (1, 1), (5, 3)] {
                        check_conv(&ConvCase {
                            why: "sweep",
                            x: [2, 4, 9, 11],
                            w: [filters, 4 / groups, kernel.0, kernel.1],
                            conv: Conv2d { stride, padding, dilation, groups, ..Conv2d::default() },
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn convolution_of_special_shapes() {
    let plain = Conv2d::default();
    let same = Conv2d { padding: Padding::Same, ..plain };
    let padded = |pad| Conv2d { padding: Padding::All(pad), ..plain };
    let strided = |s| Conv2d { stride: (s, s), ..plain };
    let far = |s, d| Conv2d { stride: (s, s), dilation: (d, d), ..same };
    let case = |why, x, w, conv| ConvCase { why, x, w, conv };
    for case in [
        case("one image, channel and filter", [1, 1, 5, 5], [1, 1, 3, 3], padded(1)),
        case("one pixel", [1, 1, 1, 1], [2, 1, 1, 1], plain),
        case("one pixel, seen by every cell once", [2, 3, 1, 1], [2, 3, 3, 3], padded(2)),
        case("one row", [2, 3, 1, 17], [2, 3, 1, 3], same),
        case("one column", [2, 3, 17, 1], [2, 3, 3, 1], same),
        case("filter as large as the input", [3, 2, 4, 6], [5, 2, 4, 6], plain),
        case("filter as large as the padded input", [3, 2, 4, 6], [5, 2, 8, 10], padded(2)),
        case("windows in the padding alone", [1, 1, 2, 3], [2, 1, 2, 2], padded(3)),
        case("pointwise: the image is the matrix", [3, 7, 6, 5], [4, 7, 1, 1], plain),
        case("pointwise in groups", [3, 6, 6, 5], [4, 3, 1, 1], Conv2d { groups: 2, ..plain }),
        case("1x1 with a stride is not pointwise", [3, 7, 6, 5], [4, 7, 1, 1], strided(2)),
        case("1x1 with padding is not pointwise", [3, 7, 6, 5], [4, 7, 1, 1], padded(1)),
        case("stride beyond the filter: pixels that nobody sees", [2, 3, 11, 10], [2, 3, 2, 2], strided(4)),
        case("stride beyond the input", [2, 3, 3, 4], [2, 3, 3, 3], strided(9)),
        case("a row and a column that are dropped", [2, 2, 8, 10], [2, 2, 3, 3], strided(2)),
        case("'same' with an even filter", [2, 2, 5, 6], [2, 2, 2, 4], same),
        case("'same' with a stride", [2, 2, 7, 8], [3, 2, 3, 3], Conv2d { stride: (2, 3), ..same }),
        case("output wider than the input", [2, 2, 3, 3], [2, 2, 3, 3], padded(2)),
        case(
            "output wider than a phase",
            [2, 2, 3, 3],
            [2, 2, 3, 3],
            Conv2d { padding: Padding::All(6), ..strided(2) },
        ),
        case("dilation over the edges", [1, 2, 6, 6], [2, 2, 3, 3], Conv2d { dilation: (4, 5), ..padded(5) }),
        case("as many images as dW has slots, and one", [33, 2, 4, 4], [3, 2, 3, 3], same),
        case("images that the slots share unevenly", [75, 1, 3, 5], [2, 1, 2, 2], same),
        case("filters so large that dW has few slots", [6, 256, 3, 3], [256, 256, 3, 3], plain),
        case("four tiles per image in f64, two in f32", [2, 64, 24, 24], [8, 64, 3, 3], same),
        case("a last tile of one row", [1, 64, 13, 24], [8, 64, 3, 3], same),
        case(
            "tiles of enough images to keep an image together",
            [17, 128, 20, 20],
            [4, 128, 3, 3],
            Conv2d { padding: Padding::All(1), ..strided(2) },
        ),
        case("tiles of a pointwise product", [2, 256, 16, 24], [8, 256, 1, 1], plain),
        case("tiles in groups", [1, 128, 24, 24], [4, 64, 3, 3], Conv2d { groups: 2, ..same }),
        case("a tile 1 KiB wide in f64, which is shifted", [2, 2, 16, 8], [3, 2, 3, 3], same),
        case("a tile 1 KiB wide in f32, which is shifted", [2, 2, 16, 16], [3, 2, 3, 3], same),
        case("depthwise, two filters a channel", [2, 5, 9, 9], [10, 1, 3, 3], Conv2d { groups: 5, ..same }),
        case(
            "depthwise, a stride far beyond the image",
            [2, 3, 4, 4],
            [3, 1, 3, 3],
            Conv2d { groups: 3, ..far(99_999, 1) },
        ),
        case(
            "channel by channel, cells far beyond the image",
            [2, 3, 4, 4],
            [3, 1, 3, 3],
            Conv2d { groups: 3, ..far(1, 9999) },
        ),
        case("a stride far beyond the image", [3, 2, 4, 5], [3, 2, 3, 3], far(1_000_000, 1)),
    ] {
        check_conv(&case);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(1),
        ..ProptestConfig::default()
    })]

    #[test]
    fn convolution_of_random_shapes(
        images in 1..4_usize,
        groups in 1..4_usize,
        per_group in (1..4_usize, 1..4_usize),
        size in (1..13_usize, 1..13_usize),
        kernel in (1..6_usize, 1..6_usize),
        stride in (1..5_usize, 1..5_usize),
        dilation in (1..4_usize, 1..4_usize),
        padding in prop_oneof![
            Just(Padding::Valid),
            Just(Padding::Same),
            (0..5_usize).prop_map(Padding::All),
            [0..5_usize, 0..5, 0..5, 0..5].prop_map(|[top, bottom, left, right]| sides(top, bottom, left, right)),
        ],
    ) {
        let (x, w) = ([images, groups * per_group.0, size.0, size.1], [groups * per_group.1, per_group.0, kernel.0, kernel.1]);
        let conv = Conv2d { stride, padding, dilation, groups, ..Conv2d::default() };
        prop_assume!(Conv2dShape::new(x, w, &conv).is_ok());
        check_conv(&ConvCase { why: "random", x, w, conv });
    }

    #[test]
    fn max_pooling_of_random_shapes(
        size in (1..13_usize, 1..13_usize),
        window in (1..6_usize, 1..6_usize),
        stride in (1..6_usize, 1..6_usize),
        padding in prop_oneof![
            Just(Padding::Valid),
            Just(Padding::Same),
            [0..4_usize, 0..4, 0..4, 0..4].prop_map(|[top, bottom, left, right]| sides(top, bottom, left, right)),
        ],
    ) {
        let (x, pool) = ([2, 2, size.0, size.1], Pool2d { window, stride, padding });
        prop_assume!(Pool2dShape::new(x, &pool).is_ok());
        check_max_pool(&ties(x, 1), &pool);
        check_avg_pool(&normal(x, 1), &pool);
    }
}

/// The seed's bench: naive and fast must agree to 1e-9 in its own measure, and `f32` to 1e-4.
#[test]
fn the_seeds_fixtures_agree_within_its_limits() {
    let (x, w, b): (Array4<f64>, Array4<f64>, Array1<f64>) =
        (normal((100, 3, 31, 31), 1), normal((25, 3, 3, 3), 2), normal(25, 3));
    let conv = Conv2d { stride: (2, 2), padding: Padding::All(1), ..Conv2d::default() };
    let dout = normal((100, 25, 16, 16), 4);
    let want = naive::conv2d_forward(x.view(), w.view(), Some(b.view()), &conv).unwrap();
    let want_grads = naive::conv2d_backward(dout.view(), x.view(), w.view(), &conv).unwrap();

    let got = conv2d_forward(x.view(), w.view(), Some(b.view()), &conv).unwrap();
    let grads = conv2d_backward(dout.view(), x.view(), w.view(), &conv).unwrap();
    let errors = [
        ("out", rel_error(&got, &want)),
        ("dx", rel_error(&grads.dx, &want_grads.dx)),
        ("dw", rel_error(&grads.dw, &want_grads.dw)),
        ("db", rel_error(&grads.db, &want_grads.db)),
    ];
    for (part, error) in errors {
        assert!(error <= 1e-9, "conv {part}: {error:e}");
    }

    let (x32, w32, b32, dout32) = (to::<f32, _>(&x), to::<f32, _>(&w), to::<f32, _>(&b), to::<f32, _>(&dout));
    let got = conv2d_forward(x32.view(), w32.view(), Some(b32.view()), &conv).unwrap();
    let grads = conv2d_backward(dout32.view(), x32.view(), w32.view(), &conv).unwrap();
    let errors = [
        ("out", rel_error_norm(&want, &got.mapv(f64::from))),
        ("dx", rel_error_norm(&want_grads.dx, &grads.dx.mapv(f64::from))),
        ("dw", rel_error_norm(&want_grads.dw, &grads.dw.mapv(f64::from))),
        ("db", rel_error_norm(&want_grads.db, &grads.db.mapv(f64::from))),
    ];
    for (part, error) in errors {
        assert!(error <= 1e-4, "conv {part} in f32: {error:e}");
    }

    let x = normal((100, 3, 32, 32), 5);
    let dout = normal((100, 3, 16, 16), 6);
    let (want, argmax) = naive::max_pool2d_forward(x.view(), &Pool2d::square(2)).unwrap();
    let want_dx = naive::max_pool2d_backward(dout.view(), &argmax).unwrap();
    let (got, argmax) = max_pool2d_forward(x.view(), &Pool2d::square(2)).unwrap();
    let dx = max_pool2d_backward(dout.view(), &argmax).unwrap();
    assert_eq!((rel_error(&got, &want), rel_error(&dx, &want_dx)), (0.0, 0.0), "a maximum is copied, not computed");
}

/// What scratch memory and outputs held before must not matter, and gradients that nobody asks for must change nothing.
#[test]
fn convolution_into_used_buffers() {
    let padded = Conv2d { padding: Padding::All(1), ..Conv2d::default() };
    for (x, w, conv) in [
        ([3, 4, 7, 9], [6, 4, 3, 3], padded),
        ([3, 4, 7, 9], [6, 2, 3, 3], Conv2d { groups: 2, stride: (2, 2), ..padded }),
        ([3, 4, 7, 9], [6, 4, 1, 1], Conv2d::default()),
        ([2, 64, 24, 24], [8, 64, 3, 3], padded),
        ([0, 4, 7, 9], [6, 4, 3, 3], padded), // no images: gradients are zero, not what was in memory
    ] {
        let what = format!("x {x:?}, w {w:?}, {conv:?}");
        let shape = Conv2dShape::new(x, w, &conv).unwrap();
        let (x, w, b) = (normal(x, 1), normal(w, 2), normal(shape.filters(), 3));
        let dout = normal(shape.out(), 4);
        let want = conv2d_forward(x.view(), w.view(), Some(b.view()), &conv).unwrap();
        let want_grads = conv2d_backward(dout.view(), x.view(), w.view(), &conv).unwrap();
        assert!(want_grads.dw.iter().all(|v| v.is_finite()));

        let plan = ConvPlan::new::<f64>(&shape).unwrap();
        let mut ws = poisoned_workspace();
        let (x, w, dout) = (x.as_slice().unwrap(), w.as_slice().unwrap(), dout.as_slice().unwrap());
        let nan = |len| vec![f64::NAN; len];
        let mut out = nan(dout.len());
        conv2d_forward_into(&plan, shape.images(), x, Filters::Plain(w), b.as_slice(), &mut out, &mut ws);
        assert_eq!(out, want.as_slice().unwrap(), "{what}");

        for wants_dx in [true, false] {
            let mut ws = poisoned_workspace();
            let (mut dx, mut dw, mut db) = (nan(x.len()), nan(w.len()), nan(shape.filters()));
            let dx_asked = if wants_dx { Some(&mut dx[..]) } else { None };
            let grads = ConvGradsMut { dx: dx_asked, dw: Some(&mut dw), db: Some(&mut db) };
            conv2d_backward_into(&plan, dout, ConvInput { images: shape.images(), x, w }, grads, &mut ws);
            assert_eq!(dw, want_grads.dw.as_slice().unwrap(), "{what}: dw");
            assert_eq!(db, want_grads.db.as_slice().unwrap(), "{what}: db");
            if wants_dx {
                assert_eq!(dx, want_grads.dx.as_slice().unwrap(), "{what}: dx");
            }
        }
    }
}

/// A workspace whose arenas hold NaN.
fn poisoned_workspace() -> Workspace {
    const LEN: usize = 1 << 20;
    let mut ws = Workspace::new();
    let (shared, scratch) = ws.lend(LEN, LEN);
    shared.fill(f64::NAN);
    rayon::broadcast(|_| scratch.with(|arena: &mut [f64]| arena.fill(f64::NAN)));
    ws
}

/// A NaN in the input or in dout reaches exactly what depends on it.
#[test]
fn convolution_of_nan() {
    let conv = Conv2d { padding: Padding::All(1), stride: (2, 1), ..Conv2d::default() };
    let (mut x, w) = (normal((2, 2, 6, 6), 1), normal((3, 2, 3, 3), 2));
    x[[1, 0, 2, 3]] = f64::NAN;
    let mut dout = normal((2, 3, 3, 6), 3);
    dout[[0, 1, 1, 2]] = f64::NAN;
    let nan = |values: &Array4<f64>| values.mapv(f64::is_nan);
    let want = nan(&naive::conv2d_forward(x.view(), w.view(), None, &conv).unwrap());
    assert_eq!(nan(&conv2d_forward(x.view(), w.view(), None, &conv).unwrap()), want);
    let want = naive::conv2d_backward(dout.view(), x.view(), w.view(), &conv).unwrap();
    let got = conv2d_backward(dout.view(), x.view(), w.view(), &conv).unwrap();
    assert_eq!((nan(&got.dx), nan(&got.dw)), (nan(&want.dx), nan(&want.dw)));
    assert_eq!(got.db.mapv(f64::is_nan), array![false, true, false]);
}

// -------------------------------------------------------------------------------------------------------------- pooling

/// Values and cells are equal; gradients are, but for the order in which overlapping windows add up.
fn check_max_pool(x: &Array4<f64>, pool: &Pool2d) {
    let what = format!("x {:?}, {pool:?}", x.shape());
    let (want, argmax) = naive::max_pool2d_forward(x.view(), pool).unwrap();
    let dout = normal(want.dim(), 9);
    let want_dx = naive::max_pool2d_backward(dout.view(), &argmax).unwrap();
    let bits = |values: &Array4<f64>| values.mapv(f64::to_bits);

    let (out, got_argmax) = max_pool2d_forward(x.view(), pool).unwrap();
    assert_eq!((bits(&out), &got_argmax), (bits(&want), &argmax), "{what}");
    let dx = max_pool2d_backward(dout.view(), &got_argmax).unwrap();
    assert_twins(&dx, &want_dx, pool.window.0 * pool.window.1, 1.0, &what);

    let (out, got_argmax) = max_pool2d_forward(to::<f32, _>(x).view(), pool).unwrap();
    assert_eq!((bits(&out.mapv(f64::from)), &got_argmax), (bits(&want), &argmax), "{what} in f32");
    let dx = max_pool2d_backward(to::<f32, _>(&dout).view(), &got_argmax).unwrap();
    assert_twins(&dx, &want_dx, pool.window.0 * pool.window.1, 1.0, &what);
}

fn check_avg_pool(x: &Array4<f64>, pool: &Pool2d) {
    let what = format!("average, x {:?}, {pool:?}", x.shape());
    let (shape, cells) = (x.dim().into(), pool.window.0 * pool.window.1);
    let want = naive::avg_pool2d_forward(x.view(), pool).unwrap();
    let dout = normal(want.dim(), 9);
    let want_dx = naive::avg_pool2d_backward(dout.view(), shape, pool).unwrap();
    assert_twins(&avg_pool2d_forward(x.view(), pool).unwrap(), &want, cells, 1.0, &what);
    assert_twins(&avg_pool2d_backward(dout.view(), shape, pool).unwrap(), &want_dx, cells, 1.0, &what);
    assert_twins(&avg_pool2d_forward(to::<f32, _>(x).view(), pool).unwrap(), &want, cells, 1.0, &what);
    let dx = avg_pool2d_backward(to::<f32, _>(&dout).view(), shape, pool).unwrap();
    assert_twins(&dx, &want_dx, cells, 1.0, &what);
}

#[test]
fn pooling_with_every_window_stride_and_padding() {
    let mut checked = 0;
    for window in [(2, 2), (3, 3), (3, 2), (1, 1), (1, 4), (4, 4)] {
        for stride in [(1, 1), (2, 2), (2, 1), (3, 3), (1, 4), (5, 2)] {
            for padding in [Padding::Valid, Padding::Same, Padding::All(1), sides(1, 0, 0, 1)] {
                let pool = Pool2d { window, stride, padding };
                for x in [[2, 3, 12, 12], [1, 1, 5, 7], [3, 1, 4, 3], [2, 2, 1, 4]] {
                    // Windows that do not fit, and padding that a window could lie in, are errors: see `shape`.
                    if Pool2dShape::new(x, &pool).is_ok() {
                        check_max_pool(&normal(x, 1), &pool);
                        check_max_pool(&ties(x, 2), &pool);
                        check_max_pool(&with_extremes(normal(x, 3)), &pool);
                        check_avg_pool(&normal(x, 4), &pool);
                        checked += 1;
                    }
                }
            }
        }
    }
    assert!(checked > 300, "{checked} cases fit");
}

/// Every fifth value NaN, every seventh an infinity.
fn with_extremes(mut x: Array4<f64>) -> Array4<f64> {
    for (i, x) in x.iter_mut().enumerate() {
        match i % 35 {
            0 | 5 | 10 | 15 | 20 | 25 | 30 => *x = f64::NAN,
            7 | 14 => *x = f64::NEG_INFINITY,
            21 | 28 => *x = f64::INFINITY,
            _ => {}
        }
    }
    x
}

#[test]
fn pooling_of_special_shapes() {
    let window = |window, stride| Pool2d { window, stride, padding: Padding::Valid };
    // (x, pool): windows of 255 cells whose maximum is the last one, planes larger than a piece of work, and planes so
    // small that several pieces share them.
    for (shape, pool) in [
        ([1, 1, 15, 17], window((15, 17), (15, 17))),
        ([1, 2, 30, 34], window((15, 17), (15, 17))),
        ([1, 1, 17, 18], window((15, 17), (1, 1))),
        ([1, 2, 200, 200], Pool2d::square(2)),
        ([1, 2, 199, 201], window((3, 3), (2, 2))),
        ([60, 40, 4, 4], Pool2d::square(2)),
        ([60, 40, 4, 4], window((3, 3), (1, 1))),
        ([0, 3, 4, 4], Pool2d::square(2)),
    ] {
        let len: usize = shape.iter().product();
        let rising = Array::from_iter((0..len).map(|i| i as f64)).into_shape_with_order(shape).unwrap();
        check_max_pool(&rising, &pool);
        check_max_pool(&ties(shape, 1), &pool);
        check_avg_pool(&normal(shape, 1), &pool);
    }
}

#[test]
fn global_average_pooling() {
    for shape in [[2, 3, 4, 5], [1, 1, 1, 1], [60, 40, 4, 4], [2, 2, 200, 200], [0, 2, 3, 3]] {
        let (x, dout) = (normal(shape, 1), normal((shape[0], shape[1]), 2));
        let (want, want_dx) =
            (naive::global_avg_pool_forward(x.view()), naive::global_avg_pool_backward(dout.view(), shape).unwrap());
        let (terms, what) = (shape[2] * shape[3], format!("{shape:?}"));
        assert_twins(&global_avg_pool_forward(x.view()), &want, terms, 1.0, &what);
        assert_twins(&global_avg_pool_forward(to::<f32, _>(&x).view()), &want, terms, 4.0, &what);
        assert_twins(&global_avg_pool_backward(dout.view(), shape).unwrap(), &want_dx, 1, 1.0, &what);
        let dout = to::<f32, _>(&dout);
        assert_twins(&global_avg_pool_backward(dout.view(), shape).unwrap(), &want_dx, 1, 1.0, &what);
    }
    let nothing = Array4::<f32>::zeros((2, 3, 0, 4));
    assert!(naive::global_avg_pool_forward(nothing.view()).iter().all(|mean| mean.is_nan()));
    assert!(global_avg_pool_forward(nothing.view()).iter().all(|mean| mean.is_nan()), "nothing has no mean");
}

// ------------------------------------------------------------------------------------------------------------ batchnorm

/// Values around 12 with deviation 5: the mean must be taken out before the squares are summed.
fn spread<Sh: ShapeBuilder>(shape: Sh, seed: u64) -> Array<f64, Sh::Dim> {
    (5.0 * normal(shape, seed) + 12.0).mapv(|v| f64::from(v as f32))
}

macro_rules! batchnorm_against_twin {
    ($name:ident, $shape:ty, $forward:ident, $backward:ident) => {
        fn $name<T: Element>(shape: $shape) {
            let channels = shape[1];
            let (x, dout) = (spread(shape, 1), normal(shape, 2));
            let (gamma, beta) = (normal(channels, 3), normal(channels, 4));
            let config = BatchNorm::default();
            let samples = x.len() / channels;
            let what = |part| format!("{} {part} of {shape:?}", T::NAME);

            let want = naive::$forward(x.view(), gamma.view(), beta.view(), config.eps).unwrap();
            let want_grads = naive::$backward(dout.view(), x.view(), gamma.view(), config.eps).unwrap();
            let (x, dout, gamma, beta) = (to::<T, _>(&x), to::<T, _>(&dout), to::<T, _>(&gamma), to::<T, _>(&beta));
            let mut running = Statistics::new(channels);
            let (out, cache) =
                $forward(x.view(), gamma.view(), beta.view(), &mut running, Mode::Train, &config).unwrap();
            // x - mean loses some digits of x.
            assert_twins(&out, &want, samples, 4.0, &what("out"));
            let grads = $backward(dout.view(), x.view(), gamma.view(), &cache).unwrap();
            assert_twins(&grads.dx, &want_grads.dx, samples, 8.0, &what("dx"));
            assert_twins(&grads.dgamma, &want_grads.dgamma, samples, 8.0, &what("dgamma"));
            assert_twins(&grads.dbeta, &want_grads.dbeta, samples, 8.0, &what("dbeta"));
        }
    };
}
batchnorm_against_twin!(check_plain_batchnorm, [usize; 2], batchnorm_forward, batchnorm_backward);
batchnorm_against_twin!(check_spatial_batchnorm, [usize; 4], spatial_batchnorm_forward, spatial_batchnorm_backward);

#[test]
fn batchnorm_in_training() {
    // Features around the 64 that a piece takes. Not 2 samples: there dx is all cancellation.
    for features in [1, 63, 64, 65, 130] {
        for samples in [1, 3, 20, 100] {
            check_plain_batchnorm::<f64>([samples, features]);
            check_plain_batchnorm::<f32>([samples, features]);
        }
    }
    // Planes around the 16 lanes of a sum and the 256 of a block; planes of one pixel take the plain way.
    for shape in [[2, 3, 4, 5], [1, 1, 3, 3], [5, 2, 1, 17], [3, 1, 16, 16], [2, 70, 17, 19], [20, 65, 1, 1]] {
        check_spatial_batchnorm::<f64>(shape);
        check_spatial_batchnorm::<f32>(shape);
    }
}

/// From 8 MiB on, outputs are written past the caches. Rows of 65 pixels: few planes begin where a cache line does.
#[test]
fn outputs_larger_than_the_caches() {
    let (x, conv) = ([520, 1, 64, 65], Conv2d { padding: Padding::Same, ..Conv2d::default() });
    check_conv(&ConvCase { why: "a large output", x, w: [1, 1, 3, 3], conv });
    check_spatial_batchnorm::<f32>([130, 4, 64, 65]);
    check_spatial_batchnorm::<f64>([65, 4, 64, 65]);
}

/// The forms on the caller's buffers against those that make their own.
#[test]
fn spatial_batchnorm_into_used_buffers() {
    let (shape, config) = ([4, 3, 5, 6], BatchNorm::default());
    let (x, dout, gamma, beta) = (normal(shape, 1), normal(shape, 2), normal(3, 3), normal(3, 4));
    let mut running = [Statistics::new(3), Statistics::new(3)];
    let (want, cache) =
        spatial_batchnorm_forward(x.view(), gamma.view(), beta.view(), &mut running[0], Mode::Train, &config).unwrap();
    let want_grads = spatial_batchnorm_backward(dout.view(), x.view(), gamma.view(), &cache).unwrap();

    let [x, dout] = [&x, &dout].map(|a| a.as_slice().unwrap());
    let [gamma, beta] = [&gamma, &beta].map(|a| a.as_slice().unwrap());
    let (mut out, mut dx) = (vec![f64::NAN; x.len()], vec![f64::NAN; x.len()]);
    let (mut dgamma, mut dbeta, mut batch) = ([f64::NAN; 3], [f64::NAN; 3], Statistics::new(3));
    let running = &mut running[1];
    let parameters = ScaleShift { gamma, beta };
    spatial_batchnorm_forward_into(shape, x, parameters, running, &config, &mut out, &mut batch).unwrap();
    let grads = NormGradsMut { dx: &mut dx, dgamma: &mut dgamma, dbeta: &mut dbeta };
    spatial_batchnorm_backward_into(shape, dout, x, batch.norm(gamma, &config), grads);
    assert_eq!((&out[..], &batch), (want.as_slice().unwrap(), &cache.statistics));
    assert_eq!(&dx[..], want_grads.dx.as_slice().unwrap());
    assert_eq!(
        (&dgamma[..], &dbeta[..]),
        (want_grads.dgamma.as_slice().unwrap(), want_grads.dbeta.as_slice().unwrap())
    );
}

/// Acceptance: normalised channels have mean beta and deviation gamma.
#[test]
fn spatial_batchnorm_normalises() {
    let x = 4.0 * random_array::<f64, _>((2, 3, 4, 5), 1) + 10.0;
    let (gamma, beta) = (array![3.0, 4.0, 5.0], array![6.0, 7.0, 8.0]);
    let mut running = Statistics::new(3);
    let train = |gamma: ArrayView1<f64>, beta: ArrayView1<f64>, running: &mut Statistics<f64>| {
        spatial_batchnorm_forward(x.view(), gamma, beta, running, Mode::Train, &BatchNorm::default()).unwrap().0
    };
    for (gamma, beta) in [(array![1.0, 1.0, 1.0], array![0.0, 0.0, 0.0]), (gamma, beta)] {
        let out = train(gamma.view(), beta.view(), &mut running);
        for c in 0..3 {
            let channel = out.slice(s![.., c, .., ..]);
            let (mean, std) = (channel.mean().unwrap(), channel.std(0.0));
            assert!((mean - beta[c]).abs() <= 1e-14, "mean {mean:e}, expected {}", beta[c]);
            assert!((std - gamma[c]).abs() <= 1e-5, "deviation {std}, expected {}", gamma[c]);
        }
    }
}

#[test]
fn running_statistics_and_test_mode() {
    let (gamma, beta) = (normal(3, 3), normal(3, 4));
    let config = BatchNorm { eps: 1e-3, momentum: 0.8 };
    let mut running = Statistics::new(3);
    let (mut mean, mut var) = (Array1::zeros(3), Array1::ones(3));
    for step in 0..4 {
        let x = spread((2 + step, 3, 4, 5), step as u64);
        for c in 0..3 {
            let channel = x.slice(s![.., c, .., ..]);
            mean[c] = 0.8 * mean[c] + 0.2 * channel.mean().unwrap();
            var[c] = 0.8 * var[c] + 0.2 * channel.var(0.0);
        }
        spatial_batchnorm_forward(x.view(), gamma.view(), beta.view(), &mut running, Mode::Train, &config).unwrap();
        assert_close(&Array1::from(running.mean.clone()), &mean, F64, 100, "running mean");
        assert_close(&Array1::from(running.var.clone()), &var, F64, 100, "running variance");
    }

    let before = running.clone();
    let (x, dout) = (spread((2, 3, 4, 5), 9), normal((2, 3, 4, 5), 10));
    let (out, cache) =
        spatial_batchnorm_forward(x.view(), gamma.view(), beta.view(), &mut running, Mode::Test, &config).unwrap();
    assert_eq!(running, before, "test mode leaves the running statistics alone");
    let xhat = Array4::from_shape_fn(x.dim(), |i| (x[i] - mean[i.1]) / (var[i.1] + 1e-3).sqrt());
    let want = Array4::from_shape_fn(x.dim(), |i| gamma[i.1] * xhat[i] + beta[i.1]);
    assert_close(&out, &want, F64, 10, "test mode");
    // The statistics are constants now, so dx is a scaling of dout.
    let grads = spatial_batchnorm_backward(dout.view(), x.view(), gamma.view(), &cache).unwrap();
    let want = Array4::from_shape_fn(x.dim(), |i| dout[i] * gamma[i.1] / (var[i.1] + 1e-3).sqrt());
    assert_close(&grads.dx, &want, F64, 10, "dx in test mode");
    let per_channel = |values: &Array4<f64>| Array1::from_shape_fn(3, |c| values.slice(s![.., c, .., ..]).sum());
    assert_close(&grads.dgamma, &per_channel(&(&dout * &xhat)), F64, 40, "dgamma in test mode");
    assert_close(&grads.dbeta, &per_channel(&dout), F64, 40, "dbeta in test mode");

    // The plain form takes another path; one sample is a batch too, in test mode.
    let rows = spread((1, 3), 11);
    let (out, cache) =
        batchnorm_forward(rows.view(), gamma.view(), beta.view(), &mut running, Mode::Test, &config).unwrap();
    let want =
        Array2::from_shape_fn((1, 3), |(_, c)| gamma[c] * (rows[[0, c]] - mean[c]) / (var[c] + 1e-3).sqrt() + beta[c]);
    assert_close(&out, &want, F64, 10, "plain test mode");
    let grads = batchnorm_backward(rows.view(), rows.view(), gamma.view(), &cache).unwrap();
    let want = Array2::from_shape_fn((1, 3), |(_, c)| rows[[0, c]] * gamma[c] / (var[c] + 1e-3).sqrt());
    assert_close(&grads.dx, &want, F64, 10, "plain dx in test mode");
}

// --------------------------------------------------------------------------------------------------------------- affine

fn check_affine<T: Element>(samples: usize, inputs: usize, outputs: usize) {
    let what = |part| format!("{} {part} of {samples}x{inputs}x{outputs}", T::NAME);
    let (x, w) = (normal((samples, inputs), 1), normal((inputs, outputs), 2));
    let (b, dout) = (normal(outputs, 3), normal((samples, outputs), 4));
    let want = naive::affine_forward(x.view(), w.view(), Some(b.view())).unwrap();
    let want_grads = naive::affine_backward(dout.view(), x.view(), w.view()).unwrap();
    let (x, w, b, dout) = (to::<T, _>(&x), to::<T, _>(&w), to::<T, _>(&b), to::<T, _>(&dout));
    assert_sums(&affine_forward(x.view(), w.view(), Some(b.view())).unwrap(), &want, inputs + 1, &what("out"));
    let grads = affine_backward(dout.view(), x.view(), w.view()).unwrap();
    assert_sums(&grads.dx, &want_grads.dx, outputs, &what("dx"));
    assert_sums(&grads.dw, &want_grads.dw, samples, &what("dw"));
    assert_sums(&grads.db, &want_grads.db, samples, &what("db"));
}

#[test]
fn affine_layers() {
    for (samples, inputs, outputs) in [
        (3, 5, 4),
        (1, 1, 1),
        (64, 300, 70),   // large enough to be cut
        (300, 40, 50),   // more than 256 samples: rows are cut too
        (513, 33, 17),   // a last piece of one row; sizes that are no whole cache lines
        (600, 500, 1),   // one output, so no columns to cut
        (2, 1, 200_000), // one input
        (1, 3000, 100),  // one sample
        (0, 3, 4),       // nothing
        (3, 0, 4),       // out = b
        (3, 4, 0),
        (3, 0, 40), // the same in several panels, if the product is our own (with AVX-512, without OpenBLAS' kernels for it)
        (3, 40, 0),
        (0, 40, 40),
        (0, 2000, 40), // and in several pieces
    ] {
        check_affine::<f64>(samples, inputs, outputs);
        check_affine::<f32>(samples, inputs, outputs);
    }
}

#[test]
fn an_affine_layer_sets_only_what_is_asked_for() {
    let (x, w, dout) = (normal((5, 7), 1), normal((7, 3), 2), normal((5, 3), 3));
    let want = affine_backward(dout.view(), x.view(), w.view()).unwrap();
    let shape = AffineShape { samples: 5, inputs: 7, outputs: 3 };
    let (x, w, dout) = (x.as_slice().unwrap(), w.as_slice().unwrap(), dout.as_slice().unwrap());
    for asked in 0..8 {
        let (mut dx, mut dw, mut db) = ([f64::NAN; 35], [f64::NAN; 21], [f64::NAN; 3]);
        affine_backward_into(
            &shape,
            dout,
            x,
            w,
            AffineGradsMut {
                dx: (asked & 1 > 0).then_some(&mut dx),
                dw: (asked & 2 > 0).then_some(&mut dw),
                db: (asked & 4 > 0).then_some(&mut db),
            },
            &mut Workspace::new(),
        );
        for (bit, got, want) in [(1, &dx[..], &want.dx), (2, &dw[..], &want.dw)] {
            let set = if asked & bit > 0 { got == want.as_slice().unwrap() } else { got.iter().all(|v| v.is_nan()) };
            assert!(set, "gradient {bit} of {asked}: {got:?}");
        }
        assert!(if asked & 4 > 0 { db == want.db.as_slice().unwrap() } else { db.iter().all(|v| v.is_nan()) });
    }
}

// --------------------------------------------------------------------------------------------------------------- losses

type Loss<T> = Result<(T, Array2<T>)>;

/// Losses agree, and so do gradients; where one is NaN or infinite, so is the other.
fn check_loss<T: Element>(got: Loss<T>, want: Loss<f64>, what: &str) {
    let ((loss, dscores), (want, want_dscores)) = (got.unwrap(), want.unwrap());
    let loss = loss.f64();
    assert!(
        (loss.is_nan() && want.is_nan())
            || loss == want
            || (loss - want).abs() <= (if T::NAME == "f64" { 1e-13 } else { F32 }) * want.abs().max(1.0),
        "{what}: {} loss {loss}, expected {want}",
        T::NAME
    );
    if want_dscores.iter().all(|d| d.is_finite()) {
        assert_twins(&dscores, &want_dscores, want_dscores.ncols(), 1.0, what);
    } else {
        assert_eq!(dscores.mapv(T::is_nan), want_dscores.mapv(f64::is_nan), "{what}");
    }
}

#[test]
fn losses() {
    for (samples, classes) in [(5, 4), (1, 10), (64, 10), (3, 1), (2, 1000)] {
        let labels: Vec<usize> = (0..samples).map(|n| n * 7 % classes).collect();
        for scale in [1.0, 100.0] {
            let scores = (scale * normal((samples, classes), 1)).mapv(|v| f64::from(v as f32));
            let scores32 = to::<f32, _>(&scores);
            for smoothing in [0.0, 0.1, 1.0] {
                let what = format!("softmax {samples}x{classes}, scale {scale}, smoothing {smoothing}");
                let want = || naive::softmax_cross_entropy(scores.view(), &labels, smoothing);
                check_loss(softmax_cross_entropy(scores.view(), &labels, smoothing), want(), &what);
                check_loss(softmax_cross_entropy(scores32.view(), &labels, smoothing), want(), &what);
            }
            let what = format!("svm {samples}x{classes}, scale {scale}");
            let want = || naive::svm_hinge(scores.view(), &labels);
            check_loss(svm_hinge(scores.view(), &labels), want(), &what);
            check_loss(svm_hinge(scores32.view(), &labels), want(), &what);
        }
    }
}

/// A network that diverged must show in the loss, whatever its scores became.
#[test]
fn losses_of_ties_and_of_scores_that_are_not_finite() {
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    for (what, scores) in [
        ("margins of exactly 0 and 1", array![[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]),
        ("NaN", array![[0.0, nan, 1.0], [0.0, 0.0, 0.0]]),
        ("NaN for the label", array![[nan, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        ("infinite", array![[0.0, inf, 1.0], [0.0, 0.0, 0.0]]),
        ("infinite for the label", array![[inf, 1.0, 0.0], [0.0, 0.0, 0.0]]),
        ("infinite for all", array![[inf, inf, inf], [0.0, 0.0, 0.0]]),
        ("minus infinity", array![[0.0, -inf, 1.0], [0.0, 0.0, 0.0]]),
        ("minus infinity for the label", array![[-inf, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        ("minus infinity for all", array![[-inf, -inf, -inf], [0.0, 0.0, 0.0]]),
    ] {
        let labels = [0, 1];
        for smoothing in [0.0, 0.1] {
            let want = naive::softmax_cross_entropy(scores.view(), &labels, smoothing);
            check_loss(softmax_cross_entropy(scores.view(), &labels, smoothing), want, &format!("softmax, {what}"));
        }
        check_loss(
            svm_hinge(scores.view(), &labels),
            naive::svm_hinge(scores.view(), &labels),
            &format!("svm, {what}"),
        );
    }
}

// ---------------------------------------------------------------------------------------------------------- all of them

/// The same values in another order in memory: use its transpose.
fn columns_first<T: Element, D: Dimension>(x: &Array<T, D>) -> Array<T, D> {
    x.t().as_standard_layout().into_owned()
}

/// The same values as every second, backwards, of a wider array.
fn backwards(x: &Array4<f64>) -> Array4<f64> {
    let (n, c, h, w) = x.dim();
    let mut wide = Array4::from_elem((n, c, h, 2 * w), f64::NAN);
    wide.slice_mut(s![.., .., ..;-1, ..;-2]).assign(x);
    wide
}

#[test]
fn layouts_of_the_input_do_not_matter() {
    let conv = Conv2d { padding: Padding::All(1), stride: (2, 1), ..Conv2d::default() };
    let (x, w, dout) = (normal((2, 3, 6, 5), 1), normal((4, 3, 3, 3), 2), normal((2, 4, 3, 5), 3));
    let (xt, wt, dt) = (columns_first(&x), columns_first(&w), columns_first(&dout));
    let (xb, wb, db) = (backwards(&x), backwards(&w), backwards(&dout));
    let b = normal(8, 4);
    let (spaced, packed) = (b.slice(s![..;-2]), b.slice(s![..;-2]).to_owned());
    let back = s![.., .., ..;-1, ..;-2];
    let want = conv2d_forward(x.view(), w.view(), Some(packed.view()), &conv).unwrap();
    assert_eq!(conv2d_forward(xt.t(), wt.t(), Some(spaced), &conv).unwrap(), want);
    assert_eq!(conv2d_forward(xb.slice(back), wb.slice(back), Some(spaced), &conv).unwrap(), want);
    let want = conv2d_backward(dout.view(), x.view(), w.view(), &conv).unwrap();
    assert_eq!(conv2d_backward(dt.t(), xt.t(), wt.t(), &conv).unwrap(), want);
    assert_eq!(conv2d_backward(db.slice(back), xb.slice(back), wb.slice(back), &conv).unwrap(), want);

    for pool in [
        Pool2d { window: (2, 5), stride: (2, 5), padding: Padding::Valid },
        Pool2d { stride: (1, 1), ..Pool2d::square(3) },
    ] {
        let (want, argmax) = max_pool2d_forward(x.view(), &pool).unwrap();
        assert_eq!(max_pool2d_forward(xt.t(), &pool).unwrap(), (want.clone(), argmax.clone()));
        assert_eq!(max_pool2d_forward(xb.slice(back), &pool).unwrap(), (want.clone(), argmax.clone()));
        let pooled = normal(want.dim(), 5);
        let other = columns_first(&pooled);
        assert_eq!(
            max_pool2d_backward(other.t(), &argmax).unwrap(),
            max_pool2d_backward(pooled.view(), &argmax).unwrap()
        );
        assert_eq!(avg_pool2d_forward(xt.t(), &pool).unwrap(), avg_pool2d_forward(x.view(), &pool).unwrap());
        let shape = x.dim().into();
        assert_eq!(
            avg_pool2d_backward(other.t(), shape, &pool).unwrap(),
            avg_pool2d_backward(pooled.view(), shape, &pool).unwrap()
        );
    }
    assert_eq!(global_avg_pool_forward(xt.t()), global_avg_pool_forward(x.view()));

    let (mut running, mut other) = (Statistics::new(3), Statistics::new(3));
    let (gamma, beta) = (packed.slice(s![..3]), packed.slice(s![1..]));
    let wide = normal(6, 6);
    let mut spaced = wide.clone();
    spaced.slice_mut(s![..;2]).assign(&gamma);
    let config = BatchNorm::default();
    let (want, cache) = spatial_batchnorm_forward(x.view(), gamma, beta, &mut running, Mode::Train, &config).unwrap();
    let got =
        spatial_batchnorm_forward(xt.t(), spaced.slice(s![..;2]), beta, &mut other, Mode::Train, &config).unwrap().0;
    assert_eq!((got, other), (want, running));
    assert_eq!(
        spatial_batchnorm_backward(xt.t(), xb.slice(back), spaced.slice(s![..;2]), &cache).unwrap(),
        spatial_batchnorm_backward(x.view(), x.view(), gamma, &cache).unwrap()
    );

    let (rows, matrix, drows) = (normal((5, 3), 7), normal((3, 4), 8), normal((5, 4), 9));
    let (rt, mt, drt) = (columns_first(&rows), columns_first(&matrix), columns_first(&drows));
    let want = affine_forward(rows.view(), matrix.view(), Some(packed.view())).unwrap();
    assert_eq!(affine_forward(rt.t(), mt.t(), Some(packed.view())).unwrap(), want);
    let want = affine_backward(drows.view(), rows.view(), matrix.view()).unwrap();
    assert_eq!(affine_backward(drt.t(), rt.t(), mt.t()).unwrap(), want);
    let (mut running, mut other) = (Statistics::new(3), Statistics::new(3));
    let (want, cache) = batchnorm_forward(rows.view(), gamma, beta, &mut running, Mode::Train, &config).unwrap();
    assert_eq!(batchnorm_forward(rt.t(), gamma, beta, &mut other, Mode::Train, &config).unwrap().0, want);
    assert_eq!(
        batchnorm_backward(rt.t(), rt.t(), gamma, &cache).unwrap(),
        batchnorm_backward(rows.view(), rows.view(), gamma, &cache).unwrap()
    );
    let labels = [0, 2, 1, 0, 2];
    assert_eq!(
        softmax_cross_entropy(rt.t(), &labels, 0.1).unwrap(),
        softmax_cross_entropy(rows.view(), &labels, 0.1).unwrap()
    );
    assert_eq!(svm_hinge(rt.t(), &labels).unwrap(), svm_hinge(rows.view(), &labels).unwrap());
}

/// The bits of every fast operation's results, in `f32`.
fn all_bits() -> Vec<Vec<u32>> {
    let mut results = Vec::new();
    let mut keep = |values: &[f32]| results.push(values.iter().map(|v| v.to_bits()).collect());
    for (x, w, conv) in [
        // Many images; few images of several tiles; strides and groups.
        ([40, 3, 9, 9], [5, 3, 3, 3], Conv2d { padding: Padding::All(1), ..Conv2d::default() }),
        ([3, 64, 24, 24], [8, 64, 3, 3], Conv2d { padding: Padding::Same, ..Conv2d::default() }),
        ([9, 4, 9, 9], [6, 2, 3, 3], Conv2d { stride: (2, 2), groups: 2, ..Conv2d::default() }),
    ] {
        let shape = Conv2dShape::new(x, w, &conv).unwrap();
        let (x, w, b): (Array4<f32>, Array4<f32>, Array1<f32>) =
            (random_array(x, 1), random_array(w, 2), random_array(shape.filters(), 3));
        let dout: Array4<f32> = random_array(shape.out(), 4);
        keep(conv2d_forward(x.view(), w.view(), Some(b.view()), &conv).unwrap().as_slice().unwrap());
        let grads = conv2d_backward(dout.view(), x.view(), w.view(), &conv).unwrap();
        keep(grads.dx.as_slice().unwrap());
        keep(grads.dw.as_slice().unwrap());
        keep(grads.db.as_slice().unwrap());
    }
    let x: Array4<f32> = random_array((60, 40, 6, 6), 5);
    for pool in [Pool2d::square(2), Pool2d { stride: (1, 1), ..Pool2d::square(3) }] {
        let (out, argmax) = max_pool2d_forward(x.view(), &pool).unwrap();
        keep(out.as_slice().unwrap());
        keep(max_pool2d_backward(out.view(), &argmax).unwrap().as_slice().unwrap());
        keep(avg_pool2d_forward(x.view(), &pool).unwrap().as_slice().unwrap());
        keep(avg_pool2d_backward(out.view(), x.dim().into(), &pool).unwrap().as_slice().unwrap());
    }
    keep(global_avg_pool_forward(x.view()).as_slice().unwrap());
    let config = BatchNorm::default();
    let gamma: Array1<f32> = random_array(200, 6);
    let mut running = Statistics::new(40);
    let part = gamma.slice(s![..40]);
    let (out, cache) = spatial_batchnorm_forward(x.view(), part, part, &mut running, Mode::Train, &config).unwrap();
    let grads = spatial_batchnorm_backward(out.view(), x.view(), part, &cache).unwrap();
    for values in [&out, &grads.dx] {
        keep(values.as_slice().unwrap());
    }
    keep(&running.var);
    keep(grads.dgamma.as_slice().unwrap());
    let (x, w): (Array2<f32>, Array2<f32>) = (random_array((300, 200), 7), random_array((200, 100), 8));
    let mut running = Statistics::new(200);
    let (out, cache) =
        batchnorm_forward(x.view(), gamma.view(), gamma.view(), &mut running, Mode::Train, &config).unwrap();
    let grads = batchnorm_backward(out.view(), x.view(), gamma.view(), &cache).unwrap();
    for values in [&out, &grads.dx] {
        keep(values.as_slice().unwrap());
    }
    keep(grads.dgamma.as_slice().unwrap());
    let out = affine_forward(x.view(), w.view(), None).unwrap();
    let grads = affine_backward(out.view(), x.view(), w.view()).unwrap();
    for values in [&out, &grads.dx, &grads.dw] {
        keep(values.as_slice().unwrap());
    }
    keep(grads.db.as_slice().unwrap());
    results
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let want = with_threads(1, all_bits).unwrap();
    for threads in [2, 5] {
        let got = with_threads(threads, all_bits).unwrap();
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!(got == want, "result {i} differs with {threads} threads");
        }
    }
}

/// Callers' mistakes come back as values that name the argument, what came and what was expected.
#[test]
fn mistakes_are_errors() {
    let conv = Conv2d::default();
    let (x, w) = (Array4::<f32>::zeros((2, 3, 5, 5)), Array4::zeros((4, 3, 3, 3)));
    let (four, three) = (Array1::<f32>::zeros(4), Array1::<f32>::zeros(3));
    let (rows, matrix) = (Array2::<f32>::zeros((2, 3)), Array2::<f32>::zeros((3, 4)));
    let mut running = Statistics::new(3);
    let config = BatchNorm::default();
    let (_, argmax) = max_pool2d_forward(x.view(), &Pool2d::square(2)).unwrap();
    let (_, cache) =
        batchnorm_forward(rows.view(), three.view(), three.view(), &mut running, Mode::Train, &config).unwrap();
    let wide = Pool2d { window: (16, 16), stride: (1, 1), padding: Padding::All(15) };
    let plain = |x: &Array2<f32>, gamma: &Array1<f32>, beta: &Array1<f32>, config: BatchNorm| {
        batchnorm_forward(x.view(), gamma.view(), beta.view(), &mut Statistics::new(3), Mode::Train, &config).err()
    };
    let table: Vec<(Option<Error>, &str)> = vec![
        (conv2d_forward(x.view(), w.view(), Some(three.view()), &conv).err(), "b has shape [3], expected [4]"),
        (
            conv2d_forward(x.view(), Array4::zeros((4, 2, 3, 3)).view(), None, &conv).err(),
            "w has shape [4, 2, 3, 3], expected (F, 3, KH, KW)",
        ),
        (conv2d_forward(x.view(), Array4::zeros((4, 3, 6, 6)).view(), None, &conv).err(), "a window of 6 does not fit"),
        (
            conv2d_backward(x.view(), x.view(), w.view(), &conv).err(),
            "dout has shape [2, 3, 5, 5], expected [2, 4, 3, 3]",
        ),
        (max_pool2d_forward(x.view(), &wide).err(), "256 cells, more than 255"),
        (max_pool2d_backward(x.view(), &argmax).err(), "dout has shape [2, 3, 5, 5], expected [2, 3, 2, 2]"),
        (avg_pool2d_forward(x.view(), &Pool2d::square(6)).err(), "a window of 6 does not fit"),
        (
            avg_pool2d_backward(x.view(), [2, 3, 5, 5], &Pool2d::square(2)).err(),
            "dout has shape [2, 3, 5, 5], expected [2, 3, 2, 2]",
        ),
        (global_avg_pool_backward(matrix.view(), [2, 3, 5, 5]).err(), "dout has shape [3, 4], expected [2, 3]"),
        (affine_forward(rows.view(), rows.view(), None).err(), "w has shape [2, 3], expected [3, 3]"),
        (affine_forward(rows.view(), matrix.view(), Some(three.view())).err(), "b has shape [3], expected [4]"),
        (affine_backward(rows.view(), rows.view(), matrix.view()).err(), "dout has shape [2, 3], expected [2, 4]"),
        (plain(&rows, &four, &three, config), "gamma has shape [4], expected [3]"),
        (plain(&rows, &three, &four, config), "beta has shape [4], expected [3]"),
        (plain(&Array2::zeros((2, 4)), &four, &four, config), "running mean has shape [3], expected [4]"),
        (plain(&Array2::zeros((0, 3)), &three, &three, config), "no statistics"),
        (plain(&rows, &three, &three, BatchNorm { eps: 0.0, ..config }), "eps is 0"),
        (plain(&rows, &three, &three, BatchNorm { eps: f64::NAN, ..config }), "eps is NaN"),
        (plain(&rows, &three, &three, BatchNorm { momentum: 1.5, ..config }), "momentum is 1.5"),
        (
            batchnorm_backward(matrix.view(), rows.view(), three.view(), &cache).err(),
            "dout has shape [3, 4], expected [2, 3]",
        ),
        (batchnorm_backward(rows.view(), rows.view(), four.view(), &cache).err(), "gamma has shape [4], expected [3]"),
        (
            spatial_batchnorm_forward(x.view(), four.view(), three.view(), &mut running, Mode::Test, &config).err(),
            "gamma has shape [4], expected [3]",
        ),
        (
            spatial_batchnorm_backward(w.view(), x.view(), three.view(), &cache).err(),
            "dout has shape [4, 3, 3, 3], expected [2, 3, 5, 5]",
        ),
        (softmax_cross_entropy(rows.view(), &[0], 0.0).err(), "scores has shape [2, 3], expected [1, 3]"),
        (softmax_cross_entropy(rows.view(), &[0, 3], 0.0).err(), "label 3 at index 1 is not one of 3 classes"),
        (softmax_cross_entropy(rows.view(), &[0, 0], 2.0).err(), "smoothing is 2"),
        (softmax_cross_entropy(Array2::<f32>::zeros((0, 3)).view(), &[], 0.0).err(), "an empty batch"),
        (svm_hinge(rows.view(), &[0, 3]).err(), "label 3 at index 1 is not one of 3 classes"),
        // Wrong values are errors over slices too.
        (softmax_cross_entropy_into(&[0_f32; 0], &[0], 0, 0.0, &mut []).err(), "label 0 at index 0 is not one of 0"),
        (softmax_cross_entropy_into(&[0_f32; 3], &[0], 3, -0.1, &mut [0.0; 3]).err(), "smoothing is -0.1"),
        (svm_hinge_into(&[0_f32; 3], &[3], 3, &mut [0.0; 3]).err(), "label 3 at index 0 is not one of 3"),
        (svm_hinge_into(&[0_f32; 0], &[], 3, &mut []).err(), "an empty batch"),
        (check_labels(&[2, 5, 1], 5).err(), "label 5 at index 1 is not one of 5 classes"),
        (check_labels(&[], 5).err(), "an empty batch"),
    ];
    for (error, want) in table {
        let error = error.unwrap_or_else(|| panic!("no error, expected: {want}")).to_string();
        assert!(error.contains(want), "`{error}` does not say: {want}");
    }
}
