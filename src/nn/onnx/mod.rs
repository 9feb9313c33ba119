//! Level 5. A network as an ONNX graph, for other programs to run.
//!
//! Each layer becomes the operator of its name in test mode: batchnorm with its running statistics, no dropout, no loss. What
//! runs the graph fuses it in its own way, so nothing is folded here. The batch's size is free.
//!
//! | layer | operators ([ONNX](https://onnx.ai/onnx/operators/), opset 20) |
//! | --- | --- |
//! | `conv`, `whiten` | `Conv` |
//! | `affine` | `Flatten`, `Gemm` |
//! | `bn` | `BatchNormalization` |
//! | `relu`, `leaky`, `silu`, `gelu` | `Relu`, `LeakyRelu`, `Sigmoid` and `Mul`, `Gelu` |
//! | `pool`, `avgpool`, `gap` | `MaxPool`, `AveragePool`, `GlobalAveragePool` |
//! | `res` | `Add` |
//! | any other | what its [`Layer::onnx`](super::layer::Layer::onnx) adds |

mod messages;

use prost::Message;

use self::messages::{AttributeField, Dimension, Entry, FLOAT, INT64, Model, Node, OperatorSet, Shape, Size, Tensor};
use self::messages::{TensorType, Type, Value};
use super::network::Network;
use super::steps::{Kernel, Step};
use crate::blocks::{Block, Core, Pool, Weights};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::ops::activation::Activation;
use crate::params::Params;
use crate::shape::{Axis, Pool2dShape};

/// The first with `Gelu`; ONNX Runtime reads it since 1.17.
const OPSET: i64 = 20;
/// Version of the file format that came with it.
const IR_VERSION: i64 = 9;
/// What a file of protobuf may have.
const MOST_BYTES: usize = i32::MAX as usize;

/// Names of the graph's input and output.
const INPUT: &str = "images";
const OUTPUT: &str = "scores";
/// The batch's size.
const BATCH: &str = "batch";

/// What makes a network's input of pixels: `(pixel - mean) * scale`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scaling<'a> {
    /// `(C, H, W)`
    pub(crate) mean: &'a [f32],
    /// `(C)`
    pub(crate) scale: &'a [f32],
}

/// A property of a node.
#[derive(Clone, Debug, PartialEq)]
pub enum Attribute {
    /// A number.
    Float(f32),
    /// A whole number.
    Int(i64),
    /// Whole numbers.
    Ints(Vec<i64>),
    /// A word.
    Text(&'static str),
}

/// An ONNX graph under construction. Values go by their names.
#[derive(Debug, Default)]
pub struct Graph {
    graph: messages::Graph,
}

impl Graph {
    /// Adds a node of operator `op`; returns the name of its output.
    pub fn node(&mut self, op: &str, inputs: &[&str], attributes: &[(&str, Attribute)]) -> String {
        let name = format!("{}_{}", op.to_lowercase(), self.graph.nodes.len() + 1);
        self.push_node(op, inputs, attributes, &name);
        name
    }

    fn push_node(&mut self, op: &str, inputs: &[&str], attributes: &[(&str, Attribute)], output: &str) {
        self.graph.nodes.push(Node {
            inputs: inputs.iter().map(|&input| input.to_owned()).collect(),
            outputs: vec![output.to_owned()],
            name: output.to_owned(),
            op_type: op.to_owned(),
            attributes: attributes.iter().map(field).collect(),
        });
    }

    /// Adds constant `f32` numbers, as many as `shape` says; returns their name.
    pub fn constant<T: Element>(&mut self, shape: &[usize], values: &[T]) -> String {
        let name = format!("constant_{}", self.graph.initializers.len() + 1);
        self.tensor(&name, shape, values);
        name
    }

    fn tensor<T: Element>(&mut self, name: &str, shape: &[usize], values: &[T]) {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        let raw_data = values.iter().flat_map(|value| (value.f64() as f32).to_le_bytes()).collect();
        self.push(name, shape, FLOAT, raw_data);
    }

    /// Adds constant whole numbers, such as axes; returns their name.
    fn whole_numbers(&mut self, values: &[i64]) -> String {
        let name = format!("constant_{}", self.graph.initializers.len() + 1);
        let raw_data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.push(&name, &[values.len()], INT64, raw_data);
        name
    }

