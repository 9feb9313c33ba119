//! Level 5. A network: its steps, its named parameters, and a loss.

use ndarray::{Array2, ArrayView4};

use crate::blocks::Pass;
use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::nn::formats::train_in_blocks;
use crate::nn::fusion::{Gathered, gather};
use crate::nn::graph::Graph;
use crate::nn::init::Init;
use crate::nn::memory::{Memory, for_training};
use crate::nn::notation::{LossSpec, NetworkSpec, Reduction};
use crate::nn::run::{Flow, Run, WayBack};
use crate::nn::steps::{Compiled, Kernel, Step, compile};
use crate::ops::dropout::DropoutKey;
use crate::ops::layout::{row_major, slice_mut};
use crate::ops::loss::{check_labels, softmax_cross_entropy_into, svm_hinge_into};
use crate::optim::{Early, Optimizer, Progress, Stepped};
use crate::params::{Layout, ParamKind, Params};
use crate::profile::Phase;
use crate::random::{Purpose, stream};
use crate::simd::{dot, vectorized};

/// A network for images `(C, H, W)`: a graph of layers, gathered into steps each of which runs as one fused kernel.
#[derive(Debug)]
pub struct Network<T: Element> {
    spec: NetworkSpec,
    input: [usize; 3],
    gathered: Vec<Gathered>,
    steps: Vec<Step<T>>,
    params: Params<T>,
    grads: Params<T>,
    statistics: Params<T>,
    memory: Memory<T>,
    flow: Flow<T>,
}

/// Which draw of dropout's masks a training step takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepKey {
    /// Seed of the training.
    pub seed: u64,
    /// The training step.
    pub step: u64,
}

/// What [`Network::step`] has found out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainStep<T> {
    /// Data loss before the step, without regularisation, as [`Network::loss`] returns it.
    pub loss: T,
    /// What the optimizer says: the regularisation loss, and whether a step was made.
    pub stepped: Stepped,
}

/// One line of [`Network::summary`].
#[derive(Clone, Debug)]
pub struct StepSummary {
    /// As in the notation: `conv64-relu-pool`.
    pub name: String,
    /// What it takes: 0 for the images, else the number, from 1, of the step that makes it.
    pub inputs: Vec<usize>,
    /// Output shape of one image: `[C, H, W]`, or `[M]`.
    pub output: Vec<usize>,
    /// Number of trained values.
    pub parameters: usize,
    /// Multiply-adds of one image's forward pass.
    pub multiply_adds: usize,
}

/// Images that [`Network::scores`] takes at once.
const TEST_BATCH: usize = 256;

impl<T: Element> Clone for Network<T> {
    /// The same network, without the memory of its last pass.
    fn clone(&self) -> Self {
        Network {
            spec: self.spec.clone(),
            input: self.input,
            gathered: self.gathered.clone(),
            steps: self.steps.clone(),
            params: self.params.clone(),
            grads: self.grads.clone(),
            statistics: self.statistics.clone(),
            memory: Memory::new(&self.steps, for_training(&self.steps)),
            flow: Flow::new(&self.steps, self.flow.trained().to_vec()),
        }
    }
}

impl<T: Element> Network<T> {
    /// Checks every shape and draws the initial parameters from `seed`.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Shape`] where a layer does not fit the output of the one before it, if the network does
    /// not end in one score per class, or if the system has no memory for its parameters.
    pub fn new(spec: &NetworkSpec, input: [usize; 3], init: Init, seed: u64) -> Result<Self> {
        let graph = Graph::new::<T>(&spec.layers, input)?;
        let mut network = Self::zeros(spec, gather(&graph), input)?;
        let params = &mut network.params;
        let declared: Vec<_> = params.iter().cloned().collect();
        for (index, param) in declared.into_iter().enumerate() {
            match param.kind {
                // Filters that are fixed wait to be measured.
                ParamKind::Weight if !param.fixed => {
                    let mut rng = stream(seed, Purpose::Init, 0, index as u64);
                    init.fill(&param.shape, &mut rng, params.slice_mut(index))?;
                }
                ParamKind::Scale => params.slice_mut(index).fill(T::one()),
                ParamKind::Weight | ParamKind::Bias | ParamKind::Statistic => {}
            }
        }
        for step in &network.steps {
            if let Kernel::Block { running: Some((_, variance)), .. } = step.kernel {
                network.statistics.slice_mut(variance).fill(T::one());
            }
        }
        Ok(network)
    }

