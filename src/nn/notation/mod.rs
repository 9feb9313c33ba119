//! Level 5. The notation of networks: text to a list of layers, and back.
//!
//! ```text
//! conv32k7-relu-pool-affine100-relu-affine10                                     CS231n's three-layer net
//! [conv32-relu-pool]x2 - conv64 - relu - [affine100-relu]x2 - affine10 - softmax
//! [conv32-bn-relu-conv32-bn-relu-pool]x3-[affine256-bn-relu-dropout0.5]-affine10-svm
//! conv16-bn-relu-[res[conv16-bn-relu-conv16-bn]-relu]x3-gap-affine10             a residual network
//! ```
//!
//! Layers are joined with `-`. A group `[...]` may be repeated by `xN` (also `×N`, `*N`; 1 to 1000 times) and may hold
//! groups. `res[...]` adds its input to what the layers inside make of it (He et al. 2016); where their sizes differ, the
//! input first goes through a 1x1 convolution and batchnorm (option B). Capitals do not matter; spaces are free around layers, `-`, brackets and `xN`, but not inside a layer.
//!
//! | layer | meaning |
//! | --- | --- |
//! | `conv32` | convolution with 32 filters of 3x3, stride 1, padding 'same' |
//! | `pool` (`maxpool`) | max pooling, 2x2 with stride 2; `pool3` is 3x3 with stride 3, `pool2x1` is 2 high and 1 wide |
//! | `avgpool` | average pooling, sizes as in `pool` |
//! | `gap` | global average pooling: one value per channel |
//! | `affine256` (`fc256`, `linear256`) | affine layer with 256 outputs |
//! | `bn` (`batchnorm`) | batchnorm; `bn0.6` has momentum 0.6, the weight of the old value in its running statistics |
//! | `whiten2` | first of all layers: convolution with fixed filters that [whiten](crate::nn::whitening) patches of 2x2 |
//! | `relu`, `silu`, `gelu` | activations |
//! | `leaky` (`leakyrelu`) | leaky ReLU of slope 0.01; `leaky0.1` has slope 0.1 |
//! | `res[...]` | residual: what the layers inside make, plus their input |
//! | `se16` | squeeze and excitation, with a hidden layer of 1/16 of the channels ([`SqueezeExcite`](crate::nn::layers::SqueezeExcite)) |
//! | `div256` | division by 256 ([`Divide`](crate::nn::layers::Divide)), such as of scores by the width that they are sums over |
//! | `dropout0.5` | dropout that drops with probability 0.5 |
//! | `softmax` | at the end: softmax cross-entropy, the default; `softmax0.1` smooths the labels by 0.1 |
//! | `svm` | at the end: multiclass SVM hinge loss |
//! | `softmaxsum`, `softmax0.1sum`, `svmsum` | at the end: the loss summed over the batch instead of its mean |
//!
//! Options follow the number of a layer, in any order: `conv64k7s2p3`, `conv32k3x5`, `pool3s2p1`, `bn0.9g0`. A size is
//! one number, or two as height x width.
//!
//! | option | of | meaning | default |
//! | --- | --- | --- | --- |
//! | `k5`, `k3x5` | conv | filter size | 3 |
//! | `s2`, `s2x1` | conv, whiten, pool | stride | pool its window, others 1 |
//! | `p1`, `p0x1x0x1`, `psame`, `pvalid` | conv, pool | padding: all sides, or top x bottom x left x right; `pvalid` is `p0` | conv `psame`, pool `p0` |
//! | `d2`, `d2x1` | conv | dilation | 1 |
//! | `g4` | conv | groups | 1 |
//! | `b0` | conv, affine | no bias; before batchnorm a convolution has none anyway | `b1` |
//! | `g0` | bn | the scale stays 1 and is not trained | `g1` |
//! | `e0.001` | bn | what is added to the variance | 0.00001 |
//! | `aim2col`, `awinograd`, `adepthwise` | conv | [algorithm](Algorithm) | chosen by the sizes |

mod names;
mod parser;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nn::layer::{self, AnyLayer};
use crate::ops::activation::Activation;
use crate::ops::batchnorm::BatchNorm;
use crate::shape::{Algorithm, Conv2d, Padding, Pool2d};

