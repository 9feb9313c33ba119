//! Level 6. `gemmnet bench`: naive against fast layers on CS231n's shapes.

use std::hint::black_box;
use std::time::Instant;

use clap::Args;
use ndarray::{Array1, Array4, Dimension};
use rand::RngExt;
use rand_distr::StandardNormal;
use serde_json::json;

use super::output::{Align, Output, Table, scientific};
use super::{Global, Stop};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::gradcheck::{rel_error, rel_error_norm};
use crate::naive;
use crate::ops::conv::{ConvGradsMut, ConvInput, ConvPlan, Filters, conv2d_backward_into, conv2d_forward_into};
use crate::ops::pool::{max_pool2d_backward_into, max_pool2d_forward_into};
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
    let mut rows = Vec::new();
    let mut ws = Workspace::new();
    measure::<f64>(args.repeats, global.seed(), &mut ws, &mut rows)?;
    measure::<f32>(args.repeats, global.seed(), &mut ws, &mut rows)?;

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
    for row in &rows {
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
    out.line(table)?;
    out.line(format_args!(
        "{} thread(s), medians of {} naive and {} fast runs",
        rayon::current_num_threads(),
        args.repeats,
        args.repeats * FAST_RUNS
    ))?;
    let rows: Vec<_> = (rows.iter())
        .map(|row| {
            json!({
                "case": row.case,
                "dtype": row.dtype,
                "direction": row.direction,
                "naive_ms": row.naive_ms,
                "fast_ms": row.fast_ms,
                "speedup": row.naive_ms / row.fast_ms,
                "rel_error": row.rel_error,
            })
        })
        .collect();
    out.json(&json!({ "rows": rows, "threads": rayon::current_num_threads() }))
}

