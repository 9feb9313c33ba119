//! Level 4. A network: an ordered list of fused blocks with named parameters and a loss.

use ndarray::{Array2, ArrayView4};

use crate::blocks::{Block, BlockParts, BlockState, Core, Pass, Pool, Weights};
use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::nn::init::Init;
use crate::nn::notation::{LayerSpec, LossSpec, NetworkSpec};
use crate::ops::batchnorm::BatchNorm;
use crate::ops::dropout::DropoutKey;
use crate::ops::loss::{softmax_cross_entropy_into, svm_hinge_into};
use crate::params::{Layout, ParamKind, Params};
use crate::profile::{self, Phase, Work};
use crate::random::{Purpose, stream};
use crate::simd::{dot, vectorized};
use crate::workspace::{Buffer, Workspace};

/// A network for images `(C, H, W)`: layers gathered into [`Block`]s, each running as one fused kernel.
#[derive(Debug)]
pub struct Network<T: Element> {
    spec: NetworkSpec,
    input: [usize; 3],
    stages: Vec<Stage>,
    states: Vec<BlockState<T>>,
    params: Params<T>,
    grads: Params<T>,
    statistics: Params<T>,
    /// Gradients on their way back: of a block's output, and of its input.
    gradient: [Buffer<T>; 2],
    ws: Workspace,
}

/// A block and its place in the parameters.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) layers: Vec<LayerSpec>,
    /// Its number, from 1, and its layers in notation, for the profile.
    label: String,
    pub(super) block: Block,
    /// Indices of the parameters, where the block has them.
    pub(super) places: Weights<Option<usize>>,
    /// Indices of the running mean and variance.
    pub(super) running: Option<(usize, usize)>,
}

impl Stage {
    /// One pass over `images` images, for the [`profile`]: in memory the input counts `inputs` times and the weights
    /// `weights` times, because backward also has their gradients; there are as many products as inputs.
    fn work<T>(&self, images: usize, values: Weights<&[T]>, inputs: usize, weights: usize) -> Work<'_> {
        let Weights { w, b, gamma, beta } = values;
        let parameters: usize = [w, b, gamma, beta].map(<[T]>::len).into_iter().sum();
        let image = inputs * self.block.input().iter().product::<usize>() + self.block.output_len();
        Work {
            op: &self.label,
            flops: inputs * 2 * self.block.multiply_adds() * images,
            bytes: (images * image + weights * parameters) * size_of::<T>(),
        }
    }
}

/// One line of [`Network::summary`].
#[derive(Clone, Debug)]
pub struct LayerSummary {
    /// As in the notation: `conv64-relu-pool`.
    pub name: String,
    /// Output shape of one image: `[C, H, W]`, or `[M]`.
    pub output: Vec<usize>,
    /// Number of trained values.
    pub parameters: usize,
    /// Multiply-adds of one image's forward pass.
    pub macs: usize,
}

/// Images that [`Network::scores`] takes at once.
const TEST_BATCH: usize = 256;

/// Layers joined as in the notation.
fn notation(layers: &[LayerSpec]) -> String {
    layers.iter().map(LayerSpec::to_string).collect::<Vec<_>>().join("-")
}

/// Cuts a list of layers into blocks: a layer joins the block before it as long as the order within blocks (product,
/// batchnorm, activation, pool, dropout) allows.
fn into_blocks(layers: &[LayerSpec]) -> Vec<(BlockParts, Vec<LayerSpec>)> {
    let mut blocks: Vec<(BlockParts, Vec<LayerSpec>)> = Vec::new();
    let mut last_rank = usize::MAX;
    for &layer in layers {
        let rank = match layer {
            LayerSpec::Conv { .. } | LayerSpec::Affine { .. } => 0,
            LayerSpec::BatchNorm => 1,
            LayerSpec::Activation(_) => 2,
            LayerSpec::MaxPool(_) | LayerSpec::AvgPool(_) | LayerSpec::GlobalAvgPool => 3,
            LayerSpec::Dropout { .. } => 4,
        };
        if rank <= last_rank || blocks.is_empty() {
            blocks.push(Default::default());
        }
        last_rank = rank;
        let (parts, members) = blocks.last_mut().expect("pushed above");
        members.push(layer);
        match layer {
            LayerSpec::Conv { filters, kernel, conv } => {
                (parts.core, parts.bias) = (Some(Core::Conv { filters, kernel, conv }), true);
            }
            LayerSpec::Affine { outputs } => (parts.core, parts.bias) = (Some(Core::Affine { outputs }), true),
            // the batch's mean takes a bias with it
            LayerSpec::BatchNorm => (parts.norm, parts.bias) = (Some(BatchNorm::default()), false),
            LayerSpec::Activation(activation) => parts.activation = Some(activation),
            LayerSpec::MaxPool(pool) => parts.pool = Some(Pool::Max(pool)),
            LayerSpec::AvgPool(pool) => parts.pool = Some(Pool::Avg(pool)),
            LayerSpec::GlobalAvgPool => parts.pool = Some(Pool::GlobalAvg),
            LayerSpec::Dropout { p } => parts.dropout = Some(p),
        }
    }
    blocks
}