/// One layer, as the notation lists them.
#[derive(Clone, Debug)]
pub enum LayerSpec {
    /// Convolution with `filters` filters of `kernel` (height, width) pixels. Its bias is left out where batchnorm follows, which would cancel it.
    Conv {
        /// Filters: output channels.
        filters: usize,
        /// Filter size in pixels (height, width).
        kernel: (usize, usize),
        /// Stride, padding, dilation, groups.
        conv: Conv2d,
        /// Whether a bias is added, where batchnorm does not follow.
        bias: bool,
    },
    /// Convolution of the images with filters that whiten their patches of `size` x `size` pixels and are not trained, and a
    /// bias that is: see [`crate::nn::whitening`].
    Whiten {
        /// Height and width of a patch in pixels.
        size: usize,
        /// Pixels from one patch to the next, down and across.
        stride: (usize, usize),
    },
    /// Affine layer with this many outputs; flattens its input.
    Affine {
        /// Outputs `M`.
        outputs: usize,
        /// Whether a bias is added.
        bias: bool,
    },
    /// Batchnorm: spatial after a convolution, plain after an affine layer.
    BatchNorm {
        /// Its constants.
        norm: BatchNorm,
        /// Whether its scale stays 1 and is not trained.
        fixed_scale: bool,
    },
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
    /// What these layers make of their input, plus the input; where the sizes differ, plus a 1x1 convolution and batchnorm
    /// of the input.
    Residual(Vec<LayerSpec>),
    /// Any other layer: one of [`crate::nn::layers`], or the user's own.
    Layer(Arc<dyn AnyLayer>),
}

impl PartialEq for LayerSpec {
    /// Whether they are written alike.
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

impl LayerSpec {
    /// Batchnorm with the usual constants.
    pub const BATCH_NORM: Self = LayerSpec::BatchNorm { norm: BatchNorm::USUAL, fixed_scale: false };
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

/// What is made of the losses of a batch's images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Their mean.
    #[default]
    Mean,
    /// Their sum: a rate is then one per image, and a larger batch makes larger steps.
    Sum,
}

/// A network without its sizes: layers and loss. In serde formats it is its notation, a string.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NetworkSpec {
    /// The layers in order, repetitions unrolled.
    pub layers: Vec<LayerSpec>,
    /// The loss.
    pub loss: LossSpec,
    /// What is made of it over a batch.
    pub reduction: Reduction,
}

impl NetworkSpec {
    /// Reads the [notation](self).
    ///
    /// ```
    /// use gemmnet::nn::notation::NetworkSpec;
    ///
    /// let spec = NetworkSpec::parse("[conv32-relu-pool]x2 - affine10")?;
    /// assert_eq!(spec.to_string(), "conv32-relu-pool-conv32-relu-pool-affine10-softmax");
    ///
    /// let error = NetworkSpec::parse("con32-relu").unwrap_err();
    /// assert!(error.to_string().contains("did you mean `conv32`?"));
    /// # Ok::<(), gemmnet::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Notation`] with the character at fault. Whether the layers fit each other and an image is checked where
    /// a network is made from them.
    pub fn parse(text: &str) -> Result<Self> {
        parser::parse(text)
    }
}

impl FromStr for NetworkSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl TryFrom<String> for NetworkSpec {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text)
    }
}

impl From<NetworkSpec> for String {
    fn from(spec: NetworkSpec) -> Self {
        spec.to_string()
    }
}

/// The notation with repetitions unrolled, defaults left out and the loss named. It reads back as an equal network; the
/// one exception is `Padding::All(0)`, which becomes `Padding::Valid`.
impl fmt::Display for NetworkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", joined(&self.layers), self.loss)?;
        if self.reduction == Reduction::Sum { f.write_str(SUM) } else { Ok(()) }
    }
}

/// Layers as the notation joins them.
pub(super) fn joined(layers: &[LayerSpec]) -> String {
    layers.iter().map(LayerSpec::to_string).collect::<Vec<_>>().join("-")
}

