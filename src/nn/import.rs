//! Level 5. Parameters of other programs' networks: a PyTorch `state_dict` in the safetensors format.
//!
//! Other programs name their layers otherwise, and a file does not say in which order they run. What tells: their names, if they
//! are ours; else the numbers in the names, kind by kind (`features.0`, `features.3`; `conv1`, `conv2`; `layer1.0.conv2` of
//! torchvision's ResNets); else the user. Every tensor of the file has to be taken, and every parameter to be set, by one of its
//! shape: what does not fit is an error that names both.
//!
//! | here | there |
//! | --- | --- |
//! | filters `(F, C / groups, KH, KW)` | the same |
//! | matrix `(D, M)` | `(M, D)` |
//! | batchnorm's scale and shift, running mean and variance | `weight`, `bias`, `running_mean`, `running_var` |
//! | no bias before batchnorm | a bias there is subtracted from the running mean, which comes to the same in test mode |

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::network::Network;
use super::steps::Kernel;
use crate::blocks::Weights;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::params::Params;

/// Names of layers here and in the file, for those that [`load_state_dict`] is not to find out by itself:
/// `conv3` to `stage2.0.downsample.0`.
pub type NameMap = BTreeMap<String, String>;

/// A layer of the network and the one of the file that its parameters are from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Its name here, such as `conv3`.
    pub here: String,
    /// Its name in the file, such as `layer1.0.conv2`.
    pub there: String,
    /// Shape of its weights here.
    pub shape: Vec<usize>,
    /// Whether its bias went into the running mean of the batchnorm after it.
    pub bias_in_mean: bool,
}

/// What a layer is, as its tensors show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Conv,
    Affine,
    Norm,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Conv => "convolution",
            Kind::Affine => "affine layer",
            Kind::Norm => "batchnorm",
        })
    }
}

const KINDS: [Kind; 3] = [Kind::Conv, Kind::Affine, Kind::Norm];

/// A layer of the network that has parameters.
#[derive(Debug)]
struct Layer {
    name: String,
    kind: Kind,
    weight: usize,
    bias: Option<usize>,
    /// Batchnorm's running mean and variance.
    running: Option<(usize, usize)>,
    /// Where a bias goes that the file has and the network has not.
    mean_after: Option<usize>,
}

/// A layer of the file.
#[derive(Debug)]
struct Module<'a> {
    name: &'a str,
    kind: Kind,
    tensors: BTreeMap<&'a str, TensorView<'a>>,
}

/// Sets all parameters and running statistics of `network` to those in `bytes`, a PyTorch `state_dict` in the safetensors format;
/// errors call it `path`. Layers that `names` has are taken from where it says. Returns what was taken from where, in the
/// network's order.
///
/// # Errors
/// [`Error::Data`] if it is no such file, holds numbers that are not `f32` or `f64`, or if its layers do not fit the network's one
/// to one; [`Error::Invalid`] if `names` has a layer that is not there. The network is then as it was.
pub fn load_state_dict<T: Element>(
    network: &mut Network<T>,
    path: &Path,
    bytes: &[u8],
    names: &NameMap,
) -> Result<Vec<Pair>> {
    let file = open(path, bytes)?;
    let modules = modules(path, &file)?;
    let layers = layers(network)?;
    let pairs = pair(path, &layers, &modules, names)?;
    let mut values = Values { path, params: network.params().clone(), statistics: network.statistics().zeros_like() };
    let mut report = Vec::new();
    for (layer, module) in layers.iter().zip(pairs) {
        report.push(Pair {
            here: layer.name.clone(),
            there: module.name.to_owned(),
            shape: values.params.param(layer.weight).shape.clone(),
            bias_in_mean: values.take(layer, module)?,
        });
    }
    network.params_mut().copy_from(&values.params);
    network.statistics_mut().copy_from(&values.statistics);
    Ok(report)
}

/// How to make a file that can be read, in PyTorch.
const SAVE: &str = "save it in Python: `safetensors.torch.save_file({k: v.contiguous() for k, v in \
                    model.float().state_dict().items()}, \"weights.safetensors\")`";

fn open<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(bytes).map_err(|e| {
        // A zip archive, as torch.save writes now, or a pickle, as it did. A safetensors file may begin with these bytes as well.
        if bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(&[0x80]) {
            let problem = "is a pickle of PyTorch's, which can run programs when it is read";
            let path_text = path.display();
            let fix = format!("{SAVE}, after `model.load_state_dict(torch.load(\"{path_text}\", weights_only=True))`");
            return Error::data(path, problem, fix);
        }
        Error::data(path, format!("is no safetensors file, or is cut off or damaged ({e})"), SAVE)
    })
}

