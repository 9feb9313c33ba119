//! Whole networks: gradients of every parameter, test mode against training mode, and what does not fit.

use crate::common::random_array;
use gemmnet::gradcheck;
use gemmnet::models::{FullyConnectedNet, ThreeLayerConvNet};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::nn::session::Session;
use gemmnet::ops::loss::softmax_cross_entropy_into;
use gemmnet::optim::{Group, LearningRate, Optimizer, Progress, Select};
use gemmnet::parallel::with_threads;
use ndarray::{Array4, ArrayD};

fn net(notation: &str, input: [usize; 3]) -> Network<f64> {
    Network::new(&notation.parse::<NetworkSpec>().unwrap(), input, Init::He, 3).unwrap()
}

/// Every parameter's gradient against numeric differences of the loss. The loss is about 1, so known to 1e-16, and its
/// difference over 2 `step` to 1e-16 / `step`: a longer step serves smaller gradients, a shorter one sharper curves.
fn check_gradients(name: &str, net: &mut Network<f64>, x: &Array4<f64>, y: &[usize], l2: f64, step: f64) {
    /// CS231n accepts 0.01.
    const LIMIT: f64 = 1e-5;
    /// Gradients that vanish (a bias that batchnorm cancels) come out as the difference's noise, some 1e-11.
    const FLOOR: f64 = 1e-6;
    net.regularized_loss(x.view(), y, l2).unwrap();
    let analytic: Vec<(String, ArrayD<f64>)> =
        net.grads().iter().map(|p| (p.name.clone(), net.grads().get(&p.name).unwrap().to_owned())).collect();
    let (mut checked, mut skipped) = (0, 0);
    for (param, gradient) in analytic {
        let at = net.params().get(&param).unwrap().to_owned();
        let loss = |value: ndarray::ArrayViewD<f64>| {
            net.params_mut().get_mut(&param).unwrap().assign(&value);
            net.regularized_loss(x.view(), y, l2).unwrap()
        };
        // Thousands of losses of a few images each: waking other threads takes longer than one of them.
        let numeric = with_threads(1, || gradcheck::numeric_gradient(loss, at.view(), step)).unwrap();
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
        "conv3-pool-bn-relu-conv3-pool2x3-bn-silu-affine4", // pools before batchnorm
        "conv3-pool-bn-gelu-pool-affine4", // and another behind it
        "conv3-relu-res[conv3-relu-conv3]-relu-affine4",
        "res[conv4s2-bn-relu-conv4-bn]-relu-gap-affine4", // a projection, whose input needs no gradient
        "conv3-res[conv4s2-relu-conv4]-gelu-affine4",     // a projection, whose input needs one
        "conv3-res[res[conv3]-silu-conv3-dropout0]-leaky0.1-affine4", // residuals within each other
        "conv3-res[bn]-res[relu]-res[affine144]-affine4", // blocks without product, other sizes
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
        ("res[conv4p0]-affine3", "which no stride of a 1x1 convolution does"),
        // More than any memory: see fuzz/fuzz_targets/notation.rs.
        ("affine1000000-affine1000000-affine3", "MiB of memory for its parameters"),
    ] {
        let spec: NetworkSpec = notation.parse().unwrap();
        let error = Network::<f32>::new(&spec, [2, 8, 8], Init::He, 0).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains(says), "{notation}: {error}");
    }
    let mut net = net("affine3", [2, 8, 8]);
    let ragged = net.scores(&vec![0.0; 256], &mut [0.0; 7]).unwrap_err().to_string();
    assert!(ragged.contains("scores has shape [7]"), "{ragged}");
    assert!(net.regularized_loss(random_array((1, 2, 8, 7), 0).view(), &[0], 0.0).is_err());
    assert!(net.regularized_loss(random_array((1, 2, 8, 8), 0).view(), &[3], 0.0).is_err());
}

fn labels(images: usize, classes: usize) -> Vec<usize> {
    (0..images).map(|image| image % classes).collect()
}

/// A call that fails, or whose loss is worth nothing, leaves parameters and running statistics as they were.
#[test]
fn a_rejected_call_leaves_no_trace() {
    let mut net = net("conv4-bn-relu-affine6-bn-affine3", [2, 8, 8]);
    let x = random_array::<f64, _>((4, 2, 8, 8), 1).into_raw_vec_and_offset().0;
    net.loss(&x, &labels(4, 3), StepKey::default()).unwrap();
    let before = (net.params().values().to_vec(), net.statistics().values().to_vec());
    let check = |net: &Network<f64>, what: &str| {
        assert!(before.0 == net.params().values() && before.1 == net.statistics().values(), "{what}");
    };
    assert!(net.loss(&x, &[0, 1, 2, 3], StepKey::default()).unwrap_err().to_string().contains("label 3"));
    check(&net, "a label that is no class");
    assert!(net.loss(&[], &[], StepKey::default()).is_err());
    check(&net, "no images");
    assert!(net.loss(&x[1..], &labels(4, 3), StepKey::default()).is_err());
    check(&net, "half an image");
    let refused = net.loss_with(&x, 4, StepKey::default(), |_, _| Err(gemmnet::Error::invalid("loss", "no", "do not")));
    assert!(refused.is_err());
    check(&net, "a loss of one's own that fails");
    let endless: Vec<f64> = x.iter().map(|x| x * f64::INFINITY).collect();
    assert!(!net.loss(&endless, &labels(4, 3), StepKey::default()).unwrap().is_finite());
    check(&net, "a loss that is no number");
}

