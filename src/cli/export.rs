//! Level 7. `gemmnet export`: a saved network for other programs.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use ndarray::Array1;
use ndarray_npy::{NpzWriter, WritableElement};
use serde_json::json;

use super::eval::{Any, load_any};
use super::output::{Output, thousands};
use super::{Stop, runs};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::store::replace;
use crate::train::Model;

/// Write a saved network for other programs: ONNX Runtime and all that reads ONNX, or NumPy
///
/// The ONNX file computes `scores` of `images`, for batches of any size. The npz file has an array for every parameter and running
/// statistic under its name, the notation of the network, and what normalises pixels.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet export\n  gemmnet export --pixels --out cifar.onnx\n  \
                        gemmnet export --checkpoint deep.safetensors --format npz")]
pub(super) struct ExportArgs {
    /// File of a saved network, or folder of a run [default: the last run in runs]
    #[arg(long, value_name = "PATH")]
    checkpoint: Option<PathBuf>,
    /// What to write
    #[arg(long, value_name = "NAME", default_value = "onnx")]
    format: Format,
    /// Where to [default: the checkpoint's name with the format's ending]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// ONNX only: take pixels as in the data, such as 0 to 255, and normalise them in the graph [default: off, images are
    /// normalised before]
    #[arg(long)]
    pixels: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Open Neural Network Exchange, opset 20; numbers are f32
    Onnx,
    /// NumPy's archive of arrays, for np.load
    Npz,
}

pub(super) fn run(args: &ExportArgs, out: &Output) -> Result<(), Stop> {
    let path = runs::saved_network(args.checkpoint.as_deref())?;
    match load_any(&path)? {
        Any::F32(model) => export(&model, &path, args, out),
        Any::F64(model) => export(&model, &path, args, out),
    }
}

fn export<T: Element + WritableElement>(
    model: &Model<T>,
    path: &Path,
    args: &ExportArgs,
    out: &Output,
) -> Result<(), Stop> {
    let (ending, pixels) = match args.format {
        Format::Onnx => ("onnx", args.pixels),
        Format::Npz if args.pixels => {
            let problem = "arrays do not normalise pixels";
            let fix = "leave --pixels out: the arrays normalizer.mean and normalizer.scale say how";
            return Err(Error::invalid("--pixels with npz", problem, fix).into());
        }
        Format::Npz => ("npz", false),
    };
    if pixels {
        model.normalizer(path)?;
    }
    let file = args.out.clone().unwrap_or_else(|| path.with_extension(ending));
    match args.format {
        Format::Onnx => model.save_onnx(&file, pixels)?,
        Format::Npz => save_npz(model, &file)?,
    }
    let parameters = model.network.params().count();
    out.line(format_args!("{} has the network's {} parameters", file.display(), thousands(parameters)))?;
    out.json(&json!({
        "file": file.display().to_string(),
        "format": ending,
        "pixels": pixels,
        "network": model.network.spec().to_string(),
        "parameters": parameters,
        "checkpoint": path.display().to_string(),
    }))
}

/// Every parameter and statistic under its name, `network` (the notation, as bytes of UTF-8), `input` (`[C, H, W]`), and
/// `normalizer.mean` and `normalizer.scale` where they are known.
fn save_npz<T: Element + WritableElement>(model: &Model<T>, path: &Path) -> Result<()> {
    const IN_MEMORY: &str = "memory takes what is written";
    let mut npz = NpzWriter::new(Cursor::new(Vec::new()));
    let network = &model.network;
    for params in [network.params(), network.statistics()] {
        for param in params.iter() {
            npz.add_array(&param.name, &params.get(&param.name).expect("it is one of them")).expect(IN_MEMORY);
        }
    }
    npz.add_array("network", &Array1::from(network.spec().to_string().into_bytes())).expect(IN_MEMORY);
    npz.add_array("input", &Array1::from_iter(network.input().map(|size| size as u64))).expect(IN_MEMORY);
    if let Some(normalizer) = &model.normalizer {
        let mean = ndarray::ArrayView3::from_shape(normalizer.dim(), normalizer.mean()).expect("one for each pixel");
        npz.add_array("normalizer.mean", &mean).expect(IN_MEMORY);
        npz.add_array("normalizer.scale", &ndarray::ArrayView1::from(normalizer.scale())).expect(IN_MEMORY);
    }
    replace(path, npz.finish().expect(IN_MEMORY).get_ref())
}
