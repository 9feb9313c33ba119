//! Level 4. Training a convolution and batchnorm with the product in blocks of channels: a pixel is a vector of [`LANES`] of them.
//!
//! Batchnorm's passes are over channels. Where planes are small, the planes of a channel are many short runs far apart, in loops that
//! begin and end more than they run. In blocks the same passes work on whole vectors that lie one after the other, and Winograd's
//! transforms make and take pixels in this form without putting planes together. Input and output of the block lie as its neighbours
//! in the network want them ([`Block::set_training_formats`]).
//!
//! Sums over a channel are made of those of slots of images, added up in f64 in their order; slots depend on sizes alone: the same bits
//! at any number of threads.

use std::ops::Range;

use super::backward::{PIECES, conv_backward};
use super::block::{Block, BlockState, Head, filters};
use super::blocked::block_of;
use super::parts::{BlockGrads, BlockInput};
use super::tail::ChannelMap;
use crate::element::{Element, Kind};
use crate::ops::batchnorm::{BlockGradient, ChannelGradient, gradient_sums_of_block, inverse_std, moments_of_blocks};
use crate::ops::conv::{self, ConvPlan, Outputs, PlaneRows};
use crate::ops::layout::{Formats, MemoryFormat};
use crate::ops::pool::{max_pool_block_backward, max_pool_block_with_cells};
use crate::parallel::{Chunks, Even, Grid, for_each_share, piece_range};
use crate::simd::{LANES, Lanes, Write, lanes_to_planes, planes_to_lanes, vectorized};
use crate::workspace::Workspace;

/// Images whose sums over a block of channels are one piece of work, at most; fewer, where there would be less than [`PIECES`].
const SLOT_IMAGES: usize = 16;

/// Pixels of a plane up to which blocks of them, one for each of the arrays that are worked on together, stay in the L2 cache. Of
/// larger ones, planes do.
const MOST_PIXELS: usize = 64 * 64;

/// Images that are normalised in one piece of work, at most.
const PIECE_IMAGES: usize = 4;

/// An array `[N, ceil(C / 16), pixels, 16]`, or one `[N, C, pixels]` of the same values.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    images: usize,
    channels: usize,
    pixels: usize,
}

impl Sizes {
    /// Images of a slot; the last may have fewer.
    fn slot(self) -> usize {
        (self.images * self.blocks() / PIECES).clamp(1, SLOT_IMAGES)
    }

    fn slots(self) -> usize {
        self.images.div_ceil(self.slot())
    }

    fn images_of(self, slot: usize) -> Range<usize> {
        slot * self.slot()..((slot + 1) * self.slot()).min(self.images)
    }

    /// Blocks of an image.
    fn blocks(self) -> usize {
        self.channels.div_ceil(LANES)
    }

    /// Elements of a block of an image.
    fn block(self) -> usize {
        self.pixels * LANES
    }

    /// Elements of an image.
    fn image(self) -> usize {
        self.blocks() * self.block()
    }

    /// Block `block` of image `image`.
    #[inline(always)]
    fn at(self, image: usize, block: usize) -> Range<usize> {
        let start = image * self.image() + block * self.block();
        start..start + self.block()
    }

    /// Channels of block `block`.
    fn channels_of(self, block: usize) -> usize {
        LANES.min(self.channels - block * LANES)
    }

    /// Block `block` of image `image`, or its planes, if that is how they lie.
    #[inline(always)]
    fn within(self, format: MemoryFormat, image: usize, block: usize) -> Range<usize> {
        match format {
            MemoryFormat::Blocked => self.at(image, block),
            MemoryFormat::Planar => {
                let start = (image * self.channels + block * LANES) * self.pixels;
                start..start + self.channels_of(block) * self.pixels
            }
        }
    }
}

/// Where the gradient of what batchnorm made is, when its own is made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In `dout`, which it is but for the slopes of the activation.
    Dout,
    /// In `state.dy`.
    Own,
    /// Nowhere: it takes less time to make it of `dout` and the cells of the pool again than to get it from memory.
    Nowhere,
}

/// Two sums over pixels of each channel of a block.
type Sums = [Lanes<f64>; 2];

/// What is at hand for a block of one image: scratch as large as the product, twice, and as the output; and the sums to add to.
struct Parts<'a, T> {
    z: &'a mut [T],
    dz: &'a mut [T],
    lanes: &'a mut [T],
    sums: &'a mut Sums,
}

