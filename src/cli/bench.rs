//! Level 7. `gemmnet bench`: naive against fast layers on CS231n's shapes.

use std::hint::black_box;
use std::time::Instant;

use clap::Args;
use ndarray::{Array, Array1, Array4, Dimension, IntoDimension};
use rand::RngExt;
use rand_distr::StandardNormal;
use serde_json::json;

use super::output::{Align, Output, Table, scientific};
use super::{Global, Stop};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::gradcheck::{rel_error, rel_error_norm};
use crate::naive;
use crate::ops::conv::{
    Conv2dGrads, ConvGradsMut, ConvInput, ConvPlan, Filters, conv2d_backward_into, conv2d_forward_into,
};
use crate::ops::pool::{max_pool2d_backward_into, max_pool2d_forward_into};
use crate::parallel::current_threads;
use crate::random::{Purpose, stream};
use crate::shape::{Conv2d, Conv2dShape, Padding, Pool2d, Pool2dShape};
use crate::workspace::Workspace;

/// Naive against fast layers: time, speedup and difference
///
/// Convolution of x (100, 3, 31, 31) with w (25, 3, 3, 3), stride 2, padding 1, and 2x2 max pooling of x (100, 3, 32, 32);
/// forward and backward, in f64 and f32. Results are compared before anything is timed. The naive layers run on one
/// thread.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet bench\n  gemmnet bench --threads 1 --repeats 50\n  gemmnet bench --json")]
pub(super) struct BenchArgs {
    /// Runs of each naive layer; of each fast one ten times as many. The medians are shown, in milliseconds
    #[arg(long, value_name = "N", default_value_t = 10)]
    repeats: usize,
}

/// Fast runs for each naive one.
const FAST_RUNS: usize = 10;

/// One line of the table.
struct Row {
    case: &'static str,
    dtype: &'static str,
    direction: &'static str,
    naive_ms: f64,
    fast_ms: f64,
    rel_error: f64,
}

pub(super) fn run(args: &BenchArgs, global: &Global, out: &Output) -> Result<(), Stop> {
    if args.repeats == 0 {
        return Err(Error::invalid("repeats", "0 runs have no median", "give 1 or more").into());
    }
    let mut bench = Bench { repeats: args.repeats, seed: global.seed(), ws: Workspace::new(), rows: Vec::new() };
    bench.layers::<f64>()?;
    bench.layers::<f32>()?;
    out.line(table(&bench.rows))?;
    out.line(format_args!(
        "{} thread(s), medians of {} naive and {} fast runs",
        current_threads(),
        args.repeats,
        args.repeats * FAST_RUNS
    ))?;
    let rows: Vec<_> = bench.rows.iter().map(Row::json).collect();
    out.json(&json!({ "rows": rows, "threads": current_threads() }))
}

fn table(rows: &[Row]) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("case", Left),
        ("dtype", Left),
        ("direction", Left),
        ("naive ms", Right),
        ("fast ms", Right),
        ("speedup", Right),
        ("difference", Right),
    ]);
    for row in rows {
        table.row([
            row.case.to_owned(),
            row.dtype.to_owned(),
            row.direction.to_owned(),
            format!("{:.3}", row.naive_ms),
            format!("{:.3}", row.fast_ms),
            format!("{:.1}x", row.naive_ms / row.fast_ms),
            scientific(row.rel_error),
        ]);
    }
    table
}

impl Row {
    fn json(&self) -> serde_json::Value {
        json!({
            "case": self.case,
            "dtype": self.dtype,
            "direction": self.direction,
            "naive_ms": self.naive_ms,
            "fast_ms": self.fast_ms,
            "speedup": self.naive_ms / self.fast_ms,
            "rel_error": self.rel_error,
        })
    }
}

/// The measurements, and what they need.
struct Bench {
    repeats: usize,
    seed: u64,
    ws: Workspace,
    rows: Vec<Row>,
}

impl Bench {
    fn layers<T: Element>(&mut self) -> Result<(), Stop> {
        self.conv::<T>()?;
        self.pool::<T>()
    }

    /// Standard normal values; each array has an `index` of its own.
    fn normal<T: Element, D: Dimension>(&self, shape: impl IntoDimension<Dim = D>, index: u64) -> Array<T, D> {
        let mut rng = stream(self.seed, Purpose::Example, 0, index);
        Array::from_shape_simple_fn(shape.into_dimension(), || T::of(rng.sample::<f64, _>(StandardNormal)))
    }

    /// Times both layers and adds their row, unless their results differ.
    fn add<T: Element>(
        &mut self,
        (case, direction): (&'static str, &'static str),
        rel_error: f64,
        naive: impl FnMut(),
        mut fast: impl FnMut(&mut Workspace),
    ) -> Result<(), Stop> {
        let limit = limit::<T>();
        if rel_error.is_nan() || rel_error > limit {
            return Err(Stop::Check(format!(
                "{case} {direction} in {}: naive and fast differ by {rel_error:.1e}, more than {limit:.0e}; this is a bug \
                 of gemmnet or of its BLAS library (`gemmnet doctor` says which), please report it",
                T::NAME
            )));
        }
        let (naive_ms, fast_ms) = medians(self.repeats, naive, || fast(&mut self.ws));
        self.rows.push(Row { case, dtype: T::NAME, direction, naive_ms, fast_ms, rel_error });
        Ok(())
    }

