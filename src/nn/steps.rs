//! Level 5. The steps of a network: what fusion gathered, with sizes and places of parameters.

use std::sync::Arc;

use crate::blocks::{Block, Core, Pass, Weights};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::fusion::{Fused, Gathered};
use crate::nn::graph::Value;
use crate::nn::layer::{Layer, of_type};
use crate::ops::activation::Activation;
use crate::params::{Layout, ParamKind, Params};
use crate::profile::Work;

/// What a step runs.
#[derive(Clone, Debug)]
pub(super) enum Kernel<T> {
    Block {
        block: Box<Block>,
        /// Indices of the parameters, where the block has them.
        places: Weights<Option<usize>>,
        /// Indices of the running mean and variance.
        running: Option<(usize, usize)>,
    },
    /// The sum of two values, and perhaps an activation.
    Sum(Option<Activation>),
    Layer {
        layer: Arc<dyn Layer<T>>,
        /// Index of its first parameter, and how many it has.
        first: usize,
        count: usize,
    },
}

/// One kernel and what it works on. Step `i` makes value `i + 1`.
#[derive(Clone, Debug)]
pub(super) struct Step<T> {
    /// Its number, from 1, and its layers in notation, for the profile.
    pub(super) label: String,
    pub(super) notation: String,
    pub(super) kernel: Kernel<T>,
    pub(super) inputs: Vec<Value>,
    /// `[C, H, W]` of an image.
    pub(super) input: [usize; 3],
    pub(super) output: [usize; 3],
}

impl<T: Element> Step<T> {
    pub(super) fn input_len(&self) -> usize {
        self.input.iter().product()
    }

    pub(super) fn output_len(&self) -> usize {
        self.output.iter().product()
    }

    /// Elements of an image's inputs and output, as they lie in this pass.
    pub(super) fn lens(&self, pass: Pass) -> [usize; 2] {
        match &self.kernel {
            Kernel::Block { block, .. } => block.lens(pass),
            Kernel::Sum(_) | Kernel::Layer { .. } => [self.input_len(), self.output_len()],
        }
    }

    /// Indices of its parameters.
    pub(super) fn params(&self) -> Vec<usize> {
        match &self.kernel {
            Kernel::Block { places, .. } => {
                [places.w, places.b, places.gamma, places.beta].into_iter().flatten().collect()
            }
            Kernel::Sum(_) => Vec::new(),
            Kernel::Layer { first, count, .. } => (*first..first + count).collect(),
        }
    }

    /// How many values its parameters have.
    pub(super) fn parameters(&self, params: &Params<T>) -> usize {
        self.params().into_iter().map(|index| params.slice(index).len()).sum()
    }

    /// Whether it gives the same in training and in test mode.
    pub(super) fn is_the_same_in_test_mode(&self) -> bool {
        match &self.kernel {
            Kernel::Block { block, .. } => block.parts().norm.is_none() && block.parts().dropout.is_none(),
            Kernel::Sum(_) => true,
            Kernel::Layer { .. } => false,
        }
    }

    /// Multiply-adds of one image's forward pass.
    pub(super) fn multiply_adds(&self) -> usize {
        match &self.kernel {
            Kernel::Block { block, .. } => block.multiply_adds(),
            Kernel::Sum(_) => 0,
            Kernel::Layer { layer, .. } => layer.multiply_adds(self.input),
        }
    }

    /// One pass over `images` images, for the [profile](crate::profile): in memory the inputs count `inputs` times and the
    /// `parameters` values `weights` times, because backward also has their gradients; there are as many products as inputs.
    pub(super) fn work(&self, images: usize, parameters: usize, inputs: usize, weights: usize) -> Work<'_> {
        let image = inputs * self.inputs.len() * self.input_len() + self.output_len();
        Work {
            op: &self.label,
            flops: inputs * 2 * self.multiply_adds() * images,
            bytes: (images * image + weights * parameters) * size_of::<T>(),
        }
    }
}

/// The steps of a network, the sizes of its values, and what its parameters are called.
#[derive(Debug)]
pub(super) struct Compiled<T> {
    pub(super) steps: Vec<Step<T>>,
    pub(super) params: Layout,
    pub(super) statistics: Layout,
}

