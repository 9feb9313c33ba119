//! Level 4. Steps that begin before all gradients are there.

use std::sync::Arc;

use super::cut::{Cut, Span};
use super::elementwise::{Update, VECTORS, part};
use super::optimizer::{Optimizer, Stepped, vectors};
use super::schedule::Progress;
use crate::element::Element;
use crate::parallel::{Chunks, Runs};
use crate::params::Params;
use crate::profile::{self, Phase, Work};

/// Values of a parameter from which on it is updated early: below, it and all that belongs to it stay in the cache until
/// its turn comes.
const LEAST: usize = 1 << 19;

/// A step under way: [`Early::rows`] of some parameters, then [`Early::finish`] for all others.
#[derive(Debug)]
pub(crate) struct Early<'a, T: Element> {
    optimizer: &'a mut Optimizer<T>,
    at: Progress,
}

/// A matrix that is shared out by its rows: the values, and what goes with them.
#[derive(Debug)]
pub(crate) struct EarlyRows<'a, T> {
    pub(crate) values: Runs<'a, T>,
    pub(crate) kept: Kept<'a, T>,
    pub(crate) updater: Updater<T>,
}

/// The rule's vectors, and places for the sums of squares.
type Kept<'a, T> = (Runs<'a, T>, Runs<'a, T>, Chunks<'a, f64>);

/// Updates a share of a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Updater<T> {
    update: Update<T>,
    piece: usize,
}

impl<T: Element> Optimizer<T> {
    /// Begins a step for parameters laid out as `params`, unless it wants to see all gradients first, to clip them.
    ///
    /// # Panics
    /// If `params` are not laid out as those of [`Optimizer::new`].
    pub(crate) fn begin_early(&mut self, params: &Params<T>, at: Progress) -> Option<Early<'_, T>> {
        self.assert_fits(params);
        if self.clip_norm.is_some() {
            return None;
        }
        self.begin(at, 1.0);
        Some(Early { optimizer: self, at })
    }
}

impl<T: Element> Early<'_, T> {
    /// The bytes that the rule's vectors take to read and write, if the parameter `index` can be updated by shares of
    /// `rows` of its rows.
    pub(crate) fn takes(&self, index: usize, rows: usize) -> Option<usize> {
        let span = &self.optimizer.cut.spans[self.span(index, rows)?];
        let vectors = self.optimizer.groups()[span.group].rule.vectors();
        Some(2 * vectors * span.range.len() * size_of::<T>())
    }

    /// The number of what is trained of the parameter `index`, if it can be updated by shares of `rows` of its rows.
    fn span(&self, index: usize, rows: usize) -> Option<usize> {
        let Optimizer { cut, params, .. } = &*self.optimizer;
        let [_, cols] = *params[index].shape else { return None };
        let range = &params[index].range;
        let number = cut
            .spans
            .binary_search_by_key(&(range.start, range.end), |span| (span.range.start, span.range.end))
            .ok()?;
        let Span { group, piece, .. } = cut.spans[number];
        let elementwise = !self.optimizer.groups()[group].rule.is_matrix();
        (range.len() >= LEAST && (rows * cols).is_multiple_of(piece) && elementwise).then_some(number)
    }

    /// The parameter `index` by shares of `rows` of its rows, each to be updated once; `None` as [`Early::takes`].
    pub(crate) fn rows<'s>(
        &'s mut self,
        index: usize,
        rows: usize,
        params: &'s mut Params<T>,
    ) -> Option<EarlyRows<'s, T>> {
        let number = self.span(index, rows)?;
        let Optimizer { cut: Cut { spans, pieces }, state, sums, updates, params: known, .. } = &mut *self.optimizer;
        let span = &mut spans[number];
        span.done = true;
        let (ranges, per) = (&pieces[span.pieces.clone()], rows * known[index].shape[1] / span.piece);
        let [a, b] = vectors(state).map(|vector| Runs::new(vector, ranges, per));
        Some(EarlyRows {
            values: Runs::new(params.values_mut(), ranges, per),
            kept: (a, b, Chunks::new(&mut sums[span.pieces.clone()], per)),
            updater: Updater { update: updates[span.group], piece: span.piece },
        })
    }

    /// Updates what is left by the gradients `grads`.
    pub(crate) fn finish(self, params: &mut Params<T>, grads: &Params<T>) -> Stepped {
        let (label, bytes) = (Arc::clone(&self.optimizer.label), self.optimizer.bytes(|span| !span.done));
        let _scope = profile::scope(Phase::Optimizer, || Work { op: &label, flops: 0, bytes });
        Stepped { regularization: self.optimizer.finish(params, grads, self.at), gradient_norm: None }
    }
}

impl<T: Element> Updater<T> {
    /// Updates the values `w` of a share by their gradients `g`; the rest is the share of [`Kept`].
    pub(crate) fn update(&self, w: &mut [T], g: &[T], (a, b, sums): (&mut [T], &mut [T], &mut [f64])) {
        for (i, sum) in sums.iter_mut().enumerate() {
            let (start, end) = (i * self.piece, w.len().min((i + 1) * self.piece));
            let state: [&mut [T]; VECTORS] = [part(a, start, end), part(b, start, end)];
            *sum = self.update.update(&mut w[start..end], &g[start..end], state);
        }
    }
}