    fn push(&mut self, name: &str, shape: &[usize], data_type: i32, raw_data: Vec<u8>) {
        let dims = shape.iter().map(|&size| size as i64).collect();
        self.graph.initializers.push(Tensor { dims, data_type, name: name.to_owned(), raw_data });
    }

    /// Adds a parameter or statistic; returns its name, which is the network's for it.
    fn param<T: Element>(&mut self, params: &Params<T>, index: usize) -> String {
        let param = params.param(index);
        self.tensor(&param.name, &param.shape, params.slice(index));
        param.name.clone()
    }

    fn activation(&mut self, activation: Activation, x: &str) -> String {
        match activation {
            Activation::Relu => self.node("Relu", &[x], &[]),
            Activation::LeakyRelu { slope } => {
                self.node("LeakyRelu", &[x], &[("alpha", Attribute::Float(slope as f32))])
            }
            Activation::Silu => {
                let sigmoid = self.node("Sigmoid", &[x], &[]);
                self.node("Mul", &[x, &sigmoid], &[])
            }
            Activation::Gelu => self.node("Gelu", &[x], &[("approximate", Attribute::Text("tanh"))]),
        }
    }

    /// A value `(N, C, H, W)` as `(N, CHW)`.
    pub fn flatten(&mut self, x: &str) -> String {
        self.node("Flatten", &[x], &[("axis", Attribute::Int(1))])
    }

    /// A value `(N, C)` as `(N, C, 1, 1)`.
    pub fn unflatten(&mut self, x: &str) -> String {
        let axes = self.whole_numbers(&[2, 3]);
        self.node("Unsqueeze", &[x, &axes], &[])
    }
}

fn field((name, attribute): &(&str, Attribute)) -> AttributeField {
    let mut field = AttributeField { name: (*name).to_owned(), ..AttributeField::default() };
    match attribute {
        Attribute::Float(value) => (field.f, field.kind) = (Some(*value), 1),
        Attribute::Int(value) => (field.i, field.kind) = (Some(*value), 2),
        Attribute::Text(value) => (field.s, field.kind) = (Some(value.as_bytes().to_vec()), 3),
        Attribute::Ints(values) => (field.ints, field.kind) = (values.clone(), 7),
    }
    field
}

fn ints<const N: usize>(values: [usize; N]) -> Attribute {
    Attribute::Ints(values.map(|value| value as i64).to_vec())
}

/// What windows of convolutions and pools have in common.
fn windows(rows: Axis, cols: Axis) -> Vec<(&'static str, Attribute)> {
    vec![
        ("kernel_shape", ints([rows.window, cols.window])),
        ("strides", ints([rows.stride, cols.stride])),
        ("pads", ints([rows.before, cols.before, rows.after, cols.after])),
        ("dilations", ints([rows.dilation, cols.dilation])),
    ]
}

/// A value of the network. After affine layers it has no sides.
#[derive(Clone, Debug)]
struct Made {
    name: String,
    /// Whether it is `(N, M)`, and not `(N, C, H, W)`.
    flat: bool,
}

impl Made {
    fn images(name: String) -> Self {
        Made { name, flat: false }
    }

    /// Its name as `(N, M)`.
    fn as_flat(&self, graph: &mut Graph) -> String {
        if self.flat { self.name.clone() } else { graph.flatten(&self.name) }
    }