/// The file's layers, by name.
fn modules<'a>(path: &Path, file: &'a SafeTensors<'a>) -> Result<Vec<Module<'a>>> {
    let mut tensors: BTreeMap<&str, BTreeMap<&str, TensorView<'a>>> = BTreeMap::new();
    for name in file.names() {
        let (module, tensor) = name.rsplit_once('.').unwrap_or(("", name));
        // How many batches batchnorm has seen, which matters where its momentum is none.
        if tensor != "num_batches_tracked" {
            tensors.entry(module).or_default().insert(tensor, file.tensor(name).expect("the file has its names"));
        }
    }
    let module = |(name, tensors): (&'a str, BTreeMap<&'a str, TensorView<'a>>)| {
        let dimensions = tensors.get("weight").map_or(0, |weight| weight.shape().len());
        let unknown = tensors.keys().find(|tensor| !["weight", "bias", "running_mean", "running_var"].contains(tensor));
        let kind = match (dimensions, tensors.contains_key("running_mean"), unknown) {
            (1, true, None) => Kind::Norm,
            (2, false, None) => Kind::Affine,
            (4, false, None) => Kind::Conv,
            _ => {
                let has: Vec<_> = tensors.iter().map(|(name, tensor)| format!("{name} {:?}", tensor.shape())).collect();
                let problem = format!(
                    "has a layer `{name}` ({}) that is no convolution, affine layer or batchnorm",
                    has.join(", ")
                );
                return Err(Error::data(
                    path,
                    problem,
                    "leave it out if scores do not depend on it; others cannot be imported",
                ));
            }
        };
        Ok(Module { name, kind, tensors })
    };
    tensors.into_iter().map(module).collect()
}

/// The network's layers with parameters, in the order in which they run.
fn layers<T: Element>(network: &Network<T>) -> Result<Vec<Layer>> {
    let mut layers = Vec::new();
    for step in network.steps() {
        match &step.kernel {
            Kernel::Block { places, running, .. } => layers.extend(of_block(network.params(), *places, *running)),
            Kernel::Layer { layer, count, .. } if *count > 0 => {
                let problem = format!("parameters of the layer {} have no names that others use", layer.notation());
                return Err(Error::invalid("import", problem, "set them by hand, with `Network::params_mut`"));
            }
            Kernel::Sum(_) | Kernel::Layer { .. } => {}
        }
    }
    Ok(layers)
}

/// The product and the batchnorm of a block, as far as it has them.
fn of_block<T: Element>(
    params: &Params<T>,
    places: Weights<Option<usize>>,
    running: Option<(usize, usize)>,
) -> impl Iterator<Item = Layer> {
    let name = |index: usize| {
        let name = &params.param(index).name;
        name.rsplit_once('.').map_or(name.clone(), |(layer, _)| layer.to_owned())
    };
    let product = places.w.map(|weight| Layer {
        name: name(weight),
        kind: if params.param(weight).shape.len() == 4 { Kind::Conv } else { Kind::Affine },
        weight,
        bias: places.b,
        running: None,
        mean_after: running.filter(|_| places.b.is_none()).map(|(mean, _)| mean),
    });
    let norm = places.gamma.map(|weight| Layer {
        name: name(weight),
        kind: Kind::Norm,
        weight,
        bias: places.beta,
        running,
        mean_after: None,
    });
    product.into_iter().chain(norm)
}

