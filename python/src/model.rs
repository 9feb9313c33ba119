//! What a file holds.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use gemmnet::data::{Image, Normalizer};
use gemmnet::nn::import::{NameMap, load_state_dict};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::Network;
use gemmnet::train::argmax;
use gemmnet::{Error, parallel};
use numpy::{IxDyn, PyArray1, PyArray2, PyArrayDyn, PyArrayMethods, PyReadonlyArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyBytes;
use safetensors::tensor::{Dtype, TensorView};

use crate::arrays::{self, Name, misshapen, prepared};
use crate::errors::raised;
use crate::session::Session;
use crate::threads;

const IMAGES: Name = ("model", "images");

/// A trained network, and if it is from a checkpoint, what turns pixels into its input and the names of its classes.
#[pyclass(frozen, module = "gemmnet")]
pub(crate) struct Model {
    pub(crate) model: gemmnet::train::Model<f32>,
    /// The session of the last call of `scores`, for the next one.
    last: Mutex<Option<Py<Session>>>,
}

/// The arrays of a state_dict by their names, as `gemmnet/_arrays.py` prepares them.
fn state_dict_arrays<'py>(state_dict: &Bound<'py, PyAny>) -> PyResult<Vec<(String, PyReadonlyArray<'py, f32, IxDyn>)>> {
    static TENSORS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let prepare = TENSORS.import(state_dict.py(), "gemmnet._arrays", "tensors")?;
    let arrays: Vec<(String, Bound<'py, PyAny>)> = prepare.call1((state_dict,))?.extract()?;
    let read = |(name, array)| Ok((name, prepared(&array, ("state_dict", "tensor"), format_args!("any"))?));
    arrays.into_iter().map(read).collect()
}

fn tensor<'a>(values: &'a PyReadonlyArray<'_, f32, IxDyn>) -> PyResult<TensorView<'a>> {
    let bytes = bytemuck::cast_slice(values.as_slice()?);
    Ok(TensorView::new(Dtype::F32, values.shape().to_vec(), bytes)
        .expect("an array has as many values as its shape says"))
}

/// Images in memory, row-major.
enum Images<'py> {
    Bytes(PyReadonlyArray<'py, u8, IxDyn>),
    Floats(PyReadonlyArray<'py, f32, IxDyn>),
}

impl<'py> Images<'py> {
    fn new(images: &Bound<'py, PyAny>) -> PyResult<Self> {
        let images = arrays::images(images, IMAGES)?;
        Ok(match images.cast::<PyArrayDyn<u8>>() {
            Ok(_) => Images::Bytes(prepared(&images, IMAGES, format_args!("any"))?),
            Err(_) => Images::Floats(prepared(&images, IMAGES, format_args!("any"))?),
        })
    }

    fn shape(&self) -> &[usize] {
        match self {
            Images::Bytes(images) => images.shape(),
            Images::Floats(images) => images.shape(),
        }
    }

    fn pixels(&self) -> PyResult<Image<'_>> {
        Ok(match self {
            Images::Bytes(images) => Image::Bytes(images.as_slice()?),
            Images::Floats(images) => Image::Floats(images.as_slice()?),
        })
    }
}

/// The pixels from `start` on of so many.
fn part(pixels: Image<'_>, start: usize, len: usize) -> Image<'_> {
    match pixels {
        Image::Bytes(pixels) => Image::Bytes(&pixels[start..][..len]),
        Image::Floats(pixels) => Image::Floats(&pixels[start..][..len]),
    }
}

/// Images of `image` values each into the input of the network.
fn normalize(normalizer: &Normalizer, pixels: Image<'_>, image: usize, x: &mut [f32]) {
    parallel::for_each_chunk_mut(x, image, |i, x| {
        normalizer.apply(part(pixels, i * image, image), x).expect("an image of the network's size");
    });
}

impl Model {
    pub(crate) fn new(model: gemmnet::train::Model<f32>) -> Self {
        Model { model, last: Mutex::new(None) }
    }

    fn normalizer(&self) -> PyResult<&Normalizer> {
        self.model.normalizer.as_ref().ok_or_else(|| {
            let problem = "the file holds a network alone, without what turns pixels into its input";
            raised(Error::invalid("model", problem, "load a checkpoint, or prepare the input and call session.run"))
        })
    }

    /// The session for this batch: the last one again, if it is like that.
    fn session_for<'py>(&self, py: Python<'py>, batch: usize, threads: Option<usize>) -> PyResult<Bound<'py, Session>> {
        let count = threads::count(py, threads)?;
        let last = threads::lock(py, &self.last).as_ref().map(|last| last.bind(py).clone());
        if let Some(last) = last.filter(|last| last.get().batch() == batch && last.get().threads() == count) {
            return Ok(last);
        }
        let session = Bound::new(py, Session::new(py, &self.model.network, batch, Some(count))?)?;
        // What it replaces is dropped when the lock is no longer held.
        let _replaced = threads::lock(py, &self.last).replace(session.clone().unbind());
        Ok(session)
    }

    /// The scores of images, batch by batch, in the order of the images.
    fn scores_of(
        &self,
        py: Python<'_>,
        images: &Bound<'_, PyAny>,
        batch: usize,
        threads: Option<usize>,
    ) -> PyResult<Vec<f32>> {
        let (images, normalizer) = (Images::new(images)?, self.normalizer()?);
        let [c, h, w] = self.model.network.input();
        if images.shape().len() != 4 || images.shape()[1..] != [c, h, w] {
            return Err(misshapen(IMAGES, images.shape(), format_args!("(N, {c}, {h}, {w})")));
        }
        let (count, image, classes) = (images.shape()[0], c * h * w, self.model.network.classes());
        let session = self.session_for(py, batch, threads)?;
        let (pixels, mut scores) = (images.pixels()?, vec![0.0; count * classes]);
        let mut x = vec![0.0; batch.min(count) * image];
        for (i, scores) in scores.chunks_mut(batch * classes).enumerate() {
            let x = &mut x[..scores.len() / classes * image];
            let pixels = part(pixels, i * batch * image, x.len());
            session.get().with_scratch(py, |network, scratch| {
                normalize(normalizer, pixels, image, x);
                network.run(x, scores, scratch)
            })?;
            py.check_signals()?;
        }
        Ok(scores)
    }
}

