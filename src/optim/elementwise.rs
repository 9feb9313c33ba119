//! Level 5. The pass over memory: every parameter with its gradient and what its rule remembers, once.

use std::ops::Range;

use super::group::Group;
use super::rule::UpdateRule;
use crate::element::Element;
use crate::simd::vectorized;

/// Elements that one thread updates at a time. With [`BLOCK`] it orders the sums of squares: results depend on both.
pub(super) const CHUNK: usize = 16 * 1024;

/// Elements that are squared, then updated while they are still in L1.
const BLOCK: usize = 1024;

/// Vectors that a rule writes at most, beside the parameters.
pub(super) const VECTORS: usize = 2;

/// Consecutive parameters' elements that one group updates.
#[derive(Clone, Debug)]
pub(super) struct Span {
    pub(super) range: Range<usize>,
    pub(super) group: usize,
}

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

/// The rules; `lr` is the learning rate.
#[derive(Clone, Copy, Debug)]
enum Formula<T> {
    Sgd { lr: T },
    Momentum { mu: T, lr: T },
    Nesterov { mu: T, ahead: T, lr: T },
    AdaGrad { lr: T, epsilon: T },
    RmsProp { keep: T, take: T, lr: T, epsilon: T },
    Adam { keep: [T; 2], take: [T; 2], rate: T, scale: T, epsilon: T },
    Muon { mu: T },
}

impl<T: Element> Update<T> {
    /// Of step `t`, from 1, at the rate `lr`; gradients are multiplied by `clip`.
    pub(super) fn new(group: &Group, lr: f64, clip: f64, t: u64) -> Self {
        let of = T::of;
        let formula = match group.rule {
            UpdateRule::Sgd => Formula::Sgd { lr: of(lr) },
            UpdateRule::Momentum { momentum } => Formula::Momentum { mu: of(momentum), lr: of(lr) },
            UpdateRule::Nesterov { momentum } => {
                Formula::Nesterov { mu: of(momentum), ahead: of(1.0 + momentum), lr: of(lr) }
            }
            UpdateRule::AdaGrad { epsilon } => Formula::AdaGrad { lr: of(lr), epsilon: of(epsilon) },
            UpdateRule::RmsProp { decay, epsilon } => {
                Formula::RmsProp { keep: of(decay), take: of(1.0 - decay), lr: of(lr), epsilon: of(epsilon) }
            }
            UpdateRule::Adam { beta1, beta2, epsilon } | UpdateRule::AdamW { beta1, beta2, epsilon, .. } => {
                let t = t as f64;
                Formula::Adam {
                    keep: [of(beta1), of(beta2)],
                    take: [of(1.0 - beta1), of(1.0 - beta2)],
                    // lr m' = rate * m and sqrt(v') = sqrt(v) * scale: the corrections cost no division per parameter.
                    rate: of(lr / (1.0 - beta1.powf(t))),
                    scale: of(1.0 / (1.0 - beta2.powf(t)).sqrt()),
                    epsilon: of(epsilon),
                }
            }
            UpdateRule::Muon { momentum, .. } => Formula::Muon { mu: of(momentum) },
        };
        // Muon's own decay waits until its parameters have their norm.
        let decay = if group.rule.is_matrix() { 0.0 } else { lr * group.rule.weight_decay() };
        Update { formula, clip: of(clip), l2: of(group.l2), half_l2: 0.5 * group.l2, decay: of(decay) }
    }

