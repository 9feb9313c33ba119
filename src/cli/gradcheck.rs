//! Level 7. `gemmnet gradcheck`: every layer's gradients against numeric ones, on CS231n's shapes.

use clap::Args;
use ndarray::{
    Array, Array1, Array2, Array4, ArrayD, ArrayRef, ArrayView, ArrayView1, ArrayView2, ArrayView4, Dimension,
    IntoDimension, IxDyn,
};
use rand::RngExt;
use rand_distr::StandardNormal;
use serde_json::json;

use super::output::{Align, Output, Table, scientific, thousands};
use super::{Global, Stop};
use crate::blocks::{Block, BlockGrads, BlockInput, BlockParts, BlockState, Core, Pass, Pool, Weights};
use crate::error::Result;
use crate::gradcheck::{GradReport, NumericGradient, STEP, check, numeric_gradient, numeric_gradient_array};
use crate::models::ThreeLayerConvNet;
use crate::ops::Mode;
use crate::ops::activation::{Activation, activation_backward, activation_forward};
use crate::ops::affine::{affine_backward, affine_forward};
use crate::ops::batchnorm::{
    BatchNorm, Statistics, batchnorm_backward, batchnorm_forward, spatial_batchnorm_backward, spatial_batchnorm_forward,
};
use crate::ops::conv::{conv2d_backward, conv2d_forward};
use crate::ops::dropout::{DropoutKey, dropout_backward, dropout_forward};
use crate::ops::loss::{softmax_cross_entropy, svm_hinge};
use crate::ops::pool::{
    avg_pool2d_backward, avg_pool2d_forward, global_avg_pool_backward, global_avg_pool_forward, max_pool2d_backward,
    max_pool2d_forward,
};
use crate::random::{Purpose, stream};
use crate::shape::{Conv2d, Padding, Pool2d};
use crate::workspace::Workspace;

/// Every layer's gradients against numeric ones
///
/// In f64, with random inputs of CS231n's shapes. Points beside a kink (the corner of a ReLU, two values that compete in a
/// max pool) have no derivative: they are left out and counted. Fails if an error is over its limit. One seed in a hundred
/// draws a gradient so close to 0 that rounding takes it there; one that is over it with every seed is a bug.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet gradcheck\n  gemmnet gradcheck --seed 7\n  gemmnet gradcheck --json")]
pub(super) struct GradcheckArgs {}

pub(super) fn run(_: &GradcheckArgs, global: &Global, out: &Output) -> Result<(), Stop> {
    let mut checks = Checks { seed: global.seed(), arrays: 0, done: Vec::new() };
    checks.layers()?;
    checks.cascades()?;
    checks.three_layer_net()?;

    use Align::{Left, Right};
    let mut table = Table::new([
        ("layer", Left),
        ("gradient", Left),
        ("max relative error", Right),
        ("limit", Right),
        ("checked", Right),
        ("beside a kink", Right),
        ("", Left),
    ]);
    for done in &checks.done {
        table.row([
            done.layer.clone(),
            done.report.name.clone(),
            scientific(done.report.max_rel_error),
            format!("{:.0e}", done.limit),
            thousands(done.report.checked),
            thousands(done.report.skipped),
            if done.passes() { "" } else { "over its limit" }.to_owned(),
        ]);
    }
    out.line(table)?;
    let rows: Vec<_> = (checks.done.iter())
        .map(|done| {
            json!({
                "layer": done.layer,
                "gradient": done.report.name,
                "max_rel_error": done.report.max_rel_error,
                "limit": done.limit,
                "checked": done.report.checked,
                "skipped": done.report.skipped,
                "passed": done.passes(),
            })
        })
        .collect();
    out.json(&json!({ "rows": rows, "seed": global.seed() }))?;
    match checks.done.iter().filter(|done| !done.passes()).count() {
        0 => out.line(format_args!("{} gradients are right", checks.done.len())),
        n => Err(Stop::Check(format!(
            "{n} of {} gradients are over their limits, as the table shows",
            checks.done.len()
        ))),
    }
}

/// A gradient that was checked.
struct Done {
    layer: String,
    report: GradReport,
    limit: f64,
}

