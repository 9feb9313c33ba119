//! Writes the first inputs of each target into `corpus`: small ones of every kind that is accepted.
//!
//!     cargo run --manifest-path fuzz/Cargo.toml --example seeds

use std::fs;
use std::io::Cursor;
use std::ops::ControlFlow;
use std::path::Path;

use gemmnet::data::{Augment, Flip, Normalization};
use gemmnet::prelude::*;
use gemmnet::train::Model;
use gemmnet_fuzz::{SEPARATOR, pack, parts};
use image::{DynamicImage, ImageFormat, RgbImage};
use ndarray::Array4;

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let put = |target: &str, name: &str, bytes: &[u8]| {
        let folder = root.join("corpus").join(target);
        fs::create_dir_all(&folder).expect("the folder of a corpus");
        fs::write(folder.join(format!("seed-{name}")), bytes).expect("a seed");
    };
    texts(&put);
    configs(&put);
    records(&put);
    idx(&put);
    arrays(&put);
    pictures(&put);
    kept(&put);
    networks(&put)
}

type Put<'a> = &'a dyn Fn(&str, &str, &[u8]);

fn texts(put: Put) {
    let networks = [
        "conv32k7-relu-pool-affine100-relu-affine10",
        "[conv8-relu-pool]x2 - conv4 - relu - [affine7-relu]x2 - affine10 - softmax",
        "[conv3-bn-relu-conv3-bn-relu-pool]x1-[affine25-bn-relu-dropout0.5]-affine10-svm",
        "conv4-bn-relu-[res[conv4-bn-relu-conv4-bn]-relu]x3-gap-affine10",
        "whiten2-gelu-conv4k3x5s2x1p0x1x0x1d2g2-bn0.9e0.001g0-avgpool3s2p1-se2-gap-div16-softmax0.1sum",
        "whiten2-silu-conv6b0aim2col-maxpool2x1-leaky0.1-conv6g6adepthwise-conv4awinograd-fc3b0-svmsum",
        "conv4psame-conv4pvalid-conv4p1-res[conv8s2-bn-relu-conv8-bn]-relu-gap-linear2-softmaxsum",
        "[[[[relu]x2]x2]×2]*2-batchnorm-leakyrelu-affine3-dropout0",
    ];
    let options = [
        "constant",
        "exp:0.9",
        "step:5:0.1",
        "linear",
        "linear:3",
        "cosine",
        "cosine:0.01",
        "onecycle",
        "onecycle:0.2:0.2:0.1",
        "weight",
        "bias",
        "scale",
        "*",
        "conv*.weight",
        "bn?.bias",
        "gaussian:0.001",
        "he",
        "xavier",
        "dirac",
        "leaky0.1",
        "sgd",
        "momentum,momentum=0.5",
        "rmsprop,decay=0.9,epsilon=1e-7",
        "adam,beta1=0.8,beta2=0.9",
        "adamw,weight_decay=0.1",
        "muon,momentum=0.6,iterations=3,fixed_norm=true",
        "nesterov",
        "adagrad",
    ];
    networks.iter().enumerate().for_each(|(i, text)| put("notation", &i.to_string(), text.as_bytes()));
    options.iter().enumerate().for_each(|(i, text)| put("texts", &i.to_string(), text.as_bytes()));
}

/// Files of options: all keys of the presets, and some of one's own.
fn configs(put: Put) {
    let presets = include_str!("../../src/cli/presets.toml");
    for (i, preset) in presets.split("[[preset]]").skip(1).enumerate() {
        let of_a_config = |line: &&str| !["name =", "about =", "base ="].iter().any(|key| line.starts_with(key));
        let text = preset.lines().filter(of_a_config).collect::<Vec<_>>().join("\n");
        put("config", &format!("preset-{i}"), text.as_bytes());
    }
    let own = [
        "epochs = 0.5\nlearning-rate = 1e-3\nl2 = 0\n",
        "seed = \"18446744073709551615\"\ndtype = \"f64\"\ntrain-limit = 100\nimage-size = 32\nstrict = true\n",
        "optimizer = 'adamw'\nschedule = 'onecycle'\nwarmup-epochs = 1\nclip-norm = 1.0\nema = 0.999\nkeep = 'last'\n",
        "group = ['conv*.weight=sgd,lr=0.1', \"bias=frozen\"]\ndata-dir = '../data'\nsampler = 'replacement'\n",
        "flip = 'alternating'\nshift = 4\nshift-fill = 'reflect'\ncutout = 8\nnormalize = 'per-channel'\n",
    ];
    own.iter().enumerate().for_each(|(i, text)| put("config", &format!("own-{i}"), text.as_bytes()));
}

