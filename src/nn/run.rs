//! Level 5. Running the steps of a network, forward and backward.

use crate::blocks::{BlockGrads, BlockInput, Pass, Weights};
use crate::element::Element;
use crate::nn::graph::Value;
use crate::nn::layer::{Backward, Forward, LayerGrads, LayerParams};
use crate::nn::memory::{Memory, Slots, for_gradients};
use crate::nn::steps::{Kernel, Step};
use crate::ops::Mode;
use crate::ops::activation::Activation;
use crate::ops::conv::Prepared;
use crate::parallel::for_each_chunk_mut;
use crate::params::Params;
use crate::profile::{self, Phase};
use crate::simd::{add_assign, vectorized};
use crate::workspace::Buffer;

/// One call: the steps, what they read, and the images `x` `[N, C, H, W]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'a, T: Element> {
    pub(super) steps: &'a [Step<T>],
    pub(super) params: &'a Params<T>,
    /// Running means and variances.
    pub(super) statistics: &'a Params<T>,
    /// For each step the filters as its plan prepares them, if that was done.
    pub(super) prepared: &'a [Option<Prepared<T>>],
    pub(super) images: usize,
    pub(super) x: &'a [T],
}

impl<'a, T: Element> Run<'a, T> {
    /// Runs all steps; the last value is then the scores. `pass` is asked with the index of each step.
    pub(super) fn forward(&self, memory: &mut Memory<T>, pass: impl Fn(u32) -> Pass) {
        memory.values.reserve(self.images);
        for (i, step) in self.steps.iter().enumerate() {
            let pass = pass(i as u32);
            let phase = if pass == Pass::Test { Phase::Test } else { Phase::Forward };
            let _scope = profile::scope(phase, || step.work(self.images, step.parameters(self.params), 1, 1));
            let mut out = memory.values.take(i + 1);
            self.step_forward(i, pass, memory, &mut out[..self.images * step.output_len()]);
            memory.values.put(i + 1, out);
        }
    }

    fn step_forward(&self, i: usize, pass: Pass, memory: &mut Memory<T>, out: &mut [T]) {
        let (step, images) = (&self.steps[i], self.images);
        let Memory { values, states, ws } = memory;
        let x = self.input(values, i, 0);
        match &step.kernel {
            Kernel::Block { block, places, running } => {
                block.forward(&self.block_input(i, places, *running, x), pass, out, &mut states[i].block, ws);
            }
            Kernel::Sum(activation) => add(*activation, x, self.input(values, i, 1), out),
            Kernel::Layer { layer, first, .. } => {
                let len = images * layer.cache(step.input);
                states[i].cache.reserve(len);
                let (params, cache) = (self.layer_params(*first), &mut states[i].cache[..len]);
                let mode = if pass == Pass::Test { Mode::Test } else { Mode::Train };
                layer.forward(Forward { images, input: step.input, x, params, out, cache, mode, ws });
            }
        }
    }

    /// Takes the gradient of the scores, which lies in its place in `flow`, back to the trained parameters: theirs go into
    /// `grads`, set, not added to.
    pub(super) fn backward(&self, grads: &mut Params<T>, memory: &mut Memory<T>, flow: &mut Flow<T>) {
        for (i, step) in self.steps.iter().enumerate().rev() {
            if !flow.runs[i] {
                continue;
            }
            let (arrival, value) = (flow.arrivals[i][0], step.inputs[0]);
            let inputs = if arrival.is_some() { 2 } else { 1 };
            let _scope =
                profile::scope(Phase::Backward, || step.work(self.images, step.parameters(self.params), inputs, 2));
            let mut gradient = flow.gradients.take(i + 1);
            let dout = &mut gradient[..self.images * step.output_len()];
            if let Kernel::Sum(activation) = step.kernel {
                self.through_slope(i, activation, &memory.values, dout);
                flow.spread(i, &step.inputs, dout);
            } else {
                let mut dx = match arrival {
                    None => None,
                    Some(Arrival::First) => Some(flow.gradients.take(value)),
                    Some(Arrival::Later) => Some(std::mem::take(&mut flow.spare)),
                };
                let wanted = dx.as_mut().map(|dx| &mut dx[..self.images * step.input_len()]);
                self.step_backward(i, &flow.trained, grads, memory, dout, wanted);
                flow.arrive(value, arrival, dx, self.images * step.input_len());
            }
            flow.gradients.put(i + 1, gradient);
        }
    }

    fn step_backward(
        &self,
        i: usize,
        trained: &[bool],
        grads: &mut Params<T>,
        memory: &mut Memory<T>,
        dout: &mut [T],
        dx: Option<&mut [T]>,
    ) {
        let (step, images) = (&self.steps[i], self.images);
        let Memory { values, states, ws } = memory;
        let (x, out) = (self.input(values, i, 0), values.get(i + 1, dout.len()));
        match &step.kernel {
            Kernel::Block { block, places, running } => {
                let trained = |place: Option<usize>| place.filter(|&index| trained[index]);
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
        let (a, b, out) = (self.input(values, i, 0), self.input(values, i, 1), values.get(i + 1, dout.len()));
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

    /// Input `index` of step `i`.
    fn input<'v>(&self, values: &'v Slots<T>, i: usize, index: usize) -> &'v [T]
    where
        'a: 'v,
    {
        match self.steps[i].inputs[index] {
            0 => self.x,
            value => values.get(value, self.images * self.steps[i].input_len()),
        }
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
                spare_len = if later { spare_len.max(step.input_len()) } else { spare_len };
            }
        }
        let gradients = for_gradients(steps, &wanted);
        Flow { trained, runs, arrivals, gradients, spare: Buffer::default(), spare_len }
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
