//! Our side of `scripts/compare_torch.py` and `scripts/compare_inference.py`: a process that measures what it is asked
//! for, so that they can let it take turns with other libraries, or with the same process of another checkout.
//!
//! One request per line of standard input, one answer per line of standard output:
//!
//! ```text
//! {"case": {"op": "pool", "dtype": "f32", "x": [100, 64, 32, 32], "direction": "forward"}, "warmups": 2, "runs": 3}
//! {"flop": null, "times_ms": [1.31, 1.29, 1.32]}
//! ```
//!
//! A case is prepared, and its result checked, when it is asked for after another one. Results go to buffers that are
//! kept, as within a network.

#[expect(dead_code, reason = "the rest of it is for criterion's benches")]
mod common;

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use gemmnet::blas::{self, Accum, Mat, MatMut, gemm};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::nn::session::Session;
use gemmnet::ops::batchnorm::{
    BatchNorm, NormGradsMut, ScaleShift, Statistics, spatial_batchnorm_backward_into, spatial_batchnorm_forward_into,
};
use gemmnet::ops::conv::{
    ConvGradsMut, ConvInput, ConvPlan, Filters, conv2d_backward, conv2d_backward_into, conv2d_forward,
    conv2d_forward_into,
};
use gemmnet::ops::pool::{max_pool2d_backward, max_pool2d_backward_into, max_pool2d_forward, max_pool2d_forward_into};
use gemmnet::optim::{Group, LearningRate, Optimizer, Progress};
use gemmnet::parallel::{Threads, current_threads};
use gemmnet::params::{ParamKind, Params};
use gemmnet::shape::{Conv2d, Conv2dShape, Padding, Pool2d, Pool2dShape};
use gemmnet::workspace::{Buffer, Workspace};
use gemmnet::{Element, naive, parallel};
use ndarray::{ArrayView1, ArrayView4};
use serde::Deserialize;
use serde_json::json;

use common::{assert_same, normal, slice};

#[derive(Deserialize)]
struct Request {
    case: Case,
    /// Calls that are not timed.
    warmups: usize,
    /// Calls that are.
    runs: usize,
}

#[derive(Clone, Deserialize, PartialEq)]
#[serde(tag = "op", rename_all = "lowercase")]
enum Case {
    /// Padding 1.
    Conv { dtype: Dtype, x: [usize; 4], w: [usize; 4], stride: usize, direction: Direction },
    /// Largest value of 2x2 windows, and where it was.
    Pool { dtype: Dtype, x: [usize; 4], direction: Direction },
    /// Spatial, in training mode, f32.
    Batchnorm { x: [usize; 4], direction: Direction },
    /// Forward, backward and Adam, in f32 on 32x32 images in 3 channels. With `weight_scale`, every step begins with
    /// the initial weights times that.
    Step { network: String, batch: usize, weight_scale: Option<f32> },
    /// Scores, in f32 on images of this size, by default 32x32 in 3 channels. With `folder`, files are left there that
    /// tell others what to compute: the network, the images and the scores.
    Inference { network: String, batch: usize, image: Option<[usize; 3]>, folder: Option<PathBuf> },
    /// Scores of single images for as many threads as there are `callers`, which share a session, and the calls among
    /// themselves.
    Shared { network: String, image: [usize; 3], callers: usize },
    /// The product of two square matrices, in as many blocks of rows as there are threads.
    Gemm { dtype: Dtype, size: usize },
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    F32,
    F64,
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Direction {
    Forward,
    Backward,
}

/// A case that is ready to run.
struct Work {
    /// Floating-point operations of the products, where there are some.
    flop: Option<usize>,
    /// Runs it as often as it is told; the time that each call took.
    run: Box<dyn FnMut(usize) -> Vec<Duration>>,
}

impl Work {
    fn new(flop: Option<usize>, mut run: impl FnMut() + 'static) -> Self {
        Self::timed(flop, move || time(&mut run))
    }

