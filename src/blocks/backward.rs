//! Level 4. A block's backward pass.

use std::ops::Range;

use super::block::{Block, BlockState, Head, affine_shape};
use super::parts::{BlockGrads, BlockInput, Pass};
use super::tail::ChannelMap;
use crate::element::Element;
use crate::ops::affine::{AffineGradsMut, affine_backward_into};
use crate::ops::batchnorm::{
    BatchNorm, ChannelGradient, Channels, Norm, NormGradsMut, gradient_sums, gradient_sums_of, inverse_std,
    train_backward_into,
};
use crate::ops::conv::{self, ConvGradsMut, ConvInput, ConvPlan, PlaneRows, conv2d_backward_into};
use crate::ops::dropout::apply_mask;
use crate::ops::pool::max_pool_tiles_backward;
use crate::parallel::{Chunks, Planes, StridedMut, for_each_chunk_mut, for_each_share};
use crate::simd::vectorized;
use crate::workspace::Workspace;

/// What the last forward pass left, to make the gradient of the product from.
struct Kept<'a, T> {
    dout: &'a [T],
    out: &'a [T],
    cell: &'a [u8],
    maps: &'a [ChannelMap<T>],
}

/// What batchnorm's gradient is made from, and the gradients of gamma and beta, of every channel.
type NormSums<'a, T> = (&'a mut [ChannelGradient<T>], &'a mut [T], &'a mut [T]);

/// Channels whose sums one piece makes, at most: neighbours lie side by side in memory, which is read faster in long runs.
const NEIGHBOURS: usize = 8;

/// Pieces that there are at least, where there are as many channels, or images.
pub(super) const PIECES: usize = 32;

/// Gradients of a convolution whose own comes from `source`: of x, if anybody wants it, and of w and b where these are not empty.
pub(super) fn conv_backward<T: Element>(
    plan: &ConvPlan,
    input: &BlockInput<'_, T>,
    source: impl Fn(PlaneRows, &mut [T]) + Sync + Send,
    dx: Option<&mut [T]>,
    (dw, db): (&mut [T], &mut [T]),
    ws: &mut Workspace,
) {
    let BlockInput { images, x, .. } = *input;
    let (dw, db) = (Some(dw).filter(|dw| !dw.is_empty()), Some(db).filter(|db| !db.is_empty()));
    let input = ConvInput { images, x, w: input.weights.w };
    conv::backward(plan, input, source, ConvGradsMut { dx, dw, db }, ws);
}