/// What is done to a block of each image of a slot: from the image's number within the slot, image and block.
type OfImage<'a, T> = dyn FnMut(usize, (usize, usize), Parts<'_, T>) + 'a;

impl Block {
    /// Whether it trains with its product in blocks of channels: a convolution by Winograd's algorithm, followed by batchnorm
    /// over planes of up to [`MOST_PIXELS`].
    pub(super) fn may_train_in_blocks<T: Element>(&self) -> bool {
        let Head::Conv(plan) = &self.head else { return false };
        let normalised = self.parts().norm.is_some() && self.parts().dropout.is_none();
        let fits = self.product[1] * self.product[2] <= MOST_PIXELS;
        let blocked = plan.gradients_may_be_blocked() && plan.may_be_blocked() && self.fills_blocks();
        T::KIND == Kind::F32 && normalised && fits && blocked
    }

    /// Whether few of the lanes are left over, where its product lies in blocks: they take as long as others.
    fn fills_blocks(&self) -> bool {
        4 * self.product[0] >= 3 * MemoryFormat::Blocked.planes(self.product[0])
    }

    /// Whether its input and output may lie in blocks of channels in training.
    pub(crate) fn trains_in_blocks(&self) -> bool {
        self.trains_in_blocks
    }

    /// How its input and output lie in training.
    #[cfg(test)]
    pub(crate) fn training_formats(&self) -> Formats {
        self.training
    }

    /// Has it take its input and make its output in these formats in training, where [`Block::trains_in_blocks`].
    pub(crate) fn set_training_formats(&mut self, formats: Formats) {
        self.training = formats;
    }

    /// The plan of its convolution, in training.
    fn training_plan(&self) -> ConvPlan {
        let Head::Conv(plan) = &self.head else { unreachable!("only convolutions train in blocks") };
        plan.with_formats(Formats { output: MemoryFormat::Blocked, ..self.training })
    }

    /// Product and output, as they lie in blocks.
    fn sizes_in_blocks(&self, images: usize) -> [Sizes; 2] {
        let [channels, rows, cols] = self.product;
        [rows * cols, self.out_plane()].map(|pixels| Sizes { images, channels, pixels })
    }