/// Records of CIFAR-10 and CIFAR-100.
fn records(put: Put) {
    let records = |n: usize, head: &[u8]| (0..n).flat_map(|_| [head, &[0; 3072]].concat()).collect::<Vec<_>>();
    let (ten, hundred) = (records(2, &[3]), records(3, &[5, 99]));
    let names = "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n\n";
    let batches: Vec<_> = (0..6).map(|name| (name, &ten[..])).chain([(6, names.as_bytes())]).collect();
    put("cifar", "10", &pack(&batches));
    put("cifar", "100", &pack(&[(7, &hundred), (8, &hundred), (9, &b"name\n".repeat(100))]));
    put("cifar", "cut", &pack(&[(0, &ten[..4000]), (7, &hundred[..3073])]));
}

fn idx(put: Put) {
    let images = [&[0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 3][..], &[7; 24]].concat();
    let labels = [0, 0, 8, 1, 0, 0, 0, 4, 0, 1, 0, 1];
    put("idx", "plain", &pack(&[(0, &images), (1, &labels), (2, &images), (3, &labels), (7, b"no\nyes\n")]));
    put("idx", "packed", &pack(&[(8, &images), (9, &labels), (2, &images), (3, &labels)]));
}

/// The bytes of an array.
fn npy(descr: &str, shape: &str, values: &[u8]) -> Vec<u8> {
    let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let text = format!("{text:<117}\n");
    [b"\x93NUMPY\x01\x00", &(text.len() as u16).to_le_bytes()[..], text.as_bytes(), values].concat()
}

fn arrays(put: Put) {
    let floats: Vec<u8> = (0..24).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let longs: Vec<u8> = [0_i64, 1, 0, 1].iter().flat_map(|n| n.to_le_bytes()).collect();
    let (x, y) = (npy("|u1", "(4, 1, 2, 3)", &[9; 24]), npy("<i8", "(4,)", &longs));
    let (float_x, column_y) = (npy("<f4", "(4, 2, 3)", &floats), npy("|u1", "(4, 1)", &[0, 1, 1, 0]));
    for how in [0, 1] {
        let put = |name: &str, files: &[(u8, &[u8])]| {
            put("arrays", &format!("{name}-{how}"), &[&[how], &pack(files)[..]].concat());
        };
        put("bytes", &[(0, &x), (1, &y), (2, &x), (3, &y), (4, &x), (5, &y), (6, b"a\nb\n")]);
        put("floats", &[(0, &float_x), (1, &column_y)]);
    }
    let fortran = npy("|u1", "(4, 1, 2, 3)", &[9; 24]);
    let fortran = String::from_utf8_lossy(&fortran[10..]).replace("False", "True ");
    let fortran = [&x[..10], fortran.as_bytes()].concat();
    put("arrays", "fortran", &[&[0], &pack(&[(0, &fortran), (1, &y)])[..]].concat());
}

fn pictures(put: Put) {
    let rgb = RgbImage::from_fn(20, 12, |x, y| image::Rgb([(x * 12) as u8, (y * 20) as u8, (x * y) as u8]));
    let rgb = DynamicImage::from(rgb);
    let encode = |picture: &DynamicImage, format| {
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, format).expect("a picture that the format takes");
        bytes.into_inner()
    };
    for (name, format) in
        [("jpg", ImageFormat::Jpeg), ("png", ImageFormat::Png), ("webp", ImageFormat::WebP), ("bmp", ImageFormat::Bmp)]
    {
        put("pictures", name, &encode(&rgb, format));
        let grey = if format == ImageFormat::Bmp { rgb.to_luma8().into() } else { DynamicImage::from(rgb.to_rgba8()) };
        let grey = if format == ImageFormat::Jpeg { rgb.to_luma8().into() } else { grey };
        put("pictures", &format!("{name}-other"), &encode(&grey, format));
    }
    put("pictures", "png-16", &encode(&rgb.to_rgba16().into(), ImageFormat::Png));
    // An APP1 of EXIF that turns it.
    let jpeg = encode(&rgb, ImageFormat::Jpeg);
    let tiff = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let app1 = [&[0xff, 0xe1, 0, (2 + 6 + tiff.len()) as u8], &b"Exif\0\0"[..], tiff].concat();
    put("pictures", "jpg-turned", &[&jpeg[..2], &app1, &jpeg[2..]].concat());
}

fn kept(put: Put) {
    let changes = [
        r#"{"broken": [{"index": 2, "problem": "is none"}]}"#,
        r#"{"broken": [], "parts": [4, 0, 0]}"#,
        r#"{"classes": ["a", "b", "c"], "dim": [3, 8, 8], "parts": [2, 1, 0]}"#,
    ];
    for (i, text) in changes.iter().enumerate() {
        put("kept", &i.to_string(), &pack(&[(3, text.as_bytes())]));
    }
    let images = npy("|u1", "(3, 3, 8, 8)", &[9; 576]);
    let labels: Vec<u8> = [0_i64, 0, 1].iter().flat_map(|n| n.to_le_bytes()).collect();
    put("kept", "arrays", &pack(&[(1, &images), (2, &npy("<i8", "(3,)", &labels))]));
}