/// For each layer the module that its parameters are in.
fn pair<'m, 'a>(
    path: &Path,
    layers: &[Layer],
    modules: &'m [Module<'a>],
    names: &NameMap,
) -> Result<Vec<&'m Module<'a>>> {
    let find = |name: &str| modules.iter().find(|module| module.name == name);
    if let Some(here) = names.keys().find(|here| layers.iter().all(|layer| layer.name != **here)) {
        return Err(unknown("network", here, layers.iter().map(|layer| layer.name.as_str())));
    }
    if let Some(there) = names.values().find(|there| find(there).is_none()) {
        return Err(unknown("file", there, modules.iter().map(|module| module.name)));
    }
    let mut pairs: Vec<_> = layers.iter().map(|layer| names.get(&layer.name).and_then(|there| find(there))).collect();
    if let Some((layer, module)) = layers
        .iter()
        .zip(&pairs)
        .find_map(|(layer, pair)| pair.filter(|pair| pair.kind != layer.kind).map(|pair| (layer, pair)))
    {
        let problem =
            format!("`{}` is of kind {}, and `{}` of kind {}", layer.name, layer.kind, module.name, module.kind);
        return Err(Error::invalid("map of names", problem, "give each layer one of its kind"));
    }
    // A file with our names is not put in order.
    let own: Option<Vec<_>> =
        (layers.iter().zip(&pairs)).map(|(layer, pair)| pair.or_else(|| find(&layer.name))).collect();
    if let Some(own) = own {
        pairs = own.into_iter().map(Some).collect();
    }
    for kind in KINDS {
        let taken = |module: &Module<'_>| pairs.iter().flatten().any(|pair| pair.name == module.name);
        let mut there: Vec<_> = modules.iter().filter(|module| module.kind == kind && !taken(module)).collect();
        let open: Vec<_> = (0..layers.len()).filter(|&i| layers[i].kind == kind && pairs[i].is_none()).collect();
        in_order(path, kind, &mut there)?;
        if open.len() != there.len() {
            let open: Vec<_> = open.into_iter().map(|i| layers[i].name.as_str()).collect();
            let there: Vec<_> = there.iter().map(|module| module.name).collect();
            let list = |names: &[&str]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            let problem = format!(
                "does not have one {kind} for each of the network's: left over here are {}, there {}",
                list(&open),
                list(&there)
            );
            return Err(Error::data(path, problem, "give the notation of the network that the file is of"));
        }
        for (i, module) in open.into_iter().zip(there) {
            pairs[i] = Some(module);
        }
    }
    Ok(pairs.into_iter().map(|pair| pair.expect("every layer is of a kind")).collect())
}

fn unknown<'n>(whose: &str, name: &str, known: impl Iterator<Item = &'n str>) -> Error {
    let known: Vec<_> = known.collect();
    let problem = format!("the {whose} has no layer `{name}`");
    Error::invalid("map of names", problem, format!("choose one of {}", known.join(", ")))
}