    /// The parameters and the running statistics of the network that [`Network::new`] would make. Takes no memory for their
    /// values.
    ///
    /// # Errors
    /// As there.
    pub(super) fn layouts(spec: &NetworkSpec, input: [usize; 3]) -> Result<[Layout; 2]> {
        let graph = Graph::new::<T>(&spec.layers, input)?;
        let Compiled { params, statistics, .. } = compile::<T>(&gather(&graph), input)?;
        Ok([params, statistics])
    }

    /// A network of these steps, all parameters and statistics 0.
    pub(super) fn zeros(spec: &NetworkSpec, gathered: Vec<Gathered>, input: [usize; 3]) -> Result<Self> {
        let Compiled { mut steps, params, statistics } = compile::<T>(&gathered, input)?;
        train_in_blocks(&mut steps);
        let grads = Params::try_zeros(params.clone())?;
        let params = Params::try_zeros(params)?;
        Ok(Network {
            spec: spec.clone(),
            input,
            gathered,
            memory: Memory::new(&steps, for_training(&steps)),
            flow: Flow::new(&steps, params.iter().map(|param| !param.fixed).collect()),
            steps,
            grads,
            params,
            statistics: Params::try_zeros(statistics)?,
        })
    }

    /// Input shape `[C, H, W]`.
    pub fn input(&self) -> [usize; 3] {
        self.input
    }

    fn input_len(&self) -> usize {
        self.input.iter().product()
    }

    /// Number of classes: scores per image.
    pub fn classes(&self) -> usize {
        self.steps[self.steps.len() - 1].output[0]
    }

    /// The layers and the loss this network was built from.
    pub fn spec(&self) -> &NetworkSpec {
        &self.spec
    }

    /// The parameters.
    pub fn params(&self) -> &Params<T> {
        &self.params
    }

    /// The parameters, to write to.
    pub fn params_mut(&mut self) -> &mut Params<T> {
        &mut self.params
    }

    /// Running means and variances of batchnorm.
    pub fn statistics(&self) -> &Params<T> {
        &self.statistics
    }

    /// Running means and variances of batchnorm, to write to.
    pub fn statistics_mut(&mut self) -> &mut Params<T> {
        &mut self.statistics
    }

    /// Gradients of the last [`Network::loss`], laid out as the parameters. Those of parameters that are not trained are
    /// not computed, and [`Network::step`] uses some up.
    pub fn grads(&self) -> &Params<T> {
        &self.grads
    }

    /// Parameters to write and gradients to read, for the optimizer.
    pub fn params_and_grads(&mut self) -> (&mut Params<T>, &Params<T>) {
        (&mut self.params, &self.grads)
    }

    /// Says for each parameter, in their order, whether it is trained; at first all are that are not fixed. The others cost
    /// no gradient, and backward stops where nothing below is trained.
    ///
    /// # Panics
    /// If there is not one answer for each parameter.
    pub fn set_trained(&mut self, trained: impl ExactSizeIterator<Item = bool> + Clone) {
        assert_eq!(trained.len(), self.params.iter().len(), "one answer for each parameter");
        if !trained.clone().eq(self.flow.trained().iter().copied()) {
            self.grads.values_mut().fill(T::zero());
            self.flow = Flow::new(&self.steps, trained.collect());
        }
    }

    /// Training mode: data loss (no regularisation) of images `x` `(N, C, H, W)` with labels `y`, their mean or sum as its
    /// [`Reduction`] says, and its gradients into [`Network::grads`]. Running statistics take the batch's in, unless the loss
    /// is not a finite number. After the first call with as many images it allocates nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not hold one image per label, [`Error::Invalid`] for a label that is no class, or for no
    /// labels at all. The network is then as it was.
    pub fn loss(&mut self, x: &[T], y: &[usize], key: StepKey) -> Result<T> {
        let loss = self.labelled_loss(x, y)?;
        self.loss_with(x, y.len(), key, loss)
    }

