//! Level 4. Update rules: how a gradient changes a parameter.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::element::Element;
use crate::error::{Error, Result};

/// How a gradient `g` changes a parameter `w`; `lr` is the learning rate, products and roots are elementwise.
///
/// `"adam".parse()` and the like give the defaults, which are CS231n's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "lowercase")]
pub enum UpdateRule {
    /// `w <- w - lr g`: stochastic gradient descent (Robbins & Monro 1951).
    Sgd,
    /// `v <- mu v - lr g; w <- w + v`: the heavy ball (Polyak 1964).
    Momentum {
        /// `mu`, the share of the velocity that survives a step; 0 to below 1, 0.9 by default.
        momentum: f64,
    },
    /// `u <- v; v <- mu v - lr g; w <- w - mu u + (1 + mu) v`: accelerated gradient (Nesterov 1983) with `w` at the
    /// look-ahead point, so that the gradient is taken where the parameters are (Bengio et al. 2013).
    Nesterov {
        /// `mu`; 0 to below 1, 0.9 by default.
        momentum: f64,
    },
    /// `s <- s + g^2; w <- w - lr g / (sqrt(s) + eps)` (Duchi, Hazan & Singer 2011).
    AdaGrad {
        /// `eps`, against division by 0; 1e-8 by default.
        epsilon: f64,
    },
    /// `s <- d s + (1 - d) g^2; w <- w - lr g / (sqrt(s) + eps)` (Tieleman & Hinton 2012, lecture 6.5).
    RmsProp {
        /// `d`, the share of the mean square that survives a step; 0 to below 1, 0.99 by default.
        decay: f64,
        /// `eps`, against division by 0; 1e-8 by default.
        epsilon: f64,
    },
    /// `m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- w - lr m' / (sqrt(v') + eps)` with the moments freed of
    /// their start at 0: `m' = m / (1 - b1^t)`, `v' = v / (1 - b2^t)` in step `t`, from 1 (Kingma & Ba 2015).
    Adam {
        /// `b1`; 0 to below 1, 0.9 by default.
        beta1: f64,
        /// `b2`; 0 to below 1, 0.999 by default.
        beta2: f64,
        /// `eps`, against division by 0; 1e-8 by default.
        epsilon: f64,
    },
    /// Adam, after `w <- w - lr wd w`: decay that the moments do not rescale (Loshchilov & Hutter 2019).
    /// The decay is in the parameters only, never in the loss that [`Optimizer::step`](super::Optimizer::step) returns.
    AdamW {
        /// `b1`; 0 to below 1, 0.9 by default.
        beta1: f64,
        /// `b2`; 0 to below 1, 0.999 by default.
        beta2: f64,
        /// `eps`, against division by 0; 1e-8 by default.
        epsilon: f64,
        /// `wd`; 0 or more, 0.01 by default.
        weight_decay: f64,
    },
    /// `v <- mu v + g; w <- w - lr wd w; w <- w - lr s O(g + mu v)`: momentum whose step is made orthogonal (Jordan 2024,
    /// "Muon: An optimizer for hidden layers in neural networks"). For parameters with two axes and more: filters
    /// `(F, C, KH, KW)` are a matrix `(F, C KH KW)`, affine weights are `(D, M)`.
    ///
    /// `O(X)` brings the singular values of `X` near 1 and leaves its singular vectors. From `X / max(|X|, 1e-7)`, with
    /// `|X|` the root of the sum of squares, `X <- a X + b X X^T X + c X X^T X X^T X` is repeated with `a, b, c` =
    /// 3.4445, -4.7750, 2.0315. `s = sqrt(max(1, outputs / inputs))`, where the outputs are `F`, or `M`.
    ///
    /// The momentum is Jordan's; PyTorch's `v <- mu v + (1 - mu) g` makes the same steps.
    Muon {
        /// `mu`; 0 to below 1, 0.95 by default.
        momentum: f64,
        /// How often the polynomial is applied, 1 or more, 5 by default.
        iterations: usize,
        /// `wd`; 0 or more, 0 by default.
        weight_decay: f64,
        /// Whether `w` is first scaled to the norm `sqrt(outputs)`, so that only its direction is trained: what Jordan's
        /// recipes for CIFAR-10 do before a batchnorm. Not by default.
        fixed_norm: bool,
    },
}

impl UpdateRule {
    /// Every rule with its defaults.
    pub const ALL: [UpdateRule; 8] = [
        UpdateRule::Sgd,
        UpdateRule::Momentum { momentum: 0.9 },
        UpdateRule::Nesterov { momentum: 0.9 },
        UpdateRule::AdaGrad { epsilon: 1e-8 },
        UpdateRule::RmsProp { decay: 0.99, epsilon: 1e-8 },
        UpdateRule::Adam { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
        UpdateRule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 },
        UpdateRule::Muon { momentum: 0.95, iterations: 5, weight_decay: 0.0, fixed_norm: false },
    ];

