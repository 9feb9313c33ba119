//! Level 3. One block: its sizes, its memory, forward and backward.

use crate::element::Element;
use crate::error::{Error, Result};
use crate::ops::activation::Activation;
use crate::ops::affine::{AffineShape, affine_backward_into, affine_product_into};
use crate::ops::batchnorm::{
    BatchNorm, ChannelGradient, Channels, batch_statistics, gradient_sums, inverse_std, moments, train_backward_into,
    update_running,
};
use crate::ops::conv::{
    self, ConvGradsMut, ConvInput, ConvPlan, Filters, Outputs, PlaneRows, conv2d_backward_into, conv2d_forward_into,
};
use crate::ops::dropout::{DropoutKey, apply_mask, draw_mask};
use crate::parallel::{Disjoint, for_each_chunk_mut, for_each_piece};
use crate::shape::{Conv2d, Conv2dShape, Pool2d, Pool2dShape};
use crate::simd::vectorized;
use crate::workspace::{Buffer, Workspace};

use super::tail::{ChannelMap, Pooling, Tail};

/// The product at the head of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Core {
    /// Convolution with `filters` filters of `kernel` (height, width) pixels.
    Conv {
        /// Filters: output channels.
        filters: usize,
        /// Filter size in pixels (height, width).
        kernel: (usize, usize),
        /// Stride, padding, dilation, groups.
        conv: Conv2d,
    },
    /// Affine layer with this many outputs; flattens its input.
    Affine {
        /// Outputs `M`.
        outputs: usize,
    },
}

/// Pooling at the end of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pool {
    /// Maximum of each window.
    Max(Pool2d),
    /// Mean of each window.
    Avg(Pool2d),
    /// Mean of each channel.
    GlobalAvg,
}

/// What a block consists of, in the order in which it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BlockParts {
    /// The product.
    pub core: Option<Core>,
    /// Whether the product has a bias. Leave it out before batchnorm, which cancels it.
    pub bias: bool,
    /// Batch normalisation, per channel.
    pub norm: Option<BatchNorm>,
    /// Pointwise nonlinearity.
    pub activation: Option<Activation>,
    /// Pooling.
    pub pool: Option<Pool>,
    /// Dropout with this probability of dropping a value.
    pub dropout: Option<f64>,
}

/// One thing for each kind of parameter that a block has; empty where it has none. `S` is a slice, a shape, ...
#[derive(Clone, Copy, Debug, Default)]
pub struct Weights<S> {
    /// Filters `(F, C / groups, KH, KW)` or matrix `(D, M)`.
    pub w: S,
    /// Bias, per channel.
    pub b: S,
    /// Batchnorm's scale, per channel.
    pub gamma: S,
    /// Batchnorm's shift, per channel.
    pub beta: S,
}

/// Training or test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Batch statistics, dropout by this key.
    Train(DropoutKey),
    /// Running statistics, no dropout.
    Test,
}

/// A block for images of one size.
#[derive(Clone, Debug)]
pub struct Block {
    parts: BlockParts,
    kernel: Kernel,
    tail: Tail,
    /// Input `[C, H, W]`.
    input: [usize; 3],
    /// After the product, `[C, H, W]`; `[M, 1, 1]` after an affine layer.
    product: [usize; 3],
    /// Output `[C, H, W]`.
    output: [usize; 3],
}

/// The product with its sizes, for one image.
#[derive(Clone, Copy, Debug)]
enum Kernel {
    None,
    Conv(Conv2dShape),
    Affine { inputs: usize, outputs: usize },
}

/// What a block remembers from forward to backward, for a number of images; and its output.
#[derive(Debug)]
pub struct BlockState<T> {
    /// The product (with its bias), where backward or a second pass needs it; then its gradient.
    y: Buffer<T>,
    out: Buffer<T>,
    /// Gradient of the product, where it cannot take the place of `y`.
    dy: Buffer<T>,
    cell: Buffer<u8>,
    mask: Buffer<u8>,
    /// Batch statistics, per channel.
    mean: Vec<T>,
    var: Vec<T>,
    maps: Vec<ChannelMap<T>>,
}

