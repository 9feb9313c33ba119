//! Level 4. One block: its sizes and its memory.

use super::parts::{BlockInput, BlockParts, Core, Pass, Pool, Prepared, Weights};
use super::tail::{ChannelMap, Pooling, Tail};
use crate::element::{Element, Kind};
use crate::error::{Error, Result};
use crate::ops::activation::Activation;
use crate::ops::affine::{self, AffineShape};
use crate::ops::batchnorm::{ChannelGradient, Channels, update_running};
use crate::ops::conv::{ConvPlan, Filters};
use crate::ops::layout::{Formats, MemoryFormat};
use crate::shape::{Conv2d, Conv2dShape, Padding, Pool2dShape, check_elements};
use crate::simd::{LANES, Lanes};
use crate::workspace::Buffer;

/// A block for images of one size.
#[derive(Clone, Debug)]
pub struct Block {
    parts: BlockParts,
    pub(super) head: Head,
    /// The pool before batchnorm; sizes for one image.
    pub(super) early: Option<Pool2dShape>,
    pub(super) tail: Tail,
    /// Input `[C, H, W]`.
    input: [usize; 3],
    /// After product and early pool, `[C, H, W]`, as far as it is computed; `[M, 1, 1]` after an affine layer.
    pub(super) product: [usize; 3],
    /// Output `[C, H, W]`.
    pub(super) output: [usize; 3],
    /// How input and output lie in test mode.
    pub(super) formats: Formats,
    /// How they lie in training.
    pub(super) training: Formats,
    /// Whether the product lies in blocks of channels in training.
    pub(super) trains_in_blocks: bool,
}

/// The product with its sizes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Head {
    None,
    Conv(ConvPlan),
    Affine { inputs: usize, outputs: usize },
}

/// What a block remembers from forward to backward, for a number of images, apart from its output.
#[derive(Debug)]
pub struct BlockState<T> {
    /// The product (without its bias, after the early pool), where backward or a second pass needs it; then its gradient, unless
    /// that is made on the way into the products.
    pub(super) y: Buffer<T>,
    /// Gradient of the product, or of what batchnorm made of it, where it cannot take the place of `y`.
    pub(super) dy: Buffer<T>,
    /// Where the maxima of the pool, and of the early pool, were.
    pub(super) cell: Buffer<u8>,
    pub(super) early_cell: Buffer<u8>,
    pub(super) mask: Buffer<u8>,
    /// Batch statistics, per channel.
    pub(super) mean: Vec<T>,
    pub(super) var: Vec<T>,
    pub(super) maps: Vec<ChannelMap<T>>,
    /// What batchnorm's gradient is made from, per channel; empty without batchnorm.
    pub(super) norms: Vec<ChannelGradient<T>>,
    /// Sums over the pixels of some images, where the product lies in blocks of channels.
    pub(super) sums: Vec<[Lanes<f64>; 2]>,
}

impl<T: Element> BlockState<T> {
    /// Memory of nothing yet.
    pub fn new() -> Self {
        BlockState {
            y: Buffer::default(),
            dy: Buffer::default(),
            cell: Buffer::default(),
            early_cell: Buffer::default(),
            mask: Buffer::default(),
            mean: Vec::new(),
            var: Vec::new(),
            maps: Vec::new(),
            norms: Vec::new(),
            sums: Vec::new(),
        }
    }
}

impl<T: Element> Default for BlockState<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl Block {
    /// A block for images `[C, H, W]` and elements of type `T`.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Shape`] if a filter or window does not fit, a constant makes no sense, or an algorithm
    /// is not for this type.
    pub fn new<T: Element>(parts: BlockParts, input: [usize; 3]) -> Result<Self> {
        if input.contains(&0) {
            return Err(Error::invalid(
                "block",
                format!("an input {input:?} has no values"),
                "give at least 1 of each",
            ));
        }
        check_constants(&parts)?;
        let (head, product) = head::<T>(&parts, input)?;
        let (early, product) = match (parts.early_pool, head) {
            (None, _) => (None, product),
            (Some(pool), Head::Conv(_)) if parts.norm.is_some() => {
                let shape = early_pool(&pool, product)?;
                (Some(shape), [product[0], shape.rows.output, shape.cols.output])
            }
            (Some(_), _) => {
                let problem =
                    "an early pool stands between a convolution and batchnorm, and this block lacks one of them";
                return Err(Error::invalid("block", problem, "pool at the end of the block"));
            }
        };
        let [channels, rows, cols] = product;
        let pool = match parts.pool {
            None => None,
            Some(Pool::Max(pool)) => Some(Tail::max_pool(&pool, product)?),
            Some(Pool::Avg(pool)) => Some(Pooling::Avg(Pool2dShape::new([1, channels, rows, cols], &pool)?)),
            Some(Pool::GlobalAvg) => Some(Pooling::Global),
        };
        let tail = Tail::new(parts.activation, pool, rows, cols);
        let (out_rows, out_cols) = tail.out_size();
        let (output, formats) = ([channels, out_rows, out_cols], Formats::default());
        let (training, trains_in_blocks) = (formats, false);
        let mut block = Block { parts, head, early, tail, input, product, output, formats, training, trains_in_blocks };
        if let (Head::Conv(plan), Some(rows)) = (head, block.band()) {
            block.head = Head::Conv(plan.with_bands(rows));
        }
        block.trains_in_blocks = block.may_train_in_blocks::<T>();
        Ok(block)
    }