    /// The network's loss for images `x` with labels `y`.
    fn labelled_loss<'y>(
        &self,
        x: &[T],
        y: &'y [usize],
    ) -> Result<impl FnOnce(&[T], &mut [T]) -> Result<T> + use<'y, T>> {
        let (loss, classes) = (self.spec.loss, self.classes());
        check_shape("network", "x", &[x.len()], &[y.len() * self.input_len()])?;
        check_labels(y, classes)?;
        let reduction = self.spec.reduction;
        Ok(move |scores: &[T], dscores: &mut [T]| {
            let mean = match loss {
                LossSpec::Softmax { smoothing } => softmax_cross_entropy_into(scores, y, classes, smoothing, dscores)?,
                LossSpec::Svm => svm_hinge_into(scores, y, classes, dscores)?,
            };
            Ok(match reduction {
                Reduction::Mean => mean,
                Reduction::Sum => {
                    let images = T::of(y.len() as f64);
                    dscores.iter_mut().for_each(|gradient| *gradient *= images);
                    mean * images
                }
            })
        })
    }

    /// [`Network::loss`] by a function of the user's own: it gets the scores `(N, classes)`, sets their gradients, of the
    /// same shape, and returns the loss.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not hold `images` images, [`Error::Invalid`] if there are none; and what `loss` returns.
    /// The network is then as it was.
    pub fn loss_with(
        &mut self,
        x: &[T],
        images: usize,
        key: StepKey,
        loss: impl FnOnce(&[T], &mut [T]) -> Result<T>,
    ) -> Result<T> {
        let loss = self.forward(x, images, key, loss)?;
        self.backward(x, images, None);
        if loss.is_finite() {
            self.commit();
        }
        Ok(loss)
    }

    /// One step of training: what [`Network::loss`] and then [`Optimizer::step`] at `at` do, to the bit, in less time.
    /// Unless the optimizer clips gradients, or sees the parameter as Muon's, it updates the matrix of a large affine layer
    /// piece by piece, where and when its gradient is made: that never becomes a whole, and [`Network::grads`] holds nothing
    /// of use for it afterwards. If the loss is not a finite number, no step is made.
    ///
    /// # Errors
    /// As [`Network::loss`]. No step is made then, either.
    ///
    /// # Panics
    /// If the optimizer was made for another network's parameters.
    pub fn step(
        &mut self,
        x: &[T],
        y: &[usize],
        key: StepKey,
        optimizer: &mut Optimizer<T>,
        at: Progress,
    ) -> Result<TrainStep<T>> {
        let loss = self.labelled_loss(x, y)?;
        let loss = self.forward(x, y.len(), key, loss)?;
        if !loss.is_finite() {
            return Ok(TrainStep { loss, stepped: Stepped { regularization: f64::NAN, gradient_norm: None } });
        }
        let mut early = optimizer.begin_early(&self.params, at);
        self.backward(x, y.len(), early.as_mut());
        // Before the biases move: they are part of the means.
        self.commit();
        let stepped = match early {
            Some(early) => early.finish(&mut self.params, &self.grads),
            None => optimizer.step(&mut self.params, &self.grads, at),
        };
        Ok(TrainStep { loss, stepped })
    }

    /// After a [`Network::step`] on `x` whose loss is not finite: where the first value is that is not, as a part of a sentence.
    pub(crate) fn origin_of_non_finite(&self, x: &[T], images: usize) -> String {
        let finite = |values: &[T]| values.iter().all(|value| value.is_finite());
        let Network { steps, params, memory, .. } = self;
        if !finite(x) {
            return "the images, as they are normalised, are not finite".into();
        }
        for (i, step) in steps.iter().enumerate() {
            if let Some(index) = step.params().into_iter().find(|&index| !finite(params.slice(index))) {
                return format!("{} is not finite", params.param(index).name);
            }
            let len = images * step.lens(Pass::TRAIN)[1];
            if !finite(memory.values.get(i + 1, len)) {
                return format!("what {} gives is the first that is not finite", step.label);
            }
        }
        "the scores are finite, but too large for the loss".into()
    }

    /// Scores of images `x` in training mode; their gradients into their place. Returns the loss.
    fn forward(
        &mut self,
        x: &[T],
        images: usize,
        key: StepKey,
        loss: impl FnOnce(&[T], &mut [T]) -> Result<T>,
    ) -> Result<T> {
        check_shape("network", "x", &[x.len()], &[images * self.input_len()])?;
        if images == 0 {
            return Err(Error::invalid("network", "a batch of 0 images teaches nothing", "give at least one"));
        }
        let (last, len) = (self.steps.len(), images * self.classes());
        let Network { steps, params, statistics, memory, flow, .. } = self;
        let run = Run { steps, params, statistics, prepared: &[], images, x };
        run.forward(memory, Phase::Forward, |i| {
            // Where nothing comes back, nothing has to be kept for it.
            if !flow.runs(i) && steps[i].is_the_same_in_test_mode() {
                return Pass::Test;
            }
            Pass::Train(DropoutKey { seed: key.seed, step: key.step, layer: i as u32 })
        });
        flow.reserve(images);
        let mut dscores = flow.gradients.take(last);
        let loss = loss(memory.values.get(last, len), &mut dscores[..len]);
        flow.gradients.put(last, dscores);
        loss
    }

    /// From the gradients of the scores that [`Network::forward`] has left to those of the parameters.
    fn backward(&mut self, x: &[T], images: usize, early: Option<&mut Early<'_, T>>) {
        let Network { steps, params, grads, statistics, memory, flow, .. } = self;
        WayBack { steps, params, statistics, images, x, grads, memory, flow, early }.run();
    }

    /// The running statistics take in those of the last training pass.
    fn commit(&mut self) {
        for (step, state) in self.steps.iter().zip(&self.memory.states) {
            if let Kernel::Block { block, places, running: Some((mean, var)) } = &step.kernel {
                let bias = places.b.map_or(&[][..], |index| self.params.slice(index));
                let [mean, var] = self.statistics.slices_mut([Some(*mean), Some(*var)]);
                block.commit(bias, &state.block, (mean, var));
            }
        }
    }

    /// [`Network::loss`] plus `l2 / 2` times the sum of the squared weights (CS231n's `reg`), and the gradients of both.
    ///
    /// The [`crate::train::Solver`] does not need this: its optimizer adds the regularisation in its one pass.
    ///
    /// # Errors
    /// As [`Network::loss`].
    pub fn regularized_loss(&mut self, x: ArrayView4<'_, T>, y: &[usize], l2: f64) -> Result<T> {
        let [c, h, w] = self.input;
        check_shape("network", "x", x.shape(), &[y.len(), c, h, w])?;
        let mut loss = self.loss(&row_major(x), y, StepKey::default())?;
        let l2 = T::of(l2);
        for range in self.params.weight_ranges() {
            let (weights, grads) = (&self.params.values()[range.clone()], &mut self.grads.values_mut()[range]);
            loss += T::of(0.5) * l2 * vectorized!(dot(weights, weights));
            grads.iter_mut().zip(weights).for_each(|(grad, &weight)| *grad += l2 * weight);
        }
        Ok(loss)
    }

    /// Test mode: scores of images `x` `(N, C, H, W)` into `scores` `(N, classes)`. Those of an image do not depend on the
    /// others.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not hold one image per row of scores.
    pub fn scores(&mut self, x: &[T], scores: &mut [T]) -> Result<()> {
        let (image, classes, last) = (self.input_len(), self.classes(), self.steps.len());
        let images = scores.len() / classes;
        check_shape("network", "scores", &[scores.len()], &[images * classes])?;
        check_shape("network", "x", &[x.len()], &[images * image])?;
        let Network { steps, params, statistics, memory, .. } = self;
        for (x, scores) in x.chunks(TEST_BATCH * image).zip(scores.chunks_mut(TEST_BATCH * classes)) {
            let run = Run { steps, params, statistics, prepared: &[], images: scores.len() / classes, x };
            run.forward(memory, Phase::Test, |_| Pass::Test);
            scores.copy_from_slice(memory.values.get(last, scores.len()));
        }
        Ok(())
    }

    /// Test mode: scores `(N, classes)` of images `(N, C, H, W)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the images are not of the network's size.
    pub fn predict(&mut self, x: ArrayView4<'_, T>) -> Result<Array2<T>> {
        let [c, h, w] = self.input;
        check_shape("network", "x", x.shape(), &[x.shape()[0], c, h, w])?;
        let mut scores = Array2::zeros((x.shape()[0], self.classes()));
        self.scores(&row_major(x), slice_mut(&mut scores))?;
        Ok(scores)
    }

    pub(super) fn gathered(&self) -> &[Gathered] {
        &self.gathered
    }

    pub(super) fn steps(&self) -> &[Step<T>] {
        &self.steps
    }

    pub(super) fn steps_mut(&mut self) -> &mut [Step<T>] {
        &mut self.steps
    }

    /// One line per step.
    pub fn summary(&self) -> Vec<StepSummary> {
        let line = |step: &Step<T>| {
            let [c, h, w] = step.output;
            StepSummary {
                name: step.notation.clone(),
                inputs: step.inputs.clone(),
                output: if h * w == 1 { vec![c] } else { vec![c, h, w] },
                parameters: step.parameters(&self.params),
                multiply_adds: step.multiply_adds(),
            }
        };
        self.steps.iter().map(line).collect()
    }
}