impl<T: Element> BlockState<T> {
    /// Memory of nothing yet.
    pub fn new() -> Self {
        BlockState {
            y: Buffer::default(),
            out: Buffer::default(),
            dy: Buffer::default(),
            cell: Buffer::default(),
            mask: Buffer::default(),
            mean: Vec::new(),
            var: Vec::new(),
            maps: Vec::new(),
        }
    }

    /// The output of the last forward pass over `images` images.
    pub fn out(&self, block: &Block, images: usize) -> &[T] {
        &self.out[..images * block.output_len()]
    }
}

impl<T: Element> Default for BlockState<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// How a convolution runs.
fn plan_of<T: Element>(shape: &Conv2dShape) -> ConvPlan {
    ConvPlan::new::<T>(shape).expect("the algorithm was checked when the block was made")
}

impl Block {
    /// A block for images `[C, H, W]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Shape`] if a filter or window does not fit, or a constant makes no sense.
    pub fn new(parts: BlockParts, input: [usize; 3]) -> Result<Self> {
        let [c, h, w] = input;
        if input.contains(&0) {
            return Err(Error::invalid(
                "block",
                format!("an input {input:?} has no values"),
                "give at least 1 of each",
            ));
        }
        let (kernel, product) = match parts.core {
            None => (Kernel::None, input),
            Some(Core::Conv { filters, kernel: (kh, kw), conv }) => {
                let groups = conv.groups.max(1);
                let shape = Conv2dShape::new([1, c, h, w], [filters, c / groups, kh, kw], &conv)?;
                (Kernel::Conv(shape), [filters, shape.rows.output, shape.cols.output])
            }
            Some(Core::Affine { outputs: 0 }) => {
                return Err(Error::invalid("affine", "0 outputs", "give at least 1"));
            }
            Some(Core::Affine { outputs }) => (Kernel::Affine { inputs: c * h * w, outputs }, [outputs, 1, 1]),
        };
        if let Some(norm) = &parts.norm {
            norm.check()?;
        }
        if let Some(Activation::LeakyRelu { slope }) = parts.activation
            && !(0.0..=1.0).contains(&slope)
        {
            // backward reads the sign of z off the output
            return Err(Error::invalid("leaky relu", format!("the slope is {slope}"), "give 0 to 1"));
        }
        let [channels, rows, cols] = product;
        let pool = match parts.pool {
            None => None,
            Some(Pool::Max(pool)) => Some(Tail::max_pool(&pool, product)?),
            Some(Pool::Avg(pool)) => Some(Pooling::Avg(Pool2dShape::new([1, channels, rows, cols], &pool)?)),
            Some(Pool::GlobalAvg) => Some(Pooling::Global),
        };
        if let Some(p) = parts.dropout
            && !(0.0..1.0).contains(&p)
        {
            return Err(Error::invalid("dropout", format!("the probability is {p}"), "give 0 or more and less than 1"));
        }
        let tail = Tail::new(parts.activation, pool, rows, cols);
        let (out_rows, out_cols) = tail.out_size();
        Ok(Block { parts, kernel, tail, input, product, output: [channels, out_rows, out_cols] })
    }

    /// Whether the algorithm of its convolution, if it has one, may run for elements of type `T`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if not.
    pub fn check_algorithm<T: Element>(&self) -> Result<()> {
        match self.kernel {
            Kernel::Conv(shape) => ConvPlan::new::<T>(&shape).map(drop),
            Kernel::None | Kernel::Affine { .. } => Ok(()),
        }
    }

    /// What it consists of.
    pub fn parts(&self) -> &BlockParts {
        &self.parts
    }

    /// Input `[C, H, W]`.
    pub fn input(&self) -> [usize; 3] {
        self.input
    }

    /// Output `[C, H, W]`; `[M, 1, 1]` for an affine layer.
    pub fn output(&self) -> [usize; 3] {
        self.output
    }

    fn input_len(&self) -> usize {
        self.input.iter().product()
    }

    /// Elements of one image's output.
    pub fn output_len(&self) -> usize {
        self.output.iter().product()
    }

    fn product_len(&self) -> usize {
        self.product.iter().product()
    }

