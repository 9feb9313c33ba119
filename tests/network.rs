//! Whole networks: gradients of every parameter, test mode against training mode, and what does not fit.

mod common;

use common::random_array;
use gemmnet::gradcheck;
use gemmnet::models::{FullyConnectedNet, ThreeLayerConvNet};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::Network;
use gemmnet::nn::notation::NetworkSpec;
use ndarray::{Array4, ArrayD};

fn net(notation: &str, input: [usize; 3]) -> Network<f64> {
    Network::new(&notation.parse::<NetworkSpec>().unwrap(), input, Init::He, 3).unwrap()
}

/// Every parameter's gradient against numeric differences of the loss. The loss is about 1, so known to 1e-16, and its
/// difference over 2 `step` to 1e-16 / `step`: a longer step serves smaller gradients, a shorter one sharper curves.
fn check_gradients(name: &str, net: &mut Network<f64>, x: &Array4<f64>, y: &[usize], l2: f64, step: f64) {
    /// The seed accepts 0.01.
    const LIMIT: f64 = 1e-5;
    /// Gradients that vanish (a bias that batchnorm cancels) come out as the difference's noise, some 1e-11.
    const FLOOR: f64 = 1e-6;
    net.regularized_loss(x.view(), y, l2).unwrap();
    let analytic: Vec<(String, ArrayD<f64>)> =
        net.grads().iter().map(|p| (p.name.clone(), net.grads().get(&p.name).unwrap().to_owned())).collect();
    let (mut checked, mut skipped) = (0, 0);
    for (param, gradient) in analytic {
        let at = net.params().get(&param).unwrap().to_owned();
        let numeric = gradcheck::numeric_gradient(
            |value: ndarray::ArrayViewD<f64>| {
                net.params_mut().get_mut(&param).unwrap().assign(&value);
                net.regularized_loss(x.view(), y, l2).unwrap()
            },
            at.view(),
            step,
        );
        net.params_mut().get_mut(&param).unwrap().assign(&at);
        for ((&a, &b), &kink) in gradient.iter().zip(&numeric.gradient).zip(&numeric.kink) {
            let error = (a - b).abs() / (a.abs() + b.abs()).max(FLOOR);
            assert!(
                kink || error <= LIMIT,
                "{name}: {param}: analytic {a:e}, numeric {b:e}, relative error {error:.1e}"
            );
            checked += usize::from(!kink);
            skipped += usize::from(kink);
        }
    }
    assert!(skipped * 10 <= checked, "{name}: {skipped} of {checked} points lie next to a kink");
}

#[test]
fn the_three_layer_net_has_right_gradients() {
    let model = ThreeLayerConvNet {
        input_dim: [3, 16, 16],
        num_filters: 3,
        filter_size: 3,
        hidden_dim: 7,
        ..Default::default()
    };
    let x = random_array((2, 3, 16, 16), 1);
    for (use_batchnorm, weight_scale) in [(false, 1e-2), (true, 1e-1)] {
        let mut net = ThreeLayerConvNet { use_batchnorm, weight_scale, ..model }.build(0).unwrap();
        check_gradients(&format!("batchnorm {use_batchnorm}"), &mut net, &x, &[4, 9], 0.1, 1e-5);
    }
}

#[test]
fn networks_of_every_kind_have_right_gradients() {
    let x = random_array((3, 2, 8, 6), 2);
    for notation in [
        "conv3-relu-conv4-relu-pool-affine5-relu-affine4",
        "[conv3-bn-relu-conv3-bn-relu-pool]x2-affine5-bn-relu-affine4-svm",
        "conv4k3s2p1-silu-avgpool2-affine4-softmax0.1", // pools whose activation needs the product again
        "conv4g2-gelu-pool3s2p1-affine4",               // groups, overlapping pool
        "conv4k5x3d1-leaky0.2-pool-affine4",
        "pool-conv4k1-bn-gelu-gap", // no parameters before the first block that is trained
        "conv3-pool-bn-relu-affine4-silu", // a block without a product
        "affine6-bn-gelu-affine6-leaky-affine4",
        "bn-conv3p0-relu-affine4", // batchnorm of the images themselves
    ] {
        let mut net = net(notation, [2, 8, 6]);
        check_gradients(notation, &mut net, &x, &[0, 3, 3], 0.01, 1e-4);
    }
    let model = FullyConnectedNet {
        input_dim: [2, 8, 6],
        hidden_dims: vec![7, 6, 5],
        num_classes: 4,
        use_batchnorm: true,
        dropout: 0.25,
        weight_scale: 0.3,
    };
    check_gradients("fully connected", &mut model.build(1).unwrap(), &x, &[0, 3, 2], 0.0, 1e-4);
}

#[test]
fn test_mode_agrees_with_training_mode_once_the_statistics_have_settled() {
    let mut net = net("[conv4-bn-relu-pool]x2-affine6-bn-relu-affine3", [2, 8, 8]);
    let x = random_array((16, 2, 8, 8), 3);
    let y: Vec<usize> = (0..16).map(|i| i % 3).collect();
    let mut training = 0.0;
    for _ in 0..300 {
        training = net.regularized_loss(x.view(), &y, 0.0).unwrap();
    }
    let scores = net.predict(x.view()).unwrap();
    let (test, _) = gemmnet::naive::softmax_cross_entropy(scores.view(), &y, 0.0).unwrap();
    assert!((test - training).abs() <= 1e-6 * training, "training mode {training}, test mode {test}");
}

#[test]
fn what_does_not_fit_is_refused_when_the_network_is_built() {
    for (notation, says) in [
        ("conv4k9p0-affine3", "window of 9 does not fit"),
        ("conv4", "one score per class"),
        ("pool-pool-pool-pool-affine3", "does not fit"),
        ("conv4g3-affine3", "groups"),
    ] {
        let spec: NetworkSpec = notation.parse().unwrap();
        let error = Network::<f32>::new(&spec, [2, 8, 8], Init::He, 0).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains(says), "{notation}: {error}");
    }
    let mut net = net("affine3", [2, 8, 8]);
    assert!(net.regularized_loss(random_array((1, 2, 8, 7), 0).view(), &[0], 0.0).is_err());
    assert!(net.regularized_loss(random_array((1, 2, 8, 8), 0).view(), &[3], 0.0).is_err());
}
