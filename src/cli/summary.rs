//! Level 7. `gemmnet summary`: the layers of a network.

use clap::Args;
use serde_json::json;

use super::output::{Align, Output, Table, thousands};
use super::presets::Facts;
use super::{Size, Stop, presets, size};
use crate::data::written;
use crate::nn::init::Init;
use crate::nn::network::Network;
use crate::nn::notation::NetworkSpec;

/// Layers of a network: the graph, output shapes, parameters, multiply-adds
///
/// Layers that run as one kernel are one step; each step names those whose output it takes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet summary\n  gemmnet summary --preset deep\n  \
                        gemmnet summary --net '[conv32-bn-relu-pool]x3-gap-affine5' --input 3x64x64")]
pub(super) struct SummaryArgs {
    /// Network in notation, such as [conv32-relu-pool]x2-affine10 [default: the preset's]
    #[arg(long, value_name = "NOTATION")]
    net: Option<String>,
    /// Recipe whose network to show; `gemmnet train --list-presets` lists them
    #[arg(long, value_name = "NAME", default_value = presets::DEFAULT)]
    preset: String,
    /// Channels, height and width of its images
    #[arg(long, value_name = "CxHxW", default_value = "3x32x32", value_parser = size)]
    input: Size,
}

pub(super) fn run(args: &SummaryArgs, out: &Output) -> Result<(), Stop> {
    let preset = presets::find(&args.preset)?;
    let Size(input) = args.input;
    let net = preset.fit(Facts { dim: input, ..Facts::CIFAR10 }).net;
    let spec = NetworkSpec::parse(args.net.as_deref().unwrap_or(&net))?;
    let network = Network::<f32>::new(&spec, input, Init::He, 0)?;
    let layers = network.summary();
    let (parameters, multiply_adds) =
        (network.params().count(), layers.iter().map(|layer| layer.multiply_adds).sum::<usize>());

    use Align::{Left, Right};
    let mut table = Table::new([
        ("step", Right),
        ("layers", Left),
        ("of", Left),
        ("output", Right),
        ("parameters", Right),
        ("multiply-adds", Right),
    ]);
    // The graph: each step names the steps whose outputs it takes.
    let source = |&step: &usize| if step == 0 { "image".into() } else { step.to_string() };
    for (i, layer) in layers.iter().enumerate() {
        let shape: Vec<_> = layer.output.iter().map(usize::to_string).collect();
        let inputs: Vec<String> = layer.inputs.iter().map(source).collect();
        let (number, values) = ((i + 1).to_string(), thousands(layer.parameters));
        let macs = thousands(layer.multiply_adds);
        table.row([number, layer.name.clone(), inputs.join(" + "), shape.join("x"), values, macs]);
    }
    let [number, inputs, shape] = [const { String::new() }; 3];
    table.row([number, "total".into(), inputs, shape, thousands(parameters), thousands(multiply_adds)]);
    out.line(table)?;
    out.line(format_args!("{} input, {} loss", written(input), spec.loss))?;

    let layers: Vec<_> = (layers.iter())
        .map(|layer| {
            json!({
                "layer": layer.name,
                "inputs": layer.inputs,
                "output": layer.output,
                "parameters": layer.parameters,
                "multiply_adds": layer.multiply_adds,
            })
        })
        .collect();
    out.json(&json!({
        "network": spec.to_string(),
        "input": input,
        "layers": layers,
        "parameters": parameters,
        "multiply_adds": multiply_adds,
    }))
}
