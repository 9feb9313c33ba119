//! GELU and SiLU over arrays that no cache holds, beside what only moves the same memory: copying an array, and adding two.
//! Work is in elements.
//!
//! What remains between a function and the memory's speed is what it costs to compute. Within a network activations work on
//! values that are in the cache (`train_step`).

use criterion::Criterion;
use gemmnet::ops::activation::Activation;
use rayon::prelude::*;

use crate::common::{group, normal, slice};

/// 64 MiB of f32.
const LEN: usize = 16 << 20;

/// Elements that a thread takes at a time, as the array forms do.
const PIECE: usize = 1 << 14;

/// Sets `out` from `a` and `b`, piece by piece.
fn pieces(a: &[f32], b: &[f32], out: &mut [f32], piece: impl Fn(&[f32], &[f32], &mut [f32]) + Sync) {
    let (a, b) = (a.par_chunks(PIECE), b.par_chunks(PIECE));
    out.par_chunks_mut(PIECE).zip(a.zip(b)).for_each(|(out, (a, b))| piece(a, b, out));
}

pub(crate) fn run(criterion: &mut Criterion) {
    let [x, dout] = [0, 1].map(|index| normal::<f32, _>(LEN, index));
    let (x, dout, mut out) = (slice(&x), slice(&dout), vec![0.0; LEN]);

    let mut forward = group(criterion, "activation f32 forward", LEN);
    forward.bench_function("copy", |b| b.iter(|| pieces(x, dout, &mut out, |x, _, out| out.copy_from_slice(x))));
    for activation in [Activation::Gelu, Activation::Silu] {
        let apply = |x: &[f32], _: &[f32], out: &mut [f32]| activation.apply_slice(x, out);
        forward.bench_function(activation.name(), |b| b.iter(|| pieces(x, dout, &mut out, apply)));
    }
    forward.finish();

    let mut backward = group(criterion, "activation f32 backward", LEN);
    let add = |x: &[f32], dout: &[f32], out: &mut [f32]| {
        out.iter_mut().zip(x.iter().zip(dout)).for_each(|(out, (x, dout))| *out = x + dout);
    };
    backward.bench_function("add", |b| b.iter(|| pieces(x, dout, &mut out, add)));
    for activation in [Activation::Gelu, Activation::Silu] {
        let apply = |x: &[f32], dout: &[f32], out: &mut [f32]| activation.backward_slice(x, dout, out);
        backward.bench_function(activation.name(), |b| b.iter(|| pieces(x, dout, &mut out, apply)));
    }
    backward.finish();
}
