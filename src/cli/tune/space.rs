//! Level 7. What a search may choose: values of options, and of words in braces.

use std::str::FromStr;

use rand::{Rng, RngExt};
use toml::{Table, Value};

use crate::cli::recipe::{Choices, Recipe, blank};
use crate::error::{Error, Result};

/// One thing that trials differ in.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Vary {
    pub(super) key: String,
    pub(super) values: Values,
}

/// What it may be.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Values {
    /// Each as probable as another.
    Listed(Vec<String>),
    /// Every order of magnitude as probable as another.
    Range { low: f64, high: f64 },
}

/// The key that stands for all widths of a network.
const WIDTH: &str = "width";

/// What is varied if nothing is said.
pub(super) const DEFAULT: [&str; 4] =
    ["learning-rate=1e-5..1e-1", "l2=1e-6..1e-2", "batch-size=50,100,200,500", "width=0.5,1,2"];

impl FromStr for Vary {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let fault = |problem: String| {
            let fix = "write KEY=LOW..HIGH or KEY=A,B,C, such as learning-rate=1e-5..1e-1 or batch-size=50,100";
            Error::invalid("--vary", problem, fix)
        };
        let (key, values) = text.split_once('=').ok_or_else(|| fault(format!("`{text}` has no `=`")))?;
        let values = match values.split_once("..") {
            Some((low, high)) => {
                let number = |text: &str| text.trim().parse::<f64>().ok().filter(|x| *x > 0.0 && x.is_finite());
                match (number(low), number(high)) {
                    (Some(low), Some(high)) if low <= high => Values::Range { low, high },
                    _ => return Err(fault(format!("`{values}` is no range of numbers above 0"))),
                }
            }
            None => Values::Listed(values.split(',').map(|value| value.trim().to_owned()).collect()),
        };
        if key.is_empty() || values == Values::Listed(vec![String::new()]) {
            return Err(fault(format!("`{text}` lacks a key or values")));
        }
        Ok(Vary { key: key.trim().to_owned(), values })
    }
}

impl Vary {
    fn draw(&self, rng: &mut impl Rng) -> String {
        match &self.values {
            Values::Listed(values) => values[rng.random_range(0..values.len())].clone(),
            Values::Range { low, high } => {
                let drawn = (rng.random::<f64>() * (high / low).ln()).exp() * low;
                // Three digits are enough to tell trials apart and short enough to read.
                let value: f64 = format!("{drawn:.2e}").parse().expect("a number in its own notation");
                value.clamp(*low, *high).to_string()
            }
        }
    }
}

/// Values by the keys of a space, in its order.
pub(super) type Candidate = Vec<(String, String)>;

/// So many candidates that differ, or as many as there are.
pub(super) fn candidates(space: &[Vary], wanted: usize, mut rng: impl Rng) -> Vec<Candidate> {
    let mut drawn: Vec<Candidate> = Vec::new();
    // Where most have been seen, the rest is left.
    for _ in 0..100 * wanted {
        let candidate = space.iter().map(|vary| (vary.key.clone(), vary.draw(&mut rng))).collect();
        if !drawn.contains(&candidate) {
            drawn.push(candidate);
        }
        if drawn.len() == wanted {
            break;
        }
    }
    drawn
}

/// The recipe of a candidate: `base` with the values in their places.
pub(super) fn recipe(base: &Recipe, candidate: &Candidate) -> Result<Recipe> {
    let mut base = base.clone();
    let mut said = Table::new();
    for (key, value) in candidate {
        if fill_in(&mut base, key, value) {
            continue;
        }
        if key == WIDTH {
            let factor = value.parse().ok().filter(|&factor: &f64| factor > 0.0 && factor.is_finite());
            let fault = || {
                Error::invalid(
                    "--vary width",
                    format!("`{value}` is no factor"),
                    "give numbers above 0, such as 0.5,1,2",
                )
            };
            base.net = widened(&base.net, factor.ok_or_else(fault)?);
        } else {
            said.insert(key.clone(), typed(value));
        }
    }
    let choices: Choices = said.try_into().map_err(|e: toml::de::Error| {
        let fix = "KEY is a long option of `gemmnet train`, `width`, or a word in braces in --net, --init, --schedule or --group";
        Error::invalid("--vary", e.message().replace('\n', " "), fix)
    })?;
    base.with(&choices)
}

