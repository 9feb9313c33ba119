//! Level 4. Initial weights.

/// How weights are drawn. Biases start at 0, batchnorm's gamma at 1, its beta at 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation (the seed's `weight_scale`).
    Gaussian {
        /// Standard deviation.
        std: f64,
    },
    /// Normal with standard deviation sqrt(2 / fan_in) (He et al. 2015).
    He,
    /// Uniform within sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio 2010).
    Xavier,
    /// Orthogonal rows or columns (Saxe et al. 2014), by QR.
    #[cfg(feature = "blas")]
    Orthogonal,
}