impl<T: Element> Network<T> {
    /// Checks every shape and draws the initial parameters from `seed`.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Shape`] where a layer does not fit the output of the one before it, or if the
    /// network does not end in one score per class.
    pub fn new(spec: &NetworkSpec, input: [usize; 3], init: Init, seed: u64) -> Result<Self> {
        let mut network = Self::zeros(spec, into_blocks(&spec.layers), input)?;
        let params = &mut network.params;
        let declared: Vec<_> = params.iter().cloned().collect();
        for (index, param) in declared.into_iter().enumerate() {
            match param.kind {
                ParamKind::Weight => {
                    init.fill(
                        &param.shape,
                        &mut stream(seed, Purpose::Init, 0, index as u64),
                        params.slice_mut(index),
                    )?;
                }
                ParamKind::Scale => params.slice_mut(index).fill(T::one()),
                ParamKind::Bias | ParamKind::Statistic => {}
            }
        }
        for (_, variance) in network.stages.iter().filter_map(|stage| stage.running) {
            network.statistics.slice_mut(variance).fill(T::one());
        }
        Ok(network)
    }

    /// The parameters and the running statistics of the network that [`Network::new`] would make, which takes no memory
    /// for their values.
    ///
    /// # Errors
    /// As there.
    pub(super) fn layouts(spec: &NetworkSpec, input: [usize; 3]) -> Result<[Layout; 2]> {
        let (_, layout, running_layout) = Self::plan(into_blocks(&spec.layers), input)?;
        Ok([layout, running_layout])
    }

    /// A network of these blocks, all parameters and statistics 0.
    pub(super) fn zeros(
        spec: &NetworkSpec,
        blocks: Vec<(BlockParts, Vec<LayerSpec>)>,
        input: [usize; 3],
    ) -> Result<Self> {
        let (stages, layout, running_layout) = Self::plan(blocks, input)?;
        let params = Params::zeros(layout);
        Ok(Network {
            spec: spec.clone(),
            input,
            states: stages.iter().map(|_| BlockState::new()).collect(),
            stages,
            grads: params.zeros_like(),
            params,
            statistics: Params::zeros(running_layout),
            gradient: [Buffer::default(), Buffer::default()],
            ws: Workspace::new(),
        })
    }

    /// The blocks with the places of their parameters, and the layouts of parameters and running statistics.
    fn plan(blocks: Vec<(BlockParts, Vec<LayerSpec>)>, input: [usize; 3]) -> Result<(Vec<Stage>, Layout, Layout)> {
        let (mut layout, mut running_layout) = (Layout::default(), Layout::default());
        let (mut stages, mut size) = (Vec::new(), input);
        let (mut convolutions, mut affines, mut norms) = (0, 0, 0);
        for (parts, layers) in blocks {
            let block = Block::new(parts, size)?;
            block.check_algorithm::<T>()?;
            size = block.output();
            let shapes = block.weight_shapes();
            let core = match parts.core {
                Some(Core::Conv { .. }) => {
                    convolutions += 1;
                    format!("conv{convolutions}")
                }
                Some(Core::Affine { .. }) => {
                    affines += 1;
                    format!("affine{affines}")
                }
                None => String::new(),
            };
            norms += usize::from(parts.norm.is_some());
            let mut push =
                |shape: &[usize], name: String, kind| (!shape.is_empty()).then(|| layout.push(name, shape, kind));
            let places = Weights {
                w: push(&shapes.w, format!("{core}.weight"), ParamKind::Weight),
                b: push(&shapes.b, format!("{core}.bias"), ParamKind::Bias),
                gamma: push(&shapes.gamma, format!("bn{norms}.weight"), ParamKind::Scale),
                beta: push(&shapes.beta, format!("bn{norms}.bias"), ParamKind::Bias),
            };
            let running = parts.norm.map(|_| {
                let mut push =
                    |name: &str| running_layout.push(format!("bn{norms}.{name}"), &shapes.gamma, ParamKind::Statistic);
                (push("running_mean"), push("running_var"))
            });
            let label = format!("{} {}", stages.len() + 1, notation(&layers));
            stages.push(Stage { layers, label, block, places, running });
        }
        if stages.is_empty() {
            return Err(Error::invalid("network", "it has no layers", "give at least one, such as affine10"));
        }
        if size[1] * size[2] != 1 {
            return Err(Error::invalid(
                "network",
                format!("it ends in images of {size:?}, not in one score per class"),
                "end it with an affine layer, such as affine10, or with gap",
            ));
        }
        Ok((stages, layout, running_layout))
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
        self.stages[self.stages.len() - 1].block.output()[0]
    }

