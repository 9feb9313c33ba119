//! Level 4. Optimizers and learning-rate schedules, on flat vectors: they know nothing of networks.
//!
//! [`Optimizer::step`] is one pass over memory. A step of Adam moves 28 bytes per `f32` parameter (reads w, g, m, v,
//! writes w, m, v) and little arithmetic, so L2 regularisation, its loss and weight decay ride along in that pass.
//!
//! The rules keep CS231n's convention: the learning rate is *inside* the velocity, `v <- mu v - lr g; w <- w + v`.
//! PyTorch keeps it outside, `v <- mu v + g; w <- w - lr v`. The two agree while the rate is constant; when it changes,
//! the steps already in the velocity keep the old rate here and take the new one there.

mod schedule;

use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use self::schedule::{LearningRate, Schedule};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::parallel::FlushToZero;
use crate::workspace::Buffer;

/// How a gradient `g` changes a parameter `w`; `lr` is the learning rate, products and roots are elementwise.
///
/// `"adam".parse()` and the like give the defaults, which are CS231n's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "lowercase")]
pub enum UpdateRule {
    /// `w <- w - lr g`: stochastic gradient descent (Robbins & Monro 1951).
    Sgd,
    /// `v <- mu v - lr g; w <- w + v`: the heavy ball (Polyak 1964).
    Momentum {
        /// `mu`, the share of the velocity that survives a step; 0 to below 1, 0.9 by default.
        momentum: f64,
    },
    /// `u <- v; v <- mu v - lr g; w <- w - mu u + (1 + mu) v`: accelerated gradient (Nesterov 1983) with `w` at the
    /// look-ahead point, so that the gradient is taken where the parameters are (Bengio et al. 2013).
    Nesterov {
        /// `mu`; 0 to below 1, 0.9 by default.
        momentum: f64,
    },
    /// `s <- s + g^2; w <- w - lr g / (sqrt(s) + eps)` (Duchi, Hazan & Singer 2011).
    AdaGrad {
        /// `eps`, against division by 0; 1e-8 by default.
        epsilon: f64,
    },
    /// `s <- d s + (1 - d) g^2; w <- w - lr g / (sqrt(s) + eps)` (Tieleman & Hinton 2012, lecture 6.5).
    RmsProp {
        /// `d`, the share of the mean square that survives a step; 0 to below 1, 0.99 by default.
        decay: f64,
        /// `eps`, against division by 0; 1e-8 by default.
        epsilon: f64,
    },
    /// `m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- w - lr m' / (sqrt(v') + eps)` with the moments freed of
    /// their start at 0: `m' = m / (1 - b1^t)`, `v' = v / (1 - b2^t)` in step `t`, from 1 (Kingma & Ba 2015).
    Adam {
        /// `b1`; 0 to below 1, 0.9 by default.
        beta1: f64,
        /// `b2`; 0 to below 1, 0.999 by default.
        beta2: f64,
        /// `eps`, against division by 0; 1e-8 by default.
        epsilon: f64,
    },
    /// Adam, after `w <- w - lr wd w` on the weights: decay that the moments do not rescale (Loshchilov & Hutter 2019).
    /// The decay is in the parameters only, never in the loss that [`Optimizer::step`] returns.
    AdamW {
        /// `b1`; 0 to below 1, 0.9 by default.
        beta1: f64,
        /// `b2`; 0 to below 1, 0.999 by default.
        beta2: f64,
        /// `eps`, against division by 0; 1e-8 by default.
        epsilon: f64,
        /// `wd`; 0 or more, 0.01 by default.
        weight_decay: f64,
    },
}

impl UpdateRule {
    /// Every rule with its defaults.
    pub const ALL: [UpdateRule; 7] = [
        UpdateRule::Sgd,
        UpdateRule::Momentum { momentum: 0.9 },
        UpdateRule::Nesterov { momentum: 0.9 },
        UpdateRule::AdaGrad { epsilon: 1e-8 },
        UpdateRule::RmsProp { decay: 0.99, epsilon: 1e-8 },
        UpdateRule::Adam { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
        UpdateRule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 },
    ];

