//! Level 5. From text to a list of layers.

use std::ops::RangeInclusive;

use super::{ALGORITHMS, LayerSpec, LossSpec, NetworkSpec, Reduction, SUM, names};
use crate::error::{Error, Result, one_line};
use crate::nn::layers;
use crate::ops::activation::Activation;
use crate::ops::batchnorm::BatchNorm;
use crate::shape::{Algorithm, Conv2d, Padding, Pool2d};

/// The characters that may stand before the number of repetitions.
const TIMES: &str = "x×*";
/// How often one group may be repeated.
const MAX_REPEAT: usize = 1000;
/// Groups in groups multiply: this many layers are a mistake, not a network.
const MAX_LAYERS: usize = 10_000;
/// Groups within groups; so many are a mistake too.
const MAX_DEPTH: usize = 64;
/// The largest size; keeps what is computed from sizes far from the machine's limits.
pub(super) const MAX_SIZE: usize = 1_000_000;

/// What stands between two `-`.
enum Item {
    Layer(LayerSpec),
    Loss(LossSpec, Reduction),
}

/// The options of a layer, as far as they are given.
#[derive(Default)]
struct Options {
    kernel: Option<(usize, usize)>,
    stride: Option<(usize, usize)>,
    padding: Option<Padding>,
    dilation: Option<(usize, usize)>,
    groups: Option<usize>,
    algorithm: Algorithm,
    /// Whether there is a bias.
    bias: Option<bool>,
    /// Whether batchnorm's scale is trained.
    scale: Option<bool>,
    eps: Option<f64>,
}

/// A group that is open.
struct Group {
    /// Where its bracket is.
    bracket: usize,
    /// Whether it is a residual.
    residual: bool,
    layers: Vec<LayerSpec>,
}

/// Reads a whole network.
pub(super) fn parse(text: &str) -> Result<NetworkSpec> {
    let mut parser = Parser { text, chars: text.chars().map(|c| c.to_ascii_lowercase()).collect(), at: 0 };
    if text.trim().is_empty() {
        return Err(parser.fault(0, "the notation is empty", "list the layers, such as conv32-relu-pool-affine10"));
    }
    // The network itself is the outermost group.
    let mut groups = vec![Group { bracket: 0, residual: false, layers: Vec::new() }];
    let mut loss = None;
    loop {
        parser.open(&mut groups)?;
        if loss.is_some() {
            return Err(parser.fault(parser.at, "something follows the loss", "end with the loss"));
        }
        let start = parser.at;
        match parser.item()? {
            Item::Layer(layer) => groups.last_mut().expect("the outermost group").layers.push(layer),
            Item::Loss(..) if groups.iter().all(|group| group.layers.is_empty()) => {
                return Err(parser.fault(start, "no layer comes before the loss", "begin with the layers"));
            }
            Item::Loss(l, reduction) => loss = Some((l, reduction)),
        }
        parser.close(&mut groups, loss.is_some())?;
        match parser.peek() {
            None => break,
            Some('-') => parser.at += 1,
            Some(c) => {
                let problem = format!("`{c}` follows a complete layer");
                return Err(parser.fault(parser.at, problem, joining(c)));
            }
        }
    }
    let last = groups.pop().expect("the outermost group");
    if !groups.is_empty() {
        return Err(parser.fault(last.bracket, "this `[` is never closed", "close the group with `]`"));
    }
    let (loss, reduction) = loss.unwrap_or((LossSpec::Softmax { smoothing: 0.0 }, Reduction::Mean));
    Ok(NetworkSpec { layers: last.layers, loss, reduction })
}

