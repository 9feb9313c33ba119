//! Level 4. A block's backward pass.

use super::block::{Block, BlockState, Head, affine_shape};
use super::parts::{BlockGrads, BlockInput, Pass};
use super::tail::ChannelMap;
use crate::element::Element;
use crate::ops::affine::{AffineGradsMut, affine_backward_into};
use crate::ops::batchnorm::{
    BatchNorm, ChannelGradient, Channels, Norm, NormGradsMut, gradient_sums, gradient_sums_of, inverse_std,
    train_backward_into,
};
use crate::ops::conv::{self, ConvGradsMut, ConvInput, PlaneRows, conv2d_backward_into};
use crate::ops::dropout::{DropoutKey, apply_mask};
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
        if self.fuses(Pass::Train(DropoutKey { seed: 0, step: 0, layer: 0 })) {
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
            let BlockState { y, cell, early_cell, mean, var, maps, .. } = state;
            let BlockGrads { dout, dx, weights } = grads;
            let dy = &mut y[..input.images * self.product_len()];
            let kept = Kept { dout, out, cell, maps };
            let norm = (weights.gamma, weights.beta);
            self.plane_gradients(input, dy, &kept, (mean, var), norm, ws);
            self.head_backward(input, dy, dx, (weights.w, weights.b), early_cell, ws);
        }
    }

    #[track_caller]
    fn assert_grads<T>(&self, input: &BlockInput<'_, T>, out: &[T], grads: &BlockGrads<'_, T>) {
        self.assert_input(input);
        let BlockGrads { dout, dx, weights } = grads;
        let len = input.images * self.output_len();
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

    /// Gradient of [`Block::fused_forward`].
    fn fused_backward<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        out: &[T],
        grads: BlockGrads<'_, T>,
        state: &BlockState<T>,
        ws: &mut Workspace,
    ) {
        let Head::Conv(plan) = &self.head else { unreachable!("only convolutions fuse") };
        let (BlockGrads { dout, dx, weights }, BlockState { cell, maps, .. }) = (grads, state);
        let (dout, band) = (&*dout, self.band().expect("it is finished in bands"));
        let source = |at: PlaneRows, dz: &mut [T]| {
            let plane = (at.image * self.output[0] + at.filter) * self.out_plane();
            let start = plane + at.row / band * self.output[2];
            let here = start..start + dz.len() / self.product[2] / band * self.output[2];
            let cell = if self.tail.keeps_cells() { &cell[here.clone()] } else { &[] };
            vectorized!(self.tail.backward(maps[at.filter], &dout[here.clone()], &out[here], cell, &[], dz));
        };
        let (dw, db) = (Some(weights.w).filter(|dw| !dw.is_empty()), Some(weights.b).filter(|db| !db.is_empty()));
        let BlockInput { images, x, .. } = *input;
        let conv_input = ConvInput { images, x, w: input.weights.w };
        conv::backward(plan, conv_input, source, ConvGradsMut { dx, dw, db }, ws);
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
        let BlockState { dy, cell, mean, var, maps, .. } = state;
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
        self.plane_gradients(input, dx, &kept, (mean, var), (weights.gamma, weights.beta), ws);
    }

    /// Gradient of [`Block::finish`], channel by channel: `y` holds the product and becomes its gradient.
    fn plane_gradients<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        y: &mut [T],
        kept: &Kept<'_, T>,
        (mean, var): (&[T], &[T]),
        (dgamma, dbeta): (&mut [T], &mut [T]),
        ws: &mut Workspace,
    ) {
        let sizes = self.channels(input.images);
        let planes = Planes::new(y, [sizes.images, sizes.channels, sizes.plane]);
        let Some(norm) = self.parts().norm else {
            let (_, scratch) = ws.lend(0, sizes.plane);
            return for_each_share(planes, |c, mut y| {
                scratch.with(|dz: &mut [T]| {
                    vectorized!(for n in 0..y.count() {
                        self.dz(c, n, kept, y.get(n), dz);
                        y.get(n).copy_from_slice(dz);
                    });
                });
            });
        };
        let gamma = input.weights.gamma;
        let gathers = sizes.gathers();
        let (_, scratch) = ws.lend(0, if gathers { 2 * sizes.channel_len() } else { sizes.plane });
        for_each_share((planes, Chunks::new(dgamma, 1), Chunks::new(dbeta, 1)), |c, (mut y, dgamma, dbeta)| {
            let statistics = (mean[c], inverse_std(var[c], norm.eps));
            scratch.with(|dz: &mut [T]| {
                (dgamma[0], dbeta[0]) = vectorized!(if gathers {
                    self.gathered_norm_gradient(sizes, c, kept, statistics, gamma[c], (&mut y, dz))
                } else {
                    self.norm_gradient(sizes, c, kept, statistics, gamma[c], (&mut y, dz))
                });
            });
        });
    }

    /// Gradient of what batchnorm, activation and pool made of plane `n` of channel `c`, before batchnorm's own.
    #[inline(always)]
    fn dz<T: Element>(&self, c: usize, n: usize, kept: &Kept<'_, T>, y: &[T], dz: &mut [T]) {
        let (dout, out, cell) = self.kept_of(c, n, kept);
        self.tail.backward(kept.maps[c], dout, out, cell, y, dz);
    }

    /// dout, out and cells of plane `n` of channel `c`.
    #[inline(always)]
    fn kept_of<'a, T>(&self, c: usize, n: usize, kept: &Kept<'a, T>) -> (&'a [T], &'a [T], &'a [u8]) {
        let start = (n * self.output[0] + c) * self.out_plane();
        let here = start..start + self.out_plane();
        let cell = if self.tail.keeps_cells() { &kept.cell[here.clone()] } else { &[] };
        (&kept.dout[here.clone()], &kept.out[here], cell)
    }

    /// [`Block::norm_gradient`] of small planes; `scratch` has room for two channels.
    #[inline(always)]
    fn gathered_norm_gradient<T: Element>(
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
            let (dout, out, cell) = self.kept_of(c, n, kept);
            self.tail.backward_to_slopes(dout, out, cell, dz);
        }
        self.tail.backward_slopes(kept.maps[c], channel, dz);
        let (total, total_xhat) = gradient_sums_of(dz, channel, mean, inverse_std);
        let gradient = ChannelGradient::new(sizes, mean, inverse_std, gamma, (total, total_xhat));
        for (dz, &y) in dz.iter_mut().zip(&*channel) {
            *dz = gradient.dx(*dz, y);
        }
        for (n, dz) in dz.chunks_exact(sizes.plane).enumerate() {
            y.get(n).copy_from_slice(dz);
        }
        (T::of(total_xhat), T::of(total))
    }

    /// Turns the planes `y` of channel `c` into their gradient through batchnorm; the gradients of gamma and beta.
    #[inline(always)]
    fn norm_gradient<T: Element>(
        &self,
        sizes: Channels,
        c: usize,
        kept: &Kept<'_, T>,
        (mean, inverse_std): (T, T),
        gamma: T,
        (y, dz): (&mut StridedMut<'_, T>, &mut [T]),
    ) -> (T, T) {
        let (mut total, mut total_xhat) = (0.0, 0.0);
        for n in 0..y.count() {
            let y = y.get(n);
            self.dz(c, n, kept, y, dz);
            let sums = gradient_sums(dz, y, mean, inverse_std);
            total += sums.0;
            total_xhat += sums.1;
        }
        let gradient = ChannelGradient::new(sizes, mean, inverse_std, gamma, (total, total_xhat));
        for n in 0..y.count() {
            let y = y.get(n);
            // made again: cheaper than keeping it
            self.dz(c, n, kept, y, dz);
            for (y, &dz) in y.iter_mut().zip(&*dz) {
                *y = gradient.dx(dz, *y);
            }
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