    /// The layers and the loss this network was built from.
    pub fn spec(&self) -> &NetworkSpec {
        &self.spec
    }

    /// The trained parameters.
    pub fn params(&self) -> &Params<T> {
        &self.params
    }

    /// The trained parameters, to write to.
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

    /// Gradients of the last [`Network::loss`], laid out as the parameters.
    pub fn grads(&self) -> &Params<T> {
        &self.grads
    }

    /// Parameters to write and gradients to read, for the optimizer.
    pub fn params_and_grads(&mut self) -> (&mut Params<T>, &Params<T>) {
        (&mut self.params, &self.grads)
    }

    /// Training mode: mean data loss (no regularisation) of images `x` `(N, C, H, W)` with labels `y`, and its gradients
    /// into [`Network::grads`]. Dropout draws from (`seed`, `step`). After the first call with as many images it
    /// allocates nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not hold one image per label, [`Error::Invalid`] for a label that is no class.
    pub fn loss(&mut self, x: &[T], y: &[usize], seed: u64, step: u64) -> Result<T> {
        let (images, classes) = (y.len(), self.classes());
        check_shape("network", "x", &[x.len()], &[images * self.input_len()])?;
        let pass = |layer| Pass::Train(DropoutKey { seed, step, layer });
        self.forward(images, x, pass);
        let largest = self.stages.iter().map(|stage| stage.block.output_len()).max().unwrap_or(0);
        for gradient in &mut self.gradient {
            gradient.reserve(images * largest);
        }
        let scores = output(&self.stages, &self.states, images);
        let dscores = &mut self.gradient[0][..images * classes];
        let loss = match self.spec.loss {
            LossSpec::Softmax { smoothing } => softmax_cross_entropy_into(scores, y, classes, smoothing, dscores)?,
            LossSpec::Svm => svm_hinge_into(scores, y, classes, dscores)?,
        };
        self.backward(images, x);
        Ok(loss)
    }

    /// [`Network::loss`] plus `l2 / 2` times the sum of the squared weights (the seed's `reg`), and the gradients of both.
    ///
    /// The [`crate::train::Solver`] does not need this: its optimizer adds the regularisation in its one pass.
    ///
    /// # Errors
    /// As [`Network::loss`].
    pub fn regularized_loss(&mut self, x: ArrayView4<'_, T>, y: &[usize], l2: f64) -> Result<T> {
        let [c, h, w] = self.input;
        check_shape("network", "x", x.shape(), &[y.len(), c, h, w])?;
        let x = x.as_standard_layout();
        let mut loss = self.loss(x.as_slice().expect("standard layout"), y, 0, 0)?;
        let l2 = T::of(l2);
        for range in self.params.weight_ranges() {
            let (weights, grads) = (&self.params.values()[range.clone()], &mut self.grads.values_mut()[range]);
            loss += T::of(0.5) * l2 * vectorized!(dot(weights, weights),);
            grads.iter_mut().zip(weights).for_each(|(grad, &weight)| *grad += l2 * weight);
        }
        Ok(loss)
    }

    fn forward(&mut self, images: usize, x: &[T], pass: impl Fn(u32) -> Pass) {
        forward(&self.stages, &mut self.states, &self.params, &mut self.statistics, images, x, pass, &mut self.ws);
    }

