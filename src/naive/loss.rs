//! Level 4. Losses by their definitions.

use ndarray::{Array2, ArrayView2};

use crate::element::Element;
use crate::error::{Error, Result, check_shape};

/// Mean softmax cross-entropy of `scores` `(N, C)` and its gradient `(N, C)`, with label smoothing `s`
/// (Szegedy et al. 2016; 0 for none):
///
/// ```text
/// p[n, c] = exp(scores[n, c]) / sum over k of exp(scores[n, k])
/// q[n, c] = (1 - s) [c = labels[n]] + s / C
/// loss    = -1/N sum over n, c of q[n, c] ln p[n, c]
/// dscores = (p - q) / N
/// ```
///
/// The largest score of a row is subtracted first, so that no exponential overflows.
///
/// # Errors
/// [`Error::Shape`] if there is not one row of scores for each label; [`Error::Invalid`] for a label that is not below
/// `C`, an empty batch, or a smoothing outside 0 to 1.
pub fn softmax_cross_entropy<T: Element>(
    scores: ArrayView2<T>,
    labels: &[usize],
    smoothing: f64,
) -> Result<(T, Array2<T>)> {
    check("softmax_cross_entropy", scores, labels)?;
    if !(0.0..=1.0).contains(&smoothing) {
        return Err(Error::invalid("softmax_cross_entropy", format!("smoothing is {smoothing}"), "give 0 to 1"));
    }
    let (samples, classes) = scores.dim();
    let count = T::of(samples as f64);
    let mut loss = T::zero();
    let mut dscores = Array2::zeros((samples, classes));
    for n in 0..samples {
        let mut largest = T::neg_infinity();
        for c in 0..classes {
            largest = largest.max(scores[[n, c]]);
        }
        let mut sum = T::zero();
        for c in 0..classes {
            sum += (scores[[n, c]] - largest).exp();
        }
        for c in 0..classes {
            let ln_p = scores[[n, c]] - largest - sum.ln();
            let hit = if c == labels[n] { 1.0 - smoothing } else { 0.0 };
            let q = T::of(hit + smoothing / classes as f64);
            // Without a share in the target a probability of 0 costs nothing, where 0 * ln 0 would be NaN.
            if q > T::zero() {
                loss -= q * ln_p;
            }
            dscores[[n, c]] = (ln_p.exp() - q) / count;
        }
    }
    Ok((loss / count, dscores))
}

/// Mean multiclass SVM hinge loss with margin 1 (Weston & Watkins 1999) of `scores` `(N, C)` and its gradient `(N, C)`,
/// the seed's `svm_loss`:
///
/// ```text
/// margin[n, c]     = max(0, scores[n, c] - scores[n, labels[n]] + 1)     for c != labels[n]
/// loss             = 1/N sum over n, c of margin[n, c]
/// dscores[n, c]    = 1/N [margin[n, c] > 0]                              for c != labels[n]
/// dscores[n, y]    = -1/N (number of positive margins in row n)          for y = labels[n]
/// ```
///
/// The sum is not divided by the number of classes, as PyTorch's `multi_margin_loss` is.
///
/// # Errors
/// [`Error::Shape`] if there is not one row of scores for each label; [`Error::Invalid`] for a label that is not below
/// `C` or an empty batch.
pub fn svm_hinge<T: Element>(scores: ArrayView2<T>, labels: &[usize]) -> Result<(T, Array2<T>)> {
    check("svm_hinge", scores, labels)?;
    let (samples, classes) = scores.dim();
    let count = T::of(samples as f64);
    let mut loss = T::zero();
    let mut dscores = Array2::zeros((samples, classes));
    for n in 0..samples {
        let label = labels[n];
        for c in (0..classes).filter(|&c| c != label) {
            let margin = scores[[n, c]] - scores[[n, label]] + T::one();
            // A NaN must reach the loss, where a maximum with 0 would swallow it.
            if margin > T::zero() || margin.is_nan() {
                loss += margin;
                dscores[[n, c]] += T::one() / count;
                dscores[[n, label]] -= T::one() / count;
            }
        }
    }
    Ok((loss / count, dscores))
}

fn check<T: Element>(op: &'static str, scores: ArrayView2<T>, labels: &[usize]) -> Result<()> {
    let classes = scores.ncols();
    check_shape(op, "scores", scores.shape(), &[labels.len(), classes])?;
    if labels.is_empty() {
        return Err(Error::invalid(op, "an empty batch has no mean loss", "give at least one sample"));
    }
    if let Some((n, label)) = labels.iter().enumerate().find(|&(_, &label)| label >= classes) {
        return Err(Error::invalid(
            op,
            format!("label {label} at index {n} is not one of {classes} classes"),
            format!("labels count from 0 and stay below {classes}"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn hand_computed_losses() {
        // Equal scores: p = 1/4 each, whatever the offset; huge ones must not overflow.
        for offset in [0.0, 1e4, -1e4] {
            let scores = Array2::from_elem((2, 4), offset);
            let (loss, dscores) = softmax_cross_entropy(scores.view(), &[1, 3], 0.0).unwrap();
            assert!((loss - 4f64.ln()).abs() < 1e-14, "{offset}: {loss}");
            assert_eq!(dscores, array![[0.125, -0.375, 0.125, 0.125], [0.125, 0.125, 0.125, -0.375]]);
        }
        // A certain answer that is right, and one that is wrong, with a probability of exactly 0.
        let (loss, dscores) = softmax_cross_entropy(array![[0.0, f64::NEG_INFINITY]].view(), &[0], 0.0).unwrap();
        assert_eq!((loss, dscores), (0.0, array![[0.0, 0.0]]));
        let (loss, _) = softmax_cross_entropy(array![[0.0, f64::NEG_INFINITY]].view(), &[1], 0.0).unwrap();
        assert_eq!(loss, f64::INFINITY);

        // Margins 0.5 and 0 in row 0; 3 and 1 in row 1.
        let (loss, dscores) = svm_hinge(array![[2.0, 1.5, 0.0], [0.0, 2.0, 0.0]].view(), &[0, 2]).unwrap();
        assert_eq!(loss, (0.5 + 1.0 + 3.0) / 2.0);
        assert_eq!(dscores, array![[-0.5, 0.5, 0.0], [0.5, 0.5, -1.0]]);
    }

    #[test]
    fn nan_scores_give_a_nan_loss() {
        let scores = array![[0.0, f32::NAN, 1.0]];
        assert!(softmax_cross_entropy(scores.view(), &[0], 0.0).unwrap().0.is_nan());
        assert!(svm_hinge(scores.view(), &[0]).unwrap().0.is_nan());
    }

    #[test]
    fn wrong_labels_are_errors_that_name_them() {
        let scores = Array2::<f32>::zeros((2, 3));
        for result in [softmax_cross_entropy(scores.view(), &[0, 3], 0.0), svm_hinge(scores.view(), &[0, 3])] {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("label 3 at index 1 is not one of 3 classes"), "{error}");
        }
        let error = svm_hinge(scores.view(), &[0]).unwrap_err().to_string();
        assert_eq!(error, "svm_hinge: scores has shape [2, 3], expected [1, 3]");
        assert!(softmax_cross_entropy(Array2::<f32>::zeros((0, 3)).view(), &[], 0.0).is_err());
        for smoothing in [-0.1, 1.1, f64::NAN] {
            assert!(softmax_cross_entropy(scores.view(), &[0, 1], smoothing).is_err(), "{smoothing}");
        }
    }
}
