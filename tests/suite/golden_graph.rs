//! Networks with branches, parameter groups, clipping and averages against golden numbers: what PyTorch computes in f64
//! (`tests/golden`, by `scripts/gen_golden.py`). Images and initial parameters are computed here as they are there.

use crate::common::{Golden, assert_close, golden};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::ops::batchnorm::BatchNorm;
use gemmnet::optim::{Ema, Group, LearningRate, Optimizer, Progress, Select, Stepped, UpdateRule};
use gemmnet::params::ParamKind;
use ndarray::{Array1, ArrayD, ArrayRef, ArrayView4, ArrayViewD, Axis, Ix1, IxDyn, arr0};

/// What roundings may make of a small network's numbers, relative to an array's largest value.
const SMALL: f64 = 1e-12;
/// What they may make of those of ResNet-20 in three steps; PyTorch's own differ by 6e-14 with other convolutions.
const DEEP: f64 = 1e-11;

/// From -1 to 1, multiples of 2^-10: the upper bits of a linear congruential generator (Knuth's of MMIX) that begins with
/// the FNV-1a hash of the name.
fn numbers(name: &str, len: usize) -> Vec<f64> {
    let hash = |state: u64, byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 53) as f64 - 1024.0) / 1024.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// The network of a case with its initial parameters.
fn network(case: &Golden) -> Network<f64> {
    let spec: NetworkSpec = case.param::<String>("notation").parse().unwrap();
    let mut network = Network::new(&spec, case.param("input"), Init::He, 0).unwrap();
    let params: Vec<_> = network.params().iter().cloned().collect();
    for param in params {
        let fan_in = match param.shape[..] {
            [inputs, _] => inputs,
            _ => param.shape.iter().skip(1).product(),
        };
        let mut scale = 1.0;
        while scale * scale * fan_in as f64 > 6.0 {
            scale /= 2.0;
        }
        let (start, scale) = match param.kind {
            ParamKind::Weight => (0.0, scale),
            ParamKind::Scale => (1.0, 0.25),
            _ => (0.0, 0.25),
        };
        let values = numbers(&param.name, param.range.len()).into_iter().map(|value| start + scale * value).collect();
        let values = ArrayD::from_shape_vec(param.shape, values).expect("as many as the shape says");
        network.params_mut().get_mut(&param.name).expect("its own name").assign(&values);
    }
    network
}

/// Images and labels of a step.
fn batch(case: &Golden, network: &Network<f64>, step: usize) -> (Vec<f64>, Vec<usize>) {
    let images: usize = case.param("images");
    let labels = (0..images).map(|i| (7 * i + 3 * step + 1) % network.classes()).collect();
    (numbers(&format!("images {step}"), images * network.input().iter().product::<usize>()), labels)
}

/// Losses of as many steps as the case has, each on a batch of its own. `after` sees the network, its loss and what the
/// optimizer said after each step.
fn train(
    case: &Golden,
    network: &mut Network<f64>,
    optimizer: &mut Optimizer<f64>,
    mut after: impl FnMut(usize, &Network<f64>, Stepped),
) {
    let want: Array1<f64> = case.array("losses");
    for (step, &want) in want.iter().enumerate() {
        let (x, labels) = batch(case, network, step);
        let loss = network.loss(&x, &labels, StepKey { seed: 0, step: step as u64 }).unwrap();
        assert_close(&arr0(loss), &arr0(want), DEEP, 1, &format!("'{}', loss of step {step}", case.name));
        let (params, grads) = network.params_and_grads();
        let stepped = optimizer.step(params, grads, Progress::default());
        after(step, network, stepped);
    }
}