    fn conv<T: Element>(&mut self) -> Result<(), Stop> {
        let conv = Conv2d { stride: (2, 2), padding: Padding::All(1), ..Conv2d::default() };
        let shape = Conv2dShape::new([100, 3, 31, 31], [25, 3, 3, 3], &conv)?;
        let (x, w): (Array4<T>, Array4<T>) = (self.normal(shape.x(), 0), self.normal(shape.w(), 1));
        let (b, dout): (Array1<T>, Array4<T>) = (self.normal(shape.filters, 2), self.normal(shape.out(), 3));
        let naive_forward = || naive::conv2d_forward(x.view(), w.view(), Some(b.view()), &conv);
        let naive_backward = || naive::conv2d_backward(dout.view(), x.view(), w.view(), &conv);

        let (plan, images) = (ConvPlan::new::<T>(&shape)?, x.shape()[0]);
        let forward = |out: &mut Array4<T>, ws: &mut Workspace| {
            let filters = Filters::Plain(slice(&w));
            conv2d_forward_into(&plan, images, slice(&x), filters, Some(slice(&b)), slice_mut(out), ws);
        };
        let mut out = Array4::zeros(shape.out());
        forward(&mut out, &mut self.ws);
        let error = difference(&naive_forward()?, &out);
        let names = ("conv", "forward");
        self.add::<T>(names, error, || drop(black_box(naive_forward())), |ws| forward(&mut out, ws))?;

        let backward = |grads: &mut Conv2dGrads<T>, ws: &mut Workspace| {
            let Conv2dGrads { dx, dw, db } = grads;
            let input = ConvInput { images, x: slice(&x), w: slice(&w) };
            let grads = ConvGradsMut { dx: Some(slice_mut(dx)), dw: Some(slice_mut(dw)), db: Some(slice_mut(db)) };
            conv2d_backward_into(&plan, slice(&dout), input, grads, ws);
        };
        let mut grads = Conv2dGrads { dx: x.clone(), dw: w.clone(), db: b.clone() };
        backward(&mut grads, &mut self.ws);
        let reference = naive_backward()?;
        let error = worst([
            difference(&reference.dx, &grads.dx),
            difference(&reference.dw, &grads.dw),
            difference(&reference.db, &grads.db),
        ]);
        let names = ("conv", "backward");
        self.add::<T>(names, error, || drop(black_box(naive_backward())), |ws| backward(&mut grads, ws))
    }

    fn pool<T: Element>(&mut self) -> Result<(), Stop> {
        let pool = Pool2d::square(2);
        let shape = Pool2dShape::new([100, 3, 32, 32], &pool)?;
        let (x, dout): (Array4<T>, Array4<T>) = (self.normal(shape.x(), 4), self.normal(shape.out(), 5));
        let naive_forward = || naive::max_pool2d_forward(x.view(), &pool);
        let (reference, argmax) = naive_forward()?;
        let naive_backward = || naive::max_pool2d_backward(dout.view(), &argmax);

        let mut out = Array4::zeros(shape.out());
        let mut cell = vec![0; out.len()];
        max_pool2d_forward_into(&shape, slice(&x), slice_mut(&mut out), &mut cell)?;
        let error = difference(&reference, &out);
        let fast = |_: &mut _| {
            max_pool2d_forward_into(&shape, slice(&x), slice_mut(&mut out), &mut cell).expect("it ran a moment ago");
        };
        self.add::<T>(("pool", "forward"), error, || drop(black_box(naive_forward())), fast)?;

        let mut dx = Array4::zeros(shape.x());
        max_pool2d_backward_into(&shape, slice(&dout), &cell, slice_mut(&mut dx));
        let error = difference(&naive_backward()?, &dx);
        let fast = |_: &mut _| max_pool2d_backward_into(&shape, slice(&dout), &cell, slice_mut(&mut dx));
        self.add::<T>(("pool", "backward"), error, || drop(black_box(naive_backward())), fast)
    }
}

/// What naive and fast results may differ by.
fn limit<T: Element>() -> f64 {
    if T::NAME == f64::NAME { 1e-9 } else { 1e-4 }
}

/// The largest relative error of an element in f64; in f32, where small elements have no correct digits, of the whole.
fn difference<T: Element, D: Dimension>(naive: &Array<T, D>, fast: &Array<T, D>) -> f64 {
    if T::NAME == f64::NAME { rel_error(naive, fast) } else { rel_error_norm(naive, fast) }
}

/// The largest, or NaN if there is one.
fn worst(errors: [f64; 3]) -> f64 {
    errors.into_iter().fold(0.0, |worst: f64, error| if worst.is_nan() || worst >= error { worst } else { error })
}

/// Median times in milliseconds. Naive and fast runs take turns, so that both see the same moods of the machine.
fn medians(repeats: usize, mut naive: impl FnMut(), mut fast: impl FnMut()) -> (f64, f64) {
    let time = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64() * 1e3
    };
    let (mut naive_ms, mut fast_ms) = (Vec::new(), Vec::new());
    for _ in 0..repeats {
        naive_ms.push(time(&mut naive));
        fast_ms.extend((0..FAST_RUNS).map(|_| time(&mut fast)));
    }
    (median(naive_ms), median(fast_ms))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[middle - 1] + values[middle]) / 2.0 } else { values[middle] }
}

fn slice<T, D: Dimension>(array: &Array<T, D>) -> &[T] {
    array.as_slice().expect("made in standard layout")
}

fn slice_mut<T, D: Dimension>(array: &mut Array<T, D>) -> &mut [T] {
    array.as_slice_mut().expect("made in standard layout")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_the_worst() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(worst([0.1, 0.3, 0.2]), 0.3);
        for place in 0..3 {
            let mut errors = [0.1; 3];
            errors[place] = f64::NAN;
            assert!(worst(errors).is_nan(), "NaN at {place} must not pass for a small error");
        }
    }
}
