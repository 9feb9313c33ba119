//! Level 1. Plain loops, compiled for the vector instructions that the processor turns out to have.
//!
//! The crate is built for the baseline of its target, so that a binary runs everywhere. [`vectorized`] compiles the
//! loops inside it again for AVX2 and AVX-512 and chooses at run time. The loops are ordinary Rust; sums that should be
//! vectorised say their order of addition ([`sum`], [`dot`]), so the bits do not depend on which version runs.

use crate::element::Element;

/// Runs `work`, compiled for the widest vectors this processor has. `work` itself and all that it calls must be inlined
/// here (`#[inline(always)]`, on the closure too): what is not stays as it was compiled, for the baseline.
#[inline(always)]
pub(crate) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// Partial sums kept side by side: one AVX-512 vector of `f32`, two of `f64`.
const LANES: usize = 16;

/// Adds up `term(a[i], b[i])` lane by lane, then the lanes pairwise: a fixed order, exact to about `len / 16 + 4`
/// roundings. Whole chunks, without an index that could be out of bounds, are what the compiler vectorises.
#[inline(always)]
fn reduce<T: Element>(a: &[T], b: &[T], term: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    for (a, b) in a.zip(b) {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane]);
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(rest) {
        *lane += term(a, b);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] += other;
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of `a`.
#[inline(always)]
pub(crate) fn sum<T: Element>(a: &[T]) -> T {
    reduce(
        a,
        a,
        #[inline(always)]
        |a, _| a,
    )
}

/// Sum of `a[i] * b[i]`.
#[inline(always)]
pub(crate) fn dot<T: Element>(a: &[T], b: &[T]) -> T {
    reduce(
        a,
        &b[..a.len()],
        #[inline(always)]
        |a, b| a * b,
    )
}

/// Sum of `(a[i] - center)^2`.
#[inline(always)]
pub(crate) fn sum_squared_deviations<T: Element>(a: &[T], center: T) -> T {
    reduce(
        a,
        a,
        #[inline(always)]
        |a, _| (a - center) * (a - center),
    )
}

/// `a[i] += b[i]`.
#[inline(always)]
pub(crate) fn add_assign<T: Element>(a: &mut [T], b: &[T]) {
    for (a, &b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_right_at_every_length_and_the_same_when_vectorized() {
        for len in [0, 1, 15, 16, 17, 100] {
            let a: Vec<f64> = (0..len).map(|i| f64::from(i) * 0.1 - 3.0).collect();
            let plain: f64 = a.iter().sum();
            assert!((sum(&a) - plain).abs() <= 1e-12);
            assert_eq!(
                sum(&a).to_bits(),
                vectorized(
                    #[inline(always)]
                    || sum(&a)
                )
                .to_bits()
            );
            let squares: f64 = a.iter().map(|v| v * v).sum();
            assert!((dot(&a, &a) - squares).abs() <= 1e-11);
            assert!((sum_squared_deviations(&a, 0.0) - squares).abs() <= 1e-11);
        }
    }
}