    /// Shapes of the parameters; empty where there is none.
    pub fn weight_shapes(&self) -> Weights<Vec<usize>> {
        let per_channel = |there: bool| if there { vec![self.product[0]] } else { Vec::new() };
        Weights {
            w: match self.kernel {
                Kernel::None => Vec::new(),
                Kernel::Conv(shape) => shape.w().to_vec(),
                Kernel::Affine { inputs, outputs } => vec![inputs, outputs],
            },
            b: per_channel(self.parts.bias && self.parts.core.is_some()),
            gamma: per_channel(self.parts.norm.is_some()),
            beta: per_channel(self.parts.norm.is_some()),
        }
    }

    /// Multiplies the weights `w` so that channel `c` of the product is `scale[c]` times what it was.
    pub fn scale_outputs<T: Element>(&self, w: &mut [T], scale: &[T]) {
        match self.kernel {
            Kernel::None => {}
            Kernel::Conv(shape) => {
                for (filter, &scale) in w.chunks_exact_mut(shape.column()).zip(scale) {
                    filter.iter_mut().for_each(|w| *w *= scale);
                }
            }
            Kernel::Affine { outputs, .. } => {
                for row in w.chunks_exact_mut(outputs) {
                    row.iter_mut().zip(scale).for_each(|(w, &scale)| *w *= scale);
                }
            }
        }
    }

    /// Panics unless every parameter has the length of its shape.
    fn assert_weights<T>(&self, weights: &Weights<impl AsRef<[T]>>) {
        let per_channel = |there: bool| if there { self.product[0] } else { 0 };
        let w = match self.kernel {
            Kernel::None => 0,
            Kernel::Conv(shape) => shape.w().iter().product(),
            Kernel::Affine { inputs, outputs } => inputs * outputs,
        };
        let norm = per_channel(self.parts.norm.is_some());
        let Weights { w: got, b, gamma, beta } = weights;
        assert_eq!(
            [got, b, gamma, beta].map(|slice| slice.as_ref().len()),
            [w, per_channel(self.parts.bias && self.parts.core.is_some()), norm, norm],
            "lengths of w, b, gamma, beta"
        );
    }

    /// Multiply-adds of one image's forward pass.
    pub fn multiply_adds(&self) -> usize {
        match self.kernel {
            Kernel::None => 0,
            Kernel::Conv(shape) => shape.flops() / 2,
            Kernel::Affine { inputs, outputs } => inputs * outputs,
        }
    }

    /// Whether the tiles of the convolution can be finished one by one, with per-channel maps known beforehand.
    fn fuses(&self, pass: Pass) -> bool {
        let maps_known = pass == Pass::Test || (self.parts.norm.is_none() && !self.tail.backward_needs_y());
        matches!(self.kernel, Kernel::Conv(_)) && self.tail.band_rows().is_some() && maps_known
    }

    fn channels(&self, images: usize) -> Channels {
        Channels { images, channels: self.product[0], plane: self.product[1] * self.product[2] }
    }

    /// Whether the product is a row of features per sample: no planes to go through.
    fn is_flat(&self) -> bool {
        self.product[1] * self.product[2] == 1 && !self.tail.has_pool()
    }

    /// Makes `state` large enough for `images` images.
    fn prepare<T: Element>(&self, state: &mut BlockState<T>, images: usize, pass: Pass) {
        let train = pass != Pass::Test;
        state.out.reserve(images * self.output_len());
        if !self.fuses(pass) && !matches!(self.kernel, Kernel::None) {
            state.y.reserve(images * self.product_len());
        }
        if self.tail.keeps_cells() {
            state.cell.reserve(images * self.output_len());
        }
        if train && self.parts.dropout.is_some() {
            state.mask.reserve(images * self.output_len());
        }
        let channels = self.product[0];
        state.mean.resize(channels, T::zero());
        state.var.resize(channels, T::one());
        let identity = ChannelMap { center: T::zero(), scale: T::one(), shift: T::zero() };
        state.maps.resize(channels, identity);
    }