#[pymethods]
impl Model {
    /// The network in this notation for images (C, H, W), with initial weights that are drawn from seed by init: gaussian:STD,
    /// he, xavier, orthogonal or dirac. Nothing normalises its images, and its classes have no names.
    #[new]
    #[pyo3(signature = (notation, input, init="he", seed=0))]
    fn drawn(notation: &str, input: [usize; 3], init: &str, seed: u64) -> PyResult<Self> {
        let network =
            notation.parse().and_then(|spec| Network::new(&spec, input, init.parse()?, seed)).map_err(raised)?;
        Ok(Self::new(gemmnet::train::Model { network, normalizer: None, class_names: Vec::new() }))
    }

    /// The network in this notation for images (C, H, W) with parameters from a PyTorch state_dict, or whatever maps its names
    /// to arrays; docs/pytorch.md says how layers find each other.
    ///
    /// names maps layers of the network to those of the state_dict, for those that are not found out. mean and std, one number
    /// for each channel of pixels from 0 to 1, say how its images were normalised.
    #[staticmethod]
    #[pyo3(signature = (notation, state_dict, input, *, names=None, mean=None, std=None, class_names=None))]
    #[expect(clippy::too_many_arguments, reason = "in Python they have names")]
    fn from_state_dict(
        py: Python<'_>,
        notation: &str,
        state_dict: &Bound<'_, PyAny>,
        input: [usize; 3],
        names: Option<NameMap>,
        mean: Option<Vec<f32>>,
        std: Option<Vec<f32>>,
        class_names: Option<Vec<String>>,
    ) -> PyResult<Self> {
        let tensors = state_dict_arrays(state_dict)?;
        let tensors: Vec<_> =
            tensors.iter().map(|(name, values)| Ok((name.as_str(), tensor(values)?))).collect::<PyResult<_>>()?;
        let class_names = class_names.unwrap_or_default();
        let model = threads::run(py, 1, || {
            let mut network = Network::new(&notation.parse()?, input, Init::Gaussian { std: 0.0 }, 0)?;
            if !class_names.is_empty() && class_names.len() != network.classes() {
                let problem = format!("{} names for a network of {} classes", class_names.len(), network.classes());
                return Err(Error::invalid("class_names", problem, "give one for each"));
            }
            let normalizer = match (mean, std) {
                (None, None) => None,
                (mean, std) => {
                    Some(Normalizer::per_channel(input, &mean.unwrap_or_default(), &std.unwrap_or_default())?)
                }
            };
            let bytes = safetensors::serialize(tensors, None).expect("tensors fit their shapes");
            load_state_dict(&mut network, Path::new("the state_dict"), &bytes, &names.unwrap_or_default())?;
            Ok(gemmnet::train::Model { network, normalizer, class_names })
        })?;
        Ok(Self::new(model))
    }

