//! The record recipe as a whole, small: a whitening layer whose bias is trained for a while, Muon beside Nesterov's momentum,
//! images that alternate and are reflected, and a part of an epoch at the end.

use std::ops::ControlFlow;

use crate::common::random_array;
use gemmnet::data::{Augment, Dataset, Fill, Flip, Normalization, Split, Views};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::Network;
use gemmnet::optim::{Group, LearningRate, UpdateRule};
use gemmnet::parallel::with_threads;
use gemmnet::train::{Checkpoint, Solver, SolverOptions, accuracy};
use ndarray::Array4;

const NETWORK: &str =
    "whiten2-gelu-conv16b0-pool-bn0.6g0-gelu-conv16b0-bn0.6g0-gelu-pool7-affine4b0-div16-softmax0.2sum";

/// Images of one colour each, with noise: the class is the brightest channel, or none.
fn images() -> Dataset {
    let noise = random_array::<f64, _>((90, 3, 16, 16), 5);
    let images = Array4::from_shape_fn((90, 3, 16, 16), |(n, c, i, j)| {
        let bright = if n % 4 == c { 160.0 } else { 90.0 };
        (bright + 25.0 * noise[[n, c, i, j]]).clamp(0.0, 255.0) as u8
    });
    let labels: Vec<u8> = (0..90).map(|n| n % 4).collect();
    let part = |from: usize, to: usize| (images.slice(ndarray::s![from..to, .., .., ..]), &labels[from..to]);
    Dataset::from_arrays(part(0, 60), part(60, 70), part(70, 90), Normalization::PerChannel).unwrap()
}

fn options() -> SolverOptions {
    let rate = |rate, schedule: &str| LearningRate::new(rate, schedule.parse().unwrap(), 0.0).unwrap();
    let nesterov = UpdateRule::Nesterov { momentum: 0.85 };
    let muon = UpdateRule::Muon { momentum: 0.6, iterations: 3, weight_decay: 0.0, fixed_norm: true };
    let group = |select: &str, rule, rate| Group { l2: 1e-3, ..Group::new(select.parse().unwrap(), rule, rate) };
    SolverOptions {
        epochs: 2.5,
        batch_size: 10,
        groups: vec![
            group("whiten1.bias", nesterov, rate(0.05, "linear:1")),
            group("affine1.weight", nesterov, rate(0.7, "linear")),
            group("bias", nesterov, rate(0.05, "linear")),
            Group::new("weight".parse().unwrap(), muon, rate(0.24, "linear")),
        ],
        augment: Some(Augment { flip: Flip::Alternating, shift: 2, fill: Fill::Reflect, cutout: 3 }),
        seed: 2,
        verbose: false,
        ..SolverOptions::default()
    }
}

fn solver() -> Solver<f32> {
    let network = Network::new(&NETWORK.parse().unwrap(), [3, 16, 16], Init::Dirac, 2).unwrap();
    Solver::new(network, images(), options()).unwrap()
}

fn train(solver: &mut Solver<f32>, epoch: f64) {
    solver.train_to(epoch, |_| ControlFlow::Continue(())).unwrap();
}

/// The whole state as bytes.
fn state(solver: &Solver<f32>) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.safetensors");
    solver.checkpoint().save(&path).unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn it_learns_with_the_same_bits_at_any_number_of_threads() {
    let run = |threads| {
        with_threads(threads, || {
            let mut solver = solver();
            train(&mut solver, 2.5);
            state(&solver)
        })
        .unwrap()
    };
    let one = run(1);
    assert!(run(2) == one && run(5) == one);

    let mut solver = solver();
    train(&mut solver, 2.5);
    let history = solver.history().clone();
    // 6 batches an epoch; measured after the first, after each epoch, and at the end.
    assert_eq!((history.loss.len(), history.val_accuracy.len()), (15, 4));
    for views in [Views::One, Views::Two, Views::Six] {
        let data = images().with_normalizer(solver.data().normalizer().clone()).unwrap();
        let right = accuracy(solver.network_mut(), &data, Split::Test, 7, views).unwrap();
        assert!(right >= 0.9, "{right} with {views:?}");
    }
}

/// Stopped twice within epochs, once while the whitening's bias is trained and once after it, each time as another process
/// goes on from the file.
#[test]
fn it_goes_on_where_it_was() {
    let mut whole = solver();
    train(&mut whole, 2.5);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("part.safetensors");
    let mut part = solver();
    for epoch in [0.5, 1.3] {
        train(&mut part, epoch);
        part.checkpoint().save(&path).unwrap();
        part = Solver::resume(Checkpoint::load(&path).unwrap(), images()).unwrap();
    }
    train(&mut part, 2.5);
    assert!(state(&part) == state(&whole));
}
