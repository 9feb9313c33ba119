//! Level 4. A network: an ordered list of fused blocks with named parameters and a loss.

use crate::element::Element;
use crate::error::Result;
use crate::nn::init::Init;
use crate::nn::notation::NetworkSpec;
use crate::nn::params::Params;

/// A network for images `(C, H, W)`.
#[derive(Debug)]
pub struct Network<T: Element> {
    params: Params<T>,
    grads: Params<T>,
}

/// One line of [`Network::summary`].
#[derive(Clone, Debug)]
pub struct LayerSummary {
    /// As in the notation: `conv64k3-relu-pool`.
    pub name: String,
    /// Output shape without the batch: `[C, H, W]` or `[M]`.
    pub output: Vec<usize>,
    /// Number of trained values.
    pub parameters: usize,
    /// Multiply-adds of one image's forward pass.
    pub macs: usize,
}

impl<T: Element> Network<T> {
    /// Checks every shape and draws the initial parameters from `seed`.
    pub fn new(spec: &NetworkSpec, input: [usize; 3], init: Init, seed: u64) -> Result<Self> {
        let _ = (spec, input, init, seed);
        todo!()
    }

    /// Input shape `[C, H, W]`.
    pub fn input(&self) -> [usize; 3] {
        todo!()
    }

    /// Number of classes: scores per image.
    pub fn classes(&self) -> usize {
        todo!()
    }

    /// The notation this network was built from; [`NetworkSpec`] parses it again.
    pub fn spec(&self) -> &NetworkSpec {
        todo!()
    }

    /// The trained parameters.
    pub fn params(&self) -> &Params<T> {
        &self.params
    }

    /// The trained parameters, to write to.
    pub fn params_mut(&mut self) -> &mut Params<T> {
        &mut self.params
    }

    /// Running means and variances of batchnorm.
    pub fn statistics(&self) -> &Params<T> {
        todo!()
    }

    /// Running means and variances of batchnorm, to write to.
    pub fn statistics_mut(&mut self) -> &mut Params<T> {
        todo!()
    }

    /// Gradients of the last [`Network::loss`], laid out as the parameters.
    pub fn grads(&self) -> &Params<T> {
        &self.grads
    }

    /// Parameters to write and gradients to read, for the optimizer.
    pub fn params_and_grads(&mut self) -> (&mut Params<T>, &Params<T>) {
        (&mut self.params, &self.grads)
    }

    /// Training mode: mean data loss (no regularisation) of images `x` `(N, C, H, W)` with labels `y`, and its gradients
    /// into [`Network::grads`]. Dropout draws from (`seed`, `step`).
    pub fn loss(&mut self, x: &[T], y: &[usize], seed: u64, step: u64) -> Result<T> {
        let _ = (x, y, seed, step);
        todo!()
    }

    /// Test mode: scores of images `x` `(N, C, H, W)` into `scores` `(N, classes)`.
    pub fn scores(&mut self, x: &[T], scores: &mut [T]) -> Result<()> {
        let _ = (x, scores);
        todo!()
    }

    /// One line per block.
    pub fn summary(&self) -> Vec<LayerSummary> {
        todo!()
    }
}
