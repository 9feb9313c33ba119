//! Training on arrays, watched from Python.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use gemmnet::data::{Arrays, Pixel};
use gemmnet::nn::init::Init;
use gemmnet::optim::{Schedule, UpdateRule};
use gemmnet::parallel::Threads;
use gemmnet::prelude::*;
use gemmnet::train::{Event, History, Keep};
use ndarray::{Array4, ArrayView4};
use numpy::{Ix1, Ix4, PyArrayDyn, PyReadonlyArray1, PyReadonlyArray4};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

use crate::arrays::{Name, prepared};
use crate::errors::{gave_up, raised};
use crate::model::Model;
use crate::threads::{self, Running};

/// What `gemmnet.train` is told besides the images, by the same names.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Options {
    class_names: Option<Vec<String>>,
    epochs: f64,
    batch_size: usize,
    optimizer: String,
    learning_rate: f64,
    schedule: String,
    warmup_epochs: f64,
    l2: f64,
    clip_norm: Option<f64>,
    ema: Option<f64>,
    keep: String,
    sampler: String,
    flip: String,
    shift: usize,
    shift_fill: String,
    cutout: usize,
    normalize: String,
    init: String,
    seed: u64,
    threads: Option<usize>,
    checkpoint: Option<PathBuf>,
}

/// The one of `choices` that is called `name`.
fn choice<T: Copy>(what: &'static str, name: &str, choices: &[(&str, T)]) -> Result<T> {
    choices.iter().find(|(called, _)| *called == name).map(|&(_, choice)| choice).ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|&(name, _)| name).collect();
        Error::invalid(what, format!("`{name}` is not one"), format!("choose one of {}", names.join(", ")))
    })
}

impl Options {
    fn solver(&self) -> Result<SolverOptions> {
        let schedule: Schedule = self.schedule.parse()?;
        let rate = LearningRate::new(self.learning_rate, schedule, self.warmup_epochs)?;
        let augment = Augment {
            flip: choice(
                "flip",
                &self.flip,
                &[("none", Flip::None), ("random", Flip::Random), ("alternating", Flip::Alternating)],
            )?,
            shift: self.shift,
            fill: choice("shift_fill", &self.shift_fill, &[("zeros", Fill::Zeros), ("reflect", Fill::Reflect)])?,
            cutout: self.cutout,
        };
        let samplers = [("shuffle", Sampler::ShuffledEpochs), ("replacement", Sampler::WithReplacement)];
        Ok(SolverOptions {
            epochs: self.epochs,
            batch_size: self.batch_size,
            groups: Group::classic(self.optimizer.parse::<UpdateRule>()?, rate, self.l2),
            clip_norm: self.clip_norm,
            ema: self.ema,
            keep: choice("keep", &self.keep, &[("best", Keep::Best), ("last", Keep::Last)])?,
            sampler: choice("sampler", &self.sampler, &samplers)?,
            augment: (augment != Augment::NONE).then_some(augment),
            seed: self.seed,
            verbose: false,
            ..SolverOptions::default()
        })
    }

    fn normalization(&self) -> Result<Normalization> {
        let choices = [("mean-image", Normalization::MeanImage), ("per-channel", Normalization::PerChannel)];
        choice("normalize", &self.normalize, &choices)
    }
}

/// Images and labels of the training and the validation split, as `gemmnet/_arrays.py` has prepared them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Splits<'py> {
    x_train: Bound<'py, PyAny>,
    y_train: Bound<'py, PyAny>,
    x_val: Bound<'py, PyAny>,
    y_val: Bound<'py, PyAny>,
}

/// The network to begin with.
#[derive(FromPyObject)]
pub(crate) enum Start<'py> {
    Notation(String),
    Model(Bound<'py, Model>),
}

impl Start<'_> {
    fn as_ref(&self) -> Beginning<'_> {
        match self {
            Start::Notation(notation) => Beginning::Notation(notation),
            Start::Model(model) => Beginning::Model(&model.get().model),
        }
    }
}

