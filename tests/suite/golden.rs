//! Operations against golden numbers: PyTorch's (`tests/golden`, by `scripts/gen_golden.py`) and those that the CS231n
//! notebook prints. Each check takes the twins as a table, so that naive and fast ones run over the same cases, in `f64`
//! and in `f32`.

use crate::common::{Golden, assert_close, golden};
use gemmnet::ops::Mode;
use gemmnet::ops::activation::{Activation, activation_backward, activation_forward};
use gemmnet::ops::affine::AffineGrads;
use gemmnet::ops::batchnorm::BatchNormGrads;
use gemmnet::ops::batchnorm::{BatchNorm, BatchNormCache, Statistics};
use gemmnet::ops::conv::{Conv2dGrads, ConvPlan};
use gemmnet::ops::pool::Argmax;
use gemmnet::shape::{Algorithm, Conv2d, Conv2dShape, Padding, Pool2d};
use gemmnet::{Element, Result, gradcheck, naive, ops};
use ndarray::{
    Array, Array1, Array2, Array4, ArrayRef, ArrayView, ArrayView1, ArrayView2, ArrayView4, Axis, Dimension,
    IntoDimension, Ix0, Ix1, Ix2, Ix4, IxDyn, arr0, array,
};

/// Two implementations in f64 differ by a few roundings for each term of a sum.
const REL: f64 = 8.0 * f64::EPSILON;
/// In f32, in the Euclidean norm of an array: single values near 0 have no correct digits. It leaves room for Winograd.
const REL_F32: f64 = 1e-5;

/// Compares with PyTorch's f64: in `f64` every value, within `slack * REL * sqrt(terms)`; in `f32` the whole array,
/// within [`REL_F32`].
#[track_caller]
fn assert_golden<T: Element, D: Dimension>(
    got: &ArrayRef<T, D>,
    want: &ArrayRef<f64, D>,
    slack: f64,
    terms: usize,
    what: &str,
) {
    let got = got.mapv(T::f64);
    if T::NAME == "f64" {
        assert_close(&got, want, slack * REL, terms, what);
    } else {
        let error = gradcheck::rel_error_norm(want, &got);
        assert!(error <= REL_F32, "{what}: in norm the {} result is off by {error:e}", T::NAME);
    }
}

/// The array called `key`, rounded to `T`.
fn array_of<T: Element, D: Dimension>(case: &Golden, key: &str) -> Array<T, D> {
    case.array(key).mapv(T::of)
}

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

    let fails = |got: Array2<f32>| {
        std::panic::catch_unwind(|| assert_golden(&got, &array![[1.0, 100.0]], 1.0, 4, "deliberate failure")).is_err()
    };
    assert!(!fails(array![[1.0, 100.0009]]));
    assert!(fails(array![[1.0, 100.0011]]));
    assert!(fails(array![[f32::NAN, 100.0]]));
    assert!(fails(array![[1.0], [100.0]]));
}

type ConvForward<T> = fn(ArrayView4<T>, ArrayView4<T>, Option<ArrayView1<T>>, &Conv2d) -> Result<Array4<T>>;
type ConvBackward<T> = fn(ArrayView4<T>, ArrayView4<T>, ArrayView4<T>, &Conv2d) -> Result<Conv2dGrads<T>>;

