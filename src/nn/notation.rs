//! Level 4. The notation of networks: text to a list of layers, and back.
//!
//! ```text
//! conv32k7-relu-pool-affine100-relu-affine10                                     the seed's three-layer net
//! [conv32-relu-pool]x2 - conv64 - relu - [affine100-relu]x2 - affine10 - softmax
//! [conv32-bn-relu-conv32-bn-relu-pool]x3-[affine256-bn-relu-dropout0.5]-affine10-svm
//! ```
//!
//! Layers are joined with `-`. A group `[...]` may be repeated by `xN` (also `×N`, `*N`; 1 to 1000 times) and may hold
//! groups. Capitals do not matter; spaces are free around layers, `-`, brackets and `xN`, but not inside a layer.
//!
//! | layer | meaning |
//! | --- | --- |
//! | `conv32` | convolution with 32 filters of 3x3, stride 1, padding 'same' |
//! | `pool` (`maxpool`) | max pooling, 2x2 with stride 2; `pool3` is 3x3 with stride 3, `pool2x1` is 2 high and 1 wide |
//! | `avgpool` | average pooling, sizes as in `pool` |
//! | `gap` | global average pooling: one value per channel |
//! | `affine256` (`fc256`, `linear256`) | affine layer with 256 outputs |
//! | `bn` (`batchnorm`) | batchnorm |
//! | `relu`, `silu`, `gelu` | activations |
//! | `leaky` (`leakyrelu`) | leaky ReLU of slope 0.01; `leaky0.1` has slope 0.1 |
//! | `dropout0.5` | dropout that drops with probability 0.5 |
//! | `softmax` | at the end: softmax cross-entropy, the default; `softmax0.1` smooths the labels by 0.1 |
//! | `svm` | at the end: multiclass SVM hinge loss |
//!
//! Options follow the number of a convolution or pool, in any order: `conv64k7s2p3`, `conv32k3x5`, `pool3s2p1`. A size is
//! one number, or two as height x width.
//!
//! | option | of | meaning | default |
//! | --- | --- | --- | --- |
//! | `k5`, `k3x5` | conv | filter size | 3 |
//! | `s2`, `s2x1` | conv, pool | stride | conv 1, pool its window |
//! | `p1`, `p0x1x0x1`, `psame`, `pvalid` | conv, pool | padding: all sides, or top x bottom x left x right; `pvalid` is `p0` | conv `psame`, pool `p0` |
//! | `d2`, `d2x1` | conv | dilation | 1 |
//! | `g4` | conv | groups | 1 |

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ops::activation::Activation;
use crate::shape::{Algorithm, Conv2d, Padding, Pool2d};

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

/// A network without its sizes: layers and loss. In serde formats it is its notation, a string.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NetworkSpec {
    /// The layers in order, repetitions unrolled.
    pub layers: Vec<LayerSpec>,
    /// The loss.
    pub loss: LossSpec,
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
        let mut parser = Parser { text, chars: text.chars().map(|c| c.to_ascii_lowercase()).collect(), at: 0 };
        let mut layers = Vec::new();
        let mut loss = None;
        // Groups that are open: where their bracket is, and their first layer.
        let mut groups = Vec::new();
        if text.trim().is_empty() {
            return Err(parser.fault(0, "the notation is empty", "list the layers, such as conv32-relu-pool-affine10"));
        }
        loop {
            while parser.symbol("[") {
                groups.push((parser.at - 1, layers.len()));
            }
            if loss.is_some() {
                return Err(parser.fault(parser.at, "something follows the loss", "end with the loss"));
            }
            let start = parser.at;
            match parser.item()? {
                Item::Layer(layer) => layers.push(layer),
                Item::Loss(_) if layers.is_empty() => {
                    return Err(parser.fault(start, "no layer comes before the loss", "begin with the layers"));
                }
                Item::Loss(l) => loss = Some(l),
            }
            while parser.symbol("]") {
                let bracket = parser.at - 1;
                let Some((_, first)) = groups.pop() else {
                    return Err(parser.fault(
                        bracket,
                        "this `]` closes no group",
                        "remove it, or open the group with `[`",
                    ));
                };
                let times = if parser.symbol(TIMES) {
                    parser.skip_spaces();
                    parser.number(1..=MAX_REPEAT, "give the number of repetitions, such as [relu]x2")?
                } else {
                    1
                };
                if times > 1 && loss.is_some() {
                    return Err(parser.fault(bracket, "the repeated group holds the loss", "put the loss after it"));
                }
                let group = first..layers.len();
                if layers.len() + (times - 1) * group.len() > MAX_LAYERS {
                    let problem = format!("the network grows to more than {MAX_LAYERS} layers");
                    return Err(parser.fault(bracket, problem, "repeat less"));
                }
                for _ in 1..times {
                    layers.extend_from_within(group.clone());
                }
            }
            match parser.peek() {
                None => break,
                Some('-') => parser.at += 1,
                Some(c) => {
                    let problem = format!("`{c}` follows a complete layer");
                    return Err(parser.fault(parser.at, problem, joining(c)));
                }
            }
        }
        if let Some((bracket, _)) = groups.pop() {
            return Err(parser.fault(bracket, "this `[` is never closed", "close the group with `]`"));
        }
        Ok(NetworkSpec { layers, loss: loss.unwrap_or(LossSpec::Softmax { smoothing: 0.0 }) })
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
        for layer in &self.layers {
            write!(f, "{layer}-")?;
        }
        self.loss.fmt(f)
    }
}

