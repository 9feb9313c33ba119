//! Operations against golden numbers: PyTorch's (`tests/golden`, by `scripts/gen_golden.py`) and those that the CS231n
//! notebook prints. Each check takes the twins as a table, so that naive and fast ones run over the same cases.

mod common;

use common::{assert_close, golden};
use gemmnet::shape::{Conv2d, Padding, Pool2d};
use gemmnet::{Result, naive};
use ndarray::{
    Array, Array1, Array2, Array4, ArrayView, ArrayView1, ArrayView2, ArrayView4, Dimension, IntoDimension, Ix0, Ix1,
    Ix2, Ix4, arr0, array,
};

/// Two implementations in f64 differ by a few roundings for each term of a sum.
const REL: f64 = 8.0 * f64::EPSILON;

/// What everything below relies on: the comparison fails for another shape, a NaN, and an error beyond the tolerance.
#[test]
fn the_comparison_fails_when_it_should() {
    let want = array![[1.0, 100.0]];
    let fails = |got: Array2<f64>, want: &Array2<f64>| {
        std::panic::catch_unwind(|| assert_close(&got, want, 1e-3, 4, "deliberate failure")).is_err()
    };
    // The tolerance is 1e-3 * sqrt(4) * 100.
    assert!(!fails(array![[1.19, 99.81]], &want));
    assert!(fails(array![[1.21, 100.0]], &want));
    assert!(fails(array![[1.0, 100.0], [1.0, 100.0]], &want));
    assert!(fails(array![[1.0], [100.0]], &want));
    assert!(fails(array![[f64::NAN, 100.0]], &want));
    assert!(fails(want.clone(), &array![[1.0, f64::NAN]]));
    assert!(fails(array![[1.0, 50.0]], &array![[1.0, f64::INFINITY]]));
}

type ConvForward = fn(ArrayView4<f64>, ArrayView4<f64>, Option<ArrayView1<f64>>, &Conv2d) -> Result<Array4<f64>>;
type ConvBackward = fn(ArrayView4<f64>, ArrayView4<f64>, ArrayView4<f64>, &Conv2d) -> Result<naive::Conv2dGrads<f64>>;

const CONV2D: &[(&str, ConvForward, ConvBackward)] = &[("naive", naive::conv2d_forward, naive::conv2d_backward)];

#[test]
fn conv2d_agrees_with_pytorch() {
    for case in golden("conv2d") {
        let (x, w, b) = (case.array::<Ix4>("x"), case.array::<Ix4>("w"), case.optional::<Ix1>("b"));
        let (out, dout) = (case.array::<Ix4>("out"), case.array::<Ix4>("dout"));
        let conv = case.conv();
        // Terms of each sum: a filter for an output; windows times filters at most for dx; pixels times images for dw.
        let (filter, positions) = (w.len() / w.dim().0, out.len() / out.dim().1);
        for (twin, forward, backward) in CONV2D {
            let what = |part| format!("{twin} conv2d '{}', {part}", case.name);
            let got = forward(x.view(), w.view(), b.as_ref().map(|b| b.view()), &conv).unwrap();
            assert_close(&got, &out, REL, filter, &what("out"));
            let grads = backward(dout.view(), x.view(), w.view(), &conv).unwrap();
            assert_close(&grads.dx, &case.array("dx"), REL, filter * out.dim().1, &what("dx"));
            assert_close(&grads.dw, &case.array("dw"), REL, positions, &what("dw"));
            if b.is_some() {
                assert_close(&grads.db, &case.array("db"), REL, positions, &what("db"));
            }
        }
    }
}

/// `low` to `high` in equal steps, in row-major order: NumPy's `linspace(..).reshape(shape)`.
fn linspace<Sh: IntoDimension>(low: f64, high: f64, shape: Sh) -> Array<f64, Sh::Dim> {
    let shape = shape.into_dimension();
    Array::linspace(low, high, shape.size()).into_shape_with_order(shape).expect("as many values as the shape has")
}