    /// The block's output for images `x` `[N, C, H, W]`, into `state`. Training updates `running` `(mean, variance)`,
    /// which test mode reads; both are empty without batchnorm.
    ///
    /// # Panics
    /// If a slice has not the length of its shape.
    pub fn forward<T: Element>(
        &self,
        images: usize,
        x: &[T],
        weights: Weights<&[T]>,
        running: (&mut [T], &mut [T]),
        pass: Pass,
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        assert_eq!(x.len(), images * self.input_len(), "x holds {images} images of {:?}", self.input);
        self.assert_weights(&weights);
        let statistics = [running.0.len(), running.1.len()];
        assert_eq!(statistics, [weights.gamma.len(); 2], "running statistics have one element per channel");
        self.prepare(state, images, pass);
        self.set_maps(&weights, (running.0, running.1), pass, &mut state.maps);
        let BlockState { y, out, cell, mask, mean, var, maps, .. } = state;
        let out = &mut out[..images * self.output_len()];
        if let (Kernel::Conv(shape), true) = (self.kernel, self.fuses(pass)) {
            self.fused_conv_forward(&plan_of::<T>(&shape), images, x, weights.w, maps, out, cell, ws);
        } else {
            let y = match self.kernel {
                Kernel::None => x,
                Kernel::Conv(shape) => {
                    let y = &mut y[..images * self.product_len()];
                    conv2d_forward_into(&plan_of::<T>(&shape), images, x, Filters::Plain(weights.w), None, y, ws);
                    y
                }
                Kernel::Affine { inputs, outputs } => {
                    let y = &mut y[..images * outputs];
                    affine_product_into(&AffineShape { samples: images, inputs, outputs }, x, weights.w, y);
                    y
                }
            };
            let norm = self.parts.norm.filter(|_| pass != Pass::Test);
            self.finish(images, y, weights, norm, maps, (mean, var), out, cell, ws);
            if let Some(norm) = norm {
                update_running(running.0, mean, norm.momentum);
                update_running(running.1, var, norm.momentum);
                // `mean` is that of the product without its bias
                for (running, &bias) in running.0.iter_mut().zip(weights.b) {
                    *running += T::of(1.0 - norm.momentum) * bias;
                }
            }
        }
        if let (Some(p), Pass::Train(key)) = (self.parts.dropout, pass) {
            let mask = &mut mask[..out.len()];
            draw_mask(images, p, key, mask).expect("the probability was checked when the block was made");
            apply_mask(mask, p, out);
        }
    }

    /// Per channel: the bias, or batchnorm with running statistics, or both.
    fn set_maps<T: Element>(
        &self,
        weights: &Weights<&[T]>,
        running: (&[T], &[T]),
        pass: Pass,
        maps: &mut [ChannelMap<T>],
    ) {
        for (c, map) in maps.iter_mut().enumerate() {
            let bias = weights.b.get(c).copied().unwrap_or(T::zero());
            *map = match (self.parts.norm, pass) {
                (Some(norm), Pass::Test) => {
                    let mean = running.0[c] - bias;
                    ChannelMap::batchnorm(mean, running.1[c], weights.gamma[c], weights.beta[c], norm.eps)
                }
                // The batch's mean takes the bias with it; the maps follow from the statistics.
                (Some(_), Pass::Train(_)) => ChannelMap { center: T::zero(), scale: T::one(), shift: T::zero() },
                (None, _) => ChannelMap { center: T::zero(), scale: T::one(), shift: bias },
            };
        }
    }

    /// Product, map, activation and pool, tile by tile.
    fn fused_conv_forward<T: Element>(
        &self,
        plan: &ConvPlan,
        images: usize,
        x: &[T],
        w: &[T],
        maps: &[ChannelMap<T>],
        out: &mut [T],
        cell: &mut [u8],
        ws: &mut Workspace,
    ) {
        let band = self.tail.band_rows().expect("fuses");
        let cells = if self.tail.keeps_cells() { &mut cell[..out.len()] } else { &mut [] };
        let (out_plane, out_cols) = (self.output[1] * self.output[2], self.output[2]);
        let outputs = Outputs { out, cells, out_plane, out_cols, band };
        let finish = |filter: usize, product: &mut [T], out: &mut [T], cells: &mut [u8]| {
            vectorized!(self.tail.finish(maps[filter], product, out, cells));
        };
        conv::forward(&plan.with_bands(band), images, x, Filters::Plain(w), outputs, finish, ws);
    }

