//! Level 5. Running the steps of a network, forward and backward.

use crate::blocks::{BlockGrads, BlockInput, Pass, Prepared, Weights};
use crate::element::Element;
use crate::nn::graph::Value;
use crate::nn::layer::{Backward, Forward, LayerGrads, LayerParams};
use crate::nn::memory::{Memory, Slots, for_gradients};
use crate::nn::steps::{Kernel, Step};
use crate::ops::Mode;
use crate::ops::activation::Activation;
use crate::ops::affine::{AffineShape, affine_backward_updating};
use crate::optim::{Early, EarlyRows};
use crate::parallel::for_each_chunk_mut;
use crate::params::Params;
use crate::profile::{self, Phase, Work};
use crate::simd::{add_assign, vectorized};
use crate::workspace::Buffer;

/// One call: the steps, what they read, and the images `x` `[N, C, H, W]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'a, T: Element> {
    pub(super) steps: &'a [Step<T>],
    pub(super) params: &'a Params<T>,
    /// Running means and variances.
    pub(super) statistics: &'a Params<T>,
    /// For each step its weights as its block prepares them, if that was done.
    pub(super) prepared: &'a [Option<Prepared<T>>],
    pub(super) images: usize,
    pub(super) x: &'a [T],
}

impl<'a, T: Element> Run<'a, T> {
    /// Runs all steps in `phase`; the last value is then the scores. `pass` is asked with the index of each step.
    pub(super) fn forward(&self, memory: &mut Memory<T>, phase: Phase, pass: impl Fn(usize) -> Pass) {
        memory.values.reserve(self.images);
        for (i, step) in self.steps.iter().enumerate() {
            let pass = pass(i);
            let _scope = profile::scope(phase, || step.work(self.images, step.parameters(self.params), 1, 1));
            let mut out = memory.values.take(i + 1);
            self.step_forward(i, pass, memory, &mut out[..self.images * step.lens(pass)[1]]);
            memory.values.put(i + 1, out);
        }
    }

    fn step_forward(&self, i: usize, pass: Pass, memory: &mut Memory<T>, out: &mut [T]) {
        let (step, images) = (&self.steps[i], self.images);
        let Memory { values, states, ws } = memory;
        let x = self.input(values, i, (0, pass));
        match &step.kernel {
            Kernel::Block { block, places, running } => {
                block.forward(&self.block_input(i, places, *running, x), pass, out, &mut states[i].block, ws);
            }
            Kernel::Sum(activation) => add(*activation, x, self.input(values, i, (1, pass)), out),
            Kernel::Layer { layer, first, .. } => {
                let len = images * layer.cache(step.input);
                states[i].cache.reserve(len);
                let (params, cache) = (self.layer_params(*first), &mut states[i].cache[..len]);
                let mode = if pass == Pass::Test { Mode::Test } else { Mode::Train };
                layer.forward(Forward { images, input: step.input, x, params, out, cache, mode, ws });
            }
        }
    }

    /// Gradients of step `i`: those of its parameters that are `wanted` go into `grads`.
    fn step_backward(
        &self,
        i: usize,
        wanted: impl Fn(usize) -> bool,
        grads: &mut Params<T>,
        memory: &mut Memory<T>,
        dout: &mut [T],
        dx: Option<&mut [T]>,
    ) {
        let (step, images) = (&self.steps[i], self.images);
        let Memory { values, states, ws } = memory;
        let (x, out) = (self.input(values, i, (0, Pass::TRAIN)), values.get(i + 1, dout.len()));
        match &step.kernel {
            Kernel::Block { block, places, running } => {
                let trained = |place: Option<usize>| place.filter(|&index| wanted(index));
                // Batchnorm's come for nothing with the gradient of its input.
                let Weights { w, b, gamma, beta } = *places;
                let [w, b, gamma, beta] = grads.slices_mut([trained(w), trained(b), gamma, beta]);
                let grads = BlockGrads { dout, dx, weights: Weights { w, b, gamma, beta } };
                block.backward(&self.block_input(i, places, *running, x), out, grads, &mut states[i].block, ws);
            }
            Kernel::Sum(_) => unreachable!("a sum has two inputs"),
            Kernel::Layer { layer, first, .. } => {
                let len = images * layer.cache(step.input);
                let (params, cache) = (self.layer_params(*first), &mut states[i].cache[..len]);
                let grads = LayerGrads { grads, first: *first };
                layer.backward(Backward { images, input: step.input, x, out, params, grads, dout, dx, cache, ws });
            }
        }
    }

