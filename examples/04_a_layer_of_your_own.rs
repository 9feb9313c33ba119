//! A layer of your own as a node of a network: `cargo run --release --example 04_a_layer_of_your_own`.
//!
//! PReLU (He et al. 2015) is a ReLU whose slope for negative input is learned, one number per channel:
//! `out = x` where `x > 0`, else `slope x`. So `dx = dout` or `slope dout`, and `dslope` sums `dout x` where `x <= 0`. The
//! example checks its gradients against numeric ones inside a network with a residual, then trains that network.

use gemmnet::nn::init::Init;
use gemmnet::nn::layer::{Backward, Forward, Layer, ParamDecl};
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::nn::notation::{LayerSpec, NetworkSpec};
use gemmnet::params::ParamKind;
use gemmnet::{Element, Result};
use std::sync::Arc;

#[derive(Debug)]
struct PRelu;

impl<T: Element> Layer<T> for PRelu {
    fn notation(&self) -> String {
        "prelu".into()
    }

    fn output(&self, input: [usize; 3]) -> Result<[usize; 3]> {
        Ok(input)
    }

    fn params(&self, [channels, _, _]: [usize; 3]) -> Vec<ParamDecl> {
        vec![ParamDecl { name: "slope", shape: vec![channels], kind: ParamKind::Bias }]
    }

    fn forward(&self, call: Forward<'_, T>) {
        let ([channels, h, w], slope) = (call.input, call.params.get(0));
        let planes = call.x.chunks_exact(h * w).zip(call.out.chunks_exact_mut(h * w));
        for (i, (x, out)) in planes.enumerate() {
            let slope = slope[i % channels];
            for (out, &x) in out.iter_mut().zip(x) {
                *out = if x > T::zero() { x } else { slope * x };
            }
        }
    }

    fn backward(&self, mut call: Backward<'_, T>) {
        let ([channels, h, w], slope) = (call.input, call.params.get(0));
        let dslope = call.grads.get_mut(0);
        dslope.fill(T::zero());
        for (i, (x, dout)) in call.x.chunks_exact(h * w).zip(call.dout.chunks_exact_mut(h * w)).enumerate() {
            for (dout, &x) in dout.iter_mut().zip(x).filter(|(_, x)| **x <= T::zero()) {
                dslope[i % channels] += *dout * x;
                *dout *= slope[i % channels];
            }
        }
        if let Some(dx) = call.dx {
            dx.copy_from_slice(call.dout);
        }
    }
}

/// The notation of everything else, with PReLU where it says `relu`.
fn with_prelu(notation: &str) -> Result<NetworkSpec> {
    fn replaced(layers: Vec<LayerSpec>) -> Vec<LayerSpec> {
        let one = |layer| match layer {
            LayerSpec::Activation(_) => LayerSpec::Layer(Arc::new(PRelu)),
            LayerSpec::Residual(layers) => LayerSpec::Residual(replaced(layers)),
            layer => layer,
        };
        layers.into_iter().map(one).collect()
    }
    let spec = NetworkSpec::parse(notation)?;
    Ok(NetworkSpec { layers: replaced(spec.layers), ..spec })
}

/// 64 images of 1x16x16: vertical stripes are class 0, horizontal ones class 1.
fn stripes<T: Element>() -> (Vec<T>, Vec<usize>) {
    let pixel = |image: usize, pixel: usize| {
        let along = if image.is_multiple_of(2) { pixel % 16 } else { pixel / 16 };
        T::of(if ((along + image / 2) / 3).is_multiple_of(2) { 1.0 } else { -1.0 })
    };
    let x = (0..64).flat_map(|image| (0..256).map(move |at| pixel(image, at))).collect();
    (x, (0..64).map(|image| image % 2).collect())
}

/// The largest difference between a parameter's gradient and the slope of the loss, relative to the larger of them.
fn worst_gradient(network: &mut Network<f64>, x: &[f64], y: &[usize]) -> Result<f64> {
    network.loss(x, y, StepKey::default())?;
    let (analytic, step) = (network.grads().values().to_vec(), 1e-6);
    let mut worst = 0.0_f64;
    let lies_in_a_gap = |i: &usize| !network.params().iter().any(|param| param.range.contains(i));
    let gaps: Vec<usize> = (0..analytic.len()).filter(lies_in_a_gap).collect();
    for index in (0..analytic.len()).filter(|index| !gaps.contains(index)) {
        let mut loss_at = |move_by: f64| {
            network.params_mut().values_mut()[index] += move_by;
            let loss = network.loss(x, y, StepKey::default());
            network.params_mut().values_mut()[index] -= move_by;
            loss
        };
        let numeric = (loss_at(step)? - loss_at(-step)?) / (2.0 * step);
        worst = worst.max((numeric - analytic[index]).abs() / numeric.abs().max(analytic[index].abs()).max(1e-3));
    }
    Ok(worst)
}

fn main() -> Result<()> {
    let spec = with_prelu("conv4-relu-pool-res[conv4-relu-conv4]-relu-gap-affine2")?;
    println!("{spec}");

    let mut wide = Network::<f64>::new(&spec, [1, 16, 16], Init::He, 1)?;
    wide.params_mut().get_mut("prelu1.slope").expect("the first PReLU's").fill(0.25);
    let (x, y) = stripes::<f64>();
    let worst = worst_gradient(&mut wide, &x[..4 * 256], &y[..4])?;
    println!("largest relative error of a gradient: {worst:.1e}");
    assert!(worst < 1e-5);

    let mut network = Network::<f32>::new(&spec, [1, 16, 16], Init::He, 0)?;
    let (x, y) = stripes::<f32>();
    let first = network.loss(&x, &y, StepKey::default())?;
    let mut last = first;
    for step in 1..=60 {
        let (params, grads) = network.params_and_grads();
        params.values_mut().iter_mut().zip(grads.values()).for_each(|(param, &grad)| *param -= 0.1 * grad);
        last = network.loss(&x, &y, StepKey { seed: 0, step })?;
    }
    println!("loss {first:.3}, after 60 steps {last:.3}");
    assert!(last < 0.2 * first);
    Ok(())
}
