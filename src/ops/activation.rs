//! Level 2. Pointwise nonlinearities.

/// A pointwise nonlinearity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `max(z, 0)`
    Relu,
    /// `z` where positive, else `slope * z`.
    LeakyRelu {
        /// Slope for negative input, 0 to 1.
        slope: f64,
    },
    /// `z * sigmoid(z)` (Elfwing et al. 2017).
    Silu,
    /// `z * Phi(z)`, in its tanh approximation (Hendrycks & Gimpel 2016).
    Gelu,
}
