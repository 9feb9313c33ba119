//! Level 1. Numeric gradients.