/// [`Start`] without Python.
#[derive(Clone, Copy)]
enum Beginning<'a> {
    Notation(&'a str),
    Model(&'a gemmnet::train::Model<f32>),
}

/// Images `(N, C, H, W)` and labels `(N)`, twice: to train on and to validate with.
type Data<'a, P> = [(ArrayView4<'a, P>, &'a [i64]); 2];

/// A solver before its first iteration. A model's images are normalised as it was trained.
fn solver<P: Pixel>(start: Beginning<'_>, data: Data<'_, P>, options: &Options) -> Result<Solver<f32>> {
    let (solver_options, normalization) = (options.solver()?, options.normalization()?);
    let init: Init = options.init.parse()?;
    let spec: NetworkSpec = match start {
        Beginning::Notation(notation) => notation.parse()?,
        Beginning::Model(model) => model.network.spec().clone(),
    };
    let [train, validation] = data;
    let (_, c, h, w) = train.0.dim();
    let none = Array4::from_shape_fn((0, c, h, w), |_| unreachable!("an array without elements"));
    let test = (none.view(), &[][..]);
    let arrays = match &options.class_names {
        Some(names) => Arrays::new(names.clone(), train, validation, test)?,
        None => Arrays::numbered(train, validation, test)?,
    };
    let mut data = Dataset::new(std::sync::Arc::new(arrays), normalization)?;
    let network = match start {
        Beginning::Notation(_) => Network::new(&spec, data.dim(), init, options.seed)?,
        Beginning::Model(model) => {
            if let Some(normalizer) = &model.normalizer {
                data = data.with_normalizer(normalizer.clone())?;
            }
            model.network.clone()
        }
    };
    let mut solver = Solver::new(network, data, solver_options)?;
    if let Some(path) = &options.checkpoint {
        solver.save_to(path);
    }
    Ok(solver)
}

/// What training leaves.
struct Trained {
    model: gemmnet::train::Model<f32>,
    history: History,
    kept_epoch: usize,
    kept_val_accuracy: f64,
}

/// Trains to the end, or until `observer` ends it. A fork may come before each call of `observer`.
fn train_on<P: Pixel>(
    start: Beginning<'_>,
    data: Data<'_, P>,
    options: &Options,
    mut observer: impl FnMut(&Event) -> ControlFlow<()>,
) -> Result<Trained> {
    let mut running = Some(Running::begin());
    let mut solver = solver(start, data, options)?;
    let report = solver.train(|event| {
        running = None;
        let flow = observer(event);
        running = Some(Running::begin());
        flow
    })?;
    let (history, normalizer) = (solver.history().clone(), Some(solver.data().normalizer().clone()));
    let class_names = solver.data().class_names().to_vec();
    Ok(Trained {
        model: gemmnet::train::Model { network: solver.into_network(), normalizer, class_names },
        history,
        kept_epoch: report.kept_epoch,
        kept_val_accuracy: report.kept_val_accuracy,
    })
}

/// The way from the thread that trains to the one that Python called on.
struct Line {
    events: Sender<Event>,
    /// Something for each event that Python has seen, if training waits for that.
    seen: Option<Receiver<()>>,
}

impl Line {
    fn tell(&self, event: Event, stop: &AtomicBool) -> ControlFlow<()> {
        // Who no longer listens has said stop.
        let _ = self.events.send(event);
        let _ = self.seen.as_ref().map(Receiver::recv);
        if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// How often to look for signals, at least.
const LOOK: Duration = Duration::from_millis(50);

/// Tells Python what happens, on the thread that Python called on: only there signals arrive. Ends with the training.
///
/// # Errors
/// What a signal or `observe` raised; training has then been told to stop, and has ended.
fn watch(events: &Receiver<Event>, seen: Sender<()>, stop: &AtomicBool, observe: &Option<Py<PyAny>>) -> PyResult<()> {
    let tell = |event: Option<Event>| {
        Python::attach(|py| {
            py.check_signals()?;
            let (Some(event), Some(observe)) = (event, observe) else { return Ok(false) };
            observe.bind(py).call1((object(py, event)?,))?.extract()
        })
    };
    loop {
        let event = match events.recv_timeout(LOOK) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        match tell(event) {
            Ok(end) => stop.fetch_or(end, Ordering::Relaxed),
            Err(error) => {
                stop.store(true, Ordering::Relaxed);
                drop(seen);
                // Training has ended when nothing can come any more.
                events.iter().for_each(drop);
                return Err(error);
            }
        };
        if event.is_some() {
            // If nobody waits for it, nobody has to.
            let _ = seen.send(());
        }
    }
}

/// An event as a `Step` or `Epoch` of `gemmnet/training.py`.
fn object(py: Python<'_>, event: Event) -> PyResult<Bound<'_, PyAny>> {
    static STEP: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    static EPOCH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    match event {
        Event::Step { epoch, epochs, step, steps, loss, learning_rate, images_per_second, .. } => {
            let class = STEP.import(py, "gemmnet.training", "Step")?;
            class.call1((epoch, epochs, step, steps, loss, learning_rate, images_per_second))
        }
        Event::Epoch { epoch, epochs, train_accuracy, val_accuracy, kept } => {
            let class = EPOCH.import(py, "gemmnet.training", "Epoch")?;
            class.call1((epoch, epochs, train_accuracy, val_accuracy, kept))
        }
    }
}

/// Trains on a thread of its own, while this one listens to Python.
fn train_beside<P: Pixel>(
    start: Beginning<'_>,
    data: Data<'_, P>,
    options: &Options,
    pool: &Threads,
    observe: Option<Py<PyAny>>,
    wait: bool,
) -> PyResult<Trained> {
    let stop = AtomicBool::new(false);
    let ((events, told), (seen, seen_by)) = (channel(), channel());
    let line = Line { events, seen: wait.then_some(seen_by) };
    std::thread::scope(|scope| {
        let stop_asked = &stop;
        let trainer = scope.spawn(move || {
            // The line ends with the training, however that ends.
            let observer = move |event: &Event| line.tell(*event, stop_asked);
            pool.run(|| train_on(start, data, options, observer))
        });
        let watched = watch(&told, seen, &stop, &observe);
        let trained = trainer.join().map_err(|panic| gave_up(&*panic)).and_then(|trained| trained.map_err(raised));
        if let Err(error) = watched {
            // That the checkpoint could not be saved, for instance.
            Python::attach(|py| error.set_cause(py, trained.err()));
            return Err(error);
        }
        trained
    })
}

/// What `gemmnet.train` returns: the model, its history, the epoch that it is of and its accuracy there.
type Returned<'py> = (Model, Bound<'py, PyDict>, usize, f64);

fn train_as<'py, P: Pixel + numpy::Element>(
    py: Python<'py>,
    start: &Start<'py>,
    splits: &Splits<'py>,
    options: &Options,
    observe: Option<Py<PyAny>>,
    wait: bool,
) -> PyResult<Returned<'py>> {
    let images = |images, name: Name| -> PyResult<PyReadonlyArray4<'py, P>> {
        prepared::<P, Ix4>(images, name, format_args!("(N, C, H, W)"))
    };
    let labels = |labels, name: Name| -> PyResult<PyReadonlyArray1<'py, i64>> {
        prepared::<i64, Ix1>(labels, name, format_args!("(N,)"))
    };
    let (x_train, x_val) = (images(&splits.x_train, ("train", "x_train"))?, images(&splits.x_val, ("train", "x_val"))?);
    let (y_train, y_val) = (labels(&splits.y_train, ("train", "y_train"))?, labels(&splits.y_val, ("train", "y_val"))?);
    let data = [(x_train.as_array(), y_train.as_slice()?), (x_val.as_array(), y_val.as_slice()?)];
    // Of its own: it is held up while Python sees an event, and who shared its threads would be held up as well.
    let pool = Threads::new(threads::count(py, options.threads)?).map_err(raised)?;
    let start = start.as_ref();
    let trained = py.detach(|| train_beside(start, data, options, &pool, observe, wait))?;
    let Trained { model, history, kept_epoch, kept_val_accuracy } = trained;
    let dict = PyDict::new(py);
    let History { loss, train_accuracy, val_accuracy, learning_rate } = history;
    dict.set_item("loss", loss)?;
    dict.set_item("train_accuracy", train_accuracy)?;
    dict.set_item("val_accuracy", val_accuracy)?;
    dict.set_item("learning_rate", learning_rate)?;
    Ok((Model::new(model), dict, kept_epoch, kept_val_accuracy))
}

/// Trains a network, as `gemmnet.train` says. observe is called with every event, and ends training by returning True; if wait
/// is false, training does not wait for it.
#[pyfunction]
pub(crate) fn train<'py>(
    py: Python<'py>,
    start: Start<'py>,
    splits: Splits<'py>,
    options: Options,
    observe: Option<Py<PyAny>>,
    wait: bool,
) -> PyResult<Returned<'py>> {
    let train = if splits.x_train.cast::<PyArrayDyn<u8>>().is_ok() { train_as::<u8> } else { train_as::<f32> };
    train(py, &start, &splits, &options, observe, wait)
}
