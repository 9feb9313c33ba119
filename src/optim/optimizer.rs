//! Level 4. The optimizer: groups of parameters, and what their rules remember.

use std::sync::Arc;

use super::cut::{Cut, Span};
use super::elementwise::{Update, VECTORS, squares};
use super::group::{Group, assign};
use super::muon::{Matrix, Scratch, Step};
use super::rule::UpdateRule;
use super::schedule::Progress;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::parallel::{Chunks, Runs, for_each_chunk_mut, for_each_share};
use crate::params::{Param, Params};
use crate::profile::{self, Phase, Work};
use crate::workspace::Buffer;

/// What [`Optimizer::step`] has found out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stepped {
    /// `l2 / 2` times the sum of the squared parameters of each group, before the step: the regularisation loss that belongs
    /// to the data loss of these gradients. NaN if no step was made.
    pub regularization: f64,
    /// With clipping, the norm of the gradient before it was clipped. If it is not a finite number, no step was made.
    pub gradient_norm: Option<f64>,
}

/// Groups of parameters and what their rules remember of earlier steps.
///
/// ```
/// use gemmnet::nn::init::Init;
/// use gemmnet::nn::network::{Network, StepKey};
/// use gemmnet::optim::{Group, LearningRate, Optimizer, Progress, Select};
///
/// let mut network = Network::<f32>::new(&"conv8-bn-relu-gap-affine2".parse()?, [3, 8, 8], Init::He, 0)?;
/// let rate = LearningRate::constant(0.02)?;
/// let groups = vec![
///     Group::frozen(Select::SCALES),
///     Group { l2: 1e-4, ..Group::new("conv*.weight".parse()?, "muon".parse()?, rate) },
///     Group::new(Select::ALL, "adam".parse()?, LearningRate::constant(1e-3)?),
/// ];
/// let mut optimizer = Optimizer::new(groups, network.params())?;
/// let loss = network.loss(&[0.5; 3 * 8 * 8], &[1], StepKey::default())?;
/// let (params, grads) = network.params_and_grads();
/// let stepped = optimizer.step(params, grads, Progress::default());
/// println!("the loss was {}", f64::from(loss) + stepped.regularization);
/// # Ok::<(), gemmnet::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Optimizer<T: Element> {
    groups: Vec<Group>,
    /// The rules in use, for the profile.
    pub(super) label: Arc<str>,
    pub(super) clip_norm: Option<f64>,
    pub(super) params: Vec<Param>,
    /// The group of each parameter that is not fixed.
    group_of: Vec<Option<usize>>,
    /// What is trained.
    pub(super) cut: Cut,
    /// What is trained and a rule sees as a matrix; in `cut` too.
    matrices: Vec<Matrix>,
    /// Flat vectors, laid out as the parameters. A parameter's part of the first ones is what its rule remembers, by
    /// [`UpdateRule::state_names`]. As many as the rule with the most writes.
    pub(super) state: Vec<Buffer<T>>,
    steps: u64,
    /// Each group in the step under way.
    pub(super) updates: Vec<Update<T>>,
    /// Each piece's sum in the step under way.
    pub(super) sums: Box<[f64]>,
    scratch: Scratch<T>,
}

impl<T: Element> Optimizer<T> {
    /// At step 0, for parameters laid out as `params`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a hyperparameter outside of its range; a parameter that no group selects; a group that
    /// selects none, unless it is [`Select::ALL`](super::Select::ALL); a parameter with fewer than two axes under
    /// [`UpdateRule::Muon`].
    pub fn new(groups: Vec<Group>, params: &Params<T>) -> Result<Self> {
        groups.iter().try_for_each(Group::check::<T>)?;
        let group_of = assign(&groups, params.iter())?;
        let params_of: Vec<Param> = params.iter().cloned().collect();
        let cut = Cut::new(&groups, &params_of, &group_of);
        let matrices = matrices(&groups, &params_of, &cut.spans);
        let vectors = cut.spans.iter().map(|span| groups[span.group].rule.vectors()).max().unwrap_or(0);
        let len = params.values().len();
        Ok(Optimizer {
            updates: Vec::with_capacity(groups.len()),
            label: label(&groups, &cut.spans).into(),
            groups,
            clip_norm: None,
            params: params_of,
            group_of,
            scratch: Scratch::new(&matrices),
            matrices,
            state: (0..vectors).map(|_| Buffer::zeroed(len)).collect(),
            steps: 0,
            sums: vec![0.0; cut.pieces.len()].into(),
            cut,
        })
    }