    /// `run` runs it once and says how long it took.
    fn timed(flop: Option<usize>, mut run: impl FnMut() -> Duration + 'static) -> Self {
        Work { flop, run: Box::new(move |calls| (0..calls).map(|_| run()).collect()) }
    }
}

fn time(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

fn prepare(case: &Case) -> Work {
    use Dtype::{F32, F64};
    match *case {
        Case::Conv { dtype: F32, x, w, stride, direction } => conv::<f32>(x, w, stride, direction),
        Case::Conv { dtype: F64, x, w, stride, direction } => conv::<f64>(x, w, stride, direction),
        Case::Pool { dtype: F32, x, direction } => pool::<f32>(x, direction),
        Case::Pool { dtype: F64, x, direction } => pool::<f64>(x, direction),
        Case::Batchnorm { x, direction } => batchnorm(x, direction),
        Case::Step { ref network, batch, weight_scale } => step(network, batch, weight_scale),
        Case::Inference { ref network, batch, image, ref folder } => {
            inference(network, batch, image.unwrap_or(IMAGE), folder.as_deref())
        }
        Case::Shared { ref network, image, callers } => shared(network, image, callers),
        Case::Gemm { dtype: F32, size } => product::<f32>(size),
        Case::Gemm { dtype: F64, size } => product::<f64>(size),
    }
}

/// Standard normal values in memory as the library's own.
fn values<T: Element>(shape: &[usize], index: u64) -> Buffer<T> {
    let len = shape.iter().product();
    let mut values = Buffer::zeroed(len);
    values.copy_from_slice(slice(&normal(len, index)));
    values
}

fn zeros<T: Element>(shape: &[usize]) -> Buffer<T> {
    Buffer::zeroed(shape.iter().product())
}

fn conv<T: Element>(x: [usize; 4], w: [usize; 4], stride: usize, direction: Direction) -> Work {
    let conv = Conv2d { stride: (stride, stride), padding: Padding::All(1), ..Conv2d::default() };
    let shape = Conv2dShape::new(x, w, &conv).expect("the shapes fit");
    check_conv::<T>(&shape, &conv);
    let plan = ConvPlan::new::<T>(&shape).expect("Auto is for all");
    let (mut ws, flop, images, filters) = (Workspace::new(), shape.flops(), shape.images(), shape.filters());
    let (x, w) = (values::<T>(&x, 0), values::<T>(&w, 1));
    match direction {
        Direction::Forward => {
            let (b, mut out) = (values(&[filters], 2), zeros(&shape.out()));
            Work::new(Some(flop), move || {
                conv2d_forward_into(&plan, images, &x, Filters::Plain(&w), Some(&b), &mut out, &mut ws);
            })
        }
        Direction::Backward => {
            let dout = values(&shape.out(), 3);
            let (mut dx, mut dw, mut db) = (zeros(&shape.x()), zeros(&shape.w()), zeros(&[filters]));
            Work::new(Some(2 * flop), move || {
                let grads = ConvGradsMut { dx: Some(&mut dx), dw: Some(&mut dw), db: Some(&mut db) };
                conv2d_backward_into(&plan, &dout, ConvInput { images, x: &x, w: &w }, grads, &mut ws);
            })
        }
    }
}

/// Stops unless the algorithm, which is the same for any number of images, does on a few what the definition says.
fn check_conv<T: Element>(shape: &Conv2dShape, conv: &Conv2d) {
    let shape = shape.with_images(2);
    let [x, w, dout] =
        [(shape.x(), 0), (shape.w(), 1), (shape.out(), 3)].map(|(dim, index)| normal::<T, _>(dim, index));
    let (x, w, dout, b) = (x.view(), w.view(), dout.view(), normal(shape.filters(), 2));
    let want = naive::conv2d_forward(x, w, Some(b.view()), conv).expect("the shapes fit");
    let got = conv2d_forward(x, w, Some(b.view()), conv).expect("the shapes fit");
    assert_same(&want, &got, "conv forward");
    let want = naive::conv2d_backward(dout, x, w, conv).expect("the shapes fit");
    let got = conv2d_backward(dout, x, w, conv).expect("the shapes fit");
    assert_same(&want.dx, &got.dx, "conv dx");
    assert_same(&want.dw, &got.dw, "conv dw");
    assert_same(&want.db, &got.db, "conv db");
}

fn pool<T: Element>(x: [usize; 4], direction: Direction) -> Work {
    let pool = Pool2d::square(2);
    let shape = Pool2dShape::new(x, &pool).expect("2x2 windows fit");
    let (x, dout) = (normal::<T, _>(shape.x(), 0), normal::<T, _>(shape.out(), 1));
    let (want, argmax) = naive::max_pool2d_forward(x.view(), &pool).expect("2x2 windows fit");
    let (got, ours) = max_pool2d_forward(x.view(), &pool).expect("2x2 windows fit");
    assert_same(&want, &got, "pool forward");
    assert!(argmax.cell == ours.cell, "pool: naive and fast chose other maxima");
    let want = naive::max_pool2d_backward(dout.view(), &argmax).expect("dout has the output's shape");
    let got = max_pool2d_backward(dout.view(), &argmax).expect("dout has the output's shape");
    assert_same(&want, &got, "pool backward");

    match direction {
        Direction::Forward => {
            let (x, mut out, mut cell) = (values::<T>(&shape.x(), 0), zeros(&shape.out()), argmax.cell);
            Work::new(None, move || {
                max_pool2d_forward_into(&shape, &x, &mut out, &mut cell).expect("2x2 windows are small");
            })
        }
        Direction::Backward => {
            let (dout, mut dx) = (values::<T>(&shape.out(), 1), zeros(&shape.x()));
            Work::new(None, move || max_pool2d_backward_into(&shape, &dout, &argmax.cell, &mut dx))
        }
    }
}

fn batchnorm(shape: [usize; 4], direction: Direction) -> Work {
    let (config, channels) = (BatchNorm::default(), shape[1]);
    let (x, dout) = (values::<f32>(&shape, 0), values(&shape, 1));
    let (gamma, beta) = (values(&[channels], 2), values(&[channels], 3));
    let (mut running, mut batch) = (Statistics::new(channels), Statistics::new(channels));
    let (mut out, mut dx) = (zeros(&shape), zeros(&shape));
    let (mut dgamma, mut dbeta) = (zeros(&[channels]), zeros(&[channels]));
    let parameters = ScaleShift { gamma: &gamma, beta: &beta };
    spatial_batchnorm_forward_into(shape, &x, parameters, &mut running, &config, &mut out, &mut batch)
        .expect("the default constants are sound");
    let grads = NormGradsMut { dx: &mut dx, dgamma: &mut dgamma, dbeta: &mut dbeta };
    spatial_batchnorm_backward_into(shape, &dout, &x, batch.norm(&gamma, &config), grads);

    let images = |values| ArrayView4::from_shape(shape, values).expect("made with this shape");
    let (gamma_view, beta_view) = (ArrayView1::from(&*gamma), ArrayView1::from(&*beta));
    let want = naive::spatial_batchnorm_forward(images(&x), gamma_view, beta_view, config.eps).expect("shapes fit");
    assert_same(&want, &images(&out), "batchnorm forward");
    let want =
        naive::spatial_batchnorm_backward(images(&dout), images(&x), gamma_view, config.eps).expect("shapes fit");
    assert_same(&want.dx, &images(&dx), "batchnorm dx");
    assert_same(&want.dgamma, &ArrayView1::from(&*dgamma), "batchnorm dgamma");
    assert_same(&want.dbeta, &ArrayView1::from(&*dbeta), "batchnorm dbeta");

    match direction {
        Direction::Forward => Work::new(None, move || {
            let parameters = ScaleShift { gamma: &gamma, beta: &beta };
            spatial_batchnorm_forward_into(shape, &x, parameters, &mut running, &config, &mut out, &mut batch)
                .expect("as before");
        }),
        Direction::Backward => Work::new(None, move || {
            let grads = NormGradsMut { dx: &mut dx, dgamma: &mut dgamma, dbeta: &mut dbeta };
            spatial_batchnorm_backward_into(shape, &dout, &x, batch.norm(&gamma, &config), grads);
        }),
    }
}

const IMAGE: [usize; 3] = [3, 32, 32];

fn network<T: Element>(notation: &str, image: [usize; 3]) -> Network<T> {
    let spec = NetworkSpec::parse(notation).unwrap_or_else(|e| panic!("{e}"));
    Network::new(&spec, image, Init::He, 0).unwrap_or_else(|e| panic!("{e}"))
}

/// A network in which no bias is 0, no scale 1, and no running statistic as it began: whoever leaves one out, or folds
/// one wrongly, has other scores.
fn network_as_trained(notation: &str, image: [usize; 3]) -> Network<f32> {
    /// Moves all but the weights up, so that scales and variances stay positive.
    fn move_up(params: &mut Params<f32>) {
        let count = params.iter().len();
        for index in 0..count {
            if params.param(index).kind != ParamKind::Weight {
                let values = params.slice_mut(index);
                let by = normal::<f32, _>(values.len(), index as u64);
                values.iter_mut().zip(&by).for_each(|(value, by)| *value += 0.25 * by.abs());
            }
        }
    }
    let mut network = network(notation, image);
    move_up(network.params_mut());
    move_up(network.statistics_mut());
    network
}

fn images<T: Element>(count: usize) -> (Buffer<T>, Vec<usize>) {
    let [channels, rows, cols] = IMAGE;
    (values(&[count, channels, rows, cols], 0), (0..count).map(|i| i % 10).collect())
}

/// Multiply-adds of one image's forward pass.
fn multiply_adds(network: &Network<f32>) -> usize {
    network.summary().iter().map(|layer| layer.multiply_adds).sum()
}

fn step(notation: &str, batch: usize, weight_scale: Option<f32>) -> Work {
    fn loss_and_gradient<T: Element>(notation: &str) -> (f64, Vec<f64>) {
        let ((x, y), mut network) = (images(8), network::<T>(notation, IMAGE));
        let loss = network.loss(&x, &y, StepKey::default()).expect("images and labels fit");
        (loss.f64(), network.grads().values().iter().map(|g| g.f64()).collect())
    }
    // The operations have twins; of the whole network, f64 is one: the same weights, other kernels.
    let ((loss, grads), (want, want_grads)) = (loss_and_gradient::<f32>(notation), loss_and_gradient::<f64>(notation));
    assert!((loss - want).abs() <= 1e-4 * want, "{notation}: the loss is {loss} in f32, {want} in f64");
    let error = gemmnet::gradcheck::rel_error_norm(&ArrayView1::from(&want_grads), &ArrayView1::from(&grads));
    // Where two maxima of a window, or an activation and 0, are equal but for rounding, a gradient takes another way.
    assert!(error <= 1e-2, "{notation}: the gradients in f32 and f64 differ by {error:.1e}");

    let (mut network, (x, y)) = (network::<f32>(notation, IMAGE), images(batch));
    let (rule, rate) = ("adam".parse().expect("Adam is a rule"), LearningRate::constant(1e-3).expect("1e-3 is a rate"));
    let groups = Group::classic(rule, rate, 0.0);
    let mut optimizer = Optimizer::new(groups, network.params()).expect("the defaults are sound");
    // Forward, and twice as much backward.
    let flop = Some(3 * 2 * batch * multiply_adds(&network));
    let mut count = 0;
    let mut step = move |network: &mut Network<f32>| {
        count += 1;
        let key = StepKey { seed: 0, step: count };
        network.step(&x, &y, key, &mut optimizer, Progress::default()).expect("images and labels fit");
    };
    let Some(scale) = weight_scale else { return Work::new(flop, move || step(&mut network)) };
    let mut scaled = network.params().clone();
    scaled.values_mut().iter_mut().for_each(|weight| *weight *= scale);
    Work::timed(flop, move || {
        network.params_mut().copy_from(&scaled);
        time(|| step(&mut network))
    })
}

fn inference(notation: &str, batch: usize, [c, h, w]: [usize; 3], folder: Option<&Path>) -> Work {
    let mut network = network_as_trained(notation, [c, h, w]);
    let x = values(&[batch, c, h, w], 0);
    let (mut want, mut scores) = (zeros(&[batch, network.classes()]), zeros(&[batch, network.classes()]));
    network.scores(&x, &mut want).expect("one row of scores per image");
    let session = Session::new(&network, batch).expect("not an empty batch");
    let mut scratch = session.scratch();
    session.run(&x, &mut scores, &mut scratch).expect("one row of scores per image");
    assert_same(&ArrayView1::from(&*want), &ArrayView1::from(&*scores), notation);
    if let Some(folder) = folder {
        network.save(&folder.join("network.safetensors")).unwrap_or_else(|e| panic!("{e}"));
        for (name, values) in [("images.f32", &x), ("gemmnet.f32", &scores)] {
            std::fs::write(folder.join(name), bytemuck::cast_slice(values)).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
    Work::new(Some(2 * batch * multiply_adds(&network)), move || {
        session.run(&x, &mut scores, &mut scratch).expect("as before");
    })
}

fn shared(notation: &str, [c, h, w]: [usize; 3], callers: usize) -> Work {
    let network = network_as_trained(notation, [c, h, w]);
    let (session, x) = (Session::new(&network, 1).expect("not an empty batch"), values(&[c, h, w], 0));
    // The present pool has a thread less while that waits for the callers.
    let pool = Threads::new(current_threads()).expect("the system has threads to give");
    let scratch = || (pool.run(|| session.scratch()), zeros(&[network.classes()]));
    let mut scratches: Vec<(_, Buffer<f32>)> = (0..callers).map(|_| scratch()).collect();
    let run = move |calls: usize| {
        let caller = |(scratch, scores): &mut (_, Buffer<f32>)| -> Vec<Duration> {
            let mut call = || pool.run(|| session.run(&x, scores, scratch).expect("one row of scores"));
            (0..calls / callers).map(|_| time(&mut call)).collect()
        };
        thread::scope(|scope| {
            let started: Vec<_> = scratches.iter_mut().map(|own| scope.spawn(move || caller(own))).collect();
            started.into_iter().flat_map(|caller| caller.join().expect("callers do not panic")).collect()
        })
    };
    Work { flop: None, run: Box::new(run) }
}

fn product<T: Element>(size: usize) -> Work {
    let (a, b, mut c) = (values::<T>(&[size, size], 0), values(&[size, size], 1), zeros(&[size, size]));
    let rows = size.div_ceil(current_threads());
    Work::new(Some(2 * size.pow(3)), move || {
        parallel::for_each_chunk_mut(&mut c, rows * size, |i, c| {
            let rows_here = c.len() / size;
            let (a, b) = (Mat::new(&a[i * rows * size..], rows_here, size, size), Mat::new(&b, size, size, size));
            gemm(Accum::Replace, T::one(), a, b, MatMut::new(c, rows_here, size, size));
        });
    })
}

/// Answers requests until there are no more.
fn serve() {
    let mut ready: Option<(Case, Work)> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("requests are text");
        let Request { case, warmups, runs } =
            serde_json::from_str(&line).unwrap_or_else(|e| panic!("cannot read the request {line}: {e}"));
        if ready.as_ref().is_none_or(|(last, _)| *last != case) {
            // Free first: two of them may not fit into memory.
            drop(ready.take());
        }
        let (_, work) = ready.get_or_insert_with(|| (case.clone(), prepare(&case)));
        (work.run)(warmups);
        let times: Vec<f64> = (work.run)(runs).iter().map(|time| time.as_secs_f64() * 1e3).collect();
        println!("{}", json!({ "flop": work.flop, "times_ms": times }));
        std::io::stdout().flush().expect("somebody reads the answers");
    }
}

/// `--threads N` serves; without, as `cargo bench` and `cargo test` start it, it does nothing.
fn main() {
    // SAFETY: the program has one thread, this one, and has done nothing yet.
    unsafe { blas::choose_kernels() };
    let mut args = std::env::args().skip_while(|arg| arg != "--threads").skip(1);
    let Some(threads) = args.next() else {
        println!("compare: `scripts/compare_torch.py` and `scripts/compare_inference.py` run it, beside others");
        return;
    };
    let threads = threads.parse().expect("--threads takes a number");
    let blas = blas::setup();
    println!("{}", json!({ "about": format!("gemmnet: {} {}, {threads} thread(s)", blas.name, blas.core) }));
    parallel::with_threads(threads, serve).expect("the system has threads to give");
}