#[test]
fn conv2d_gives_the_numbers_that_the_notebook_prints() {
    // The last two of the 24 numbers are cut off in the source; 'cs231n notebook' in conv2d.json has them.
    const PRINTED: [f64; 22] = [
        -0.08759809,
        -0.10987781,
        -0.18387192,
        -0.2109216,
        0.21027089,
        0.21661097,
        0.22847626,
        0.23004637,
        0.50813986,
        0.54309974,
        0.64082444,
        0.67101435,
        -0.98053589,
        -1.03143541,
        -1.19128892,
        -1.24695841,
        0.69108355,
        0.66880383,
        0.59480972,
        0.56776003,
        2.36270298,
        2.36904306,
    ];
    let x = linspace(-0.1, 0.5, (2, 3, 4, 4));
    let w = linspace(-0.2, 0.3, (3, 3, 4, 4));
    let b = linspace(-0.1, 0.2, 3);
    let conv = Conv2d { stride: (2, 2), padding: Padding::All(1), ..Conv2d::default() };
    for (twin, forward, _) in CONV2D {
        let out = forward(x.view(), w.view(), Some(b.view()), &conv).unwrap();
        assert_eq!(out.dim(), (2, 3, 2, 2), "{twin}");
        for (k, (got, want)) in out.iter().zip(PRINTED).enumerate() {
            assert!((got - want).abs() <= 1e-7, "{twin}: value {k} is {got}, the notebook prints {want}");
        }
    }
}

type MaxPoolForward = fn(ArrayView4<f64>, &Pool2d) -> Result<(Array4<f64>, naive::Argmax)>;
type MaxPoolBackward = fn(ArrayView4<f64>, &naive::Argmax) -> Result<Array4<f64>>;

const MAX_POOL2D: &[(&str, MaxPoolForward, MaxPoolBackward)] =
    &[("naive", naive::max_pool2d_forward, naive::max_pool2d_backward)];

#[test]
fn max_pool2d_agrees_with_pytorch() {
    for case in golden("max_pool2d") {
        let (x, dout) = (case.array::<Ix4>("x"), case.array::<Ix4>("dout"));
        let pool = case.pool();
        for (twin, forward, backward) in MAX_POOL2D {
            let (out, argmax) = forward(x.view(), &pool).unwrap();
            assert_eq!(out, case.array::<Ix4>("out"), "{twin} max_pool2d '{}', out", case.name);
            let dx = backward(dout.view(), &argmax).unwrap();
            let cells = pool.window.0 * pool.window.1;
            assert_close(&dx, &case.array("dx"), REL, cells, &format!("{twin} max_pool2d '{}', dx", case.name));
        }
    }
}

#[test]
fn max_pool2d_gives_the_numbers_that_the_notebook_prints() {
    // The first four of the 24 numbers are cut off in the source.
    const PRINTED: [f64; 20] = [
        -0.14526316,
        -0.13052632,
        -0.08631579,
        -0.07157895,
        -0.02736842,
        -0.01263158,
        0.03157895,
        0.04631579,
        0.09052632,
        0.10526316,
        0.14947368,
        0.16421053,
        0.20842105,
        0.22315789,
        0.26736842,
        0.28210526,
        0.32631579,
        0.34105263,
        0.38526316,
        0.4,
    ];
    let x = linspace(-0.3, 0.4, (2, 3, 4, 4));
    for (twin, forward, _) in MAX_POOL2D {
        let (out, _) = forward(x.view(), &Pool2d::square(2)).unwrap();
        assert_eq!(out.dim(), (2, 3, 2, 2), "{twin}");
        let got: Array1<f64> = out.iter().skip(4).copied().collect();
        // The notebook measures 4.1666665157267834e-08, the rounding of its own print: no more and no less may be left.
        let difference = gemmnet::gradcheck::rel_error(&got, &Array1::from(PRINTED.to_vec()));
        assert!((difference - 4.1666665157267834e-8).abs() < 1e-13, "{twin}: {difference:e}");
    }
}

