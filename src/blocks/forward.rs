//! Level 4. A block's forward pass.

use super::block::{Block, BlockState, Head, affine_shape, filters};
use super::parts::{BlockInput, Pass, Prepared};
use super::tail::ChannelMap;
use crate::element::Element;
use crate::ops::affine::affine_product_into;
use crate::ops::batchnorm::{BatchNorm, Channels, batch_statistics, moments, moments_of};
use crate::ops::conv::{self, Outputs, conv2d_forward_into};
use crate::ops::dropout::{apply_mask, draw_mask};
use crate::ops::pool::max_pool_tiles;
use crate::parallel::{Chunks, Planes, StridedMut, for_each_chunk_mut, for_each_share};
use crate::simd::{LANES, Write, vectorized};
use crate::workspace::Workspace;

impl Block {
    /// The block's output into `out` `[N, C', H', W']`, or as the block's formats for this pass say; what backward needs stays in
    /// `state`.
    ///
    /// Training normalises with the statistics of the batch; [`Block::commit`] takes them over into the running ones.
    ///
    /// # Panics
    /// If a slice has not the length of its shape.
    pub fn forward<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        pass: Pass,
        out: &mut [T],
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let [in_len, out_len] = self.lens(pass);
        self.assert_input(input, in_len);
        assert_eq!(out.len(), input.images * out_len, "out holds {} images", input.images);
        self.reserve(state, input.images, pass);
        self.set_maps(input, pass, &mut state.maps);
        if self.trains_in_blocks && pass != Pass::Test {
            self.forward_in_blocks(input, out, state, ws);
        } else if self.fuses(pass) {
            self.fused_forward(input, out, state, ws);
        } else if self.finishes_blocks() {
            self.blocked_forward(input, out, state, ws);
        } else {
            self.product(input, state, ws);
            self.finish(input, pass, out, state, ws);
        }
        if let (Some(p), Pass::Train(key)) = (self.parts().dropout, pass) {
            let mask = &mut state.mask[..out.len()];
            draw_mask(input.images, p, key, mask).expect("the probability was checked when the block was made");
            apply_mask(mask, p, out);
        }
    }

    /// Per channel: the bias, or batchnorm with running statistics, or both.
    fn set_maps<T: Element>(&self, input: &BlockInput<'_, T>, pass: Pass, maps: &mut [ChannelMap<T>]) {
        let (weights, (mean, var)) = (&input.weights, input.running);
        for (c, map) in maps.iter_mut().enumerate() {
            let bias = weights.b.get(c).copied().unwrap_or(T::zero());
            *map = match (self.parts().norm, pass) {
                (Some(norm), Pass::Test) => {
                    ChannelMap::batchnorm(mean[c] - bias, var[c], weights.gamma[c], weights.beta[c], norm.eps)
                }
                // The batch's mean takes the bias with it; the maps follow from the statistics.
                (Some(_), Pass::Train(_)) => ChannelMap::shift(T::zero()),
                (None, _) => ChannelMap::shift(bias),
            };
        }
    }

    /// Product, map, activation and pool, tile by tile.
    fn fused_forward<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        out: &mut [T],
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let Head::Conv(plan) = &self.head else { unreachable!("only convolutions fuse") };
        let BlockState { cell, early_cell, maps, .. } = state;
        let cells = match self.early {
            Some(_) => &mut early_cell[..out.len()],
            None => &mut cell[..if self.keeps_cells() { out.len() } else { 0 }],
        };
        let outputs = self.outputs(out, cells, self.output);
        let finish = |filter: usize, product: &mut [T], out: &mut [T], cell: &mut [u8]| {
            if self.finishes_blocks() {
                return self.tail.finish_block(&maps[filter..filter + LANES], product, out);
            }
            vectorized!(match &self.early {
                // Test mode: the cells are of no use.
                Some(pool) => {
                    max_pool_tiles((pool.rows.window, pool.cols.window), pool.cols.input, product, out, cell);
                    self.tail.before_pool(maps[filter], out);
                }
                None => self.tail.finish(maps[filter], product, out, cell),
            });
        };
        conv::forward(plan, input.images, input.x, filters(input), outputs, finish, ws);
    }

    /// Where the bands of a convolution's planes go, `size` `[C, H, W]` an image.
    fn outputs<'a, T>(&self, out: &'a mut [T], cells: &'a mut [u8], size: [usize; 3]) -> Outputs<'a, T> {
        let (band, side_by_side) = (self.band().expect("it is finished in bands"), self.formats.output.side_by_side());
        let [out_plane, out_cols] = [size[1] * size[2], size[2]].map(|len| len * side_by_side);
        Outputs { out, cells, out_plane, out_cols, band, side_by_side }
    }

    /// Of blocks of channels: the product, mapped and activated, into `state.y`; then the pool.
    fn blocked_forward<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        out: &mut [T],
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let BlockState { y, maps, .. } = state;
        let (blocks, maps) = (self.product[0] / LANES, &*maps);
        let before_pool = |filter: usize, product: &mut [T]| {
            self.tail.before_pool_block(&maps[filter..filter + LANES], None, product);
        };
        let (block, out_block) = (self.product[1] * self.product[2] * LANES, self.out_plane() * LANES);
        if let Head::Conv(plan) = &self.head {
            let y = &mut y[..input.images * self.product_len()];
            let finish = |filter, product: &mut [T], out: &mut [T], _: &mut [u8]| {
                before_pool(filter, product);
                out.copy_from_slice(product);
            };
            conv::forward(plan, input.images, input.x, filters(input), Outputs::plain(plan, y), finish, ws);
            for_each_chunk_mut(out, out_block, |index, out| {
                self.tail.pool_block(&y[index * block..][..block], out);
            });
            return;
        }
        let (_, scratch) = ws.lend(0, block);
        for_each_chunk_mut(out, out_block, |index, out| {
            scratch.with(|z: &mut [T]| {
                let z = &mut z[..block];
                z.copy_from_slice(&input.x[index * block..][..block]);
                before_pool(index % blocks * LANES, z);
                self.tail.pool_block(z, out);
            });
        });
    }

    /// The product, after the early pool, into `state.y`.
    fn product<T: Element>(&self, input: &BlockInput<'_, T>, state: &mut BlockState<T>, ws: &mut Workspace) {
        let len = input.images * self.product_len();
        match (&self.head, &self.early) {
            (Head::None, _) => {}
            (Head::Conv(plan), None) => {
                conv2d_forward_into(plan, input.images, input.x, filters(input), None, &mut state.y[..len], ws);
            }
            (Head::Conv(plan), Some(pool)) => {
                let (window, cols) = ((pool.rows.window, pool.cols.window), pool.cols.input);
                let outputs = self.outputs(&mut state.y[..len], &mut state.early_cell[..len], self.product);
                let finish = |_, product: &mut [T], out: &mut [T], cell: &mut [u8]| {
                    vectorized!(max_pool_tiles(window, cols, product, out, cell));
                };
                conv::forward(plan, input.images, input.x, filters(input), outputs, finish, ws);
            }
            (&Head::Affine { inputs, outputs }, _) => {
                let y = &mut state.y[..len];
                if let Some(Prepared::Matrix(matrix)) = input.prepared {
                    matrix.product_into(input.images, input.x, y, ws);
                } else {
                    affine_product_into(&affine_shape(input.images, inputs, outputs), input.x, input.weights.w, y, ws);
                }
            }
        }
    }

    /// Statistics, maps, activation and pool of a product that lies in memory.
    fn finish<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        pass: Pass,
        out: &mut [T],
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let (sizes, norm) = (self.channels(input.images), self.parts().norm.filter(|_| pass != Pass::Test));
        if self.is_flat() {
            return self.finish_flat(sizes, input, norm, out, state);
        }
        let BlockState { y, cell, mean, var, maps, .. } = state;
        let y = if matches!(self.head, Head::None) { input.x } else { &y[..input.images * self.product_len()] };
        let planes = [sizes.images, sizes.channels, self.out_plane()];
        let cells = if self.tail.keeps_cells() { planes } else { [sizes.images, sizes.channels, 0] };
        let shares = (
            Planes::new(out, planes),
            Planes::new(&mut cell[..cells.iter().product()], cells),
            Chunks::new(maps, 1),
            Chunks::new(mean, 1),
            Chunks::new(var, 1),
        );
        let weights = &input.weights;
        let gathers = sizes.gathers();
        let write = Write::of::<T>(input.images * self.output_len());
        let (_, scratch) = ws.lend(0, if gathers { sizes.channel_len() } else { sizes.plane });
        for_each_share(shares, |c, (mut out, mut cell, map, mean, var)| {
            scratch.with(|z: &mut [T]| {
                vectorized!({
                    if gathers {
                        sizes.gather(c, y, z);
                    }
                    if let Some(norm) = norm {
                        (mean[0], var[0]) = channel_moments(sizes, c, y, z);
                        map[0] = ChannelMap::batchnorm(mean[0], var[0], weights.gamma[c], weights.beta[c], norm.eps);
                    }
                    self.finish_channel(sizes, c, y, map[0], (&mut out, &mut cell, write), z);
                });
            });
        });
    }

    /// The planes of one channel: all at once where `z` holds them gathered, else one by one, and `z` is scratch for one.
    #[inline(always)]
    fn finish_channel<T: Element>(
        &self,
        sizes: Channels,
        c: usize,
        y: &[T],
        map: ChannelMap<T>,
        (out, cell, write): (&mut StridedMut<'_, T>, &mut StridedMut<'_, u8>, Write),
        z: &mut [T],
    ) {
        if sizes.gathers() {
            self.tail.before_pool(map, z);
            for (n, z) in z.chunks_exact(sizes.plane).enumerate() {
                self.tail.pool(z, out.get(n), cell.get(n));
            }
            return;
        }
        for (n, plane) in sizes.planes(c).enumerate() {
            if self.tail.has_pool() {
                self.tail.map_before_pool(map, &y[plane], z);
                self.tail.pool(z, out.get(n), cell.get(n));
            } else {
                self.tail.map_activate(map, &y[plane], out.get(n), write);
            }
        }
    }

    /// [`Block::finish`] of features without planes.
    fn finish_flat<T: Element>(
        &self,
        sizes: Channels,
        input: &BlockInput<'_, T>,
        norm: Option<BatchNorm>,
        out: &mut [T],
        state: &mut BlockState<T>,
    ) {
        let BlockState { y, mean, var, maps, .. } = state;
        let y = if matches!(self.head, Head::None) { input.x } else { &y[..out.len()] };
        if let Some(norm) = norm {
            batch_statistics(sizes, y, mean, var);
            let (gamma, beta) = (input.weights.gamma, input.weights.beta);
            for (c, map) in maps.iter_mut().enumerate() {
                *map = ChannelMap::batchnorm(mean[c], var[c], gamma[c], beta[c], norm.eps);
            }
        }
        let maps = &*maps;
        for_each_chunk_mut(out, sizes.channels, |n, out| {
            let y = &y[n * sizes.channels..][..sizes.channels];
            vectorized!(for ((out, &y), &map) in out.iter_mut().zip(y).zip(maps) {
                *out = self.tail.map_activate_one(map, y);
            });
        });
    }
}

/// Mean and biased variance of channel `c` of `y`; `z` holds its planes if they are so small that they were gathered.
#[inline(always)]
fn channel_moments<T: Element>(sizes: Channels, c: usize, y: &[T], z: &[T]) -> (T, T) {
    if sizes.gathers() { moments_of(z) } else { moments(sizes, c, y) }
}