/// Scores of an image are the same bits alone and in any company, in a network and in a session; with OpenBLAS' AVX2 kernels
/// but for rounding.
#[test]
fn scores_do_not_depend_on_the_other_images() {
    fn same<T: gemmnet::Element>(got: &[T], want: &[T]) -> bool {
        let tolerance = if gemmnet::blas::setup().rows_alike { 0.0 } else { 1e-4 };
        let largest = want.iter().fold(0.0_f64, |most, v| most.max(v.f64().abs()));
        got.iter().zip(want).all(|(got, want)| (got.f64() - want.f64()).abs() <= tolerance * largest)
    }
    fn check<T: gemmnet::Element>(notation: &str) {
        let spec: NetworkSpec = notation.parse().unwrap();
        let mut net = Network::<T>::new(&spec, [3, 16, 16], Init::He, 0).unwrap();
        let image = 3 * 256;
        let x = random_array::<T, _>((40, 3, 16, 16), 1).into_raw_vec_and_offset().0;
        net.loss(&x, &labels(40, 7), StepKey::default()).unwrap();
        let session = Session::new(&net, 40).unwrap();
        let mut scratch = session.scratch();
        let (mut together, mut served) = (vec![T::zero(); 40 * 7], vec![T::zero(); 40 * 7]);
        net.scores(&x, &mut together).unwrap();
        session.run(&x, &mut served, &mut scratch).unwrap();
        for size in [1, 2, 3, 7, 16, 39] {
            let mut scores = vec![T::zero(); size * 7];
            for first in [0, 40 - size] {
                let (x, here) = (&x[first * image..][..size * image], first * 7..(first + size) * 7);
                net.scores(x, &mut scores).unwrap();
                assert!(same(&scores, &together[here.clone()]), "{} {notation}: {size} images from {first}", T::NAME);
                session.run(x, &mut scores, &mut scratch).unwrap();
                assert!(same(&scores, &served[here]), "{} {notation}: session, {size} images from {first}", T::NAME);
            }
        }
    }
    for notation in [
        "conv32-relu-pool-affine500-relu-affine7",
        "conv16-bn-relu-conv32-bn-relu-pool-conv64-relu-gap-affine7",
        "conv320k1-relu-conv16-relu-affine300-relu-affine7", // long sums
        "conv16-relu-res[conv32s2-bn-relu-conv32-bn]-relu-affine7",
    ] {
        check::<f32>(notation);
        check::<f64>(notation);
    }
}

/// Parameters that are not trained cost nothing and change nothing for the others.
/// What the notation leaves out has no parameter, and what it fixes is there, as it began, and not trained.
#[test]
fn parameters_that_are_left_out_or_fixed() {
    let net = net("conv4b0-relu-bn0.6g0-conv4b0-pool-bn0.9g0e0.001-gap-affine3b0", [2, 8, 8]);
    let names: Vec<_> = net.params().iter().map(|p| (p.name.as_str(), p.fixed)).collect();
    let want = [
        ("conv1.weight", false),
        ("bn1.weight", true),
        ("bn1.bias", false),
        ("conv2.weight", false),
        ("bn2.weight", true),
        ("bn2.bias", false),
        ("affine1.weight", false),
    ];
    assert_eq!(names, want);
    assert!(net.params().get("bn2.weight").unwrap().iter().all(|&scale| scale == 1.0));
    let rate = LearningRate::constant(0.1).unwrap();
    let classic = Group::classic("adam".parse().unwrap(), rate, 0.0);
    let mut optimizer = Optimizer::new(classic.clone(), net.params()).unwrap();
    let trained: Vec<_> = optimizer.trained(Progress::default()).collect();
    assert_eq!(trained, [true, false, true, true, false, true, true]);
    assert!(optimizer.state_mut().all(|(_, param, _)| !param.fixed));
    let scales = Group::new(Select::SCALES, "adam".parse().unwrap(), rate);
    let error = Optimizer::new([vec![scales], classic].concat(), net.params()).unwrap_err().to_string();
    assert!(error.contains("`scale` selects no parameter; choose from conv1.weight, bn1.bias"), "{error}");
}

