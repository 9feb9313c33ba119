//! Level 4. What blocks are made of.

use crate::ops::activation::Activation;
use crate::ops::batchnorm::BatchNorm;
use crate::ops::dropout::DropoutKey;
use crate::ops::{affine, conv};
use crate::shape::{Conv2d, Pool2d};

/// The product at the head of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Core {
    /// Convolution with `filters` filters of `kernel` (height, width) pixels.
    Conv {
        /// Filters: output channels.
        filters: usize,
        /// Filter size in pixels (height, width).
        kernel: (usize, usize),
        /// Stride, padding, dilation, groups, algorithm.
        conv: Conv2d,
    },
    /// Convolution without padding by filters of `size` x `size` pixels that stay as they are: as many as a patch has values,
    /// and their negatives.
    Whiten {
        /// Height and width of a filter in pixels.
        size: usize,
        /// Pixels from one patch to the next, down and across.
        stride: (usize, usize),
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
    /// Max pooling of a convolution before batchnorm, by windows that tile it: there is a quarter left to normalise.
    pub early_pool: Option<Pool2d>,
    /// Batch normalisation, per channel.
    pub norm: Option<BatchNorm>,
    /// Whether its scale stays as it is.
    pub fixed_scale: bool,
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

impl Pass {
    /// A training pass, where it does not matter which masks dropout has in it.
    pub(crate) const TRAIN: Pass = Pass::Train(DropoutKey { seed: 0, step: 0, layer: 0 });
}

/// The weights of a block's product as it takes them: for calls that use them again and again.
#[derive(Debug)]
pub enum Prepared<T> {
    /// Filters, for the plan of the convolution.
    Filters(conv::Prepared<T>),
    /// The matrix of an affine layer.
    Matrix(affine::Prepared<T>),
}

/// What both passes of a block read.
#[derive(Debug)]
pub struct BlockInput<'a, T> {
    /// Images `N`.
    pub images: usize,
    /// The input `[N, C, H, W]`.
    pub x: &'a [T],
    /// The parameters.
    pub weights: Weights<&'a [T]>,
    /// The weights w as [`Block::prepare`](super::Block::prepare) made them, if that was done.
    pub prepared: Option<&'a Prepared<T>>,
    /// Batchnorm's running mean and variance, which test mode normalises with; empty without batchnorm.
    pub running: (&'a [T], &'a [T]),
}

/// The gradients of a block: of its output, and where the others go, which are set, not added to.
#[derive(Debug)]
pub struct BlockGrads<'a, T> {
    /// Of the output `[N, C', H', W']`; used up.
    pub dout: &'a mut [T],
    /// Of the input, if anybody wants it.
    pub dx: Option<&'a mut [T]>,
    /// Of the parameters. `w` and `b` are empty where nobody wants them, which saves their products.
    pub weights: Weights<&'a mut [T]>,
}