    /// The name that [`FromStr`] reads.
    pub fn name(self) -> &'static str {
        match self {
            UpdateRule::Sgd => "sgd",
            UpdateRule::Momentum { .. } => "momentum",
            UpdateRule::Nesterov { .. } => "nesterov",
            UpdateRule::AdaGrad { .. } => "adagrad",
            UpdateRule::RmsProp { .. } => "rmsprop",
            UpdateRule::Adam { .. } => "adam",
            UpdateRule::AdamW { .. } => "adamw",
        }
    }

    /// Names of the vectors that it keeps from step to step.
    fn state_names(self) -> &'static [&'static str] {
        match self {
            UpdateRule::Sgd => &[],
            UpdateRule::Momentum { .. } | UpdateRule::Nesterov { .. } => &["velocity"],
            UpdateRule::AdaGrad { .. } | UpdateRule::RmsProp { .. } => &["square"],
            UpdateRule::Adam { .. } | UpdateRule::AdamW { .. } => &["first_moment", "second_moment"],
        }
    }

    fn check<T: Element>(self) -> Result<()> {
        let share = |what, value: f64| {
            if (0.0..1.0).contains(&value) {
                return Ok(());
            }
            Err(Error::invalid(what, format!("{value} is not in 0 <= {what} < 1"), "0.9 is usual"))
        };
        // Where gradients are 0 the division is 0 / epsilon, in `T` and with denormals flushed to 0.
        let divisor = |epsilon: f64| {
            if epsilon.is_finite() && epsilon >= T::min_positive_value().f64() {
                return Ok(());
            }
            let problem = format!("{epsilon} is not a positive normal number in {}", T::NAME);
            Err(Error::invalid("epsilon", problem, "1e-8 is usual"))
        };
        match self {
            UpdateRule::Sgd => Ok(()),
            UpdateRule::Momentum { momentum } | UpdateRule::Nesterov { momentum } => share("momentum", momentum),
            UpdateRule::AdaGrad { epsilon } => divisor(epsilon),
            UpdateRule::RmsProp { decay, epsilon } => share("decay", decay).and(divisor(epsilon)),
            UpdateRule::Adam { beta1, beta2, epsilon } => {
                share("beta1", beta1).and(share("beta2", beta2)).and(divisor(epsilon))
            }
            UpdateRule::AdamW { beta1, beta2, epsilon, weight_decay } => {
                UpdateRule::Adam { beta1, beta2, epsilon }.check::<T>()?;
                if weight_decay.is_finite() && weight_decay >= 0.0 {
                    return Ok(());
                }
                let problem = format!("{weight_decay} is not a number from 0 up");
                Err(Error::invalid("weight_decay", problem, "0.01 is usual"))
            }
        }
    }
}

impl FromStr for UpdateRule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|rule| rule.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::invalid("update rule", format!("`{text}` is not one"), format!("choose one of {names}"))
        })
    }
}

/// An update rule and what it remembers of earlier steps.
#[derive(Clone, Debug)]
pub struct Optimizer<T: Element> {
    rule: UpdateRule,
    len: usize,
    /// One vector per name in [`UpdateRule::state_names`].
    state: Vec<Buffer<T>>,
    steps: u64,
    /// Each chunk's sum of squared weights in the step under way.
    squares: Box<[f64]>,
}

impl<T: Element> Optimizer<T> {
    /// At step 0, for `len` parameters.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a hyperparameter outside of its range.
    pub fn new(rule: UpdateRule, len: usize) -> Result<Self> {
        rule.check::<T>()?;
        let state = rule.state_names().iter().map(|_| Buffer::zeroed(len)).collect();
        Ok(Optimizer { rule, len, state, steps: 0, squares: vec![0.0; len.div_ceil(CHUNK)].into() })
    }

    /// The rule.
    pub fn rule(&self) -> UpdateRule {
        self.rule
    }