    /// The name that [`FromStr`] reads.
    pub fn name(self) -> &'static str {
        match self {
            UpdateRule::Sgd => "sgd",
            UpdateRule::Momentum { .. } => "momentum",
            UpdateRule::Nesterov { .. } => "nesterov",
            UpdateRule::AdaGrad { .. } => "adagrad",
            UpdateRule::RmsProp { .. } => "rmsprop",
            UpdateRule::Adam { .. } => "adam",
            UpdateRule::AdamW { .. } => "adamw",
            UpdateRule::Muon { .. } => "muon",
        }
    }

    /// The rule with another value of one of its hyperparameters, by its name here: `momentum`, `beta1`, `epsilon`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name that the rule does not have, or a value of another type.
    pub fn with(self, name: &str, value: &str) -> Result<Self> {
        let fault = || {
            let problem = format!("{} has no `{name}` that could be {value}", self.name());
            Error::invalid("update rule", problem, "choose one of its numbers, such as momentum=0.9")
        };
        let mut fields = serde_json::to_value(self).map_err(|_| fault())?;
        let field = fields.get_mut(name).filter(|_| name != "rule").ok_or_else(fault)?;
        *field = serde_json::from_str(value).map_err(|_| fault())?;
        serde_json::from_value(fields).map_err(|_| fault())
    }

    /// Names of what it remembers of a parameter from step to step, each as large as the parameter.
    pub(super) fn state_names(self) -> &'static [&'static str] {
        match self {
            UpdateRule::Sgd => &[],
            UpdateRule::Momentum { .. } | UpdateRule::Nesterov { .. } | UpdateRule::Muon { .. } => &["velocity"],
            UpdateRule::AdaGrad { .. } | UpdateRule::RmsProp { .. } => &["square"],
            UpdateRule::Adam { .. } | UpdateRule::AdamW { .. } => &["first_moment", "second_moment"],
        }
    }

    /// Vectors that a step writes beside the parameters: what it remembers, and Muon's direction before it is orthogonal.
    pub(super) fn vectors(self) -> usize {
        self.state_names().len() + usize::from(self.is_matrix())
    }

    /// Whether it sees a parameter as a matrix.
    pub(super) fn is_matrix(self) -> bool {
        matches!(self, UpdateRule::Muon { .. })
    }

    /// Decay that is not part of the gradient.
    pub(super) fn weight_decay(self) -> f64 {
        match self {
            UpdateRule::AdamW { weight_decay, .. } | UpdateRule::Muon { weight_decay, .. } => weight_decay,
            _ => 0.0,
        }
    }

    /// The rule without a decay of its own.
    pub(super) fn without_decay(mut self) -> Self {
        if let UpdateRule::AdamW { weight_decay, .. } | UpdateRule::Muon { weight_decay, .. } = &mut self {
            *weight_decay = 0.0;
        }
        self
    }

    /// Whether every hyperparameter is in its range.
    pub(super) fn check<T: Element>(self) -> Result<()> {
        match self {
            UpdateRule::Sgd => Ok(()),
            UpdateRule::Momentum { momentum } | UpdateRule::Nesterov { momentum } => share("momentum", momentum),
            UpdateRule::AdaGrad { epsilon } => divisor::<T>(epsilon),
            UpdateRule::RmsProp { decay, epsilon } => share("decay", decay).and(divisor::<T>(epsilon)),
            UpdateRule::Adam { beta1, beta2, epsilon } | UpdateRule::AdamW { beta1, beta2, epsilon, .. } => {
                share("beta1", beta1).and(share("beta2", beta2)).and(divisor::<T>(epsilon))
            }
            UpdateRule::Muon { iterations: 0, .. } => {
                Err(Error::invalid("iterations", "0 of them make nothing orthogonal", "5 are usual"))
            }
            UpdateRule::Muon { momentum, .. } => share("momentum", momentum),
        }?;
        decay("weight_decay", self.weight_decay(), "0.01 is usual")
    }
}

/// What survives a step is less than the whole.
fn share(what: &'static str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(what, format!("{value} is not in 0 <= {what} < 1"), "0.9 is usual"))
}

/// Where gradients are 0 the division is 0 / epsilon, in `T` and with denormals flushed to 0.
fn divisor<T: Element>(epsilon: f64) -> Result<()> {
    if epsilon.is_finite() && epsilon >= T::min_positive_value().f64() {
        return Ok(());
    }
    let problem = format!("{epsilon} is not a positive normal number in {}", T::NAME);
    Err(Error::invalid("epsilon", problem, "1e-8 is usual"))
}

/// Decay never makes parameters grow.
pub(super) fn decay(what: &'static str, value: f64, fix: &str) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::invalid(what, format!("{value} is not a number from 0 up"), fix))
}

impl FromStr for UpdateRule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|rule| rule.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::invalid("update rule", format!("`{text}` is not one"), format!("choose one of {names}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hyperparameters_have_their_names_and_types() {
        let rule: UpdateRule = "muon".parse().unwrap();
        let rule = rule.with("momentum", "0.6").unwrap().with("iterations", "3").unwrap();
        let rule = rule.with("fixed_norm", "true").unwrap();
        assert_eq!(rule, UpdateRule::Muon { momentum: 0.6, iterations: 3, weight_decay: 0.0, fixed_norm: true });
        for (name, value) in
            [("beta1", "0.9"), ("momentum", "x"), ("iterations", "2.5"), ("rule", "\"sgd\""), ("", "1")]
        {
            let message = rule.with(name, value).unwrap_err().to_string();
            assert!(message.contains(&format!("muon has no `{name}` that could be {value}")), "{message}");
        }
    }
}