    /// Its name as `(N, C, H, W)`.
    fn as_images(&self, graph: &mut Graph) -> String {
        if !self.flat {
            return self.name.clone();
        }
        graph.unflatten(&self.name)
    }
}

/// The nodes of a block, whose parameters have these names.
fn block(
    graph: &mut Graph,
    block: &Block,
    weights: &Weights<String>,
    running: Option<(String, String)>,
    x: Made,
) -> Result<Made> {
    let parts = block.parts();
    let (mut made, mut size) = (x, block.input());
    match parts.core {
        Some(Core::Affine { outputs }) => {
            let x = made.as_flat(graph);
            made = Made { name: graph.node("Gemm", &product(&x, weights), &[]), flat: true };
            size = [outputs, 1, 1];
        }
        Some(Core::Conv { .. } | Core::Whiten { .. }) => {
            let shape = block.conv_shape().expect("a block with this core has one");
            let x = made.as_images(graph);
            let mut attributes = windows(shape.rows(), shape.cols());
            attributes.push(("group", Attribute::Int(shape.groups() as i64)));
            made = Made::images(graph.node("Conv", &product(&x, weights), &attributes));
            size = [shape.filters(), shape.rows().output, shape.cols().output];
        }
        None => {}
    }
    if let Some(pool) = parts.early_pool {
        (made, size) = pooled(graph, Pool::Max(pool), &made, size)?;
    }
    if let (Some(norm), Some((mean, variance))) = (parts.norm, running) {
        let inputs = [&made.name, &weights.gamma, &weights.beta, &mean, &variance].map(String::as_str);
        made.name = graph.node("BatchNormalization", &inputs, &[("epsilon", Attribute::Float(norm.eps as f32))]);
    }
    if let Some(activation) = parts.activation {
        made.name = graph.activation(activation, &made.name);
    }
    if let Some(pool) = parts.pool {
        (made, _) = pooled(graph, pool, &made, size)?;
    }
    Ok(made)
}

/// What a product takes: input, weights, and a bias if there is one.
fn product<'a>(x: &'a str, weights: &'a Weights<String>) -> Vec<&'a str> {
    [x, &weights.w, &weights.b].into_iter().filter(|name| !name.is_empty()).collect()
}

/// A pooled value and its size.
fn pooled(graph: &mut Graph, pool: Pool, x: &Made, [c, h, w]: [usize; 3]) -> Result<(Made, [usize; 3])> {
    let x = x.as_images(graph);
    let (op, pool) = match pool {
        Pool::Max(pool) => ("MaxPool", pool),
        Pool::Avg(pool) => ("AveragePool", pool),
        Pool::GlobalAvg => return Ok((Made::images(graph.node("GlobalAveragePool", &[&x], &[])), [c, 1, 1])),
    };
    let shape = Pool2dShape::new([1, c, h, w], &pool)?;
    let mut attributes = windows(shape.rows(), shape.cols());
    if op == "AveragePool" {
        attributes.push(("count_include_pad", Attribute::Int(1)));
    }
    Ok((Made::images(graph.node(op, &[&x], &attributes)), [c, shape.rows().output, shape.cols().output]))
}

/// The nodes of a step, which takes these values.
fn step<T: Element>(graph: &mut Graph, network: &Network<T>, step: &Step<T>, inputs: &[Made]) -> Result<Made> {
    match &step.kernel {
        Kernel::Block { block: parts, places, running } => {
            let mut add = |place: Option<usize>| place.map(|i| graph.param(network.params(), i)).unwrap_or_default();
            let weights =
                Weights { w: add(places.w), b: add(places.b), gamma: add(places.gamma), beta: add(places.beta) };
            let mut statistic = |index| graph.param(network.statistics(), index);
            let running = running.map(|(mean, variance)| (statistic(mean), statistic(variance)));
            block(graph, parts, &weights, running, inputs[0].clone())
        }
        Kernel::Sum(activation) => {
            let [a, b] = [0, 1].map(|i: usize| inputs[i].as_images(graph));
            let sum = graph.node("Add", &[&a, &b], &[]);
            Ok(Made::images(activation.map_or(sum.clone(), |activation| graph.activation(activation, &sum))))
        }
        Kernel::Layer { layer, first, count } => {
            let params: Vec<_> = (*first..first + count).map(|i| graph.param(network.params(), i)).collect();
            let params: Vec<_> = params.iter().map(String::as_str).collect();
            let x = inputs[0].as_images(graph);
            layer.onnx(graph, &x, &params).map(Made::images).ok_or_else(|| {
                let problem = format!("the layer {} does not say what it is in ONNX's operators", layer.notation());
                Error::invalid("ONNX export", problem, "implement `Layer::onnx` for it")
            })
        }
    }
}

/// A file in the ONNX format that computes the network's scores `(batch, classes)` of images `(batch, C, H, W)`, or of pixels
/// if `scaling` is to make images of them; `metadata` are names and values for whoever reads it. Numbers are `f32`.
///
/// # Errors
/// [`Error::Invalid`] if the network has a layer without ONNX operators, or more than 2 GB.
pub(crate) fn encode<T: Element>(
    network: &Network<T>,
    scaling: Option<Scaling<'_>>,
    metadata: &[(&str, String)],
) -> Result<Vec<u8>> {
    let mut graph = Graph::default();
    let mut values = vec![Made::images(INPUT.to_owned())];
    let [c, h, w] = network.input();
    if let Some(Scaling { mean, scale }) = scaling {
        let (mean, scale) = (graph.constant(&[1, c, h, w], mean), graph.constant(&[1, c, 1, 1], scale));
        let centred = graph.node("Sub", &[INPUT, &mean], &[]);
        values[0].name = graph.node("Mul", &[&centred, &scale], &[]);
    }
    for taken in network.steps() {
        let inputs: Vec<_> = taken.inputs.iter().map(|&value| values[value].clone()).collect();
        values.push(step(&mut graph, network, taken, &inputs)?);
    }
    let scores = values.pop().expect("networks have steps").as_flat(&mut graph);
    graph.push_node("Identity", &[&scores], &[], OUTPUT);

    let mut graph = graph.graph;
    graph.name = network.spec().to_string();
    graph.inputs = vec![declare(INPUT, &[c, h, w])];
    graph.outputs = vec![declare(OUTPUT, &[network.classes()])];
    let entry = |(key, value): &(&str, String)| Entry { key: (*key).to_owned(), value: value.clone() };
    let model = Model {
        ir_version: IR_VERSION,
        producer_name: env!("CARGO_PKG_NAME").to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        graph,
        opset_import: vec![OperatorSet { domain: String::new(), version: OPSET }],
        metadata: metadata.iter().map(entry).collect(),
    };
    let bytes = model.encoded_len();
    if bytes > MOST_BYTES {
        let problem = format!("the network takes {bytes} bytes, and the format allows {MOST_BYTES}");
        return Err(Error::invalid("ONNX export", problem, "export a smaller network, or its values as npz"));
    }
    Ok(model.encode_to_vec())
}

/// `f32` values of this size for each image of a batch.
fn declare(name: &str, size: &[usize]) -> Value {
    let fixed = size.iter().map(|&size| Size::Fixed(size as i64));
    let dims = [Size::Free(BATCH.to_owned())].into_iter().chain(fixed).map(|size| Dimension { size: Some(size) });
    let tensor = TensorType { element: FLOAT, shape: Shape { dims: dims.collect() } };
    Value { name: name.to_owned(), kind: Type { tensor } }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::nn::init::Init;
    use crate::nn::notation::{LayerSpec, NetworkSpec};

    fn network(notation: &str) -> Network<f64> {
        Network::new(&NetworkSpec::parse(notation).unwrap(), [3, 8, 8], Init::He, 0).unwrap()
    }

    fn graph(notation: &str, scaling: Option<Scaling<'_>>) -> messages::Graph {
        Model::decode(&encode(&network(notation), scaling, &[]).unwrap()[..]).unwrap().graph
    }

    /// Every operator once; those after affine layers get their sides back. That runtimes compute the right scores with them is
    /// tested where there is one (`python/tests`).
    #[test]
    fn layers_become_operators() {
        for (notation, want) in [
            ("conv4-relu-pool-affine2", "Conv Relu MaxPool Flatten Gemm"),
            (
                "conv4-pool-bn-leaky-avgpool-gap",
                "Conv MaxPool BatchNormalization LeakyRelu AveragePool GlobalAveragePool Flatten",
            ),
            ("whiten2-gelu-affine4-bn-silu-dropout0.5", "Conv Gelu Flatten Gemm BatchNormalization Sigmoid Mul"),
            (
                "affine4-res[affine4]-relu-conv2k1-gap",
                "Flatten Gemm Gemm Unsqueeze Unsqueeze Add Relu Conv GlobalAveragePool Flatten",
            ),
            ("affine4-div8", "Flatten Gemm Unsqueeze Div Flatten"),
            ("se3-gap", "GlobalAveragePool Flatten Gemm Relu Gemm Sigmoid Unsqueeze Mul GlobalAveragePool Flatten"),
        ] {
            let got: Vec<_> = graph(notation, None).nodes.into_iter().map(|node| node.op_type).collect();
            assert_eq!(got.join(" "), format!("{want} Identity"), "{notation}");
        }
    }

    /// Each value is made before it is taken, under a name of its own, and each constant is taken; their sizes are right.
    #[test]
    fn graphs_are_whole() {
        let (mean, scale) = ([0.5; 192], [2.0; 3]);
        let graph = graph(
            "conv8s2-bn-relu-se4-res[conv16s2b0-bn-relu-conv16-bn]-relu-affine9-div3",
            Some(Scaling { mean: &mean, scale: &scale }),
        );
        let constants: HashSet<_> = graph.initializers.iter().map(|tensor| &tensor.name).collect();
        let mut known: HashSet<&String> = constants.iter().copied().chain([&graph.inputs[0].name]).collect();
        assert_eq!(known.len(), graph.initializers.len() + 1, "names are unique");
        let mut taken = HashSet::new();
        for node in &graph.nodes {
            for input in &node.inputs {
                assert!(known.contains(input), "{} takes {input}, which is not there yet", node.name);
                taken.insert(input);
            }
            assert!(known.insert(&node.outputs[0]), "{} is made twice", node.outputs[0]);
        }
        assert!(constants.is_subset(&taken), "{:?} are not used", constants.difference(&taken));
        assert_eq!(graph.nodes.last().unwrap().outputs, [OUTPUT]);
        for tensor in &graph.initializers {
            let size = if tensor.data_type == INT64 { 8 } else { 4 };
            assert_eq!(tensor.dims.iter().product::<i64>() * size, tensor.raw_data.len() as i64, "{}", tensor.name);
        }
        let size = |value: &Value| -> Vec<_> {
            value.kind.tensor.shape.dims.iter().map(|dim| dim.size.clone().unwrap()).collect()
        };
        let batch = || Size::Free(BATCH.to_owned());
        assert_eq!(size(&graph.inputs[0]), [batch(), Size::Fixed(3), Size::Fixed(8), Size::Fixed(8)]);
        assert_eq!(size(&graph.outputs[0]), [batch(), Size::Fixed(9)]);
    }

    /// Strides, padding on each side, dilation and groups are the convolution's.
    #[test]
    fn windows_have_their_attributes() {
        let graph = graph("conv6k3x2s2x1p1x0x2x1d1x2g3-avgpool3s1p1-gap", None);
        let ints =
            |node: &Node, name: &str| node.attributes.iter().find(|field| field.name == name).unwrap().ints.clone();
        let [conv, pool] = [&graph.nodes[0], &graph.nodes[1]];
        assert_eq!(ints(conv, "kernel_shape"), [3, 2]);
        assert_eq!(ints(conv, "strides"), [2, 1]);
        // top, left, bottom, right; the notation has top, bottom, left, right
        assert_eq!(ints(conv, "pads"), [1, 2, 0, 1]);
        assert_eq!(ints(conv, "dilations"), [1, 2]);
        let whole = |node: &Node, name: &str| node.attributes.iter().find(|field| field.name == name).unwrap().i;
        assert_eq!((whole(conv, "group"), whole(pool, "count_include_pad")), (Some(3), Some(1)));
    }

    #[test]
    fn a_layer_without_operators_is_an_error() {
        #[derive(Debug)]
        struct Own;
        impl<T: Element> crate::nn::layer::Layer<T> for Own {
            fn notation(&self) -> String {
                "own".to_owned()
            }
            fn output(&self, input: [usize; 3]) -> Result<[usize; 3]> {
                Ok(input)
            }
            fn forward(&self, call: crate::nn::layer::Forward<'_, T>) {
                call.out.copy_from_slice(call.x);
            }
            fn backward(&self, _: crate::nn::layer::Backward<'_, T>) {
                unreachable!("nobody trains it");
            }
        }
        let mut spec = NetworkSpec::parse("affine4").unwrap();
        spec.layers.push(LayerSpec::Layer(std::sync::Arc::new(Own)));
        let network = Network::<f32>::new(&spec, [3, 8, 8], Init::He, 0).unwrap();
        let error = encode(&network, None, &[]).unwrap_err().to_string();
        assert!(error.contains("the layer own") && error.contains("`Layer::onnx`"), "{error}");
    }
}
