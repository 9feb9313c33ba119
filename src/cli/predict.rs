//! Level 6. `gemmnet predict`: what a saved network takes pictures for.

use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::eval::{Any, load_any};
use super::output::Output;
use super::{CHECKPOINT, Stop};
use crate::data::cifar10::RECORD;
use crate::data::{PIXELS, SIDE};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::train::Trained;

/// Classify pictures with a saved network
///
/// Prints the three most probable classes of each.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet predict cat.png\n  \
                        gemmnet predict --checkpoint deep.safetensors data/test_batch.bin:0 data/test_batch.bin:7")]
pub(super) struct PredictArgs {
    /// File that `gemmnet train` saved; its best network is used
    #[arg(long, value_name = "FILE", default_value = CHECKPOINT)]
    checkpoint: PathBuf,
    /// PNG files of 32x32 pixels; CIFAR-10 batches as FILE.bin for all records, or FILE.bin:INDEX for one, from 0
    #[arg(required = true, value_name = "IMAGES")]
    images: Vec<String>,
}

/// Classes shown for each picture.
const SHOWN: usize = 3;

/// One picture.
struct Picture {
    name: String,
    pixels: Box<[u8; PIXELS]>,
    /// Of a record in a batch.
    label: Option<u8>,
}

pub(super) fn run(args: &PredictArgs, out: &Output) -> Result<(), Stop> {
    match load_any(&args.checkpoint)? {
        Any::F32(trained) => classify(trained, args, out),
        Any::F64(trained) => classify(trained, args, out),
    }
}

fn classify<T: Element>(mut trained: Trained<T>, args: &PredictArgs, out: &Output) -> Result<(), Stop> {
    let mut pictures = Vec::new();
    for image in &args.images {
        read(image, &mut pictures)?;
    }
    let name = |class: usize| trained.class_names.get(class).cloned().unwrap_or_else(|| format!("class {class}"));
    let (mut x, mut scores) = (vec![T::zero(); PIXELS], vec![T::zero(); trained.network.classes()]);
    let mut predictions = Vec::new();
    for picture in &pictures {
        trained.normalizer.apply(&picture.pixels, &mut x)?;
        trained.network.scores(&x, &mut scores)?;
        let mut ranked: Vec<_> = softmax(&scores).into_iter().enumerate().collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
        ranked.truncate(SHOWN);

        let text: Vec<_> = ranked.iter().map(|&(class, p)| format!("{} {:.1} %", name(class), 100.0 * p)).collect();
        let truth = picture.label.map_or(String::new(), |label| format!(" (it is: {})", name(label.into())));
        out.line(format_args!("{}: {}{truth}", picture.name, text.join(", ")))?;
        let classes: Vec<_> = (ranked.iter())
            .map(|&(class, p)| json!({ "class": name(class), "label": class, "probability": p }))
            .collect();
        predictions.push(json!({ "image": picture.name, "label": picture.label, "classes": classes }));
    }
    out.json(&json!({ "predictions": predictions, "checkpoint": args.checkpoint.display().to_string() }))
}