    /// Whether its input, and whether its output, may lie in blocks of channels in test mode; and whether both have to, or
    /// neither.
    pub(crate) fn may_be_blocked<T: Element>(&self) -> ([bool; 2], bool) {
        match self.head {
            Head::Conv(plan) => {
                let [input, output] = [self.input[0], self.product[0]].map(|planes| planes.is_multiple_of(LANES));
                let may_be = plan.may_be_blocked();
                ([may_be && input, may_be && output && self.early.is_none()], false)
            }
            Head::None => ([T::KIND == Kind::F32 && self.input[0].is_multiple_of(LANES); 2], true),
            Head::Affine { .. } => ([self.input[0].is_multiple_of(LANES), false], false),
        }
    }

    /// Has it take its input and make its output in these formats, in test mode, where [`Block::may_be_blocked`].
    pub(crate) fn set_formats(&mut self, formats: Formats) {
        if let Head::Conv(plan) = &mut self.head {
            *plan = plan.with_formats(formats);
        }
        self.formats = formats;
    }

    /// Elements of an image's input and output, as they lie in this pass.
    pub(crate) fn lens(&self, pass: Pass) -> [usize; 2] {
        let Formats { input, output } = match pass {
            Pass::Train(_) => self.training,
            Pass::Test => self.formats,
        };
        [input.image_len(self.input), output.image_len(self.output)]
    }

    /// Whether what follows the product finds its planes in blocks.
    pub(super) fn finishes_blocks(&self) -> bool {
        let format = if matches!(self.head, Head::None) { self.formats.input } else { self.formats.output };
        format == MemoryFormat::Blocked
    }

    /// Whether the pool's argmax cells are kept in test mode, too: in blocks nobody asks for them.
    pub(super) fn keeps_cells(&self) -> bool {
        self.tail.keeps_cells() && !self.finishes_blocks()
    }

