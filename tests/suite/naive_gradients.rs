//! The naive operations' gradients against numeric ones in f64, with random `dout`.

use crate::common::random_array;
use gemmnet::gradcheck::{GradReport, NumericGradient, STEP, check, numeric_gradient, numeric_gradient_array};
use gemmnet::naive;
use gemmnet::shape::{Conv2d, Conv2dShape, Padding, Pool2d, Pool2dShape};
use ndarray::{Array, Array1, Array2, Array4, ArrayRef, ArrayView, ArrayView1, ArrayView2, ArrayView4, Dimension};

/// Checks a gradient whose function has no kinks.
#[track_caller]
fn assert_smooth<D: Dimension>(what: &str, analytic: &ArrayRef<f64, D>, numeric: &NumericGradient<D>, limit: f64) {
    let report = assert_gradient(what, analytic, numeric, limit);
    assert_eq!(report.skipped, 0, "{report}");
}

#[track_caller]
fn assert_gradient<D: Dimension>(
    what: &str,
    analytic: &ArrayRef<f64, D>,
    numeric: &NumericGradient<D>,
    limit: f64,
) -> GradReport {
    let report = check(what, analytic, numeric);
    assert!(report.max_rel_error <= limit, "{report}");
    report
}

const STRIDES: [(usize, usize); 3] = [(1, 1), (2, 1), (2, 3)];

fn asymmetric() -> Padding {
    Padding::Sides { top: 2, bottom: 0, left: 0, right: 1 }
}

fn check_conv(x_shape: [usize; 4], w_shape: [usize; 4], conv: &Conv2d) {
    let what = |part| format!("{part} of x {x_shape:?}, w {w_shape:?}, {conv:?}");
    let shape = Conv2dShape::new(x_shape, w_shape, conv).unwrap();
    let x: Array4<f64> = random_array(x_shape, 1);
    let w: Array4<f64> = random_array(w_shape, 2);
    let b: Array1<f64> = random_array(shape.filters(), 3);
    let dout: Array4<f64> = random_array(shape.out(), 4);
    let out = |x: ArrayView4<f64>, w: ArrayView4<f64>, b: ArrayView1<f64>| {
        naive::conv2d_forward(x, w, Some(b), conv).unwrap()
    };

    let grads = naive::conv2d_backward(dout.view(), x.view(), w.view(), conv).unwrap();
    let dx = numeric_gradient_array(|x| out(x, w.view(), b.view()), x.view(), dout.view());
    let dw = numeric_gradient_array(|w| out(x.view(), w, b.view()), w.view(), dout.view());
    let db = numeric_gradient_array(|b| out(x.view(), w.view(), b), b.view(), dout.view());
    assert_smooth(&what("dx"), &grads.dx, &dx, 1e-8);
    assert_smooth(&what("dw"), &grads.dw, &dw, 1e-8);
    assert_smooth(&what("db"), &grads.db, &db, 1e-8);
}

#[test]
fn convolution_under_every_stride_padding_dilation_and_group() {
    for stride in STRIDES {
        for padding in [Padding::Valid, Padding::All(1), Padding::Same, asymmetric()] {
            for dilation in [(1, 1), (2, 1), (1, 2)] {
                // (channels, filters, groups): one group, two, depthwise with two filters per channel.
                for (channels, filters, groups) in [(2, 3, 1), (4, 2, 2), (2, 4, 2)] {
                    let conv = Conv2d { stride, padding, dilation, groups, ..Conv2d::default() };
                    check_conv([2, channels, 6, 5], [filters, channels / groups, 3, 2], &conv);
                }
            }
        }
    }
}

#[test]
fn convolution_of_special_shapes() {
    let conv = Conv2d::default();
    let padded = Conv2d { padding: Padding::All(1), ..conv };
    for (x, w, conv) in [
        ([4, 3, 5, 5], [2, 3, 3, 3], padded),                            // the seed's check
        ([1, 1, 4, 4], [1, 1, 3, 3], padded),                            // one image, one channel, one filter
        ([1, 1, 1, 1], [2, 1, 1, 1], conv),                              // one pixel
        ([2, 3, 3, 7], [2, 3, 1, 1], Conv2d { stride: (2, 2), ..conv }), // 1x1
        ([1, 2, 8, 8], [2, 2, 7, 7], Conv2d { padding: Padding::All(3), ..conv }),
        ([2, 2, 3, 5], [3, 2, 3, 5], conv), // filter as large as the image
        ([1, 1, 2, 3], [1, 1, 2, 2], Conv2d { padding: Padding::All(3), ..conv }), // outputs that see padding alone
        ([1, 2, 9, 4], [1, 2, 2, 3], Conv2d { dilation: (3, 1), stride: (3, 1), ..conv }),
    ] {
        check_conv(x, w, &conv);
    }
}

