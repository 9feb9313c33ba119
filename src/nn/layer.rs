//! Level 5. Layers beyond the parts of blocks: what one has to do to be a node of a network.
//!
//! [`Layer`] is implemented for a type of the user's own, which goes into a network as [`LayerSpec::Layer`], or for one of
//! [`crate::nn::layers`], which has a name in the [notation](crate::nn::notation) too. `examples/04_a_layer_of_your_own.rs`
//! shows one, with its gradient checked.
//!
//! [`LayerSpec::Layer`]: crate::nn::notation::LayerSpec::Layer

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use crate::element::{Element, Kind};
use crate::error::Result;
use crate::nn::onnx::Graph;
use crate::ops::Mode;
use crate::params::{ParamKind, Params};
use crate::workspace::Workspace;

/// A layer with one input and one output, for elements of type `T`.
///
/// All memory is the network's: a layer has its sizes and constants, and works on slices.
pub trait Layer<T: Element>: Debug + Send + Sync {
    /// How it is written: a name, and numbers that make it what it is, such as `se16`.
    fn notation(&self) -> String;

    /// Output `[C, H, W]` for an input `[C, H, W]`.
    ///
    /// # Errors
    /// If the input does not suit it.
    fn output(&self, input: [usize; 3]) -> Result<[usize; 3]>;

    /// Its parameters, in the order in which [`Forward::params`] counts them.
    fn params(&self, _input: [usize; 3]) -> Vec<ParamDecl> {
        Vec::new()
    }

    /// Elements per image that forward leaves in its cache for backward.
    fn cache(&self, _input: [usize; 3]) -> usize {
        0
    }

    /// Multiply-adds of one image's forward pass.
    fn multiply_adds(&self, _input: [usize; 3]) -> usize {
        0
    }

    /// Adds what it does in test mode to an ONNX graph: returns the name of what it makes of the value `x` `(N, C, H, W)`, of the
    /// same form, with its parameters by their names. `None`, unless it says otherwise: then its networks cannot be exported.
    fn onnx(&self, _graph: &mut Graph, _x: &str, _params: &[&str]) -> Option<String> {
        None
    }

    /// Sets `call.out` from `call.x`.
    fn forward(&self, call: Forward<'_, T>);

    /// Sets the gradients of the parameters, and `call.dx` if it is asked for, from `call.dout`, which may be used up.
    fn backward(&self, call: Backward<'_, T>);
}

/// A parameter that a layer declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamDecl {
    /// Its name within the layer, such as `weight`; the network puts the layer's name and number before it.
    pub name: &'static str,
    /// `(F, C / groups, KH, KW)` or `(D, M)` for weights, any other for the rest.
    pub shape: Vec<usize>,
    /// What it is: weights are drawn by the network's initialiser, scales begin at 1, biases at 0.
    pub kind: ParamKind,
}

/// What the forward pass of a layer gets.
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Images `N`.
    pub images: usize,
    /// `[C, H, W]` of one image of the input.
    pub input: [usize; 3],
    /// The input `[N, C, H, W]`.
    pub x: &'a [T],
    /// The layer's parameters.
    pub params: LayerParams<'a, T>,
    /// Where the output goes, all of it.
    pub out: &'a mut [T],
    /// Kept until backward: `N` times [`Layer::cache`].
    pub cache: &'a mut [T],
    /// Training or test.
    pub mode: Mode,
    /// Scratch.
    pub ws: &'a mut Workspace,
}

/// What the backward pass of a layer gets.
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// Images `N`.
    pub images: usize,
    /// `[C, H, W]` of one image of the input.
    pub input: [usize; 3],
    /// The input `[N, C, H, W]`.
    pub x: &'a [T],
    /// The output of the forward pass.
    pub out: &'a [T],
    /// The layer's parameters.
    pub params: LayerParams<'a, T>,
    /// Where their gradients go: set, not added to.
    pub grads: LayerGrads<'a, T>,
    /// The gradient of the output.
    pub dout: &'a mut [T],
    /// Where the gradient of the input goes, if anybody wants it: set, not added to.
    pub dx: Option<&'a mut [T]>,
    /// What forward left there.
    pub cache: &'a mut [T],
    /// Scratch.
    pub ws: &'a mut Workspace,
}

/// The parameters of one layer among those of its network.
#[derive(Clone, Copy, Debug)]
pub struct LayerParams<'a, T: Element> {
    pub(super) params: &'a Params<T>,
    pub(super) first: usize,
}

impl<'a, T: Element> LayerParams<'a, T> {
    /// Values of parameter `index`, as [`Layer::params`] lists them.
    pub fn get(&self, index: usize) -> &'a [T] {
        self.params.slice(self.first + index)
    }
}

/// The gradients of one layer's parameters.
#[derive(Debug)]
pub struct LayerGrads<'a, T: Element> {
    pub(super) grads: &'a mut Params<T>,
    pub(super) first: usize,
}

impl<T: Element> LayerGrads<'_, T> {
    /// Where the gradient of parameter `index` goes.
    pub fn get_mut(&mut self, index: usize) -> &mut [T] {
        self.grads.slice_mut(self.first + index)
    }

    /// Where the gradients of several parameters go.
    ///
    /// # Panics
    /// If an index occurs twice.
    pub fn all_mut<const N: usize>(&mut self, indices: [usize; N]) -> [&mut [T]; N] {
        self.grads.slices_mut(indices.map(|index| Some(self.first + index)))
    }
}

/// A layer for elements of either type, as networks list it before they are made of numbers of one type. Every type that
/// is a [`Layer`] for both is one.
pub trait AnyLayer: Layer<f32> + Layer<f64> {}

impl<L: Layer<f32> + Layer<f64>> AnyLayer for L {}

/// How a layer is written.
pub(super) fn notation(layer: &dyn AnyLayer) -> String {
    Layer::<f32>::notation(layer)
}

/// The layer for elements of type `T`.
pub(super) fn of_type<T: Element>(layer: &Arc<dyn AnyLayer>) -> Arc<dyn Layer<T>> {
    let any: Box<dyn Any> = match T::KIND {
        Kind::F32 => Box::new(layer.clone() as Arc<dyn Layer<f32>>),
        Kind::F64 => Box::new(layer.clone() as Arc<dyn Layer<f64>>),
    };
    *any.downcast().expect("the kind names the type")
}