impl Block {
    /// Gradients of the last training forward pass over `input`, whose output was `out`.
    ///
    /// # Panics
    /// If a slice has not the length of its shape.
    pub fn backward<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        out: &[T],
        mut grads: BlockGrads<'_, T>,
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        self.assert_grads(input, out, &grads);
        if let Some(p) = self.parts().dropout {
            apply_mask(&state.mask[..out.len()], p, grads.dout);
        }
        if self.trains_in_blocks {
            self.backward_in_blocks(input, grads, state, ws);
        } else if self.fuses_backward() {
            self.fused_backward(input, out, grads, state, ws);
        } else if self.is_flat() {
            self.flat_gradient(input, out, &mut grads, state);
            let BlockGrads { dout, dx, weights } = grads;
            match (&self.head, dx) {
                (Head::None, Some(dx)) => dx.copy_from_slice(dout),
                (Head::None, None) => {}
                (_, dx) => self.head_backward(input, dout, dx, (weights.w, weights.b), &state.early_cell, ws),
            }
        } else if matches!(self.head, Head::None) {
            self.gradient_without_product(input, out, grads, state, ws);
        } else {
            let BlockState { y, cell, early_cell, mean, var, maps, norms, .. } = state;
            let BlockGrads { dout, dx, weights } = grads;
            let dy = &mut y[..input.images * self.product_len()];
            let kept = Kept { dout, out, cell, maps };
            self.plane_gradients(input, dy, &kept, (mean, var), (norms, weights.gamma, weights.beta), ws);
            self.head_backward(input, dy, dx, (weights.w, weights.b), early_cell, ws);
        }
    }

    #[track_caller]
    fn assert_grads<T>(&self, input: &BlockInput<'_, T>, out: &[T], grads: &BlockGrads<'_, T>) {
        let [in_len, out_len] = self.lens(Pass::TRAIN);
        self.assert_input(input, in_len);
        let BlockGrads { dout, dx, weights } = grads;
        let len = input.images * out_len;
        assert_eq!([dout.len(), out.len()], [len; 2], "dout and out hold {} images of {:?}", input.images, self.output);
        assert!(dx.as_ref().is_none_or(|dx| dx.len() == input.x.len()), "dx has the length of x");
        let got = [&weights.w, &weights.b, &weights.gamma, &weights.beta].map(|grad| grad.len());
        let [w, b, gamma, beta] = self.weight_lens();
        let fits = [(got[0], w), (got[1], b)].iter().all(|&(got, len)| got == len || got == 0);
        assert!(fits && got[2..] == [gamma, beta], "lengths of dw, db, dgamma, dbeta: {got:?}");
    }

    /// Gradients of the product's inputs from its own, `dy` (after the early pool).
    fn head_backward<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        dy: &[T],
        dx: Option<&mut [T]>,
        (dw, db): (&mut [T], &mut [T]),
        early_cell: &[u8],
        ws: &mut Workspace,
    ) {
        let (dw, db) = (Some(dw).filter(|dw| !dw.is_empty()), Some(db).filter(|db| !db.is_empty()));
        let BlockInput { images, x, .. } = *input;
        let w = input.weights.w;
        match (&self.head, &self.early) {
            (Head::None, _) => {}
            (Head::Conv(plan), None) => {
                conv2d_backward_into(plan, dy, ConvInput { images, x, w }, ConvGradsMut { dx, dw, db }, ws);
            }
            (Head::Conv(plan), Some(pool)) => {
                let (window, cols) = ((pool.rows.window, pool.cols.window), pool.cols.input);
                let source = |at: PlaneRows, dz: &mut [T]| {
                    let len = dz.len() / cols / window.0 * self.product[2];
                    let start = self.product_start(at) + at.row / window.0 * self.product[2];
                    let (dy, cell) = (&dy[start..][..len], &early_cell[start..][..len]);
                    vectorized!(max_pool_tiles_backward(window, cols, dy, cell, dz));
                };
                conv::backward(plan, ConvInput { images, x, w }, source, ConvGradsMut { dx, dw, db }, ws);
            }
            (&Head::Affine { inputs, outputs }, _) => {
                let shape = affine_shape(images, inputs, outputs);
                affine_backward_into(&shape, dy, x, w, AffineGradsMut { dx, dw, db }, ws);
            }
        }
    }

    /// Where a plane begins in the product (after the early pool).
    fn product_start(&self, at: PlaneRows) -> usize {
        let [channels, rows, cols] = self.product;
        (at.image * channels + at.filter) * rows * cols
    }

    /// Whether the gradient of the product is made as the convolution's backward pass asks for it, rows of a plane at a time, so
    /// that it never lies in memory. Batchnorm's takes two sums over each channel before; small planes have theirs by channels.
    fn fuses_backward(&self) -> bool {
        let norm = self.parts().norm.is_some() && self.early.is_none() && !self.channels(1).gathers();
        let convolution = matches!(self.head, Head::Conv(_)) && self.band().is_some();
        convolution && norm || self.fuses(Pass::TRAIN)
    }

    /// Gradient of a convolution and all that follows it, where [`Block::fuses_backward`].
    fn fused_backward<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        out: &[T],
        grads: BlockGrads<'_, T>,
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let Head::Conv(plan) = &self.head else { unreachable!("only convolutions fuse") };
        let BlockState { y, cell, mean, var, maps, norms, .. } = state;
        let (BlockGrads { dout, dx, weights }, band) = (grads, self.band().expect("it is finished in bands"));
        let kept = Kept { dout, out, cell, maps };
        if self.parts().norm.is_some() {
            self.norm_sums(input, y, &kept, (mean, var), (norms, weights.gamma, weights.beta), ws);
        }
        let source = |at: PlaneRows, dz: &mut [T]| {
            let start = self.out_rows(at.image, at.filter).start + at.row / band * self.output[2];
            let rows = start..start + dz.len() / self.product[2] / band * self.output[2];
            let norm = norms.get(at.filter);
            let first = self.product_start(at) + at.row * self.product[2];
            let y = if norm.is_some() { &y[first..first + dz.len()] } else { &[] };
            vectorized!(self.product_gradient(at.filter, rows, &kept, norm, y, dz));
        };
        conv_backward(plan, input, source, dx, (weights.w, weights.b), ws);
    }

    /// Backward of a block without product: x is what is normalised, and dx its gradient.
    fn gradient_without_product<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        out: &[T],
        grads: BlockGrads<'_, T>,
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let BlockState { dy, cell, mean, var, maps, norms, .. } = state;
        let BlockGrads { dout, dx, weights } = grads;
        // without dx, gamma and beta may still want theirs
        let dx = match dx {
            Some(dx) => dx,
            None => {
                dy.reserve(input.x.len());
                &mut dy[..input.x.len()]
            }
        };
        dx.copy_from_slice(input.x);
        let kept = Kept { dout, out, cell, maps };
        self.plane_gradients(input, dx, &kept, (mean, var), (norms, weights.gamma, weights.beta), ws);
    }

    /// Gradient of [`Block::finish`], channel by channel: `y` holds the product and becomes its gradient.
    fn plane_gradients<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        y: &mut [T],
        kept: &Kept<'_, T>,
        statistics: (&[T], &[T]),
        norm: NormSums<'_, T>,
        ws: &mut Workspace,
    ) {
        let sizes = self.channels(input.images);
        let (norms, dgamma, dbeta) = norm;
        if self.parts().norm.is_some() && sizes.gathers() {
            return self.gathered_gradients(input, y, kept, statistics, (dgamma, dbeta), ws);
        }
        if self.parts().norm.is_some() {
            self.norm_sums(input, y, kept, statistics, (&mut *norms, dgamma, dbeta), ws);
        }
        let (planes, norms) = (Planes::new(y, [sizes.images, sizes.channels, sizes.plane]), &*norms);
        let (_, scratch) = ws.lend(0, sizes.plane);
        for_each_share(planes, |c, mut y| {
            scratch.with(|dz: &mut [T]| {
                vectorized!(for n in 0..y.count() {
                    let y = y.get(n);
                    self.product_gradient(c, self.out_rows(n, c), kept, norms.get(c), y, dz);
                    y.copy_from_slice(dz);
                });
            });
        });
    }

    /// What batchnorm's gradient has to know of every channel of the product `y`; with it, the gradients of gamma and beta.
    fn norm_sums<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        y: &[T],
        kept: &Kept<'_, T>,
        (mean, var): (&[T], &[T]),
        (norms, dgamma, dbeta): NormSums<'_, T>,
        ws: &mut Workspace,
    ) {
        let (sizes, eps) = (self.channels(input.images), self.parts().norm.expect("there is batchnorm").eps);
        let (_, scratch) = ws.lend(0, sizes.plane);
        let together = (sizes.channels / PIECES).clamp(1, NEIGHBOURS);
        let shares = (Chunks::new(norms, together), Chunks::new(dgamma, together), Chunks::new(dbeta, together));
        for_each_share(shares, |piece, (norms, dgamma, dbeta)| {
            let (first, count) = (piece * together, norms.len());
            let mut inverse = [T::zero(); NEIGHBOURS];
            for (inverse, &var) in inverse.iter_mut().zip(&var[first..first + count]) {
                *inverse = inverse_std(var, eps);
            }
            let mut sums = [(0.0, 0.0); NEIGHBOURS];
            scratch.with(|dz: &mut [T]| {
                vectorized!(for n in 0..sizes.images {
                    for (i, sums) in sums.iter_mut().enumerate().take(count) {
                        let c = first + i;
                        let y = &y[sizes.plane_of(n, c)];
                        self.product_gradient(c, self.out_rows(n, c), kept, None, y, dz);
                        let plane = gradient_sums(dz, y, mean[c], inverse[i]);
                        *sums = (sums.0 + plane.0, sums.1 + plane.1);
                    }
                });
            });
            for (i, &(total, total_xhat)) in sums.iter().enumerate().take(count) {
                let (c, sums) = (first + i, (total, total_xhat));
                norms[i] = ChannelGradient::new(sizes, mean[c], inverse[i], input.weights.gamma[c], sums);
                (dgamma[i], dbeta[i]) = (T::of(total_xhat), T::of(total));
            }
        });
    }

    /// Sets `dz` to the gradient of the product `y` of channel `c`, a plane or some rows of one, whose output is at `rows`: through
    /// batchnorm if `norm` is given, else of what batchnorm made of it.
    #[inline(always)]
    fn product_gradient<T: Element>(
        &self,
        c: usize,
        rows: Range<usize>,
        kept: &Kept<'_, T>,
        norm: Option<&ChannelGradient<T>>,
        y: &[T],
        dz: &mut [T],
    ) {
        let (dout, out, cell) = self.kept_of(rows, kept);
        self.tail.backward(kept.maps[c], dout, out, cell, y, dz);
        if let Some(norm) = norm {
            norm.apply(dz, y);
        }
    }

    /// dout, out and cells of these rows.
    #[inline(always)]
    fn kept_of<'a, T>(&self, rows: Range<usize>, kept: &Kept<'a, T>) -> (&'a [T], &'a [T], &'a [u8]) {
        let cell = if self.tail.keeps_cells() { &kept.cell[rows.clone()] } else { &[] };
        (&kept.dout[rows.clone()], &kept.out[rows], cell)
    }

    /// Where plane `n` of channel `c` lies in the output.
    #[inline(always)]
    fn out_rows(&self, n: usize, c: usize) -> Range<usize> {
        let start = (n * self.output[0] + c) * self.out_plane();
        start..start + self.out_plane()
    }

    /// [`Block::plane_gradients`] through batchnorm of small planes, channel by channel.
    fn gathered_gradients<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        y: &mut [T],
        kept: &Kept<'_, T>,
        (mean, var): (&[T], &[T]),
        (dgamma, dbeta): (&mut [T], &mut [T]),
        ws: &mut Workspace,
    ) {
        let (sizes, eps) = (self.channels(input.images), self.parts().norm.expect("there is batchnorm").eps);
        let planes = Planes::new(y, [sizes.images, sizes.channels, sizes.plane]);
        let (_, scratch) = ws.lend(0, 2 * sizes.channel_len());
        for_each_share((planes, Chunks::new(dgamma, 1), Chunks::new(dbeta, 1)), |c, (mut y, dgamma, dbeta)| {
            let (statistics, gamma) = ((mean[c], inverse_std(var[c], eps)), input.weights.gamma[c]);
            scratch.with(|scratch: &mut [T]| {
                (dgamma[0], dbeta[0]) =
                    vectorized!(self.gathered_gradient(sizes, c, kept, statistics, gamma, (&mut y, scratch)));
            });
        });
    }

    /// Turns the planes `y` of channel `c` into their gradient through batchnorm; the gradients of gamma and beta. `scratch` has
    /// room for two channels.
    #[inline(always)]
    fn gathered_gradient<T: Element>(
        &self,
        sizes: Channels,
        c: usize,
        kept: &Kept<'_, T>,
        (mean, inverse_std): (T, T),
        gamma: T,
        (y, scratch): (&mut StridedMut<'_, T>, &mut [T]),
    ) -> (T, T) {
        let (channel, dz) = scratch.split_at_mut(sizes.channel_len());
        for (n, (channel, dz)) in
            channel.chunks_exact_mut(sizes.plane).zip(dz.chunks_exact_mut(sizes.plane)).enumerate()
        {
            channel.copy_from_slice(y.get(n));
            let (dout, out, cell) = self.kept_of(self.out_rows(n, c), kept);
            self.tail.backward_to_slopes(dout, out, cell, dz);
        }
        self.tail.backward_slopes(kept.maps[c], channel, dz);
        let (total, total_xhat) = gradient_sums_of(dz, channel, mean, inverse_std);
        let gradient = ChannelGradient::new(sizes, mean, inverse_std, gamma, (total, total_xhat));
        gradient.apply(dz, channel);
        for (n, dz) in dz.chunks_exact(sizes.plane).enumerate() {
            y.get(n).copy_from_slice(dz);
        }
        (T::of(total_xhat), T::of(total))
    }

    /// Gradient of [`Block::finish_flat`]: `dout` becomes the gradient of the product.
    fn flat_gradient<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        out: &[T],
        grads: &mut BlockGrads<'_, T>,
        state: &mut BlockState<T>,
    ) {
        let BlockState { y, dy, mean, var, maps, .. } = state;
        let (sizes, dout) = (self.channels(input.images), &mut *grads.dout);
        let y = if matches!(self.head, Head::None) { input.x } else { &y[..dout.len()] };
        if self.tail.activation().is_some() {
            for_each_chunk_mut(dout, sizes.channels, |n, dout| {
                let row = n * sizes.channels..(n + 1) * sizes.channels;
                let values = out[row.clone()].iter().zip(&y[row]).zip(&*maps);
                vectorized!(for (dout, ((&out, &y), &map)) in dout.iter_mut().zip(values) {
                    *dout *= self.tail.slope_of(map, y, out);
                });
            });
        }
        if let Some(BatchNorm { eps, .. }) = self.parts().norm {
            dy.reserve(dout.len());
            let norm = Norm { gamma: input.weights.gamma, eps, mean, var };
            let (dgamma, dbeta) = (&mut *grads.weights.gamma, &mut *grads.weights.beta);
            train_backward_into(sizes, dout, y, norm, NormGradsMut { dx: &mut dy[..dout.len()], dgamma, dbeta });
            dout.copy_from_slice(&dy[..dout.len()]);
        }
    }
}