    /// Updates parameters `w` by gradients `g`, both of the same length; `a` and `b` are the rule's vectors, of that
    /// length where it has them. Muon leaves `w` alone and puts the direction of its step into `b`.
    #[inline(always)]
    fn apply(&self, w: &mut [T], g: &[T], [a, b]: [&mut [T]; VECTORS]) {
        match self.formula {
            Formula::Sgd { lr } => self.each(
                w,
                g,
                [],
                #[inline(always)]
                |w, g, []| (w - lr * g, []),
            ),
            Formula::Momentum { mu, lr } => self.each(
                w,
                g,
                [a],
                #[inline(always)]
                |w, g, [v]| {
                    let v = mu * v - lr * g;
                    (w + v, [v])
                },
            ),
            Formula::Nesterov { mu, ahead, lr } => self.each(
                w,
                g,
                [a],
                #[inline(always)]
                |w, g, [before]| {
                    let v = mu * before - lr * g;
                    (w - mu * before + ahead * v, [v])
                },
            ),
            Formula::AdaGrad { lr, epsilon } => self.each(
                w,
                g,
                [a],
                #[inline(always)]
                |w, g, [s]| {
                    let s = s + g * g;
                    (w - lr * g / (s.sqrt() + epsilon), [s])
                },
            ),
            Formula::RmsProp { keep, take, lr, epsilon } => self.each(
                w,
                g,
                [a],
                #[inline(always)]
                |w, g, [s]| {
                    let s = keep * s + take * (g * g);
                    (w - lr * g / (s.sqrt() + epsilon), [s])
                },
            ),
            Formula::Adam { keep, take, rate, scale, epsilon } => self.each(
                w,
                g,
                [a, b],
                #[inline(always)]
                |w, g, [m, v]| {
                    let m = keep[0] * m + take[0] * g;
                    let v = keep[1] * v + take[1] * (g * g);
                    (w - rate * m / (v.sqrt() * scale + epsilon), [m, v])
                },
            ),
            Formula::Muon { mu } => self.each(
                w,
                g,
                [a, b],
                #[inline(always)]
                |w, g, [v, _]| {
                    let v = mu * v + g;
                    (w, [v, g + mu * v])
                },
            ),
        }
    }

    /// Runs `rule`, `(w, g, state)` to `(w, state)`, over every element; `g` has been clipped and has the gradient of `l2`.
    #[inline(always)]
    fn each<const S: usize>(
        &self,
        w: &mut [T],
        g: &[T],
        mut state: [&mut [T]; S],
        rule: impl Fn(T, T, [T; S]) -> (T, [T; S]),
    ) {
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
            let (next, after) = rule(w[i] - decay * w[i], clip * g[i] + l2 * w[i], values);
            w[i] = next;
            for s in 0..S {
                state[s][i] = after[s];
            }
        }
    }
}

/// A chunk of the vectors that begins at element `start` of each. Vectors that no rule has are empty.
pub(super) struct Chunk<'a, T> {
    pub(super) start: usize,
    pub(super) params: &'a mut [T],
    pub(super) grads: &'a [T],
    pub(super) state: [&'a mut [T]; VECTORS],
}

impl<T: Element> Chunk<'_, T> {
    /// Updates what `spans` have of this chunk. Returns their loss of `l2` before.
    pub(super) fn update(mut self, spans: &[Span], updates: &[Update<T>]) -> f64 {
        vectorized!(self.update_with_vectors(spans, updates))
    }

    #[inline(always)]
    fn update_with_vectors(&mut self, spans: &[Span], updates: &[Update<T>]) -> f64 {
        let mut loss = 0.0;
        for (range, group) in within(spans, self.start, self.params.len()) {
            let update = &updates[group];
            for from in range.clone().step_by(BLOCK) {
                let block = from..range.end.min(from + BLOCK);
                let params = &mut self.params[block.clone()];
                if update.half_l2 != 0.0 {
                    loss += update.half_l2 * sum_of_squares(params);
                }
                let [a, b] = &mut self.state;
                let [a, b] = [part(a, &block), part(b, &block)];
                update.apply(params, &self.grads[block], [a, b]);
            }
        }
        loss
    }
}

/// The elements `block`; none of a vector that is not there.
#[inline(always)]
fn part<'a, T>(vector: &'a mut [T], block: &Range<usize>) -> &'a mut [T] {
    if vector.is_empty() { vector } else { &mut vector[block.clone()] }
}

/// Of spans in rising order, what lies in the chunk of `len` elements from `start` on, counted from there; and its group.
#[inline(always)]
fn within(spans: &[Span], start: usize, len: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
    let first = spans.partition_point(
        #[inline(always)]
        |span| span.range.end <= start,
    );
    let end = start + len;
    spans[first..]
        .iter()
        .take_while(
            #[inline(always)]
            move |span| span.range.start < end,
        )
        .map(
            #[inline(always)]
            move |span| (span.range.start.saturating_sub(start)..len.min(span.range.end - start), span.group),
        )
}

/// Sum of the squares of what `spans` have of the chunk `values`, which begins at element `start`.
pub(super) fn squares_within<T: Element>(values: &[T], start: usize, spans: &[Span]) -> f64 {
    vectorized!({
        let mut sum = 0.0;
        for (range, _) in within(spans, start, values.len()) {
            for block in values[range].chunks(BLOCK) {
                sum += sum_of_squares(block);
            }
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
