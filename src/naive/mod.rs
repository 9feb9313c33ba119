//! Level 2. Naive twins.
