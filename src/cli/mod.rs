//! Level 6. Command line.