    /// Puts the rows of an affine layer's weights `w` in the order of an input that lies in blocks of channels.
    pub(crate) fn order_inputs<T: Element>(&self, w: &mut [T]) {
        let (Head::Affine { outputs, .. }, MemoryFormat::Blocked) = (self.head, self.formats.input) else { return };
        let (planar, plane) = (w.to_vec(), self.input[1] * self.input[2]);
        for (row, w) in w.chunks_exact_mut(outputs).enumerate() {
            let (block, pixel, lane) = (row / (LANES * plane), row / LANES % plane, row % LANES);
            w.copy_from_slice(&planar[((block * LANES + lane) * plane + pixel) * outputs..][..outputs]);
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

    /// Elements of one image's input.
    pub fn input_len(&self) -> usize {
        self.input.iter().product()
    }

    /// Elements of one image's output.
    pub fn output_len(&self) -> usize {
        self.output.iter().product()
    }

    pub(super) fn product_len(&self) -> usize {
        self.product.iter().product()
    }

    /// Shapes of the parameters; empty where there is none.
    pub fn weight_shapes(&self) -> Weights<Vec<usize>> {
        let per_channel = |there: bool| if there { vec![self.product[0]] } else { Vec::new() };
        Weights {
            w: match self.head {
                Head::None => Vec::new(),
                Head::Conv(plan) => plan.shape().w().to_vec(),
                Head::Affine { inputs, outputs } => vec![inputs, outputs],
            },
            b: per_channel(self.parts.bias && self.parts.core.is_some()),
            gamma: per_channel(self.parts.norm.is_some()),
            beta: per_channel(self.parts.norm.is_some()),
        }
    }

    /// Which parameters stay as they are.
    pub fn fixed(&self) -> Weights<bool> {
        let w = matches!(self.parts.core, Some(Core::Whiten { .. }));
        Weights { w, b: false, gamma: self.parts.fixed_scale, beta: false }
    }

    /// Multiplies the weights `w` so that channel `c` of the product is `scale[c]` times what it was.
    pub fn scale_outputs<T: Element>(&self, w: &mut [T], scale: &[T]) {
        match self.head {
            Head::None => {}
            Head::Conv(plan) => {
                for (filter, &scale) in w.chunks_exact_mut(plan.shape().column()).zip(scale) {
                    filter.iter_mut().for_each(|w| *w *= scale);
                }
            }
            Head::Affine { outputs, .. } => {
                for row in w.chunks_exact_mut(outputs) {
                    row.iter_mut().zip(scale).for_each(|(w, &scale)| *w *= scale);
                }
            }
        }
    }

    /// The weights `w` as the product wants them, for calls that use them again and again; `None` where that is as they are.
    ///
    /// # Panics
    /// If `w` has not the length of its shape.
    pub fn prepare<T: Element>(&self, w: &[T]) -> Option<Prepared<T>> {
        match self.head {
            Head::None => None,
            Head::Conv(plan) => Some(Prepared::Filters(plan.prepare(w))),
            Head::Affine { inputs, outputs } => affine::Prepared::new(inputs, outputs, w).map(Prepared::Matrix),
        }
    }

    /// Has it run as is fastest where its weights are used for no more than `images` images at a time.
    pub(crate) fn set_images(&mut self, images: usize) {
        if let Head::Conv(plan) = &mut self.head {
            *plan = plan.for_images(images);
        }
    }

    /// Elements of scratch that a piece of its product takes in test mode for so many images; `None` where fewer never take more.
    pub(crate) fn scratch_len(&self, images: usize) -> Option<usize> {
        match self.head {
            Head::None | Head::Affine { .. } => None,
            Head::Conv(plan) => Some(plan.scratch_len(images)),
        }
    }

    /// The sizes of its affine layer for `images` images, if it has one and nothing but what [`Block::backward`] goes through
    /// in place: with no gradient of x and w asked for, that leaves the gradient of the product in `dout`.
    pub(crate) fn affine(&self, images: usize) -> Option<AffineShape> {
        match self.head {
            Head::Affine { inputs, outputs } if self.is_flat() => Some(affine_shape(images, inputs, outputs)),
            _ => None,
        }
    }

    /// The sizes of its convolution for one image, if it has one: of all of its output, whatever the pool makes of it.
    pub(crate) fn conv_shape(&self) -> Option<Conv2dShape> {
        convolution(&self.parts, self.input).expect("its sizes were checked when the block was made")
    }

    /// Multiply-adds of one image's forward pass, by the definition of its product.
    pub fn multiply_adds(&self) -> usize {
        match self.head {
            Head::Affine { inputs, outputs } => inputs * outputs,
            Head::None | Head::Conv(_) => self.conv_shape().map_or(0, |shape| shape.flops() / 2),
        }
    }

    /// Updates batchnorm's running statistics with those of the last training pass over `state`; `bias` is the product's.
    /// Apart from [`Block::forward`], so that a step that turns out to be worthless leaves no trace.
    ///
    /// # Panics
    /// If a slice does not have an element for each channel.
    pub fn commit<T: Element>(&self, bias: &[T], state: &BlockState<T>, (mean, var): (&mut [T], &mut [T])) {
        let Some(norm) = self.parts.norm else { return };
        assert_eq!([mean.len(), var.len()], [self.product[0]; 2], "running statistics have one element per channel");
        update_running(mean, &state.mean, norm.momentum);
        update_running(var, &state.var, norm.momentum);
        // `mean` is that of the product without its bias
        for (mean, &bias) in mean.iter_mut().zip(bias) {
            *mean += T::of(1.0 - norm.momentum) * bias;
        }
    }

    /// If planes of the product can be finished in bands of rows: what their height must be a multiple of.
    pub(super) fn band(&self) -> Option<usize> {
        match (self.early, self.tail.band_rows()) {
            (Some(pool), _) => Some(pool.rows.window),
            (None, rows) => rows,
        }
    }

    /// Whether the tiles of the convolution can be finished one by one, with per-channel maps known beforehand.
    pub(super) fn fuses(&self, pass: Pass) -> bool {
        let maps_known = pass == Pass::Test || (self.parts.norm.is_none() && !self.tail.backward_needs_y());
        let one_pool = self.early.is_none() || !self.tail.has_pool();
        matches!(self.head, Head::Conv(_)) && self.band().is_some() && maps_known && one_pool
    }

    pub(super) fn channels(&self, images: usize) -> Channels {
        Channels { images, channels: self.product[0], plane: self.product[1] * self.product[2] }
    }

    pub(super) fn out_plane(&self) -> usize {
        self.output[1] * self.output[2]
    }

    /// Whether the product is a row of features per sample: no planes to go through.
    pub(super) fn is_flat(&self) -> bool {
        self.product[1] * self.product[2] == 1 && !self.tail.has_pool()
    }

    /// Makes `state` large enough for `images` images.
    pub(super) fn reserve<T: Element>(&self, state: &mut BlockState<T>, images: usize, pass: Pass) {
        let train = pass != Pass::Test;
        let in_blocks = train && self.trains_in_blocks;
        let format = if in_blocks { MemoryFormat::Blocked } else { MemoryFormat::Planar };
        let [product, output] = [self.product, self.output].map(|size| images * format.image_len(size));
        if !self.fuses(pass) && !matches!(self.head, Head::None) {
            state.y.reserve(product);
        }
        if self.early.is_some() {
            state.early_cell.reserve(product);
        }
        if self.keeps_cells() || (train && self.tail.keeps_cells()) {
            state.cell.reserve(output);
        }
        if train && self.parts.dropout.is_some() {
            state.mask.reserve(images * self.output_len());
        }
        let channels = self.product[0];
        state.mean.resize(channels, T::zero());
        state.var.resize(channels, T::one());
        state.maps.resize(channels, ChannelMap::shift(T::zero()));
        if train {
            state.norms.resize(if self.parts.norm.is_some() { channels } else { 0 }, ChannelGradient::default());
        }
    }

    /// Panics unless every slice has the length of its shape, and an image of x `len` elements.
    #[track_caller]
    pub(super) fn assert_input<T>(&self, input: &BlockInput<'_, T>, len: usize) {
        assert_eq!(input.x.len(), input.images * len, "x holds {} images of {:?}", input.images, self.input);
        let Weights { w, b, gamma, beta } = input.weights;
        assert_eq!([w, b, gamma, beta].map(<[T]>::len), self.weight_lens(), "lengths of w, b, gamma, beta");
        let (mean, var) = input.running;
        assert_eq!([mean.len(), var.len()], [gamma.len(); 2], "running statistics have one element per channel");
    }

    /// Elements of w, b, gamma, beta.
    pub(super) fn weight_lens(&self) -> [usize; 4] {
        let per_channel = |there: bool| if there { self.product[0] } else { 0 };
        let w = match self.head {
            Head::None => 0,
            Head::Conv(plan) => plan.shape().w().iter().product(),
            Head::Affine { inputs, outputs } => inputs * outputs,
        };
        let norm = per_channel(self.parts.norm.is_some());
        [w, per_channel(self.parts.bias && self.parts.core.is_some()), norm, norm]
    }
}

/// The filters of a call.
pub(super) fn filters<'a, T>(input: &BlockInput<'a, T>) -> Filters<'a, T> {
    match input.prepared {
        Some(Prepared::Filters(filters)) => Filters::Prepared(filters),
        Some(Prepared::Matrix(_)) | None => Filters::Plain(input.weights.w),
    }
}

