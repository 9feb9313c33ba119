//! Level 4. Optimizers.