impl Done {
    /// Not if the error is NaN, as it is when no point could be checked.
    fn passes(&self) -> bool {
        self.report.max_rel_error <= self.limit
    }
}

struct Checks {
    seed: u64,
    /// How many random arrays have been drawn: each comes from a stream of its own.
    arrays: u64,
    done: Vec<Done>,
}

impl Checks {
    /// Standard normal.
    fn random<D: Dimension>(&mut self, shape: impl IntoDimension<Dim = D>) -> Array<f64, D> {
        self.arrays += 1;
        let mut rng = stream(self.seed, Purpose::Example, 1, self.arrays);
        Array::from_shape_simple_fn(shape.into_dimension(), || rng.sample(StandardNormal))
    }

    fn add<D: Dimension>(
        &mut self,
        layer: &str,
        gradient: &str,
        limit: f64,
        analytic: &ArrayRef<f64, D>,
        numeric: &NumericGradient<D>,
    ) {
        self.done.push(Done { layer: layer.to_owned(), report: check(gradient, analytic, numeric), limit });
    }

    fn layers(&mut self) -> Result<()> {
        self.conv()?;
        self.pools()?;
        self.affine()?;
        self.batchnorm()?;
        self.spatial_batchnorm()?;
        self.pointwise()?;
        self.losses()
    }

    fn conv(&mut self) -> Result<()> {
        let conv = Conv2d { padding: Padding::All(1), ..Conv2d::default() };
        let (x, w, b) = (self.random((4, 3, 5, 5)), self.random((2, 3, 3, 3)), self.random(2));
        let dout = self.random((4, 2, 5, 5));
        let grads = conv2d_backward(dout.view(), x.view(), w.view(), &conv)?;
        let dx = numeric(|x| conv2d_forward(x, w.view(), Some(b.view()), &conv), &x, &dout)?;
        let dw = numeric(|w| conv2d_forward(x.view(), w, Some(b.view()), &conv), &w, &dout)?;
        let db = numeric(|b| conv2d_forward(x.view(), w.view(), Some(b), &conv), &b, &dout)?;
        self.add("conv", "dx", 1e-7, &grads.dx, &dx);
        self.add("conv", "dw", 1e-7, &grads.dw, &dw);
        self.add("conv", "db", 1e-7, &grads.db, &db);
        Ok(())
    }

    fn pools(&mut self) -> Result<()> {
        let pool = Pool2d::square(2);
        let (x, dout) = (self.random((3, 2, 8, 8)), self.random((3, 2, 4, 4)));
        let dx = max_pool2d_backward(dout.view(), &max_pool2d_forward(x.view(), &pool)?.1)?;
        let dx_num = numeric(|x| Ok(max_pool2d_forward(x, &pool)?.0), &x, &dout)?;
        self.add("max pool", "dx", 1e-10, &dx, &dx_num);

        let dx = avg_pool2d_backward(dout.view(), x.dim().into(), &pool)?;
        self.add("average pool", "dx", 1e-7, &dx, &numeric(|x| avg_pool2d_forward(x, &pool), &x, &dout)?);

        let dout = self.random((3, 2));
        let dx = global_avg_pool_backward(dout.view(), x.dim().into())?;
        self.add("global average", "dx", 1e-7, &dx, &numeric(|x| Ok(global_avg_pool_forward(x)), &x, &dout)?);
        Ok(())
    }

    fn affine(&mut self) -> Result<()> {
        let (x, w, b): (_, _, Array1<f64>) = (self.random((10, 6)), self.random((6, 5)), self.random(5));
        let dout = self.random((10, 5));
        let grads = affine_backward(dout.view(), x.view(), w.view())?;
        let dx = numeric(|x| affine_forward(x, w.view(), Some(b.view())), &x, &dout)?;
        let dw = numeric(|w| affine_forward(x.view(), w, Some(b.view())), &w, &dout)?;
        let db = numeric(|b| affine_forward(x.view(), w.view(), Some(b)), &b, &dout)?;
        self.add("affine", "dx", 1e-7, &grads.dx, &dx);
        self.add("affine", "dw", 1e-7, &grads.dw, &dw);
        self.add("affine", "db", 1e-7, &grads.db, &db);
        Ok(())
    }

