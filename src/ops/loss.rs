//! Level 3. Losses over class scores: mean over the batch, and its gradient.

use ndarray::{Array2, ArrayView2};

use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::ops::layout::{row_major, slice_mut};

/// Checks the labels of a batch: there is at least one, and all are below `classes`.
///
/// The losses check them too; whoever computes something before the loss should ask first.
///
/// # Errors
/// [`Error::Invalid`] for a label that is not below `classes`, or an empty batch.
pub fn check_labels(labels: &[usize], classes: usize) -> Result<()> {
    if labels.is_empty() {
        return Err(Error::invalid("loss", "an empty batch has no mean loss", "give at least one sample"));
    }
    match labels.iter().enumerate().find(|&(_, &label)| label >= classes) {
        Some((n, label)) => Err(Error::invalid(
            "loss",
            format!("label {label} at index {n} is not one of {classes} classes"),
            format!("labels count from 0 and stay below {classes}"),
        )),
        None => Ok(()),
    }
}

/// Checks the share of the target that label smoothing gives to all classes.
///
/// # Errors
/// [`Error::Invalid`] unless it is 0 to 1.
pub fn check_smoothing(smoothing: f64) -> Result<()> {
    if (0.0..=1.0).contains(&smoothing) {
        return Ok(());
    }
    Err(Error::invalid("loss", format!("smoothing is {smoothing}"), "give 0 to 1"))
}

/// Panics unless scores and dscores have one row of `classes` for each label.
#[track_caller]
fn assert_lengths<T>(scores: &[T], labels: &[usize], classes: usize, dscores: &[T]) {
    let len = labels.len().checked_mul(classes);
    assert!(
        Some(scores.len()) == len && Some(dscores.len()) == len,
        "{} scores and {} gradients for {} labels of {classes} classes",
        scores.len(),
        dscores.len(),
        labels.len()
    );
}

/// [`softmax_cross_entropy`] into the caller's buffer: scores and dscores `[N, classes]`; returns the loss.
///
/// # Errors
/// [`Error::Invalid`] as [`check_labels`] and [`check_smoothing`].
///
/// # Panics
/// If scores or dscores do not have one row of `classes` for each label.
pub fn softmax_cross_entropy_into<T: Element>(
    scores: &[T],
    labels: &[usize],
    classes: usize,
    smoothing: f64,
    dscores: &mut [T],
) -> Result<T> {
    assert_lengths(scores, labels, classes, dscores);
    check_labels(labels, classes)?;
    check_smoothing(smoothing)?;
    let scale = T::one() / T::of(labels.len() as f64);
    let (rest, hit) = (T::of(smoothing / classes as f64), T::of(1.0 - smoothing));
    let mut loss = 0.0;
    for ((scores, dscores), &label) in scores.chunks_exact(classes).zip(dscores.chunks_exact_mut(classes)).zip(labels) {
        let largest = scores.iter().fold(T::neg_infinity(), |m, &s| m.max(s));
        let mut total = T::zero();
        for (p, &s) in dscores.iter_mut().zip(scores) {
            *p = (s - largest).exp();
            total += *p;
        }
        let ln_total = total.ln();
        for (c, (p, &s)) in dscores.iter_mut().zip(scores).enumerate() {
            let q = if c == label { hit + rest } else { rest };
            // Without a share in the target a probability of 0 costs nothing, where 0 * ln 0 would be NaN.
            if q > T::zero() {
                loss -= (q * (s - largest - ln_total)).f64();
            }
            *p = (*p / total - q) * scale;
        }
    }
    Ok(T::of(loss / labels.len() as f64))
}

/// Mean softmax cross-entropy of scores `(N, C)` for labels `0 .. C`, and its gradient `(N, C)`.
///
/// ```text
/// p = softmax(scores)      q = (1 - smoothing) [c = label] + smoothing / C
/// loss = -1/N sum q ln p   dscores = (p - q) / N
/// ```
///
/// Label smoothing as in Szegedy et al. (2016); 0 for none. The twin of [`crate::naive::softmax_cross_entropy`].
///
/// # Errors
/// [`Error::Shape`] if there is not one row of scores for each label; [`Error::Invalid`] for a label that is not below
/// `C`, an empty batch, or a smoothing outside 0 to 1.
pub fn softmax_cross_entropy<T: Element>(
    scores: ArrayView2<'_, T>,
    labels: &[usize],
    smoothing: f64,
) -> Result<(T, Array2<T>)> {
    check_shape("softmax_cross_entropy", "scores", scores.shape(), &[labels.len(), scores.ncols()])?;
    into_array(scores, |s, ds| softmax_cross_entropy_into(s, labels, scores.ncols(), smoothing, ds))
}

/// [`svm_hinge`] into the caller's buffer: scores and dscores `[N, classes]`; returns the loss.
///
/// # Errors
/// [`Error::Invalid`] as [`check_labels`].
///
/// # Panics
/// If scores or dscores do not have one row of `classes` for each label.
pub fn svm_hinge_into<T: Element>(scores: &[T], labels: &[usize], classes: usize, dscores: &mut [T]) -> Result<T> {
    assert_lengths(scores, labels, classes, dscores);
    check_labels(labels, classes)?;
    let scale = T::one() / T::of(labels.len() as f64);
    let mut loss = 0.0;
    for ((scores, dscores), &label) in scores.chunks_exact(classes).zip(dscores.chunks_exact_mut(classes)).zip(labels) {
        let mut violations = T::zero();
        for (c, (ds, &s)) in dscores.iter_mut().zip(scores).enumerate() {
            let margin = s - scores[label] + T::one();
            // a NaN, such as the margin between two infinities, is a violation, so that it reaches the loss
            let violated = c != label && (margin > T::zero() || margin.is_nan());
            *ds = if violated { scale } else { T::zero() };
            if violated {
                loss += margin.f64();
                violations += T::one();
            }
        }
        dscores[label] = -scale * violations;
    }
    Ok(T::of(loss / labels.len() as f64))
}

/// Mean multiclass SVM hinge loss (Weston & Watkins 1999) with margin 1 of scores `(N, C)`, and its gradient `(N, C)`:
/// `loss = 1/N sum over n and c != y of max(0, s[n, c] - s[n, y] + 1)`. The twin of [`crate::naive::svm_hinge`].
///
/// # Errors
/// [`Error::Shape`] if there is not one row of scores for each label; [`Error::Invalid`] for a label that is not below
/// `C`, or an empty batch.
pub fn svm_hinge<T: Element>(scores: ArrayView2<'_, T>, labels: &[usize]) -> Result<(T, Array2<T>)> {
    check_shape("svm_hinge", "scores", scores.shape(), &[labels.len(), scores.ncols()])?;
    into_array(scores, |s, ds| svm_hinge_into(s, labels, scores.ncols(), ds))
}

fn into_array<T: Element>(
    scores: ArrayView2<'_, T>,
    work: impl FnOnce(&[T], &mut [T]) -> Result<T>,
) -> Result<(T, Array2<T>)> {
    let mut dscores = Array2::zeros(scores.dim());
    let loss = work(&row_major(scores), slice_mut(&mut dscores))?;
    Ok((loss, dscores))
}
