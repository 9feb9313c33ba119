//! Level 4. Training a convolution and batchnorm over small planes, with the product in blocks of channels: a pixel is a vector of
//! [`LANES`] of them.
//!
//! Batchnorm's passes are over channels. Where planes are small, the planes of a channel are many short runs far apart, in loops that
//! begin and end more than they run. In blocks the same passes work on whole vectors that lie one after the other; Winograd's
//! transforms make and take pixels in this form without putting planes together. Input and output of the block lie as its neighbours
//! in the network want them ([`Block::set_training_formats`]).
//!
//! Sums over a channel are made of those of slots of [`SLOT_IMAGES`] images, added up in f64 in their order: the same bits at any
//! number of threads.

use std::ops::Range;

use super::block::{Block, BlockState, Head, filters};
use super::parts::{BlockGrads, BlockInput};
use super::tail::ChannelMap;
use crate::element::{Element, Kind};
use crate::ops::batchnorm::{BlockGradient, ChannelGradient, gradient_sums_of_block, inverse_std, moments_of_blocks};
use crate::ops::conv::{self, ConvGradsMut, ConvInput, ConvPlan, Outputs, PlaneRows};
use crate::ops::layout::{Formats, MemoryFormat};
use crate::ops::pool::{max_pool_block_backward, max_pool_block_with_cells};
use crate::parallel::{Chunks, Even, Grid, for_each_share, piece_range};
use crate::simd::{LANES, Lanes, lanes_to_planes, planes_to_lanes, vectorized};
use crate::workspace::Workspace;

/// Images whose sums over a block of channels are one piece of work.
const SLOT_IMAGES: usize = 16;

/// Images that are normalised in one piece of work.
const PIECE_IMAGES: usize = 4;

/// An array `[N, C / 16, pixels, 16]`.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    images: usize,
    blocks: usize,
    pixels: usize,
}

impl Sizes {
    fn slots(self) -> usize {
        self.images.div_ceil(SLOT_IMAGES)
    }

    fn images_of(self, slot: usize) -> Range<usize> {
        slot * SLOT_IMAGES..((slot + 1) * SLOT_IMAGES).min(self.images)
    }

    /// Elements of a block of an image.
    fn block(self) -> usize {
        self.pixels * LANES
    }

    /// Elements of an image.
    fn image(self) -> usize {
        self.blocks * self.block()
    }

    /// Block `block` of image `image`.
    #[inline(always)]
    fn at(self, image: usize, block: usize) -> Range<usize> {
        let start = image * self.image() + block * self.block();
        start..start + self.block()
    }
}

/// The first channel of a block, and those after it.
fn channels(block: usize) -> Range<usize> {
    block * LANES..(block + 1) * LANES
}

impl Block {
    /// Whether it trains with its product in blocks of channels: a convolution by Winograd's algorithm, followed by batchnorm
    /// over small planes.
    pub(super) fn may_train_in_blocks<T: Element>(&self) -> bool {
        let Head::Conv(plan) = &self.head else { return false };
        let normalised = self.parts().norm.is_some() && self.channels(1).gathers() && self.parts().dropout.is_none();
        T::KIND == Kind::F32 && normalised && plan.gradients_may_be_blocked() && plan.may_be_blocked()[1]
    }

    /// Whether its input, and whether its output, may lie in blocks of channels in training.
    pub(crate) fn may_train_from_blocks(&self) -> [bool; 2] {
        match (self.head, self.training) {
            (Head::Conv(plan), Some(_)) => [plan.may_be_blocked()[0], true],
            _ => [false; 2],
        }
    }

    /// Has it take its input and make its output in these formats in training, where [`Block::may_train_from_blocks`].
    pub(crate) fn set_training_formats(&mut self, formats: Formats) {
        if let Some(training) = &mut self.training {
            *training = formats;
        }
    }

    /// The plan of its convolution, in training.
    fn training_plan(&self, formats: Formats) -> ConvPlan {
        let Head::Conv(plan) = &self.head else { unreachable!("only convolutions train in blocks") };
        plan.with_formats(Formats { output: MemoryFormat::Blocked, ..formats })
    }

    /// Product and output, as they lie in blocks.
    fn sizes_in_blocks(&self, images: usize) -> [Sizes; 2] {
        let [channels, rows, cols] = self.product;
        [rows * cols, self.out_plane()].map(|pixels| Sizes { images, blocks: channels / LANES, pixels })
    }

