//! Level 5. Layers with a name in the notation that are no parts of blocks.
//!
//! # Adding a layer
//! Its file here, with [`Layer`](crate::nn::layer::Layer) implemented for both element types, a naive twin and its oracles
//! as tests; its row in `BUILT_IN`; its row in the table of [`crate::nn::notation`].

mod divide;
mod se;

use std::sync::Arc;

use crate::nn::layer::AnyLayer;
pub use divide::Divide;
pub use se::SqueezeExcite;

/// A layer that the notation knows by name, and by a number behind it.
pub(super) struct BuiltIn {
    pub(super) name: &'static str,
    /// What to do if the number is missing.
    pub(super) number: &'static str,
    pub(super) make: fn(usize) -> Arc<dyn AnyLayer>,
}

pub(super) const BUILT_IN: &[BuiltIn] = &[
    BuiltIn {
        name: "se",
        number: "give the reduction of the hidden layer, such as se16",
        make: |reduction| Arc::new(SqueezeExcite { reduction }),
    },
    BuiltIn {
        name: "div",
        number: "give the number to divide by, such as div256",
        make: |divisor| Arc::new(Divide { divisor }),
    },
];
