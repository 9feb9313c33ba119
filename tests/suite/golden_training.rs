//! Training against golden numbers: what PyTorch computes in f64 for optimizers and whole networks (`tests/golden`, by
//! `scripts/gen_golden.py`).

use crate::common::{Golden, assert_close, golden};
use gemmnet::Element;
use gemmnet::gradcheck::rel_error_norm;
use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::ops::batchnorm::BatchNorm;
use gemmnet::optim::{Group, LearningRate, Optimizer, Progress, Select, UpdateRule};
use gemmnet::params::{Layout, ParamKind, Params};
use ndarray::{Array1, Array2, Array3, ArrayD, ArrayView2, Axis, Ix4, IxDyn, arr0};

/// The update rule that a case names, with its hyperparameters.
fn rule_of(case: &Golden, name: &str) -> UpdateRule {
    match name {
        "sgd" => UpdateRule::Sgd,
        "momentum" => UpdateRule::Momentum { momentum: case.param("momentum") },
        "nesterov" => UpdateRule::Nesterov { momentum: case.param("momentum") },
        "adagrad" => UpdateRule::AdaGrad { epsilon: case.param("eps") },
        "rmsprop" => UpdateRule::RmsProp { decay: case.param("decay"), epsilon: case.param("eps") },
        "adam" => {
            UpdateRule::Adam { beta1: case.param("beta1"), beta2: case.param("beta2"), epsilon: case.param("eps") }
        }
        "adamw" => UpdateRule::AdamW {
            beta1: case.param("beta1"),
            beta2: case.param("beta2"),
            epsilon: case.param("eps"),
            weight_decay: case.param("weight_decay"),
        },
        name => panic!("unknown update rule '{name}'"),
    }
}

#[test]
fn every_update_rule_makes_the_steps_of_pytorch() {
    let cases = golden("optimizer");
    for case in &cases {
        check_steps::<f64>(case);
        check_steps::<f32>(case);
    }
    for rule in UpdateRule::ALL.into_iter().filter(|rule| rule.name() != "muon") {
        assert!(cases.iter().any(|case| case.name == rule.name()), "no case for {}", rule.name());
    }
}

fn check_steps<T: Element>(case: &Golden) {
    let start: Array2<f64> = case.array("start");
    let mut layout = Layout::default();
    layout.push("affine1.weight".into(), start.shape(), ParamKind::Weight);
    let to = |values: ArrayView2<f64>| {
        let mut params = Params::<T>::zeros(layout.clone());
        params.values_mut().iter_mut().zip(values).for_each(|(to, from)| *to = T::of(*from));
        params
    };
    let (grads, after): (Array3<f64>, Array3<f64>) = (case.array("grads"), case.array("after"));
    assert_eq!(grads.len_of(Axis(0)), 5, "five steps");
    let mut params = to(start.view());
    let rate = LearningRate::constant(case.param("lr")).unwrap();
    let groups = vec![Group::new(Select::ALL, rule_of(case, &case.name), rate)];
    let mut optimizer = Optimizer::<T>::new(groups, &params).unwrap();
    for (step, (grads, want)) in grads.outer_iter().zip(after.outer_iter()).enumerate() {
        optimizer.step(&mut params, &to(grads), Progress::default());
        let what = format!("{} in {}, step {}", case.name, T::NAME, step + 1);
        let got = Array1::from_iter(params.values().iter().map(|w| w.f64()));
        let want = Array1::from_iter(want.iter().copied());
        if T::NAME == "f64" {
            assert_close(&got, &want, 8.0 * f64::EPSILON, step + 1, &what);
        } else {
            let error = rel_error_norm(&want, &got);
            assert!(error <= 1e-6, "{what}: off by {error:e} in norm");
        }
    }
}

/// Our names of the fixture's parameters.
const NAMES: [(&str, &str); 8] = [
    ("conv1.weight", "w1"),
    ("conv1.bias", "b1"),
    ("bn1.weight", "gamma1"),
    ("bn1.bias", "beta1"),
    ("affine1.weight", "w2"),
    ("affine1.bias", "b2"),
    ("affine2.weight", "w3"),
    ("affine2.bias", "b3"),
];

