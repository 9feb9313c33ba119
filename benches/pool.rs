//! 2x2 max pooling: naive against fast, on CS231n's shape and on that of a network. Work is in elements of the input.

use criterion::Criterion;
use gemmnet::ops::pool::{max_pool2d_backward_into, max_pool2d_forward_into};
use gemmnet::shape::{Pool2d, Pool2dShape};
use gemmnet::{Element, naive};
use ndarray::Array4;

use crate::common::{assert_same, group, normal, slice, slice_mut};

fn bench<T: Element>(criterion: &mut Criterion, name: &str, x: [usize; 4]) {
    let pool = Pool2d::square(2);
    let shape = &Pool2dShape::new(x, &pool).expect("2x2 windows fit");
    let x: Array4<T> = normal(shape.x(), 0);
    let dout: Array4<T> = normal(shape.out(), 1);
    let naive_forward = || naive::max_pool2d_forward(x.view(), &pool).expect("2x2 windows fit");
    let (want, argmax) = naive_forward();
    let naive_backward = || naive::max_pool2d_backward(dout.view(), &argmax).expect("dout has the output's shape");

    let (mut out, mut dx) = (Array4::zeros(shape.out()), Array4::zeros(shape.x()));
    let mut cell = vec![0; out.len()];
    let forward = |out: &mut Array4<T>, cell: &mut [u8]| {
        max_pool2d_forward_into(shape, slice(&x), slice_mut(out), cell).expect("2x2 windows are small");
    };
    let backward = |dx: &mut Array4<T>| max_pool2d_backward_into(shape, slice(&dout), &argmax.cell, slice_mut(dx));
    forward(&mut out, &mut cell);
    backward(&mut dx);
    assert_same(&want, &out, name);
    assert_eq!(argmax.cell, cell, "{name}: naive and fast chose other maxima");
    assert_same(&naive_backward(), &dx, name);

    let mut benches = group(criterion, &format!("pool {name} {} forward", T::NAME), x.len());
    benches.bench_function("fast", |b| b.iter(|| forward(&mut out, &mut cell)));
    benches.bench_function("naive", |b| b.iter_with_large_drop(naive_forward));
    benches.finish();
    let mut benches = group(criterion, &format!("pool {name} {} backward", T::NAME), x.len());
    benches.bench_function("fast", |b| b.iter(|| backward(&mut dx)));
    benches.bench_function("naive", |b| b.iter_with_large_drop(naive_backward));
    benches.finish();
}

pub(crate) fn run(criterion: &mut Criterion) {
    bench::<f64>(criterion, "seed", [100, 3, 32, 32]);
    bench::<f32>(criterion, "seed", [100, 3, 32, 32]);
    bench::<f32>(criterion, "64@32", [100, 64, 32, 32]);
}