    /// Steps made so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Sets the number of steps made so far: with [`Optimizer::state_mut`], how a checkpoint is restored.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// What the rule remembers, by name, each vector laid out as the parameters: nothing for SGD, `velocity` for
    /// momentum and Nesterov, `square` for AdaGrad and RMSProp, `first_moment` and `second_moment` for Adam and AdamW.
    pub fn state(&self) -> impl ExactSizeIterator<Item = (&'static str, &[T])> {
        self.rule.state_names().iter().copied().zip(self.state.iter().map(|s| &**s))
    }

    /// [`Optimizer::state`] to write to. The gaps between parameters must stay 0.
    pub fn state_mut(&mut self) -> impl ExactSizeIterator<Item = (&'static str, &mut [T])> {
        self.rule.state_names().iter().copied().zip(self.state.iter_mut().map(|s| &mut **s))
    }

    /// One step: changes `params` by the gradients `grads` of the data loss. On the ranges `weights` (in rising order,
    /// apart from each other) the loss also has `l2 / 2 * sum(w^2)`, so `l2 * w` is added to their gradients there, and
    /// AdamW's decay applies. Returns `sum(w^2) / 2` over `weights` as it was *before* the step: times `l2`, the
    /// regularisation loss that belongs to the data loss of these gradients.
    ///
    /// Elements that are 0, with gradients of 0 ever since the first step, stay 0.
    ///
    /// The result has the same bits at any number of threads. Squares are summed in `T` over at most 64 elements, then
    /// in `f64`: relative error below 2^-17 in `f32`, typically 1e-7.
    ///
    /// # Panics
    /// If `params`, `grads` or `weights` do not fit the length that [`Optimizer::new`] got.
    pub fn step(
        &mut self,
        params: &mut [T],
        grads: &[T],
        weights: &[Range<usize>],
        l2: f64,
        learning_rate: f64,
    ) -> f64 {
        assert!(
            params.len() == self.len && grads.len() == self.len,
            "{} parameters and {} gradients for an optimizer of {}",
            params.len(),
            grads.len(),
            self.len
        );
        assert!(
            weights.windows(2).all(|pair| pair[0].end <= pair[1].start)
                && weights.iter().all(|range| range.start <= range.end && range.end <= self.len),
            "ranges of weights rise within the parameters"
        );
        self.steps += 1;

        let decay = match self.rule {
            UpdateRule::AdamW { weight_decay, .. } => learning_rate * weight_decay,
            _ => 0.0,
        };
        let shrinkage = Shrinkage { weights, l2: T::of(l2), decay: T::of(decay) };
        let vectors = Vectors { params, grads, state: &mut self.state, squares: &mut self.squares };
        let lr = T::of(learning_rate);
        // The rules. What depends on the step alone is worked out in f64 and rounded once.
        match self.rule {
            UpdateRule::Sgd => vectors.update(shrinkage, |w, g, []| (w - lr * g, [])),
            UpdateRule::Momentum { momentum } => {
                let mu = T::of(momentum);
                vectors.update(shrinkage, |w, g, [v]| {
                    let v = mu * v - lr * g;
                    (w + v, [v])
                })
            }
            UpdateRule::Nesterov { momentum } => {
                let (mu, ahead) = (T::of(momentum), T::of(1.0 + momentum));
                vectors.update(shrinkage, |w, g, [before]| {
                    let v = mu * before - lr * g;
                    (w - mu * before + ahead * v, [v])
                })
            }
            UpdateRule::AdaGrad { epsilon } => {
                let epsilon = T::of(epsilon);
                vectors.update(shrinkage, |w, g, [s]| {
                    let s = s + g * g;
                    (w - lr * g / (s.sqrt() + epsilon), [s])
                })
            }
            UpdateRule::RmsProp { decay, epsilon } => {
                let (keep, take, epsilon) = (T::of(decay), T::of(1.0 - decay), T::of(epsilon));
                vectors.update(shrinkage, |w, g, [s]| {
                    let s = keep * s + take * (g * g);
                    (w - lr * g / (s.sqrt() + epsilon), [s])
                })
            }
            UpdateRule::Adam { beta1, beta2, epsilon } | UpdateRule::AdamW { beta1, beta2, epsilon, .. } => {
                let t = self.steps as f64;
                // lr m' = rate * m and sqrt(v') = sqrt(v) * scale: the corrections cost no division per parameter.
                let rate = T::of(learning_rate / (1.0 - beta1.powf(t)));
                let scale = T::of(1.0 / (1.0 - beta2.powf(t)).sqrt());
                let (keep1, take1, keep2, take2) = (T::of(beta1), T::of(1.0 - beta1), T::of(beta2), T::of(1.0 - beta2));
                let epsilon = T::of(epsilon);
                vectors.update(shrinkage, |w, g, [m, v]| {
                    let m = keep1 * m + take1 * g;
                    let v = keep2 * v + take2 * (g * g);
                    (w - rate * m / (v.sqrt() * scale + epsilon), [m, v])
                })
            }
        }
    }
}