/// Puts a value in the place of `{key}`; whether there is one.
fn fill_in(recipe: &mut Recipe, key: &str, value: &str) -> bool {
    let braced = blank(key);
    let Recipe { net, init, schedule, group, .. } = recipe;
    let texts = [net, init, schedule].into_iter().chain(group).filter(|text| text.contains(&braced));
    texts.map(|text| *text = text.replace(&braced, value)).count() > 0
}

/// A number where it is one.
fn typed(value: &str) -> Value {
    if let Ok(number) = value.parse::<i64>() {
        Value::Integer(number)
    } else if let Ok(number) = value.parse::<f64>() {
        Value::Float(number)
    } else {
        Value::String(value.to_owned())
    }
}

/// The network with `factor` times as many filters and hidden units, each 1 or more; its last affine layer gives the scores and
/// stays.
fn widened(net: &str, factor: f64) -> String {
    let last = net.rfind("affine").unwrap_or(net.len());
    let (mut wide, mut rest, mut at) = (String::new(), net, 0);
    while let Some(letters) = ["conv", "affine"].iter().filter_map(|word| Some((rest.find(word)?, word.len()))).min() {
        let begin = letters.0 + letters.1;
        let digits = rest[begin..].find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len() - begin);
        wide.push_str(&rest[..begin]);
        match rest[begin..begin + digits].parse::<f64>() {
            Ok(width) if at + letters.0 != last => wide.push_str(&(width * factor).round().max(1.0).to_string()),
            _ => wide.push_str(&rest[begin..begin + digits]),
        }
        (rest, at) = (&rest[begin + digits..], at + begin + digits);
    }
    wide + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::presets;
    use crate::random::{Purpose, stream};

    fn rng() -> impl Rng {
        stream(0, Purpose::Trial, 0, 0)
    }

    #[test]
    fn ranges_are_drawn_by_orders_of_magnitude() {
        let vary: Vary = "learning-rate=1e-5..1e-1".parse().unwrap();
        let drawn: Vec<f64> = candidates(&[vary], 400, rng()).iter().map(|c| c[0].1.parse().unwrap()).collect();
        for (low, high) in [(1e-5, 1e-4), (1e-4, 1e-3), (1e-3, 1e-2), (1e-2, 1e-1)] {
            let share = drawn.iter().filter(|&&x| (low..high).contains(&x)).count();
            assert!((60..140).contains(&share), "{share} of 400 from {low} to {high}");
        }
        let small = ["batch-size=50,100".parse().unwrap(), "flip=none,random".parse().unwrap()];
        assert_eq!(candidates(&small, 10, rng()).len(), 4, "there are no more");
    }

    #[test]
    fn values_go_where_they_belong() {
        let base = presets::find("three-layer").unwrap().recipe.clone();
        let apply = |base: &Recipe, texts: &[(&str, &str)]| {
            recipe(base, &texts.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect())
        };
        let made = apply(
            &base,
            &[
                ("learning-rate", "0.01"),
                ("epochs", "2"),
                ("batch-size", "64"),
                ("schedule", "linear"),
                ("width", "0.5"),
            ],
        );
        let made = made.unwrap();
        assert_eq!((made.learning_rate, made.epochs, made.batch_size, &*made.schedule), (0.01, 2.0, 64, "linear"));
        assert_eq!(made.net, "conv16k7-relu-pool-affine250-relu-affine10");
        let braced =
            Recipe { net: "conv{a}-affine10".into(), group: vec!["weight=muon,lr={muon}".into()], ..base.clone() };
        let made = apply(&braced, &[("a", "24"), ("muon", "0.3")]).unwrap();
        assert_eq!((&*made.net, &*made.group[0]), ("conv24-affine10", "weight=muon,lr=0.3"));
        for (key, value, part) in [
            ("lerning-rate", "1", "unknown field `lerning-rate`"),
            ("batch-size", "many", "invalid type"),
            ("width", "no", "no factor"),
        ] {
            let error = apply(&base, &[(key, value)]).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        for text in ["learning-rate", "l2=", "l2=0..1", "l2=2..1", "=1"] {
            assert!(text.parse::<Vary>().unwrap_err().to_string().contains("write KEY=LOW..HIGH"), "{text}");
        }
    }

    #[test]
    fn wider_networks_keep_their_scores() {
        assert_eq!(
            widened("[conv32-bn-relu]x2-res[conv3k1]-affine7-relu-affine10b0-div128", 2.0),
            "[conv64-bn-relu]x2-res[conv6k1]-affine14-relu-affine10b0-div128"
        );
        assert_eq!(widened("conv1-gap-affine10", 0.1), "conv1-gap-affine10");
    }
}
