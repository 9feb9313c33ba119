//! Level 4. A moving average of parameters.

use super::elementwise::CHUNK;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::parallel::for_each_chunk_mut;
use crate::params::Params;
use crate::profile::{self, Phase, Work};
use crate::simd::vectorized;

/// The exponential moving average `e <- e + (1 - decay) (w - e)` of parameters over the steps: often more accurate than
/// the parameters themselves, whose last steps are noise (Polyak & Juditsky 1992). It begins with the parameters it is
/// made from, as PyTorch's `AveragedModel` begins with those of its first update.
#[derive(Clone, Debug)]
pub struct Ema<T: Element> {
    decay: f64,
    average: Params<T>,
}

impl<T: Element> Ema<T> {
    /// Of a decay of 0.99 about the last 100 steps count.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a decay that is not from 0 to below 1.
    pub fn new(decay: f64, params: &Params<T>) -> Result<Self> {
        if !(0.0..1.0).contains(&decay) {
            let problem = format!("a decay of {decay} is not in 0 <= decay < 1");
            return Err(Error::invalid("moving average", problem, "0.99 averages about 100 steps"));
        }
        Ok(Ema { decay, average: params.clone() })
    }

    /// Takes the parameters after a step into the average. The same bits at any number of threads.
    ///
    /// # Panics
    /// If they are of another layout.
    pub fn update(&mut self, params: &Params<T>) {
        assert!(self.average.iter().eq(params.iter()), "parameters of another network");
        let (take, values) = (T::of(1.0 - self.decay), params.values());
        let bytes = 3 * size_of_val(values);
        let _scope = profile::scope(Phase::Optimizer, || Work { op: "moving average", flops: 0, bytes });
        for_each_chunk_mut(self.average.values_mut(), CHUNK, |i, average| {
            let values = &values[i * CHUNK..][..average.len()];
            vectorized!({
                for i in 0..values.len() {
                    average[i] += take * (values[i] - average[i]);
                }
            });
        });
    }

    /// The average.
    pub fn params(&self) -> &Params<T> {
        &self.average
    }

    /// The average alone.
    pub fn into_params(self) -> Params<T> {
        self.average
    }

    /// The average, to write to: how a checkpoint is restored.
    pub fn params_mut(&mut self) -> &mut Params<T> {
        &mut self.average
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::with_threads;
    use crate::params::{Layout, ParamKind};

    fn params(value: impl Fn(usize) -> f32) -> Params<f32> {
        let mut layout = Layout::default();
        layout.push("a".into(), &[3], ParamKind::Bias);
        layout.push("b".into(), &[2 * CHUNK + 50], ParamKind::Weight);
        let mut params = Params::zeros(layout);
        for index in 0..2 {
            params.slice_mut(index).iter_mut().enumerate().for_each(|(i, w)| *w = value(i));
        }
        params
    }

    /// In f64, `d^3 w0 + (1 - d) (d^2 w1 + d w2 + w3)`.
    #[test]
    fn it_averages_with_falling_weights() {
        let at = |t: usize, i: usize| ((7 * t + i) % 13) as f32;
        let average = |threads| {
            with_threads(threads, || {
                let mut ema = Ema::new(0.9, &params(|i| at(0, i))).unwrap();
                (1..4).for_each(|t| ema.update(&params(|i| at(t, i))));
                ema.params().clone()
            })
            .unwrap()
        };
        let got = average(1);
        for index in 0..2 {
            for (i, &got) in got.slice(index).iter().enumerate() {
                let w = |t| f64::from(at(t, i));
                let expected = 0.729 * w(0) + 0.1 * (0.81 * w(1) + 0.9 * w(2) + w(3));
                assert!((f64::from(got) - expected).abs() <= 1e-5, "{i}: {got}, not {expected}");
            }
        }
        assert_eq!(got.values()[3], 0.0, "gaps stay 0");
        for threads in [2, 5] {
            assert_eq!(average(threads).values(), got.values());
        }
    }

    /// The average of what does not change is that, to the bit.
    #[test]
    fn a_constant_is_its_own_average() {
        let constant = params(|i| 0.1 + i as f32);
        let mut ema = Ema::new(0.999, &constant).unwrap();
        (0..100).for_each(|_| ema.update(&constant));
        assert_eq!(ema.params().values(), constant.values());
        for decay in [-0.1, 1.0, f64::NAN] {
            let message = Ema::new(decay, &constant).unwrap_err().to_string();
            assert!(message.contains(&decay.to_string()), "{message}");
        }
    }
}
