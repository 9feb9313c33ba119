//! Fused blocks against the chain of naive twins, and the cascades against numeric gradients.

use crate::common::random_array;
use gemmnet::blocks::cascades::{
    affine_relu_backward, affine_relu_forward, conv_relu_backward, conv_relu_forward, conv_relu_pool_backward,
    conv_relu_pool_forward,
};
use gemmnet::blocks::{Block, BlockGrads, BlockInput, BlockParts, BlockState, Core, Pass, Pool, Weights};
use gemmnet::gradcheck::{check, numeric_gradient_array};
use gemmnet::naive;
use gemmnet::ops::Mode;
use gemmnet::ops::activation::Activation;
use gemmnet::ops::batchnorm::{BatchNorm, Statistics, spatial_batchnorm_backward, spatial_batchnorm_forward};
use gemmnet::ops::conv::{conv2d_backward, conv2d_forward};
use gemmnet::ops::dropout::{DropoutKey, dropout_forward};
use gemmnet::ops::pool::{max_pool2d_backward, max_pool2d_forward};
use gemmnet::parallel::with_threads;
use gemmnet::shape::{Algorithm, Conv2d, Padding, Pool2d};
use gemmnet::workspace::Workspace;
use gemmnet::{Element, Error};
use ndarray::{
    Array, Array1, Array2, Array4, ArrayRef, ArrayView, ArrayView1, ArrayView2, ArrayView4, Dimension, array, s,
};

// ------------------------------------------------------------------------------------------------ the chain of the twins

/// Parameters of a block; arrays of no values where there are none.
struct Parameters {
    w: Vec<f64>,
    b: Array1<f64>,
    gamma: Array1<f64>,
    beta: Array1<f64>,
}

/// What the naive twins give, one after the other, and what their backward pass needs.
struct Chain {
    /// The product with its bias, after the early pool.
    y: Array4<f64>,
    early_argmax: Option<gemmnet::ops::pool::Argmax>,
    /// After batchnorm.
    z: Array4<f64>,
    argmax: Option<gemmnet::ops::pool::Argmax>,
    /// Factors of dropout.
    mask: Option<Array4<f64>>,
    out: Array4<f64>,
    /// Batch statistics, if there is batchnorm.
    batch: Option<Statistics<f64>>,
}

struct Gradients {
    dx: Vec<f64>,
    dw: Vec<f64>,
    db: Vec<f64>,
    dgamma: Vec<f64>,
    dbeta: Vec<f64>,
}

/// Affine weights `(D, M)` for x flattened to `(N, D)`.
fn affine_arrays(x: &Array4<f64>, w: &[f64], outputs: usize) -> (Array2<f64>, Array2<f64>) {
    let inputs: usize = x.shape()[1..].iter().product();
    let x = x.clone().into_shape_with_order((x.shape()[0], inputs)).unwrap();
    (x, Array2::from_shape_vec((inputs, outputs), w.to_vec()).unwrap())
}

fn filters(x: &Array4<f64>, w: &[f64], filters: usize, kernel: (usize, usize), conv: &Conv2d) -> Array4<f64> {
    Array4::from_shape_vec((filters, x.shape()[1] / conv.groups, kernel.0, kernel.1), w.to_vec()).unwrap()
}

/// Formulas written down once more, apart from those under test.
fn activate(activation: Option<Activation>, z: f64) -> f64 {
    match activation {
        None => z,
        Some(Activation::Relu) => {
            if z <= 0.0 {
                0.0
            } else {
                z
            }
        }
        Some(Activation::LeakyRelu { slope }) => {
            if z <= 0.0 {
                slope * z
            } else {
                z
            }
        }
        Some(Activation::Silu) => z / (1.0 + (-z).exp()),
        Some(Activation::Gelu) => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (z + 0.044715 * z.powi(3));
            0.5 * z * (1.0 + u.tanh())
        }
    }
}

fn slope(activation: Option<Activation>, z: f64) -> f64 {
    let kinked = |left| if z <= 0.0 { left } else { 1.0 };
    match activation {
        None => 1.0,
        Some(Activation::Relu) => kinked(0.0),
        Some(Activation::LeakyRelu { slope }) => kinked(slope),
        Some(Activation::Silu) => {
            let s = 1.0 / (1.0 + (-z).exp());
            s * (1.0 + z * (1.0 - s))
        }
        Some(Activation::Gelu) => {
            let z = z.clamp(-1e3, 1e3); // infinities have a slope too, 0 and 1
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let t = (c * (z + 0.044715 * z.powi(3))).tanh();
            0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * z * z)
        }
    }
}

fn chain(parts: &BlockParts, x: &Array4<f64>, p: &Parameters, running: &Statistics<f64>, pass: Pass) -> Chain {
    let bias = if p.b.is_empty() { None } else { Some(p.b.view()) };
    let y = match parts.core {
        None => x.clone(),
        Some(Core::Whiten { .. }) => unreachable!("it is a convolution, which is checked"),
        Some(Core::Conv { filters: count, kernel, conv }) => {
            let w = filters(x, &p.w, count, kernel, &conv);
            naive::conv2d_forward(x.view(), w.view(), bias, &conv).unwrap()
        }
        Some(Core::Affine { outputs }) => {
            let (x, w) = affine_arrays(x, &p.w, outputs);
            let y = naive::affine_forward(x.view(), w.view(), bias).unwrap();
            y.into_shape_with_order((x.nrows(), outputs, 1, 1)).unwrap()
        }
    };
    let (y, early_argmax) = match parts.early_pool {
        None => (y, None),
        Some(pool) => {
            let (y, argmax) = naive::max_pool2d_forward(y.view(), &pool).unwrap();
            (y, Some(argmax))
        }
    };
    let channel = |c: usize| y.slice(s![.., c, .., ..]);
    let (z, batch) = match (parts.norm, pass) {
        (None, _) => (y.clone(), None),
        (Some(norm), Pass::Train(_)) => {
            let z = naive::spatial_batchnorm_forward(y.view(), p.gamma.view(), p.beta.view(), norm.eps).unwrap();
            let channels = y.shape()[1];
            let mean = (0..channels).map(|c| channel(c).mean().unwrap()).collect();
            let var = (0..channels).map(|c| channel(c).var(0.0)).collect();
            (z, Some(Statistics { mean, var }))
        }
        (Some(norm), Pass::Test) => {
            let z = Array4::from_shape_fn(y.dim(), |i| {
                let std = (running.var[i.1] + norm.eps).sqrt();
                p.gamma[i.1] * (y[i] - running.mean[i.1]) / std + p.beta[i.1]
            });
            (z, None)
        }
    };
    let a = z.mapv(|z| activate(parts.activation, z));
    let (pooled, argmax) = match parts.pool {
        None => (a, None),
        Some(Pool::Max(pool)) => {
            let (out, argmax) = naive::max_pool2d_forward(a.view(), &pool).unwrap();
            (out, Some(argmax))
        }
        Some(Pool::Avg(pool)) => (naive::avg_pool2d_forward(a.view(), &pool).unwrap(), None),
        Some(Pool::GlobalAvg) => {
            let out = naive::global_avg_pool_forward(a.view());
            let (n, c) = out.dim();
            (out.into_shape_with_order((n, c, 1, 1)).unwrap(), None)
        }
    };
    let (mask, out) = match (parts.dropout, pass) {
        (Some(p), Pass::Train(key)) => {
            let images = pooled.shape()[0];
            let ones = Array2::<f64>::ones((images, pooled.len() / images));
            let (_, kept) = dropout_forward(ones.view(), p, key).unwrap();
            let mask = kept.mapv(|kept| f64::from(kept) / (1.0 - p)).into_shape_with_order(pooled.dim()).unwrap();
            let out = Array4::from_shape_fn(pooled.dim(), |i| if mask[i] == 0.0 { 0.0 } else { mask[i] * pooled[i] });
            (Some(mask), out)
        }
        _ => (None, pooled),
    };
    Chain { y, early_argmax, z, argmax, mask, out, batch }
}

