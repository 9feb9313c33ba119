//! Level 4. The notation of networks: text to a list of layers, and back.

use crate::ops::activation::Activation;
use crate::shape::{Conv2d, Pool2d};

/// One layer, as the notation lists them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LayerSpec {
    /// Convolution with `filters` filters of `kernel` (height, width) pixels. Its bias is left out where batchnorm follows, which would cancel it.
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
    /// Batchnorm: spatial after a convolution, plain after an affine layer.
    BatchNorm,
    /// Pointwise nonlinearity.
    Activation(Activation),
    /// Max pooling.
    MaxPool(Pool2d),
    /// Average pooling.
    AvgPool(Pool2d),
    /// Average over all pixels of a channel: `(N, C, H, W)` to `(N, C)`.
    GlobalAvgPool,
    /// Inverted dropout.
    Dropout {
        /// Probability of dropping a value.
        p: f64,
    },
}

/// The loss at the end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LossSpec {
    /// Softmax cross-entropy with label smoothing (0 for none).
    Softmax {
        /// Weight of the uniform distribution in the target, 0 to 1.
        smoothing: f64,
    },
    /// Multiclass SVM hinge loss with margin 1.
    Svm,
}

/// A network without its sizes: layers and loss.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkSpec {
    /// The layers in order, repetitions unrolled.
    pub layers: Vec<LayerSpec>,
    /// The loss.
    pub loss: LossSpec,
}