/// Elements that one thread updates at a time. With [`BLOCK`] it orders the sums of squares: results depend on both.
const CHUNK: usize = 16 * 1024;

/// Elements of weights that are squared, then updated while they are still in L1.
const BLOCK: usize = 1024;

/// What applies to weights, but not to biases and scales.
#[derive(Clone, Copy)]
struct Shrinkage<'a, T> {
    weights: &'a [Range<usize>],
    l2: T,
    /// Decoupled decay times learning rate.
    decay: T,
}

/// Everything a step reads and writes.
struct Vectors<'a, T> {
    params: &'a mut [T],
    grads: &'a [T],
    state: &'a mut [Buffer<T>],
    squares: &'a mut [f64],
}

impl<T: Element> Vectors<'_, T> {
    /// Runs `rule` over every parameter: `(w, g, state)` to `(w, state)`. Returns half the sum of squared weights.
    fn update<const S: usize>(
        self,
        shrinkage: Shrinkage<'_, T>,
        rule: impl Fn(T, T, [T; S]) -> (T, [T; S]) + Sync,
    ) -> f64 {
        let mut state = self.state.iter_mut();
        let state = std::array::from_fn(|_| &mut **state.next().expect("as many vectors as the rule has names"));
        Chunks { start: 0, params: self.params, grads: self.grads, state, squares: &mut *self.squares }
            .update(shrinkage, &rule);
        0.5 * self.squares.iter().sum::<f64>()
    }
}

/// Consecutive chunks of the vectors, the first of which begins at element `start`.
struct Chunks<'a, T, const S: usize> {
    start: usize,
    params: &'a mut [T],
    grads: &'a [T],
    state: [&'a mut [T]; S],
    /// One per chunk.
    squares: &'a mut [f64],
}

impl<'a, T: Element, const S: usize> Chunks<'a, T, S> {
    fn update(self, shrinkage: Shrinkage<'_, T>, rule: &(impl Fn(T, T, [T; S]) -> (T, [T; S]) + Sync)) {
        match self.squares {
            [] => {}
            [_] => self.update_one(shrinkage, rule),
            _ => {
                let (left, right) = self.halves();
                rayon::join(|| left.update(shrinkage, rule), || right.update(shrinkage, rule));
            }
        }
    }

    fn halves(self) -> (Self, Self) {
        let chunks = self.squares.len() / 2;
        let middle = chunks * CHUNK;
        let (params, right_params) = self.params.split_at_mut(middle);
        let (grads, right_grads) = self.grads.split_at(middle);
        let (squares, right_squares) = self.squares.split_at_mut(chunks);
        let mut halves = self.state.map(|s| s.split_at_mut(middle));
        let state = halves.each_mut().map(|(left, _)| std::mem::take(left));
        let right_state = halves.map(|(_, right)| right);
        (
            Chunks { start: self.start, params, grads, state, squares },
            Chunks {
                start: self.start + middle,
                params: right_params,
                grads: right_grads,
                state: right_state,
                squares: right_squares,
            },
        )
    }

