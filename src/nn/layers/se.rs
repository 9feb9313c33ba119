//! Level 5. Squeeze and excitation (Hu et al. 2018): a factor for every channel of every image, made of all its channels.
//!
//! ```text
//! s = mean of each channel            h = relu(s W1 + b1)            e = sigmoid(h W2 + b2)            out[c] = e[c] x[c]
//! du = e (1 - e) sum(dout x)          dh = (du W2^T where h > 0)     ds = dh W1^T                      dx = e dout + ds / HW
//! ```
//!
//! W1 is `(C, C / reduction)`, W2 `(C / reduction, C)`. In the notation `se16`: the number is the reduction.

use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::layer::{Backward, Forward, Layer, ParamDecl};
use crate::nn::onnx::Graph;
use crate::ops::affine::{AffineGradsMut, AffineShape, affine_backward_into, affine_product_into};
use crate::ops::pool::global_avg_plane;
use crate::parallel::{Chunks, for_each_chunk_mut, for_each_share};
use crate::params::ParamKind;
use crate::simd::{dot, vectorized};

/// Squeeze and excitation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SqueezeExcite {
    /// By how much the hidden layer is narrower than the channels.
    pub reduction: usize,
}

impl SqueezeExcite {
    fn hidden(&self, channels: usize) -> usize {
        channels / self.reduction
    }
}

/// What forward keeps for backward, and backward's own: `[N, C]` or `[N, C / reduction]` each.
struct Cache<'a, T> {
    squeezed: &'a mut [T],
    hidden: &'a mut [T],
    excitation: &'a mut [T],
    /// Gradients of what goes into the sigmoid, of the hidden layer, and of the means.
    du: &'a mut [T],
    dh: &'a mut [T],
    ds: &'a mut [T],
}

impl<'a, T> Cache<'a, T> {
    fn new(cache: &'a mut [T], wide: usize, narrow: usize) -> Self {
        let (squeezed, rest) = cache.split_at_mut(wide);
        let (hidden, rest) = rest.split_at_mut(narrow);
        let (excitation, rest) = rest.split_at_mut(wide);
        let (du, rest) = rest.split_at_mut(wide);
        let (dh, ds) = rest.split_at_mut(narrow);
        Cache { squeezed, hidden, excitation, du, dh, ds }
    }
}

impl<T: Element> Layer<T> for SqueezeExcite {
    fn notation(&self) -> String {
        format!("se{}", self.reduction)
    }

    fn output(&self, input: [usize; 3]) -> Result<[usize; 3]> {
        if self.reduction >= 1 && self.hidden(input[0]) >= 1 {
            return Ok(input);
        }
        let problem = format!("a reduction by {} leaves nothing of {} channels", self.reduction, input[0]);
        Err(Error::invalid("squeeze and excitation", problem, "reduce by no more than the number of channels"))
    }

    fn params(&self, [channels, _, _]: [usize; 3]) -> Vec<ParamDecl> {
        let hidden = self.hidden(channels);
        let weight = |name, shape: [usize; 2]| ParamDecl { name, shape: shape.to_vec(), kind: ParamKind::Weight };
        let bias = |name, len| ParamDecl { name, shape: vec![len], kind: ParamKind::Bias };
        vec![
            weight("squeeze.weight", [channels, hidden]),
            bias("squeeze.bias", hidden),
            weight("excite.weight", [hidden, channels]),
            bias("excite.bias", channels),
        ]
    }

    fn onnx(&self, graph: &mut Graph, x: &str, params: &[&str]) -> Option<String> {
        let &[squeeze, squeeze_bias, excite, excite_bias] = params else { return None };
        let means = graph.node("GlobalAveragePool", &[x], &[]);
        let means = graph.flatten(&means);
        let hidden = graph.node("Gemm", &[&means, squeeze, squeeze_bias], &[]);
        let hidden = graph.node("Relu", &[&hidden], &[]);
        let excitation = graph.node("Gemm", &[&hidden, excite, excite_bias], &[]);
        let excitation = graph.node("Sigmoid", &[&excitation], &[]);
        let excitation = graph.unflatten(&excitation);
        Some(graph.node("Mul", &[x, &excitation], &[]))
    }

