//! Level 2. To be written.