    fn update_one(mut self, shrinkage: Shrinkage<'_, T>, rule: &impl Fn(T, T, [T; S]) -> (T, [T; S])) {
        let _guard = FlushToZero::on();
        let Shrinkage { weights, l2, decay } = shrinkage;
        let (start, len) = (self.start, self.params.len());
        let (mut done, mut squares) = (0, 0.0);
        let first = weights.partition_point(|range| range.end <= start);
        for range in weights[first..].iter().take_while(|range| range.start < start + len) {
            let (from, to) = (range.start.saturating_sub(start), len.min(range.end - start));
            self.update_span(done..from, T::zero(), T::zero(), rule);
            for block in (from..to).step_by(BLOCK) {
                let block = block..to.min(block + BLOCK);
                squares += sum_of_squares(&self.params[block.clone()]);
                self.update_span(block, l2, decay, rule);
            }
            done = to;
        }
        self.update_span(done..len, T::zero(), T::zero(), rule);
        self.squares[0] = squares;
    }

    fn update_span(&mut self, span: Range<usize>, l2: T, decay: T, rule: &impl Fn(T, T, [T; S]) -> (T, [T; S])) {
        let len = span.len();
        let params = &mut self.params[span.clone()];
        let grads = &self.grads[span.clone()];
        // All of the same length, which the compiler must see to vectorise the loop.
        let state = self.state.each_mut().map(|s| &mut s[span.start..][..len]);
        for i in 0..len {
            let (w, g) = (params[i], grads[i]);
            let before = std::array::from_fn(|s| state[s][i]);
            let (next, after) = rule(w - decay * w, g + l2 * w, before);
            params[i] = next;
            for s in 0..S {
                state[s][i] = after[s];
            }
        }
    }
}