/// Pooling windows: tiling, leaving a rest, overlapping, leaving gaps, not square; with all paddings they allow.
fn pools() -> Vec<Pool2d> {
    let mut pools = Vec::new();
    for window in [(2, 2), (3, 3), (3, 2), (1, 1)] {
        for stride in STRIDES {
            pools.push(Pool2d { window, stride, padding: Padding::Valid });
            if window.0 > 1 {
                pools.push(Pool2d { window, stride, padding: Padding::All(1) });
            }
            if window.0 > 2 {
                pools.push(Pool2d { window, stride, padding: asymmetric() });
            }
        }
    }
    pools
}

const POOLED: [[usize; 4]; 3] = [[2, 3, 6, 6], [1, 1, 5, 7], [3, 1, 4, 3]];

#[test]
fn max_pooling() {
    for pool in pools() {
        for x_shape in POOLED {
            let what = format!("dx of x {x_shape:?}, {pool:?}");
            let x: Array4<f64> = random_array(x_shape, 1);
            let dout: Array4<f64> = random_array(Pool2dShape::new(x_shape, &pool).unwrap().out(), 2);
            let forward = |x: ArrayView4<f64>| naive::max_pool2d_forward(x, &pool).unwrap();
            let dx = naive::max_pool2d_backward(dout.view(), &forward(x.view()).1).unwrap();
            let numeric = numeric_gradient_array(|x| forward(x).0, x.view(), dout.view());
            assert_smooth(&what, &dx, &numeric, 1e-10);
        }
    }
}

#[test]
fn max_pooling_beside_ties_is_skipped_and_right_elsewhere() {
    let mut x: Array4<f64> = random_array((1, 2, 4, 4), 1);
    // Channel 0: the first window is constant. Channel 1: two largest values, closer than the step.
    for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        x[[0, 0, i, j]] = 0.5;
    }
    x[[0, 1, 2, 3]] = 9.0;
    x[[0, 1, 3, 2]] = 9.0 + 1e-6;
    let dout: Array4<f64> = random_array((1, 2, 2, 2), 2);
    let forward = |x: ArrayView4<f64>| naive::max_pool2d_forward(x, &Pool2d::square(2)).unwrap();
    let dx = naive::max_pool2d_backward(dout.view(), &forward(x.view()).1).unwrap();
    let numeric = numeric_gradient_array(|x| forward(x).0, x.view(), dout.view());
    let report = assert_gradient("dx", &dx, &numeric, 1e-10);
    assert_eq!((report.checked, report.skipped), (26, 6), "{report}");
}

#[test]
fn average_pooling() {
    for pool in pools() {
        for x_shape in POOLED {
            let what = format!("dx of x {x_shape:?}, {pool:?}");
            let x: Array4<f64> = random_array(x_shape, 1);
            let dout: Array4<f64> = random_array(Pool2dShape::new(x_shape, &pool).unwrap().out(), 2);
            let dx = naive::avg_pool2d_backward(dout.view(), x_shape, &pool).unwrap();
            let forward = |x: ArrayView4<f64>| naive::avg_pool2d_forward(x, &pool).unwrap();
            assert_smooth(&what, &dx, &numeric_gradient_array(forward, x.view(), dout.view()), 1e-8);
        }
    }
    for x_shape in POOLED {
        let x: Array4<f64> = random_array(x_shape, 1);
        let dout: Array2<f64> = random_array((x_shape[0], x_shape[1]), 2);
        let dx = naive::global_avg_pool_backward(dout.view(), x_shape).unwrap();
        let numeric = numeric_gradient_array(|x| naive::global_avg_pool_forward(x), x.view(), dout.view());
        assert_smooth(&format!("dx of global {x_shape:?}"), &dx, &numeric, 1e-8);
    }
}