fn chain_backward(parts: &BlockParts, x: &Array4<f64>, p: &Parameters, chain: &Chain, dout: &Array4<f64>) -> Gradients {
    let d = match &chain.mask {
        None => dout.clone(),
        Some(mask) => Array4::from_shape_fn(dout.dim(), |i| if mask[i] == 0.0 { 0.0 } else { mask[i] * dout[i] }),
    };
    let a_shape = chain.z.dim();
    let d = match parts.pool {
        None => d,
        Some(Pool::Max(_)) => naive::max_pool2d_backward(d.view(), chain.argmax.as_ref().unwrap()).unwrap(),
        Some(Pool::Avg(pool)) => naive::avg_pool2d_backward(d.view(), a_shape.into(), &pool).unwrap(),
        Some(Pool::GlobalAvg) => naive::global_avg_pool_backward(d.slice(s![.., .., 0, 0]), a_shape.into()).unwrap(),
    };
    let d = Array4::from_shape_fn(a_shape, |i| d[i] * slope(parts.activation, chain.z[i]));
    let (d, dgamma, dbeta) = match parts.norm {
        None => (d, Vec::new(), Vec::new()),
        Some(norm) => {
            let grads = naive::spatial_batchnorm_backward(d.view(), chain.y.view(), p.gamma.view(), norm.eps).unwrap();
            (grads.dx, grads.dgamma.to_vec(), grads.dbeta.to_vec())
        }
    };
    let d = match &chain.early_argmax {
        None => d,
        Some(argmax) => naive::max_pool2d_backward(d.view(), argmax).unwrap(),
    };
    let (dx, dw, db) = match parts.core {
        None => (values(&d), Vec::new(), Vec::new()),
        Some(Core::Whiten { .. }) => unreachable!("it is a convolution, which is checked"),
        Some(Core::Conv { filters: count, kernel, conv }) => {
            let w = filters(x, &p.w, count, kernel, &conv);
            let grads = naive::conv2d_backward(d.view(), x.view(), w.view(), &conv).unwrap();
            (values(&grads.dx), values(&grads.dw), grads.db.to_vec())
        }
        Some(Core::Affine { outputs }) => {
            let (x, w) = affine_arrays(x, &p.w, outputs);
            let d = d.into_shape_with_order((x.nrows(), outputs)).unwrap();
            let grads = naive::affine_backward(d.view(), x.view(), w.view()).unwrap();
            (values(&grads.dx), values(&grads.dw), grads.db.to_vec())
        }
    };
    Gradients { dx, dw, db: if p.b.is_empty() { Vec::new() } else { db }, dgamma, dbeta }
}

fn values<D: Dimension>(array: &Array<f64, D>) -> Vec<f64> {
    array.iter().copied().collect()
}

// --------------------------------------------------------------------------------------------------------- the comparison

/// Where the values of a test come from, and how exactly the results must agree.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Values {
    /// Standard normal: the formulas are the same, the order of the sums is not. The chain is in f64.
    Normal,
    /// Small integers: ties in pools, zeros at the kinks of ReLU, and every operation exact, so that all bits must agree.
    Integers,
}

impl Values {
    fn draw(self, len: usize, seed: u64) -> Array1<f64> {
        let normal: Array1<f64> = random_array(len, seed);
        match self {
            Values::Normal => normal,
            Values::Integers => normal.mapv(|v| v.round().clamp(-2.0, 2.0)),
        }
    }

    /// NaN must be where NaN is expected, and nowhere else.
    #[track_caller]
    fn assert_same<T: Element>(self, got: &[T], want: &[f64], what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        let largest = want.iter().filter(|v| v.is_finite()).fold(1.0, |most: f64, v| most.max(v.abs()));
        let tolerance = match self {
            Values::Integers => 0.0,
            Values::Normal if T::NAME == "f32" => 1e-4 * largest,
            Values::Normal => 1e-11 * largest,
        };
        for (i, (got, &want)) in got.iter().zip(want).enumerate() {
            let got = got.f64();
            let same = (got - want).abs() <= tolerance || got == want || (got.is_nan() && want.is_nan());
            assert!(same, "{what}: value {i} of {} is {got:e}, expected {want:e}", T::NAME);
        }
    }
}

fn to<T: Element>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&v| T::of(v)).collect()
}

/// Training and test passes in this order, over so many images, with one state: smaller, larger and smaller batches, a
/// test pass between two of training, few images (whose tiles are pieces of their own) and many. The third pass leaves
/// dx out, as the first layer of a network does, the fourth dw and db, as a frozen layer does, and the fifth all of these.
const PASSES: [(bool, usize); 5] = [(true, 3), (false, 5), (true, 17), (true, 4), (false, 2)];

/// Runs a block and the chain side by side.
fn compare<T: Element>(parts: BlockParts, input: [usize; 3], source: Values, passes: &[(bool, usize)]) {
    compare_with::<T>(parts, input, source, passes, |_| {}, &mut BlockState::new());
}