    /// Multiplies the gradient of a sum by the slope of its activation.
    fn through_slope(&self, i: usize, activation: Option<Activation>, values: &Slots<T>, dout: &mut [T]) {
        let Some(activation) = activation else { return };
        let [a, b] = [0, 1].map(|index| self.input(values, i, (index, Pass::TRAIN)));
        let out = values.get(i + 1, dout.len());
        for_each_chunk_mut(dout, CHUNK, |chunk, dout| {
            let here = chunk * CHUNK..chunk * CHUNK + dout.len();
            vectorized!(activation.specialised(
                #[inline(always)]
                |activation| {
                    if activation.kinks() {
                        // out and z have the same sign
                        for (dout, &out) in dout.iter_mut().zip(&out[here.clone()]) {
                            *dout *= activation.slope(out);
                        }
                    } else {
                        for (dout, (&a, &b)) in dout.iter_mut().zip(a[here.clone()].iter().zip(&b[here.clone()])) {
                            *dout *= activation.slope(a + b);
                        }
                    }
                }
            ));
        });
    }

    /// Input `index` of step `i` in a pass.
    fn input<'v>(&self, values: &'v Slots<T>, i: usize, which: (usize, Pass)) -> &'v [T]
    where
        'a: 'v,
    {
        input(&self.steps[i], which, (self.images, self.x), values)
    }

    fn block_input<'v>(
        &self,
        i: usize,
        places: &Weights<Option<usize>>,
        running: Option<(usize, usize)>,
        x: &'v [T],
    ) -> BlockInput<'v, T>
    where
        'a: 'v,
    {
        let running = match running {
            Some((mean, var)) => (self.statistics.slice(mean), self.statistics.slice(var)),
            None => (&[][..], &[][..]),
        };
        let prepared = self.prepared.get(i).and_then(Option::as_ref);
        BlockInput { images: self.images, x, weights: places.values(self.params), prepared, running }
    }

    fn layer_params(&self, first: usize) -> LayerParams<'a, T> {
        LayerParams { params: self.params, first }
    }
}

/// Input `index` of a step, among the `images` images `x` and the values made of them.
fn input<'v, T: Element>(
    step: &Step<T>,
    (index, pass): (usize, Pass),
    (images, x): (usize, &'v [T]),
    values: &'v Slots<T>,
) -> &'v [T] {
    match step.inputs[index] {
        0 => x,
        value => values.get(value, images * step.lens(pass)[0]),
    }
}

/// A [`Run`]'s way back, and what changes on it.
#[derive(Debug)]
pub(super) struct WayBack<'a, 'o, T: Element> {
    pub(super) steps: &'a [Step<T>],
    pub(super) params: &'a mut Params<T>,
    pub(super) statistics: &'a Params<T>,
    pub(super) images: usize,
    pub(super) x: &'a [T],
    /// Gradients of the trained parameters, set, not added to.
    pub(super) grads: &'a mut Params<T>,
    pub(super) memory: &'a mut Memory<T>,
    pub(super) flow: &'a mut Flow<T>,
    /// An optimizer's step, to update large matrices where their gradients are made, which then do not go into `grads`.
    pub(super) early: Option<&'a mut Early<'o, T>>,
}

/// A matrix that is updated where its gradient is made.
#[derive(Clone, Copy, Debug)]
struct EarlyMatrix {
    index: usize,
    shape: AffineShape,
    /// What the update moves in memory that a backward pass does not.
    bytes: usize,
}

