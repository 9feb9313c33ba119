//! What the recipes for CIFAR-10 are made of, against golden numbers: what PyTorch computes in f64 (`tests/golden`, by
//! `scripts/gen_golden.py`) with the formulas of Jordan's (2024).

use std::collections::BTreeSet;

use crate::common::{assert_close, golden};
use gemmnet::data::{Augment, Dataset, Draw, Fill, Flip, Normalization, Normalizer, Split, View, Views};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::optim::{Group, LearningRate, Optimizer, Progress, Select, UpdateRule};
use gemmnet::params::{Layout, ParamKind, Params};
use gemmnet::train::predict;
use ndarray::{Array2, Array4, Array5, Axis, Ix4};

/// The filters are PyTorch's, each up to its sign, then all their negatives; training leaves them as they are.
#[cfg(feature = "blas")]
#[test]
fn whitening_filters_are_pytorchs_up_to_their_signs() {
    for case in golden("whitening") {
        let (x, want): (Array4<f64>, Array4<f64>) = (case.array("x"), case.array("filters"));
        let (size, &[_, c, h, w]) = (case.param::<usize>("size"), x.shape()) else { panic!() };
        let spec: NetworkSpec = format!("whiten{size}-gelu-gap-affine2").parse().unwrap();
        let mut network = Network::<f64>::new(&spec, [c, h, w], Init::Dirac, 0).unwrap();
        assert!(network.awaits_whitening());
        network.whiten(x.as_slice().unwrap()).unwrap();
        assert!(!network.awaits_whitening());
        let got = network.params().get("whiten1.weight").unwrap().to_owned().into_dimensionality::<Ix4>().unwrap();
        let d = want.len_of(Axis(0));
        assert_eq!(got.len_of(Axis(0)), 2 * d, "{}", case.name);
        for (i, want) in want.outer_iter().enumerate() {
            let (filter, negative) = (got.index_axis(Axis(0), i), got.index_axis(Axis(0), i + d));
            assert_eq!(filter, -&negative);
            let same = (&filter * &want).sum() > 0.0;
            // Directions that hardly occur are determined less well.
            assert_close(if same { &filter } else { &negative }, &want, 1e-9, 1, &format!("{}, {i}", case.name));
        }

        let groups = Group::classic("momentum".parse().unwrap(), LearningRate::constant(0.1).unwrap(), 0.1);
        let mut optimizer = Optimizer::new(groups, network.params()).unwrap();
        network.set_trained(optimizer.trained(Progress::default()));
        let before = network.params().clone();
        network.loss(&x.as_slice().unwrap()[..c * h * w], &[1], StepKey::default()).unwrap();
        let (params, grads) = network.params_and_grads();
        optimizer.step(params, grads, Progress::default());
        assert_eq!(network.params().get("whiten1.weight"), before.get("whiten1.weight"));
        assert_ne!(network.params().get("whiten1.bias"), before.get("whiten1.bias"));
    }
}

#[test]
fn five_steps_of_muon_are_the_recipes() {
    for case in golden("muon") {
        let (start, grads, after): (Array4<f64>, Array5<f64>, Array5<f64>) =
            (case.array("start"), case.array("grads"), case.array("after"));
        let mut layout = Layout::default();
        layout.push("w".into(), start.shape(), ParamKind::Weight);
        let mut w = Params::<f64>::zeros(layout);
        w.get_mut("w").unwrap().assign(&start);
        let momentum = case.param("momentum");
        let rule = UpdateRule::Muon { momentum, iterations: 3, weight_decay: 0.0, fixed_norm: true };
        let rate = LearningRate::new(case.param("rate"), "linear".parse().unwrap(), 0.0).unwrap();
        let mut optimizer = Optimizer::new(vec![Group::new(Select::ALL, rule, rate)], &w).unwrap();
        for (step, (grad, after)) in grads.outer_iter().zip(after.outer_iter()).enumerate() {
            let mut grads = w.zeros_like();
            grads.get_mut("w").unwrap().assign(&grad);
            optimizer.step(&mut w, &grads, Progress { step, steps_per_epoch: 5, steps: 5 });
            let got = w.get("w").unwrap().into_dimensionality::<Ix4>().unwrap();
            assert_close(&got, &after, 1e-12, 1, &format!("{}, step {step}", case.name));
        }
    }
}

/// Images of bytes, as they are.
fn unchanged(x: &Array4<f64>) -> Dataset {
    let (bytes, dim) = (x.mapv(|value| value as u8), [x.len_of(Axis(1)), x.len_of(Axis(2)), x.len_of(Axis(3))]);
    let labels = vec![0_u8; x.len_of(Axis(0))];
    let labelled = (bytes.view(), &labels[..]);
    let data = Dataset::from_arrays(labelled, labelled, labelled, Normalization::MeanImage).unwrap();
    let as_they_are = Normalizer::new(dim, vec![0.0; dim.iter().product()], vec![1.0; dim[0]]).unwrap();
    data.with_normalizer(as_they_are).unwrap()
}

