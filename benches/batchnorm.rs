//! Spatial batchnorm in training mode: naive against fast. Work is in elements of the input.
//!
//! The array forms are timed, which make a new array for each result; within a network batchnorm is fused with what
//! surrounds it (`train_step`).

use criterion::Criterion;
use gemmnet::ops::Mode;
use gemmnet::ops::batchnorm::{BatchNorm, Statistics, spatial_batchnorm_backward, spatial_batchnorm_forward};
use gemmnet::{Element, naive};
use ndarray::{Array1, Array4};

use crate::common::{assert_same, group, normal};

fn bench<T: Element>(criterion: &mut Criterion, name: &str, shape: [usize; 4]) {
    let config = BatchNorm::default();
    let [x, dout] = [0, 1].map(|index| normal::<T, _>(shape, index));
    let [gamma, beta]: [Array1<T>; 2] = [2, 3].map(|index| normal(shape[1], index));
    let mut running = Statistics::new(shape[1]);
    let forward = |running: &mut Statistics<T>| {
        spatial_batchnorm_forward(x.view(), gamma.view(), beta.view(), running, Mode::Train, &config)
            .expect("one gamma and beta per channel")
    };
    let (out, cache) = forward(&mut running);
    let backward = || {
        spatial_batchnorm_backward(dout.view(), x.view(), gamma.view(), &cache).expect("dout has the output's shape")
    };
    let naive_forward = || -> Array4<T> {
        naive::spatial_batchnorm_forward(x.view(), gamma.view(), beta.view(), config.eps)
            .expect("one gamma and beta per channel")
    };
    let naive_backward = || {
        naive::spatial_batchnorm_backward(dout.view(), x.view(), gamma.view(), config.eps)
            .expect("dout has the output's shape")
    };
    let (want, got) = (naive_backward(), backward());
    assert_same(&naive_forward(), &out, name);
    assert_same(&want.dx, &got.dx, name);
    assert_same(&want.dgamma, &got.dgamma, name);
    assert_same(&want.dbeta, &got.dbeta, name);

    let mut benches = group(criterion, &format!("batchnorm {name} {} forward", T::NAME), x.len());
    benches.bench_function("fast", |b| b.iter_with_large_drop(|| forward(&mut running)));
    benches.bench_function("naive", |b| b.iter_with_large_drop(naive_forward));
    benches.finish();
    let mut benches = group(criterion, &format!("batchnorm {name} {} backward", T::NAME), x.len());
    benches.bench_function("fast", |b| b.iter_with_large_drop(backward));
    benches.bench_function("naive", |b| b.iter_with_large_drop(naive_backward));
    benches.finish();
}

pub(crate) fn run(criterion: &mut Criterion) {
    bench::<f64>(criterion, "3@32", [100, 3, 32, 32]);
    bench::<f32>(criterion, "3@32", [100, 3, 32, 32]);
    bench::<f32>(criterion, "64@32", [100, 64, 32, 32]);
}