    fn batchnorm(&mut self) -> Result<()> {
        let x: Array2<f64> = 5.0 * self.random((4, 5)) + 12.0;
        let (gamma, beta, dout) = (self.random(5), self.random(5), self.random((4, 5)));
        let forward = |x: ArrayView2<f64>, gamma: ArrayView1<f64>, beta: ArrayView1<f64>| {
            batchnorm_forward(x, gamma, beta, &mut Statistics::new(5), Mode::Train, &BatchNorm::default())
        };
        let (_, cache) = forward(x.view(), gamma.view(), beta.view())?;
        let grads = batchnorm_backward(dout.view(), x.view(), gamma.view(), &cache)?;
        let dx = numeric(|x| Ok(forward(x, gamma.view(), beta.view())?.0), &x, &dout)?;
        let dgamma = numeric(|gamma| Ok(forward(x.view(), gamma, beta.view())?.0), &gamma, &dout)?;
        let dbeta = numeric(|beta| Ok(forward(x.view(), gamma.view(), beta)?.0), &beta, &dout)?;
        self.add("batchnorm", "dx", 1e-5, &grads.dx, &dx);
        self.add("batchnorm", "dgamma", 1e-9, &grads.dgamma, &dgamma);
        self.add("batchnorm", "dbeta", 1e-9, &grads.dbeta, &dbeta);
        Ok(())
    }

    fn spatial_batchnorm(&mut self) -> Result<()> {
        let x: Array4<f64> = 5.0 * self.random((2, 3, 4, 5)) + 12.0;
        let (gamma, beta, dout) = (self.random(3), self.random(3), self.random((2, 3, 4, 5)));
        let forward = |x: ArrayView4<f64>, gamma: ArrayView1<f64>, beta: ArrayView1<f64>| {
            spatial_batchnorm_forward(x, gamma, beta, &mut Statistics::new(3), Mode::Train, &BatchNorm::default())
        };
        let (_, cache) = forward(x.view(), gamma.view(), beta.view())?;
        let grads = spatial_batchnorm_backward(dout.view(), x.view(), gamma.view(), &cache)?;
        let dx = numeric(|x| Ok(forward(x, gamma.view(), beta.view())?.0), &x, &dout)?;
        let dgamma = numeric(|gamma| Ok(forward(x.view(), gamma, beta.view())?.0), &gamma, &dout)?;
        let dbeta = numeric(|beta| Ok(forward(x.view(), gamma.view(), beta)?.0), &beta, &dout)?;
        self.add("spatial batchnorm", "dx", 1e-6, &grads.dx, &dx);
        self.add("spatial batchnorm", "dgamma", 1e-9, &grads.dgamma, &dgamma);
        self.add("spatial batchnorm", "dbeta", 1e-9, &grads.dbeta, &dbeta);
        Ok(())
    }

    fn pointwise(&mut self) -> Result<()> {
        let (x, dout): (Array2<f64>, Array2<f64>) = (self.random((10, 10)), self.random((10, 10)));
        for activation in [Activation::Relu, Activation::LeakyRelu { slope: 0.01 }, Activation::Silu, Activation::Gelu]
        {
            let dx = activation_backward(&dout, &x, activation)?;
            let dx_num = numeric(|x| Ok(activation_forward(&x, activation)), &x, &dout)?;
            self.add(activation.name(), "dx", 1e-5, &dx, &dx_num);
        }
        let (p, key) = (0.5, DropoutKey { seed: self.seed, step: 0, layer: 0 });
        let (_, mask) = dropout_forward(x.view(), p, key)?;
        let dx = dropout_backward(dout.view(), mask.view(), p)?;
        self.add("dropout", "dx", 1e-7, &dx, &numeric(|x| Ok(dropout_forward(x, p, key)?.0), &x, &dout)?);
        Ok(())
    }