    /// [`Block::forward`] in training, where the product lies in blocks.
    pub(super) fn forward_in_blocks<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        out: &mut [T],
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let [sizes, out_sizes] = self.sizes_in_blocks(input.images);
        self.product_in_blocks(&self.training_plan(), input, state, ws);
        self.statistics_of_blocks(sizes, input, state);
        let BlockState { y, cell, maps, .. } = state;
        let (images, maps) = (input.images, &*maps);
        let (pieces, cells) =
            (images.div_ceil(PIECE_IMAGES).max(images.min(PIECES)), if self.tail.keeps_cells() { images } else { 0 });
        let shares = (Even::new(out, images, pieces), Even::new(&mut cell[..cells * out_sizes.image()], cells, pieces));
        let write = Write::of::<T>(images * out_sizes.image());
        let (_, scratch) = ws.lend(0, sizes.block() + out_sizes.block());
        for_each_share(shares, |piece, (out, cell)| {
            scratch.with(|scratch: &mut [T]| {
                for (i, image) in piece_range(images, pieces, piece).enumerate() {
                    for block in 0..sizes.blocks() {
                        let y = &y[sizes.at(image, block)];
                        let cell = cell.get_mut(out_sizes.at(i, block)).unwrap_or_default();
                        let to = (&mut out[out_sizes.within(self.training.output, i, block)], cell, write);
                        self.finish_in_blocks(block_of(maps, block * LANES), y, to, scratch);
                    }
                }
            });
        });
    }

    /// Maps, activates and pools `y`, a block of the product, to the block of the output, or to its planes. `scratch` has room for
    /// both.
    fn finish_in_blocks<T: Element>(
        &self,
        maps: &[ChannelMap<T>],
        y: &[T],
        (out, cell, write): (&mut [T], &mut [u8], Write),
        scratch: &mut [T],
    ) {
        let (z, pooled) = scratch.split_at_mut(y.len());
        self.tail.before_pool_block(maps, Some(y), z);
        if self.training.output == MemoryFormat::Planar {
            self.tail.pool_block_with_cells(z, pooled, cell);
            lanes_to_planes(pooled.as_chunks().0, maps.len(), out, out.len() / maps.len());
        } else if self.tail.has_pool() {
            self.tail.pool_block_with_cells(z, out, cell);
        } else {
            vectorized!(write.copy(out, z));
        }
    }

    /// The product, after the early pool, into `state.y`.
    fn product_in_blocks<T: Element>(
        &self,
        plan: &ConvPlan,
        input: &BlockInput<'_, T>,
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let len = input.images * self.sizes_in_blocks(input.images)[0].image();
        let write = Write::of::<T>(len);
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
            None => vectorized!(write.copy(out, product)),
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
        sums.resize(sizes.slots() * sizes.blocks(), [[0.0; LANES]; 2]);
        for_each_share(Chunks::new(sums, 1), |piece, sums| {
            let (slot, block) = (piece / sizes.blocks(), piece % sizes.blocks());
            let of_image = |image: usize| y[sizes.at(image, block)].as_chunks().0;
            sums[0] = vectorized!(moments_of_blocks(sizes.images_of(slot), sizes.pixels, of_image));
        });
        let count = |slot: usize| (sizes.images_of(slot).len() * sizes.pixels) as f64;
        let all = (sizes.images * sizes.pixels) as f64;
        for c in 0..self.product[0] {
            let of_slot = |slot: usize| sums[slot * sizes.blocks() + c / LANES].map(|lanes| lanes[c % LANES]);
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

    /// Where the gradient of what batchnorm made is kept.
    fn place_of_dz(&self) -> Place {
        let blocked = self.training.output == MemoryFormat::Blocked;
        match (self.tail.has_pool(), self.tail.activation_before_pool().is_some()) {
            (false, _) if blocked => Place::Dout,
            (true, false) if blocked && self.early.is_none() => Place::Nowhere,
            _ => Place::Own,
        }
    }

    /// [`Block::backward`] after [`Block::forward_in_blocks`].
    pub(super) fn backward_in_blocks<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        grads: BlockGrads<'_, T>,
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let BlockGrads { dout, dx, weights } = grads;
        let ([sizes, _], place) = (self.sizes_in_blocks(input.images), self.place_of_dz());
        self.gradient_sums_of_blocks(place, input, dout, state, ws);
        self.gradients_of_sums(input, state, (weights.gamma, weights.beta));
        let BlockState { y, dy, cell, early_cell, norms, .. } = state;
        let (dout, dz) = (&*dout, if place == Place::Own { &**dy } else { &*dout });
        let source = |at: PlaneRows, dy: &mut [T]| {
            let (block, norm) = (at.filter / LANES, BlockGradient::new(block_of(norms, at.filter)));
            let here = sizes.at(at.image, block);
            let y = &y[here.clone()];
            match &self.early {
                Some(pool) => {
                    let (cell, dz) = (early_cell[here.clone()].as_chunks().0, dz[here].as_chunks().0);
                    let (y, dy) = (y.as_chunks().0, dy.as_chunks_mut().0);
                    vectorized!(max_pool_block_backward(
                        pool,
                        #[inline(always)]
                        |pixel| norm.dx(&dz[pixel], &y[pixel]),
                        cell,
                        dy,
                    ));
                }
                None if place == Place::Nowhere => {
                    self.pool_backward(input.images, (at.image, block), (dout, cell), &mut [], dy);
                    norm.apply(None, y, dy);
                }
                None => norm.apply(Some(&dz[here]), y, dy),
            }
        };
        conv_backward(&self.training_plan(), input, source, dx, (weights.w, weights.b), ws);
    }

    /// Sets `dz` to the gradient of what was pooled to a block of the output; `lanes` is scratch for that, where it lies in planes.
    fn pool_backward<T: Element>(
        &self,
        images: usize,
        (image, block): (usize, usize),
        (dout, cell): (&[T], &[u8]),
        lanes: &mut [T],
        dz: &mut [T],
    ) {
        let sizes = self.sizes_in_blocks(images)[1];
        let cell = if self.tail.keeps_cells() { &cell[sizes.at(image, block)] } else { &[] };
        let dout = &dout[sizes.within(self.training.output, image, block)];
        let dout = if self.training.output == MemoryFormat::Planar {
            let (count, lanes) = (sizes.channels_of(block), lanes.as_chunks_mut().0);
            if count < LANES {
                lanes.fill([T::zero(); LANES]);
            }
            planes_to_lanes(dout, sizes.pixels, count, lanes);
            lanes.as_flattened()
        } else {
            dout
        };
        self.tail.pool_block_backward(dout, cell, dz);
    }

    /// The sums of the gradient of what batchnorm made, in `state.sums`, and itself in its place.
    fn gradient_sums_of_blocks<T: Element>(
        &self,
        place: Place,
        input: &BlockInput<'_, T>,
        dout: &mut [T],
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        let BlockState { y, dy, cell, mean, maps, sums, .. } = state;
        let ([sizes, out_sizes], images) = (self.sizes_in_blocks(input.images), input.images);
        let (_, scratch) = ws.lend(0, 2 * sizes.block() + out_sizes.block());
        let grid = |dz| Grid::new(dz, (images, sizes.image()), (sizes.slot(), sizes.block()));
        let each = |piece: usize, sums: &mut [Sums], of_image: &mut OfImage<'_, T>| {
            let block = piece % sizes.blocks();
            sums[0] = [[0.0; LANES]; 2];
            scratch.with(|scratch: &mut [T]| {
                let (z, scratch) = scratch.split_at_mut(sizes.block());
                let (dz, lanes) = scratch.split_at_mut(sizes.block());
                for (i, image) in sizes.images_of(piece / sizes.blocks()).enumerate() {
                    of_image(i, (image, block), Parts { z, dz, lanes, sums: &mut sums[0] });
                }
            });
        };
        let add = |(image, block): (usize, usize), dz: &mut [T], z: &mut [T], sums: &mut Sums| {
            let y = &y[sizes.at(image, block)];
            self.tail.slopes_block(block_of(maps, block * LANES), y, z, dz);
            let mut center = [T::zero(); LANES];
            center.iter_mut().zip(block_of(mean, block * LANES)).for_each(|(center, &mean)| *center = mean);
            vectorized!(gradient_sums_of_block(dz.as_chunks().0, y.as_chunks().0, &center, sums));
        };
        match place {
            Place::Dout => for_each_share((grid(dout), Chunks::new(sums, 1)), |piece, (mut dz, sums)| {
                each(piece, sums, &mut |i, at, parts| add(at, dz.get(i), parts.z, parts.sums));
            }),
            Place::Nowhere => for_each_share(Chunks::new(sums, 1), |piece, sums| {
                each(piece, sums, &mut |_, at, parts| {
                    self.pool_backward(images, at, (dout, cell), parts.lanes, parts.dz);
                    add(at, parts.dz, parts.z, parts.sums);
                });
            }),
            Place::Own => {
                dy.reserve(images * sizes.image());
                let dz = grid(&mut dy[..images * sizes.image()]);
                for_each_share((dz, Chunks::new(sums, 1)), |piece, (mut dz, sums)| {
                    each(piece, sums, &mut |i, at, parts| {
                        self.pool_backward(images, at, (dout, cell), parts.lanes, dz.get(i));
                        add(at, dz.get(i), parts.z, parts.sums);
                    });
                });
            }
        }
    }

    /// From the sums over all pixels to what batchnorm's gradient is made from, and those of gamma and beta.
    fn gradients_of_sums<T: Element>(
        &self,
        input: &BlockInput<'_, T>,
        state: &mut BlockState<T>,
        (dgamma, dbeta): (&mut [T], &mut [T]),
    ) {
        let BlockState { mean, var, norms, sums, .. } = state;
        let ([sizes, _], eps) =
            (self.sizes_in_blocks(input.images), self.parts().norm.expect("there is batchnorm").eps);
        for c in 0..self.product[0] {
            let inverse = inverse_std(var[c], eps);
            let [total, centred] = [0, 1].map(|sum| {
                (0..sizes.slots()).map(|slot| sums[slot * sizes.blocks() + c / LANES][sum][c % LANES]).sum::<f64>()
            });
            let sums = (total, centred * inverse.f64());
            norms[c] =
                ChannelGradient::new(self.channels(input.images), mean[c], inverse, input.weights.gamma[c], sums);
            (dgamma[c], dbeta[c]) = (T::of(sums.1), T::of(sums.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;
    use crate::blocks::{BlockParts, Core, Pass, Pool, Weights};
    use crate::ops::activation::Activation;
    use crate::ops::batchnorm::BatchNorm;
    use crate::random::{Purpose, stream};
    use crate::shape::{Conv2d, Padding, Pool2d};

    fn random(len: usize, index: u64) -> Vec<f32> {
        let mut rng = stream(0, Purpose::Example, 0, index);
        (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// Images `[N, C, pixels]` in blocks, or back. What lies in the lanes that are left over is of no use to anybody.
    fn reordered(values: &[f32], channels: usize, to_blocks: bool) -> Vec<f32> {
        let lens = [channels, MemoryFormat::Blocked.planes(channels)];
        let (from_len, to_len) = if to_blocks { (lens[0], lens[1]) } else { (lens[1], lens[0]) };
        let pixels = values.len() / IMAGES / from_len;
        let mut to = vec![5.0; IMAGES * to_len * pixels];
        for n in 0..IMAGES {
            for c in 0..channels {
                for p in 0..pixels {
                    let planar = (n * channels + c) * pixels + p;
                    let blocked = ((n * lens[1] / LANES + c / LANES) * pixels + p) * LANES + c % LANES;
                    let (from, at) = if to_blocks { (planar, blocked) } else { (blocked, planar) };
                    to[at] = values[from];
                }
            }
        }
        to
    }

    const IMAGES: usize = 18;

    /// Output, and gradients of x, w, gamma and beta, of a block whose input and output lie in these formats: all in planes.
    fn trained(parts: BlockParts, channels: usize, formats: Formats) -> [Vec<f32>; 5] {
        let mut block = Block::new::<f32>(parts, [channels, 11, 9]).unwrap();
        assert!(block.trains_in_blocks());
        block.set_training_formats(formats);
        let [in_blocks, out_blocks] = [formats.input, formats.output].map(|format| format == MemoryFormat::Blocked);
        let lie = |values: Vec<f32>, channels, is| if is { reordered(&values, channels, true) } else { values };
        let back = |values: Vec<f32>, channels, is| if is { reordered(&values, channels, false) } else { values };
        let [filters, ..] = block.output();
        let x = lie(random(IMAGES * block.input_len(), 0), channels, in_blocks);
        let (w, gamma, beta) = (random(filters * channels * 9, 1), random(filters, 2), random(filters, 3));
        let weights = Weights { w: &w[..], b: &[], gamma: &gamma, beta: &beta };
        let (zeros, ones) = (vec![0.0; filters], vec![1.0; filters]);
        let input = BlockInput { images: IMAGES, x: &x, weights, prepared: None, running: (&zeros, &ones) };
        let (mut state, mut ws) = (BlockState::new(), Workspace::new());
        let pass = Pass::TRAIN;
        let mut out = vec![f32::NAN; IMAGES * block.lens(pass)[1]];
        let mut dout = lie(random(IMAGES * block.output_len(), 4), filters, out_blocks);
        block.forward(&input, pass, &mut out, &mut state, &mut ws);
        let (mut dx, mut dw) = (vec![f32::NAN; x.len()], vec![f32::NAN; w.len()]);
        let (mut dgamma, mut dbeta) = (vec![f32::NAN; filters], vec![f32::NAN; filters]);
        let weights = Weights { w: &mut dw[..], b: &mut [], gamma: &mut dgamma, beta: &mut dbeta };
        block.backward(&input, &out, BlockGrads { dout: &mut dout, dx: Some(&mut dx), weights }, &mut state, &mut ws);
        [back(out, filters, out_blocks), back(dx, channels, in_blocks), dw, dgamma, dbeta]
    }

    /// However input and output lie: the same bits. What they have to be is checked against the naive twins, in planes.
    #[test]
    fn formats_change_no_bit() {
        let pool = |pool| Some(Pool::Max(pool));
        let overlapping = Pool2d { window: (3, 3), stride: (2, 2), padding: Padding::All(1) };
        let conv = Conv2d { padding: Padding::Same, ..Conv2d::default() };
        let (planar, blocked) = (MemoryFormat::Planar, MemoryFormat::Blocked);
        let check = |parts, channels| {
            let want = trained(parts, channels, Formats::default());
            for (input, output) in [(planar, blocked), (blocked, planar), (blocked, blocked)] {
                let got = trained(parts, channels, Formats { input, output });
                assert_eq!(got, want, "{parts:?}, {channels} channels, {input:?} to {output:?}");
            }
        };
        for activation in [None, Some(Activation::Relu), Some(Activation::Gelu)] {
            for (early_pool, pool) in [
                (None, None),
                (None, pool(Pool2d::square(2))),
                (None, pool(overlapping)),
                (None, Some(Pool::Avg(overlapping))),
                (None, Some(Pool::GlobalAvg)),
                (Some(Pool2d::square(2)), None),
                (Some(Pool2d::square(2)), pool(Pool2d::square(2))),
            ] {
                for (channels, filters) in [(16, 32), (19, 42)] {
                    let (core, norm) = (Some(Core::Conv { filters, kernel: (3, 3), conv }), Some(BatchNorm::USUAL));
                    check(BlockParts { core, early_pool, norm, activation, pool, ..BlockParts::default() }, channels);
                }
            }
        }
    }
}
