//! Level 3. Dropout (Srivastava et al. 2014), in its inverted form.
//!
//! In training every value is set to 0 with probability `p` and multiplied by `1 / (1 - p)` otherwise, which keeps its
//! expectation; in test mode dropout does nothing, so there is no function for it.
//!
//! Here `p` is the probability of *dropping*, as in PyTorch. CS231n's notebooks since 2018 use `p` for the probability
//! of *keeping*.

use ndarray::{Array2, ArrayView2};
use rand::Rng;

use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::ops::layout::{row_major, slice_mut};
use crate::parallel::for_each_chunk_mut;
use crate::random::{Purpose, stream};
use crate::simd::vectorized;

/// Names one mask: the same key draws the same mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutKey {
    /// Seed of the training.
    pub seed: u64,
    /// Training step.
    pub step: u64,
    /// Place of the layer in the network.
    pub layer: u32,
}

/// Values per piece, about: drawing a mask takes a few nanoseconds a value, starting a piece a hundred.
const PIECE: usize = 1 << 13;

/// Draws a mask and drops the values of `x`, `samples` rows of equal length, into `out`.
///
/// `mask` receives 1 for a value that is kept and 0 for one that is dropped, for [`dropout_backward_into`]. Each sample
/// draws from a random stream of its own.
///
/// # Errors
/// [`Error::Invalid`] unless `0 <= p < 1`.
///
/// # Panics
/// If the rows do not come out even or the lengths differ.
pub fn dropout_forward_into<T: Element>(
    x: &[T],
    samples: usize,
    p: f64,
    key: DropoutKey,
    out: &mut [T],
    mask: &mut [u8],
) -> Result<()> {
    assert!(
        mask.len() == x.len() && out.len() == x.len(),
        "{} values, {} of mask, {} of output",
        x.len(),
        mask.len(),
        out.len()
    );
    draw_mask(samples, p, key, mask)?;
    dropout_backward_into(x, mask, p, out)
}

/// Fills `mask`, `samples` rows of equal length, with 1 for a value to keep and 0 for one to drop.
///
/// # Errors
/// [`Error::Invalid`] unless `0 <= p < 1`.
///
/// # Panics
/// If the rows do not come out even.
pub(crate) fn draw_mask(samples: usize, p: f64, key: DropoutKey, mask: &mut [u8]) -> Result<()> {
    check_probability(p)?;
    let features = mask.len() / samples.max(1);
    assert_eq!(mask.len(), samples * features, "{} values in {samples} rows", mask.len());
    // A 32-bit number below this one drops its value.
    let threshold = (p * 2_f64.powi(32)) as u32;
    let rows = (PIECE / features.max(1)).max(1);
    for_each_chunk_mut(mask, rows * features, |piece, mask| {
        for (row, mask) in mask.chunks_exact_mut(features).enumerate() {
            let sample = (piece * rows + row) as u64;
            let mut random = stream(key.seed, Purpose::Dropout, key.step, u64::from(key.layer) << 32 | sample);
            mask.fill_with(|| u8::from(random.next_u32() >= threshold));
        }
    });
    Ok(())
}

/// The gradient by the input into `dx`, from the gradient by the output, `dout`, and the forward pass's `mask` and `p`.
///
/// # Errors
/// [`Error::Invalid`] unless `0 <= p < 1`.
///
/// # Panics
/// If the lengths differ.
pub fn dropout_backward_into<T: Element>(dout: &[T], mask: &[u8], p: f64, dx: &mut [T]) -> Result<()> {
    check_probability(p)?;
    assert!(
        mask.len() == dout.len() && dx.len() == dout.len(),
        "{} values, {} of mask, {} of dx",
        dout.len(),
        mask.len(),
        dx.len()
    );
    dx.copy_from_slice(dout);
    apply_mask(mask, p, dx);
    Ok(())
}

/// Dropout multiplies by a diagonal matrix, so forward and backward do the same: drops and scales `values` in place.
pub(crate) fn apply_mask<T: Element>(mask: &[u8], p: f64, values: &mut [T]) {
    let scale = T::of(1.0 / (1.0 - p));
    for_each_chunk_mut(values, PIECE, |piece, values| {
        let mask = &mask[piece * PIECE..][..values.len()];
        vectorized!({
            for (value, &kept) in values.iter_mut().zip(mask) {
                *value = if kept == 0 { T::zero() } else { *value * scale };
            }
        });
    });
}

/// Dropout of `x` `(N, D)` in training: the output `(N, D)`, and the mask `(N, D)` for [`dropout_backward`].
///
/// # Errors
/// [`Error::Invalid`] unless `0 <= p < 1`.
pub fn dropout_forward<T: Element>(x: ArrayView2<'_, T>, p: f64, key: DropoutKey) -> Result<(Array2<T>, Array2<u8>)> {
    let (mut out, mut mask) = (Array2::zeros(x.raw_dim()), Array2::zeros(x.raw_dim()));
    dropout_forward_into(&row_major(x), x.nrows(), p, key, slice_mut(&mut out), slice_mut(&mut mask))?;
    Ok((out, mask))
}

/// The gradient by the input of [`dropout_forward`], all `(N, D)`.
///
/// # Errors
/// [`Error::Invalid`] unless `0 <= p < 1`; [`Error::Shape`] unless `mask` has the shape of `dout`.
pub fn dropout_backward<T: Element>(dout: ArrayView2<'_, T>, mask: ArrayView2<'_, u8>, p: f64) -> Result<Array2<T>> {
    check_shape("dropout", "mask", mask.shape(), dout.shape())?;
    let mut dx = Array2::zeros(dout.raw_dim());
    dropout_backward_into(&row_major(dout), &row_major(mask), p, slice_mut(&mut dx))?;
    Ok(dx)
}