    /// Takes the gradient of the scores from `gradient[0]` back to the first block that has parameters.
    fn backward(&mut self, images: usize, x: &[T]) {
        let trained = |stage: &Stage| stage.places.w.is_some() || stage.places.gamma.is_some();
        let Some(first) = self.stages.iter().position(trained) else { return };
        let [dout, dx] = &mut self.gradient;
        let (mut dout, mut dx) = (dout, dx);
        for (i, stage) in self.stages.iter().enumerate().skip(first).rev() {
            let (before, rest) = self.states.split_at_mut(i);
            let input = if i == 0 { x } else { output(&self.stages[..i], before, images) };
            let weights = stage.places.values(&self.params);
            let Weights { w, b, gamma, beta } = stage.places;
            let [w, b, gamma, beta] = self.grads.slices_mut([w, b, gamma, beta]);
            let grads = Weights { w, b, gamma, beta };
            let dinput = (i > first).then(|| &mut dx[..input.len()]);
            let gradient = &mut dout[..images * stage.block.output_len()];
            let inputs = if dinput.is_some() { 2 } else { 1 };
            let _scope = profile::scope(Phase::Backward, || stage.work(images, weights, inputs, 2));
            stage.block.backward(images, input, weights, gradient, dinput, grads, &mut rest[0], &mut self.ws);
            std::mem::swap(&mut dout, &mut dx);
        }
    }

    /// Test mode: scores of images `x` `(N, C, H, W)` into `scores` `(N, classes)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not hold one image per row of scores.
    pub fn scores(&mut self, x: &[T], scores: &mut [T]) -> Result<()> {
        let (image, classes) = (self.input_len(), self.classes());
        check_shape("network", "x", &[x.len()], &[scores.len() / classes * image])?;
        for (x, scores) in x.chunks(TEST_BATCH * image).zip(scores.chunks_mut(TEST_BATCH * classes)) {
            let images = scores.len() / classes;
            self.forward(images, x, |_| Pass::Test);
            scores.copy_from_slice(output(&self.stages, &self.states, images));
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
        let x = x.as_standard_layout();
        let mut scores = Array2::zeros((x.shape()[0], self.classes()));
        self.scores(x.as_slice().expect("standard layout"), scores.as_slice_mut().expect("freshly made"))?;
        Ok(scores)
    }

    pub(super) fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// One line per block.
    pub fn summary(&self) -> Vec<LayerSummary> {
        let line = |stage: &Stage| {
            let Weights { w, b, gamma, beta } = stage.places;
            let [c, h, w_] = stage.block.output();
            LayerSummary {
                name: notation(&stage.layers),
                output: if h * w_ == 1 { vec![c] } else { vec![c, h, w_] },
                parameters: [w, b, gamma, beta].into_iter().flatten().map(|i| self.params.slice(i).len()).sum(),
                macs: stage.block.multiply_adds(),
            }
        };
        self.stages.iter().map(line).collect()
    }
}

/// The last of these blocks' output for `images` images.
pub(super) fn output<'a, T: Element>(stages: &[Stage], states: &'a [BlockState<T>], images: usize) -> &'a [T] {
    let last = stages.len() - 1;
    states[last].out(&stages[last].block, images)
}

/// Runs all blocks; [`output`] is then the scores. `pass` is asked with the index of each block.
pub(super) fn forward<T: Element>(
    stages: &[Stage],
    states: &mut [BlockState<T>],
    params: &Params<T>,
    statistics: &mut Params<T>,
    images: usize,
    x: &[T],
    pass: impl Fn(u32) -> Pass,
    ws: &mut Workspace,
) {
    for (i, stage) in stages.iter().enumerate() {
        let (before, rest) = states.split_at_mut(i);
        let input = if i == 0 { x } else { output(&stages[..i], before, images) };
        let [mean, var] = statistics.slices_mut([stage.running.map(|r| r.0), stage.running.map(|r| r.1)]);
        let (weights, pass) = (stage.places.values(params), pass(i as u32));
        let phase = if pass == Pass::Test { Phase::Test } else { Phase::Forward };
        let _scope = profile::scope(phase, || stage.work(images, weights, 1, 1));
        stage.block.forward(images, input, weights, (mean, var), pass, &mut rest[0], ws);
    }
}

impl Weights<Option<usize>> {
    /// The values at these places; empty where there is none.
    pub(super) fn values<T: Element>(self, params: &Params<T>) -> Weights<&[T]> {
        let slice = |index: Option<usize>| index.map_or(&[][..], |index| params.slice(index));
        Weights { w: slice(self.w), b: slice(self.b), gamma: slice(self.gamma), beta: slice(self.beta) }
    }
}
