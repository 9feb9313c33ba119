//! Networks from PyTorch: state dicts with their scores (`tests/golden/imports.json`), and what is said where they do not fit.

use std::collections::BTreeMap;
use std::path::Path;

use gemmnet::data::Normalizer;
use gemmnet::nn::import::{NameMap, Pair, load_state_dict};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::Network;
use gemmnet::train::Model;
use gemmnet::{Element, Error, Result};
use ndarray::{Array4, ArrayD, Ix2};
use safetensors::tensor::{Dtype, TensorView, serialize};

use crate::common::{Golden, assert_close, golden};

/// A state dict: shapes and values by name.
type StateDict = BTreeMap<String, ArrayD<f64>>;

fn state_dict(case: &Golden) -> StateDict {
    case.names("tensor").map(|name| (name.to_owned(), case.array(&format!("tensor {name}")))).collect()
}

/// Its file, with numbers of type `T`.
fn file<T: Element>(tensors: &StateDict, dtype: Dtype) -> Vec<u8> {
    let bytes: Vec<(&String, &[usize], Vec<T>)> =
        tensors.iter().map(|(name, a)| (name, a.shape(), a.iter().map(|&value| T::of(value)).collect())).collect();
    let view = |shape: &[usize], values| TensorView::new(dtype, shape.to_vec(), bytemuck::cast_slice(values)).unwrap();
    serialize(bytes.iter().map(|(name, shape, values)| (name.as_str(), view(shape, values))), None).unwrap()
}

fn network<T: Element>(notation: &str, input: [usize; 3]) -> Network<T> {
    Network::new(&notation.parse().unwrap(), input, Init::He, 0).unwrap()
}

fn import(notation: &str, input: [usize; 3], tensors: &StateDict, names: &NameMap) -> Result<Network<f64>> {
    let mut network = network(notation, input);
    load_state_dict(&mut network, Path::new("weights"), &file::<f64>(tensors, Dtype::F64), names)?;
    Ok(network)
}

fn case(name: &str) -> (Golden, StateDict, Array4<f64>, [usize; 3], String) {
    let case = golden("imports").into_iter().find(|case| case.name == name).expect("there is this case");
    let (tensors, x) = (state_dict(&case), case.array("x"));
    let (_, c, h, w) = Array4::dim(&x);
    let notation = case.param("notation");
    (case, tensors, x, [c, h, w], notation)
}

/// Scores are PyTorch's, for both types of numbers in either, and every layer is from where it belongs.
#[test]
fn imported_networks_give_the_scores_of_the_originals() {
    fn one<T: Element>(name: &str, tolerance: f64) -> Vec<Pair> {
        let (case, tensors, x, input, notation) = case(name);
        let x = x.mapv(T::of);
        let scores = case.array::<Ix2>("scores").mapv(T::of);
        let mut report = Vec::new();
        for bytes in [file::<f32>(&tensors, Dtype::F32), file::<f64>(&tensors, Dtype::F64)] {
            let mut network = network::<T>(&notation, input);
            report = load_state_dict(&mut network, Path::new("weights"), &bytes, &NameMap::new()).unwrap();
            assert_close(&network.predict(x.view()).unwrap(), &scores, tolerance, 1, name);
        }
        report
    }
    for name in ["torchvision's names", "a sequence"] {
        one::<f32>(name, 1e-5);
        // The file of f32 has rounded the weights.
        let report = one::<f64>(name, 1e-6);
        let from = |here: &str| &report.iter().find(|pair| pair.here == here).unwrap().there;
        let want: &[(&str, &str)] = match name {
            "a sequence" => &[("conv1", "0"), ("conv3", "6"), ("conv4", "9"), ("bn4", "14"), ("affine2", "16")],
            _ => &[
                ("conv1", "conv1"),
                ("conv5", "layer1.1.conv2"),
                ("shortcut1", "layer2.0.downsample.0"),
                ("shortcut1.bn", "layer2.0.downsample.1"),
                ("affine1", "fc"),
            ],
        };
        want.iter().for_each(|(here, there)| assert_eq!(from(here), there, "{here}"));
        let in_mean = report.iter().filter(|pair| pair.bias_in_mean).count();
        assert_eq!(in_mean, if name == "a sequence" { 4 } else { 0 }, "biases before batchnorm");
    }
}

/// Layers under other names are found with a map, and a file with our names needs none, whatever the order of their numbers.
#[test]
fn names_can_be_given() {
    let (case, tensors, x, input, notation) = case("torchvision's names");
    let scores = case.array::<Ix2>("scores");
    let check = |network: Result<Network<f64>>, what: &str| {
        assert_close(&network.unwrap().predict(x.view()).unwrap(), &scores, 1e-12, 1, what);
    };
    let rename = |from: &str, to: &str| -> StateDict {
        tensors.iter().map(|(name, a)| (name.replace(from, to), a.clone())).collect()
    };
    check(import(&notation, input, &rename("", ""), &NameMap::new()), "as it is");
    let prefixed = tensors.iter().map(|(name, a)| (format!("module.net.{name}"), a.clone())).collect();
    check(import(&notation, input, &prefixed, &NameMap::new()), "with a prefix");

    let stem = rename("layer1.0.conv2", "stem");
    let error = import(&notation, input, &stem, &NameMap::new()).unwrap_err().to_string();
    assert!(error.contains("`stem`") && error.contains("which runs first") && error.contains("--map"), "{error}");
    let names = NameMap::from([("conv3".into(), "stem".into())]);
    check(import(&notation, input, &stem, &names), "with a map");

    let mut original = network::<f64>(&notation, input);
    let pairs =
        load_state_dict(&mut original, Path::new("weights"), &file::<f64>(&tensors, Dtype::F64), &NameMap::new());
    // Convolutions of one shape change places in the file; under our names that changes nothing.
    let ours: StateDict = (pairs.unwrap().iter().rev())
        .flat_map(|pair| {
            let of = |name: &&String| name.rsplit_once('.').is_some_and(|(module, _)| module == pair.there);
            let renamed = |name: &String| (name.replace(&pair.there, &pair.here), tensors[name].clone());
            tensors.keys().filter(of).map(renamed).collect::<Vec<_>>()
        })
        .collect();
    check(import(&notation, input, &ours, &NameMap::new()), "our names");

    for (here, there, part) in [
        ("conv10", "fc", "the network has no layer `conv10`"),
        ("conv3", "conv10", "the file has no layer `conv10`"),
        ("conv3", "fc", "`conv3` is of kind convolution, and `fc` of kind affine layer"),
    ] {
        let names = NameMap::from([(here.into(), there.into())]);
        let error = import(&notation, input, &tensors, &names).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }) && error.to_string().contains(part), "{error}");
    }
}

