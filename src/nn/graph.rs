//! Level 5. A network as a graph of its layers: nodes in the order in which they run, each making one value of earlier ones.

use std::sync::Arc;

use crate::blocks::Block;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::fusion::single;
use crate::nn::layer::{AnyLayer, of_type};
use crate::nn::notation::LayerSpec;
use crate::shape::{Conv2d, check_elements};

/// Index of a value: 0 is the network's input, `i + 1` what node `i` makes.
pub(super) type Value = usize;

/// What a node does.
#[derive(Clone, Debug)]
pub(super) enum Op {
    /// A layer that may become part of a block.
    Part(LayerSpec),
    /// Any other layer.
    Layer(Arc<dyn AnyLayer>),
    /// The sum of two values.
    Add,
}

/// One layer, or a sum.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) op: Op,
    pub(super) inputs: Vec<Value>,
    /// Whether it belongs to the shortcut of a residual.
    pub(super) shortcut: bool,
}

/// The layers of a network and the sizes of all values.
#[derive(Clone, Debug)]
pub(super) struct Graph {
    pub(super) nodes: Vec<Node>,
    /// `[C, H, W]` of each value.
    pub(super) sizes: Vec<[usize; 3]>,
}

impl Graph {
    /// The graph of these layers, for images `input` `[C, H, W]` and elements of type `T`.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Shape`] where a layer does not fit what comes before it.
    pub(super) fn new<T: Element>(layers: &[LayerSpec], input: [usize; 3]) -> Result<Self> {
        check_elements("network", &input)?;
        let mut graph = Graph { nodes: Vec::new(), sizes: vec![input] };
        graph.chain::<T>(layers, 0)?;
        Ok(graph)
    }

    /// How many nodes take each value.
    pub(super) fn uses(&self) -> Vec<usize> {
        let mut uses = vec![0; self.sizes.len()];
        self.nodes.iter().flat_map(|node| &node.inputs).for_each(|&value| uses[value] += 1);
        uses
    }

    /// Adds layers one after the other, from `value` on; returns what the last one makes.
    fn chain<T: Element>(&mut self, layers: &[LayerSpec], mut value: Value) -> Result<Value> {
        for layer in layers {
            value = match layer {
                LayerSpec::Residual(inside) => {
                    let made = self.chain::<T>(inside, value)?;
                    let shortcut = self.shortcut::<T>(value, made)?;
                    self.push(Op::Add, vec![made, shortcut], self.sizes[made], false)
                }
                LayerSpec::Layer(layer) => {
                    let size = of_type::<T>(layer).output(self.sizes[value])?;
                    self.push(Op::Layer(layer.clone()), vec![value], size, false)
                }
                part => self.part::<T>(part.clone(), value, false)?,
            };
        }
        Ok(value)
    }

    fn part<T: Element>(&mut self, part: LayerSpec, value: Value, shortcut: bool) -> Result<Value> {
        if matches!(part, LayerSpec::Whiten { .. }) && value != 0 {
            let problem = format!("{part} whitens patches of the images, and gets what other layers make");
            return Err(Error::invalid("network", problem, format!("begin the network with {part}")));
        }
        // A block of this layer alone knows its sizes.
        let size = Block::new::<T>(single(&part), self.sizes[value])?.output();
        Ok(self.push(Op::Part(part), vec![value], size, shortcut))
    }

    fn push(&mut self, op: Op, inputs: Vec<Value>, size: [usize; 3], shortcut: bool) -> Value {
        self.nodes.push(Node { op, inputs, shortcut });
        self.sizes.push(size);
        self.nodes.len()
    }

    /// What is added to `made` for `input`: itself, or, if the sizes differ, a 1x1 convolution and batchnorm of it, with the
    /// stride that leads to the size of `made` (option B of He et al. 2016).
    fn shortcut<T: Element>(&mut self, input: Value, made: Value) -> Result<Value> {
        let ([_, h, w], to) = (self.sizes[input], self.sizes[made]);
        if self.sizes[input] == to {
            return Ok(input);
        }
        let [filters, rows, cols] = to;
        let conv = Conv2d { stride: (h.div_ceil(rows).max(1), w.div_ceil(cols).max(1)), ..Conv2d::default() };
        let projection = self.part::<T>(LayerSpec::Conv { filters, kernel: (1, 1), conv, bias: true }, input, true)?;
        if self.sizes[projection] != to {
            let problem =
                format!("its layers make {to:?} of {:?}, which no stride of a 1x1 convolution does", self.sizes[input]);
            return Err(Error::invalid(
                "residual",
                problem,
                "choose strides or pools that divide the size, or padding 'same'",
            ));
        }
        self.part::<T>(LayerSpec::BATCH_NORM, projection, true)
    }
}
