//! Level 6. Networks by name: CS231n's two, with its parameters and defaults.

use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::init::Init;
use crate::nn::network::Network;
use crate::nn::notation::{LayerSpec, LossSpec, NetworkSpec, Reduction};
use crate::ops::activation::Activation;
use crate::shape::{Conv2d, Padding, Pool2d};

/// conv - relu - 2x2 max pool - affine - relu - affine - softmax, with CS231n's parameters and defaults.
///
/// CS231n's `dtype` is the type parameter of [`ThreeLayerConvNet::build`]; its `reg` is what
/// [`Network::regularized_loss`] and the solver's `l2` take. With `use_batchnorm`, which CS231n's stores and ignores,
/// batchnorm follows the convolution and the hidden affine layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ThreeLayerConvNet {
    /// Input images (C, H, W).
    pub input_dim: [usize; 3],
    /// Filters of the convolution.
    pub num_filters: usize,
    /// Height and width of the filters, in pixels. The padding keeps the image's size.
    pub filter_size: usize,
    /// Units of the hidden layer.
    pub hidden_dim: usize,
    /// Classes: scores per image.
    pub num_classes: usize,
    /// Standard deviation of the initial weights.
    pub weight_scale: f64,
    /// Batchnorm before both ReLUs.
    pub use_batchnorm: bool,
}

impl Default for ThreeLayerConvNet {
    fn default() -> Self {
        ThreeLayerConvNet {
            input_dim: [3, 32, 32],
            num_filters: 32,
            filter_size: 7,
            hidden_dim: 100,
            num_classes: 10,
            weight_scale: 1e-3,
            use_batchnorm: false,
        }
    }
}

const RELU: LayerSpec = LayerSpec::Activation(Activation::Relu);

fn affine(outputs: usize) -> LayerSpec {
    LayerSpec::Affine { outputs, bias: true }
}

impl ThreeLayerConvNet {
    /// The layers, as the notation lists them.
    pub fn spec(&self) -> NetworkSpec {
        let conv = Conv2d { padding: Padding::Same, ..Conv2d::default() };
        let norm = self.use_batchnorm.then_some(LayerSpec::BATCH_NORM);
        let kernel = (self.filter_size, self.filter_size);
        let mut layers = vec![LayerSpec::Conv { filters: self.num_filters, kernel, conv, bias: true }];
        layers.extend(norm.clone());
        layers.extend([RELU, LayerSpec::MaxPool(Pool2d::square(2)), affine(self.hidden_dim)]);
        layers.extend(norm);
        layers.extend([RELU, affine(self.num_classes)]);
        NetworkSpec { layers, loss: LossSpec::Softmax { smoothing: 0.0 }, reduction: Reduction::Mean }
    }

    /// The network, with initial weights drawn from `seed`.
    ///
    /// # Errors
    /// As [`Network::new`].
    pub fn build<T: Element>(&self, seed: u64) -> Result<Network<T>> {
        Network::new(&self.spec(), self.input_dim, Init::Gaussian { std: self.weight_scale }, seed)
    }
}

/// [affine - (batchnorm) - relu - (dropout)] x L - affine - softmax: a fully connected network of any depth.
#[derive(Clone, Debug, PartialEq)]
pub struct FullyConnectedNet {
    /// Input images (C, H, W); flattened.
    pub input_dim: [usize; 3],
    /// Units of each hidden layer.
    pub hidden_dims: Vec<usize>,
    /// Classes: scores per image.
    pub num_classes: usize,
    /// Standard deviation of the initial weights.
    pub weight_scale: f64,
    /// Batchnorm before every ReLU.
    pub use_batchnorm: bool,
    /// Probability of dropping a hidden value, 0 for no dropout.
    pub dropout: f64,
}

impl Default for FullyConnectedNet {
    fn default() -> Self {
        FullyConnectedNet {
            input_dim: [3, 32, 32],
            hidden_dims: vec![100],
            num_classes: 10,
            weight_scale: 1e-2,
            use_batchnorm: false,
            dropout: 0.0,
        }
    }
}

impl FullyConnectedNet {
    /// The layers, as the notation lists them.
    pub fn spec(&self) -> NetworkSpec {
        let mut layers = Vec::new();
        for &outputs in &self.hidden_dims {
            layers.push(affine(outputs));
            layers.extend(self.use_batchnorm.then_some(LayerSpec::BATCH_NORM));
            layers.push(RELU);
            layers.extend((self.dropout != 0.0).then_some(LayerSpec::Dropout { p: self.dropout }));
        }
        layers.push(affine(self.num_classes));
        NetworkSpec { layers, loss: LossSpec::Softmax { smoothing: 0.0 }, reduction: Reduction::Mean }
    }

    /// The network, with initial weights drawn from `seed`.
    ///
    /// # Errors
    /// As [`Network::new`], and [`Error::Invalid`] for a dropout probability outside 0 to 1.
    pub fn build<T: Element>(&self, seed: u64) -> Result<Network<T>> {
        if !(0.0..1.0).contains(&self.dropout) {
            let problem = format!("the probability is {}", self.dropout);
            return Err(Error::invalid("dropout", problem, "give 0 or more and less than 1"));
        }
        Network::new(&self.spec(), self.input_dim, Init::Gaussian { std: self.weight_scale }, seed)
    }
}