impl fmt::Display for LayerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            LayerSpec::Conv { filters, kernel, conv } => {
                let Conv2d { stride, padding, dilation, groups, algorithm: _ } = conv;
                write!(f, "conv{filters}")?;
                write_option(f, "k", size(kernel), size((3, 3)))?;
                write_option(f, "s", size(stride), size((1, 1)))?;
                write_option(f, "p", sides(padding), sides(Padding::Same))?;
                write_option(f, "d", size(dilation), size((1, 1)))?;
                write_option(f, "g", groups.to_string(), 1.to_string())
            }
            LayerSpec::MaxPool(pool) => write_pool(f, "pool", pool),
            LayerSpec::AvgPool(pool) => write_pool(f, "avgpool", pool),
            LayerSpec::GlobalAvgPool => f.write_str("gap"),
            LayerSpec::Affine { outputs } => write!(f, "affine{outputs}"),
            LayerSpec::BatchNorm => f.write_str("bn"),
            LayerSpec::Activation(activation) => activation.fmt(f),
            LayerSpec::Dropout { p } => write!(f, "dropout{p}"),
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

/// The characters that may stand before the number of repetitions.
const TIMES: &str = "x×*";
/// How often one group may be repeated.
const MAX_REPEAT: usize = 1000;
/// Groups in groups multiply: this many layers are a mistake, not a network.
const MAX_LAYERS: usize = 10_000;
/// The largest size; keeps what is computed from sizes far from the machine's limits.
const MAX_SIZE: usize = 1_000_000;

/// Every name but those of the activations, to suggest the nearest one.
const NAMES: [&str; 13] = [
    "conv",
    "pool",
    "maxpool",
    "avgpool",
    "gap",
    "affine",
    "fc",
    "linear",
    "bn",
    "batchnorm",
    "dropout",
    "softmax",
    "svm",
];

/// What stands between two `-`.
enum Item {
    Layer(LayerSpec),
    Loss(LossSpec),
}

/// The options of a convolution or pool, as far as they are given.
#[derive(Default)]
struct Options {
    kernel: Option<(usize, usize)>,
    stride: Option<(usize, usize)>,
    padding: Option<Padding>,
    dilation: Option<(usize, usize)>,
    groups: Option<usize>,
}

/// Reads from left to right; `at` is the character to read next.
struct Parser<'a> {
    text: &'a str,
    chars: Vec<char>,
    at: usize,
}

