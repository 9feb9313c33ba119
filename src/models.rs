//! Level 4. Models.