/// Layers, with those inside of residuals.
fn count(layers: &[LayerSpec]) -> usize {
    let one = |layer: &LayerSpec| match layer {
        LayerSpec::Residual(layers) => 1 + count(layers),
        _ => 1,
    };
    layers.iter().map(one).sum()
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
        let notation = one_line(self.text.replace(char::is_whitespace, " "));
        Error::Notation { notation, position, problem: one_line(problem), fix: one_line(fix) }
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

    /// Opens every group that begins here.
    fn open(&mut self, groups: &mut Vec<Group>) -> Result<()> {
        loop {
            self.skip_spaces();
            let start = self.at;
            let residual = self.word("res");
            if !self.symbol("[") {
                self.at = start;
                return Ok(());
            }
            let bracket = self.at - 1;
            if groups.len() > MAX_DEPTH {
                let problem = format!("more than {MAX_DEPTH} groups within each other");
                return Err(self.fault(bracket, problem, "nest fewer"));
            }
            groups.push(Group { bracket, residual, layers: Vec::new() });
        }
    }

    /// Closes every group that ends here, repeats it, and adds it to the one around it.
    fn close(&mut self, groups: &mut Vec<Group>, has_loss: bool) -> Result<()> {
        while self.symbol("]") {
            let bracket = self.at - 1;
            let mut group = groups.pop().expect("the outermost group");
            let around = groups.iter().map(|group| count(&group.layers)).sum::<usize>();
            let Some(parent) = groups.last_mut() else {
                return Err(self.fault(bracket, "this `]` closes no group", "remove it, or open the group with `[`"));
            };
            let times = if self.symbol(TIMES) {
                self.skip_spaces();
                self.number(1..=MAX_REPEAT, "give the number of repetitions, such as [relu]x2")?
            } else {
                1
            };
            if has_loss && (times > 1 || group.residual) {
                let kind = if group.residual { "residual" } else { "repeated group" };
                return Err(self.fault(bracket, format!("the {kind} holds the loss"), "put the loss after it"));
            }
            if group.residual {
                group.layers = vec![LayerSpec::Residual(group.layers)];
            }
            if around + times * count(&group.layers) > MAX_LAYERS {
                let problem = format!("the network grows to more than {MAX_LAYERS} layers");
                return Err(self.fault(bracket, problem, "repeat less"));
            }
            for _ in 1..times {
                parent.layers.extend_from_slice(&group.layers);
            }
            parent.layers.append(&mut group.layers);
        }
        Ok(())
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
        if let Some(loss) = self.loss(&name)? {
            return Ok(loss);
        }
        Ok(Item::Layer(match name.as_str() {
            "conv" => self.conv()?,
            "whiten" => {
                let size = self.number(1..=MAX_SIZE, "give the height and width of a patch, such as whiten2")?;
                LayerSpec::Whiten { size, stride: self.options(&name, "s")?.stride.unwrap_or((1, 1)) }
            }
            "pool" | "maxpool" => LayerSpec::MaxPool(self.pool(&name)?),
            "avgpool" => LayerSpec::AvgPool(self.pool(&name)?),
            "gap" => LayerSpec::GlobalAvgPool,
            "affine" | "fc" | "linear" => {
                let outputs = self.number(1..=MAX_SIZE, "give the number of outputs, such as affine100")?;
                LayerSpec::Affine { outputs, bias: self.options(&name, "b")?.bias.unwrap_or(true) }
            }
            "bn" | "batchnorm" => self.batchnorm(&name)?,
            "dropout" => {
                let fix = "give the probability of dropping, at least 0 and less than 1, such as dropout0.5";
                LayerSpec::Dropout { p: self.fraction(|p| p < 1.0, fix)? }
            }
            "res" => {
                let fix = "put layers in brackets behind it, such as res[conv16-bn-relu-conv16-bn]";
                return Err(self.fault(self.at, "a residual without layers", fix));
            }
            _ => return self.activation_or_other(start, &name).map(Item::Layer),
        }))
    }

    /// The loss of this name, if it is one's.
    fn loss(&mut self, name: &str) -> Result<Option<Item>> {
        let (of_an_image, mut sum) = match name.strip_suffix(SUM) {
            Some(of_an_image) => (of_an_image, true),
            None => (name, false),
        };
        let loss = match of_an_image {
            "softmax" if self.at_number() && !sum => {
                let smoothing = self.fraction(|s| s <= 1.0, "smooth the labels by 0 to 1, such as softmax0.1")?;
                sum = self.word(SUM);
                LossSpec::Softmax { smoothing }
            }
            "softmax" => LossSpec::Softmax { smoothing: 0.0 },
            "svm" => LossSpec::Svm,
            _ => return Ok(None),
        };
        Ok(Some(Item::Loss(loss, if sum { Reduction::Sum } else { Reduction::Mean })))
    }

    /// What follows `bn`.
    fn batchnorm(&mut self, name: &str) -> Result<LayerSpec> {
        if !self.at_number() {
            return Ok(LayerSpec::BATCH_NORM);
        }
        let momentum = self.fraction(|m| m <= 1.0, "give a momentum of 0 to 1, such as bn0.9")?;
        let options = self.options(name, "ge")?;
        let norm = BatchNorm { eps: options.eps.unwrap_or(BatchNorm::USUAL.eps), momentum };
        Ok(LayerSpec::BatchNorm { norm, fixed_scale: options.scale == Some(false) })
    }

    fn activation_or_other(&mut self, start: usize, name: &str) -> Result<LayerSpec> {
        if let Some(activation) = Activation::named(name) {
            return Ok(LayerSpec::Activation(match activation {
                Activation::LeakyRelu { .. } if self.at_number() => {
                    let slope = self.fraction(|s| s <= 1.0, "give a slope of 0 to 1, such as leaky0.1")?;
                    Activation::LeakyRelu { slope }
                }
                activation => activation,
            }));
        }
        match layers::BUILT_IN.iter().find(|layer| layer.name == name) {
            Some(layer) => Ok(LayerSpec::Layer((layer.make)(self.number(1..=MAX_SIZE, layer.number)?))),
            None => Err(self.unknown(start, name)),
        }
    }

    /// What follows `conv`.
    fn conv(&mut self) -> Result<LayerSpec> {
        let filters = self.number(1..=MAX_SIZE, "give the number of filters, such as conv32")?;
        let options = self.options("conv", "kspdgab")?;
        let conv = Conv2d {
            stride: options.stride.unwrap_or((1, 1)),
            padding: options.padding.unwrap_or(Padding::Same),
            dilation: options.dilation.unwrap_or((1, 1)),
            groups: options.groups.unwrap_or(1),
            algorithm: options.algorithm,
        };
        let (kernel, bias) = (options.kernel.unwrap_or((3, 3)), options.bias.unwrap_or(true));
        Ok(LayerSpec::Conv { filters, kernel, conv, bias })
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
                'b' => options.bias = Some(self.switch("b0 is without bias, b1 with one")?),
                'e' => {
                    options.eps = Some(
                        self.fraction(|eps| eps > 0.0 && eps.is_finite(), "give a number above 0, such as e0.001")?,
                    )
                }
                'g' if letters.contains('e') => {
                    options.scale = Some(self.switch("g0 leaves the scale at 1, g1 trains it")?);
                }
                'g' => options.groups = Some(self.number(1..=MAX_SIZE, "give the number of groups, such as g2")?),
                _ => options.algorithm = self.algorithm()?,
            }
        }
        Ok(options)
    }

    fn algorithm(&mut self) -> Result<Algorithm> {
        let found = ALGORITHMS.into_iter().find(|(name, _)| self.word(name));
        found.map(|(_, algorithm)| algorithm).ok_or_else(|| {
            let names = ALGORITHMS.map(|(name, _)| name).join(", ");
            self.fault(self.at, "there is no such algorithm", format!("choose one of {names}, such as conv32aim2col"))
        })
    }

    /// `0` or `1`.
    fn switch(&mut self, fix: &str) -> Result<bool> {
        Ok(self.number(0..=1, fix)? == 1)
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
            Ok(_) => Err(self.fault(start, format!("{digits} is out of range"), fix)),
            Err(_) if digits.is_empty() => Err(self.fault(start, "a number is missing", fix)),
            Err(_) => Err(self.fault(start, format!("`{digits}` is not a number"), fix)),
        }
    }

    /// The error for a layer that does not exist, with the nearest one that does.
    fn unknown(&mut self, start: usize, name: &str) -> Error {
        let rest = self.take(|c| !ends_layer(c));
        let fix = match names::nearest(name) {
            Some(nearest) => format!("did you mean `{nearest}{rest}`?"),
            None => format!("choose from {}", names::all().collect::<Vec<_>>().join(", ")),
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