impl Parser<'_> {
    fn fault(&self, position: usize, problem: impl Into<String>, fix: impl Into<String>) -> Error {
        // On one line, so that the message is one line and its pointer points.
        let notation = self.text.replace(char::is_whitespace, " ");
        Error::Notation { notation, position, problem: problem.into(), fix: fix.into() }
    }

    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    /// The longest run of characters that `belong`.
    fn take(&mut self, belongs: impl Fn(char) -> bool) -> String {
        let run: String = self.chars[self.at..].iter().copied().take_while(|&c| belongs(c)).collect();
        self.at += run.chars().count();
        run
    }

    fn skip_spaces(&mut self) {
        self.take(char::is_whitespace);
    }

    /// Skips spaces, then one of `symbols` if it is there.
    fn symbol(&mut self, symbols: &str) -> bool {
        self.skip_spaces();
        let found = self.peek().is_some_and(|c| symbols.contains(c));
        self.at += usize::from(found);
        found
    }

    /// Skips `word` if it comes next.
    fn word(&mut self, word: &str) -> bool {
        let found = word.chars().eq(self.chars[self.at..].iter().copied().take(word.len()));
        self.at += if found { word.len() } else { 0 };
        found
    }

    /// A layer or a loss.
    fn item(&mut self) -> Result<Item> {
        let start = self.at;
        let name = self.take(|c| c.is_ascii_alphabetic());
        if name.is_empty() {
            let problem = match self.peek() {
                Some(c) => format!("`{c}` where a layer should be"),
                None => "a layer is missing at the end".to_string(),
            };
            return Err(self.fault(start, problem, "name a layer, such as relu"));
        }
        Ok(Item::Layer(match name.as_str() {
            "conv" => {
                let filters = self.number(1..=MAX_SIZE, "give the number of filters, such as conv32")?;
                let options = self.options("conv", "kspdg")?;
                let conv = Conv2d {
                    stride: options.stride.unwrap_or((1, 1)),
                    padding: options.padding.unwrap_or(Padding::Same),
                    dilation: options.dilation.unwrap_or((1, 1)),
                    groups: options.groups.unwrap_or(1),
                    algorithm: Algorithm::Auto,
                };
                LayerSpec::Conv { filters, kernel: options.kernel.unwrap_or((3, 3)), conv }
            }
            "pool" | "maxpool" => LayerSpec::MaxPool(self.pool(&name)?),
            "avgpool" => LayerSpec::AvgPool(self.pool(&name)?),
            "gap" => LayerSpec::GlobalAvgPool,
            "affine" | "fc" | "linear" => LayerSpec::Affine {
                outputs: self.number(1..=MAX_SIZE, "give the number of outputs, such as affine100")?,
            },
            "bn" | "batchnorm" => LayerSpec::BatchNorm,
            "dropout" => {
                let fix = "give the probability of dropping, at least 0 and less than 1, such as dropout0.5";
                LayerSpec::Dropout { p: self.fraction(|p| p < 1.0, fix)? }
            }
            "softmax" if self.at_number() => {
                let smoothing = self.fraction(|s| s <= 1.0, "smooth the labels by 0 to 1, such as softmax0.1")?;
                return Ok(Item::Loss(LossSpec::Softmax { smoothing }));
            }
            "softmax" => return Ok(Item::Loss(LossSpec::Softmax { smoothing: 0.0 })),
            "svm" => return Ok(Item::Loss(LossSpec::Svm)),
            _ => match Activation::named(&name) {
                Some(Activation::LeakyRelu { .. }) if self.at_number() => {
                    let slope = self.fraction(|s| s <= 1.0, "give a slope of 0 to 1, such as leaky0.1")?;
                    LayerSpec::Activation(Activation::LeakyRelu { slope })
                }
                Some(activation) => LayerSpec::Activation(activation),
                None => return Err(self.unknown(start, &name)),
            },
        }))
    }

    /// What follows the name of a pool.
    fn pool(&mut self, name: &str) -> Result<Pool2d> {
        let window = if self.at_number() { self.size()? } else { (2, 2) };
        let options = self.options(name, "sp")?;
        let (stride, padding) = (options.stride.unwrap_or(window), options.padding.unwrap_or(Padding::Valid));
        Ok(Pool2d { window, stride, padding })
    }

    /// Any of the options `letters`, each at most once, up to the end of the layer.
    fn options(&mut self, layer: &str, letters: &str) -> Result<Options> {
        let mut options = Options::default();
        let mut unused = letters.to_string();
        while let Some(letter) = self.peek().filter(|&c| !ends_layer(c)) {
            if !unused.contains(letter) {
                let problem = if letters.contains(letter) {
                    format!("option `{letter}` comes twice")
                } else {
                    format!("{layer} has no option `{letter}`")
                };
                let known: Vec<_> = letters.chars().map(String::from).collect();
                let fix = format!("its options are {}; {}", known.join(", "), joining(letter));
                return Err(self.fault(self.at, problem, fix));
            }
            unused.retain(|c| c != letter);
            self.at += 1;
            match letter {
                'k' => options.kernel = Some(self.size()?),
                's' => options.stride = Some(self.size()?),
                'p' => options.padding = Some(self.padding()?),
                'd' => options.dilation = Some(self.size()?),
                _ => options.groups = Some(self.number(1..=MAX_SIZE, "give the number of groups, such as g2")?),
            }
        }
        Ok(options)
    }

    /// `3`, or height and width `3x5`.
    fn size(&mut self) -> Result<(usize, usize)> {
        let fix = "give one number, or height x width such as 3x5";
        let height = self.number(1..=MAX_SIZE, fix)?;
        let width = if self.word("x") { self.number(1..=MAX_SIZE, fix)? } else { height };
        Ok((height, width))
    }

    /// `1`, `0x1x0x1`, `same` or `valid`.
    fn padding(&mut self) -> Result<Padding> {
        if self.word("same") {
            return Ok(Padding::Same);
        }
        if self.word("valid") {
            return Ok(Padding::Valid);
        }
        let fix = "pad by p1, by top x bottom x left x right such as p0x1x0x1, or by psame or pvalid";
        let start = self.at;
        let mut cells = vec![self.number(0..=MAX_SIZE, fix)?];
        while self.word("x") {
            cells.push(self.number(0..=MAX_SIZE, fix)?);
        }
        match cells[..] {
            [0] => Ok(Padding::Valid),
            [all] => Ok(Padding::All(all)),
            [top, bottom, left, right] => Ok(Padding::Sides { top, bottom, left, right }),
            _ => Err(self.fault(start, format!("padding has {} numbers, not 1 or 4", cells.len()), fix)),
        }
    }

    fn at_number(&self) -> bool {
        self.peek().is_some_and(|c| c.is_ascii_digit() || c == '.')
    }

    /// A whole number in `range`; `fix` tells what to do if there is none.
    fn number(&mut self, range: RangeInclusive<usize>, fix: &str) -> Result<usize> {
        let start = self.at;
        let digits = self.take(|c| c.is_ascii_digit());
        if digits.is_empty() {
            return Err(self.fault(start, "a number is missing", fix));
        }
        // What overflows is too large in any case.
        let number = digits.parse().unwrap_or(usize::MAX);
        let (low, high) = (range.start(), range.end());
        if number < *low {
            Err(self.fault(start, format!("{digits} is too small"), format!("give at least {low}")))
        } else if number > *high {
            Err(self.fault(start, format!("{digits} is too large"), format!("give at most {high}")))
        } else {
            Ok(number)
        }
    }

    /// A decimal number, not negative, that is `allowed`.
    fn fraction(&mut self, allowed: impl Fn(f64) -> bool, fix: &str) -> Result<f64> {
        let start = self.at;
        let digits = self.take(|c| c.is_ascii_digit() || c == '.');
        match digits.parse() {
            Ok(number) if allowed(number) => Ok(number),
            Ok(_) => Err(self.fault(start, format!("{digits} is too large"), fix)),
            Err(_) if digits.is_empty() => Err(self.fault(start, "a number is missing", fix)),
            Err(_) => Err(self.fault(start, format!("`{digits}` is not a number"), fix)),
        }
    }

    /// The error for a layer that does not exist, with the nearest one that does.
    fn unknown(&mut self, start: usize, name: &str) -> Error {
        let rest = self.take(|c| !ends_layer(c));
        let names = || NAMES.into_iter().chain(Activation::NAMES.map(|(name, _)| name));
        let nearest = names().min_by_key(|known| edits(name, known)).expect("there are names");
        let fix = if edits(name, nearest) <= nearest.len() / 2 {
            format!("did you mean `{nearest}{rest}`?")
        } else {
            format!("choose from {}", names().collect::<Vec<_>>().join(", "))
        };
        self.fault(start, format!("there is no layer `{name}`"), fix)
    }
}