    /// [`Block::forward`] in training, where the product lies in blocks.
    pub(super) fn forward_in_blocks<T: Element>(
        &self,
        formats: Formats,
        input: &BlockInput<'_, T>,
        out: &mut [T],
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let [sizes, out_sizes] = self.sizes_in_blocks(input.images);
        self.product_in_blocks(&self.training_plan(formats), input, state, ws);
        self.statistics_of_blocks(sizes, input, state);
        let BlockState { y, cell, maps, .. } = state;
        let (y, maps, pieces) = (&y[..input.images * sizes.image()], &*maps, input.images.div_ceil(PIECE_IMAGES));
        let cells = if self.tail.keeps_cells() { input.images } else { 0 };
        let shares =
            (Even::new(out, input.images, pieces), Even::new(&mut cell[..cells * out_sizes.image()], cells, pieces));
        let (_, scratch) = ws.lend(0, sizes.block() + out_sizes.block());
        for_each_share(shares, |piece, (out, cell)| {
            scratch.with(|scratch: &mut [T]| {
                let (z, pooled) = scratch.split_at_mut(sizes.block());
                for (i, image) in piece_range(input.images, pieces, piece).enumerate() {
                    for block in 0..sizes.blocks {
                        let within = out_sizes.at(i, block);
                        z.copy_from_slice(&y[sizes.at(image, block)]);
                        self.tail.before_pool_block(&maps[channels(block)], z);
                        let cell = if cells > 0 { &mut cell[within.clone()] } else { &mut [][..] };
                        if formats.output == MemoryFormat::Blocked {
                            self.tail.pool_block_with_cells(z, &mut out[within], cell);
                        } else {
                            self.tail.pool_block_with_cells(z, pooled, cell);
                            lanes_to_planes(pooled.as_chunks().0, LANES, &mut out[within], out_sizes.pixels);
                        }
                    }
                }
            });
        });
    }

    /// The product, after the early pool, into `state.y`.
    fn product_in_blocks<T: Element>(
        &self,
        plan: &ConvPlan,
        input: &BlockInput<'_, T>,
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let len = input.images * self.product_len();
        let BlockState { y, early_cell, .. } = state;
        let [_, rows, cols] = self.product.map(|len| len * LANES);
        let outputs = Outputs {
            out: &mut y[..len],
            cells: &mut early_cell[..if self.early.is_some() { len } else { 0 }],
            out_plane: rows / LANES * cols,
            out_cols: cols,
            band: self.early.map_or(1, |pool| pool.rows.window),
            side_by_side: LANES,
        };
        let finish = |_, product: &mut [T], out: &mut [T], cell: &mut [u8]| match &self.early {
            None => out.copy_from_slice(product),
            Some(pool) => {
                let (out, cell) = (out.as_chunks_mut().0, cell.as_chunks_mut().0);
                vectorized!(max_pool_block_with_cells(pool, product.as_chunks().0, out, cell));
            }
        };
        conv::forward(plan, input.images, input.x, filters(input), outputs, finish, ws);
    }

    /// Mean, variance and map of every channel of the product.
    fn statistics_of_blocks<T: Element>(&self, sizes: Sizes, input: &BlockInput<'_, T>, state: &mut BlockState<T>) {
        let BlockState { y, mean, var, maps, sums, .. } = state;
        let norm = self.parts().norm.expect("it trains in blocks");
        sums.resize(sizes.slots() * sizes.blocks, [[0.0; LANES]; 2]);
        for_each_share(Chunks::new(sums, 1), |piece, sums| {
            let (slot, block) = (piece / sizes.blocks, piece % sizes.blocks);
            let of_image = |image: usize| y[sizes.at(image, block)].as_chunks().0;
            sums[0] = vectorized!(moments_of_blocks(sizes.images_of(slot), sizes.pixels, of_image));
        });
        let count = |slot: usize| (sizes.images_of(slot).len() * sizes.pixels) as f64;
        let all = (sizes.images * sizes.pixels) as f64;
        for c in 0..self.product[0] {
            let of_slot = |slot: usize| sums[slot * sizes.blocks + c / LANES].map(|lanes| lanes[c % LANES]);
            let total: f64 = (0..sizes.slots()).map(|slot| count(slot) * of_slot(slot)[0]).sum();
            // Squares round the means of slots, and those of the means (Chan, Golub & LeVeque 1979).
            let squares = |slot: usize| {
                let [mean, squares] = of_slot(slot);
                squares + count(slot) * (mean - total / all).powi(2)
            };
            (mean[c], var[c]) = (T::of(total / all), T::of((0..sizes.slots()).map(squares).sum::<f64>() / all));
            let (gamma, beta) = (input.weights.gamma[c], input.weights.beta[c]);
            maps[c] = ChannelMap::batchnorm(mean[c], var[c], gamma, beta, norm.eps);
        }
    }