    fn cache(&self, [channels, _, _]: [usize; 3]) -> usize {
        4 * channels + 2 * self.hidden(channels)
    }

    fn multiply_adds(&self, [channels, h, w]: [usize; 3]) -> usize {
        channels * (2 * self.hidden(channels) + h * w)
    }

    fn forward(&self, call: Forward<'_, T>) {
        let ([channels, h, w], images, x) = (call.input, call.images, call.x);
        let (plane, hidden) = (h * w, self.hidden(channels));
        let [w1, b1, w2, b2] = [0, 1, 2, 3].map(|index| call.params.get(index));
        let cache = Cache::new(call.cache, images * channels, images * hidden);
        for_each_chunk_mut(cache.squeezed, channels, |image, squeezed| {
            for (c, mean) in squeezed.iter_mut().enumerate() {
                *mean = global_avg_plane(&x[(image * channels + c) * plane..][..plane]);
            }
        });
        let narrowing = AffineShape { samples: images, inputs: channels, outputs: hidden };
        affine_product_into(&narrowing, cache.squeezed, w1, cache.hidden, call.ws);
        for row in cache.hidden.chunks_exact_mut(hidden) {
            row.iter_mut().zip(b1).for_each(|(h, &b)| *h = (*h + b).max(T::zero()));
        }
        let widening = AffineShape { samples: images, inputs: hidden, outputs: channels };
        affine_product_into(&widening, cache.hidden, w2, cache.excitation, call.ws);
        for row in cache.excitation.chunks_exact_mut(channels) {
            row.iter_mut().zip(b2).for_each(|(e, &b)| *e = T::one() / (T::one() + (-*e - b).exp()));
        }
        let excitation = &*cache.excitation;
        for_each_chunk_mut(call.out, plane, |i, out| {
            let (x, e) = (&x[i * plane..][..plane], excitation[i]);
            vectorized!(out.iter_mut().zip(x).for_each(|(out, &x)| *out = e * x));
        });
    }