type AvgPoolForward = fn(ArrayView4<f64>, &Pool2d) -> Result<Array4<f64>>;
type AvgPoolBackward = fn(ArrayView4<f64>, [usize; 4], &Pool2d) -> Result<Array4<f64>>;

const AVG_POOL2D: &[(&str, AvgPoolForward, AvgPoolBackward)] =
    &[("naive", naive::avg_pool2d_forward, naive::avg_pool2d_backward)];

#[test]
fn avg_pool2d_agrees_with_pytorch() {
    for case in golden("avg_pool2d") {
        let (x, dout) = (case.array::<Ix4>("x"), case.array::<Ix4>("dout"));
        let pool = case.pool();
        let cells = pool.window.0 * pool.window.1;
        for (twin, forward, backward) in AVG_POOL2D {
            let what = |part| format!("{twin} avg_pool2d '{}', {part}", case.name);
            assert_close(&forward(x.view(), &pool).unwrap(), &case.array("out"), REL, cells, &what("out"));
            let dx = backward(dout.view(), x.dim().into(), &pool).unwrap();
            assert_close(&dx, &case.array("dx"), REL, cells, &what("dx"));
        }
    }
}

type GlobalAvgPoolForward = fn(ArrayView4<f64>) -> Array2<f64>;
type GlobalAvgPoolBackward = fn(ArrayView2<f64>, [usize; 4]) -> Result<Array4<f64>>;

const GLOBAL_AVG_POOL: &[(&str, GlobalAvgPoolForward, GlobalAvgPoolBackward)] =
    &[("naive", naive::global_avg_pool_forward, naive::global_avg_pool_backward)];

#[test]
fn global_avg_pool_agrees_with_pytorch() {
    for case in golden("global_avg_pool") {
        let (x, dout) = (case.array::<Ix4>("x"), case.array::<Ix2>("dout"));
        let pixels = x.dim().2 * x.dim().3;
        for (twin, forward, backward) in GLOBAL_AVG_POOL {
            let what = |part| format!("{twin} global_avg_pool '{}', {part}", case.name);
            assert_close(&forward(x.view()), &case.array("out"), REL, pixels, &what("out"));
            assert_close(&backward(dout.view(), x.dim().into()).unwrap(), &case.array("dx"), REL, 1, &what("dx"));
        }
    }
}

type AffineForward = fn(ArrayView2<f64>, ArrayView2<f64>, Option<ArrayView1<f64>>) -> Result<Array2<f64>>;
type AffineBackward = fn(ArrayView2<f64>, ArrayView2<f64>, ArrayView2<f64>) -> Result<naive::AffineGrads<f64>>;

const AFFINE: &[(&str, AffineForward, AffineBackward)] = &[("naive", naive::affine_forward, naive::affine_backward)];

#[test]
fn affine_agrees_with_pytorch() {
    for case in golden("affine") {
        let (x, w, b) = (case.array::<Ix2>("x"), case.array::<Ix2>("w"), case.array::<Ix1>("b"));
        let dout = case.array::<Ix2>("dout");
        let ((samples, inputs), outputs) = (x.dim(), w.ncols());
        for (twin, forward, backward) in AFFINE {
            let what = |part| format!("{twin} affine '{}', {part}", case.name);
            let out = forward(x.view(), w.view(), Some(b.view())).unwrap();
            assert_close(&out, &case.array("out"), REL, inputs, &what("out"));
            let grads = backward(dout.view(), x.view(), w.view()).unwrap();
            assert_close(&grads.dx, &case.array("dx"), REL, outputs, &what("dx"));
            assert_close(&grads.dw, &case.array("dw"), REL, samples, &what("dw"));
            assert_close(&grads.db, &case.array("db"), REL, samples, &what("db"));
        }
    }
}