    /// [`Block::backward`] after [`Block::forward_in_blocks`].
    pub(super) fn backward_in_blocks<T: Element>(
        &self,
        formats: Formats,
        input: &BlockInput<'_, T>,
        grads: BlockGrads<'_, T>,
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let BlockGrads { dout, dx, weights } = grads;
        let [sizes, _] = self.sizes_in_blocks(input.images);
        state.dy.reserve(input.images * sizes.image());
        self.gradient_sums_of_blocks(formats, input, dout, state, (weights.gamma, weights.beta), ws);
        let BlockState { y, dy, early_cell, norms, .. } = state;
        let source = |at: PlaneRows, block: &mut [T]| {
            let here = sizes.at(at.image, at.filter / LANES);
            let [y, dz] = [&y[here.clone()], &dy[here.clone()]].map(|values| values.as_chunks::<LANES>().0);
            let (norm, dy) = (BlockGradient::new(&norms[at.filter..at.filter + LANES]), block.as_chunks_mut().0);
            match &self.early {
                None => vectorized!(for ((dy, dz), y) in dy.iter_mut().zip(dz).zip(y) {
                    *dy = norm.dx(dz, y);
                }),
                Some(pool) => {
                    let cell = early_cell[here].as_chunks().0;
                    vectorized!(max_pool_block_backward(
                        pool,
                        #[inline(always)]
                        |pixel| norm.dx(&dz[pixel], &y[pixel]),
                        cell,
                        dy
                    ));
                }
            }
        };
        let (dw, db) = (Some(weights.w).filter(|dw| !dw.is_empty()), Some(weights.b).filter(|db| !db.is_empty()));
        let conv_input = ConvInput { images: input.images, x: input.x, w: input.weights.w };
        conv::backward(&self.training_plan(formats), conv_input, source, ConvGradsMut { dx, dw, db }, ws);
    }

    /// The gradient of what batchnorm made, into `state.dy`; of its sums, what its own gradient is made from, and those of gamma and
    /// beta.
    fn gradient_sums_of_blocks<T: Element>(
        &self,
        formats: Formats,
        input: &BlockInput<'_, T>,
        dout: &[T],
        state: &mut BlockState<T>,
        (dgamma, dbeta): (&mut [T], &mut [T]),
        ws: &mut Workspace,
    ) {
        let BlockState { y, dy, cell, mean, var, maps, norms, sums, .. } = state;
        let ([sizes, out_sizes], eps) =
            (self.sizes_in_blocks(input.images), self.parts().norm.expect("it trains in blocks").eps);
        let keeps_cells = self.tail.keeps_cells();
        let dz = &mut dy[..input.images * sizes.image()];
        let shares = (Grid::new(dz, (input.images, sizes.image()), (SLOT_IMAGES, sizes.block())), Chunks::new(sums, 1));
        let (_, scratch) = ws.lend(0, sizes.block() + out_sizes.block());
        for_each_share(shares, |piece, (mut dz, sums)| {
            let (slot, block) = (piece / sizes.blocks, piece % sizes.blocks);
            let center: &Lanes<T> = mean[channels(block)].as_array().expect("a block");
            sums[0] = [[0.0; LANES]; 2];
            scratch.with(|scratch: &mut [T]| {
                let (z, lanes) = scratch.split_at_mut(sizes.block());
                for (i, image) in sizes.images_of(slot).enumerate() {
                    let (dz, y, at) = (dz.get(i), &y[sizes.at(image, block)], out_sizes.at(image, block));
                    let cell = if keeps_cells { &cell[at.clone()] } else { &[][..] };
                    let dout = if formats.output == MemoryFormat::Blocked {
                        &dout[at]
                    } else {
                        planes_to_lanes(&dout[at], out_sizes.pixels, LANES, lanes.as_chunks_mut().0);
                        &*lanes
                    };
                    self.tail.backward_block(&maps[channels(block)], (dout, cell), y, z, dz);
                    let (dz, y) = (dz.as_chunks().0, y.as_chunks().0);
                    vectorized!(gradient_sums_of_block(dz, y, center, &mut sums[0]));
                }
            });
        });
        for c in 0..self.product[0] {
            let inverse = inverse_std(var[c], eps);
            let [total, centred] = [0, 1].map(|sum| {
                (0..sizes.slots()).map(|slot| sums[slot * sizes.blocks + c / LANES][sum][c % LANES]).sum::<f64>()
            });
            let sums = (total, centred * inverse.f64());
            norms[c] =
                ChannelGradient::new(self.channels(input.images), mean[c], inverse, input.weights.gamma[c], sums);
            (dgamma[c], dbeta[c]) = (T::of(sums.1), T::of(sums.0));
        }
    }
}
