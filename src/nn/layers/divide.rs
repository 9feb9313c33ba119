//! Level 5. Division by a number: `out = x / divisor`, `dx = dout / divisor`.
//!
//! Behind an affine layer without bias it makes scores of width-independent size: with weights of variance 1, dividing by the
//! number of inputs is the head of Jordan's recipes (2024, arXiv 2404.00498; Yang & Hu 2021, arXiv 2011.14522, say why). In the
//! notation `div256`.

use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::layer::{Backward, Forward, Layer};
use crate::nn::onnx::Graph;
use crate::parallel::for_each_chunk_mut;
use crate::simd::vectorized;

/// Division of every value by a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divide {
    /// What is divided by, 1 or more.
    pub divisor: usize,
}

/// Values that one thread divides at a time.
const CHUNK: usize = 16 << 10;

impl Divide {
    fn apply<T: Element>(&self, from: &[T], to: &mut [T]) {
        let factor = T::one() / T::of(self.divisor as f64);
        for_each_chunk_mut(to, CHUNK, |chunk, to| {
            let from = &from[chunk * CHUNK..][..to.len()];
            vectorized!(to.iter_mut().zip(from).for_each(|(to, &from)| *to = factor * from));
        });
    }
}

impl<T: Element> Layer<T> for Divide {
    fn notation(&self) -> String {
        format!("div{}", self.divisor)
    }

    fn output(&self, input: [usize; 3]) -> Result<[usize; 3]> {
        if self.divisor >= 1 {
            return Ok(input);
        }
        Err(Error::invalid("division", "the divisor is 0", "divide by 1 or more"))
    }

    fn onnx(&self, graph: &mut Graph, x: &str, _params: &[&str]) -> Option<String> {
        let divisor = graph.constant(&[], &[self.divisor as f32]);
        Some(graph.node("Div", &[x, &divisor], &[]))
    }

    fn forward(&self, call: Forward<'_, T>) {
        self.apply(call.x, call.out);
    }

    fn backward(&self, call: Backward<'_, T>) {
        if let Some(dx) = call.dx {
            self.apply(call.dout, dx);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::nn::init::Init;
    use crate::nn::network::{Network, StepKey};

    /// Scores are divided, and so are the gradients of what lies below; the softmax sees the divided ones.
    #[test]
    fn scores_and_gradients_are_those_of_divided_weights() {
        let network = |notation: &str| {
            Network::<f64>::new(&notation.parse().unwrap(), [2, 3, 3], Init::Gaussian { std: 1.0 }, 3).unwrap()
        };
        let (mut divided, mut plain) = (network("affine4b0-div8"), network("affine4b0"));
        plain.params_mut().slice_mut(0).iter_mut().for_each(|w| *w /= 8.0);
        let x: Vec<f64> = (0..36).map(|i| f64::from(i * 7 % 11) - 5.0).collect();
        let losses = [&mut divided, &mut plain].map(|net| net.loss(&x, &[1, 3], StepKey::default()).unwrap());
        assert!((losses[0] - losses[1]).abs() <= 1e-14, "{losses:?}");
        for (i, (got, want)) in divided.grads().slice(0).iter().zip(plain.grads().slice(0)).enumerate() {
            assert!((got - want / 8.0).abs() <= 1e-15, "weight {i}: {got}, not {}", want / 8.0);
        }
    }

    #[test]
    fn division_by_0_is_an_error() {
        assert!("affine4-div0".parse::<crate::nn::notation::NetworkSpec>().is_err());
    }
}