/// Scores, loss and gradients of the first batch. `compare` is given a gradient, what is wanted of it, and its name.
fn check_first_step(
    case: &Golden,
    network: &mut Network<f64>,
    compare: impl Fn(ArrayViewD<'_, f64>, ArrayD<f64>, &str),
) {
    let (x, labels) = batch(case, network, 0);
    // From 0 the running statistics become the batch's times 1 - momentum, the weight of what is new.
    network.statistics_mut().values_mut().fill(0.0);
    let loss = network.loss(&x, &labels, StepKey::default()).unwrap();
    let want = case.array::<Ix1>("losses")[0];
    assert_close(&arr0(loss), &arr0(want), SMALL, 1, &format!("'{}', loss", case.name));
    for name in case.names("gradient") {
        let gradient = network.grads().get(name).unwrap_or_else(|| panic!("'{}' has no {name}", case.name));
        compare(gradient, case.array(&format!("gradient {name}")), name);
    }
    // A batchnorm behind a pool takes the bias before it away: PyTorch's gradient is rounding, and not in the file.
    let compared: Vec<&str> = case.names("gradient").collect();
    for param in network.grads().iter().filter(|param| !compared.contains(&param.name.as_str())) {
        let largest = network.grads().values()[param.range.clone()].iter().fold(0.0, |a: f64, g| a.max(g.abs()));
        assert!(param.kind == ParamKind::Bias && largest < SMALL, "'{}', {}: {largest}", case.name, param.name);
    }
    // With the batch's statistics as the running ones, test mode gives the scores of training mode.
    let new = 1.0 - BatchNorm::default().momentum;
    network.statistics_mut().values_mut().iter_mut().for_each(|value| *value /= new);
    assert_close(&predict(network, &x), &case.array("scores"), DEEP, 1, &format!("'{}', scores", case.name));
}

fn predict(network: &mut Network<f64>, x: &[f64]) -> ArrayD<f64> {
    let [c, h, w] = network.input();
    let x = ArrayView4::from_shape((x.len() / (c * h * w), c, h, w), x).expect("whole images");
    network.predict(x).unwrap().into_dyn()
}

/// Compares an array with what stands for it: sum, norm, product with numbers of its own, and 8 of its values.
fn check_summary(got: &ArrayRef<f64, IxDyn>, want: ArrayD<f64>, name: &str) {
    let got: Vec<f64> = got.iter().copied().collect();
    let want: Vec<f64> = want.into_iter().collect();
    let norm = got.iter().map(|value| value * value).sum::<f64>().sqrt();
    let product: f64 = got.iter().zip(numbers(&format!("probe {name}"), got.len())).map(|(a, b)| a * b).sum();
    let close = |got: f64, want: f64, size: f64, what: &str| {
        assert!((got - want).abs() <= DEEP * size, "{name}, {what}: got {got:e}, expected {want:e}");
    };
    close(norm, want[1], want[1], "norm");
    // Errors that know nothing of each other add up like the values' squares.
    close(got.iter().sum(), want[0], want[1], "sum");
    close(product, want[2], want[1], "product");
    for (i, &want) in want[3..].iter().enumerate() {
        let place = i * (got.len() - 1) / 7;
        close(got[place], want, want.abs().max(norm / (got.len() as f64).sqrt()), &format!("value {place}"));
    }
}

fn rate(case: &Golden, name: &str) -> LearningRate {
    LearningRate::constant(case.param(name)).unwrap()
}

/// ResNet-20 for CIFAR-10 (He et al. 2016) with shortcuts of option B.
#[test]
fn resnet20_makes_the_steps_of_pytorch() {
    let cases = golden("resnet20");
    let case = &cases[0];
    check_first_step(case, &mut network(case), |got, want, name| check_summary(&got, want, name));

    let mut network = network(case);
    assert_eq!(network.params().count(), 272_474);
    let rule = UpdateRule::Momentum { momentum: case.param("momentum") };
    let groups = vec![Group::new(Select::ALL, rule, rate(case, "lr"))];
    let mut optimizer = Optimizer::new(groups, network.params()).unwrap();
    train(case, &mut network, &mut optimizer, |_, _, _| {});
    let mut compared = 0;
    for name in case.names("after") {
        let value = network.params().get(name).or_else(|| network.statistics().get(name));
        let value = value.unwrap_or_else(|| panic!("there is no {name}"));
        check_summary(&value, case.array(&format!("after {name}")), name);
        compared += 1;
    }
    assert_eq!(compared, network.params().iter().chain(network.statistics().iter()).count());
    let (x, _) = batch(case, &network, 0);
    assert_close(&predict(&mut network, &x), &case.array("test_scores"), DEEP, 1, "test mode");
}

#[test]
fn residual_blocks_have_the_gradients_of_pytorch() {
    for case in golden("residual") {
        let mut network = network(&case);
        let what = |part: &str| format!("'{}', {part}", case.name);
        check_first_step(&case, &mut network, |got, want, name| assert_close(&got, &want, SMALL, 1, &what(name)));
    }
}

/// Their running statistics begin at 0 and 1, and what a step adds is the biased variance.
#[test]
fn residual_blocks_have_the_statistics_of_pytorch() {
    for case in golden("residual") {
        let mut network = network(&case);
        let (x, labels) = batch(&case, &network, 0);
        network.loss(&x, &labels, StepKey::default()).unwrap();
        for param in network.statistics().iter() {
            let got = network.statistics().get(&param.name).expect("its own name");
            assert_close(&got, &case.array(&param.name), SMALL, 1, &format!("'{}', {}", case.name, param.name));
        }
    }
}

/// Momentum for filters, Adam for the rest, batchnorm's scale frozen.
#[test]
fn groups_make_the_steps_of_pytorch() {
    let cases = golden("groups");
    let case = &cases[0];
    let mut network = network(case);
    let momentum = UpdateRule::Momentum { momentum: case.param("momentum") };
    let (beta1, beta2, epsilon) = (case.param("beta1"), case.param("beta2"), case.param("eps"));
    let groups = vec![
        Group::new("conv*.weight".parse().unwrap(), momentum, rate(case, "filters_lr")),
        Group::frozen(Select::SCALES),
        Group::new(Select::ALL, UpdateRule::Adam { beta1, beta2, epsilon }, rate(case, "lr")),
    ];
    let mut optimizer = Optimizer::new(groups, network.params()).unwrap();
    let mut compared = 0;
    train(case, &mut network, &mut optimizer, |step, network, _| {
        for param in network.params().iter() {
            let want: ArrayD<f64> = case.array(&format!("after {}", param.name));
            let got = network.params().get(&param.name).expect("its own name");
            let what = format!("{} after step {step}", param.name);
            assert_close(&got, &want.index_axis(Axis(0), step), SMALL, 1, &what);
            compared += 1;
        }
    });
    assert_eq!(compared, 5 * case.names("after").count());
}

/// Gradients clipped to a norm, and the average of the parameters, which begins after the first step.
#[test]
fn clipping_and_averages_are_those_of_pytorch() {
    let cases = golden("clip_ema");
    let case = &cases[0];
    let mut network = network(case);
    let groups = vec![Group::new(Select::ALL, UpdateRule::Sgd, rate(case, "lr"))];
    let mut optimizer = Optimizer::new(groups, network.params()).unwrap();
    optimizer.set_clip_norm(Some(case.param("limit"))).unwrap();
    let norms: Array1<f64> = case.array("norms");
    let mut average: Option<Ema<f64>> = None;
    train(case, &mut network, &mut optimizer, |step, network, stepped| {
        let norm = stepped.gradient_norm.expect("there is a limit");
        assert_close(&arr0(norm), &arr0(norms[step]), SMALL, 1, &format!("norm of step {step}"));
        match &mut average {
            None => average = Some(Ema::new(case.param("decay"), network.params()).unwrap()),
            Some(average) => average.update(network.params()),
        }
        let average = average.as_ref().expect("set above");
        for name in case.names("average") {
            let want: ArrayD<f64> = case.array(&format!("average {name}"));
            let got = average.params().get(name).unwrap_or_else(|| panic!("there is no {name}"));
            let what = format!("average of {name} after step {step}");
            assert_close(&got, &want.index_axis(Axis(0), step), SMALL, 1, &what);
        }
    });
    for name in case.names("after") {
        let got = network.params().get(name).unwrap_or_else(|| panic!("there is no {name}"));
        assert_close(&got, &case.array(&format!("after {name}")), SMALL, 1, name);
    }
}
