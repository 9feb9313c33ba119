//! A network ready to run, shared by Python's threads.

use std::sync::Mutex;

use gemmnet::Error;
use gemmnet::nn::session::{Session as Network, SessionScratch};
use numpy::{Ix2, Ix4, PyArray, PyArray2, PyArrayMethods, PyReadwriteArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::arrays::{Name, as_it_is, floats, misshapen, prepared};
use crate::errors::raised;
use crate::threads;

const X: Name = ("session", "x");
const OUT: Name = ("session", "out");

/// A model ready to run on batches up to a size. Any number of threads may use it at once.
#[pyclass(frozen, module = "gemmnet")]
pub(crate) struct Session {
    network: Network<f32>,
    input: [usize; 3],
    classes: usize,
    threads: usize,
    /// The memory of callers that have returned: as many as there ever were at once.
    free: Mutex<Vec<SessionScratch<f32>>>,
}

impl Session {
    /// A session for up to `batch` images, whose calls are spread over `threads` threads, and the memory of its first caller.
    pub(crate) fn new(
        py: Python<'_>,
        network: &gemmnet::nn::network::Network<f32>,
        batch: usize,
        threads: Option<usize>,
    ) -> PyResult<Self> {
        let threads = threads::count(py, threads)?;
        let (session, scratch) = threads::run(py, threads, || {
            let session = Network::new(network, batch)?;
            let scratch = session.scratch();
            Ok((session, scratch))
        })?;
        let (input, classes) = (network.input(), network.classes());
        Ok(Session { network: session, input, classes, threads, free: Mutex::new(vec![scratch]) })
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `work` without the GIL, on the session's threads, with memory that nobody else has meanwhile.
    pub(crate) fn with_scratch<R: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&Network<f32>, &mut SessionScratch<f32>) -> gemmnet::Result<R> + Send,
    ) -> PyResult<R> {
        let free = threads::lock(py, &self.free).pop();
        let network = &self.network;
        let (result, scratch) = threads::run(py, self.threads, || {
            let mut scratch = free.unwrap_or_else(|| network.scratch());
            Ok((work(network, &mut scratch), scratch))
        })?;
        threads::lock(py, &self.free).push(scratch);
        result.map_err(raised)
    }

    /// Where the scores of `images` images go: `out`, if it fits.
    fn place<'py>(&self, out: &Bound<'py, PyAny>, images: usize) -> PyResult<PyReadwriteArray2<'py, f32>> {
        let refused = |problem: &str, fix: &str| raised(Error::invalid("out", problem, fix));
        let array = out
            .cast::<PyArray<f32, numpy::IxDyn>>()
            .map_err(|_| refused("it is not an array of float32", "give numpy.empty((N, classes), numpy.float32)"))?;
        if array.shape() != [images, self.classes] {
            return Err(misshapen(OUT, array.shape(), format_args!("[{images}, {}]", self.classes)));
        }
        if !array.is_c_contiguous() || !array.is_aligned() {
            return Err(refused(
                "its rows do not follow each other in memory",
                "give an array as numpy.empty makes it",
            ));
        }
        let in_use = "it is read-only, in use by another call, or shares its memory with x";
        array.cast::<PyArray2<f32>>()?.try_readwrite().map_err(|_| refused(in_use, "give an array of its own"))
    }
}

#[pymethods]
impl Session {
    /// Images of the largest batch.
    #[getter]
    pub(crate) fn batch(&self) -> usize {
        self.network.batch()
    }

    /// Scores (N, classes), float32, of images x (N, C, H, W) as the network takes them, normalised, for N up to the batch.
    ///
    /// x is whatever numpy.asarray takes, as long as it holds floats; an array of float32 in C order is read where it is.
    /// With out, an array (N, classes) of float32 in C order, the scores go there, and it is returned.
    #[pyo3(signature = (x, out=None))]
    fn run<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let [c, h, w] = self.input;
        let x = match as_it_is::<f32, Ix4>(x, X)? {
            Some(x) => x,
            None => prepared(&floats(x, X)?, X, format_args!("(N, {c}, {h}, {w})"))?,
        };
        let images = x.shape()[0];
        if x.shape()[1..] != self.input {
            return Err(misshapen(X, x.shape(), format_args!("({images}, {c}, {h}, {w})")));
        }
        let (result, mut place) = match out {
            Some(out) => (out.clone(), self.place(out, images)?),
            None => {
                let result = PyArray::<f32, Ix2>::zeros(py, [images, self.classes], false);
                (result.clone().into_any(), result.readwrite())
            }
        };
        let (x, scores) = (x.as_slice()?, place.as_slice_mut()?);
        self.with_scratch(py, |network, scratch| network.run(x, scores, scratch))?;
        Ok(result)
    }

    fn __repr__(&self) -> String {
        let ([c, h, w], threads) = (self.input, self.threads);
        format!("<gemmnet.Session for up to {} images of {c}x{h}x{w} on {threads} thread(s)>", self.network.batch())
    }
}
