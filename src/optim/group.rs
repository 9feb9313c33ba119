//! Level 4. Groups: what rule and what rate each parameter has.

use serde::{Deserialize, Serialize};

use super::rule::{UpdateRule, decay};
use super::schedule::LearningRate;
use super::select::Select;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::params::Param;

/// Parameters that are trained alike. Of several groups that select a parameter, the first has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Which parameters.
    pub select: Select,
    /// How a gradient changes them.
    pub rule: UpdateRule,
    /// How fast.
    pub learning_rate: LearningRate,
    /// The loss has `l2 / 2` times the sum of their squares added to it; 0 or more.
    pub l2: f64,
    /// Whether they stay as they are. Frozen parameters have no part in the loss of `l2`, need no gradient and cost nothing.
    pub frozen: bool,
}

impl Group {
    /// Trains what `select` chooses, without a decay.
    pub fn new(select: Select, rule: UpdateRule, learning_rate: LearningRate) -> Self {
        Group { select, rule, learning_rate, l2: 0.0, frozen: false }
    }

    /// Leaves what `select` chooses as it is.
    pub fn frozen(select: Select) -> Self {
        let rate = LearningRate::constant(1.0).expect("1 is a learning rate");
        Group { frozen: true, ..Group::new(select, UpdateRule::Sgd, rate) }
    }

    /// The usual two: one rule and rate for everything, while decay, `l2` and the rule's own, shrinks the weights alone and
    /// neither biases nor batchnorm's parameters.
    pub fn classic(rule: UpdateRule, learning_rate: LearningRate, l2: f64) -> Vec<Self> {
        vec![
            Group { l2, ..Group::new(Select::WEIGHTS, rule, learning_rate) },
            Group::new(Select::ALL, rule.without_decay(), learning_rate),
        ]
    }

    pub(super) fn check<T: Element>(&self) -> Result<()> {
        self.rule.check::<T>()?;
        decay("l2 regularisation", self.l2, "1e-3 is usual, 0 is none")
    }
}

/// The group of each parameter; none of those that are fixed.
pub(super) fn assign<'a>(groups: &[Group], params: impl IntoIterator<Item = &'a Param>) -> Result<Vec<Option<usize>>> {
    let params: Vec<&Param> = params.into_iter().collect();
    let group_of = |param: &Param| groups.iter().position(|group| group.select.matches(param));
    let mut members = vec![0_usize; groups.len()];
    let mut assigned = Vec::new();
    for param in &params {
        if param.fixed {
            assigned.push(None);
            continue;
        }
        let group = group_of(param).ok_or_else(|| {
            let problem = format!("no group selects {}", param.name);
            Error::invalid("parameter groups", problem, "add a group at the end that selects `*`, all that is left")
        })?;
        let matrix = groups[group].rule.is_matrix() && !groups[group].frozen;
        if matrix && param.shape.len() < 2 {
            let problem = format!("muon sees matrices, {} has shape {:?}", param.name, param.shape);
            let fix =
                format!("put {} in a group of another rule, before the one of `{}`", param.name, groups[group].select);
            return Err(Error::invalid("parameter groups", problem, fix));
        }
        members[group] += 1;
        assigned.push(Some(group));
    }
    let empty = members.iter().zip(groups).find(|(members, group)| **members == 0 && group.select != Select::ALL);
    if let Some((_, Group { select, .. })) = empty {
        let params = || params.iter().filter(|param| !param.fixed);
        let taken = params().any(|param| select.matches(param));
        let what = if taken { "only what earlier groups have" } else { "no parameter" };
        let names: Vec<&str> = params().map(|param| param.name.as_str()).collect();
        let fix = if taken { "put it before them".into() } else { format!("choose from {}", names.join(", ")) };
        return Err(Error::invalid("parameter groups", format!("`{select}` selects {what}"), fix));
    }
    Ok(assigned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Layout, ParamKind, Params};

    fn params() -> Params<f32> {
        let mut layout = Layout::default();
        for (name, shape, kind) in [
            ("conv1.weight", &[4, 3, 3, 3][..], ParamKind::Weight),
            ("conv1.bias", &[4], ParamKind::Bias),
            ("bn1.weight", &[4], ParamKind::Scale),
            ("bn1.bias", &[4], ParamKind::Bias),
        ] {
            layout.push(name.into(), shape, kind);
        }
        Params::zeros(layout)
    }

    fn group(select: &str, rule: &str) -> Group {
        Group::new(select.parse().unwrap(), rule.parse().unwrap(), LearningRate::constant(0.1).unwrap())
    }

    #[test]
    fn the_first_group_that_selects_a_parameter_has_it() {
        let params = params();
        for (selects, expected) in [
            (&["*"][..], [0, 0, 0, 0]),
            (&["weight", "*"], [0, 1, 1, 1]),
            (&["bn*", "bias", "weight"], [2, 1, 0, 0]),
            (&["conv1.bias", "scale", "*.*"], [2, 0, 1, 2]),
            // What is left may be nothing.
            (&["weight", "bias", "scale", "*"], [0, 1, 2, 1]),
        ] {
            let groups: Vec<_> = selects.iter().map(|select| group(select, "sgd")).collect();
            assert_eq!(assign(&groups, params.iter()).unwrap(), expected.map(Some), "{selects:?}");
        }
    }

    /// Typos show, and the message says what would be right.
    #[test]
    fn groups_that_do_not_fit_the_parameters_are_errors() {
        let params = params();
        for (groups, parts) in [
            (vec![], &["no group selects conv1.weight", "`*`"][..]),
            (vec![group("weight", "sgd"), group("scale", "sgd")], &["no group selects conv1.bias"]),
            (
                vec![group("cnov*", "sgd"), group("*", "sgd")],
                &["`cnov*` selects no parameter", "conv1.weight, conv1.bias, bn1.weight, bn1.bias"],
            ),
            (
                vec![group("*", "sgd"), group("conv1.weight", "sgd")],
                &["`conv1.weight` selects only what earlier groups have", "before them"],
            ),
            (vec![group("*", "muon")], &["conv1.bias has shape [4]", "before the one of `*`"]),
        ] {
            let error = assign(&groups, params.iter()).unwrap_err();
            assert!(error.is_usage(), "{error}");
            for part in parts {
                assert!(error.to_string().contains(part), "{error}");
            }
        }
        let frozen = Group { frozen: true, ..group("*", "muon") };
        assert_eq!(assign(&[frozen], params.iter()).unwrap(), [Some(0); 4], "what is frozen needs no matrix");
    }

    #[test]
    fn groups_are_the_same_from_json() {
        let rate = LearningRate::constant(1e-3).unwrap();
        let mut groups = Group::classic("adamw".parse().unwrap(), rate, 1e-4);
        groups.extend([Group::frozen(Select::SCALES), group("conv*.weight", "muon")]);
        let json = serde_json::to_string(&groups).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Group>>(&json).unwrap(), groups);
        assert_eq!(groups[1].rule.weight_decay(), 0.0, "decay is for weights");
    }
}