pub(super) fn affine_shape(samples: usize, inputs: usize, outputs: usize) -> AffineShape {
    AffineShape { samples, inputs, outputs }
}

/// The product of a block, and its size `[C, H, W]`, as far as it is computed.
fn head<T: Element>(parts: &BlockParts, input: [usize; 3]) -> Result<(Head, [usize; 3])> {
    if let Some(shape) = convolution(parts, input)? {
        let shape = seen_by_pool(parts, shape)?;
        let [_, channels, rows, cols] = shape.out();
        return Ok((Head::Conv(ConvPlan::new::<T>(&shape)?), [channels, rows, cols]));
    }
    let [c, h, w] = input;
    match parts.core {
        Some(Core::Affine { outputs: 0 }) => Err(Error::invalid("affine", "0 outputs", "give at least 1")),
        Some(Core::Affine { outputs }) => {
            check_elements("affine", &[c, h, w, outputs])?;
            Ok((Head::Affine { inputs: c * h * w, outputs }, [outputs, 1, 1]))
        }
        _ => Ok((Head::None, input)),
    }
}

/// The convolution of a block over one image, if it has one.
fn convolution(parts: &BlockParts, [c, h, w]: [usize; 3]) -> Result<Option<Conv2dShape>> {
    match parts.core {
        Some(Core::Conv { filters, kernel: (kh, kw), conv }) => {
            Conv2dShape::new([1, c, h, w], [filters, c / conv.groups.max(1), kh, kw], &conv).map(Some)
        }
        Some(Core::Whiten { size, stride }) => {
            check_elements("whitening", &[2, c, c, size, size, size, size])?;
            let valid = Conv2d { stride, padding: Padding::Valid, ..Conv2d::default() };
            Conv2dShape::new([1, c, h, w], [2 * c * size * size, c, size, size], &valid).map(Some)
        }
        Some(Core::Affine { .. }) | None => Ok(None),
    }
}