/// Whether a layer's name and options end before `c`.
fn ends_layer(c: char) -> bool {
    c.is_whitespace() || "-[]".contains(c)
}

/// What to do about `c` behind a layer.
fn joining(c: char) -> &'static str {
    if TIMES.contains(c) { "only groups are repeated: [...]x2" } else { "join layers with `-`" }
}

/// Levenshtein distance: the fewest letters to insert, delete or replace to make `b` of `a`.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RELU: LayerSpec = LayerSpec::Activation(Activation::Relu);
    const SAME: Conv2d =
        Conv2d { stride: (1, 1), padding: Padding::Same, dilation: (1, 1), groups: 1, algorithm: Algorithm::Auto };

    fn conv(filters: usize) -> LayerSpec {
        LayerSpec::Conv { filters, kernel: (3, 3), conv: SAME }
    }

    fn affine(outputs: usize) -> LayerSpec {
        LayerSpec::Affine { outputs }
    }

    fn only(text: &str) -> LayerSpec {
        let spec = NetworkSpec::parse(text).unwrap();
        assert_eq!(spec.layers.len(), 1, "{text}");
        spec.layers[0]
    }

    #[test]
    fn every_layer_and_its_canonical_form() {
        let kernel = (3, 3);
        let pool = Pool2d::square(2);
        let layer = |activation| LayerSpec::Activation(activation);
        for (texts, want) in [
            (&["conv32", "CONV32", "conv32k3", "conv32psame", "conv32s1k3d1g1"][..], conv(32)),
            (
                &["conv64k7s2p3", "conv64p3s2k7", "conv64k7x7s2x2p3"],
                LayerSpec::Conv {
                    filters: 64,
                    kernel: (7, 7),
                    conv: Conv2d { stride: (2, 2), padding: Padding::All(3), ..SAME },
                },
            ),
            (
                &["conv8k3x5s2x1d2x1", "conv8d2x1s2x1k3x5"],
                LayerSpec::Conv {
                    filters: 8,
                    kernel: (3, 5),
                    conv: Conv2d { stride: (2, 1), dilation: (2, 1), ..SAME },
                },
            ),
            (
                &["conv8p0d2g4", "conv8pvalidd2g4"],
                LayerSpec::Conv {
                    filters: 8,
                    kernel,
                    conv: Conv2d {
                        padding: Padding::Valid,
                        dilation: (2, 2),
                        groups: 4,
                        stride: (1, 1),
                        ..Conv2d::default()
                    },
                },
            ),
            (
                &["conv8p0x1x2x3"],
                LayerSpec::Conv {
                    filters: 8,
                    kernel,
                    conv: Conv2d { padding: Padding::Sides { top: 0, bottom: 1, left: 2, right: 3 }, ..SAME },
                },
            ),
            (&["pool", "maxpool", "Pool2", "pool2x2s2p0"], LayerSpec::MaxPool(pool)),
            (&["pool3", "maxpool3s3"], LayerSpec::MaxPool(Pool2d::square(3))),
            (&["pool2s1"], LayerSpec::MaxPool(Pool2d { stride: (1, 1), ..pool })),
            (
                &["pool3s2p1", "pool3p1s2"],
                LayerSpec::MaxPool(Pool2d { window: (3, 3), stride: (2, 2), padding: Padding::All(1) }),
            ),
            (&["pool2x1"], LayerSpec::MaxPool(Pool2d { window: (2, 1), stride: (2, 1), ..pool })),
            (&["pool2psame"], LayerSpec::MaxPool(Pool2d { padding: Padding::Same, ..pool })),
            (&["avgpool", "avgpool2"], LayerSpec::AvgPool(pool)),
            (&["avgpool3s1"], LayerSpec::AvgPool(Pool2d { stride: (1, 1), ..Pool2d::square(3) })),
            (&["gap"], LayerSpec::GlobalAvgPool),
            (&["affine256", "fc256", "linear256"], affine(256)),
            (&["bn", "BatchNorm"], LayerSpec::BatchNorm),
            (&["relu", "ReLU"], RELU),
            (&["silu"], layer(Activation::Silu)),
            (&["gelu"], layer(Activation::Gelu)),
            (&["leaky", "leakyrelu", "leaky0.01"], layer(Activation::LeakyRelu { slope: 0.01 })),
            (&["leaky0.1", "leakyrelu.1"], layer(Activation::LeakyRelu { slope: 0.1 })),
            (&["dropout0.5", "dropout.5", "dropout0.50"], LayerSpec::Dropout { p: 0.5 }),
            (&["dropout0"], LayerSpec::Dropout { p: 0.0 }),
        ] {
            for text in texts {
                assert_eq!(only(text), want, "{text}");
            }
            assert!(texts.contains(&want.to_string().as_str()), "{texts:?} prints as {want}");
        }
    }

    #[test]
    fn every_name_that_may_be_suggested_is_read() {
        for name in NAMES.into_iter().chain(Activation::NAMES.map(|(name, _)| name)) {
            let read = |text: String| NetworkSpec::parse(&text).is_ok();
            assert!(read(format!("relu-{name}")) || read(format!("{name}1")) || read(format!("{name}0.1")), "{name}");
        }
    }

    #[test]
    fn losses() {
        for (text, loss) in [
            ("affine10", LossSpec::Softmax { smoothing: 0.0 }),
            ("affine10-softmax", LossSpec::Softmax { smoothing: 0.0 }),
            ("affine10-softmax0.1", LossSpec::Softmax { smoothing: 0.1 }),
            ("affine10-SVM", LossSpec::Svm),
            ("affine10 - [svm]", LossSpec::Svm),
        ] {
            assert_eq!(NetworkSpec::parse(text).unwrap(), NetworkSpec { layers: vec![affine(10)], loss }, "{text}");
        }
        assert_eq!(NetworkSpec::parse("affine10").unwrap().to_string(), "affine10-softmax");
        assert_eq!(NetworkSpec::parse("affine10-softmax0.10").unwrap().to_string(), "affine10-softmax0.1");
        assert_eq!(NetworkSpec::parse("affine10-svm").unwrap().to_string(), "affine10-svm");
    }

    #[test]
    fn the_architectures_of_the_assignment() {
        for (text, unrolled) in [
            ("conv32k7-relu-pool-affine100-relu-affine10", "conv32k7-relu-pool-affine100-relu-affine10-softmax"),
            (
                "[conv32-relu-pool]x2 - conv64 - relu - [affine100-relu]x2 - affine10 - softmax",
                "conv32-relu-pool-conv32-relu-pool-conv64-relu-affine100-relu-affine100-relu-affine10-softmax",
            ),
            (
                "[conv32-relu-conv32-relu-pool]x3-[affine256]x1-affine10-svm",
                "conv32-relu-conv32-relu-pool-conv32-relu-conv32-relu-pool-conv32-relu-conv32-relu-pool-affine256-affine10-svm",
            ),
            (
                "[conv32-bn-relu-conv32-bn-relu-pool]x3-[affine256-bn-relu-dropout0.5]-affine10",
                "conv32-bn-relu-conv32-bn-relu-pool-conv32-bn-relu-conv32-bn-relu-pool-conv32-bn-relu-conv32-bn-relu-pool-\
                 affine256-bn-relu-dropout0.5-affine10-softmax",
            ),
        ] {
            assert_eq!(NetworkSpec::parse(text).unwrap().to_string(), unrolled);
        }
    }

    #[test]
    fn groups_nest_and_spaces_are_free() {
        for text in [
            "[[conv8-relu]x2-bn]x2",
            " [ [ conv8 - relu ] x 2 - bn ] x 2 ",
            "[[conv8-relu]*2-bn]×2",
            "[[\tconv8\n-relu] X2-\nbn]x2\n",
            "[conv8-relu-[conv8-relu]x1-[bn]]x2",
        ] {
            let once = [conv(8), RELU, conv(8), RELU, LayerSpec::BatchNorm];
            assert_eq!(NetworkSpec::parse(text).unwrap().layers, [once, once].concat(), "{text}");
        }
        assert_eq!(NetworkSpec::parse("[relu]x1000").unwrap().layers.len(), 1000);
    }

    #[test]
    fn faults_name_the_character_the_problem_and_the_fix() {
        for (text, position, problem, fix) in [
            ("", 0, "empty", "conv32-relu-pool-affine10"),
            (" \n", 0, "empty", "conv32-relu-pool-affine10"),
            // Names.
            ("con32", 0, "no layer `con`", "did you mean `conv32`?"),
            ("relu-afine100-relu", 5, "no layer `afine`", "did you mean `affine100`?"),
            ("conv32k5-[rellu]", 10, "no layer `rellu`", "did you mean `relu`?"),
            ("Dropuot0.5", 0, "no layer `dropuot`", "did you mean `dropout0.5`?"),
            ("transformer", 0, "no layer `transformer`", "choose from conv, pool"),
            // Numbers.
            ("conv", 4, "number is missing", "give the number of filters, such as conv32"),
            ("relu - conv-relu", 11, "number is missing", "give the number of filters, such as conv32"),
            ("affine", 6, "number is missing", "give the number of outputs, such as affine100"),
            ("dropout", 7, "number is missing", "probability of dropping"),
            ("conv32k-relu", 7, "number is missing", "height x width"),
            ("conv32k3x", 9, "number is missing", "height x width"),
            ("conv32g", 7, "number is missing", "number of groups"),
            ("conv32p", 7, "number is missing", "psame"),
            ("conv0", 4, "0 is too small", "at least 1"),
            ("affine000", 6, "000 is too small", "at least 1"),
            ("conv32s2x0", 9, "0 is too small", "at least 1"),
            ("pool0", 4, "0 is too small", "at least 1"),
            ("conv1000001", 4, "1000001 is too large", "at most 1000000"),
            ("fc99999999999999999999999", 2, "99999999999999999999999 is too large", "at most 1000000"),
            ("conv32p1x2", 7, "2 numbers", "top x bottom x left x right"),
            ("relu-dropout1", 12, "1 is too large", "less than 1"),
            ("dropout0.5.5", 7, "`0.5.5` is not a number", "dropout0.5"),
            ("leaky1.5", 5, "1.5 is too large", "slope of 0 to 1"),
            ("affine10-softmax2", 16, "2 is too large", "0 to 1"),
            // Options.
            ("conv32z2", 6, "conv has no option `z`", "its options are k, s, p, d, g"),
            ("conv32k3k5", 8, "option `k` comes twice", "its options are k"),
            ("pool3k2", 5, "pool has no option `k`", "its options are s, p"),
            ("avgpool3s2g2", 10, "avgpool has no option `g`", "its options are s, p"),
            ("conv32x3", 6, "conv has no option `x`", "only groups are repeated"),
            ("conv1.5", 5, "conv has no option `.`", "its options are k"),
            // Joints.
            ("conv32 relu", 7, "`r` follows a complete layer", "join layers with `-`"),
            ("relu5", 4, "`5` follows a complete layer", "join layers with `-`"),
            ("[relu]bn", 6, "`b` follows a complete layer", "join layers with `-`"),
            ("relu[bn]", 4, "`[` follows a complete layer", "join layers with `-`"),
            ("relu x3", 5, "`x` follows a complete layer", "only groups are repeated"),
            ("relu-", 5, "missing at the end", "name a layer"),
            ("relu--bn", 5, "`-` where a layer should be", "name a layer"),
            ("-relu", 0, "`-` where a layer should be", "name a layer"),
            ("32", 0, "`3` where a layer should be", "name a layer"),
            // Groups; positions count characters, not bytes.
            ("[relu", 0, "`[` is never closed", "close the group with `]`"),
            ("[relu]×2-[[bn]-gap", 9, "`[` is never closed", "close the group with `]`"),
            ("relu]", 4, "`]` closes no group", "remove it"),
            ("[]", 1, "`]` where a layer should be", "name a layer"),
            ("[relu]x", 7, "number is missing", "number of repetitions"),
            ("[relu]x0", 7, "0 is too small", "at least 1"),
            ("[relu] x 1001", 9, "1001 is too large", "at most 1000"),
            ("[[relu]x1000]x1000", 12, "more than 10000 layers", "repeat less"),
            // The loss.
            ("affine10-softmax-relu", 17, "follows the loss", "end with the loss"),
            ("affine10-svm-softmax", 13, "follows the loss", "end with the loss"),
            ("[affine10-svm]x2", 13, "holds the loss", "put the loss after it"),
            ("softmax", 0, "no layer comes before the loss", "begin with the layers"),
        ] {
            let error = NetworkSpec::parse(text).unwrap_err();
            let Error::Notation { notation, position: at, problem: what, fix: todo } = &error else {
                panic!("`{text}`: {error:?}");
            };
            assert_eq!(*notation, text.replace('\n', " "));
            assert_eq!(*at, position, "`{text}`: {error}");
            assert!(what.contains(problem) && todo.contains(fix), "`{text}`: {error}");
        }
        let pointer = NetworkSpec::parse("[relu]×2-con32").unwrap_err().notation_pointer().unwrap();
        assert_eq!(pointer, "[relu]×2-con32\n         ^");
    }

    #[test]
    fn json_holds_the_notation() {
        let spec = NetworkSpec::parse("[conv8-relu]x2-affine10-svm").unwrap();
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(json, r#""conv8-relu-conv8-relu-affine10-svm""#);
        assert_eq!(serde_json::from_str::<NetworkSpec>(&json).unwrap(), spec);
        let error = serde_json::from_str::<NetworkSpec>(r#""conv""#).unwrap_err().to_string();
        assert!(error.contains("number of filters"), "{error}");
    }

    fn any_pair() -> impl Strategy<Value = (usize, usize)> {
        prop_oneof![(1..=9_usize).prop_map(|n| (n, n)), (1..=MAX_SIZE, 1..=MAX_SIZE)]
    }

    fn any_padding() -> impl Strategy<Value = Padding> {
        let cells = || 0..=MAX_SIZE;
        prop_oneof![
            Just(Padding::Valid),
            Just(Padding::Same),
            (1..=MAX_SIZE).prop_map(Padding::All),
            (cells(), cells(), cells(), cells()).prop_map(|(top, bottom, left, right)| Padding::Sides {
                top,
                bottom,
                left,
                right
            }),
        ]
    }

    fn any_pool() -> impl Strategy<Value = Pool2d> {
        prop_oneof![
            (1..=4_usize).prop_map(Pool2d::square),
            (any_pair(), any_pair(), any_padding()).prop_map(|(window, stride, padding)| Pool2d {
                window,
                stride,
                padding
            }),
        ]
    }

    fn any_layer() -> impl Strategy<Value = LayerSpec> {
        prop_oneof![
            (1..=MAX_SIZE, any_pair(), any_pair(), any_padding(), any_pair(), 1..=MAX_SIZE).prop_map(
                |(filters, kernel, stride, padding, dilation, groups)| LayerSpec::Conv {
                    filters,
                    kernel,
                    conv: Conv2d { stride, padding, dilation, groups, ..Conv2d::default() }
                }
            ),
            any_pool().prop_map(LayerSpec::MaxPool),
            any_pool().prop_map(LayerSpec::AvgPool),
            Just(LayerSpec::GlobalAvgPool),
            (1..=MAX_SIZE).prop_map(affine),
            Just(LayerSpec::BatchNorm),
            (0.0..=1.0).prop_map(|slope| LayerSpec::Activation(Activation::LeakyRelu { slope })),
            proptest::sample::select(Activation::NAMES.to_vec()).prop_map(|(_, a)| LayerSpec::Activation(a)),
            (0.0..1.0).prop_map(|p| LayerSpec::Dropout { p }),
        ]
    }

    fn any_loss() -> impl Strategy<Value = LossSpec> {
        let softmax = |smoothing| LossSpec::Softmax { smoothing };
        prop_oneof![Just(LossSpec::Svm), Just(softmax(0.0)), (0.0..=1.0).prop_map(softmax)]
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back_equal(
            layers in proptest::collection::vec(any_layer(), 1..20),
            loss in any_loss(),
        ) {
            let spec = NetworkSpec { layers, loss };
            prop_assert_eq!(NetworkSpec::parse(&spec.to_string()).unwrap(), spec);
        }

        #[test]
        fn any_text_is_a_network_or_a_fault_inside_it(
            text in prop_oneof![".{0,30}", r"(\[|\]|-| |x|×|[0-9.]|conv|pool|relu|softmax|p|same|k|s){0,20}"],
        ) {
            match NetworkSpec::parse(&text) {
                Ok(spec) => prop_assert_eq!(NetworkSpec::parse(&spec.to_string()).unwrap(), spec),
                Err(Error::Notation { position, .. }) => prop_assert!(position <= text.chars().count()),
                Err(other) => prop_assert!(false, "{other}"),
            }
        }
    }
}