    /// Where the output of a band of `len` pixels, beginning at `at.row`, lies in its output plane.
    fn out_rows(&self, at: PlaneRows, len: usize) -> (usize, usize) {
        let band = self.tail.band_rows().expect("fuses");
        let rows = len / self.product[2] / band;
        (at.row / band * self.output[2], rows * self.output[2])
    }

    /// Statistics, maps, activation and pool of a product that lies in memory.
    fn finish<T: Element>(
        &self,
        images: usize,
        y: &[T],
        weights: Weights<&[T]>,
        norm: Option<BatchNorm>,
        maps: &mut [ChannelMap<T>],
        (mean, var): (&mut [T], &mut [T]),
        out: &mut [T],
        cell: &mut [u8],
        ws: &mut Workspace,
    ) {
        let of = self.channels(images);
        if self.is_flat() {
            return self.finish_flat(of, y, weights, norm, maps, (mean, var), out);
        }
        let out_plane = self.output[1] * self.output[2];
        let (out, cell, maps) = (Disjoint::new(out), Disjoint::new(cell), Disjoint::new(maps));
        let (mean, var) = (Disjoint::new(mean), Disjoint::new(var));
        let (_, scratch) = ws.lend(0, of.plane);
        for_each_piece(of.channels, |c| {
            // SAFETY: a piece owns its channel.
            let (map, mean, var) = unsafe { (&mut maps.slice(c, 1)[0], mean.slice(c, 1), var.slice(c, 1)) };
            scratch.with(|z: &mut [T]| {
                vectorized!({
                    if let Some(norm) = norm {
                        (mean[0], var[0]) = moments(of, c, y);
                        *map = ChannelMap::batchnorm(mean[0], var[0], weights.gamma[c], weights.beta[c], norm.eps);
                    }
                    for (n, plane) in of.planes(c).enumerate() {
                        let start = (n * of.channels + c) * out_plane;
                        let cells = if self.tail.keeps_cells() { out_plane } else { 0 };
                        // SAFETY: a piece owns the planes of its channel.
                        let (out, cell) =
                            unsafe { (out.slice(start, out_plane), cell.slice(start.min(cell.len()), cells)) };
                        if self.tail.has_pool() {
                            z.copy_from_slice(&y[plane]);
                            self.tail.finish(*map, z, out, cell);
                        } else {
                            self.tail.map_activate(*map, &y[plane], out);
                        }
                    }
                },);
            });
        });
    }

    /// [`Block::finish`] of features without planes.
    fn finish_flat<T: Element>(
        &self,
        of: Channels,
        y: &[T],
        weights: Weights<&[T]>,
        norm: Option<BatchNorm>,
        maps: &mut [ChannelMap<T>],
        (mean, var): (&mut [T], &mut [T]),
        out: &mut [T],
    ) {
        if let Some(norm) = norm {
            batch_statistics(of, y, mean, var);
            for (c, map) in maps.iter_mut().enumerate() {
                *map = ChannelMap::batchnorm(mean[c], var[c], weights.gamma[c], weights.beta[c], norm.eps);
            }
        }
        let maps = &*maps;
        for_each_chunk_mut(out, of.channels, |n, out| {
            let y = &y[n * of.channels..][..of.channels];
            vectorized!({
                for ((out, &y), &map) in out.iter_mut().zip(y).zip(maps) {
                    *out = self.tail.map_activate_one(map, y);
                }
            },);
        });
    }

