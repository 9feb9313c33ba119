//! Level 7. `gemmnet import`: a network that was trained elsewhere.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::output::{Align, Output, Table, thousands};
use super::{Size, Stop, size};
use crate::data::files::names_in;
use crate::data::{Normalizer, written};
use crate::error::{Error, Result};
use crate::nn::import::{NameMap, load_state_dict};
use crate::nn::init::Init;
use crate::nn::network::Network;
use crate::nn::notation::NetworkSpec;
use crate::train::Model;

/// Take the parameters of a PyTorch network over, from a state_dict in the safetensors format
///
/// The network is given in notation. Its layers are matched with those of the file by name or by the numbers in the names, as in
/// torchvision's ResNets or an nn.Sequential, and shapes have to agree; every pair is listed. To make such a file:
///   safetensors.torch.save_file(model.state_dict(), "weights.safetensors")
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet import weights.safetensors --net '[conv32-relu-pool]x2-affine10'\n  \
        gemmnet import resnet18.safetensors --input 3x224x224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \\\n    \
        --net 'conv64k7s2p3-bn-relu-pool3s2p1-[res[conv64-bn-relu-conv64-bn]-relu]x2\n    \
        -res[conv128s2p1-bn-relu-conv128-bn]-relu-res[conv128-bn-relu-conv128-bn]-relu\n    \
        -res[conv256s2p1-bn-relu-conv256-bn]-relu-res[conv256-bn-relu-conv256-bn]-relu\n    \
        -res[conv512s2p1-bn-relu-conv512-bn]-relu-res[conv512-bn-relu-conv512-bn]-relu-gap-affine1000'")]
pub(super) struct ImportArgs {
    /// File of the state_dict
    weights: PathBuf,
    /// The network that it is of, in notation
    #[arg(long, value_name = "NOTATION", required = true)]
    net: String,
    /// Channels, height and width of its images
    #[arg(long, value_name = "CxHxW", default_value = "3x32x32", value_parser = size)]
    input: Size,
    /// JSON file with names of layers here and in the weights, {"conv3": "stage2.0.downsample.0"}, for those that are not found
    /// out [default: none]
    #[arg(long, value_name = "FILE")]
    map: Option<PathBuf>,
    /// Mean of each channel that it was trained with, of pixels from 0 to 1; with --std lets it take pictures [default: none]
    #[arg(long, value_name = "MEAN,..", value_delimiter = ',')]
    mean: Vec<f32>,
    /// Standard deviation of each channel [default: none]
    #[arg(long, value_name = "STD,..", value_delimiter = ',')]
    std: Vec<f32>,
    /// Text file with the name of a class on each line, by label [default: none]
    #[arg(long, value_name = "FILE")]
    class_names: Option<PathBuf>,
    /// Where to save it, for `eval`, `predict`, `export` and programs
    #[arg(long, value_name = "FILE", default_value = "imported.safetensors")]
    out: PathBuf,
}

pub(super) fn run(args: &ImportArgs, out: &Output) -> Result<(), Stop> {
    let Size(input) = args.input;
    let spec = NetworkSpec::parse(&args.net)?;
    let mut network = Network::<f32>::new(&spec, input, Init::Gaussian { std: 0.0 }, 0)?;
    let names = args.map.as_deref().map_or(Ok(NameMap::new()), read_map)?;
    let asked = !args.mean.is_empty() || !args.std.is_empty();
    let normalizer = asked.then(|| Normalizer::per_channel(input, &args.mean, &args.std)).transpose()?;
    let class_names = args.class_names.as_deref().map_or(Ok(Vec::new()), read_class_names)?;
    if !class_names.is_empty() && class_names.len() != network.classes() {
        let problem = format!("{} names for a network of {} classes", class_names.len(), network.classes());
        return Err(Error::invalid("class names", problem, "give one on each line of the file").into());
    }
    let fix = "give the file that safetensors.torch.save_file wrote";
    let bytes = fs::read(&args.weights).map_err(|e| Error::io("read", &args.weights, e, fix))?;
    let pairs = load_state_dict(&mut network, &args.weights, &bytes, &names)?;

    let mut table = Table::new([("layer", Align::Left), ("weights", Align::Right), ("from", Align::Left)]);
    for pair in &pairs {
        let shape: Vec<_> = pair.shape.iter().map(usize::to_string).collect();
        let bias = if pair.bias_in_mean { ", its bias taken from the mean of the batchnorm after it" } else { "" };
        table.row([pair.here.clone(), shape.join("x"), format!("{}{bias}", pair.there)]);
    }
    let (parameters, classes) = (network.params().count(), network.classes());
    Model { network, normalizer, class_names }.save(&args.out)?;
    out.line(table)?;
    out.line(format_args!(
        "{} has {} parameters: {} input, {classes} classes",
        args.out.display(),
        thousands(parameters),
        written(input)
    ))?;
    let pairs: Vec<_> = (pairs.iter())
        .map(|pair| json!({ "layer": pair.here, "from": pair.there, "bias_in_mean": pair.bias_in_mean }))
        .collect();
    out.json(&json!({
        "file": args.out.display().to_string(),
        "network": spec.to_string(),
        "layers": pairs,
        "parameters": parameters,
    }))
}

fn read_map(path: &Path) -> Result<NameMap> {
    let fix = r#"give a JSON file such as {"conv3": "stage2.0.downsample.0"}"#;
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e, fix))?;
    serde_json::from_str(&text).map_err(|e| Error::data(path, format!("is no map of names ({e})"), fix))
}

fn read_class_names(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path);
    let text =
        text.map_err(|e| Error::io("read", path, e, "give a text file with the name of a class on each line"))?;
    Ok(names_in(&text))
}