/// What does not fit is an error that names it, and the network stays as it was.
#[test]
fn what_does_not_fit_is_named() {
    let (_, tensors, _, input, notation) = case("a sequence");
    type Change = fn(&mut StateDict);
    let cases: [(&str, Change, &[&str]); 8] = [
        (&notation, |t| drop(t.remove("4.running_var")), &["no tensor `4.running_var`"]),
        (&notation, |t| drop(t.remove("16.bias")), &["no tensor `16.bias`", "`affine2` here has a bias", "affine64b0"]),
        (&notation, |t| drop(t.remove("9.weight")), &["a layer `9`", "bias [3]"]),
        (
            &notation,
            |t| drop(t.insert("20.weight".into(), ArrayD::zeros(vec![4, 4]))),
            &["left over here are affine1, affine2, there 13, 16, 20"],
        ),
        (&notation, |t| drop(t.insert("pos".into(), ArrayD::zeros(vec![4]))), &["a layer ``", "pos [4]"]),
        (
            "[conv3-bn-relu]x3-conv3k1-relu-pool-affine7-bn-relu-affine5",
            |_| {},
            &["`16.weight` of [4, 7], needed is one of [5, 7]", "--map"],
        ),
        ("[conv3-bn-relu]x3-conv3k1b0-relu-pool-affine7-bn-relu-affine4", |_| {}, &["`9.bias`", "has no bias", "b0"]),
        ("se3-[conv3-bn-relu]x3-conv3k1-relu-pool-affine7-bn-relu-affine4", |_| {}, &["the layer se3", "by hand"]),
    ];
    for (notation, change, parts) in cases {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        let mut net = network::<f64>(notation, input);
        let before = (net.params().values().to_vec(), net.statistics().values().to_vec());
        let bytes = file::<f64>(&tensors, Dtype::F64);
        let error = load_state_dict(&mut net, Path::new("weights"), &bytes, &NameMap::new()).unwrap_err().to_string();
        assert!(
            parts.iter().all(|part| error.contains(part)) && !error.contains('\n'),
            "{error}\nlacks one of {parts:?}"
        );
        assert_eq!((net.params().values(), net.statistics().values()), (&before.0[..], &before.1[..]), "{error}");
    }

    let bytes = file::<f64>(&tensors, Dtype::F64);
    let halves = file::<f32>(&tensors, Dtype::F32); // as many bytes as f32 has
    let half = String::from_utf8_lossy(&halves[8..]).replace("\"F32\"", "\"I32\"");
    let mut whole_numbers = halves.clone();
    let header = u64::from_le_bytes(halves[..8].try_into().unwrap()) as usize;
    whole_numbers[8..8 + header].copy_from_slice(&half.as_bytes()[..header]);
    for (bytes, part) in [
        (&bytes[..bytes.len() - 1], "cut off or damaged"),
        (b"PK\x03\x04 and so on", "pickle"),
        (b"\x80\x02 and so on", "torch.load(\"weights\""),
        (b"", "no safetensors file"),
        (&whole_numbers, "I32 numbers"),
    ] {
        let mut net = network::<f64>(&notation, input);
        let error = load_state_dict(&mut net, Path::new("weights"), bytes, &NameMap::new()).unwrap_err();
        assert!(matches!(error, Error::Data { .. }) && error.to_string().contains(part), "{error}");
    }
}

/// A model keeps what it has, and only that, in a file.
#[test]
fn models_are_saved_with_what_is_known_about_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let net = network::<f32>("conv4-bn-relu-gap", [2, 6, 5]);
    let normalizer = Normalizer::new([2, 6, 5], (0_u8..60).map(f32::from).collect(), vec![0.5, 0.25]).unwrap();
    let names = ["a", "b", "c", "d"].map(str::to_owned).to_vec();
    for (normalizer, class_names) in
        [(Some(normalizer.clone()), names.clone()), (None, names), (Some(normalizer), vec![])]
    {
        let model = Model { network: net.clone(), normalizer, class_names };
        model.save(&path).unwrap();
        let read = Model::<f32>::load(&path).unwrap();
        assert_eq!((&read.normalizer, &read.class_names), (&model.normalizer, &model.class_names));
        assert_eq!(read.network.params().values(), net.params().values());
        assert_eq!(Network::<f32>::load(&path).unwrap().statistics().values(), net.statistics().values());
    }
    net.save(&path).unwrap();
    let read = Model::<f32>::load(&path).unwrap();
    assert_eq!((read.normalizer.is_none(), read.class_names.len()), (true, 0));
    let error = read.normalizer(&path).unwrap_err().to_string();
    assert!(error.contains("a network alone") && error.contains("--mean"), "{error}");
    let error = read.save_onnx(&path, true).unwrap_err().to_string();
    assert!(error.contains("a network alone"), "{error}");
}