#[test]
fn affine_layers() {
    for (samples, inputs, outputs) in [(3, 5, 4), (1, 7, 2), (4, 1, 3), (2, 6, 1)] {
        let what = |part| format!("{part} of {samples}x{inputs}x{outputs}");
        let x: Array2<f64> = random_array((samples, inputs), 1);
        let w: Array2<f64> = random_array((inputs, outputs), 2);
        let b: Array1<f64> = random_array(outputs, 3);
        let dout: Array2<f64> = random_array((samples, outputs), 4);
        let out =
            |x: ArrayView2<f64>, w: ArrayView2<f64>, b: ArrayView1<f64>| naive::affine_forward(x, w, Some(b)).unwrap();
        let grads = naive::affine_backward(dout.view(), x.view(), w.view()).unwrap();
        let dx = numeric_gradient_array(|x| out(x, w.view(), b.view()), x.view(), dout.view());
        let dw = numeric_gradient_array(|w| out(x.view(), w, b.view()), w.view(), dout.view());
        let db = numeric_gradient_array(|b| out(x.view(), w.view(), b), b.view(), dout.view());
        assert_smooth(&what("dx"), &grads.dx, &dx, 1e-8);
        assert_smooth(&what("dw"), &grads.dw, &dw, 1e-8);
        assert_smooth(&what("db"), &grads.db, &db, 1e-8);
    }
}

#[test]
fn batch_normalisation() {
    let eps = 1e-5;
    // Like the seed's check: values far from 0, so that the batch statistics matter.
    let spread = |x: Array4<f64>| 5.0 * x + 12.0;
    for (samples, features) in [(6, 3), (20, 5)] {
        let x: Array2<f64> = 2.0 * random_array((samples, features), 1) + 3.0;
        let (gamma, beta) = (random_array(features, 2), random_array(features, 3));
        let dout: Array2<f64> = random_array((samples, features), 4);
        check_batchnorm(
            &format!("{samples}x{features}"),
            [&gamma, &beta],
            (&x, &dout),
            |x, gamma, beta| naive::batchnorm_forward(x, gamma, beta, eps).unwrap(),
            naive::batchnorm_backward(dout.view(), x.view(), gamma.view(), eps).unwrap(),
        );
    }
    for shape in [[2, 3, 4, 5], [1, 2, 3, 3], [4, 1, 2, 2]] {
        let x = spread(random_array(shape, 1));
        let (gamma, beta) = (random_array(shape[1], 2), random_array(shape[1], 3));
        let dout: Array4<f64> = random_array(shape, 4);
        check_batchnorm(
            &format!("{shape:?}"),
            [&gamma, &beta],
            (&x, &dout),
            |x, gamma, beta| naive::spatial_batchnorm_forward(x, gamma, beta, eps).unwrap(),
            naive::spatial_batchnorm_backward(dout.view(), x.view(), gamma.view(), eps).unwrap(),
        );
    }
}

fn check_batchnorm<D: Dimension>(
    shape: &str,
    [gamma, beta]: [&Array1<f64>; 2],
    (x, dout): (&Array<f64, D>, &Array<f64, D>),
    out: impl Fn(ArrayView<f64, D>, ArrayView1<f64>, ArrayView1<f64>) -> Array<f64, D>,
    grads: gemmnet::ops::batchnorm::BatchNormGrads<f64, D>,
) {
    let dx = numeric_gradient_array(|x| out(x, gamma.view(), beta.view()), x.view(), dout.view());
    let dgamma = numeric_gradient_array(|gamma| out(x.view(), gamma, beta.view()), gamma.view(), dout.view());
    let dbeta = numeric_gradient_array(|beta| out(x.view(), gamma.view(), beta), beta.view(), dout.view());
    assert_smooth(&format!("dx of {shape}"), &grads.dx, &dx, 1e-6);
    assert_smooth(&format!("dgamma of {shape}"), &grads.dgamma, &dgamma, 1e-10);
    assert_smooth(&format!("dbeta of {shape}"), &grads.dbeta, &dbeta, 1e-10);
}

#[test]
fn losses() {
    for (samples, classes) in [(5, 4), (1, 10), (3, 2)] {
        let scores: Array2<f64> = 3.0 * random_array((samples, classes), 1);
        let labels: Vec<usize> = (0..samples).map(|n| n * 7 % classes).collect();
        for smoothing in [0.0, 0.1, 1.0] {
            let loss = |scores: ArrayView2<f64>| naive::softmax_cross_entropy(scores, &labels, smoothing).unwrap();
            let numeric = numeric_gradient(|scores| loss(scores).0, scores.view(), STEP);
            let what = format!("softmax {samples}x{classes}, smoothing {smoothing}");
            assert_smooth(&what, &loss(scores.view()).1, &numeric, 1e-6);
        }
        let loss = |scores: ArrayView2<f64>| naive::svm_hinge(scores, &labels).unwrap();
        let numeric = numeric_gradient(|scores| loss(scores).0, scores.view(), STEP);
        assert_smooth(&format!("svm {samples}x{classes}"), &loss(scores.view()).1, &numeric, 1e-8);
    }
}