    /// Gradients of the last training forward pass over `x`, for `dout` `[N, C', H', W']`, which is used up: of the
    /// parameters into `grads`, and of x into `dx` if asked for; all set, not added to.
    ///
    /// # Panics
    /// If a slice has not the length of its shape.
    pub fn backward<T: Element>(
        &self,
        images: usize,
        x: &[T],
        weights: Weights<&[T]>,
        dout: &mut [T],
        dx: Option<&mut [T]>,
        grads: Weights<&mut [T]>,
        state: &mut BlockState<T>,
        ws: &mut Workspace,
    ) {
        assert_eq!(x.len(), images * self.input_len(), "x holds {images} images of {:?}", self.input);
        assert_eq!(dout.len(), images * self.output_len(), "dout holds {images} images of {:?}", self.output);
        assert!(dx.as_ref().is_none_or(|dx| dx.len() == x.len()), "dx has the length of x");
        self.assert_weights(&weights);
        self.assert_weights(&grads);
        let BlockState { y, out, dy, cell, mask, mean, var, maps } = state;
        let out = &out[..dout.len()];
        if let Some(p) = self.parts.dropout {
            apply_mask(&mask[..dout.len()], p, dout);
        }
        let db = Some(grads.b).filter(|b| !b.is_empty());
        let training = Pass::Train(DropoutKey { seed: 0, step: 0, layer: 0 });
        if let (Kernel::Conv(shape), true) = (self.kernel, self.fuses(training)) {
            let input = ConvInput { images, x, w: weights.w };
            let grads = ConvGradsMut { dx, dw: Some(grads.w), db };
            return self.fused_conv_backward(&plan_of::<T>(&shape), input, maps, dout, out, cell, grads, ws);
        }
        let statistics = (&**mean, &**var);
        let scale = (weights.gamma, grads.gamma, grads.beta);
        if self.is_flat() {
            let y = if matches!(self.kernel, Kernel::None) { x } else { &y[..dout.len()] };
            self.flat_gradient(self.channels(images), y, dout, out, maps, statistics, scale, dy);
            match (self.kernel, dx) {
                (Kernel::Affine { inputs, outputs }, dx) => {
                    let shape = AffineShape { samples: images, inputs, outputs };
                    affine_backward_into(&shape, dout, x, weights.w, dx, grads.w, db);
                }
                (Kernel::Conv(shape), dx) => {
                    let input = ConvInput { images, x, w: weights.w };
                    let grads = ConvGradsMut { dx, dw: Some(grads.w), db };
                    conv2d_backward_into(&plan_of::<T>(&shape), dout, input, grads, ws);
                }
                (Kernel::None, Some(dx)) => dx.copy_from_slice(dout),
                (Kernel::None, None) => {}
            }
            return;
        }
        let product = images * self.product_len();
        if matches!(self.kernel, Kernel::None) {
            // x is the product, and dx its gradient; without dx, gamma and beta may still want theirs
            let dx = match dx {
                Some(dx) => dx,
                None => {
                    dy.reserve(product);
                    &mut dy[..product]
                }
            };
            dx.copy_from_slice(x);
            return self.plane_gradients(images, dx, dout, out, cell, maps, statistics, scale, ws);
        }
        let dy = &mut y[..product];
        self.plane_gradients(images, dy, dout, out, cell, maps, statistics, scale, ws);
        match self.kernel {
            Kernel::Conv(shape) => {
                let input = ConvInput { images, x, w: weights.w };
                let grads = ConvGradsMut { dx, dw: Some(grads.w), db };
                conv2d_backward_into(&plan_of::<T>(&shape), dy, input, grads, ws);
            }
            Kernel::Affine { inputs, outputs } => {
                let shape = AffineShape { samples: images, inputs, outputs };
                affine_backward_into(&shape, dy, x, weights.w, dx, grads.w, db);
            }
            Kernel::None => {}
        }
    }

    /// Gradient of [`Block::fused_conv_forward`].
    fn fused_conv_backward<T: Element>(
        &self,
        plan: &ConvPlan,
        input: ConvInput<'_, T>,
        maps: &[ChannelMap<T>],
        dout: &[T],
        out: &[T],
        cell: &[u8],
        grads: ConvGradsMut<'_, T>,
        ws: &mut Workspace,
    ) {
        let (band, out_plane) = (self.tail.band_rows().expect("fuses"), self.output[1] * self.output[2]);
        let source = |at: PlaneRows, dz: &mut [T]| {
            let plane = (at.image * self.product[0] + at.filter) * out_plane;
            let (start, len) = self.out_rows(at, dz.len());
            let here = plane + start..plane + start + len;
            let cell = if self.tail.keeps_cells() { &cell[here.clone()] } else { &[] };
            vectorized!(self.tail.backward(maps[at.filter], &dout[here.clone()], &out[here], cell, &[], dz),);
        };
        conv::backward(&plan.with_bands(band), input, source, grads, ws);
    }