/// `exp(s) / sum of exp(s)`
fn softmax<T: Element>(scores: &[T]) -> Vec<f64> {
    let largest = scores.iter().map(|s| s.f64()).fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<_> = scores.iter().map(|s| (s.f64() - largest).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

/// Adds what `argument` names to `pictures`.
fn read(argument: &str, pictures: &mut Vec<Picture>) -> Result<()> {
    let (path, index) = match argument.rsplit_once(':') {
        // A file may have a colon in its name.
        Some((path, index)) if !Path::new(argument).exists() => match index.parse::<usize>() {
            Ok(index) => (path, Some(index)),
            Err(_) => (argument, None),
        },
        _ => (argument, None),
    };
    if path.ends_with(".bin") {
        return read_batch(Path::new(path), index, pictures);
    }
    pictures.push(Picture { name: argument.to_owned(), pixels: read_png(Path::new(argument))?, label: None });
    Ok(())
}

const GIVE: &str = "give PNG files of 32x32 pixels, or batches of CIFAR-10 as FILE.bin or FILE.bin:INDEX";

fn read_batch(path: &Path, index: Option<usize>, pictures: &mut Vec<Picture>) -> Result<()> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e, GIVE))?;
    let count = bytes.len() / RECORD;
    if count == 0 || !bytes.len().is_multiple_of(RECORD) {
        let problem = format!("has {} bytes, not a whole number of records of {RECORD} bytes", bytes.len());
        return Err(Error::data(path, problem, GIVE));
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
        let (label, pixels) = bytes[index * RECORD..][..RECORD].split_at(1);
        let pixels = <&[u8; PIXELS]>::try_from(pixels).expect("a record is a label and an image");
        pictures.push(Picture {
            name: format!("{}:{index}", path.display()),
            pixels: Box::new(*pixels),
            label: Some(label[0]),
        });
    }
    Ok(())
}

/// The pixels `(3, 32, 32)` of a PNG file, without its transparency.
fn read_png(path: &Path) -> Result<Box<[u8; PIXELS]>> {
    let file = File::open(path).map_err(|e| Error::io("read", path, e, GIVE))?;
    let unreadable = |e: png::DecodingError| match e {
        png::DecodingError::IoError(e) if e.kind() != ErrorKind::UnexpectedEof => Error::io("read", path, e, GIVE),
        e => Error::data(path, format!("is no PNG picture that can be read ({e})"), GIVE),
    };
    let mut decoder = png::Decoder::new(BufReader::new(file));
    // Palettes and 16 bits to 8 bits a channel.
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(unreadable)?;
    let (width, height) = reader.info().size();
    if (width, height) != (SIDE as u32, SIDE as u32) {
        let problem = format!("has {width}x{height} pixels, the network takes {SIDE}x{SIDE}");
        return Err(Error::data(path, problem, format!("crop and scale it to {SIDE}x{SIDE} first")));
    }
    let mut samples = vec![0; reader.output_buffer_size().expect("a small picture fits the memory")];
    let frame = reader.next_frame(&mut samples).map_err(unreadable)?;
    let channels = frame.color_type.samples();
    let mut pixels = Box::new([0; PIXELS]);
    for (channel, plane) in pixels.chunks_exact_mut(SIDE * SIDE).enumerate() {
        // Grey, perhaps with alpha, has one sample for all three colours.
        let sample = if channels < 3 { 0 } else { channel };
        for (pixel, samples) in plane.iter_mut().zip(samples.chunks_exact(channels)) {
            *pixel = samples[sample];
        }
    }
    Ok(pixels)
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
    fn png_of_every_colour_type_become_planes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("picture.png");
        // Sample `s` of pixel `i`.
        let value = |i: usize, s: usize| (i * 7 + s * 50) as u8;
        for (color, channels) in [
            (png::ColorType::Rgb, 3),
            (png::ColorType::Rgba, 4),
            (png::ColorType::Grayscale, 1),
            (png::ColorType::GrayscaleAlpha, 2),
        ] {
            let mut encoder = png::Encoder::new(File::create(&path).unwrap(), SIDE as u32, SIDE as u32);
            encoder.set_color(color);
            encoder.set_depth(png::BitDepth::Eight);
            let samples: Vec<u8> = (0..SIDE * SIDE).flat_map(|i| (0..channels).map(move |s| value(i, s))).collect();
            encoder.write_header().unwrap().write_image_data(&samples).unwrap();
            let pixels = read_png(&path).unwrap();
            for channel in 0..3 {
                let sample = if channels < 3 { 0 } else { channel };
                for i in [0, 1, 33, 1023] {
                    assert_eq!(pixels[channel * SIDE * SIDE + i], value(i, sample), "{color:?}");
                }
            }
        }
    }
}
