//! What a file holds.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use gemmnet::data::{Image, Normalizer};
use gemmnet::train::argmax;
use gemmnet::{Error, parallel};
use numpy::{IxDyn, PyArray1, PyArray2, PyArrayDyn, PyArrayMethods, PyReadonlyArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

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

    /// Writes the network alone to the file at path: neither what turns pixels into its input nor the names of the classes.
    /// A checkpoint, which gemmnet.train saves if it is told where, has them.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        threads::run(py, 1, || self.model.network.save(&path))
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