impl<T: Element> WayBack<'_, '_, T> {
    /// Takes the gradient of the scores, which lies in its place in `flow`, back to the trained parameters.
    pub(super) fn run(&mut self) {
        for (i, step) in self.steps.iter().enumerate().rev() {
            if !self.flow.runs[i] {
                continue;
            }
            let (arrival, value) = (self.flow.arrivals[i][0], step.inputs[0]);
            let inputs = if arrival.is_some() { 2 } else { 1 };
            let matrix = self.early_matrix(i);
            let _scope = profile::scope(Phase::Backward, || {
                let work = step.work(self.images, step.parameters(self.params), inputs, 2);
                Work { bytes: work.bytes + matrix.map_or(0, |matrix| matrix.bytes), ..work }
            });
            let mut gradient = self.flow.gradients.take(i + 1);
            let [in_len, out_len] = step.lens(Pass::TRAIN).map(|len| self.images * len);
            let dout = &mut gradient[..out_len];
            if let Kernel::Sum(activation) = step.kernel {
                self.forward().through_slope(i, activation, &self.memory.values, dout);
                self.flow.spread(i, &step.inputs, dout);
            } else {
                let mut dx = match arrival {
                    None => None,
                    Some(Arrival::First) => Some(self.flow.gradients.take(value)),
                    Some(Arrival::Later) => Some(std::mem::take(&mut self.flow.spare)),
                };
                let wanted = dx.as_mut().map(|dx| &mut dx[..in_len]);
                self.step(i, matrix, dout, wanted);
                self.flow.arrive(value, arrival, dx, in_len);
            }
            self.flow.gradients.put(i + 1, gradient);
        }
    }

    fn forward(&self) -> Run<'_, T> {
        let WayBack { steps, params, statistics, images, x, .. } = self;
        Run { steps, params, statistics, prepared: &[], images: *images, x }
    }

    /// The matrix of step `i`, if it is to be updated where its gradient is made.
    fn early_matrix(&self, i: usize) -> Option<EarlyMatrix> {
        let (early, Kernel::Block { block, places, .. }) = (self.early.as_ref()?, &self.steps[i].kernel) else {
            return None;
        };
        let shape = block.affine(self.images)?;
        let index = places.w.filter(|&index| self.flow.trained[index])?;
        let bytes = early.takes(index, shape.rows::<T>())?;
        Some(EarlyMatrix { index, shape, bytes })
    }

    fn step(&mut self, i: usize, matrix: Option<EarlyMatrix>, dout: &mut [T], dx: Option<&mut [T]>) {
        let WayBack { steps, statistics, images, x, ref flow, .. } = *self;
        let WayBack { params, grads, memory, early, .. } = self;
        let run = Run { steps, params, statistics, prepared: &[], images, x };
        let (Some(early), Some(EarlyMatrix { index, shape, .. })) = (early, matrix) else {
            return run.step_backward(i, |index| flow.trained[index], grads, memory, dout, dx);
        };
        // Back to the product, whose gradient is then in `dout`; then through it.
        run.step_backward(i, |param| param != index && flow.trained[param], grads, memory, dout, None);
        let EarlyRows { values, kept, updater } = early.rows(index, shape.rows::<T>(), params).expect("it takes them");
        let Memory { values: made, ws, .. } = &mut **memory;
        let x = input(&steps[i], (0, Pass::TRAIN), (images, x), made);
        affine_backward_updating(&shape, (dout, x), dx, values, kept, ws, |w, dw, kept| updater.update(w, dw, kept));
    }
}

/// Values that one thread adds at a time.
const CHUNK: usize = 16 << 10;

/// `out = activation(a + b)`
fn add<T: Element>(activation: Option<Activation>, a: &[T], b: &[T], out: &mut [T]) {
    for_each_chunk_mut(out, CHUNK, |chunk, out| {
        let here = chunk * CHUNK..chunk * CHUNK + out.len();
        let (a, b) = (&a[here.clone()], &b[here]);
        vectorized!(match activation {
            None => out.iter_mut().zip(a.iter().zip(b)).for_each(|(out, (&a, &b))| *out = a + b),
            Some(activation) => activation.specialised(
                #[inline(always)]
                |activation| {
                    for (out, (&a, &b)) in out.iter_mut().zip(a.iter().zip(b)) {
                        *out = activation.apply(a + b);
                    }
                },
            ),
        });
    });
}