/// Checkpoints, models and state_dicts: whole files, and their parts.
fn networks(put: Put) -> Result<()> {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("file.safetensors");
    let read = || fs::read(&path).expect("a file that was saved");
    let x = Array4::from_shape_fn((8, 1, 4, 4), |(n, _, h, w)| (n * 9 + h * 4 + w) as u8);
    let one = x.slice(ndarray::s![..1, .., .., ..]);
    let y: Vec<u8> = (0..8).map(|i| i % 2).collect();
    let data = || Dataset::from_arrays((x.view(), &y), (one, &[0]), (one, &[0]), Normalization::PerChannel);
    let rules = ["sgd", "adam", "muon", "adamw"];
    let nets =
        ["conv2-bn-relu-pool-affine2", "affine2-svm", "conv2b0-affine2b0", "conv4-se2-gap-affine2-softmax0.1sum"];
    for (rule, net) in rules.into_iter().zip(nets) {
        let network = Network::<f32>::new(&net.parse()?, [1, 4, 4], Init::He, 0)?;
        let groups = if rule == "muon" {
            let rate = LearningRate::constant(0.1)?;
            vec![Group::new("weight".parse()?, rule.parse()?, rate), Group::new("*".parse()?, "sgd".parse()?, rate)]
        } else {
            Group::classic(rule.parse()?, LearningRate::new(0.1, "cosine:0.1".parse()?, 0.5)?, 1e-3)
        };
        let options = SolverOptions {
            epochs: 3.0,
            batch_size: 4,
            groups,
            clip_norm: (rule == "adam").then_some(1.0),
            ema: (rule == "sgd").then_some(0.9),
            augment: (rule == "sgd").then_some(Augment { flip: Flip::Random, shift: 1, ..Augment::NONE }),
            train_accuracy_samples: 4,
            verbose: false,
            ..SolverOptions::default()
        };
        let mut solver = Solver::new(network, data()?, options)?;
        if rule != "adamw" {
            solver.train_to(1.0, |_| ControlFlow::Continue(()))?;
        }
        solver.checkpoint().save(&path)?;
        put("checkpoint", rule, &read());
        put("checkpoint", &format!("{rule}-parts"), &parts(&read()));
        put("model", rule, &read());
        let normalizer = Some(solver.data().normalizer().clone());
        let mut model =
            Model { network: solver.into_network(), normalizer, class_names: vec!["no".into(), "yes".into()] };
        model.save(&path)?;
        put("model", &format!("{rule}-named"), &parts(&read()));
        model.normalizer = None;
        model.network.save(&path)?;
        put("model", &format!("{rule}-alone"), &parts(&read()));
    }
    state_dicts(put);
    Ok(())
}

fn state_dicts(put: Put) {
    let norm = |name: &str| {
        ["weight", "bias", "running_mean", "running_var"].map(|part| format!("{name}.{part} F32 2\n")).concat()
    };
    let lines = [
        (0, "fc.weight F32 2,16\nfc.bias F32 2\n".to_owned(), r#"{"affine1": "fc"}"#),
        (0, "weight F64 2,16\nbias F64 2\n".to_owned(), "{}"),
        (
            1,
            "features.0.weight F32 2,1,3,3\nfeatures.0.bias F32 2\n".to_owned()
                + &norm("features.1")
                + "features.1.num_batches_tracked F32 1\nclassifier.6.weight F32 2,8\nclassifier.6.bias F32 2\n",
            "{}",
        ),
        (
            2,
            "a.0.weight F32 2,1,3,3\na.1.weight F32 2,2,3,3\nb.0.weight F32 2,2\nb.1.weight F32 2,2\nb.1.bias F32 2\n"
                .into(),
            "{}",
        ),
        (
            3,
            "conv1.weight F32 2,1,3,3\nlayer1.0.conv1.weight F32 2,2,3,3\nlayer1.0.conv2.weight F32 2,2,3,3\n"
                .to_owned()
                + "layer2.0.conv1.weight F32 3,2,3,3\nlayer2.0.conv2.weight F32 3,3,3,3\nlayer2.0.downsample.0.weight F32 3,2,1,1\n"
                + &["bn1", "layer1.0.bn1", "layer1.0.bn2"].map(norm).concat()
                + &["layer2.0.bn1", "layer2.0.bn2", "layer2.0.downsample.1"]
                    .map(norm)
                    .concat()
                    .replace("F32 2", "F32 3")
                + "fc.weight F32 2,3\nfc.bias F32 2\n",
            r#"{"conv1": "conv1"}"#,
        ),
    ];
    for (i, (network, lines, map)) in lines.iter().enumerate() {
        let parts =
            [&[SEPARATOR, SEPARATOR], lines.as_bytes(), &[SEPARATOR, 0, 0, 0, 64, SEPARATOR], map.as_bytes()].concat();
        put("import", &format!("{i}-parts"), &[&[*network], &parts[..]].concat());
        let last = parts.iter().rposition(|&byte| byte == SEPARATOR).unwrap_or(0);
        put("import", &i.to_string(), &[&[*network], &gemmnet_fuzz::archive(&parts[..last])[..]].concat());
    }
}
