//! Level 4. The pass over memory: a piece of a parameter with its gradient and what its rule remembers, once.

use super::group::Group;
use super::rule::UpdateRule;
use crate::element::Element;
use crate::simd::vectorized;

/// Elements that one thread updates at a time, about. With [`BLOCK`] it orders the sums of squares: results depend on both.
pub(super) const CHUNK: usize = 16 * 1024;

/// Elements that are squared, then updated while they are still in L1.
const BLOCK: usize = 1024;

/// Vectors that a rule writes at most, beside the parameters.
pub(super) const VECTORS: usize = 2;

/// A group in the step under way: what depends on the step alone is worked out in f64 and rounded once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update<T> {
    formula: Formula<T>,
    /// Factor of all gradients.
    clip: T,
    l2: T,
    half_l2: f64,
    /// Decoupled decay times learning rate.
    decay: T,
}

/// A rule with `S` vectors of its own.
trait Rule<T, const S: usize> {
    /// From a parameter, its gradient and the rule's values for it to the next parameter and values.
    fn next(&self, w: T, g: T, state: [T; S]) -> (T, [T; S]);
}

/// The rules, ready to run; `lr` is the learning rate.
#[derive(Clone, Copy, Debug)]
enum Formula<T> {
    Sgd(Sgd<T>),
    Momentum(Momentum<T>),
    Nesterov(Nesterov<T>),
    AdaGrad(AdaGrad<T>),
    RmsProp(RmsProp<T>),
    Adam(Adam<T>),
    Muon(Muon<T>),
}

#[derive(Clone, Copy, Debug)]
struct Sgd<T> {
    lr: T,
}

impl<T: Element> Rule<T, 0> for Sgd<T> {
    #[inline(always)]
    fn next(&self, w: T, g: T, []: [T; 0]) -> (T, [T; 0]) {
        (w - self.lr * g, [])
    }
}

#[derive(Clone, Copy, Debug)]
struct Momentum<T> {
    mu: T,
    lr: T,
}

impl<T: Element> Rule<T, 1> for Momentum<T> {
    #[inline(always)]
    fn next(&self, w: T, g: T, [v]: [T; 1]) -> (T, [T; 1]) {
        let v = self.mu * v - self.lr * g;
        (w + v, [v])
    }
}

#[derive(Clone, Copy, Debug)]
struct Nesterov<T> {
    mu: T,
    ahead: T,
    lr: T,
}

impl<T: Element> Rule<T, 1> for Nesterov<T> {
    #[inline(always)]
    fn next(&self, w: T, g: T, [before]: [T; 1]) -> (T, [T; 1]) {
        let v = self.mu * before - self.lr * g;
        (w - self.mu * before + self.ahead * v, [v])
    }
}

#[derive(Clone, Copy, Debug)]
struct AdaGrad<T> {
    lr: T,
    epsilon: T,
}

impl<T: Element> Rule<T, 1> for AdaGrad<T> {
    #[inline(always)]
    fn next(&self, w: T, g: T, [s]: [T; 1]) -> (T, [T; 1]) {
        let s = s + g * g;
        (w - self.lr * g / (s.sqrt() + self.epsilon), [s])
    }
}

#[derive(Clone, Copy, Debug)]
struct RmsProp<T> {
    keep: T,
    take: T,
    lr: T,
    epsilon: T,
}

impl<T: Element> Rule<T, 1> for RmsProp<T> {
    #[inline(always)]
    fn next(&self, w: T, g: T, [s]: [T; 1]) -> (T, [T; 1]) {
        let s = self.keep * s + self.take * (g * g);
        (w - self.lr * g / (s.sqrt() + self.epsilon), [s])
    }
}

#[derive(Clone, Copy, Debug)]
struct Adam<T> {
    keep: [T; 2],
    take: [T; 2],
    rate: T,
    scale: T,
    epsilon: T,
}

impl<T: Element> Rule<T, 2> for Adam<T> {
    #[inline(always)]
    fn next(&self, w: T, g: T, [m, v]: [T; 2]) -> (T, [T; 2]) {
        let m = self.keep[0] * m + self.take[0] * g;
        let v = self.keep[1] * v + self.take[1] * (g * g);
        (w - self.rate * m / (v.sqrt() * self.scale + self.epsilon), [m, v])
    }
}

/// Leaves `w` alone and puts the direction of its step into the second vector.
#[derive(Clone, Copy, Debug)]
struct Muon<T> {
    mu: T,
}

impl<T: Element> Rule<T, 2> for Muon<T> {
    #[inline(always)]
    fn next(&self, w: T, g: T, [v, _]: [T; 2]) -> (T, [T; 2]) {
        let v = self.mu * v + g;
        (w, [v, g + self.mu * v])
    }
}