fn conv2d_twins<T: Element>() -> [(&'static str, ConvForward<T>, ConvBackward<T>); 2] {
    [
        ("naive", naive::conv2d_forward, naive::conv2d_backward),
        ("fast", ops::conv::conv2d_forward, ops::conv::conv2d_backward),
    ]
}

#[test]
fn conv2d_agrees_with_pytorch() {
    check_conv2d::<f64>();
    check_conv2d::<f32>();
}

fn check_conv2d<T: Element>() {
    let mut winograd_cases = 0;
    for case in golden("conv2d") {
        let shape = [case.array::<Ix4>("x").dim().into(), case.array::<Ix4>("w").dim().into()];
        for (twin, forward, backward) in conv2d_twins::<T>() {
            check_conv2d_case(&case, twin, &case.conv(), forward, backward);
        }
        let winograd = Conv2d { algorithm: Algorithm::Winograd, ..case.conv() };
        let shape = Conv2dShape::new(shape[0], shape[1], &winograd).unwrap();
        if ConvPlan::new::<f32>(&shape).is_ok() {
            winograd_cases += 1;
            // f64 refuses it; its unit tests check it there
            if ConvPlan::new::<T>(&shape).is_ok() {
                let [_, (_, forward, backward)] = conv2d_twins::<T>();
                check_conv2d_case(&case, "Winograd", &winograd, forward, backward);
            }
        }
    }
    assert!(winograd_cases >= 4, "only {winograd_cases} cases fit Winograd");
}

fn check_conv2d_case<T: Element>(
    case: &Golden,
    twin: &str,
    conv: &Conv2d,
    forward: ConvForward<T>,
    backward: ConvBackward<T>,
) {
    let what = |part| format!("{twin} conv2d '{}' in {}, {part}", case.name, T::NAME);
    let (x, w, dout): (Array4<T>, Array4<T>, Array4<T>) =
        (array_of(case, "x"), array_of(case, "w"), array_of(case, "dout"));
    let b = case.optional::<Ix1>("b").map(|b| b.mapv(T::of));
    // Terms of each sum: a filter for an output; windows times filters at most for dx; pixels times images for dw.
    let filters = w.dim().0;
    let (filter, positions) = (w.len() / filters, dout.len() / filters);
    let out = forward(x.view(), w.view(), b.as_ref().map(|b| b.view()), conv).unwrap();
    assert_golden(&out, &case.array("out"), 1.0, filter, &what("out"));
    let grads = backward(dout.view(), x.view(), w.view(), conv).unwrap();
    assert_golden(&grads.dx, &case.array("dx"), 1.0, filter * filters, &what("dx"));
    assert_golden(&grads.dw, &case.array("dw"), 1.0, positions, &what("dw"));
    if b.is_some() {
        assert_golden(&grads.db, &case.array("db"), 1.0, positions, &what("db"));
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
    for (twin, forward, _) in conv2d_twins() {
        let out = forward(x.view(), w.view(), Some(b.view()), &conv).unwrap();
        assert_eq!(out.dim(), (2, 3, 2, 2), "{twin}");
        for (k, (got, want)) in out.iter().zip(PRINTED).enumerate() {
            assert!((got - want).abs() <= 1e-7, "{twin}: value {k} is {got}, the notebook prints {want}");
        }
    }
}

type MaxPoolForward<T> = fn(ArrayView4<T>, &Pool2d) -> Result<(Array4<T>, Argmax)>;
type MaxPoolBackward<T> = fn(ArrayView4<T>, &Argmax) -> Result<Array4<T>>;

fn max_pool2d_twins<T: Element>() -> [(&'static str, MaxPoolForward<T>, MaxPoolBackward<T>); 2] {
    [
        ("naive", naive::max_pool2d_forward, naive::max_pool2d_backward),
        ("fast", ops::pool::max_pool2d_forward, ops::pool::max_pool2d_backward),
    ]
}

#[test]
fn max_pool2d_agrees_with_pytorch() {
    check_max_pool2d::<f64>();
    check_max_pool2d::<f32>();
}

fn check_max_pool2d<T: Element>() {
    for case in golden("max_pool2d") {
        let (x, dout): (Array4<T>, Array4<T>) = (array_of(&case, "x"), array_of(&case, "dout"));
        let pool = case.pool();
        for (twin, forward, backward) in max_pool2d_twins::<T>() {
            let what = |part| format!("{twin} max_pool2d '{}' in {}, {part}", case.name, T::NAME);
            let (out, argmax) = forward(x.view(), &pool).unwrap();
            assert_eq!(out, array_of::<T, Ix4>(&case, "out"), "{}", what("out"));
            let dx = backward(dout.view(), &argmax).unwrap();
            assert_golden(&dx, &case.array("dx"), 1.0, pool.window.0 * pool.window.1, &what("dx"));
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
    for (twin, forward, _) in max_pool2d_twins() {
        let (out, _) = forward(x.view(), &Pool2d::square(2)).unwrap();
        assert_eq!(out.dim(), (2, 3, 2, 2), "{twin}");
        let got: Array1<f64> = out.iter().skip(4).copied().collect();
        // The notebook measures 4.1666665157267834e-08, the rounding of its own print: no more and no less may be left.
        let difference = gradcheck::rel_error(&got, &Array1::from(PRINTED.to_vec()));
        assert!((difference - 4.1666665157267834e-8).abs() < 1e-13, "{twin}: {difference:e}");
    }
}

type AvgPoolForward<T> = fn(ArrayView4<T>, &Pool2d) -> Result<Array4<T>>;
type AvgPoolBackward<T> = fn(ArrayView4<T>, [usize; 4], &Pool2d) -> Result<Array4<T>>;

fn avg_pool2d_twins<T: Element>() -> [(&'static str, AvgPoolForward<T>, AvgPoolBackward<T>); 2] {
    [
        ("naive", naive::avg_pool2d_forward, naive::avg_pool2d_backward),
        ("fast", ops::pool::avg_pool2d_forward, ops::pool::avg_pool2d_backward),
    ]
}

#[test]
fn avg_pool2d_agrees_with_pytorch() {
    check_avg_pool2d::<f64>();
    check_avg_pool2d::<f32>();
}

fn check_avg_pool2d<T: Element>() {
    for case in golden("avg_pool2d") {
        let (x, dout): (Array4<T>, Array4<T>) = (array_of(&case, "x"), array_of(&case, "dout"));
        let pool = case.pool();
        let cells = pool.window.0 * pool.window.1;
        for (twin, forward, backward) in avg_pool2d_twins::<T>() {
            let what = |part| format!("{twin} avg_pool2d '{}' in {}, {part}", case.name, T::NAME);
            assert_golden(&forward(x.view(), &pool).unwrap(), &case.array("out"), 1.0, cells, &what("out"));
            let dx = backward(dout.view(), x.dim().into(), &pool).unwrap();
            assert_golden(&dx, &case.array("dx"), 1.0, cells, &what("dx"));
        }
    }
}

type GlobalAvgPoolForward<T> = fn(ArrayView4<T>) -> Array2<T>;
type GlobalAvgPoolBackward<T> = fn(ArrayView2<T>, [usize; 4]) -> Result<Array4<T>>;

fn global_avg_pool_twins<T: Element>() -> [(&'static str, GlobalAvgPoolForward<T>, GlobalAvgPoolBackward<T>); 2] {
    [
        ("naive", naive::global_avg_pool_forward, naive::global_avg_pool_backward),
        ("fast", ops::pool::global_avg_pool_forward, ops::pool::global_avg_pool_backward),
    ]
}

#[test]
fn global_avg_pool_agrees_with_pytorch() {
    check_global_avg_pool::<f64>();
    check_global_avg_pool::<f32>();
}

fn check_global_avg_pool<T: Element>() {
    for case in golden("global_avg_pool") {
        let (x, dout): (Array4<T>, Array2<T>) = (array_of(&case, "x"), array_of(&case, "dout"));
        let pixels = x.dim().2 * x.dim().3;
        for (twin, forward, backward) in global_avg_pool_twins::<T>() {
            let what = |part| format!("{twin} global_avg_pool '{}' in {}, {part}", case.name, T::NAME);
            assert_golden(&forward(x.view()), &case.array("out"), 1.0, pixels, &what("out"));
            let dx = backward(dout.view(), x.dim().into()).unwrap();
            assert_golden(&dx, &case.array("dx"), 1.0, 1, &what("dx"));
        }
    }
}

type AffineForward<T> = fn(ArrayView2<T>, ArrayView2<T>, Option<ArrayView1<T>>) -> Result<Array2<T>>;
type AffineBackward<T> = fn(ArrayView2<T>, ArrayView2<T>, ArrayView2<T>) -> Result<AffineGrads<T>>;

fn affine_twins<T: Element>() -> [(&'static str, AffineForward<T>, AffineBackward<T>); 2] {
    [
        ("naive", naive::affine_forward, naive::affine_backward),
        ("fast", ops::affine::affine_forward, ops::affine::affine_backward),
    ]
}

#[test]
fn affine_agrees_with_pytorch() {
    check_affine::<f64>();
    check_affine::<f32>();
}

fn check_affine<T: Element>() {
    for case in golden("affine") {
        let (x, w, dout): (Array2<T>, Array2<T>, Array2<T>) =
            (array_of(&case, "x"), array_of(&case, "w"), array_of(&case, "dout"));
        let b: Array1<T> = array_of(&case, "b");
        let ((samples, inputs), outputs) = (x.dim(), w.ncols());
        for (twin, forward, backward) in affine_twins::<T>() {
            let what = |part| format!("{twin} affine '{}' in {}, {part}", case.name, T::NAME);
            let out = forward(x.view(), w.view(), Some(b.view())).unwrap();
            assert_golden(&out, &case.array("out"), 1.0, inputs, &what("out"));
            let grads = backward(dout.view(), x.view(), w.view()).unwrap();
            assert_golden(&grads.dx, &case.array("dx"), 1.0, outputs, &what("dx"));
            assert_golden(&grads.dw, &case.array("dw"), 1.0, samples, &what("dw"));
            assert_golden(&grads.db, &case.array("db"), 1.0, samples, &what("db"));
        }
    }
}

/// The twins take the same arguments but for the running statistics, which the naive one has not.
type NaiveBatchNorm<T, D> = (
    fn(ArrayView<T, D>, ArrayView1<T>, ArrayView1<T>, f64) -> Result<Array<T, D>>,
    fn(ArrayView<T, D>, ArrayView<T, D>, ArrayView1<T>, f64) -> Result<BatchNormGrads<T, D>>,
);
type FastBatchNorm<T, D> = (
    fn(
        ArrayView<T, D>,
        ArrayView1<T>,
        ArrayView1<T>,
        &mut Statistics<T>,
        Mode,
        &BatchNorm,
    ) -> Result<(Array<T, D>, BatchNormCache<T>)>,
    fn(ArrayView<T, D>, ArrayView<T, D>, ArrayView1<T>, &BatchNormCache<T>) -> Result<BatchNormGrads<T, D>>,
);

#[test]
fn batchnorm_agrees_with_pytorch() {
    check_batchnorm::<f64>();
    check_batchnorm::<f32>();
}

fn check_batchnorm<T: Element>() {
    use gemmnet::ops::batchnorm as fast;
    let (mut plain, mut spatial) = (0, 0);
    for case in golden("batchnorm") {
        if case.dimensions("x") == 2 {
            let naive = (naive::batchnorm_forward as _, naive::batchnorm_backward as _);
            let fast = (fast::batchnorm_forward as _, fast::batchnorm_backward as _);
            check_batchnorm_case::<T, Ix2>(&case, naive, fast);
            plain += 1;
        } else {
            let naive = (naive::spatial_batchnorm_forward as _, naive::spatial_batchnorm_backward as _);
            let fast = (fast::spatial_batchnorm_forward as _, fast::spatial_batchnorm_backward as _);
            check_batchnorm_case::<T, Ix4>(&case, naive, fast);
            spatial += 1;
        }
    }
    assert!(plain > 0 && spatial > 0);
}

fn check_batchnorm_case<T: Element, D: Dimension>(
    case: &Golden,
    naive: NaiveBatchNorm<T, D>,
    fast: FastBatchNorm<T, D>,
) {
    let (x, dout): (Array<T, D>, Array<T, D>) = (array_of(case, "x"), array_of(case, "dout"));
    let (gamma, beta): (Array1<T>, Array1<T>) = (array_of(case, "gamma"), array_of(case, "beta"));
    let config = BatchNorm { eps: case.param("eps"), momentum: case.param("momentum") };
    let samples = x.len() / gamma.len();
    let assert = |got: &ArrayRef<T, D>, key: &str, slack: f64, twin: &str| {
        let what = format!("{twin} batchnorm '{}' in {}, {key}", case.name, T::NAME);
        assert_golden(got, &case.array(key), slack, samples, &what);
    };
    let assert_channels = |got: &[T], key: &str, twin: &str| {
        let what = format!("{twin} batchnorm '{}' in {}, {key}", case.name, T::NAME);
        assert_golden(&Array1::from(got.to_vec()), &case.array::<Ix1>(key), 1.0, samples, &what);
    };
    let assert_grads = |grads: BatchNormGrads<T, D>, twin: &str| {
        assert(&grads.dx, "dx", 8.0, twin);
        assert_channels(&grads.dgamma.to_vec(), "dgamma", twin);
        assert_channels(&grads.dbeta.to_vec(), "dbeta", twin);
    };

    let (forward, backward) = naive;
    assert(&forward(x.view(), gamma.view(), beta.view(), config.eps).unwrap(), "out", 1.0, "naive");
    assert_grads(backward(dout.view(), x.view(), gamma.view(), config.eps).unwrap(), "naive");

    let (forward, backward) = fast;
    let mut running = Statistics::new(gamma.len());
    let mut forward = |x: ArrayView<T, D>, mode| {
        let (out, cache) = forward(x, gamma.view(), beta.view(), &mut running, mode, &config).unwrap();
        (out, cache, running.clone())
    };
    let batches: Array<T, IxDyn> = array_of(case, "batches");
    let (last, earlier) = (batches.len_of(Axis(0)) - 1, batches.outer_iter());
    for batch in earlier.take(last) {
        forward(batch.into_dimensionality().expect("batches of the input's shape"), Mode::Train);
    }
    // the last batch
    let (out, cache, running) = forward(x.view(), Mode::Train);
    assert(&out, "out", 1.0, "fast");
    assert_grads(backward(dout.view(), x.view(), gamma.view(), &cache).unwrap(), "fast");
    assert_channels(&running.mean, "running_mean", "fast");
    assert_channels(&running.var, "running_var", "fast");
    let (out, _, after) = forward(x.view(), Mode::Test);
    assert(&out, "eval_out", 1.0, "fast");
    assert_eq!(after, running, "test mode leaves the running statistics alone");
}

#[test]
fn activations_agree_with_pytorch() {
    check_activations::<f64>();
    check_activations::<f32>();
}

fn check_activations<T: Element>() {
    let mut checked = Vec::new();
    for case in golden("activation") {
        let activation = match case.name.as_str() {
            "relu" => Activation::Relu,
            "leaky_relu" | "leaky_relu 0.3" => Activation::LeakyRelu { slope: case.param("slope") },
            "silu" => Activation::Silu,
            "gelu" => Activation::Gelu,
            name => panic!("unknown activation '{name}'"),
        };
        let what = |part| format!("activation '{}' in {}, {part}", case.name, T::NAME);
        let (x, dout): (Array1<T>, Array1<T>) = (array_of(&case, "x"), array_of(&case, "dout"));
        assert_golden(&activation_forward(&x, activation), &case.array("out"), 1.0, 1, &what("out"));
        let dx = activation_backward(&dout, &x, activation).unwrap();
        assert_golden(&dx, &case.array("dx"), 1.0, 1, &what("dx"));
        checked.push(activation.name());
    }
    checked.dedup();
    assert_eq!(checked.len(), 4, "every activation is checked: {checked:?}");
}

type Softmax<T> = fn(ArrayView2<T>, &[usize], f64) -> Result<(T, Array2<T>)>;
type Svm<T> = fn(ArrayView2<T>, &[usize]) -> Result<(T, Array2<T>)>;

fn loss_twins<T: Element>() -> [(&'static str, Softmax<T>, Svm<T>); 2] {
    [
        ("naive", naive::softmax_cross_entropy, naive::svm_hinge),
        ("fast", ops::loss::softmax_cross_entropy, ops::loss::svm_hinge),
    ]
}

#[test]
fn losses_agree_with_pytorch() {
    check_losses::<f64>();
    check_losses::<f32>();
}

fn check_losses<T: Element>() {
    let (mut softmax_cases, mut svm_cases) = (0, 0);
    for case in golden("loss") {
        let (scores, labels): (Array2<T>, Vec<usize>) = (array_of(&case, "scores"), case.param("labels"));
        for (twin, softmax, svm) in loss_twins::<T>() {
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
            let what = |part| format!("{twin} loss '{}' in {}, {part}", case.name, T::NAME);
            assert_golden(&arr0(loss), &case.array::<Ix0>("loss"), 1.0, scores.len(), &what("loss"));
            assert_golden(&dscores, &case.array("dscores"), 1.0, scores.ncols(), &what("dscores"));
        }
    }
    assert!(softmax_cases > 0 && svm_cases > 0);
}