fn sum_of_squares<T: Element>(w: &[T]) -> f64 {
    /// As many sums side by side as the widest registers hold of f32.
    const LANES: usize = 16;
    let mut lanes = [T::zero(); LANES];
    let (groups, rest) = w.as_chunks::<LANES>();
    for group in groups.iter().map(|group| &group[..]).chain([rest]) {
        for (lane, &w) in lanes.iter_mut().zip(group) {
            *lane += w * w;
        }
    }
    lanes.iter().map(|lane| lane.f64()).sum()
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list of one range of weights is meant")]
mod tests {
    use rand::RngExt;

    use super::*;
    use crate::parallel::with_threads;
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

    /// One parameter and one step in f64, as the documentation of [`UpdateRule`] writes it; `g` includes L2.
    fn scalar_step(
        rule: UpdateRule,
        w: f64,
        g: f64,
        state: [f64; 2],
        t: i32,
        lr: f64,
        decayed: bool,
    ) -> (f64, [f64; 2]) {
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
                let w = if decayed { w - lr * weight_decay * w } else { w };
                scalar_step(UpdateRule::Adam { beta1, beta2, epsilon }, w, g, state, t, lr, decayed)
            }
        }
    }

    fn follows_the_formula<T: Element>(tolerance: f64) {
        const C: usize = CHUNK;
        // Weights that end inside a chunk, touch each other, span chunks, end with the vector; whole chunks; nothing.
        let cases: [(usize, &[Range<usize>]); 6] = [
            (2 * C + 100, &[3..17, 32..C - 5, C - 5..C + 3000, C + 5000..2 * C + 100]),
            (2 * C, &[0..C, C..2 * C]),
            (C + 1, &[C..C + 1]),
            (C, &[]),
            (1, &[0..1]),
            (0, &[]),
        ];
        let l2 = 0.1;
        for rule in UpdateRule::ALL {
            for (len, weights) in cases {
                let mut optimizer = Optimizer::<T>::new(rule, len).unwrap();
                let mut params: Vec<T> = uniform(len, 0);
                let mut expected: Vec<f64> = params.iter().map(|w| w.f64()).collect();
                let mut state = vec![[0.0; 2]; len];
                let is_weight: Vec<bool> = (0..len).map(|i| weights.iter().any(|r| r.contains(&i))).collect();
                for t in 1..=4_i32 {
                    let lr = 0.01 / f64::from(t);
                    let grads: Vec<T> = uniform(len, t as u64);
                    let loss = 0.5 * (0..len).filter(|&i| is_weight[i]).map(|i| expected[i].powi(2)).sum::<f64>();
                    for i in 0..len {
                        let g = grads[i].f64() + if is_weight[i] { l2 * expected[i] } else { 0.0 };
                        (expected[i], state[i]) = scalar_step(rule, expected[i], g, state[i], t, lr, is_weight[i]);
                    }
                    let got = optimizer.step(&mut params, &grads, weights, l2, lr);
                    let what = format!("{} in {}, {len} parameters, step {t}", rule.name(), T::NAME);
                    assert!(
                        (got - loss).abs() <= tolerance * loss,
                        "{what}: half the sum of squares {got}, not {loss}"
                    );
                    assert_close(&params, &expected, tolerance, &what);
                    for (k, (name, values)) in optimizer.state().enumerate() {
                        let expected: Vec<f64> = state.iter().map(|s| s[k]).collect();
                        assert_close(values, &expected, tolerance, &format!("{what}, {name}"));
                    }
                }
                assert_eq!(optimizer.steps(), 4);
            }
        }
    }

    #[test]
    fn every_rule_follows_its_formula() {
        follows_the_formula::<f32>(3e-6);
        follows_the_formula::<f64>(1e-13);
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
            let mut optimizer = Optimizer::new(name.parse().unwrap(), 20).unwrap();
            for ((_, values), before) in optimizer.state_mut().zip([linspace(0.6, 0.9), linspace(0.7, 0.5)]) {
                values.copy_from_slice(&before);
            }
            optimizer.set_steps(5);
            let mut w = linspace(-0.4, 0.6);
            optimizer.step(&mut w, &linspace(-0.6, 0.4), &[], 0.0, lr);
            assert_close(&w, &expected, 6e-9, name);
        }
    }

    #[test]
    fn the_same_bits_at_any_number_of_threads() {
        let len = 6 * CHUNK + 77;
        let weights = [16..2 * CHUNK + 100, 3 * CHUNK - 1..len];
        for rule in UpdateRule::ALL {
            let run = |threads| {
                with_threads(threads, || {
                    let mut optimizer = Optimizer::<f32>::new(rule, len).unwrap();
                    let mut params = uniform(len, 0);
                    let losses: Vec<u64> = (1..4)
                        .map(|t| optimizer.step(&mut params, &uniform(len, t), &weights, 0.01, 0.01).to_bits())
                        .collect();
                    (params.into_iter().map(f32::to_bits).collect::<Vec<_>>(), losses)
                })
                .unwrap()
            };
            let one = run(1);
            for threads in [2, 5] {
                assert!(run(threads) == one, "{} with {threads} threads", rule.name());
            }
        }
    }

    /// The gaps between parameters hold zeros for ever, and 0 / 0 is not among them, whatever epsilon was accepted.
    #[test]
    fn gaps_stay_zero() {
        let tiny = f64::from(f32::MIN_POSITIVE);
        let smallest_epsilon = [
            UpdateRule::AdaGrad { epsilon: tiny },
            UpdateRule::RmsProp { decay: 0.99, epsilon: tiny },
            UpdateRule::Adam { beta1: 0.9, beta2: 0.999, epsilon: tiny },
        ];
        let (len, gap) = (CHUNK + 100, CHUNK - 20..CHUNK + 30);
        for rule in UpdateRule::ALL.into_iter().chain(smallest_epsilon) {
            let mut optimizer = Optimizer::<f32>::new(rule, len).unwrap();
            let mut params = uniform(len, 0);
            params[gap.clone()].fill(0.0);
            for t in 1..20 {
                let mut grads = uniform(len, t);
                grads[gap.clone()].fill(0.0);
                optimizer.step(&mut params, &grads, &[0..gap.start, gap.end..len], 0.1, 0.01);
            }
            assert!(params[gap.clone()].iter().all(|&w| w == 0.0), "{}", rule.name());
            assert!(params[..gap.start].iter().all(|&w| w != 0.0 && w.is_finite()), "{}", rule.name());
            for (name, values) in optimizer.state() {
                assert!(values[gap.clone()].iter().all(|&v| v == 0.0), "{}: {name}", rule.name());
            }
        }
    }

    /// Every rule goes downhill: from random points to the minimum of a quadratic bowl ten times as steep one way.
    #[test]
    fn every_rule_finds_the_minimum() {
        let target: Vec<f64> = uniform(64, 9);
        for (name, lr) in [
            ("sgd", 0.1),
            ("momentum", 0.02),
            ("nesterov", 0.02),
            ("adagrad", 0.5),
            ("rmsprop", 0.002),
            ("adam", 0.02),
            ("adamw", 0.02),
        ] {
            let rule: UpdateRule = name.parse().unwrap();
            let mut optimizer = Optimizer::new(rule, 64).unwrap();
            let mut w: Vec<f64> = uniform(64, 8);
            let steep = |i: usize| if i.is_multiple_of(2) { 1.0 } else { 10.0 };
            for _ in 0..1500 {
                let grads: Vec<f64> = (0..64).map(|i| steep(i) * (w[i] - target[i])).collect();
                optimizer.step(&mut w, &grads, &[], 0.0, lr);
            }
            assert_close(&w, &target, 5e-3, name);
        }
    }

    /// What a checkpoint keeps is all that the future depends on.
    #[test]
    fn a_restored_optimizer_goes_on_with_the_same_bits() {
        for rule in UpdateRule::ALL {
            let mut first = Optimizer::<f32>::new(rule, 100).unwrap();
            let mut params = uniform(100, 0);
            for t in 1..4 {
                first.step(&mut params, &uniform(100, t), &[0..50], 0.1, 0.01);
            }
            let rule = serde_json::from_str(&serde_json::to_string(&first.rule()).unwrap()).unwrap();
            let mut second = Optimizer::<f32>::new(rule, 100).unwrap();
            second.set_steps(first.steps());
            for ((to_name, to), (from_name, from)) in second.state_mut().zip(first.state()) {
                assert_eq!(to_name, from_name);
                to.copy_from_slice(from);
            }
            let mut restored = params.clone();
            first.step(&mut params, &uniform(100, 4), &[0..50], 0.1, 0.01);
            second.step(&mut restored, &uniform(100, 4), &[0..50], 0.1, 0.01);
            assert_eq!(params, restored, "{}", rule.name());
        }
    }

    #[test]
    fn wrong_rules_are_errors() {
        let message = "sgdm".parse::<UpdateRule>().unwrap_err().to_string();
        assert!(
            message.contains("`sgdm`") && message.contains("sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw")
        );
        let adam = |beta1, beta2, epsilon| UpdateRule::Adam { beta1, beta2, epsilon };
        for (rule, part) in [
            (UpdateRule::Momentum { momentum: 1.0 }, "1 is not in 0 <= momentum < 1"),
            (UpdateRule::Nesterov { momentum: -0.1 }, "-0.1 is not in"),
            (UpdateRule::RmsProp { decay: f64::NAN, epsilon: 1e-8 }, "NaN is not in 0 <= decay < 1"),
            (UpdateRule::AdaGrad { epsilon: 0.0 }, "epsilon: 0 is not"),
            (adam(1.0, 0.999, 1e-8), "beta1"),
            (adam(0.9, 2.0, 1e-8), "beta2"),
            (adam(0.9, 0.999, 1e-40), "in f32"),
            (UpdateRule::AdamW { beta1: 0.9, beta2: 1.0, epsilon: 1e-8, weight_decay: 0.0 }, "beta2"),
            (UpdateRule::AdamW { beta1: 0.9, beta2: 0.9, epsilon: 1e-8, weight_decay: -1.0 }, "weight_decay: -1"),
        ] {
            let message = Optimizer::<f32>::new(rule, 1).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        assert!(Optimizer::<f64>::new(adam(0.9, 0.999, 1e-40), 1).is_ok(), "1e-40 is a normal number in f64");
    }

    #[test]
    #[should_panic(expected = "ranges of weights rise")]
    fn overlapping_ranges_are_a_bug() {
        Optimizer::<f32>::new(UpdateRule::Sgd, 10).unwrap().step(&mut [0.0; 10], &[0.0; 10], &[0..5, 4..6], 0.0, 0.1);
    }
}
