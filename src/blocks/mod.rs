//! Level 3. Cascades.