#[test]
fn whitening_is_for_images_alone_and_fits_them() {
    for (notation, part) in
        [("conv4-whiten2-gap-affine3", "begin the network with whiten2"), ("whiten9-gap", "window of 9")]
    {
        let made = Network::<f64>::new(&notation.parse().unwrap(), [2, 8, 8], Init::He, 0);
        let error = made.unwrap_err().to_string();
        assert!(error.contains(part), "{notation}: {error}");
    }
    let mut net = net("whiten2-gap", [2, 8, 8]);
    for x in [&[][..], &[f64::INFINITY; 128]] {
        let error = net.whiten(x).unwrap_err().to_string();
        assert!(error.contains("no finite images"), "{error}");
    }
}

#[test]
fn what_is_frozen_has_no_gradient_and_changes_no_other() {
    let mut net = net("conv4-relu-res[conv4-bn-relu-conv4]-relu-pool-affine6-bn-relu-affine3", [2, 8, 8]);
    let x = random_array::<f64, _>((4, 2, 8, 8), 1).into_raw_vec_and_offset().0;
    let y = labels(4, 3);
    net.loss(&x, &y, StepKey::default()).unwrap();
    let all = net.grads().clone();
    let names: Vec<String> = net.params().iter().map(|param| param.name.clone()).collect();
    // Everything below the affine layers; one filter; everything but biases; everything.
    let choices: [&dyn Fn(&str) -> bool; 4] = [
        &|name| name.starts_with("affine") || name.starts_with("bn2"),
        &|name| name != "conv2.weight",
        &|name| name.ends_with("weight"),
        &|_| false,
    ];
    for (choice, trained) in choices.iter().enumerate() {
        net.set_trained(names.iter().map(|name| trained(name)));
        net.loss(&x, &y, StepKey::default()).unwrap();
        for name in &names {
            let (got, want) = (net.grads().get(name).unwrap(), all.get(name).unwrap());
            let norm = name.starts_with("bn");
            assert!(!trained(name) || got == want, "choice {choice}: {name} is not what it was");
            assert!(trained(name) || norm || got.iter().all(|&g| g == 0.0), "choice {choice}: {name} has a gradient");
        }
    }
}

#[test]
fn a_clone_is_a_network_of_its_own() {
    let mut net = net("conv4-bn-relu-res[conv4]-affine3", [2, 8, 8]);
    let x = random_array::<f64, _>((4, 2, 8, 8), 1).into_raw_vec_and_offset().0;
    net.loss(&x, &labels(4, 3), StepKey::default()).unwrap();
    let mut other = net.clone();
    let before = other.params().values().to_vec();
    net.params_mut().values_mut().iter_mut().for_each(|value| *value *= 2.0);
    assert_eq!(other.params().values(), before);
    assert_eq!(other.statistics().values(), net.statistics().values());
    let loss = other.loss(&x, &labels(4, 3), StepKey::default()).unwrap();
    net.params_mut().values_mut().copy_from_slice(&before);
    assert_eq!(net.loss(&x, &labels(4, 3), StepKey::default()).unwrap(), loss);
}

/// A loss of one's own gets the scores and gives their gradient: here the softmax again.
#[test]
fn a_loss_of_ones_own() {
    let mut net = net("conv4-bn-relu-affine3", [2, 8, 8]);
    let (x, y) = (random_array::<f64, _>((4, 2, 8, 8), 1), labels(4, 3));
    let x = x.as_slice().unwrap();
    let mut twin = net.clone();
    let want = net.loss(x, &y, StepKey::default()).unwrap();
    let got = twin
        .loss_with(x, 4, StepKey::default(), |scores, dscores| softmax_cross_entropy_into(scores, &y, 3, 0.0, dscores))
        .unwrap();
    assert_eq!((got, twin.grads().values()), (want, net.grads().values()));
}

#[test]
fn the_summary_shows_the_graph() {
    let net = net("conv4-relu-res[conv6s2-bn]-relu-gap-affine3", [2, 8, 8]);
    let lines: Vec<_> = net.summary().into_iter().map(|step| (step.name, step.inputs, step.output)).collect();
    let want = [
        ("conv4-relu", vec![0], vec![4, 8, 8]),
        ("conv6s2-bn", vec![1], vec![6, 4, 4]),
        ("conv6k1s2p0-bn", vec![1], vec![6, 4, 4]),
        ("add-relu", vec![2, 3], vec![6, 4, 4]),
        ("gap", vec![4], vec![6]),
        ("affine3", vec![5], vec![3]),
    ];
    assert_eq!(lines, want.map(|(name, inputs, output)| (name.to_owned(), inputs, output)));
    let names: Vec<_> = net.params().iter().map(|param| param.name.as_str()).collect();
    let want = [
        "conv1.weight",
        "conv1.bias",
        "conv2.weight",
        "bn1.weight",
        "bn1.bias",
        "shortcut1.weight",
        "shortcut1.bn.weight",
        "shortcut1.bn.bias",
        "affine1.weight",
        "affine1.bias",
    ];
    assert_eq!(names, want);
}