    fn losses(&mut self) -> Result<()> {
        // All classes about equally likely, as before training: no gradient is near 0.
        let scores: Array2<f64> = 1e-3 * self.random((50, 10));
        let labels: Vec<usize> = (0..50).map(|n| n * 7 % 10).collect();
        let step = 10.0 * STEP;
        for (loss, smoothing) in [("softmax", 0.0), ("softmax, smoothed", 0.1)] {
            let (_, dscores) = softmax_cross_entropy(scores.view(), &labels, smoothing)?;
            let value = |scores: ArrayView2<f64>| {
                softmax_cross_entropy(scores, &labels, smoothing).map_or(f64::NAN, |(loss, _)| loss)
            };
            self.add(loss, "dscores", 1e-6, &dscores, &numeric_gradient(value, scores.view(), step));
        }
        let (_, dscores) = svm_hinge(scores.view(), &labels)?;
        let value = |scores: ArrayView2<f64>| svm_hinge(scores, &labels).map_or(f64::NAN, |(loss, _)| loss);
        self.add("svm", "dscores", 1e-6, &dscores, &numeric_gradient(value, scores.view(), step));
        Ok(())
    }

    fn cascades(&mut self) -> Result<()> {
        let conv = |filters| {
            let conv = Conv2d { padding: Padding::All(1), ..Conv2d::default() };
            Some(Core::Conv { filters, kernel: (3, 3), conv })
        };
        let (norm, relu, pool) =
            (Some(BatchNorm::default()), Some(Activation::Relu), Some(Pool::Max(Pool2d::square(2))));
        let parts = |core, bias| BlockParts { core, bias, activation: relu, ..BlockParts::default() };
        let affine = Some(Core::Affine { outputs: 5 });
        for (name, parts, x, limit) in [
            ("conv-relu", parts(conv(3), true), [2, 3, 8, 8], 1e-7),
            ("conv-relu-pool", BlockParts { pool, ..parts(conv(3), true) }, [2, 3, 16, 16], 1e-7),
            ("conv-bn-relu", BlockParts { norm, ..parts(conv(3), false) }, [2, 3, 8, 8], 1e-4),
            ("conv-bn-relu-pool", BlockParts { norm, pool, ..parts(conv(3), false) }, [2, 3, 8, 8], 1e-4),
            ("affine-relu", parts(affine, true), [10, 6, 1, 1], 1e-7),
            ("affine-bn-relu", BlockParts { norm, ..parts(affine, false) }, [10, 6, 1, 1], 1e-4),
            (
                "affine-bn-relu-dropout",
                BlockParts { norm, dropout: Some(0.5), ..parts(affine, false) },
                [10, 6, 1, 1],
                1e-4,
            ),
        ] {
            self.cascade(name, parts, x, limit)?;
        }
        Ok(())
    }

    /// A fused block in training mode, for images x `[N, C, H, W]`.
    fn cascade(&mut self, name: &str, parts: BlockParts, x: [usize; 4], limit: f64) -> Result<()> {
        let block = Block::new::<f64>(parts, [x[1], x[2], x[3]])?;
        let [c, h, w] = block.output();
        let dout: ArrayD<f64> = self.random(IxDyn(&[x[0], c, h, w]));
        let shapes = block.weight_shapes();
        let inputs = [x.to_vec(), shapes.w, shapes.b, shapes.gamma, shapes.beta].map(|shape| {
            // Absent parameters are empty.
            if shape.is_empty() { ArrayD::zeros(IxDyn(&[0])) } else { self.random(IxDyn(&shape)) }
        });
        let mut run = BlockRun { block: &block, key: DropoutKey { seed: self.seed, step: 0, layer: 0 }, images: x[0] };
        let grads = run.gradients(&inputs, &dout);
        for (i, gradient) in ["dx", "dw", "db", "dgamma", "dbeta"].into_iter().enumerate() {
            if inputs[i].is_empty() {
                continue;
            }
            let out = |value: ArrayView<f64, IxDyn>| {
                let mut slices = slices(&inputs);
                slices[i] = value.to_slice().expect("the numeric gradient keeps the standard layout");
                let out = run.forward(slices, &mut BlockState::new());
                Ok(ArrayD::from_shape_vec(dout.raw_dim(), out).expect("out has the shape of dout"))
            };
            let numeric = numeric(out, &inputs[i], &dout)?;
            self.add(name, gradient, limit, &grads[i], &numeric);
        }
        Ok(())
    }