/// Steps of what was gathered, for images `[C, H, W]`.
///
/// # Errors
/// [`Error::Invalid`] or [`Error::Shape`] where a layer does not fit the output of the one before it.
pub(super) fn compile<T: Element>(gathered: &[Gathered], image: [usize; 3]) -> Result<Compiled<T>> {
    let mut names = Names::default();
    let mut compiled =
        Compiled { steps: Vec::<Step<T>>::new(), params: Layout::default(), statistics: Layout::default() };
    let mut values = vec![0];
    for Gathered { fused, inputs, output, shortcut, notation } in gathered {
        let value = |made| values.iter().position(|&v| v == made).expect("steps make what later steps take");
        let inputs: Vec<Value> = inputs.iter().map(|&made| value(made)).collect();
        let input = inputs[0].checked_sub(1).map_or(image, |step| compiled.steps[step].output);
        let (kernel, output_size) = match fused {
            Fused::Block(parts) => {
                let block = Box::new(Block::new::<T>(**parts, input)?);
                let (params, statistics) = (&mut compiled.params, &mut compiled.statistics);
                let (places, running) = names.block(&block, *shortcut, params, statistics);
                let output = block.output();
                (Kernel::Block { block, places, running }, output)
            }
            Fused::Sum(activation) => (Kernel::Sum(*activation), input),
            Fused::Layer(layer) => {
                let layer = of_type::<T>(layer);
                let (first, count) = names.layer(&*layer, input, &mut compiled.params);
                let output = layer.output(input)?;
                (Kernel::Layer { layer, first, count }, output)
            }
        };
        let label = format!("{} {notation}", compiled.steps.len() + 1);
        let notation = notation.clone();
        compiled.steps.push(Step { label, notation, kernel, inputs, input, output: output_size });
        values.push(*output);
    }
    match compiled.steps.last().map(|step| step.output) {
        None => Err(Error::invalid("network", "it has no layers", "give at least one, such as affine10")),
        Some([_, 1, 1]) => Ok(compiled),
        Some(size) => Err(Error::invalid(
            "network",
            format!("it ends in images of {size:?}, not in one score per class"),
            "end it with an affine layer, such as affine10, or with gap",
        )),
    }
}

/// Counts layers to name their parameters: `conv1.weight`, `bn1.bias`, `shortcut1.bn.weight`.
#[derive(Default)]
struct Names {
    convolutions: usize,
    affines: usize,
    norms: usize,
    shortcuts: usize,
    layers: Vec<(String, usize)>,
}

impl Names {
    /// Adds a block's parameters and statistics to the layouts; returns their places.
    fn block(
        &mut self,
        block: &Block,
        shortcut: bool,
        params: &mut Layout,
        statistics: &mut Layout,
    ) -> (Weights<Option<usize>>, Option<(usize, usize)>) {
        let (parts, shapes) = (block.parts(), block.weight_shapes());
        let core = match parts.core {
            Some(_) if shortcut => {
                self.shortcuts += 1;
                format!("shortcut{}", self.shortcuts)
            }
            Some(Core::Conv { .. }) => {
                self.convolutions += 1;
                format!("conv{}", self.convolutions)
            }
            // Only the images are whitened.
            Some(Core::Whiten { .. }) => "whiten1".to_owned(),
            Some(Core::Affine { .. }) => {
                self.affines += 1;
                format!("affine{}", self.affines)
            }
            None => String::new(),
        };
        self.norms += usize::from(parts.norm.is_some() && !shortcut);
        let norm = if shortcut { format!("{core}.bn") } else { format!("bn{}", self.norms) };
        let fixed = block.fixed();
        let mut push = |shape: &[usize], name: String, kind, fixed| {
            (!shape.is_empty()).then(|| params.push_param(name, shape, kind, fixed))
        };
        let places = Weights {
            w: push(&shapes.w, format!("{core}.weight"), ParamKind::Weight, fixed.w),
            b: push(&shapes.b, format!("{core}.bias"), ParamKind::Bias, fixed.b),
            gamma: push(&shapes.gamma, format!("{norm}.weight"), ParamKind::Scale, fixed.gamma),
            beta: push(&shapes.beta, format!("{norm}.bias"), ParamKind::Bias, fixed.beta),
        };
        let running = parts.norm.map(|_| {
            let mut push = |name: &str| statistics.push(format!("{norm}.{name}"), &shapes.gamma, ParamKind::Statistic);
            (push("running_mean"), push("running_var"))
        });
        (places, running)
    }

    /// Adds a layer's parameters to the layout; returns the index of the first and their number.
    fn layer<T: Element>(&mut self, layer: &dyn Layer<T>, input: [usize; 3], params: &mut Layout) -> (usize, usize) {
        let notation = layer.notation();
        let name = notation.trim_end_matches(|c: char| !c.is_alphabetic()).to_owned();
        let number = match self.layers.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => {
                *count += 1;
                *count
            }
            None => {
                self.layers.push((name.clone(), 1));
                1
            }
        };
        let (declared, first) = (layer.params(input), params.len());
        for param in &declared {
            params.push(format!("{name}{number}.{}", param.name), &param.shape, param.kind);
        }
        (first, declared.len())
    }
}

impl Weights<Option<usize>> {
    /// The values at these places; empty where there is none.
    pub(super) fn values<T: Element>(self, params: &Params<T>) -> Weights<&[T]> {
        let slice = |index: Option<usize>| index.map_or(&[][..], |index| params.slice(index));
        Weights { w: slice(self.w), b: slice(self.b), gamma: slice(self.gamma), beta: slice(self.beta) }
    }
}
