//! Level 5. Training.
