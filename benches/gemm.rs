//! The matrix product alone, on one thread, as every operation calls it. Work is in FLOP.

use criterion::Criterion;
use gemmnet::Element;
use gemmnet::blas::{Accum, Mat, MatMut, gemm};
use ndarray::{Array2, Axis};

use crate::common::{assert_same, group, normal, slice, slice_mut};

fn bench<T: Element>(criterion: &mut Criterion, [m, n, k]: [usize; 3]) {
    let (a, b) = (normal::<T, _>((m, k), 0), normal::<T, _>((k, n), 1));
    let mut c = Array2::zeros((m, n));
    let product = |c: &mut Array2<T>| {
        let (a, b) = (Mat::new(slice(&a), m, k, k), Mat::new(slice(&b), k, n, n));
        gemm(Accum::Replace, T::one(), a, b, MatMut::new(slice_mut(c), m, n, n));
    };
    product(&mut c);
    // Four rows of it by the definition, in f64: all of them would take longer than the bench.
    let rows = [0, (m - 1) / 3, 2 * (m - 1) / 3, m - 1];
    let want = Array2::from_shape_fn((4, n), |(row, j)| {
        T::of(a.row(rows[row]).iter().zip(b.column(j)).map(|(a, b)| a.f64() * b.f64()).sum())
    });
    assert_same(&want, &c.select(Axis(0), &rows), "gemm");

    let mut benches = group(criterion, &format!("gemm {m}x{n}x{k}"), 2 * m * n * k);
    benches.bench_function(T::NAME, |bench| bench.iter(|| product(&mut c)));
    benches.finish();
}

/// Rows, columns and summed dimension of products in networks for 32x32 images.
const SHAPES: [[usize; 3]; 5] = [
    // convolutions, a tile of columns each: 3 to 64 channels, 64 to 64, 128 to 128, 256 to 256
    [64, 1024, 27],
    [64, 1024, 576],
    [128, 256, 1152],
    [256, 64, 2304],
    // the hidden layer of the three-layer network, a batch of 50
    [50, 500, 16384],
];

pub(crate) fn run(criterion: &mut Criterion) {
    for shape in SHAPES {
        bench::<f32>(criterion, shape);
        bench::<f64>(criterion, shape);
    }
}
