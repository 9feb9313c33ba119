//! Level 5. Fusion: the nodes of a graph are gathered into steps, each of which runs as one kernel.
//!
//! A layer joins the block that makes its input if nobody else takes that value and the order within blocks (product, pool,
//! batchnorm, activation, pool, dropout) allows it. An activation behind a sum joins the sum.

use std::sync::Arc;

use crate::blocks::{BlockParts, Core, Pool};
use crate::nn::graph::{Graph, Node, Op, Value};
use crate::nn::layer::{self, AnyLayer};
use crate::nn::notation::LayerSpec;
use crate::ops::activation::Activation;
use crate::shape::{Pool2d, Pool2dShape};

/// What a step does.
#[derive(Clone, Debug)]
pub(super) enum Fused {
    /// A product and all that follows it.
    Block(Box<BlockParts>),
    /// The sum of two values, and perhaps an activation.
    Sum(Option<Activation>),
    /// A layer of its own.
    Layer(Arc<dyn AnyLayer>),
}

/// Nodes that run as one kernel.
#[derive(Clone, Debug)]
pub(super) struct Gathered {
    pub(super) fused: Fused,
    pub(super) inputs: Vec<Value>,
    pub(super) output: Value,
    /// Whether it is the shortcut of a residual.
    pub(super) shortcut: bool,
    /// Its layers in notation.
    pub(super) notation: String,
}

/// The steps of a graph, in order.
pub(super) fn gather(graph: &Graph) -> Vec<Gathered> {
    let uses = graph.uses();
    let mut steps: Vec<Gathered> = Vec::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        // Nodes are in order, so the step that makes the input of a chain is the last one.
        let before = steps
            .last_mut()
            .filter(|step| node.inputs == [step.output] && uses[step.output] == 1 && step.shortcut == node.shortcut);
        if let Some(step) = before
            && join(&mut step.fused, &node.op, before_last(graph, i))
        {
            step.output = i + 1;
            step.notation = format!("{}-{}", step.notation, notation(node));
            continue;
        }
        let (fused, inputs, notation) = (alone(&node.op), node.inputs.clone(), notation(node));
        steps.push(Gathered { fused, inputs, output: i + 1, shortcut: node.shortcut, notation });
    }
    steps
}

fn notation(node: &Node) -> String {
    match &node.op {
        Op::Part(part) => part.to_string(),
        Op::Layer(layer) => layer::notation(&**layer),
        Op::Add => "add".into(),
    }
}

fn alone(op: &Op) -> Fused {
    match op {
        Op::Part(part) => Fused::Block(Box::new(single(part))),
        Op::Layer(layer) => Fused::Layer(layer.clone()),
        Op::Add => Fused::Sum(None),
    }
}

/// The block of one layer.
///
/// # Panics
/// For a layer that is no part of blocks.
pub(super) fn single(part: &LayerSpec) -> BlockParts {
    let mut parts = BlockParts::default();
    match *part {
        LayerSpec::Conv { filters, kernel, conv, bias } => {
            (parts.core, parts.bias) = (Some(Core::Conv { filters, kernel, conv }), bias);
        }
        LayerSpec::Whiten { size, stride } => (parts.core, parts.bias) = (Some(Core::Whiten { size, stride }), true),
        LayerSpec::Affine { outputs, bias } => (parts.core, parts.bias) = (Some(Core::Affine { outputs }), bias),
        LayerSpec::BatchNorm { norm, fixed_scale } => (parts.norm, parts.fixed_scale) = (Some(norm), fixed_scale),
        LayerSpec::Activation(activation) => parts.activation = Some(activation),
        LayerSpec::MaxPool(pool) => parts.pool = Some(Pool::Max(pool)),
        LayerSpec::AvgPool(pool) => parts.pool = Some(Pool::Avg(pool)),
        LayerSpec::GlobalAvgPool => parts.pool = Some(Pool::GlobalAvg),
        LayerSpec::Dropout { p } => parts.dropout = Some(p),
        LayerSpec::Residual(_) | LayerSpec::Layer(_) => unreachable!("graphs have nodes of their own for {part}"),
    }
    parts
}

/// Size of what the node before node `i` takes.
fn before_last(graph: &Graph, i: usize) -> [usize; 3] {
    graph.sizes[graph.nodes[i - 1].inputs[0]]
}

/// Adds `op` to what runs already as one kernel, if it can be; `size` is that of the input of the last layer there.
fn join(fused: &mut Fused, op: &Op, size: [usize; 3]) -> bool {
    match (fused, op) {
        (Fused::Block(parts), Op::Part(layer)) => match append(**parts, layer, size) {
            Some(together) => {
                **parts = together;
                true
            }
            None => false,
        },
        (Fused::Sum(none @ None), Op::Part(LayerSpec::Activation(activation))) => {
            *none = Some(*activation);
            true
        }
        _ => false,
    }
}