type BatchNormForward<D> = fn(ArrayView<f64, D>, ArrayView1<f64>, ArrayView1<f64>, f64) -> Result<Array<f64, D>>;
type BatchNormBackward<D> =
    fn(ArrayView<f64, D>, ArrayView<f64, D>, ArrayView1<f64>, f64) -> Result<naive::BatchNormGrads<f64, D>>;

const BATCHNORM: &[(&str, BatchNormForward<Ix2>, BatchNormBackward<Ix2>)] =
    &[("naive", naive::batchnorm_forward, naive::batchnorm_backward)];
const SPATIAL_BATCHNORM: &[(&str, BatchNormForward<Ix4>, BatchNormBackward<Ix4>)] =
    &[("naive", naive::spatial_batchnorm_forward, naive::spatial_batchnorm_backward)];

#[test]
fn batchnorm_agrees_with_pytorch() {
    let (mut plain, mut spatial) = (0, 0);
    for case in golden("batchnorm") {
        if case.dimensions("x") == 2 {
            check_batchnorm(&case, BATCHNORM);
            plain += 1;
        } else {
            check_batchnorm(&case, SPATIAL_BATCHNORM);
            spatial += 1;
        }
    }
    assert!(plain > 0 && spatial > 0);
}

fn check_batchnorm<D: Dimension>(case: &common::Golden, twins: &[(&str, BatchNormForward<D>, BatchNormBackward<D>)]) {
    let (x, dout) = (case.array::<D>("x"), case.array::<D>("dout"));
    let (gamma, beta) = (case.array::<Ix1>("gamma"), case.array::<Ix1>("beta"));
    let eps = case.param("eps");
    let samples = x.len() / gamma.len();
    for (twin, forward, backward) in twins {
        let what = |part| format!("{twin} batchnorm '{}', {part}", case.name);
        let out = forward(x.view(), gamma.view(), beta.view(), eps).unwrap();
        assert_close(&out, &case.array("out"), REL, samples, &what("out"));
        let grads = backward(dout.view(), x.view(), gamma.view(), eps).unwrap();
        assert_close(&grads.dx, &case.array("dx"), 8.0 * REL, samples, &what("dx"));
        assert_close(&grads.dgamma, &case.array("dgamma"), REL, samples, &what("dgamma"));
        assert_close(&grads.dbeta, &case.array("dbeta"), REL, samples, &what("dbeta"));
    }
}

type Softmax = fn(ArrayView2<f64>, &[usize], f64) -> Result<(f64, Array2<f64>)>;
type Svm = fn(ArrayView2<f64>, &[usize]) -> Result<(f64, Array2<f64>)>;

const LOSSES: &[(&str, Softmax, Svm)] = &[("naive", naive::softmax_cross_entropy, naive::svm_hinge)];

#[test]
fn losses_agree_with_pytorch() {
    let (mut softmax_cases, mut svm_cases) = (0, 0);
    for case in golden("loss") {
        let (scores, labels) = (case.array::<Ix2>("scores"), case.param::<Vec<usize>>("labels"));
        for (twin, softmax, svm) in LOSSES {
            let (loss, dscores) = match case.param::<String>("kind").as_str() {
                "softmax" => {
                    softmax_cases += 1;
                    softmax(scores.view(), &labels, case.param("smoothing")).unwrap()
                }
                "svm" => {
                    svm_cases += 1;
                    svm(scores.view(), &labels).unwrap()
                }
                kind => panic!("unknown loss '{kind}'"),
            };
            let what = |part| format!("{twin} loss '{}', {part}", case.name);
            assert_close(&arr0(loss), &case.array::<Ix0>("loss"), REL, scores.len(), &what("loss"));
            assert_close(&dscores, &case.array("dscores"), REL, scores.ncols(), &what("dscores"));
        }
    }
    assert!(softmax_cases > 0 && svm_cases > 0);
}
