//! Level 4. Data.