/// A block with one more layer, if the order within blocks allows it.
fn append(mut parts: BlockParts, layer: &LayerSpec, size: [usize; 3]) -> Option<BlockParts> {
    let BlockParts { core, norm, activation, pool, dropout, .. } = parts;
    let after_norm = activation.is_none() && pool.is_none() && dropout.is_none();
    match layer {
        LayerSpec::BatchNorm { norm: constants, fixed_scale }
            if norm.is_none() && activation.is_none() && dropout.is_none() =>
        {
            match (core, pool) {
                // its bias is part of the layer
                (Some(Core::Whiten { .. }), None) => {}
                // the batch's mean takes a bias with it
                (_, None) => parts.bias = false,
                (Some(Core::Conv { .. }), Some(Pool::Max(pool))) if tiles(&pool, size) => {
                    (parts.early_pool, parts.pool) = (Some(pool), None);
                }
                _ => return None,
            }
            (parts.norm, parts.fixed_scale) = (Some(*constants), *fixed_scale);
        }
        LayerSpec::Activation(_) if after_norm => parts.activation = single(layer).activation,
        LayerSpec::MaxPool(_) | LayerSpec::AvgPool(_) | LayerSpec::GlobalAvgPool
            if pool.is_none() && dropout.is_none() =>
        {
            parts.pool = single(layer).pool;
        }
        LayerSpec::Dropout { p } if dropout.is_none() => parts.dropout = Some(*p),
        _ => return None,
    }
    Some(parts)
}

/// Whether the windows of a pool tile an image.
fn tiles(pool: &Pool2d, [c, h, w]: [usize; 3]) -> bool {
    Pool2dShape::new([1, c, h, w], pool).is_ok_and(|shape| shape.tiles())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::notation::NetworkSpec;

    fn steps(notation: &str) -> Vec<Gathered> {
        let spec = NetworkSpec::parse(notation).unwrap();
        gather(&Graph::new::<f32>(&spec.layers, [3, 16, 16]).unwrap())
    }

    /// A chain is cut where the order of a block's parts begins anew; a value that two take ends a block.
    #[test]
    fn layers_join_as_far_as_the_order_within_blocks_allows() {
        for (network, want) in [
            ("conv8-bn-relu-pool-dropout0.5-affine9-relu", &["conv8-bn-relu-pool-dropout0.5", "affine9-relu"][..]),
            ("conv8-pool-bn-relu-affine9", &["conv8-pool-bn-relu", "affine9"]),
            ("conv8-pool-bn-relu-pool-affine9", &["conv8-pool-bn-relu-pool", "affine9"]),
            ("conv8-pool3s2p1-bn-relu-affine9", &["conv8-pool3s2p1", "bn-relu", "affine9"]), // windows overlap
            ("conv8-avgpool-bn-affine9", &["conv8-avgpool", "bn", "affine9"]),
            ("conv8-pool3-bn-affine9", &["conv8-pool3-bn", "affine9"]), // one row and column are left over
            ("whiten2-gelu-conv8b0-pool-bn0.6g0-gelu-gap", &["whiten2-gelu", "conv8b0-pool-bn0.6g0-gelu-gap"]),
            ("conv8-relu-bn-affine9", &["conv8-relu", "bn", "affine9"]),
            ("bn-bn-relu-relu-affine9", &["bn", "bn-relu", "relu", "affine9"]),
            ("affine9-dropout0.1-bn", &["affine9-dropout0.1", "bn"]),
            ("pool-dropout0.1-dropout0.2-affine9", &["pool-dropout0.1", "dropout0.2", "affine9"]),
            ("conv8-res[conv8-bn-relu-conv8-bn]-relu-gap", &["conv8", "conv8-bn-relu", "conv8-bn", "add-relu", "gap"]),
            ("res[conv8s2-bn-relu]-gap", &["conv8s2-bn-relu", "conv8k1s2p0-bn", "add", "gap"]),
        ] {
            let got: Vec<_> = steps(network).into_iter().map(|step| step.notation).collect();
            assert_eq!(got, want, "{network}");
        }
    }

    #[test]
    fn a_bias_that_batchnorm_cancels_is_left_out() {
        let bias = |notation: &str| match steps(notation)[0].fused {
            Fused::Block(ref parts) => parts.bias,
            Fused::Sum(_) | Fused::Layer(_) => unreachable!(),
        };
        assert!(!bias("conv8-bn-gap") && bias("conv8-relu-gap"));
        assert!(bias("conv8-pool-bn-gap"), "as in the files of earlier versions");
    }

    #[test]
    fn sums_read_both_branches() {
        let steps = steps("conv8-res[conv4-relu-conv8]-res[conv16s2]-gap");
        let inputs: Vec<_> = steps.iter().map(|step| (step.inputs.clone(), step.output, step.shortcut)).collect();
        let want = [
            (vec![0], 1, false),    // conv8
            (vec![1], 3, false),    // conv4-relu
            (vec![3], 4, false),    // conv8
            (vec![4, 1], 5, false), // the sum
            (vec![5], 6, false),    // conv16s2
            (vec![5], 8, true),     // 1x1 convolution and batchnorm
            (vec![6, 8], 9, false),
            (vec![9], 10, false),
        ];
        assert_eq!(inputs, want);
    }
}