/// Sorts modules of one kind as they run, if their names tell.
fn in_order(path: &Path, kind: Kind, modules: &mut [&Module<'_>]) -> Result<()> {
    let prefix = common_prefix(modules);
    let place = |module: &Module<'_>| resnet_place(&module.name[prefix..]);
    let pattern = |module: &Module<'_>| numbers(module.name).0;
    if modules.iter().all(|module| pattern(module) == pattern(modules[0])) {
        modules.sort_by_key(|module| numbers(module.name).1);
        return Ok(());
    }
    let Some(strange) = modules.iter().find(|module| place(module).is_none()) else {
        modules.sort_by_key(|module| place(module));
        return Ok(());
    };
    let beside = modules.iter().find(|module| pattern(module) != pattern(strange)).expect("they are not all alike");
    let problem = format!(
        "has a {kind} `{}` and another `{}`, and names do not tell which runs first",
        beside.name, strange.name
    );
    Err(Error::data(path, problem, "say with a map of names which layers they are here (--map)"))
}

/// How many bytes of whole components, such as `module.`, all names begin with.
fn common_prefix(modules: &[&Module<'_>]) -> usize {
    let Some(first) = modules.first() else { return 0 };
    let dots = first.name.match_indices('.').map(|(at, _)| at + 1);
    dots.take_while(|&end| modules.iter().all(|module| module.name.starts_with(&first.name[..end]))).last().unwrap_or(0)
}

/// Where a layer of torchvision's ResNets runs: stage, block, and place in it, the shortcut last.
fn resnet_place(name: &str) -> Option<(usize, usize, usize)> {
    let number = |text: &str| text.parse::<usize>().ok();
    let layer = |text: &str| text.strip_prefix("conv").or(text.strip_prefix("bn")).and_then(number);
    match name.split('.').collect::<Vec<_>>()[..] {
        ["fc"] => Some((usize::MAX, 0, 0)),
        [first] => layer(first).map(|place| (0, 0, place)),
        [stage, block, place] => Some((number(stage.strip_prefix("layer")?)?, number(block)?, layer(place)?)),
        [stage, block, "downsample", "0" | "1"] => {
            Some((number(stage.strip_prefix("layer")?)?, number(block)?, usize::MAX))
        }
        _ => None,
    }
}

/// A name with its numbers left out, and these.
fn numbers(name: &str) -> (String, Vec<u64>) {
    let digits = |c: char| c.is_ascii_digit();
    let pattern = name.split(digits).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("#");
    let numbers = name.split(|c| !digits(c)).filter_map(|part| part.parse().ok()).collect();
    (pattern, numbers)
}

/// The values that the network is to get; statistics begin at 0, and all of them are added to once.
struct Values<'p, T: Element> {
    path: &'p Path,
    params: Params<T>,
    statistics: Params<T>,
}

impl<T: Element> Values<'_, T> {
    /// Takes those of a layer from its module. Returns whether its bias went into the mean of the batchnorm after it.
    fn take(&mut self, layer: &Layer, module: &Module<'_>) -> Result<bool> {
        let path = self.path;
        let weight = self.params.param(layer.weight).clone();
        // A matrix is (M, D) there.
        let wanted: Vec<_> = if layer.kind == Kind::Affine {
            weight.shape.iter().rev().copied().collect()
        } else {
            weight.shape.clone()
        };
        let from = self.tensor(module, "weight", &wanted)?;
        let to = self.params.slice_mut(layer.weight);
        match (layer.kind, &weight.shape[..]) {
            (Kind::Affine, &[inputs, outputs]) => {
                for (i, row) in to.chunks_exact_mut(outputs).enumerate() {
                    row.iter_mut().enumerate().for_each(|(o, w)| *w = from[o * inputs + i]);
                }
            }
            _ => to.copy_from_slice(&from),
        }
        if let Some((mean, variance)) = layer.running {
            for (index, name) in [(mean, "running_mean"), (variance, "running_var")] {
                let shape = self.statistics.param(index).shape.clone();
                let from = self.tensor(module, name, &shape)?;
                self.statistics.slice_mut(index).iter_mut().zip(from).for_each(|(to, from)| *to += from);
            }
        }
        let channels = wanted[0];
        match (layer.bias, module.tensors.contains_key("bias")) {
            (Some(bias), true) => {
                let from = self.tensor(module, "bias", &[channels])?;
                self.params.slice_mut(bias).copy_from_slice(&from);
            }
            (Some(_), false) => {
                let problem = format!("has no tensor `{}.bias`, and `{}` here has a bias", module.name, layer.name);
                let fix = format!(
                    "write the layer without one, such as {}64b0",
                    if layer.kind == Kind::Conv { "conv" } else { "affine" }
                );
                return Err(Error::data(path, problem, fix));
            }
            (None, true) => {
                let Some(mean) = layer.mean_after else {
                    let problem = format!("has a tensor `{}.bias`, and `{}` here has no bias", module.name, layer.name);
                    return Err(Error::data(path, problem, "write the layer with one, without b0"));
                };
                let bias = self.tensor(module, "bias", &[channels])?;
                // The mean itself is added when batchnorm's turn comes.
                self.statistics.slice_mut(mean).iter_mut().zip(bias).for_each(|(mean, bias)| *mean -= bias);
                return Ok(true);
            }
            (None, false) => {}
        }
        Ok(false)
    }

    /// The values of a tensor that has this shape.
    fn tensor(&self, module: &Module<'_>, name: &str, shape: &[usize]) -> Result<Vec<T>> {
        let full = if module.name.is_empty() { name.to_owned() } else { format!("{}.{name}", module.name) };
        let Some(tensor) = module.tensors.get(name) else {
            return Err(self.unfit(format!("has no tensor `{full}`")));
        };
        if tensor.shape() != shape {
            return Err(
                self.unfit(format!("has a tensor `{full}` of {:?}, needed is one of {shape:?}", tensor.shape()))
            );
        }
        let bytes = tensor.data();
        match tensor.dtype() {
            Dtype::F32 => Ok(bytes.as_chunks().0.iter().map(|&b| T::of(f64::from(f32::from_le_bytes(b)))).collect()),
            Dtype::F64 => Ok(bytes.as_chunks().0.iter().map(|&b| T::of(f64::from_le_bytes(b))).collect()),
            other => {
                Err(Error::data(self.path, format!("has a tensor `{full}` of {other} numbers, not f32 or f64"), SAVE))
            }
        }
    }

    fn unfit(&self, problem: String) -> Error {
        let fix = "give the notation of the network that the file is of, or say which layers are which with a map of names (--map)";
        Error::data(self.path, problem, fix)
    }
}
