//! Level 7. `gemmnet predict`: what a saved network takes pictures for.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::eval::{Any, load_any};
use super::output::Output;
use super::{Stop, runs};
use crate::data::cifar10::{DIM, RECORD};
use crate::data::files::decode::read_picture;
use crate::data::{Image, written};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::train::Model;

/// Classify pictures with a saved network
///
/// Prints the three most probable classes of each. Pictures of another size than the network's are resized: of each it sees the
/// largest part from the middle that has the shape of what it takes. A network for grey pictures sees the brightness of
/// coloured ones.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet predict cat.jpg\n  \
                        gemmnet predict --checkpoint deep.safetensors data/test_batch.bin:0 data/test_batch.bin:7")]
pub(super) struct PredictArgs {
    /// File of a saved network, or folder of a run [default: the last run in runs]
    #[arg(long, value_name = "PATH")]
    checkpoint: Option<PathBuf>,
    /// JPEG, PNG, WebP or BMP files of any size; for CIFAR-10's 32x32 pixels its batches too, as FILE.bin for all records,
    /// or FILE.bin:INDEX for one, from 0
    #[arg(required = true, value_name = "IMAGES")]
    images: Vec<String>,
}

/// Classes shown for each picture.
const SHOWN: usize = 3;

/// One picture.
struct Picture {
    name: String,
    /// `(C, H, W)`
    pixels: Vec<u8>,
    /// Of a record in a batch.
    label: Option<usize>,
}

pub(super) fn run(args: &PredictArgs, out: &Output) -> Result<(), Stop> {
    let path = runs::saved_network(args.checkpoint.as_deref())?;
    match load_any(&path)? {
        Any::F32(model) => classify(model, &path, args, out),
        Any::F64(model) => classify(model, &path, args, out),
    }
}

fn classify<T: Element>(mut model: Model<T>, path: &Path, args: &PredictArgs, out: &Output) -> Result<(), Stop> {
    let normalizer = model.normalizer(path)?.clone();
    let mut pictures = Vec::new();
    for image in &args.images {
        read(image, normalizer.dim(), &mut pictures)?;
    }
    let name = |class: usize| model.class_names.get(class).cloned().unwrap_or_else(|| format!("class {class}"));
    let (mut x, mut scores) = (vec![T::zero(); normalizer.mean().len()], vec![T::zero(); model.network.classes()]);
    let mut predictions = Vec::new();
    for picture in &pictures {
        normalizer.apply(Image::Bytes(&picture.pixels), &mut x)?;
        model.network.scores(&x, &mut scores)?;
        let mut ranked: Vec<_> = softmax(&scores).into_iter().enumerate().collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
        ranked.truncate(SHOWN);

        let text: Vec<_> = ranked.iter().map(|&(class, p)| format!("{} {:.1} %", name(class), 100.0 * p)).collect();
        let truth = picture.label.map_or(String::new(), |label| format!(" (it is: {})", name(label)));
        out.line(format_args!("{}: {}{truth}", picture.name, text.join(", ")))?;
        let classes: Vec<_> = (ranked.iter())
            .map(|&(class, p)| json!({ "class": name(class), "label": class, "probability": p }))
            .collect();
        predictions.push(json!({ "image": picture.name, "label": picture.label, "classes": classes }));
    }
    out.json(&json!({ "predictions": predictions, "checkpoint": path.display().to_string() }))
}

/// `exp(s) / sum of exp(s)`
pub(super) fn softmax<T: Element>(scores: &[T]) -> Vec<f64> {
    let largest = scores.iter().map(|s| s.f64()).fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<_> = scores.iter().map(|s| (s.f64() - largest).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

/// Adds what `argument` names to `pictures`, which have the size `dim`.
fn read(argument: &str, dim: [usize; 3], pictures: &mut Vec<Picture>) -> Result<()> {
    let (path, index) = match argument.rsplit_once(':') {
        // A file may have a colon in its name.
        Some((path, index)) if !Path::new(argument).exists() => match index.parse::<usize>() {
            Ok(index) => (path, Some(index)),
            Err(_) => (argument, None),
        },
        _ => (argument, None),
    };
    if path.ends_with(".bin") {
        return read_batch(Path::new(path), index, dim, pictures);
    }
    pictures.push(Picture { name: argument.to_owned(), pixels: read_picture(Path::new(argument), dim)?, label: None });
    Ok(())
}

/// What to give to a network for pictures of this size.
fn give(dim: [usize; 3]) -> String {
    let batches = if dim == DIM { ", or batches of CIFAR-10 as FILE.bin or FILE.bin:INDEX" } else { "" };
    format!("give JPEG, PNG, WebP or BMP files{batches}")
}

fn read_batch(path: &Path, index: Option<usize>, dim: [usize; 3], pictures: &mut Vec<Picture>) -> Result<()> {
    if dim != DIM {
        let problem = format!("holds images of {}, the network takes {}", written(DIM), written(dim));
        return Err(Error::data(path, problem, give(dim)));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e, give(dim)))?;
    let count = bytes.len() / RECORD;
    if count == 0 || !bytes.len().is_multiple_of(RECORD) {
        let problem = format!("has {} bytes, not a whole number of records of {RECORD} bytes", bytes.len());
        return Err(Error::data(path, problem, give(dim)));
    }
    let wanted = match index {
        None => 0..count,
        Some(index) if index < count => index..index + 1,
        Some(index) => {
            let problem = format!("has no record {index}, it holds {count}");
            return Err(Error::data(path, problem, format!("give an index from 0 to {}", count - 1)));
        }
    };
    for index in wanted {
        let record = &bytes[index * RECORD..][..RECORD];
        let name = format!("{}:{index}", path.display());
        pictures.push(Picture { name, pixels: record[1..].to_vec(), label: Some(record[0].into()) });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_and_do_not_overflow() {
        let p = softmax(&[1000.0_f32, 1000.0, -1000.0]);
        assert_eq!(p, [0.5, 0.5, 0.0]);
    }

    #[test]
    fn pictures_that_do_not_suit_the_network_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("picture.png");
        image::GrayImage::new(7, 5).save(&path).unwrap();
        let message = |argument: &str, dim| read(argument, dim, &mut Vec::new()).unwrap_err().to_string();
        assert!(message(path.to_str().unwrap(), [2, 5, 7]).contains("the network takes 2 channels; use the library"));
        let batch = message("data/test_batch.bin:3", [1, 28, 30]);
        assert!(
            batch.ends_with("holds images of 3x32x32, the network takes 1x28x30; give JPEG, PNG, WebP or BMP files"),
            "{batch}"
        );
    }
}
