//! Whole training steps of networks in f32: forward, backward, Adam. Work is in FLOP of the products.

use criterion::Criterion;
use gemmnet::Element;
use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::optim::{Group, LearningRate, Optimizer, Progress};
use ndarray::Array4;

use crate::common::{group, normal, slice, slow};

/// Name, notation, batch size.
const NETWORKS: [(&str, &str, usize); 3] = [
    ("three-layer", "conv64-relu-pool-affine500-relu-affine10", 50),
    ("three-layer", "conv64-relu-pool-affine500-relu-affine10", 500),
    (
        "vgg-like",
        "[conv64-bn-relu-conv64-bn-relu-pool]-[conv128-bn-relu-conv128-bn-relu-pool]-[conv256-bn-relu-conv256-bn-relu-pool]-affine10",
        128,
    ),
];

fn network<T: Element>(notation: &str) -> Network<T> {
    let spec = NetworkSpec::parse(notation).expect("the notations of the table can be read");
    Network::new(&spec, [3, 32, 32], Init::He, 0).expect("the layers of the table fit")
}

fn images<T: Element>(count: usize) -> (Array4<T>, Vec<usize>) {
    (normal([count, 3, 32, 32], 0), (0..count).map(|i| i % 10).collect())
}

/// Loss of the untrained network on a few images.
fn first_loss<T: Element>(notation: &str) -> f64 {
    let (x, y) = images::<T>(8);
    network::<T>(notation).loss(slice(&x), &y, StepKey::default()).expect("images and labels fit").f64()
}

fn bench(criterion: &mut Criterion, (name, notation, batch): (&str, &str, usize)) {
    // The operations have twins; of the whole network, f64 is one: the same weights, other kernels.
    let (single, double) = (first_loss::<f32>(notation), first_loss::<f64>(notation));
    assert!((single - double).abs() <= 1e-4 * double, "{name}: the loss is {single} in f32, {double} in f64");

    let mut network = network::<f32>(notation);
    let (x, y) = images(batch);
    let adam = "adam".parse().expect("Adam is a rule");
    let groups = Group::classic(adam, LearningRate::constant(1e-4).expect("1e-4 is a rate"), 1e-3);
    let mut optimizer = Optimizer::new(groups, network.params()).expect("the defaults are sound");
    let mut step = 0;

    let multiply_adds: usize = network.summary().iter().map(|layer| layer.multiply_adds).sum();
    // Forward, and twice as much backward.
    let mut benches = group(criterion, &format!("train step {name}"), 3 * 2 * batch * multiply_adds);
    slow(&mut benches);
    benches.bench_function(format!("batch {batch}"), |b| {
        b.iter(|| {
            step += 1;
            let key = StepKey { seed: 0, step };
            network.step(slice(&x), &y, key, &mut optimizer, Progress::default()).expect("images and labels fit")
        });
    });
    benches.finish();
}

pub(crate) fn run(criterion: &mut Criterion) {
    for row in NETWORKS {
        bench(criterion, row);
    }
}