/// A convolution without those outputs that are there for the padding at the end of its input, and that no window of the pool
/// behind it sees, nor batchnorm's statistics: windows of 2 leave the last row of 31 out.
fn seen_by_pool(parts: &BlockParts, shape: Conv2dShape) -> Result<Conv2dShape> {
    let [_, channels, rows, cols] = shape.out();
    let pool = match (parts.early_pool, parts.norm, parts.pool) {
        (Some(pool), ..) => early_pool(&pool, [channels, rows, cols])?,
        (None, None, Some(Pool::Max(pool) | Pool::Avg(pool))) => Pool2dShape::new([1, channels, rows, cols], &pool)?,
        _ => return Ok(shape),
    };
    Ok(shape.trimmed(pool.rows.seen(), pool.cols.seen()))
}

fn early_pool(pool: &crate::shape::Pool2d, [c, h, w]: [usize; 3]) -> Result<Pool2dShape> {
    let shape = Pool2dShape::new([1, c, h, w], pool)?;
    shape.check_max()?;
    if shape.tiles() {
        return Ok(shape);
    }
    let problem = format!("windows of {:?} do not tile planes of {h} x {w}", pool.window);
    Err(Error::invalid("block", problem, "pool at the end of the block"))
}

fn check_constants(parts: &BlockParts) -> Result<()> {
    if let Some(norm) = &parts.norm {
        norm.check()?;
    }
    if let Some(Activation::LeakyRelu { slope }) = parts.activation
        && !(0.0..=1.0).contains(&slope)
    {
        // backward reads the sign of z off the output
        return Err(Error::invalid("leaky relu", format!("the slope is {slope}"), "give 0 to 1"));
    }
    if let Some(p) = parts.dropout
        && !(0.0..1.0).contains(&p)
    {
        return Err(Error::invalid("dropout", format!("the probability is {p}"), "give 0 or more and less than 1"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::batchnorm::BatchNorm;
    use crate::shape::Pool2d;

    /// What the pool leaves out is not computed, but where batchnorm sees it; sizes that are told are those of the definition.
    #[test]
    fn outputs_that_nobody_sees_are_not_computed() {
        let conv = Conv2d { padding: Padding::Same, ..Conv2d::default() };
        let parts =
            BlockParts { core: Some(Core::Conv { filters: 16, kernel: (3, 3), conv }), ..BlockParts::default() };
        let (pool, norm) = (Pool2d::square(2), Some(BatchNorm::USUAL));
        for (parts, want) in [
            (parts, [31, 15]),
            (BlockParts { pool: Some(Pool::Max(pool)), ..parts }, [30, 14]),
            (BlockParts { pool: Some(Pool::Avg(Pool2d::square(3))), ..parts }, [30, 15]),
            (BlockParts { pool: Some(Pool::GlobalAvg), ..parts }, [31, 15]),
            (BlockParts { pool: Some(Pool::Max(pool)), norm, ..parts }, [31, 15]),
            (BlockParts { early_pool: Some(pool), norm, ..parts }, [30, 14]),
        ] {
            let block = Block::new::<f32>(parts, [8, 31, 15]).unwrap();
            let Head::Conv(plan) = block.head else { panic!("a convolution") };
            let Conv2dShape { rows, cols, .. } = plan.shape();
            assert_eq!([rows.output, cols.output], want, "{parts:?}");
            assert_eq!(block.conv_shape().unwrap().out(), [1, 16, 31, 15]);
            assert_eq!(block.multiply_adds(), 16 * 31 * 15 * 8 * 9);
        }
    }
}