impl fmt::Display for LayerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LayerSpec::Conv { filters, kernel, conv, bias } => {
                let Conv2d { stride, padding, dilation, groups, algorithm } = *conv;
                write!(f, "conv{filters}")?;
                write_option(f, "k", size(*kernel), size((3, 3)))?;
                write_option(f, "s", size(stride), size((1, 1)))?;
                write_option(f, "p", sides(padding), sides(Padding::Same))?;
                write_option(f, "d", size(dilation), size((1, 1)))?;
                write_option(f, "g", groups.to_string(), 1.to_string())?;
                let name = ALGORITHMS.iter().find(|(_, a)| *a == algorithm).map_or("", |(name, _)| name);
                write_option(f, "a", name.into(), String::new())?;
                write_option(f, "b", u8::from(*bias).to_string(), 1.to_string())
            }
            LayerSpec::Whiten { size: side, stride } => {
                write!(f, "whiten{side}")?;
                write_option(f, "s", size(*stride), size((1, 1)))
            }
            LayerSpec::MaxPool(pool) => write_pool(f, "pool", *pool),
            LayerSpec::AvgPool(pool) => write_pool(f, "avgpool", *pool),
            LayerSpec::GlobalAvgPool => f.write_str("gap"),
            LayerSpec::Affine { outputs, bias } => {
                write!(f, "affine{outputs}")?;
                write_option(f, "b", u8::from(*bias).to_string(), 1.to_string())
            }
            LayerSpec::BatchNorm { norm, fixed_scale } => write_batchnorm(f, norm, *fixed_scale),
            LayerSpec::Activation(activation) => activation.fmt(f),
            LayerSpec::Dropout { p } => write!(f, "dropout{p}"),
            LayerSpec::Residual(layers) => write!(f, "res[{}]", joined(layers)),
            LayerSpec::Layer(layer) => f.write_str(&layer::notation(&**layer)),
        }
    }
}

impl fmt::Display for LossSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            LossSpec::Softmax { smoothing: 0.0 } => f.write_str("softmax"),
            LossSpec::Softmax { smoothing } => write!(f, "softmax{smoothing}"),
            LossSpec::Svm => f.write_str("svm"),
        }
    }
}

fn write_batchnorm(f: &mut fmt::Formatter<'_>, norm: &BatchNorm, fixed_scale: bool) -> fmt::Result {
    f.write_str("bn")?;
    // Options follow a number, so the momentum is only left out where everything is.
    if *norm == BatchNorm::USUAL && !fixed_scale {
        return Ok(());
    }
    write!(f, "{}", norm.momentum)?;
    write_option(f, "e", norm.eps.to_string(), BatchNorm::USUAL.eps.to_string())?;
    write_option(f, "g", u8::from(!fixed_scale).to_string(), 1.to_string())
}

fn write_pool(f: &mut fmt::Formatter<'_>, name: &str, pool: Pool2d) -> fmt::Result {
    let Pool2d { window, stride, padding } = pool;
    // Options follow a number, so the window is only left out where everything is.
    let window = if pool == Pool2d::square(2) { String::new() } else { size(window) };
    write!(f, "{name}{window}")?;
    write_option(f, "s", size(stride), size(pool.window))?;
    write_option(f, "p", sides(padding), sides(Padding::Valid))
}

fn write_option(f: &mut fmt::Formatter<'_>, letter: &str, value: String, default: String) -> fmt::Result {
    if value == default { Ok(()) } else { write!(f, "{letter}{value}") }
}

fn size((height, width): (usize, usize)) -> String {
    if height == width { height.to_string() } else { format!("{height}x{width}") }
}

fn sides(padding: Padding) -> String {
    match padding {
        Padding::Same => "same".to_string(),
        Padding::Valid => 0.to_string(),
        Padding::All(cells) => cells.to_string(),
        Padding::Sides { top, bottom, left, right } => format!("{top}x{bottom}x{left}x{right}"),
    }
}

/// What follows the loss that is summed over the batch.
const SUM: &str = "sum";

/// Names of the algorithms that a convolution may ask for; without one it is [`Algorithm::Auto`].
const ALGORITHMS: [(&str, Algorithm); 3] =
    [("im2col", Algorithm::Im2col), ("winograd", Algorithm::Winograd), ("depthwise", Algorithm::Depthwise)];

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