impl<T: Element> Update<T> {
    /// Of step `t`, from 1, at the rate `lr`; gradients are multiplied by `clip`.
    pub(super) fn new(group: &Group, lr: f64, clip: f64, t: u64) -> Self {
        let of = T::of;
        let formula = match group.rule {
            UpdateRule::Sgd => Formula::Sgd(Sgd { lr: of(lr) }),
            UpdateRule::Momentum { momentum } => Formula::Momentum(Momentum { mu: of(momentum), lr: of(lr) }),
            UpdateRule::Nesterov { momentum } => {
                Formula::Nesterov(Nesterov { mu: of(momentum), ahead: of(1.0 + momentum), lr: of(lr) })
            }
            UpdateRule::AdaGrad { epsilon } => Formula::AdaGrad(AdaGrad { lr: of(lr), epsilon: of(epsilon) }),
            UpdateRule::RmsProp { decay, epsilon } => {
                Formula::RmsProp(RmsProp { keep: of(decay), take: of(1.0 - decay), lr: of(lr), epsilon: of(epsilon) })
            }
            UpdateRule::Adam { beta1, beta2, epsilon } | UpdateRule::AdamW { beta1, beta2, epsilon, .. } => {
                let t = t as f64;
                Formula::Adam(Adam {
                    keep: [of(beta1), of(beta2)],
                    take: [of(1.0 - beta1), of(1.0 - beta2)],
                    // lr m' = rate * m and sqrt(v') = sqrt(v) * scale: the corrections cost no division per parameter.
                    rate: of(lr / (1.0 - beta1.powf(t))),
                    scale: of(1.0 / (1.0 - beta2.powf(t)).sqrt()),
                    epsilon: of(epsilon),
                })
            }
            UpdateRule::Muon { momentum, .. } => Formula::Muon(Muon { mu: of(momentum) }),
        };
        // Muon's own decay waits until its parameters have their norm.
        let decay = if group.rule.is_matrix() { 0.0 } else { lr * group.rule.weight_decay() };
        Update { formula, clip: of(clip), l2: of(group.l2), half_l2: 0.5 * group.l2, decay: of(decay) }
    }

    /// Updates parameters `w` by gradients `g`, both of the same length; `state` are the rule's vectors, of that length
    /// where it has them. Returns the loss of `l2` before.
    pub(super) fn update(&self, w: &mut [T], g: &[T], state: [&mut [T]; VECTORS]) -> f64 {
        vectorized!(self.update_with_vectors(w, g, state))
    }

    #[inline(always)]
    fn update_with_vectors(&self, w: &mut [T], g: &[T], [a, b]: [&mut [T]; VECTORS]) -> f64 {
        let mut loss = 0.0;
        for start in (0..w.len()).step_by(BLOCK) {
            let end = w.len().min(start + BLOCK);
            let w = &mut w[start..end];
            if self.half_l2 != 0.0 {
                loss += self.half_l2 * sum_of_squares(w);
            }
            self.apply(w, &g[start..end], [part(a, start, end), part(b, start, end)]);
        }
        loss
    }

    #[inline(always)]
    fn apply(&self, w: &mut [T], g: &[T], [a, b]: [&mut [T]; VECTORS]) {
        match self.formula {
            Formula::Sgd(rule) => self.each(w, g, [], rule),
            Formula::Momentum(rule) => self.each(w, g, [a], rule),
            Formula::Nesterov(rule) => self.each(w, g, [a], rule),
            Formula::AdaGrad(rule) => self.each(w, g, [a], rule),
            Formula::RmsProp(rule) => self.each(w, g, [a], rule),
            Formula::Adam(rule) => self.each(w, g, [a, b], rule),
            Formula::Muon(rule) => self.each(w, g, [a, b], rule),
        }
    }

    /// Runs `rule` over every element, with gradients that are clipped and have that of `l2`.
    #[inline(always)]
    fn each<const S: usize>(&self, w: &mut [T], g: &[T], mut state: [&mut [T]; S], rule: impl Rule<T, S>) {
        let (len, Update { clip, l2, decay, .. }) = (w.len(), *self);
        // All of the same length, which the compiler must see to vectorise the loop.
        let g = &g[..len];
        for vector in &mut state {
            *vector = &mut std::mem::take(vector)[..len];
        }
        for i in 0..len {
            let mut values = [T::zero(); S];
            for s in 0..S {
                values[s] = state[s][i];
            }
            let (next, after) = rule.next(w[i] - decay * w[i], clip * g[i] + l2 * w[i], values);
            w[i] = next;
            for s in 0..S {
                state[s][i] = after[s];
            }
        }
    }
}

/// The elements from `start` to `end`; none of a vector that is not there.
#[inline(always)]
pub(super) fn part<T>(vector: &mut [T], start: usize, end: usize) -> &mut [T] {
    if vector.is_empty() { vector } else { &mut vector[start..end] }
}

/// Sum of the squares of `values`.
pub(super) fn squares<T: Element>(values: &[T]) -> f64 {
    vectorized!({
        let mut sum = 0.0;
        for block in values.chunks(BLOCK) {
            sum += sum_of_squares(block);
        }
        sum
    })
}

/// Sum of the squares of at most [`BLOCK`] elements, in `T` over at most 64 of them, then in `f64`: relative error below
/// 2^-17 in `f32`, typically 1e-7.
#[inline(always)]
fn sum_of_squares<T: Element>(w: &[T]) -> f64 {
    /// As many sums side by side as the widest registers hold of f32.
    const LANES: usize = 16;
    let mut lanes = [T::zero(); LANES];
    let (groups, rest) = w.as_chunks::<LANES>();
    for group in groups {
        for i in 0..LANES {
            lanes[i] += group[i] * group[i];
        }
    }
    for (lane, &w) in lanes.iter_mut().zip(rest) {
        *lane += w * w;
    }
    let mut sum = 0.0;
    for lane in lanes {
        sum += lane.f64();
    }
    // Squares that are too large for f32 have a place in f64.
    if sum.is_finite() { sum } else { w.iter().fold(0.0, |sum, w| sum + w.f64() * w.f64()) }
}