/// [`compare`], with the images changed by `edit`, and a state that another block may have used.
fn compare_with<T: Element>(
    parts: BlockParts,
    input: [usize; 3],
    source: Values,
    passes: &[(bool, usize)],
    edit: impl Fn(&mut Array4<f64>),
    state: &mut BlockState<T>,
) {
    let block = Block::new::<T>(parts, input).unwrap();
    let shapes = block.weight_shapes();
    let draw = |shape: &[usize], seed| {
        let len = if shape.is_empty() { 0 } else { shape.iter().product() };
        source.draw(len, seed)
    };
    let p = Parameters {
        w: draw(&shapes.w, 1).to_vec(),
        b: draw(&shapes.b, 2),
        gamma: draw(&shapes.gamma, 3),
        beta: draw(&shapes.beta, 4),
    };
    let (w, b): (Vec<T>, Vec<T>) = (to(&p.w), to(p.b.as_slice().unwrap()));
    let (gamma, beta): (Vec<T>, Vec<T>) = (to(p.gamma.as_slice().unwrap()), to(p.beta.as_slice().unwrap()));
    let weights = Weights { w: &w[..], b: &b, gamma: &gamma, beta: &beta };
    let mut running: Statistics<f64> = Statistics::new(gamma.len());
    let mut block_running: Statistics<T> = Statistics::new(gamma.len());
    let mut ws = poisoned_workspace();

    for (step, &(trains, images)) in passes.iter().enumerate() {
        let what = |part: &str| format!("{part}, step {step} of {passes:?}, {source:?}, input {input:?}, {parts:?}");
        let key = DropoutKey { seed: 1, step: step as u64, layer: 2 };
        let pass = if trains { Pass::Train(key) } else { Pass::Test };
        let dim = [images, input[0], input[1], input[2]];
        let mut x = source.draw(dim.iter().product(), 10 + step as u64).into_shape_with_order(dim).unwrap();
        edit(&mut x);
        let want = chain(&parts, &x, &p, &running, pass);
        if let (Some(batch), Some(norm)) = (&want.batch, parts.norm) {
            for (old, new) in running.mean.iter_mut().zip(&batch.mean).chain(running.var.iter_mut().zip(&batch.var)) {
                *old = norm.momentum * *old + (1.0 - norm.momentum) * new;
            }
        }

        let xs: Vec<T> = to(x.as_slice().unwrap());
        let before = block_running.clone();
        let block_input = BlockInput { images, x: &xs, weights, prepared: None, running: (&before.mean, &before.var) };
        let mut out = vec![T::nan(); images * block.output_len()];
        block.forward(&block_input, pass, &mut out, state, &mut ws);
        if trains {
            block.commit(&b, state, (&mut block_running.mean, &mut block_running.var));
        }
        assert_eq!(block.output(), want.out.shape()[1..], "{}", what("output shape"));
        source.assert_same(&out, want.out.as_slice().unwrap(), &what("out"));
        source.assert_same(&block_running.mean, &running.mean, &what("running mean"));
        source.assert_same(&block_running.var, &running.var, &what("running variance"));
        if !trains {
            continue;
        }

        let dout = source.draw(want.out.len(), 20 + step as u64).into_shape_with_order(want.out.dim()).unwrap();
        let want = chain_backward(&parts, &x, &p, &want, &dout);
        let nan = |len| vec![T::nan(); len];
        let mut dout: Vec<T> = to(dout.as_slice().unwrap());
        let (mut dx, mut dw, mut db) = (nan(xs.len()), nan(w.len()), nan(b.len()));
        let (mut dgamma, mut dbeta) = (nan(gamma.len()), nan(beta.len()));
        let (wants_dx, wants_dw) = (step != 2 && step != 4, step < 3);
        let grads = BlockGrads {
            dout: &mut dout,
            dx: if wants_dx { Some(&mut dx) } else { None },
            weights: Weights {
                w: if wants_dw { &mut dw[..] } else { &mut [] },
                b: if wants_dw { &mut db } else { &mut [] },
                gamma: &mut dgamma,
                beta: &mut dbeta,
            },
        };
        block.backward(&block_input, &out, grads, state, &mut ws);
        if wants_dx {
            source.assert_same(&dx, &want.dx, &what("dx"));
        }
        if wants_dw {
            source.assert_same(&dw, &want.dw, &what("dw"));
            source.assert_same(&db, &want.db, &what("db"));
        }
        source.assert_same(&dgamma, &want.dgamma, &what("dgamma"));
        source.assert_same(&dbeta, &want.dbeta, &what("dbeta"));
    }
}

/// A workspace whose arenas hold NaN: nothing may be taken for initialised.
fn poisoned_workspace() -> Workspace {
    const LEN: usize = 1 << 16;
    let mut ws = Workspace::new();
    let (shared, scratch) = ws.lend::<f64>(LEN, LEN);
    shared.fill(f64::NAN);
    rayon::broadcast(|_| scratch.with(|arena| arena.fill(f64::NAN)));
    ws
}

// ------------------------------------------------------------------------------------------------------- all combinations

const LEAKY: Activation = Activation::LeakyRelu { slope: 0.5 };
const SAME: Conv2d =
    Conv2d { stride: (1, 1), padding: Padding::Same, dilation: (1, 1), groups: 1, algorithm: Algorithm::Auto };

fn conv(filters: usize, kernel: (usize, usize), conv: Conv2d) -> Option<Core> {
    Some(Core::Conv { filters, kernel, conv })
}

fn pool(window: (usize, usize), stride: (usize, usize), padding: Padding) -> Pool2d {
    Pool2d { window, stride, padding }
}

/// None, and every kind of pool: that tiles, that leaves a rest, that overlaps.
fn pools() -> [Option<Pool>; 7] {
    let overlapping = pool((3, 3), (2, 2), Padding::All(1));
    [
        None,
        Some(Pool::Max(Pool2d::square(2))),
        Some(Pool::Max(Pool2d::square(3))),
        Some(Pool::Max(overlapping)),
        Some(Pool::Avg(Pool2d::square(2))),
        Some(Pool::Avg(overlapping)),
        Some(Pool::GlobalAvg),
    ]
}