    /// The groups.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Other rates and decays from the next step on.
    ///
    /// # Errors
    /// As [`Optimizer::new`], and [`Error::Invalid`] if a parameter would get another rule, or be frozen or trained that was
    /// not: what is remembered would not fit. Then everything stays as it was.
    pub fn set_groups(&mut self, groups: Vec<Group>) -> Result<()> {
        groups.iter().try_for_each(Group::check::<T>)?;
        let group_of = assign(&groups, self.params.iter())?;
        for ((param, &new), &old) in self.params.iter().zip(&group_of).zip(&self.group_of) {
            let (Some(new), Some(old)) = (new, old) else { continue };
            let (new, old) = (&groups[new], &self.groups[old]);
            if (new.frozen, new.rule) != (old.frozen, old.rule) {
                let say = |group: &Group| if group.frozen { "frozen".into() } else { format!("{:?}", group.rule) };
                let problem = format!("the state of {} is that of {}, not of {}", param.name, say(old), say(new));
                return Err(Error::invalid("parameter groups", problem, "leave its update rule as it is"));
            }
        }
        self.cut = Cut::new(&groups, &self.params, &group_of);
        self.matrices = matrices(&groups, &self.params, &self.cut.spans);
        (self.groups, self.group_of) = (groups, group_of);
        Ok(())
    }

    /// From the next step on, gradients whose norm is above `limit` are scaled down to it, all by the same factor: `g <- g
    /// min(1, limit / (|g| + 1e-6))`, with `|g|` the root of the sum of squares over all parameters that are not frozen,
    /// as in PyTorch's `clip_grad_norm_` (Pascanu, Mikolov & Bengio 2013). The gradient of `l2` is not part of it. `None`,
    /// the usual, is without a limit. It costs one more look at the gradients.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a limit that is not a positive number.
    pub fn set_clip_norm(&mut self, limit: Option<f64>) -> Result<()> {
        if let Some(limit) = limit.filter(|limit| !(*limit > 0.0 && limit.is_finite())) {
            let problem = format!("{limit} is not a positive number");
            return Err(Error::invalid("limit of the gradient's norm", problem, "1 is usual, none is no limit"));
        }
        self.clip_norm = limit;
        Ok(())
    }

    /// Whether each parameter is trained at `at`, in their order; the others are fixed, frozen, or of a group whose
    /// [rate is 0 from there on](super::LearningRate::has_ended), and need no gradient.
    pub fn trained(&self, at: Progress) -> impl ExactSizeIterator<Item = bool> + Clone {
        let trained = move |group: &Group| !group.frozen && !group.learning_rate.has_ended(at);
        self.group_of.iter().map(move |group| group.is_some_and(|group| trained(&self.groups[group])))
    }

    /// The learning rate of the first group that is not frozen, 0 if there is none.
    pub fn learning_rate(&self, at: Progress) -> f64 {
        let first = self.groups.iter().find(|group| !group.frozen);
        first.map_or(0.0, |group| group.learning_rate.at(at))
    }

    /// Steps made so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Sets the number of steps made so far: with [`Optimizer::state_mut`], how a checkpoint is restored.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// What the rules remember, by name and parameter: nothing of frozen ones and for SGD, `velocity` for momentum,
    /// Nesterov and Muon, `square` for AdaGrad and RMSProp, `first_moment` and `second_moment` for Adam and AdamW.
    pub fn state(&self) -> impl Iterator<Item = (&'static str, &Param, &[T])> {
        self.state.iter().enumerate().flat_map(move |(k, vector)| {
            let params = self.params.iter().zip(&self.group_of);
            params.filter_map(move |(param, &group)| {
                Some((state_name(&self.groups[group?], k)?, param, &vector[param.range.clone()]))
            })
        })
    }

    /// [`Optimizer::state`] to write to.
    pub fn state_mut(&mut self) -> impl Iterator<Item = (&'static str, &Param, &mut [T])> {
        let Optimizer { state, params, group_of, groups, .. } = self;
        let mut parts = Vec::new();
        for (k, vector) in state.iter_mut().enumerate() {
            // Parameters lie in rising order.
            let (mut rest, mut start) = (&mut **vector, 0);
            for (param, &group) in params.iter().zip(&*group_of) {
                let (values, after) = rest[param.range.start - start..].split_at_mut(param.range.len());
                (rest, start) = (after, param.range.end);
                parts.extend(group.and_then(|group| state_name(&groups[group], k)).map(|name| (name, param, values)));
            }
        }
        parts.into_iter()
    }

    /// One step: changes `params` by the gradients `grads` of the data loss, each by the rule of its group and the rate
    /// that the group has at `at`.
    ///
    /// The result has the same bits at any number of threads. What lies between parameters stays as it is. For a network whose
    /// gradients nobody wants to see in between, [`crate::nn::network::Network::step`] does the same faster.
    ///
    /// # Panics
    /// If `params` or `grads` are not laid out as those of [`Optimizer::new`].
    pub fn step(&mut self, params: &mut Params<T>, grads: &Params<T>, at: Progress) -> Stepped {
        self.assert_fits(params);
        self.assert_fits(grads);
        let label = Arc::clone(&self.label);
        let _scope = profile::scope(Phase::Optimizer, || Work { op: &label, flops: 0, bytes: self.bytes(|_| true) });
        let mut clip = 1.0;
        let gradient_norm = self.clip_norm.map(|_| self.norm(grads.values()));
        if let (Some(norm), Some(limit)) = (gradient_norm, self.clip_norm) {
            if !norm.is_finite() {
                return Stepped { regularization: f64::NAN, gradient_norm };
            }
            clip = (limit / (norm + 1e-6)).min(1.0);
        }
        self.begin(at, clip);
        Stepped { regularization: self.finish(params, grads, at), gradient_norm }
    }

