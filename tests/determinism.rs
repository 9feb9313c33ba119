//! The same seed trains to the same bits at any number of threads: whole networks, through every path that cuts work into
//! pieces or adds partial sums.

use gemmnet::Element;
use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::nn::notation::{LayerSpec, NetworkSpec};
use gemmnet::optim::{Group, LearningRate, Optimizer, Progress};
use gemmnet::parallel::with_threads;
use gemmnet::random::{Purpose, stream};
use gemmnet::shape::Algorithm;
use rand::RngExt;
use rand_distr::StandardNormal;

const INPUT: [usize; 3] = [16, 12, 12];
/// More than the partial sums that a convolution's gradients are added up from, 32 at most: some add several images.
const IMAGES: usize = 48;
const CLASSES: usize = 10;
const STEPS: u64 = 3;

/// Network, algorithm of its convolutions, and what it is there for.
const NETWORKS: [(&str, Algorithm, &str); 5] = [
    (
        "conv20k5-leaky0.1-pool-conv12-bn-gelu-avgpool-affine256-bn-relu-dropout0.4-affine10",
        Algorithm::Im2col,
        "im2col with partial sums over the images, fused and not; pools; both batchnorms; dropout",
    ),
    (
        "conv32-relu-pool-conv48-bn-relu-conv32-silu-pool3s2p1-dropout0.2-affine10",
        Algorithm::Winograd,
        "Winograd, fused and not",
    ),
    ("conv32-bn-relu-conv32-relu-gap-affine10", Algorithm::Auto, "the algorithm that is chosen for its size"),
    (
        "conv24s2p1-bn-relu-conv24g4-relu-conv24g24-bn-relu-conv16k1-gelu-conv12d2p2-leaky-affine64-relu-affine10-svm",
        Algorithm::Im2col,
        "stride, groups, depthwise, pointwise, dilation; SVM",
    ),
    (
        "affine200-bn-relu-dropout0.5-affine100-silu-affine10-softmax0.1",
        Algorithm::Auto,
        "affine layers that are cut, more parameters than one thread updates",
    ),
];

/// Results by name, all their bits.
type Bits = Vec<(String, Vec<u64>)>;

/// Trains from `seed`, which gives the weights, the images and what dropout drops. Widening keeps every bit.
fn train<T: Element>(notation: &str, algorithm: Algorithm, seed: u64) -> Bits {
    let mut spec: NetworkSpec = notation.parse().unwrap();
    for layer in &mut spec.layers {
        if let LayerSpec::Conv { conv, .. } = layer {
            // f64 refuses Winograd
            conv.algorithm = if T::NAME == "f64" { Algorithm::Im2col } else { algorithm };
        }
    }
    let mut net = Network::<T>::new(&spec, INPUT, Init::He, seed).unwrap();
    let initial = net.params().clone();
    let groups = Group::classic("adam".parse().unwrap(), LearningRate::constant(1e-3).unwrap(), 1e-3);
    let mut optimizer = Optimizer::new(groups, net.params()).unwrap();
    let labels: Vec<usize> = (0..IMAGES).map(|n| n * 7 % CLASSES).collect();
    let mut x = Vec::new();
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let mut random = stream(seed, Purpose::Example, step, 0);
        x = (0..IMAGES * INPUT.iter().product::<usize>())
            .map(|_| T::of(random.sample::<f64, _>(StandardNormal)))
            .collect();
        losses.push(net.loss(&x, &labels, StepKey { seed, step }).unwrap());
        let (params, grads) = net.params_and_grads();
        losses.push(T::of(optimizer.step(params, grads, Progress::default()).regularization));
    }
    let mut scores = vec![T::zero(); IMAGES * CLASSES];
    net.scores(&x, &mut scores).unwrap();

    let mut bits = Bits::new();
    let mut keep = |name: &str, values: &[T]| {
        // Two NaNs would be equal bits.
        assert!(values.iter().all(|value| value.is_finite()), "{notation}: {name} is not finite");
        bits.push((name.to_string(), values.iter().map(|value| value.f64().to_bits()).collect()));
    };
    keep("losses", &losses);
    for (index, param) in net.params().iter().enumerate() {
        assert!(net.params().slice(index) != initial.slice(index), "{notation}: {} is not trained", param.name);
        keep(&param.name, net.params().slice(index));
    }
    for (index, param) in net.statistics().iter().enumerate() {
        keep(&param.name, net.statistics().slice(index));
    }
    keep("scores in test mode", &scores);
    bits
}

fn check<T: Element>() {
    for (notation, algorithm, what) in NETWORKS {
        let run = |threads, seed| with_threads(threads, || train::<T>(notation, algorithm, seed)).unwrap();
        let want = run(1, 7);
        for threads in [1, 2, 5] {
            for ((name, got), (_, want)) in run(threads, 7).iter().zip(&want) {
                assert!(got == want, "{notation} in {} ({what}): {name} differs with {threads} threads", T::NAME);
            }
        }
        for ((name, other), (_, want)) in run(1, 8).iter().zip(&want) {
            assert!(other != want, "{notation} in {}: {name} is the same from another seed", T::NAME);
        }
    }
}

#[test]
fn training_in_f32_gives_the_same_bits_at_any_number_of_threads() {
    check::<f32>();
}

#[test]
fn training_in_f64_gives_the_same_bits_at_any_number_of_threads() {
    check::<f64>();
}