#[test]
fn every_combination_of_parts() {
    let activations = [None, Some(Activation::Relu), Some(LEAKY), Some(Activation::Silu), Some(Activation::Gelu)];
    let cores = [None, conv(4, (3, 3), SAME), Some(Core::Affine { outputs: 7 })];
    for core in cores {
        for norm in [None, Some(BatchNorm { eps: 1e-3, momentum: 0.7 })] {
            for activation in activations {
                for pool in pools() {
                    // A pool needs pixels.
                    if pool.is_some() && matches!(core, Some(Core::Affine { .. })) {
                        continue;
                    }
                    for dropout in [None, Some(0.4)] {
                        let base = BlockParts {
                            core,
                            bias: core.is_some(),
                            norm,
                            activation,
                            pool,
                            dropout,
                            ..BlockParts::default()
                        };
                        compare::<f64>(base, [3, 12, 12], Values::Normal, &PASSES);
                        if norm.is_some() && matches!(core, Some(Core::Conv { .. })) {
                            let early_pool = Some(Pool2d::square(2));
                            for size in [[3, 12, 12], [3, 13, 11]] {
                                compare::<f64>(BlockParts { early_pool, ..base }, size, Values::Normal, &PASSES);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Batchnorm behind Winograd's algorithm, which trains with channels in blocks: every activation, pool and early pool, in two blocks
/// of channels and, with 17 images, in more than one slot of sums; a last block that is half full; and filters that fill too little of
/// it, which train in planes.
#[test]
fn batchnorm_in_blocks_of_channels() {
    let norm = Some(BatchNorm { eps: 1e-3, momentum: 0.7 });
    for activation in [None, Some(Activation::Relu), Some(LEAKY), Some(Activation::Silu), Some(Activation::Gelu)] {
        for pool in pools() {
            for early_pool in [None, Some(Pool2d::square(2))] {
                for (filters, bias) in [(32, false), (24, true)] {
                    let core = conv(filters, (3, 3), SAME);
                    let parts = BlockParts { core, bias, early_pool, norm, activation, pool, ..BlockParts::default() };
                    compare::<f32>(parts, [16, 13, 11], Values::Normal, &PASSES);
                }
            }
        }
    }
    let parts = BlockParts { core: conv(16, (3, 3), SAME), bias: true, norm, ..BlockParts::default() };
    compare::<f32>(parts, [20, 7, 6], Values::Normal, &PASSES);
    compare::<f32>(BlockParts { core: conv(20, (3, 3), SAME), ..parts }, [20, 7, 6], Values::Normal, &PASSES);
    // a row and a column that no window of the early pool sees, and that are not there for padding alone
    let valid = Conv2d { padding: Padding::Valid, ..SAME };
    let early_pool = Some(Pool2d::square(2));
    compare::<f32>(
        BlockParts { core: conv(16, (3, 3), valid), early_pool, ..parts },
        [16, 9, 11],
        Values::Normal,
        &PASSES,
    );
    // several bands of the product to an image
    compare::<f32>(BlockParts { early_pool, ..parts }, [16, 96, 96], Values::Normal, &[(true, 1), (true, 3)]);
}

/// Batchnorm of planes that are not gathered: its gradient is made on the way into the products, where the pool tiles.
#[test]
fn batchnorm_of_large_planes() {
    let passes = [(true, 2), (false, 1), (true, 3), (true, 1), (true, 2)];
    let norm = Some(BatchNorm::default());
    let base = BlockParts { bias: true, norm, ..BlockParts::default() };
    for activation in [None, Some(Activation::Relu), Some(LEAKY), Some(Activation::Gelu)] {
        for pool in pools() {
            for dropout in [None, Some(0.4)] {
                let base = BlockParts { activation, pool, dropout, ..base };
                // rows and columns that windows of 2 and 3 leave over
                let size = [2, 17, 19];
                compare::<f64>(BlockParts { bias: false, ..base }, size, Values::Normal, &passes);
                let base = BlockParts { core: conv(3, (3, 3), SAME), ..base };
                compare::<f64>(base, size, Values::Normal, &passes);
                let early_pool = Some(Pool2d::square(2));
                compare::<f64>(BlockParts { early_pool, ..base }, [2, 32, 33], Values::Normal, &passes);
            }
        }
        // more channels than pieces, and a last piece of fewer; channels by themselves; Winograd's algorithm, which is for f32
        let pool = Some(Pool::Max(Pool2d::square(2)));
        let depthwise = conv(2, (3, 3), Conv2d { groups: 2, ..SAME });
        let parts = BlockParts { activation, ..base };
        compare::<f64>(
            BlockParts { core: conv(71, (1, 1), SAME), pool, ..parts },
            [2, 16, 16],
            Values::Normal,
            &passes,
        );
        compare::<f64>(BlockParts { core: depthwise, pool, ..parts }, [2, 17, 19], Values::Normal, &passes);
        compare::<f32>(BlockParts { core: conv(17, (3, 3), SAME), ..parts }, [16, 17, 19], Values::Normal, &passes);
    }
}

/// Outputs that are larger than the caches go past them: 8 MiB and some, in planes that do not begin with a cache line.
#[test]
fn batchnorm_of_large_outputs() {
    for activation in [None, Some(Activation::Gelu)] {
        let parts = BlockParts { norm: Some(BatchNorm::default()), activation, ..BlockParts::default() };
        compare::<f64>(parts, [16, 258, 255], Values::Normal, &[(true, 1)]);
    }
}

/// A block takes nothing from what another one left in the state that both use.
#[test]
fn blocks_share_a_state() {
    let parts = BlockParts { core: conv(4, (3, 3), SAME), bias: true, ..BlockParts::default() };
    let (norm, avg) = (Some(BatchNorm::default()), Some(Pool::Avg(Pool2d::square(2))));
    let (relu, gelu) = (Some(Activation::Relu), Some(Activation::Gelu));
    let mut state = BlockState::new();
    for parts in [
        BlockParts { norm, activation: relu, ..parts },
        BlockParts { activation: relu, ..parts },
        BlockParts { activation: gelu, ..parts },
        BlockParts { pool: avg, ..parts },
        BlockParts { norm, activation: gelu, pool: avg, ..parts },
    ] {
        compare_with::<f64>(parts, [3, 17, 16], Values::Normal, &PASSES, |_| {}, &mut state);
        compare_with::<f64>(parts, [3, 8, 8], Values::Normal, &PASSES, |_| {}, &mut state);
    }
}

/// Integers leave no room for rounding: ties and kinks are decided as the twins decide them, in `f32` as well.
#[test]
fn ties_and_kinks() {
    // Windows of 1, 4 and 64 cells, whose averages are exact.
    let pools = [
        None,
        Some(Pool::Max(Pool2d::square(2))),
        Some(Pool::Max(Pool2d::square(4))),
        Some(Pool::Max(pool((2, 4), (2, 4), Padding::Valid))),
        Some(Pool::Max(pool((3, 3), (2, 2), Padding::All(1)))),
        Some(Pool::Max(pool((2, 2), (1, 1), Padding::Same))),
        Some(Pool::Avg(Pool2d::square(2))),
        Some(Pool::GlobalAvg),
    ];
    for core in [None, conv(4, (3, 3), SAME), Some(Core::Affine { outputs: 7 })] {
        for activation in [None, Some(Activation::Relu), Some(LEAKY)] {
            for pool in pools {
                for dropout in [None, Some(0.5)] {
                    let parts =
                        BlockParts { core, bias: core.is_some(), activation, pool, dropout, ..BlockParts::default() };
                    if pool.is_none() || !matches!(core, Some(Core::Affine { .. })) {
                        compare::<f64>(parts, [3, 8, 8], Values::Integers, &PASSES);
                        compare::<f32>(parts, [3, 8, 8], Values::Integers, &PASSES);
                    }
                }
            }
        }
    }
}

#[test]
fn special_shapes() {
    let relu = Some(Activation::Relu);
    let norm = Some(BatchNorm::default());
    let max = |window| Some(Pool::Max(window));
    let strided = |s, p| Conv2d { stride: (s, s), padding: Padding::All(p), ..Conv2d::default() };
    let parts = BlockParts { bias: true, activation: relu, ..BlockParts::default() };
    let tiled = conv(2, (3, 3), SAME);
    for (why, input, parts) in [
        (
            "stride 2, pooled",
            [3, 12, 12],
            BlockParts { core: conv(4, (3, 3), strided(2, 1)), pool: max(Pool2d::square(2)), ..parts },
        ),
        (
            "a row and a column are left over by the pool",
            [2, 7, 9],
            BlockParts { core: conv(3, (3, 3), SAME), pool: max(Pool2d::square(2)), ..parts },
        ),
        (
            "the pool drops whole tiles of nothing",
            [2, 5, 5],
            BlockParts { core: conv(3, (3, 3), SAME), pool: max(pool((2, 2), (4, 4), Padding::Valid)), ..parts },
        ),
        (
            "pool with gaps",
            [2, 9, 9],
            BlockParts { core: conv(3, (3, 3), SAME), pool: max(pool((2, 2), (3, 3), Padding::Valid)), ..parts },
        ),
        (
            "padded pool",
            [2, 6, 6],
            BlockParts { core: conv(3, (3, 3), SAME), pool: max(pool((2, 2), (2, 2), Padding::All(1))), ..parts },
        ),
        (
            "pool of one cell",
            [2, 6, 6],
            BlockParts { core: conv(3, (3, 3), SAME), pool: max(Pool2d::square(1)), ..parts },
        ),
        (
            "pool of the whole plane, 255 cells",
            [2, 15, 17],
            BlockParts { core: conv(3, (3, 3), SAME), pool: max(pool((15, 17), (15, 17), Padding::Valid)), ..parts },
        ),
        (
            "overlapping pool of 255 cells",
            [1, 16, 18],
            BlockParts { core: conv(2, (3, 3), SAME), pool: max(pool((15, 17), (1, 1), Padding::Valid)), ..parts },
        ),
        (
            "pooled in one direction",
            [2, 6, 8],
            BlockParts { core: conv(3, (3, 3), SAME), pool: max(pool((1, 2), (1, 2), Padding::Valid)), ..parts },
        ),
        (
            "no bias",
            [3, 8, 8],
            BlockParts { core: conv(4, (3, 3), SAME), bias: false, pool: max(Pool2d::square(2)), ..parts },
        ),
        (
            "no bias before batchnorm",
            [3, 8, 8],
            BlockParts { core: conv(4, (3, 3), SAME), bias: false, norm, pool: max(Pool2d::square(2)), ..parts },
        ),
        (
            "groups",
            [4, 8, 8],
            BlockParts { core: conv(6, (3, 3), Conv2d { groups: 2, ..SAME }), pool: max(Pool2d::square(2)), ..parts },
        ),
        (
            "depthwise with batchnorm",
            [4, 8, 8],
            BlockParts { core: conv(4, (3, 3), Conv2d { groups: 4, ..SAME }), norm, ..parts },
        ),
        ("pointwise", [5, 6, 6], BlockParts { core: conv(4, (1, 1), SAME), pool: max(Pool2d::square(3)), ..parts }),
        ("a convolution to one pixel", [3, 4, 5], BlockParts { core: conv(6, (4, 5), Conv2d::default()), ..parts }),
        (
            "a convolution to one pixel, batchnorm, smooth",
            [3, 4, 5],
            BlockParts {
                core: conv(6, (4, 5), Conv2d::default()),
                norm,
                activation: Some(Activation::Silu),
                dropout: Some(0.3),
                ..parts
            },
        ),
        (
            "a convolution to one pixel, smooth",
            [3, 4, 5],
            BlockParts { core: conv(6, (4, 5), Conv2d::default()), activation: Some(Activation::Gelu), ..parts },
        ),
        (
            "a convolution to one pixel, pooled",
            [3, 4, 5],
            BlockParts { core: conv(6, (4, 5), Conv2d::default()), norm, pool: Some(Pool::GlobalAvg), ..parts },
        ),
        ("features without a product", [10, 1, 1], BlockParts { bias: false, norm, dropout: Some(0.3), ..parts }),
        (
            "features pooled over one pixel",
            [3, 2, 2],
            BlockParts { core: Some(Core::Affine { outputs: 5 }), norm, pool: Some(Pool::GlobalAvg), ..parts },
        ),
        (
            "more features than a piece of batchnorm takes",
            [3, 2, 2],
            BlockParts { core: Some(Core::Affine { outputs: 130 }), norm, ..parts },
        ),
        (
            "an affine layer that is cut",
            [20, 8, 8],
            BlockParts { core: Some(Core::Affine { outputs: 100 }), norm, dropout: Some(0.2), ..parts },
        ),
        // Tiles of three rows in f64, six in f32; a fused pool makes them higher.
        ("tiles", [128, 12, 24], BlockParts { core: tiled, ..parts }),
        ("a last tile that is lower", [128, 11, 24], BlockParts { core: tiled, ..parts }),
        ("tiles, batchnorm", [128, 12, 24], BlockParts { core: tiled, norm, pool: max(Pool2d::square(2)), ..parts }),
        (
            "tiles of four rows for three",
            [128, 12, 24],
            BlockParts { core: tiled, pool: max(Pool2d::square(2)), dropout: Some(0.5), ..parts },
        ),
        (
            "tiles of four rows for three, and a lower one",
            [128, 10, 24],
            BlockParts { core: tiled, pool: max(Pool2d::square(2)), ..parts },
        ),
        (
            "tiles of four rows for three, not square",
            [128, 12, 24],
            BlockParts { core: tiled, pool: max(pool((4, 3), (4, 3), Padding::Valid)), ..parts },
        ),
        (
            "tiles as high as the window",
            [128, 12, 24],
            BlockParts { core: tiled, pool: max(pool((6, 2), (6, 2), Padding::Valid)), ..parts },
        ),
        (
            "tiles, pool that overlaps",
            [128, 12, 24],
            BlockParts { core: tiled, pool: max(pool((3, 3), (2, 2), Padding::All(1))), ..parts },
        ),
        ("tiles, smooth", [128, 12, 24], BlockParts { core: tiled, activation: Some(Activation::Silu), ..parts }),
    ] {
        println!("{why}");
        let passes = &[(true, 3), (false, 2), (true, 16)];
        compare::<f64>(parts, input, Values::Normal, passes);
        if parts.norm.is_none() && matches!(parts.activation, Some(Activation::Relu)) && parts.dropout.is_none() {
            compare::<f32>(parts, input, Values::Integers, passes);
        }
    }
}

/// Rows and columns of a product that no window of the pool sees are not computed; those that batchnorm sees are.
#[test]
fn pools_leave_the_ends_of_planes_out() {
    let passes = [(true, 3), (false, 2), (true, 17)];
    let windows = [2, 3].map(Pool2d::square).into_iter();
    let windows = windows.chain([pool((3, 2), (2, 2), Padding::Valid), pool((3, 3), (3, 3), Padding::All(1))]);
    let parts = BlockParts { bias: true, activation: Some(Activation::Gelu), ..BlockParts::default() };
    for window in windows {
        // Winograd's algorithm, and im2col; padding by more than a filter reaches, and a stride.
        for (filters, kernel, of) in [
            (17, (3, 3), SAME),
            (3, (3, 3), SAME),
            (4, (2, 3), Conv2d { padding: Padding::All(3), ..SAME }),
            (5, (3, 3), Conv2d { stride: (2, 2), ..SAME }),
        ] {
            for size in [[16, 7, 9], [18, 15, 14], [16, 5, 5]] {
                let parts = BlockParts { core: conv(filters, kernel, of), ..parts };
                let norm = Some(BatchNorm::default());
                let tiles = window.window == window.stride && window.padding == Padding::Valid;
                compare::<f32>(BlockParts { pool: Some(Pool::Max(window)), ..parts }, size, Values::Normal, &passes);
                compare::<f32>(BlockParts { pool: Some(Pool::Avg(window)), ..parts }, size, Values::Normal, &passes);
                compare::<f32>(
                    BlockParts { pool: Some(Pool::Max(window)), norm, ..parts },
                    size,
                    Values::Normal,
                    &passes,
                );
                if tiles {
                    compare::<f32>(
                        BlockParts { early_pool: Some(window), norm, ..parts },
                        size,
                        Values::Normal,
                        &passes,
                    );
                }
            }
        }
    }
}

/// A NaN shows in the output and in the gradients exactly where the chain's does, unless no pool sees it: ReLU and pools do not
/// swallow it.
#[test]
fn nan_passes_through() {
    let spoil = |x: &mut Array4<f64>| {
        let images = x.shape()[0];
        x[[images - 1, 1, 4, 5]] = f64::NAN;
        x[[0, 0, 2, 2]] = f64::INFINITY;
    };
    let parts = BlockParts { core: conv(4, (3, 3), SAME), bias: true, ..BlockParts::default() };
    for norm in [None, Some(BatchNorm::default())] {
        for activation in [None, Some(Activation::Relu), Some(LEAKY), Some(Activation::Gelu)] {
            for pool in [None, Some(Pool2d::square(2)), Some(pool((3, 3), (2, 2), Padding::All(1)))] {
                let parts = BlockParts { norm, activation, pool: pool.map(Pool::Max), ..parts };
                for size in [[3, 8, 8], [3, 17, 16]] {
                    let (passes, mut state) = ([(true, 3), (false, 5), (true, 2)], BlockState::new());
                    compare_with::<f64>(parts, size, Values::Normal, &passes, spoil, &mut state);
                }
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let relu = Some(Activation::Relu);
    let base = BlockParts { bias: true, activation: relu, dropout: Some(0.3), ..BlockParts::default() };
    let (pooled, norm) = (Some(Pool::Max(Pool2d::square(2))), Some(BatchNorm::default()));
    let blocks = [
        ([64, 24, 24], BlockParts { core: conv(8, (3, 3), SAME), pool: pooled, ..base }),
        ([64, 24, 24], BlockParts { core: conv(8, (3, 3), SAME), norm, pool: pooled, ..base }),
        ([16, 17, 17], BlockParts { core: conv(70, (3, 3), SAME), norm, ..base }),
        ([16, 17, 17], BlockParts { core: conv(48, (3, 3), SAME), norm, dropout: None, ..base }),
        ([32, 9, 9], BlockParts { core: conv(32, (3, 3), SAME), norm, pool: pooled, dropout: None, ..base }),
        ([8, 9, 9], BlockParts { core: conv(8, (3, 3), SAME), activation: Some(Activation::Gelu), ..base }),
        ([64, 6, 6], BlockParts { core: Some(Core::Affine { outputs: 100 }), norm, ..base }),
    ];
    let run = || {
        let mut bits = Vec::new();
        for (input, parts) in blocks {
            for images in [3, 40] {
                let block = Block::new::<f32>(parts, input).unwrap();
                let random = |shape: &[usize], seed| -> Vec<f32> {
                    let len = if shape.is_empty() { 0 } else { shape.iter().product() };
                    random_array::<f32, _>(len, seed).to_vec()
                };
                let shapes = block.weight_shapes();
                let (w, b) = (random(&shapes.w, 1), random(&shapes.b, 2));
                let (gamma, beta) = (random(&shapes.gamma, 3), random(&shapes.beta, 4));
                let weights = Weights { w: &w[..], b: &b, gamma: &gamma, beta: &beta };
                let x = random(&[images, input[0], input[1], input[2]], 5);
                let mut running = Statistics::new(gamma.len());
                let (mut state, mut ws) = (BlockState::new(), Workspace::new());
                let pass = Pass::Train(DropoutKey { seed: 1, step: 2, layer: 3 });
                let mut out = vec![0.0; images * block.output_len()];
                let statistics = running.clone();
                let statistics = (&statistics.mean[..], &statistics.var[..]);
                let input = BlockInput { images, x: &x, weights, prepared: None, running: statistics };
                block.forward(&input, pass, &mut out, &mut state, &mut ws);
                block.commit(&b, &state, (&mut running.mean, &mut running.var));
                let mut dout = out.clone();
                bits.push(dout.clone());
                let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; w.len()], vec![0.0; b.len()]);
                let (mut dgamma, mut dbeta) = (vec![0.0; gamma.len()], vec![0.0; beta.len()]);
                let weights = Weights { w: &mut dw[..], b: &mut db, gamma: &mut dgamma, beta: &mut dbeta };
                let grads = BlockGrads { dout: &mut dout, dx: Some(&mut dx), weights };
                block.backward(&input, &out, grads, &mut state, &mut ws);
                bits.extend([dx, dw, db, dgamma, dbeta, running.mean, running.var]);
            }
        }
        bits.into_iter().map(|values| values.into_iter().map(f32::to_bits).collect()).collect()
    };
    let want: Vec<Vec<u32>> = with_threads(1, run).unwrap();
    for threads in [2, 5] {
        let got: Vec<Vec<u32>> = with_threads(threads, run).unwrap();
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!(got == want, "result {i} differs with {threads} threads");
        }
    }
}

#[test]
fn blocks_that_cannot_be_are_errors() {
    let parts = BlockParts { core: conv(4, (3, 3), SAME), ..BlockParts::default() };
    let leaky = |slope| Some(Activation::LeakyRelu { slope });
    for (parts, want) in [
        (BlockParts { core: conv(4, (7, 7), Conv2d::default()), ..parts }, "a window of 7 does not fit"),
        (BlockParts { core: conv(4, (3, 3), Conv2d { groups: 2, ..SAME }), ..parts }, "2 groups do not divide"),
        (BlockParts { core: conv(4, (3, 3), Conv2d { groups: 0, ..SAME }), ..parts }, "0 groups"),
        (BlockParts { core: Some(Core::Affine { outputs: 0 }), ..parts }, "0 outputs"),
        (BlockParts { pool: Some(Pool::Max(Pool2d::square(7))), ..parts }, "a window of 7 does not fit"),
        (BlockParts { pool: Some(Pool::Avg(Pool2d::square(7))), ..parts }, "a window of 7 does not fit"),
        (BlockParts { dropout: Some(1.0), ..parts }, "the probability is 1"),
        (BlockParts { dropout: Some(f64::NAN), ..parts }, "the probability is NaN"),
        (BlockParts { norm: Some(BatchNorm { eps: 0.0, momentum: 0.9 }), ..parts }, "eps is 0"),
        (BlockParts { norm: Some(BatchNorm { eps: 1e-5, momentum: 2.0 }), ..parts }, "momentum is 2"),
        (BlockParts { early_pool: Some(Pool2d::square(2)), ..parts }, "an early pool stands between"),
        (
            BlockParts {
                early_pool: Some(pool((3, 3), (2, 2), Padding::Valid)),
                norm: Some(BatchNorm::default()),
                ..parts
            },
            "do not tile planes of 6 x 6",
        ),
        // The sign of the output would no longer tell the slope.
        (BlockParts { activation: leaky(-0.1), ..parts }, "the slope is -0.1"),
        (BlockParts { activation: leaky(f64::NAN), ..parts }, "the slope is NaN"),
    ] {
        let error = Block::new::<f64>(parts, [3, 6, 6]).unwrap_err().to_string();
        assert!(error.contains(want), "`{error}` does not say: {want}");
    }
    let error = Block::new::<f64>(BlockParts { core: None, ..parts }, [3, 0, 6]).unwrap_err().to_string();
    assert!(error.contains("[3, 0, 6]"), "{error}");
}

/// A slice of another length than its shape panics, rather than being read or written in part.
#[test]
fn slices_of_the_wrong_length_panic() {
    // Batchnorm has 2 channels here; without it, all is fused into the convolution.
    for (norm, normed) in [(Some(BatchNorm::default()), 2), (None, 0)] {
        let parts = BlockParts { core: conv(2, (3, 3), SAME), bias: true, norm, ..BlockParts::default() };
        let block = &Block::new::<f32>(parts, [1, 4, 4]).unwrap();
        // x, w, b, gamma, beta, running mean and variance, out; out again, dout, dx, dw, db, dgamma, dbeta.
        let right = [16, 18, 2, normed, normed, normed, normed, 32, 32, 32, 16, 18, 2, normed, normed];
        let runs = |lengths: [usize; 15]| {
            let [
                x,
                w,
                b,
                gamma,
                beta,
                mean,
                var,
                mut out,
                made,
                mut dout,
                mut dx,
                mut dw,
                mut db,
                mut dgamma,
                mut dbeta,
            ] = lengths.map(|len| vec![1.0_f32; len]);
            std::panic::catch_unwind(move || {
                let weights = Weights { w: &w[..], b: &b, gamma: &gamma, beta: &beta };
                let input = BlockInput { images: 1, x: &x, weights, prepared: None, running: (&mean, &var) };
                let weights = Weights { w: &mut dw[..], b: &mut db, gamma: &mut dgamma, beta: &mut dbeta };
                let grads = BlockGrads { dout: &mut dout, dx: Some(&mut dx), weights };
                let (mut state, mut ws) = (BlockState::new(), Workspace::new());
                let pass = Pass::Train(DropoutKey { seed: 0, step: 0, layer: 0 });
                block.forward(&input, pass, &mut out, &mut state, &mut ws);
                block.backward(&input, &made, grads, &mut state, &mut ws);
            })
            .is_ok()
        };
        // Gradients of filters and bias may be left out.
        let optional = |index: usize, len: usize| len == 0 && (index == 11 || index == 12);
        assert!(runs(right));
        for wrong in 0..right.len() {
            for len in [0, right[wrong].saturating_sub(1), right[wrong] + 1] {
                let mut lengths = right;
                lengths[wrong] = len;
                assert!(lengths == right || optional(wrong, len) || !runs(lengths), "{lengths:?} was accepted");
            }
        }
    }
}

// ------------------------------------------------------------------------------- numeric gradients, CS231n's acceptance

/// A gradient at least this good; `kinks` says whether points beside a kink may be left out.
#[track_caller]
fn assert_gradient<D: Dimension, D2: Dimension>(
    what: &str,
    analytic: &ArrayRef<f64, D>,
    limit: f64,
    at: &Array<f64, D>,
    dout: &Array<f64, D2>,
    f: impl FnMut(ArrayView<f64, D>) -> Array<f64, D2>,
) {
    let report = check(what, analytic, &numeric_gradient_array(f, at.view(), dout.view()));
    assert!(report.max_rel_error <= limit, "{report}");
    assert!(report.skipped * 20 <= report.checked, "too many points lie beside a kink: {report}");
}

type View1<'a> = ArrayView1<'a, f64>;
type View2<'a> = ArrayView2<'a, f64>;
type View4<'a> = ArrayView4<'a, f64>;

fn random4(shape: [usize; 4], seed: u64) -> Array4<f64> {
    random_array(shape, seed)
}

#[test]
fn gradients_of_the_fast_operations() {
    let conv = Conv2d { padding: Padding::All(1), ..Conv2d::default() };
    let (x, w, b) = (random4([4, 3, 5, 5], 1), random4([2, 3, 3, 3], 2), random_array::<f64, _>(2, 3));
    let dout = random4([4, 2, 5, 5], 4);
    let grads = conv2d_backward(dout.view(), x.view(), w.view(), &conv).unwrap();
    let out = |x: View4, w: View4, b: View1| conv2d_forward(x, w, Some(b), &conv).unwrap();
    assert_gradient("conv dx", &grads.dx, 1e-7, &x, &dout, |x| out(x, w.view(), b.view()));
    assert_gradient("conv dw", &grads.dw, 1e-7, &w, &dout, |w| out(x.view(), w, b.view()));
    assert_gradient("conv db", &grads.db, 1e-7, &b, &dout, |b| out(x.view(), w.view(), b));

    let (x, dout) = (random4([3, 2, 8, 8], 5), random4([3, 2, 4, 4], 6));
    let (_, argmax) = max_pool2d_forward(x.view(), &Pool2d::square(2)).unwrap();
    let dx = max_pool2d_backward(dout.view(), &argmax).unwrap();
    assert_gradient("max pool dx", &dx, 1e-10, &x, &dout, |x| max_pool2d_forward(x, &Pool2d::square(2)).unwrap().0);

    let (x, dout) = (5.0 * random4([2, 3, 4, 5], 7) + 12.0, random4([2, 3, 4, 5], 8));
    let (gamma, beta) = (random_array::<f64, _>(3, 9), random_array::<f64, _>(3, 10));
    let out = |x: View4, gamma: View1, beta: View1| {
        spatial_batchnorm_forward(x, gamma, beta, &mut Statistics::new(3), Mode::Train, &BatchNorm::default()).unwrap()
    };
    let (_, cache) = out(x.view(), gamma.view(), beta.view());
    let grads = spatial_batchnorm_backward(dout.view(), x.view(), gamma.view(), &cache).unwrap();
    assert_gradient("batchnorm dx", &grads.dx, 1e-6, &x, &dout, |x| out(x, gamma.view(), beta.view()).0);
    assert_gradient("batchnorm dgamma", &grads.dgamma, 1e-9, &gamma, &dout, |gamma| {
        out(x.view(), gamma, beta.view()).0
    });
    assert_gradient("batchnorm dbeta", &grads.dbeta, 1e-9, &beta, &dout, |beta| out(x.view(), gamma.view(), beta).0);
}

#[test]
fn gradients_of_the_convolutional_cascades() {
    let conv = Conv2d { padding: Padding::All(1), ..Conv2d::default() };
    let pool = Pool2d::square(2);
    let (w, b) = (random4([3, 3, 3, 3], 2), random_array::<f64, _>(3, 3));

    let (x, dout) = (random4([2, 3, 8, 8], 1), random4([2, 3, 8, 8], 4));
    let out = |x: View4, w: View4, b: View1| conv_relu_forward(x, w, b, &conv).unwrap();
    let grads = conv_relu_backward(dout.view(), out(x.view(), w.view(), b.view()).1).unwrap();
    assert_gradient("conv_relu dx", &grads.dx, 1e-7, &x, &dout, |x| out(x, w.view(), b.view()).0);
    assert_gradient("conv_relu dw", &grads.dw, 1e-7, &w, &dout, |w| out(x.view(), w, b.view()).0);
    assert_gradient("conv_relu db", &grads.db, 1e-7, &b, &dout, |b| out(x.view(), w.view(), b).0);

    let (x, dout) = (random4([2, 3, 16, 16], 5), random4([2, 3, 8, 8], 6));
    let out = |x: View4, w: View4, b: View1| conv_relu_pool_forward(x, w, b, &conv, &pool).unwrap();
    let grads = conv_relu_pool_backward(dout.view(), out(x.view(), w.view(), b.view()).1).unwrap();
    assert_gradient("conv_relu_pool dx", &grads.dx, 1e-7, &x, &dout, |x| out(x, w.view(), b.view()).0);
    assert_gradient("conv_relu_pool dw", &grads.dw, 1e-7, &w, &dout, |w| out(x.view(), w, b.view()).0);
    assert_gradient("conv_relu_pool db", &grads.db, 1e-7, &b, &dout, |b| out(x.view(), w.view(), b).0);
}

#[test]
fn gradients_of_the_affine_cascades() {
    let (x, w): (Array2<f64>, Array2<f64>) = (random_array((6, 12), 1), random_array((12, 10), 2));
    let (b, dout): (Array1<f64>, Array2<f64>) = (random_array(10, 3), random_array((6, 10), 6));
    let out = |x: View2, w: View2, b: View1| affine_relu_forward(x, w, b).unwrap();
    let grads = affine_relu_backward(dout.view(), out(x.view(), w.view(), b.view()).1).unwrap();
    assert_gradient("affine_relu dx", &grads.dx, 1e-7, &x, &dout, |x| out(x, w.view(), b.view()).0);
    assert_gradient("affine_relu dw", &grads.dw, 1e-7, &w, &dout, |w| out(x.view(), w, b.view()).0);
    assert_gradient("affine_relu db", &grads.db, 1e-7, &b, &dout, |b| out(x.view(), w.view(), b).0);
}

#[test]
fn cascades_take_any_layout_and_refuse_what_does_not_fit() {
    let conv = Conv2d { padding: Padding::All(1), ..Conv2d::default() };
    let (x, w, b) = (random4([2, 3, 6, 6], 1), random4([4, 3, 3, 3], 2), random_array::<f64, _>(4, 3));
    let dout = random4([2, 4, 6, 6], 4);
    let columns_first = |values: &Array4<f64>| values.t().as_standard_layout().into_owned();
    let (xt, wt, dt) = (columns_first(&x), columns_first(&w), columns_first(&dout));
    let (want, cache) = conv_relu_forward(x.view(), w.view(), b.view(), &conv).unwrap();
    let (got, other) = conv_relu_forward(xt.t(), wt.t(), b.view(), &conv).unwrap();
    assert_eq!(got, want);
    assert_eq!(conv_relu_backward(dt.t(), other).unwrap(), conv_relu_backward(dout.view(), cache).unwrap());

    let three = Array1::<f64>::ones(3);
    let cache = || conv_relu_forward(x.view(), w.view(), b.view(), &conv).unwrap().1;
    let rows = Array2::<f64>::ones((2, 3));
    let table: Vec<(Option<Error>, &str)> = vec![
        (conv_relu_forward(x.view(), w.view(), three.view(), &conv).err(), "conv_relu: b has shape [3], expected [4]"),
        (
            conv_relu_forward(x.view(), dout.view(), b.view(), &conv).err(),
            "conv_relu: w has shape [2, 4, 6, 6], expected [2, 3, 6, 6]",
        ),
        (
            conv_relu_pool_forward(x.view(), w.view(), b.view(), &conv, &Pool2d::square(7)).err(),
            "a window of 7 does not fit",
        ),
        (
            conv_relu_backward(x.view(), cache()).err(),
            "conv_relu backward: dout has shape [2, 3, 6, 6], expected [2, 4, 6, 6]",
        ),
        (
            affine_relu_forward(rows.view(), rows.view(), three.view()).err(),
            "affine_relu: w has shape [2, 3], expected [3, 3]",
        ),
    ];
    for (error, want) in table {
        let error = error.unwrap_or_else(|| panic!("no error, expected: {want}")).to_string();
        assert!(error.contains(want), "`{error}` does not say: {want}");
    }

    let none = Array4::<f64>::zeros((0, 3, 6, 6));
    let (out, cache) = conv_relu_forward(none.view(), w.view(), b.view(), &conv).unwrap();
    let grads = conv_relu_backward(out.view(), cache).unwrap();
    assert_eq!((out.dim(), grads.dw.sum(), grads.db), ((0, 4, 6, 6), 0.0, array![0.0, 0.0, 0.0, 0.0]));
}