    #[track_caller]
    pub(super) fn assert_fits(&self, given: &Params<T>) {
        assert!(given.iter().eq(&self.params), "parameters or gradients of another network");
    }

    /// The norm of the gradients of what is trained.
    fn norm(&mut self, grads: &[T]) -> f64 {
        let pieces = &self.cut.pieces;
        for_each_chunk_mut(&mut self.sums, 1, |i, sum| sum[0] = squares(&grads[pieces[i].clone()]));
        self.sums.iter().sum::<f64>().sqrt()
    }

    /// Begins a step: nothing is updated yet. Gradients are multiplied by `clip`.
    pub(super) fn begin(&mut self, at: Progress, clip: f64) {
        self.steps += 1;
        let (groups, steps) = (&self.groups, self.steps);
        let update = |group: &Group| Update::new(group, group.learning_rate.at(at), clip, steps);
        self.updates.clear();
        self.updates.extend(groups.iter().map(update));
        self.cut.spans.iter_mut().for_each(|span| span.done = false);
    }

    /// Updates what the step under way has not updated yet. Returns the regularisation loss before the step.
    pub(super) fn finish(&mut self, params: &mut Params<T>, grads: &Params<T>, at: Progress) -> f64 {
        let Optimizer { cut: Cut { spans, pieces }, updates, state, sums, .. } = self;
        let (params, grads) = (params.values_mut(), grads.values());
        for spans in spans.chunk_by(|a, b| a.done == b.done).filter(|spans| !spans[0].done) {
            let numbers = spans[0].pieces.start..spans[spans.len() - 1].pieces.end;
            let pieces = &pieces[numbers.clone()];
            let [a, b] = vectors(state).map(|vector| Runs::new(vector, pieces, 1));
            let shares = (Runs::new(params, pieces, 1), a, b, Chunks::new(&mut sums[numbers], 1));
            for_each_share(shares, |i, (w, a, b, sum)| {
                let span = &spans[spans.partition_point(|span| span.range.end <= pieces[i].start)];
                sum[0] = updates[span.group].update(w, &grads[pieces[i].clone()], [a, b]);
            });
        }
        self.update_matrices(params, at);
        self.sums.iter().sum()
    }

    /// The steps of those parameters that are seen as matrices, whose directions the pass has left in the last vector.
    fn update_matrices(&mut self, params: &mut [T], at: Progress) {
        let Optimizer { matrices, groups, state, scratch, .. } = self;
        for matrix in matrices {
            let (range, group) = (matrix.range.clone(), &groups[matrix.group]);
            let UpdateRule::Muon { iterations, weight_decay, fixed_norm, .. } = group.rule else {
                unreachable!("no other rule sees matrices")
            };
            let learning_rate = group.learning_rate.at(at);
            let step = Step { learning_rate, weight_decay, iterations, fixed_norm };
            scratch.step(matrix, step, &mut params[range.clone()], &mut state[VECTORS - 1][range]);
        }
    }

    /// Bytes that a step of these moves: gradients are read, parameters and the rules' vectors read and written.
    pub(super) fn bytes(&self, which: impl Fn(&Span) -> bool) -> usize {
        let vectors = |span: &Span| 1 + 2 * (1 + self.groups[span.group].rule.vectors());
        let spans = self.cut.spans.iter().filter(|span| which(span));
        spans.map(|span| vectors(span) * span.range.len()).sum::<usize>() * size_of::<T>()
    }
}

/// The rules' vectors; those that no rule has are empty.
pub(super) fn vectors<T: Element>(state: &mut [Buffer<T>]) -> [&mut [T]; VECTORS] {
    let mut vectors = state.iter_mut();
    std::array::from_fn(|_| vectors.next().map_or(&mut [][..], |vector| &mut **vector))
}