/// How a gradient arrives at a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    /// As the first: it is written to the value's place.
    First,
    /// Several steps read the value: it is added to what is there.
    Later,
}

/// How gradients flow: which parameters are trained decides what backward has to do.
#[derive(Debug)]
pub(super) struct Flow<T> {
    /// For each parameter, whether it is trained.
    trained: Vec<bool>,
    /// For each step, whether anything of it or below it is trained.
    runs: Vec<bool>,
    /// For each step and input, how its gradient arrives there; `None` if nobody wants it.
    arrivals: Vec<Vec<Option<Arrival>>>,
    pub(super) gradients: Slots<T>,
    /// A gradient on its way to be added.
    spare: Buffer<T>,
    spare_len: usize,
}

impl<T: Element> Flow<T> {
    /// `trained` says for each parameter whether it is.
    pub(super) fn new(steps: &[Step<T>], trained: Vec<bool>) -> Self {
        let (mut wanted, mut runs) = (vec![false; steps.len() + 1], vec![false; steps.len()]);
        for (i, step) in steps.iter().enumerate() {
            let here = step.params().into_iter().any(|index| trained[index]);
            runs[i] = here || step.inputs.iter().any(|&value| wanted[value]);
            // The last gradient is the caller's, who writes it before anything else is known.
            wanted[i + 1] = runs[i] || i + 1 == steps.len();
        }
        let (mut arrived, mut spare_len) = (vec![false; steps.len() + 1], 0);
        let mut arrivals = vec![Vec::new(); steps.len()];
        for (i, step) in steps.iter().enumerate().rev() {
            for &value in &step.inputs {
                let later = std::mem::replace(&mut arrived[value], true);
                let arrival = if later { Arrival::Later } else { Arrival::First };
                arrivals[i].push(Some(arrival).filter(|_| wanted[value]));
                spare_len = if later { spare_len.max(step.lens(Pass::TRAIN)[0]) } else { spare_len };
            }
        }
        let gradients = for_gradients(steps, &wanted);
        Flow { trained, runs, arrivals, gradients, spare: Buffer::default(), spare_len }
    }

    /// Whether the way back leads through step `i`.
    pub(super) fn runs(&self, i: usize) -> bool {
        self.runs[i]
    }

    /// For each parameter, whether it is trained.
    pub(super) fn trained(&self) -> &[bool] {
        &self.trained
    }

    /// Makes room for the gradients of `images` images.
    pub(super) fn reserve(&mut self, images: usize) {
        self.gradients.reserve(images);
        self.spare.reserve(images * self.spare_len);
    }

    /// Brings `dx`, the gradient of `value`, to where it belongs.
    fn arrive(&mut self, value: Value, arrival: Option<Arrival>, dx: Option<Buffer<T>>, len: usize) {
        match (arrival, dx) {
            (Some(Arrival::First), Some(dx)) => self.gradients.put(value, dx),
            (Some(Arrival::Later), Some(dx)) => {
                self.add(value, &dx[..len]);
                self.spare = dx;
            }
            _ => {}
        }
    }

    /// The gradient of a sum is that of each of its terms.
    fn spread(&mut self, i: usize, inputs: &[Value], dout: &[T]) {
        for (term, &value) in inputs.iter().enumerate() {
            match self.arrivals[i][term] {
                None => {}
                Some(Arrival::First) => {
                    let mut to = self.gradients.take(value);
                    for_each_chunk_mut(&mut to[..dout.len()], CHUNK, |chunk, to| {
                        to.copy_from_slice(&dout[chunk * CHUNK..][..to.len()]);
                    });
                    self.gradients.put(value, to);
                }
                Some(Arrival::Later) => self.add(value, dout),
            }
        }
    }

    /// Adds `dx` to the gradient of `value`.
    fn add(&mut self, value: Value, dx: &[T]) {
        let mut to = self.gradients.take(value);
        for_each_chunk_mut(&mut to[..dx.len()], CHUNK, |chunk, to| {
            vectorized!(add_assign(to, &dx[chunk * CHUNK..]));
        });
        self.gradients.put(value, to);
    }
}