    /// Gradient of [`Block::finish`], channel by channel: `y` holds the product and becomes its gradient. `scale` is
    /// gamma, and where the gradients of gamma and beta go.
    fn plane_gradients<T: Element>(
        &self,
        images: usize,
        y: &mut [T],
        dout: &[T],
        out: &[T],
        cell: &[u8],
        maps: &[ChannelMap<T>],
        (mean, var): (&[T], &[T]),
        (gamma, dgamma, dbeta): (&[T], &mut [T], &mut [T]),
        ws: &mut Workspace,
    ) {
        let of = self.channels(images);
        let out_plane = self.output[1] * self.output[2];
        let (y, dgamma, dbeta) = (Disjoint::new(y), Disjoint::new(dgamma), Disjoint::new(dbeta));
        let (_, scratch) = ws.lend(0, of.plane);
        for_each_piece(of.channels, |c| {
            scratch.with(|dz: &mut [T]| {
                vectorized!({
                    let dz_of = |n: usize, y: &[T], dz: &mut [T]| {
                        let start = (n * of.channels + c) * out_plane;
                        let here = start..start + out_plane;
                        let cell = if self.tail.keeps_cells() { &cell[here.clone()] } else { &[] };
                        self.tail.backward(maps[c], &dout[here.clone()], &out[here], cell, y, dz);
                    };
                    // SAFETY: a piece owns the planes of its channel.
                    let y_of = |plane: std::ops::Range<usize>| unsafe { y.slice(plane.start, plane.len()) };
                    let Some(norm) = self.parts.norm else {
                        for (n, plane) in of.planes(c).enumerate() {
                            let y = y_of(plane);
                            dz_of(n, y, dz);
                            y.copy_from_slice(dz);
                        }
                        return;
                    };
                    let inverse_std = inverse_std(var[c], norm.eps);
                    let (mut total, mut total_xhat) = (0.0, 0.0);
                    for (n, plane) in of.planes(c).enumerate() {
                        let y = y_of(plane);
                        dz_of(n, y, dz);
                        let sums = gradient_sums(dz, y, mean[c], inverse_std);
                        total += sums.0;
                        total_xhat += sums.1;
                    }
                    let gradient = ChannelGradient::new(of, mean[c], inverse_std, gamma[c], (total, total_xhat));
                    for (n, plane) in of.planes(c).enumerate() {
                        let y = y_of(plane);
                        // made again: cheaper than keeping it
                        dz_of(n, y, dz);
                        y.iter_mut().zip(&*dz).for_each(|(y, &dz)| *y = gradient.dx(dz, *y));
                    }
                    // SAFETY: a piece owns its channel.
                    unsafe {
                        dgamma.slice(c, 1)[0] = T::of(total_xhat);
                        dbeta.slice(c, 1)[0] = T::of(total);
                    }
                },);
            });
        });
    }

    /// Gradient of [`Block::finish_flat`]: `dout` becomes the gradient of the product `y`.
    fn flat_gradient<T: Element>(
        &self,
        of: Channels,
        y: &[T],
        dout: &mut [T],
        out: &[T],
        maps: &[ChannelMap<T>],
        (mean, var): (&[T], &[T]),
        (gamma, dgamma, dbeta): (&[T], &mut [T], &mut [T]),
        dy: &mut Buffer<T>,
    ) {
        if self.tail.activation().is_some() {
            for_each_chunk_mut(dout, of.channels, |n, dout| {
                let row = n * of.channels..(n + 1) * of.channels;
                vectorized!({
                    for (((dout, &out), &y), &map) in dout.iter_mut().zip(&out[row.clone()]).zip(&y[row]).zip(maps) {
                        *dout *= self.tail.slope_of(map, y, out);
                    }
                },);
            });
        }
        if let Some(norm) = self.parts.norm {
            dy.reserve(dout.len());
            let dy = &mut dy[..dout.len()];
            train_backward_into(of, dout, y, gamma, norm.eps, mean, var, dy, dgamma, dbeta);
            dout.copy_from_slice(dy);
        }
    }
}