fn check_probability(p: f64) -> Result<()> {
    if (0.0..1.0).contains(&p) {
        return Ok(());
    }
    let problem = format!("the probability of dropping is {p}");
    Err(Error::invalid("dropout", problem, "give at least 0 and less than 1"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::with_threads;

    const KEY: DropoutKey = DropoutKey { seed: 3, step: 5, layer: 7 };

    #[test]
    fn drops_the_right_fraction_and_scales_the_rest() {
        let x = Array2::from_shape_fn((100, 1000), |(i, j)| (i * 1000 + j + 1) as f64);
        for p in [0.0, 0.1, 0.5, 0.9] {
            let (out, mask) = dropout_forward(x.view(), p, KEY).unwrap();
            let dropped = mask.iter().filter(|&&kept| kept == 0).count() as f64 / mask.len() as f64;
            // Five standard deviations of a fraction of 100 000 draws; exact for p = 0.
            assert!((dropped - p).abs() <= 5.0 * (p * (1.0 - p) / 1e5).sqrt(), "p {p}: dropped {dropped}");
            for ((&out, &x), &kept) in out.iter().zip(&x).zip(&mask) {
                let want = if kept == 0 { 0.0 } else { x / (1.0 - p) };
                assert!((out - want).abs() <= 1e-15 * x / (1.0 - p), "p {p}: {x} became {out}, want {want}");
            }
        }
    }

    #[test]
    fn the_gradient_is_the_directional_derivative() {
        // Dropout with a fixed mask is linear: <dout, f(x)> = <backward(dout), x> for any dout and x.
        let x = Array2::from_shape_fn((6, 50), |(i, j)| ((i * 50 + j) as f64).sin());
        let dout = Array2::from_shape_fn((6, 50), |(i, j)| ((i + 7 * j) as f64).cos());
        let (out, mask) = dropout_forward(x.view(), 0.3, KEY).unwrap();
        let dx = dropout_backward(dout.view(), mask.view(), 0.3).unwrap();
        let (by_out, by_x) = ((&dout * &out).sum(), (&dx * &x).sum());
        assert!((by_out - by_x).abs() <= 1e-12 * by_out.abs(), "{by_out} {by_x}");
        for (&dx, &kept) in dx.iter().zip(&mask) {
            assert_eq!(dx == 0.0, kept == 0, "the gradient passes exactly where the value did");
        }
    }

    #[test]
    fn the_mask_depends_on_key_and_sample_alone() {
        let x = Array2::<f32>::ones((200, 300));
        let (_, want) = dropout_forward(x.view(), 0.5, KEY).unwrap();
        for threads in [1, 2, 5] {
            let (_, mask) = with_threads(threads, || dropout_forward(x.view(), 0.5, KEY)).unwrap().unwrap();
            assert_eq!(mask, want, "{threads} threads");
        }
        let (_, few) = dropout_forward(x.slice(ndarray::s![..3, ..]), 0.5, KEY).unwrap();
        assert_eq!(few, want.slice(ndarray::s![..3, ..]), "other samples in the batch change nothing");
        assert_ne!(want.row(0), want.row(1), "samples differ");
        for other in [DropoutKey { seed: 4, ..KEY }, DropoutKey { step: 6, ..KEY }, DropoutKey { layer: 8, ..KEY }] {
            assert_ne!(dropout_forward(x.view(), 0.5, other).unwrap().1, want, "{other:?}");
        }
    }

    #[test]
    fn layouts_and_empty_input() {
        let x = Array2::from_shape_fn((4, 9), |(i, j)| (i * 9 + j + 1) as f32);
        let (want, mask) = dropout_forward(x.view(), 0.5, KEY).unwrap();
        let columns_first = x.t().as_standard_layout().into_owned();
        assert_eq!(dropout_forward(columns_first.t(), 0.5, KEY).unwrap().0, want);
        assert_eq!(dropout_backward(columns_first.t(), mask.view(), 0.5).unwrap(), want);
        for shape in [(0, 5), (5, 0), (0, 0)] {
            assert_eq!(dropout_forward(Array2::<f32>::zeros(shape).view(), 0.5, KEY).unwrap().0.dim(), shape);
        }
    }

    #[test]
    fn wrong_arguments_are_errors() {
        let x = Array2::<f32>::ones((2, 3));
        for p in [1.0, -0.1, 1.5, f64::NAN, f64::INFINITY] {
            let error = dropout_forward(x.view(), p, KEY).unwrap_err().to_string();
            assert!(error.contains(&p.to_string()) && error.contains("less than 1"), "{error}");
            assert!(dropout_backward(x.view(), Array2::ones((2, 3)).view(), p).is_err(), "{p}");
        }
        let panics = |samples, out_len: usize, mask_len: usize| {
            let (mut out, mut mask) = (vec![0.0_f32; out_len], vec![0_u8; mask_len]);
            std::panic::catch_unwind(move || dropout_forward_into(&[1.0; 6], samples, 0.5, KEY, &mut out, &mut mask))
                .is_err()
        };
        assert!(!panics(2, 6, 6));
        for (samples, out_len, mask_len) in [(4, 6, 6), (0, 6, 6), (2, 5, 6), (2, 6, 5)] {
            assert!(panics(samples, out_len, mask_len), "{samples} {out_len} {mask_len}");
        }
        assert!(dropout_backward(x.view(), Array2::ones((3, 2)).view(), 0.5).is_err());
    }
}