#[test]
fn networks_train_as_in_pytorch() {
    let (mut plain, mut normalized) = (0, 0);
    for case in golden("network") {
        let net = initial_network(&case);
        if net.statistics().count() == 0 {
            plain += 1
        } else {
            normalized += 1
        }
        check_first_step(&case, net);
        check_losses(&case, initial_network(&case));
    }
    assert!(plain > 0 && normalized > 0);
}

/// The case's network with the case's initial parameters, every one of them.
fn initial_network(case: &Golden) -> Network<f64> {
    assert_eq!(case.param::<f64>("batchnorm_eps"), BatchNorm::default().eps);
    let spec: NetworkSpec = case.param::<String>("notation").parse().unwrap();
    let x = case.array::<Ix4>("x");
    let mut net = Network::new(&spec, [x.dim().1, x.dim().2, x.dim().3], Init::He, 0).unwrap();
    for name in parameter_names(&net) {
        let mut param = net.params_mut().get_mut(&name).expect("its own name");
        let want: ArrayD<f64> = case.array(golden_name(&name));
        assert_eq!(param.shape(), want.shape(), "'{}', {name}", case.name);
        param.assign(&want);
    }
    net
}

fn parameter_names(net: &Network<f64>) -> Vec<String> {
    net.params().iter().map(|param| param.name.clone()).collect()
}

fn golden_name(name: &str) -> &'static str {
    NAMES.iter().find(|(ours, _)| *ours == name).unwrap_or_else(|| panic!("{name} is not in the table")).1
}

/// Scores, loss and gradients before the first step.
fn check_first_step(case: &Golden, mut net: Network<f64>) {
    /// Roundings of four layers, relative to an array's largest value.
    const TOLERANCE: f64 = 1e-14;
    let (x, labels) = (case.array::<Ix4>("x"), case.param::<Vec<usize>>("labels"));
    let what = |part: &str| format!("'{}', {part}", case.name);

    // From 0 the running statistics become the batch's times 1 - momentum, the weight of what is new.
    net.statistics_mut().values_mut().fill(0.0);
    let loss = net.regularized_loss(x.view(), &labels, case.param("l2")).unwrap();
    let first = case.array::<IxDyn>("losses")[[0]];
    assert_close(&arr0(loss), &arr0(first), TOLERANCE, labels.len(), &what("first loss"));
    for name in parameter_names(&net) {
        let gradient = net.grads().get(&name).expect("its own name");
        if name == "affine1.weight" {
            let sums: Array1<f64> = gradient.sum_axis(Axis(0)).into_dimensionality().expect("a matrix has columns");
            assert_close(&sums, &case.array("dw2_column_sums"), TOLERANCE, gradient.shape()[0], &what("dw2"));
        } else {
            let key = format!("d{}", golden_name(&name));
            assert_close(&gradient, &case.array::<IxDyn>(&key), TOLERANCE, x.len(), &what(&key));
        }
    }

    // With the batch's statistics as the running ones, test mode gives the scores of training mode.
    let new = 1.0 - BatchNorm::default().momentum;
    net.statistics_mut().values_mut().iter_mut().for_each(|value| *value /= new);
    let scores = net.predict(x.view()).unwrap();
    assert_close(&scores, &case.array("scores"), TOLERANCE, x.len(), &what("scores"));
}

/// The losses of ten steps of Adam, each before its step and with its L2 term.
fn check_losses(case: &Golden, mut net: Network<f64>) {
    /// Roundings grow from step to step, since Adam divides by the size of the gradient.
    const TOLERANCE: f64 = 1e-12;
    let (x, labels) = (case.array::<Ix4>("x"), case.param::<Vec<usize>>("labels"));
    let rate = LearningRate::constant(case.param("lr")).unwrap();
    let groups = Group::classic(rule_of(case, "adam"), rate, case.param("l2"));
    let mut optimizer = Optimizer::new(groups, net.params()).unwrap();
    let want: Array1<f64> = case.array("losses");
    let got = Array1::from_shape_fn(want.len(), |step| {
        let data_loss =
            net.loss(x.as_slice().expect("standard layout"), &labels, StepKey { seed: 0, step: step as u64 }).unwrap();
        let (params, grads) = net.params_and_grads();
        data_loss + optimizer.step(params, grads, Progress::default()).regularization
    });
    assert_eq!(want.len(), 10);
    assert!(got[9] < 0.5 * got[0], "'{}': it learns: {got}", case.name);
    assert_close(&got, &want, TOLERANCE, 1, &format!("'{}', losses", case.name));
}