fn measure<T: Element>(repeats: usize, seed: u64, ws: &mut Workspace, rows: &mut Vec<Row>) -> Result<(), Stop> {
    let normal = |index| {
        let mut rng = stream(seed, Purpose::Example, 0, index);
        move || T::of(rng.sample::<f64, _>(StandardNormal))
    };
    let mut add = |case, direction, rel_error: f64, naive: &mut dyn FnMut(), fast: &mut dyn FnMut()| {
        let limit = limit::<T>();
        if rel_error.is_nan() || rel_error > limit {
            return Err(Stop::Check(format!(
                "{case} {direction} in {}: naive and fast differ by {rel_error:.1e}, more than {limit:.0e}; this is a bug \
                 of gemmnet or of its BLAS library (`gemmnet doctor` says which), please report it",
                T::NAME
            )));
        }
        let (naive_ms, fast_ms) = medians(repeats, naive, fast);
        rows.push(Row { case, dtype: T::NAME, direction, naive_ms, fast_ms, rel_error });
        Ok(())
    };

    let conv = Conv2d { stride: (2, 2), padding: Padding::All(1), ..Conv2d::default() };
    let shape = Conv2dShape::new([100, 3, 31, 31], [25, 3, 3, 3], &conv)?;
    let (plan, images) = (ConvPlan::new::<T>(&shape)?, shape.images);
    let x = Array4::from_shape_simple_fn(shape.x(), normal(0));
    let w = Array4::from_shape_simple_fn(shape.w(), normal(1));
    let b = Array1::from_shape_simple_fn(shape.filters, normal(2));
    let dout = Array4::from_shape_simple_fn(shape.out(), normal(3));
    let naive_forward = || naive::conv2d_forward(x.view(), w.view(), Some(b.view()), &conv);
    let naive_backward = || naive::conv2d_backward(dout.view(), x.view(), w.view(), &conv);

    let mut out = Array4::zeros(shape.out());
    let mut fast = || {
        let filters = Filters::Plain(slice(&w));
        conv2d_forward_into(&plan, images, slice(&x), filters, Some(slice(&b)), slice_mut(&mut out), ws);
    };
    fast();
    let error = difference(&naive_forward()?, &out);
    let mut fast = || {
        let filters = Filters::Plain(slice(&w));
        conv2d_forward_into(&plan, images, slice(&x), filters, Some(slice(&b)), slice_mut(&mut out), ws);
    };
    add("conv", "forward", error, &mut || drop(black_box(naive_forward())), &mut fast)?;

    let mut grads = crate::ops::conv::Conv2dGrads { dx: x.clone(), dw: w.clone(), db: b.clone() };
    let mut fast = |grads: &mut crate::ops::conv::Conv2dGrads<T>| {
        let crate::ops::conv::Conv2dGrads { dx, dw, db } = grads;
        let input = ConvInput { images, x: slice(&x), w: slice(&w) };
        let grads = ConvGradsMut { dx: Some(slice_mut(dx)), dw: Some(slice_mut(dw)), db: Some(slice_mut(db)) };
        conv2d_backward_into(&plan, slice(&dout), input, grads, ws);
    };
    fast(&mut grads);
    let reference = naive_backward()?;
    let errors = [
        difference(&reference.dx, &grads.dx),
        difference(&reference.dw, &grads.dw),
        difference(&reference.db, &grads.db),
    ];
    add("conv", "backward", worst(errors), &mut || drop(black_box(naive_backward())), &mut || fast(&mut grads))?;

    let pool = Pool2d::square(2);
    let shape = Pool2dShape::new([100, 3, 32, 32], &pool)?;
    let x = Array4::from_shape_simple_fn(shape.x(), normal(4));
    let dout = Array4::from_shape_simple_fn(shape.out(), normal(5));
    let naive_forward = || naive::max_pool2d_forward(x.view(), &pool);
    let (reference, argmax) = naive_forward()?;
    let naive_backward = || naive::max_pool2d_backward(dout.view(), &argmax);

    let mut out = Array4::zeros(shape.out());
    let mut cell = vec![0; out.len()];
    max_pool2d_forward_into(&shape, slice(&x), slice_mut(&mut out), &mut cell)?;
    let error = difference(&reference, &out);
    let mut fast = || {
        max_pool2d_forward_into(&shape, slice(&x), slice_mut(&mut out), &mut cell).expect("it ran a moment ago");
    };
    add("pool", "forward", error, &mut || drop(black_box(naive_forward())), &mut fast)?;

    let mut dx = Array4::zeros(shape.x());
    let fast = |dx: &mut Array4<T>| max_pool2d_backward_into(&shape, slice(&dout), &cell, slice_mut(dx));
    fast(&mut dx);
    let error = difference(&naive_backward()?, &dx);
    add("pool", "backward", error, &mut || drop(black_box(naive_backward())), &mut || fast(&mut dx))
}

/// What naive and fast results may differ by.
fn limit<T: Element>() -> f64 {
    if T::NAME == f64::NAME { 1e-9 } else { 1e-4 }
}

/// The largest relative error of an element in f64; in f32, where small elements have no correct digits, of the whole.
fn difference<T: Element, D: Dimension>(naive: &ndarray::Array<T, D>, fast: &ndarray::Array<T, D>) -> f64 {
    if T::NAME == f64::NAME { rel_error(naive, fast) } else { rel_error_norm(naive, fast) }
}

/// The largest, or NaN if there is one.
fn worst(errors: [f64; 3]) -> f64 {
    errors.into_iter().fold(0.0, |worst: f64, error| if worst.is_nan() || worst >= error { worst } else { error })
}

/// Median times in milliseconds. Naive and fast runs take turns, so that both see the same moods of the machine.
fn medians(repeats: usize, naive: &mut dyn FnMut(), fast: &mut dyn FnMut()) -> (f64, f64) {
    let time = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64() * 1e3
    };
    let (mut naive_ms, mut fast_ms) = (Vec::new(), Vec::new());
    for _ in 0..repeats {
        naive_ms.push(time(naive));
        fast_ms.extend((0..FAST_RUNS).map(|_| time(fast)));
    }
    (median(naive_ms), median(fast_ms))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[middle - 1] + values[middle]) / 2.0 } else { values[middle] }
}

fn slice<T, D: Dimension>(array: &ndarray::Array<T, D>) -> &[T] {
    array.as_slice().expect("made in standard layout")
}

fn slice_mut<T, D: Dimension>(array: &mut ndarray::Array<T, D>) -> &mut [T] {
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