    /// Reads the file at path, which `gemmnet train`, gemmnet.train or the library saved.
    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self::new(threads::run(py, 1, || gemmnet::train::Model::load(&path))?))
    }

    /// The same from the bytes of such a file.
    #[staticmethod]
    fn from_bytes(py: Python<'_>, data: &Bound<'_, PyBytes>) -> PyResult<Self> {
        let bytes = data.as_bytes();
        Ok(Self::new(threads::run(py, 1, || gemmnet::train::Model::from_bytes(bytes, Path::new("the bytes")))?))
    }

    /// Writes it to the file at path: the network, what turns pixels into its input, and the names of the classes, as far as they
    /// are known. A checkpoint, which gemmnet.train saves if it is told where, has its training besides.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        threads::run(py, 1, || self.model.save(&path))
    }

    /// Writes it as an ONNX file that computes `scores` (batch, classes) of `images` (batch, C, H, W), float32, for batches of any
    /// size. With pixels=True the images are pixels as in the data, and the graph normalises them.
    #[pyo3(signature = (path, pixels=false))]
    fn save_onnx(&self, py: Python<'_>, path: PathBuf, pixels: bool) -> PyResult<()> {
        threads::run(py, 1, || self.model.save_onnx(&path, pixels))
    }

    /// Channels, height and width of the images that it takes.
    #[getter]
    fn input_shape(&self) -> (usize, usize, usize) {
        self.model.network.input().into()
    }

    /// Number of classes, which is that of the scores of an image.
    #[getter]
    fn classes(&self) -> usize {
        self.model.network.classes()
    }

    /// Names of the classes, by label; of a network alone none.
    #[getter]
    fn class_names(&self) -> Vec<String> {
        self.model.class_names.clone()
    }

    /// The network in gemmnet's notation.
    #[getter]
    fn notation(&self) -> String {
        self.model.network.spec().to_string()
    }

    /// Turns images (N, C, H, W), or one (C, H, W), into the network's input, float32 of the same shape, as it was trained.
    ///
    /// images are uint8, or floats on the scale of the images that it was trained on. Only a checkpoint says how.
    fn normalize<'py>(&self, py: Python<'py>, images: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let (images, normalizer) = (Images::new(images)?, self.normalizer()?);
        let (shape, [c, h, w]) = (images.shape(), self.model.network.input());
        if !matches!(shape.len(), 3 | 4) || shape[shape.len() - 3..] != [c, h, w] {
            return Err(misshapen(IMAGES, shape, format_args!("(N, {c}, {h}, {w}) or ({c}, {h}, {w})")));
        }
        let out = PyArrayDyn::<f32>::zeros(py, shape, false);
        let mut place = out.readwrite();
        let (pixels, x) = (images.pixels()?, place.as_slice_mut()?);
        threads::run(py, threads::count(py, None)?, || {
            normalize(normalizer, pixels, c * h * w, x);
            Ok(())
        })?;
        Ok(out)
    }

    /// Makes it ready to run on up to batch images at once, each call spread over so many threads; by default one for each
    /// core, or what GEMMNET_NUM_THREADS says. Scores of sessions for other batches may differ in rounding.
    #[pyo3(signature = (batch=1, threads=None))]
    fn session(&self, py: Python<'_>, batch: usize, threads: Option<usize>) -> PyResult<Session> {
        Session::new(py, &self.model.network, batch, threads)
    }

    /// Scores (N, classes), float32, of any number of images (N, C, H, W), batch at a time, normalised as `normalize` does.
    #[pyo3(signature = (images, batch=100, threads=None))]
    fn scores<'py>(
        &self,
        py: Python<'py>,
        images: &Bound<'py, PyAny>,
        batch: usize,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let scores = self.scores_of(py, images, batch, threads)?;
        let classes = self.model.network.classes();
        let images = scores.len() / classes;
        PyArray1::from_vec(py, scores).reshape([images, classes])
    }

    /// The classes (N), int64, of any number of images: those of the largest of their `scores`, the first if several are
    /// equal.
    #[pyo3(signature = (images, batch=100, threads=None))]
    fn predict<'py>(
        &self,
        py: Python<'py>,
        images: &Bound<'py, PyAny>,
        batch: usize,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let scores = self.scores_of(py, images, batch, threads)?;
        let class = |(i, scores): (usize, &[f32])| {
            argmax(scores).map(|class| class as i64).ok_or_else(|| {
                let problem = format!("a score of image {i} is not a number");
                raised(Error::invalid("model", problem, "look for such numbers in the image and in the weights"))
            })
        };
        let classes = scores.chunks_exact(self.model.network.classes()).enumerate().map(class);
        Ok(PyArray1::from_vec(py, classes.collect::<PyResult<_>>()?))
    }

    fn __repr__(&self) -> String {
        let [c, h, w] = self.model.network.input();
        format!("<gemmnet.Model {} for images of {c}x{h}x{w}>", self.model.network.spec())
    }
}