/// The images of a batch, one after the other.
fn drawn(data: &Dataset, draw: Draw) -> Vec<f64> {
    let indices: Vec<usize> = (0..data.len(draw.split)).collect();
    let mut x = vec![f64::NAN; indices.len() * data.image_len()];
    data.fill_batch(draw, &indices, &mut x, &mut vec![0; indices.len()]).unwrap();
    x
}

#[test]
fn shifts_with_reflection_are_pytorchs() {
    let case = golden("augment").into_iter().find(|case| case.name == "shifts by up to 2").unwrap();
    let data = unchanged(&case.array("x"));
    let crops = [case.array::<ndarray::Ix4>("plain"), case.array("mirrored")];
    let places = || (-2..=2).flat_map(|down| (-2..=2).map(move |right| (down, right)));
    for (mirrored, crops) in [false, true].into_iter().zip(&crops) {
        for ((down, right), crop) in places().zip(crops.outer_iter()) {
            let view = View { mirrored, down, right };
            assert_eq!(drawn(&data, Draw::view(Split::Train, view)), crop.as_slice().unwrap(), "{view:?}");
        }
    }

    let augment = Augment { flip: Flip::Random, shift: 2, fill: Fill::Reflect, cutout: 0 };
    let mut seen = BTreeSet::new();
    for epoch in 0..1000 {
        let image = drawn(&data, Draw::augmented(Split::Train, Some(augment), 3, epoch));
        let found =
            crops.iter().flat_map(|crops| crops.outer_iter()).position(|crop| crop.as_slice().unwrap() == image);
        seen.insert(found.unwrap_or_else(|| panic!("epoch {epoch}: {image:?} is none of the crops")));
    }
    assert_eq!(seen.len(), 50, "every shift, plain and mirrored");
}

#[test]
fn six_views_are_weighted_as_in_the_recipe() {
    let case = golden("augment").into_iter().find(|case| case.name == "six views").unwrap();
    let (x, w): (Array4<f64>, Array2<f64>) = (case.array("x"), case.array("w"));
    let data = unchanged(&x);
    let mut network = Network::<f64>::new(&"affine3".parse().unwrap(), data.dim(), Init::He, 0).unwrap();
    network.params_mut().values_mut().fill(0.0);
    network.params_mut().get_mut("affine1.weight").unwrap().assign(&w);
    for (views, key) in [(Views::One, "one"), (Views::Two, "two"), (Views::Six, "six")] {
        let want: Array2<f64> = case.array(key);
        let mut got = Array2::zeros(want.raw_dim());
        for &(view, weight) in views.weighted() {
            let mut scores = Array2::zeros(want.raw_dim());
            let images = drawn(&data, Draw::view(Split::Test, view));
            network.scores(&images, scores.as_slice_mut().unwrap()).unwrap();
            got.scaled_add(weight, &scores);
        }
        assert_close(&got, &want, 1e-13, w.len_of(Axis(0)), key);
        let best: Vec<usize> = case.param(&format!("best of {key}"));
        let best: Vec<_> = best.into_iter().map(Some).collect();
        for batch in [1, 5, 100] {
            assert_eq!(predict(&mut network, &data, Split::Test, batch, views).unwrap(), best, "{key}, {batch}");
        }
    }
}

/// A summed loss is the number of images times the mean, and so are its gradients.
#[test]
fn a_sum_is_so_many_means() {
    for loss in ["softmax0.2", "svm"] {
        let network = |sum: &str| {
            let spec: NetworkSpec = format!("conv3-relu-gap-affine4-{loss}{sum}").parse().unwrap();
            Network::<f64>::new(&spec, [2, 4, 4], Init::He, 1).unwrap()
        };
        let x: Vec<f64> = (0..96).map(|i| f64::from(i * 7 % 13) - 6.0).collect();
        let (mut mean, mut sum) = (network(""), network("sum"));
        let [of_mean, of_sum] = [&mut mean, &mut sum].map(|net| net.loss(&x, &[0, 3, 2], StepKey::default()).unwrap());
        assert!((of_sum - 3.0 * of_mean).abs() <= 1e-14 * of_sum.abs(), "{loss}: {of_sum}, 3 times {of_mean}");
        for (got, want) in sum.grads().values().iter().zip(mean.grads().values()) {
            assert!((got - 3.0 * want).abs() <= 1e-13, "{loss}: {got}, 3 times {want}");
        }
    }
}
