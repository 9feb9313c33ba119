//! The same seed trains to the same bits at any number of threads: whole networks, through every path that cuts work into
//! pieces or adds partial sums.

use gemmnet::Element;
use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey, TrainStep};
use gemmnet::nn::notation::{LayerSpec, NetworkSpec};
use gemmnet::optim::{Group, LearningRate, Optimizer, Progress, Stepped};
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
const NETWORKS: [(&str, Algorithm, &str); 6] = [
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
    (LARGE, Algorithm::Im2col, "affine layers that are updated in their backward pass"),
];

/// Two affine layers that are large enough to be updated while their gradients are made.
const LARGE: &str = "conv16-relu-affine256-bn-relu-dropout0.3-affine2100-silu-affine10";

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
        let key = StepKey { seed, step };
        let TrainStep { loss, stepped } = net.step(&x, &labels, key, &mut optimizer, Progress::default()).unwrap();
        losses.extend([loss, T::of(stepped.regularization)]);
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

/// A training of [`LARGE`] that can make its steps both ways.
struct Training<T: Element> {
    net: Network<T>,
    optimizer: Optimizer<T>,
    x: Vec<T>,
    labels: Vec<usize>,
}

impl<T: Element> Training<T> {
    /// `of_affine1` is the rule of the first affine layer's matrix, `rule` that of the rest.
    fn new(of_affine1: &str, rule: &str, clip: Option<f64>) -> Self {
        let mut net = Network::<T>::new(&LARGE.parse().unwrap(), INPUT, Init::He, 0).unwrap();
        let group = |select: &str, rule: &str, rate| {
            let rate = LearningRate::new(rate, "exp:0.9".parse().unwrap(), 0.0).unwrap();
            Group { l2: 1e-2, ..Group::new(select.parse().unwrap(), rule.parse().unwrap(), rate) }
        };
        let mut groups = vec![group("affine1.weight", of_affine1, 2e-3), group("*", rule, 1e-3)];
        groups.insert(0, Group::frozen("conv1.bias".parse().unwrap()));
        let mut optimizer = Optimizer::new(groups, net.params()).unwrap();
        optimizer.set_clip_norm(clip).unwrap();
        net.set_trained(optimizer.trained(Progress::default()));
        let mut random = stream(5, Purpose::Example, 0, 0);
        let x = (0..IMAGES * INPUT.iter().product::<usize>()).map(|_| T::of(random.random_range(-1.0..1.0))).collect();
        Training { net, optimizer, x, labels: (0..IMAGES).map(|n| n * 7 % CLASSES).collect() }
    }

    /// A step in one call, or in two.
    fn step(&mut self, step: usize, in_one: bool) -> TrainStep<T> {
        let Training { net, optimizer, x, labels } = self;
        let (key, at) = (StepKey { seed: 1, step: step as u64 }, Progress { step, steps_per_epoch: 2, steps: 6 });
        if in_one {
            return net.step(x, labels, key, optimizer, at).unwrap();
        }
        let loss = net.loss(x, labels, key).unwrap();
        let (params, grads) = net.params_and_grads();
        TrainStep { loss, stepped: optimizer.step(params, grads, at) }
    }

    fn bits(&self) -> Vec<u64> {
        let state = self.optimizer.state().flat_map(|(.., values)| values);
        let values = self.net.params().values().iter().chain(self.net.statistics().values()).chain(state);
        values.map(|value| value.f64().to_bits()).collect()
    }

    /// Whether the gradient of this parameter has ever been stored.
    fn stored(&self, param: &str) -> bool {
        self.net.grads().get(param).unwrap().iter().any(|g| *g != T::zero())
    }
}

/// A step in one call makes the same parameters, state, statistics and losses as loss, gradients, and then the update.
fn check_both_ways<T: Element>(of_affine1: &str, rule: &str, clip: Option<f64>) {
    let what = format!("{of_affine1}, {rule} in {}, clipped at {clip:?}", T::NAME);
    let run = |threads, in_one| {
        with_threads(threads, || {
            let mut training = Training::<T>::new(of_affine1, rule, clip);
            let steps = [0, 1, 2].map(|step| training.step(step, in_one));
            let stored = ["conv1.weight", "affine1.weight", "affine2.weight"].map(|param| training.stored(param));
            (steps, training.bits(), stored)
        })
        .unwrap()
    };
    let (steps, bits, stored) = run(1, false);
    assert_eq!(stored, [true; 3], "{what}");
    assert!(steps.iter().all(|step| step.loss.is_finite() && step.stepped.regularization > 0.0), "{what}: {steps:?}");
    for threads in [1, 2, 5] {
        let one = run(threads, true);
        assert_eq!(one.0, steps, "{what}, {threads} threads");
        assert!(one.1 == bits, "{what}, {threads} threads: not the same bits");
        let early = clip.is_none();
        assert_eq!(one.2, [true, !early || of_affine1 == "muon", !early], "{what}: where it is updated");
    }
}

#[test]
fn a_step_in_one_call_gives_the_same_bits_as_in_two() {
    for rule in ["adam", "adamw", "momentum", "sgd"] {
        check_both_ways::<f32>(rule, rule, None);
        check_both_ways::<f64>(rule, rule, None);
    }
    check_both_ways::<f32>("sgd", "adam", None);
    check_both_ways::<f32>("muon", "nesterov", None);
    check_both_ways::<f32>("adamw", "rmsprop", Some(0.1));
}

/// Both ways may take turns, and a loss that is no number moves nothing.
#[test]
fn steps_of_both_kinds_mix_and_worthless_ones_leave_no_trace() {
    let mut both = [(); 2].map(|()| Training::<f32>::new("adam", "momentum", None));
    for step in 0..4 {
        let [plain, mixed] = &mut both;
        assert_eq!(plain.step(step, false), mixed.step(step, step % 2 == 1));
    }
    let [plain, mixed] = &mut both;
    assert!(plain.bits() == mixed.bits());
    let (before, steps) = (mixed.bits(), mixed.optimizer.steps());
    mixed.x[7] = f32::NAN;
    let TrainStep { loss, stepped: Stepped { regularization, gradient_norm } } = mixed.step(4, true);
    assert!(loss.is_nan() && regularization.is_nan() && gradient_norm.is_none());
    mixed.labels[0] = CLASSES;
    let (key, at) = (StepKey::default(), Progress::default());
    assert!(mixed.net.step(&mixed.x, &mixed.labels, key, &mut mixed.optimizer, at).is_err());
    assert!(mixed.bits() == before && mixed.optimizer.steps() == steps);
}
