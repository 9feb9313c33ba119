//! Level 4. Which parameters a group is about.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::params::{Param, ParamKind};

/// Chooses parameters by what they are or by their names.
///
/// As text: `weight`, `bias` or `scale` for a kind ([`ParamKind`]); anything else is a pattern for whole names, in which
/// `*` stands for any characters, also none, and `?` for one: `conv*.weight`, `bn?.bias`, `*`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Select(Choice);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    Kind(ParamKind),
    Name(Cow<'static, str>),
}

/// The kinds that are trained, and their names.
const KINDS: [(&str, ParamKind); 3] =
    [("weight", ParamKind::Weight), ("bias", ParamKind::Bias), ("scale", ParamKind::Scale)];

impl Select {
    /// Filters and matrices: `weight`.
    pub const WEIGHTS: Select = Select(Choice::Kind(ParamKind::Weight));
    /// Biases, batchnorm's too: `bias`.
    pub const BIASES: Select = Select(Choice::Kind(ParamKind::Bias));
    /// Batchnorm's factors: `scale`.
    pub const SCALES: Select = Select(Choice::Kind(ParamKind::Scale));
    /// Every parameter: `*`. As the last group's choice it means all that is left, even if that is none.
    pub const ALL: Select = Select(Choice::Name(Cow::Borrowed("*")));

    /// Whether it chooses this parameter.
    pub fn matches(&self, param: &Param) -> bool {
        match &self.0 {
            Choice::Kind(kind) => param.kind == *kind,
            Choice::Name(pattern) => fits(pattern.as_bytes(), param.name.as_bytes()),
        }
    }
}

/// Whether `name` is `pattern` with something in place of every `*` and `?`. Without recursion: of two stars, the first
/// need not be stretched any more once the second has been reached.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // The last star, and where what follows it was last tried.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => (p, n) = (p + 1, n + 1),
            _ => {
                let Some((at, tried)) = star else { return false };
                star = Some((at, tried + 1));
                (p, n) = (at + 1, tried + 1);
            }
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Choice::Kind(kind) => {
                let name = KINDS.iter().find(|(_, k)| k == kind).map_or("statistic", |(name, _)| name);
                f.write_str(name)
            }
            Choice::Name(pattern) => f.write_str(pattern),
        }
    }
}

impl FromStr for Select {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.is_empty() || text.contains(char::is_whitespace) {
            let fix = "write weight, bias or scale, or a pattern for names such as conv*.weight";
            return Err(Error::invalid("selection of parameters", format!("`{text}` is none"), fix));
        }
        let kind = KINDS.iter().find(|(name, _)| *name == text);
        Ok(Select(match kind {
            Some((_, kind)) => Choice::Kind(*kind),
            None => Choice::Name(text.to_owned().into()),
        }))
    }
}

impl TryFrom<String> for Select {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Select> for String {
    fn from(select: Select) -> String {
        select.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(name: &str, kind: ParamKind) -> Param {
        Param { name: name.into(), shape: vec![1], kind, fixed: false, range: 0..1 }
    }

    #[test]
    fn patterns_are_for_whole_names_and_kinds_for_kinds() {
        for (text, name, kind, expected) in [
            ("weight", "conv1.weight", ParamKind::Weight, true),
            ("weight", "bn1.weight", ParamKind::Scale, false),
            ("scale", "bn1.weight", ParamKind::Scale, true),
            ("bias", "bn1.bias", ParamKind::Bias, true),
            ("*", "anything", ParamKind::Bias, true),
            ("conv1.weight", "conv1.weight", ParamKind::Weight, true),
            ("conv1.weight", "conv1.weights", ParamKind::Weight, false),
            ("conv1.weight", "aconv1.weight", ParamKind::Weight, false),
            ("conv*.weight", "conv12.weight", ParamKind::Weight, true),
            ("conv*.weight", "conv.weight", ParamKind::Weight, true),
            ("conv*.weight", "conv1.bias", ParamKind::Bias, false),
            ("conv?.weight", "conv1.weight", ParamKind::Weight, true),
            ("conv?.weight", "conv12.weight", ParamKind::Weight, false),
            ("*1*", "conv21.weight", ParamKind::Weight, true),
            ("*.*ight", "conv1.wewight", ParamKind::Weight, true),
            ("*a*b*", "xbxa", ParamKind::Weight, false),
            ("a*ab", "aab", ParamKind::Weight, true),
            ("a**", "a", ParamKind::Weight, true),
            ("?", "", ParamKind::Weight, false),
        ] {
            let select: Select = text.parse().unwrap();
            assert_eq!(select.matches(&param(name, kind)), expected, "{text} and {name}");
        }
    }

    #[test]
    fn text_round_trips() {
        for (text, select) in
            [("weight", Select::WEIGHTS), ("bias", Select::BIASES), ("scale", Select::SCALES), ("*", Select::ALL)]
        {
            assert_eq!(text.parse::<Select>().unwrap(), select);
            assert_eq!(select.to_string(), text);
        }
        let select: Select = "conv*.weight".parse().unwrap();
        let json = serde_json::to_string(&select).unwrap();
        assert_eq!(json, "\"conv*.weight\"");
        assert_eq!(serde_json::from_str::<Select>(&json).unwrap(), select);
        for text in ["", "conv1 .weight", "\n"] {
            let message = text.parse::<Select>().unwrap_err().to_string();
            // An error is one line.
            assert!(message.contains(&format!("`{}` is none", text.replace('\n', " "))), "{message}");
            assert!(serde_json::from_value::<Select>(text.into()).is_err());
        }
    }
}