/// The names of the rules in use: `adam`, `muon, adam`.
fn label(groups: &[Group], spans: &[Span]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for span in spans {
        let name = groups[span.group].rule.name();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(", ")
}

/// What of it is seen as matrices.
fn matrices(groups: &[Group], params: &[Param], spans: &[Span]) -> Vec<Matrix> {
    let shape =
        |span: &Span| &params.iter().find(|param| param.range == span.range).expect("a span is a parameter").shape;
    let matrices = spans.iter().filter(|span| groups[span.group].rule.is_matrix());
    matrices.map(|span| Matrix::new(span.range.clone(), span.group, shape(span))).collect()
}

/// The name of what a group's rule keeps in vector `k`, if it does.
fn state_name(group: &Group, k: usize) -> Option<&'static str> {
    if group.frozen { None } else { group.rule.state_names().get(k).copied() }
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::super::LearningRate;
    use super::super::elementwise::CHUNK;
    use super::*;
    use crate::parallel::with_threads;
    use crate::params::{Layout, ParamKind};
    use crate::random::{Purpose, stream};

    fn uniform<T: Element>(len: usize, index: u64) -> Vec<T> {
        let mut rng = stream(1, Purpose::Example, 0, index);
        // Through f32, so that both types get the same numbers.
        (0..len).map(|_| T::of(f64::from(rng.random_range(-1.0_f32..1.0)))).collect()
    }

    fn linspace(from: f64, to: f64) -> Vec<f64> {
        (0..20).map(|i| from + (to - from) * f64::from(i) / 19.0).collect()
    }

    #[track_caller]
    fn assert_close<T: Element>(got: &[T], expected: &[f64], tolerance: f64, what: &str) {
        assert_eq!(got.len(), expected.len(), "{what}");
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            let difference = (got.f64() - expected).abs();
            assert!(difference <= tolerance, "{what}: element {i} is {got}, not {expected}");
        }
    }

    /// Weights of these shapes, `w0`, `w1` and so on.
    fn zeros<T: Element>(shapes: &[&[usize]]) -> Params<T> {
        let mut layout = Layout::default();
        for (i, shape) in shapes.iter().enumerate() {
            layout.push(format!("w{i}"), shape, ParamKind::Weight);
        }
        Params::zeros(layout)
    }

    /// The same with random values, gaps left at 0.
    fn random<T: Element>(shapes: &[&[usize]], index: u64) -> Params<T> {
        let mut params = zeros(shapes);
        for i in 0..shapes.len() {
            let len = params.slice(i).len();
            params.slice_mut(i).copy_from_slice(&uniform(len, index + 100 * i as u64));
        }
        params
    }

    fn rule(name: &str) -> UpdateRule {
        name.parse().unwrap()
    }

    fn group(select: &str, rule: UpdateRule, rate: f64) -> Group {
        Group::new(select.parse().unwrap(), rule, LearningRate::constant(rate).unwrap())
    }

    /// What the elementwise tests train: rules that see vectors.
    fn elementwise() -> impl Iterator<Item = UpdateRule> {
        UpdateRule::ALL.into_iter().filter(|rule| !rule.is_matrix())
    }

    fn optimizer<T: Element>(groups: &[Group], params: &Params<T>) -> Optimizer<T> {
        Optimizer::new(groups.to_vec(), params).unwrap()
    }

    const START: Progress = Progress { step: 0, steps_per_epoch: 0, steps: 0 };

    /// One parameter and one step in f64, as the documentation of [`UpdateRule`] writes it; `g` includes L2.
    fn scalar_step(rule: UpdateRule, w: f64, g: f64, state: [f64; 2], t: i32, lr: f64) -> (f64, [f64; 2]) {
        match rule {
            UpdateRule::Sgd => (w - lr * g, state),
            UpdateRule::Momentum { momentum } => {
                let v = momentum * state[0] - lr * g;
                (w + v, [v, 0.0])
            }
            UpdateRule::Nesterov { momentum } => {
                let v = momentum * state[0] - lr * g;
                (w - momentum * state[0] + (1.0 + momentum) * v, [v, 0.0])
            }
            UpdateRule::AdaGrad { epsilon } => {
                let s = state[0] + g.powi(2);
                (w - lr * g / (s.sqrt() + epsilon), [s, 0.0])
            }
            UpdateRule::RmsProp { decay, epsilon } => {
                let s = decay * state[0] + (1.0 - decay) * g.powi(2);
                (w - lr * g / (s.sqrt() + epsilon), [s, 0.0])
            }
            UpdateRule::Adam { beta1, beta2, epsilon } => {
                let m = beta1 * state[0] + (1.0 - beta1) * g;
                let v = beta2 * state[1] + (1.0 - beta2) * g.powi(2);
                let (m_hat, v_hat) = (m / (1.0 - beta1.powi(t)), v / (1.0 - beta2.powi(t)));
                (w - lr * m_hat / (v_hat.sqrt() + epsilon), [m, v])
            }
            UpdateRule::AdamW { beta1, beta2, epsilon, weight_decay } => {
                scalar_step(UpdateRule::Adam { beta1, beta2, epsilon }, w - lr * weight_decay * w, g, state, t, lr)
            }
            UpdateRule::Muon { .. } => unreachable!("a matrix"),
        }
    }

    /// Steps of all the groups in one pass against [`scalar_step`]: parameters, state and the regularisation loss. The
    /// limit, if there is one, clips the gradients.
    fn follows_the_formula<T: Element>(lens: &[usize], groups: &[Group], limit: Option<f64>, tolerance: f64) {
        let shapes: Vec<[usize; 1]> = lens.iter().map(|&len| [len]).collect();
        let shapes: Vec<&[usize]> = shapes.iter().map(|shape| &shape[..]).collect();
        let mut params = random::<T>(&shapes, 0);
        let mut optimizer = optimizer(groups, &params);
        optimizer.set_clip_norm(limit).unwrap();
        let of_group: Vec<usize> = optimizer.group_of.iter().map(|group| group.unwrap()).collect();
        let mut expected: Vec<Vec<f64>> = (0..lens.len()).map(|i| widen(params.slice(i))).collect();
        let mut state: Vec<Vec<[f64; 2]>> = lens.iter().map(|&len| vec![[0.0; 2]; len]).collect();
        for t in 1..=4_i32 {
            let grads = random::<T>(&shapes, t as u64);
            let at = Progress { step: t as usize - 1, steps_per_epoch: 1, steps: 4 };
            let norm = (0..lens.len()).filter(|&i| !groups[of_group[i]].frozen);
            let norm = norm.flat_map(|i| widen(grads.slice(i))).map(|g| g * g).sum::<f64>().sqrt();
            let clip = limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0));
            let mut loss = 0.0;
            for i in 0..lens.len() {
                let group = &groups[of_group[i]];
                if group.frozen {
                    continue;
                }
                loss += 0.5 * group.l2 * expected[i].iter().map(|w| w * w).sum::<f64>();
                let lr = group.learning_rate.at(at);
                for ((w, g), state) in expected[i].iter_mut().zip(widen(grads.slice(i))).zip(&mut state[i]) {
                    (*w, *state) = scalar_step(group.rule, *w, clip * g + group.l2 * *w, *state, t, lr);
                }
            }
            let stepped = optimizer.step(&mut params, &grads, at);
            let what = format!("{groups:?} in {}, {lens:?}, step {t}", T::NAME);
            let off = (stepped.regularization - loss).abs();
            assert!(off <= tolerance * loss, "{what}: loss {}, not {loss}", stepped.regularization);
            assert_eq!(stepped.gradient_norm.is_some(), limit.is_some());
            if let Some(got) = stepped.gradient_norm {
                assert!((got - norm).abs() <= tolerance * norm, "{what}: norm {got}, not {norm}");
            }
            for (i, expected) in expected.iter().enumerate() {
                assert_close(params.slice(i), expected, tolerance, &what);
            }
            for (name, param, values) in optimizer.state() {
                let i = params.iter().position(|p| p == param).unwrap();
                let k = groups[of_group[i]].rule.state_names().iter().position(|n| *n == name).unwrap();
                let expected: Vec<f64> = state[i].iter().map(|state| state[k]).collect();
                assert_close(values, &expected, tolerance, &format!("{what}, {name}"));
            }
        }
        assert_eq!(optimizer.steps(), 4);
    }

    fn widen<T: Element>(values: &[T]) -> Vec<f64> {
        values.iter().map(|value| value.f64()).collect()
    }

    /// Lengths of parameters that end inside a chunk, touch each other, span chunks, end with the vector; whole chunks;
    /// nothing.
    const LENGTHS: [&[usize]; 5] =
        [&[17, 3, CHUNK - 100, 16, 2 * CHUNK, 5], &[CHUNK, CHUNK, 1], &[CHUNK + 1, 1, 1], &[1, 1, 1], &[0, 1, 2]];

    #[test]
    fn every_rule_follows_its_formula() {
        for rule in elementwise() {
            for lens in LENGTHS {
                let shrunk = Group { l2: 0.1, ..group("w0", rule, 0.01) };
                let groups = [shrunk.clone(), Group { select: "w?".parse().unwrap(), l2: 0.0, ..shrunk }];
                follows_the_formula::<f32>(lens, &groups, None, 3e-6);
                follows_the_formula::<f64>(lens, &groups, None, 1e-13);
            }
        }
    }

    /// Rules, rates that change, decays, and something frozen, all in one pass; with and without clipping.
    #[test]
    fn groups_of_different_rules_follow_theirs() {
        let falling = LearningRate::new(0.02, "exp:0.5".parse().unwrap(), 0.0).unwrap();
        let groups = [
            Group { l2: 0.1, ..group("w1", rule("momentum"), 0.01) },
            Group::frozen("w2".parse().unwrap()),
            Group { l2: 0.01, learning_rate: falling, ..group("w0", rule("adamw"), 1.0) },
            group("*", rule("sgd"), 0.01),
        ];
        for limit in [None, Some(1e-3), Some(1e6)] {
            for lens in LENGTHS {
                follows_the_formula::<f32>(lens, &groups, limit, 3e-6);
                follows_the_formula::<f64>(lens, &groups, limit, 1e-13);
            }
        }
    }

    /// The fixtures of CS231n's notebooks (assignment 2, FullyConnectedNets), computed with numpy:
    /// ```python
    /// w, dw = np.linspace(-0.4, 0.6, 20), np.linspace(-0.6, 0.4, 20)
    /// a, b = np.linspace(0.6, 0.9, 20), np.linspace(0.7, 0.5, 20)
    /// v = 0.9 * a - 1e-3 * dw; print(w + v); print(w - 0.9 * a + 1.9 * v)
    /// print(w - 1e-2 * dw / (np.sqrt(0.99 * a + 0.01 * dw**2) + 1e-8))
    /// m, s = 0.9 * a + 0.1 * dw, 0.999 * b + 0.001 * dw**2
    /// print(w - 1e-2 * (m / (1 - 0.9**6)) / (np.sqrt(s / (1 - 0.999**6)) + 1e-8))
    /// ```
    #[test]
    #[rustfmt::skip]
    fn rules_agree_with_cs231n() {
        for (name, lr, expected) in [
            ("momentum", 1e-3, [
                    0.1406, 0.20738947, 0.27417895, 0.34096842, 0.40775789,
                0.47454737, 0.54133684, 0.60812632, 0.67491579, 0.74170526,
                0.80849474, 0.87528421, 0.94207368, 1.00886316, 1.07565263,
                1.14244211, 1.20923158, 1.27602105, 1.34281053,     1.4096,
            ]),
            ("nesterov", 1e-3, [
                   0.08714, 0.15246105, 0.21778211, 0.28310316, 0.34842421,
                0.41374526, 0.47906632, 0.54438737, 0.60970842, 0.67502947,
                0.74035053, 0.80567158, 0.87099263, 0.93631368, 1.00163474,
                1.06695579, 1.13227684, 1.19759789, 1.26291895,    1.32824,
            ]),
            ("rmsprop", 1e-2, [
                -0.39223849, -0.34037513, -0.28849239, -0.23659121, -0.18467247,
                  -0.132737, -0.08078555, -0.02881884,  0.02316247,  0.07515774,
                 0.12716641,  0.17918792,  0.23122175,  0.28326742,  0.33532447,
                 0.38739248,  0.43947102,  0.49155973,  0.54365823,  0.59576619,
            ]),
            ("adam", 1e-2, [
                -0.40094747, -0.34836187, -0.29577703, -0.24319299, -0.19060977,
                 -0.1380274, -0.08544591, -0.03286534,  0.01971428,   0.0722929,
                  0.1248705,  0.17744702,  0.23002243,  0.28259667,  0.33516969,
                 0.38774145,  0.44031188,  0.49288093,  0.54544852,  0.59801459,
            ]),
        ] {
            let mut w = zeros(&[&[20]]);
            let mut optimizer = optimizer(&[group("*", rule(name), lr)], &w);
            for ((.., values), before) in optimizer.state_mut().zip([linspace(0.6, 0.9), linspace(0.7, 0.5)]) {
                values.copy_from_slice(&before);
            }
            optimizer.set_steps(5);
            let mut grads = w.zeros_like();
            w.slice_mut(0).copy_from_slice(&linspace(-0.4, 0.6));
            grads.slice_mut(0).copy_from_slice(&linspace(-0.6, 0.4));
            optimizer.step(&mut w, &grads, START);
            assert_close(w.slice(0), &expected, 6e-9, name);
        }
    }

    /// Filters, a tall and a wide matrix, a vector: one rule after the other, and all in one optimizer.
    const SHAPES: [&[usize]; 4] = [&[40, 3, 5, 5], &[300, 90], &[64, 1000], &[2 * CHUNK + 77]];

    fn mixed() -> Vec<Group> {
        let muon = UpdateRule::Muon { momentum: 0.9, iterations: 3, weight_decay: 0.1, fixed_norm: true };
        vec![
            Group { l2: 0.01, ..group("w0", muon, 0.01) },
            group("w1", rule("muon"), 0.01),
            Group { l2: 0.01, ..group("w2", rule("adam"), 0.01) },
            Group { l2: 0.1, ..group("*", rule("nesterov"), 0.01) },
        ]
    }

    #[test]
    fn the_same_bits_at_any_number_of_threads() {
        let run = |threads, groups: &[Group]| {
            with_threads(threads, || {
                let mut params = random::<f32>(&SHAPES, 0);
                let mut optimizer = optimizer(groups, &params);
                optimizer.set_clip_norm(Some(1.0)).unwrap();
                let steps: Vec<_> = (1..4)
                    .map(|t| optimizer.step(&mut params, &random(&SHAPES, t), START))
                    .map(|step| [step.regularization, step.gradient_norm.unwrap()].map(f64::to_bits))
                    .collect();
                (params.values().iter().map(|w| w.to_bits()).collect::<Vec<_>>(), steps)
            })
            .unwrap()
        };
        let every = elementwise().map(|rule| vec![Group { l2: 0.01, ..group("*", rule, 0.01) }]);
        for groups in every.chain([mixed()]) {
            let one = run(1, &groups);
            for threads in [2, 5] {
                assert!(run(threads, &groups) == one, "{groups:?} with {threads} threads");
            }
        }
    }

    /// The gaps between parameters hold zeros for ever. Where gradients are 0, nothing becomes 0 / 0, whatever epsilon was
    /// accepted.
    #[test]
    fn gaps_and_zeros_stay_zero() {
        let tiny = f64::from(f32::MIN_POSITIVE);
        let smallest_epsilon = [
            UpdateRule::AdaGrad { epsilon: tiny },
            UpdateRule::RmsProp { decay: 0.99, epsilon: tiny },
            UpdateRule::Adam { beta1: 0.9, beta2: 0.999, epsilon: tiny },
        ];
        let shapes: [&[usize]; 3] = [&[5, 3], &[CHUNK - 20, 1], &[77, 1]];
        for rule in UpdateRule::ALL.into_iter().chain(smallest_epsilon) {
            let mut params = random::<f32>(&shapes, 0);
            params.slice_mut(1).fill(0.0);
            let mut optimizer = optimizer(&[Group { l2: 0.1, ..group("*", rule, 0.01) }], &params);
            for t in 1..20 {
                let mut grads = random(&shapes, t);
                grads.slice_mut(1).fill(0.0);
                optimizer.step(&mut params, &grads, START);
            }
            let used: Vec<_> = [0, 2].map(|i| params.param(i).range.clone()).into();
            let is_used = |i: usize| used.iter().any(|range| range.contains(&i));
            for (i, &w) in params.values().iter().enumerate() {
                assert!(if is_used(i) { w != 0.0 && w.is_finite() } else { w == 0.0 }, "{}: {i} is {w}", rule.name());
            }
            for vector in &optimizer.state {
                assert!((0..vector.len()).all(|i| is_used(i) || vector[i] == 0.0), "{}", rule.name());
            }
        }
    }

    #[test]
    fn frozen_parameters_stay_and_have_no_state() {
        let mut params = random::<f32>(&SHAPES, 0);
        let mut groups = mixed();
        groups[0].frozen = true;
        groups[2].frozen = true;
        let mut optimizer = optimizer(&groups, &params);
        assert_eq!(optimizer.trained(START).collect::<Vec<_>>(), [false, true, false, true]);
        optimizer.set_clip_norm(Some(1.0)).unwrap();
        let (before, mut grads) = (params.clone(), random(&SHAPES, 1));
        // What nobody wants may be anything.
        grads.slice_mut(0).fill(f32::NAN);
        grads.slice_mut(2).fill(f32::INFINITY);
        let stepped = optimizer.step(&mut params, &grads, START);
        assert!(stepped.regularization.is_finite() && stepped.gradient_norm.unwrap().is_finite());
        for (i, trained) in optimizer.trained(START).enumerate() {
            assert_eq!(params.slice(i) != before.slice(i), trained, "{i}");
            assert!(params.slice(i).iter().all(|w| w.is_finite()));
        }
        let names: Vec<_> = optimizer.state().map(|(name, param, _)| (name, &*param.name)).collect();
        assert_eq!(names, [("velocity", "w1"), ("velocity", "w3")]);
    }

    /// A gradient that is no number has no direction: nothing moves.
    #[test]
    fn no_step_is_made_along_a_gradient_without_a_norm() {
        let mut params = random::<f32>(&SHAPES, 0);
        let mut optimizer = optimizer(&mixed(), &params);
        optimizer.set_clip_norm(Some(1.0)).unwrap();
        let (before, mut grads) = (params.clone(), random(&SHAPES, 1));
        grads.slice_mut(3)[5] = f32::NAN;
        let stepped = optimizer.step(&mut params, &grads, START);
        assert!(stepped.regularization.is_nan() && stepped.gradient_norm.unwrap().is_nan());
        assert_eq!(params.values(), before.values());
        assert_eq!(optimizer.steps(), 0);
        assert!(optimizer.state().all(|(.., values)| values.iter().all(|&v| v == 0.0)));
        // One that is too large for squares in f32 has a norm.
        grads.slice_mut(3)[5] = 1e30;
        let norm = optimizer.step(&mut params, &grads, START).gradient_norm.unwrap();
        assert!((norm / 1e30 - 1.0).abs() < 1e-6, "{norm}");
        assert!(params.values().iter().all(|w| w.is_finite()));
        for limit in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(optimizer.set_clip_norm(Some(limit)).is_err(), "{limit}");
        }
    }

    /// Every rule goes downhill: from random points to the minimum of a quadratic bowl ten times as steep one way.
    #[test]
    fn every_rule_finds_the_minimum() {
        let target = uniform::<f64>(64, 9);
        for (name, lr, schedule) in [
            ("sgd", 0.1, "constant"),
            ("momentum", 0.02, "constant"),
            ("nesterov", 0.02, "constant"),
            ("adagrad", 0.5, "constant"),
            ("rmsprop", 0.002, "constant"),
            ("adam", 0.02, "constant"),
            ("adamw", 0.02, "constant"),
            // Its steps are as long near the minimum as far away.
            ("muon", 0.05, "cosine"),
        ] {
            let mut w = random::<f64>(&[&[8, 8]], 8);
            let learning_rate = LearningRate::new(lr, schedule.parse().unwrap(), 0.0).unwrap();
            let plain = Group { learning_rate, ..group("*", rule(name).without_decay(), lr) };
            let mut optimizer = optimizer(&[plain], &w);
            let steep = |i: usize| if i.is_multiple_of(2) { 1.0 } else { 10.0 };
            for step in 0..1500 {
                let mut grads = w.zeros_like();
                for i in 0..64 {
                    grads.slice_mut(0)[i] = steep(i) * (w.slice(0)[i] - target[i]);
                }
                optimizer.step(&mut w, &grads, Progress { step, steps_per_epoch: 1, steps: 1500 });
            }
            assert_close(w.slice(0), &target, 5e-3, name);
        }
    }

    /// What a checkpoint keeps is all that the future depends on.
    #[test]
    fn a_restored_optimizer_goes_on_with_the_same_bits() {
        let mut params = random::<f32>(&SHAPES, 0);
        let mut first = optimizer(&mixed(), &params);
        for t in 1..4 {
            first.step(&mut params, &random(&SHAPES, t), START);
        }
        let groups: Vec<Group> = serde_json::from_str(&serde_json::to_string(first.groups()).unwrap()).unwrap();
        let mut second = optimizer(&groups, &params);
        second.set_steps(first.steps());
        let names = first.state().map(|(name, param, _)| format!("{name}.{}", param.name)).collect::<Vec<_>>();
        let expected = ["velocity.w0", "velocity.w1", "first_moment.w2", "velocity.w3", "second_moment.w2"];
        assert_eq!(names, expected);
        for ((name, param, to), from) in second.state_mut().zip(first.state()) {
            assert_eq!((name, param), (from.0, from.1));
            to.copy_from_slice(from.2);
        }
        let mut restored = params.clone();
        first.step(&mut params, &random(&SHAPES, 4), START);
        second.step(&mut restored, &random(&SHAPES, 4), START);
        assert_eq!(params.values(), restored.values());
    }

    #[test]
    fn rates_may_change_and_rules_may_not() {
        let mut params = random::<f32>(&SHAPES, 0);
        let mut optimizer = optimizer(&mixed(), &params);
        let mut groups = mixed();
        groups[0].rule = rule("nesterov");
        let error = optimizer.set_groups(groups).unwrap_err().to_string();
        assert!(error.contains("the state of w0 is that of Muon") && error.contains("not of Nesterov"), "{error}");
        let mut groups = mixed();
        groups[3].frozen = true;
        let error = optimizer.set_groups(groups).unwrap_err().to_string();
        assert!(error.contains("w3") && error.contains("not of frozen"), "{error}");
        assert_eq!(optimizer.groups(), mixed(), "all is as it was");
        // The same rules in groups of another order, at rates next to nothing.
        let mut groups = mixed();
        groups.reverse();
        groups[0].select = "w3".parse().unwrap();
        for group in &mut groups {
            (group.learning_rate, group.l2) = (LearningRate::constant(1e-30).unwrap(), 0.0);
        }
        optimizer.set_groups(groups).unwrap();
        let before = params.clone();
        assert_eq!(optimizer.step(&mut params, &random(&SHAPES, 1), START).regularization, 0.0);
        // The filters were scaled to their fixed norm.
        for (i, moved) in [true, false, false, false].into_iter().enumerate() {
            assert_eq!(params.slice(i) != before.slice(i), moved, "{i}");
        }
    }

    #[test]
    fn wrong_rules_are_errors() {
        let message = "sgdm".parse::<UpdateRule>().unwrap_err().to_string();
        assert!(
            message.contains("`sgdm`")
                && message.contains("sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw, muon")
        );
        let adam = |beta1, beta2, epsilon| UpdateRule::Adam { beta1, beta2, epsilon };
        let adamw = |beta2, weight_decay| UpdateRule::AdamW { beta1: 0.9, beta2, epsilon: 1e-8, weight_decay };
        let muon = |momentum, iterations, weight_decay| UpdateRule::Muon {
            momentum,
            iterations,
            weight_decay,
            fixed_norm: false,
        };
        for (rule, part) in [
            (UpdateRule::Momentum { momentum: 1.0 }, "1 is not in 0 <= momentum < 1"),
            (UpdateRule::Nesterov { momentum: -0.1 }, "-0.1 is not in"),
            (UpdateRule::RmsProp { decay: f64::NAN, epsilon: 1e-8 }, "NaN is not in 0 <= decay < 1"),
            (UpdateRule::AdaGrad { epsilon: 0.0 }, "epsilon: 0 is not"),
            (adam(1.0, 0.999, 1e-8), "beta1"),
            (adam(0.9, 2.0, 1e-8), "beta2"),
            (adam(0.9, 0.999, 1e-40), "in f32"),
            (adamw(1.0, 0.0), "beta2"),
            (adamw(0.9, -1.0), "weight_decay: -1"),
            (muon(1.0, 5, 0.0), "momentum"),
            (muon(0.9, 0, 0.0), "0 of them"),
            (muon(0.9, 5, f64::NAN), "weight_decay: NaN"),
        ] {
            let message = Optimizer::new(vec![group("*", rule, 0.1)], &zeros::<f32>(&[&[1]])).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        let shrinking = Group { l2: -1.0, ..group("*", rule("sgd"), 0.1) };
        let message = Optimizer::new(vec![shrinking], &zeros::<f32>(&[&[1]])).unwrap_err().to_string();
        assert!(message.contains("-1 is not"), "{message}");
        let normal = Optimizer::new(vec![group("*", adam(0.9, 0.999, 1e-40), 0.1)], &zeros::<f64>(&[&[1]]));
        assert!(normal.is_ok(), "1e-40 is a normal number in f64");
    }

    #[test]
    #[should_panic(expected = "of another network")]
    fn parameters_of_another_network_are_a_bug() {
        let mut params = zeros::<f32>(&[&[3], &[4]]);
        let other = zeros(&[&[4], &[3]]);
        optimizer(&[group("*", rule("sgd"), 0.1)], &params).step(&mut params, &other, START);
    }
}