    /// Every parameter of CS231n's small three-layer network.
    ///
    /// The numeric gradient is that of the scores, weighted with the loss's gradient, which has a check of its own: the
    /// scores are straight in each parameter, so it is more accurate than differences of the loss, which drown the smaller
    /// gradients in its rounding.
    fn three_layer_net(&mut self) -> Result<()> {
        let model = ThreeLayerConvNet {
            input_dim: [3, 16, 16],
            num_filters: 3,
            filter_size: 3,
            hidden_dim: 7,
            // So that every layer hands on numbers of about 1, far from the corners of the ReLUs.
            weight_scale: 0.1,
            ..ThreeLayerConvNet::default()
        };
        let labels = [4, 9];
        let mut net = model.build::<f64>(self.seed)?;
        let x = self.random((2, 3, 16, 16));
        net.regularized_loss(x.view(), &labels, 0.0)?;
        let grads = net.grads().clone();
        let (_, dscores) = softmax_cross_entropy(net.predict(x.view())?.view(), &labels, 0.0)?;
        for param in grads.iter() {
            let analytic = grads.get(&param.name).expect("named by itself");
            let at = net.params().get(&param.name).expect("gradients are laid out as the parameters").to_owned();
            let mut scores = |value: ArrayView<f64, IxDyn>| {
                net.params_mut().get_mut(&param.name).expect("as above").assign(&value);
                net.predict(x.view())
            };
            let numeric = numeric(&mut scores, &at, &dscores)?;
            scores(at.view())?;
            self.add("three-layer net", &param.name, 1e-5, &analytic, &numeric);
        }
        Ok(())
    }
}

/// Training passes of a block over x, w, b, gamma and beta.
struct BlockRun<'a> {
    block: &'a Block,
    key: DropoutKey,
    images: usize,
}

impl BlockRun<'_> {
    fn input<'a>(&self, [x, w, b, gamma, beta]: [&'a [f64]; 5]) -> BlockInput<'a, f64> {
        // Training reads no running statistics, but they have to be there.
        let weights = Weights { w, b, gamma, beta };
        BlockInput { images: self.images, x, weights, prepared: None, running: (gamma, gamma) }
    }

    fn forward(&mut self, inputs: [&[f64]; 5], state: &mut BlockState<f64>) -> Vec<f64> {
        let mut out = vec![0.0; self.images * self.block.output_len()];
        self.block.forward(&self.input(inputs), Pass::Train(self.key), &mut out, state, &mut Workspace::new());
        out
    }

    fn gradients(&mut self, inputs: &[ArrayD<f64>; 5], dout: &ArrayD<f64>) -> [ArrayD<f64>; 5] {
        let mut state = BlockState::new();
        let out = self.forward(slices(inputs), &mut state);
        let (mut grads, mut used_up) = (inputs.clone(), dout.clone());
        let [dx, w, b, gamma, beta] = grads.each_mut().map(|g| g.as_slice_mut().expect("as its input"));
        let dout = used_up.as_slice_mut().expect("made in standard layout");
        let grads_mut = BlockGrads { dout, dx: Some(dx), weights: Weights { w, b, gamma, beta } };
        self.block.backward(&self.input(slices(inputs)), &out, grads_mut, &mut state, &mut Workspace::new());
        grads
    }
}

/// The values of each array.
fn slices(arrays: &[ArrayD<f64>; 5]) -> [&[f64]; 5] {
    arrays.each_ref().map(|array| array.as_slice().expect("made in standard layout"))
}

/// [`numeric_gradient_array`] of a function that may fail.
fn numeric<D: Dimension, D2: Dimension>(
    mut f: impl FnMut(ArrayView<f64, D>) -> Result<Array<f64, D2>>,
    x: &Array<f64, D>,
    dout: &Array<f64, D2>,
) -> Result<NumericGradient<D>> {
    // If it works once, it works for every input of this shape.
    f(x.view())?;
    Ok(numeric_gradient_array(|x| f(x).expect("it worked for this shape before"), x.view(), dout.view()))
}