    fn backward(&self, mut call: Backward<'_, T>) {
        let ([channels, h, w], images, x, dout) = (call.input, call.images, call.x, &*call.dout);
        let (plane, hidden) = (h * w, self.hidden(channels));
        let (w1, w2) = (call.params.get(0), call.params.get(2));
        let [dw1, db1, dw2, db2] = call.grads.all_mut([0, 1, 2, 3]);
        let cache = Cache::new(call.cache, images * channels, images * hidden);
        let excitation = &*cache.excitation;
        for_each_share(Chunks::new(cache.du, channels), |image, du: &mut [T]| {
            for (c, du) in du.iter_mut().enumerate() {
                let (i, e) = (image * channels + c, excitation[image * channels + c]);
                let here = i * plane..(i + 1) * plane;
                *du = e * (T::one() - e) * vectorized!(dot(&dout[here.clone()], &x[here]));
            }
        });
        let widening = AffineShape { samples: images, inputs: hidden, outputs: channels };
        let grads = AffineGradsMut { dx: Some(&mut *cache.dh), dw: Some(dw2), db: Some(db2) };
        affine_backward_into(&widening, cache.du, cache.hidden, w2, grads, call.ws);
        for (dh, &h) in cache.dh.iter_mut().zip(&*cache.hidden) {
            *dh = if h > T::zero() { *dh } else { T::zero() };
        }
        let narrowing = AffineShape { samples: images, inputs: channels, outputs: hidden };
        let grads = AffineGradsMut { dx: Some(&mut *cache.ds), dw: Some(dw1), db: Some(db1) };
        affine_backward_into(&narrowing, cache.dh, cache.squeezed, w1, grads, call.ws);
        let Some(dx) = call.dx.take() else { return };
        let (ds, pixels) = (&*cache.ds, T::of(plane as f64));
        for_each_chunk_mut(dx, plane, |i, dx| {
            let (dout, e, rest) = (&dout[i * plane..][..plane], excitation[i], ds[i] / pixels);
            vectorized!(dx.iter_mut().zip(dout).for_each(|(dx, &dout)| *dx = e * dout + rest));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{check, numeric_gradient};
    use crate::nn::layer::{LayerGrads, LayerParams};
    use crate::ops::Mode;
    use crate::params::{Layout, Params};
    use crate::workspace::Workspace;
    use ndarray::{Array1, ArrayView1};

    const IMAGES: usize = 3;
    const INPUT: [usize; 3] = [32, 2, 3];
    const LAYER: SqueezeExcite = SqueezeExcite { reduction: 16 };

    /// From -1 to 1, multiples of 2^-10: the upper bits of an LCG (Knuth's of MMIX) that begins with the name's FNV-1a hash.
    fn numbers(name: &str, len: usize) -> Vec<f64> {
        let hash = |state: u64, byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 53) as f64 - 1024.0) / 1024.0
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    fn params() -> Params<f64> {
        let mut layout = Layout::default();
        for param in Layer::<f64>::params(&LAYER, INPUT) {
            layout.push(param.name.into(), &param.shape, param.kind);
        }
        let mut params = Params::zeros(layout);
        for (index, (name, divisor)) in [("w1", 2.0), ("b1", 4.0), ("w2", 1.0), ("b2", 4.0)].into_iter().enumerate() {
            let to = params.slice_mut(index);
            to.copy_from_slice(&numbers(name, to.len()).iter().map(|v| v / divisor).collect::<Vec<_>>());
        }
        params
    }

    fn forward(x: &[f64], params: &Params<f64>) -> (Vec<f64>, Vec<f64>) {
        let (mut out, mut cache) =
            (vec![f64::NAN; x.len()], vec![f64::NAN; IMAGES * Layer::<f64>::cache(&LAYER, INPUT)]);
        LAYER.forward(Forward {
            images: IMAGES,
            input: INPUT,
            x,
            params: LayerParams { params, first: 0 },
            out: &mut out,
            cache: &mut cache,
            mode: Mode::Train,
            ws: &mut Workspace::new(),
        });
        (out, cache)
    }

    /// dx, and the gradients of the parameters.
    fn backward(x: &[f64], params: &Params<f64>, dout: &[f64]) -> (Vec<f64>, Params<f64>) {
        let (out, mut cache) = forward(x, params);
        let (mut dx, mut grads) = (vec![f64::NAN; x.len()], params.zeros_like());
        LAYER.backward(Backward {
            images: IMAGES,
            input: INPUT,
            x,
            out: &out,
            params: LayerParams { params, first: 0 },
            grads: LayerGrads { grads: &mut grads, first: 0 },
            dout: &mut dout.to_vec(),
            dx: Some(&mut dx),
            cache: &mut cache,
            ws: &mut Workspace::new(),
        });
        (dx, grads)
    }

    /// The twin: the formula, one value after the other.
    fn naive(x: &[f64], params: &Params<f64>) -> Vec<f64> {
        let ([channels, h, w], [w1, b1, w2, b2]) = (INPUT, [0, 1, 2, 3].map(|i| params.slice(i)));
        let (plane, hidden) = (h * w, b1.len());
        let mean =
            |n: usize, c: usize| -> f64 { x[(n * channels + c) * plane..][..plane].iter().sum::<f64>() / plane as f64 };
        let narrow = |n: usize, j: usize| (0..channels).map(|c| mean(n, c) * w1[c * hidden + j]).sum::<f64>() + b1[j];
        let factor = |n: usize, c: usize| {
            let u: f64 = (0..hidden).map(|j| narrow(n, j).max(0.0) * w2[j * channels + c]).sum();
            1.0 / (1.0 + (-u - b2[c]).exp())
        };
        (0..x.len()).map(|i| factor(i / plane / channels, i / plane % channels) * x[i]).collect()
    }

    fn input() -> (Vec<f64>, Vec<f64>) {
        let len = IMAGES * INPUT.iter().product::<usize>();
        (numbers("x", len), numbers("dout", len))
    }

    #[test]
    fn it_is_what_its_twin_is() {
        let ((x, _), params) = (input(), params());
        for (i, (got, want)) in forward(&x, &params).0.iter().zip(naive(&x, &params)).enumerate() {
            assert!((got - want).abs() <= 1e-14, "value {i}: {got}, not {want}");
        }
    }

    #[test]
    fn its_gradients_are_the_slopes_of_its_twin() {
        let ((x, dout), params) = (input(), params());
        let (dx, grads) = backward(&x, &params, &dout);
        let weighed = |out: Vec<f64>| out.iter().zip(&dout).map(|(a, b)| a * b).sum::<f64>();
        let compare = |name: &str, analytic: Vec<f64>, at: Vec<f64>, f: &dyn Fn(&[f64]) -> Vec<f64>| {
            let f = |at: ArrayView1<f64>| weighed(f(at.as_slice().expect("one axis")));
            let report = check(name, &Array1::from(analytic), &numeric_gradient(f, Array1::from(at).view(), 1e-4));
            assert!(report.max_rel_error <= 1e-6 && report.skipped == 0, "{report}");
        };
        compare("dx", dx, x.clone(), &|x| naive(x, &params));
        for index in 0..4 {
            let with = |values: &[f64]| {
                let mut params = params.clone();
                params.slice_mut(index).copy_from_slice(values);
                naive(&x, &params)
            };
            let name = &params.param(index).name;
            compare(name, grads.slice(index).to_vec(), params.slice(index).to_vec(), &with);
        }
    }

    /// Norm, product with `numbers(probe)`, first, middle and last value of each array, by PyTorch in f64:
    /// ```python
    /// h = x.mean((2, 3)) @ w1 + b1
    /// out = x * torch.sigmoid(torch.relu(h) @ w2 + b2)[:, :, None, None]
    /// (out * dout).sum().backward()
    /// ```
    #[test]
    fn it_agrees_with_pytorch() {
        let golden = [
            [6.946645779372012, 1.227538160000163, -0.2335929181379221, -0.051042829241717186, -0.23811764398540147],
            [7.169581199622265, 5.377194675789693, 0.19638156544107957, 0.5697236975885613, 0.042289770340276665],
            [1.7335166512462084, -0.6680106734369173, -0.03610489059944669, -0.1973248310680754, 0.0041217829410307265],
            [1.7486627793464222, 0.20977109180769893, 1.3372705596691812, 1.1267337600842666, 1.1267337600842666],
            [
                0.9064450630787753,
                -0.2629875063961641,
                -0.038102998262861225,
                -0.022342027598933157,
                0.09921827323980423,
            ],
            [2.1213913986354136, 0.11424902911400031, -0.1269606718299238, -0.16151176875502102, 0.14854158850267862],
        ];
        let ((x, dout), params) = (input(), params());
        let (dx, grads) = backward(&x, &params, &dout);
        let mut arrays = vec![("out", forward(&x, &params).0), ("dx", dx)];
        arrays.extend(
            ["dw1", "db1", "dw2", "db2"].into_iter().enumerate().map(|(i, name)| (name, grads.slice(i).to_vec())),
        );
        for ((name, array), want) in arrays.iter().zip(golden) {
            let norm = array.iter().map(|v| v * v).sum::<f64>().sqrt();
            let product = array.iter().zip(numbers(&format!("probe {name}"), array.len())).map(|(a, b)| a * b).sum();
            let got: [f64; 5] = [norm, product, array[0], array[array.len() / 2], array[array.len() - 1]];
            assert!(
                got.iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-13 * norm),
                "{name}: {got:?}, not {want:?}"
            );
        }
    }

    #[test]
    fn a_reduction_that_leaves_nothing_is_refused() {
        let error = Layer::<f32>::output(&LAYER, [8, 4, 4]).unwrap_err().to_string();
        assert!(error.contains("a reduction by 16 leaves nothing of 8 channels"), "{error}");
    }
}
