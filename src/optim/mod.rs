//! Level 4. Optimizers and learning-rate schedules, by group of parameters.
//!
//! A [`Group`] selects parameters by kind or name and has a rule, a rate, a decay; or it freezes them. [`Optimizer::step`]
//! is one pass over memory whatever the groups. A step of Adam moves 28 bytes per `f32` parameter (reads w, g, m, v,
//! writes w, m, v) and little arithmetic, so L2 regularisation, its loss, weight decay and clipping ride along in that
//! pass. [`UpdateRule::Muon`] then goes on with each of its parameters as a matrix. Where a network makes the step
//! ([`crate::nn::network::Network::step`]), large matrices do not wait for the pass: a piece of one is updated when its part of
//! the gradient has just been made, so g does not come from memory, nor go there.
//!
//! The elementwise rules keep CS231n's convention: the learning rate is *inside* the velocity, `v <- mu v - lr g; w <- w +
//! v`. PyTorch keeps it outside, `v <- mu v + g; w <- w - lr v`. The two agree while the rate is constant; when it changes,
//! the steps already in the velocity keep the old rate here and take the new one there.

mod cut;
mod early;
mod elementwise;
mod ema;
mod group;
mod muon;
mod optimizer;
mod rule;
mod schedule;
mod select;

pub(crate) use self::early::{Early, EarlyRows};
pub use self::ema::Ema;
pub use self::group::Group;
pub use self::optimizer::{Optimizer, Stepped};
pub use self::rule::UpdateRule;
pub use self::schedule::{LearningRate, Progress, Schedule};
pub use self::select::Select;
