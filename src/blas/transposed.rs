//! Level 2. A product of our own for sums over rows, whose operands are used too few times to be laid out for it: neither is copied.
//!
//! Where OpenBLAS copies the operands of every product, that and setting C to zero before takes as long as half of the multiplications
//! of a sum of fifty terms. Here a block of C is kept in the vector registers, and for each term takes a row of A and a row of B where
//! they lie. An element of C is one chain of multiply-adds over the terms in their order.

use pulp::{Simd, WithSimd};

use super::strips::{self, Cut};
use super::{Accum, Mat, MatMut, setup};
use crate::element::{Element, Kind};
use crate::simd::{LANES, Share, arch};

/// Whether these products are better made here than by OpenBLAS: where it copies what it multiplies.
pub(crate) fn pay<T: Element>() -> bool {
    T::KIND == Kind::F32 && !setup().multiplies_in_place
}

/// `C <- A^T B`, or added to it. Shapes: A `(k, m)`, B `(k, n)`, C `(m, n)`, where `n` is a multiple of [`LANES`]; `next` is the B
/// that is likely to be multiplied with next: its rows are fetched while the last columns are used.
///
/// # Panics
/// If the shapes do not fit together, a matrix is transposed, or T is `f64`: that is a bug of the caller.
#[track_caller]
pub(crate) fn multiply<T: Element>(accum: Accum, a: Mat<'_, T>, b: Mat<'_, T>, next: &[T], c: MatMut<'_, T>) {
    assert_eq!((a.cols, a.rows), (c.rows, b.rows), "rows of C and terms");
    assert_eq!(b.cols, c.cols, "columns of B and C");
    assert!(c.cols.is_multiple_of(LANES) && !a.transposed && !b.transposed, "whole vectors, that lie side by side");
    let next = bytemuck::cast_slice(next).as_ptr();
    arch().dispatch(Product { accum, a: a.t().cast(), b: b.cast(), next, c: c.cast() });
}

struct Product<'a> {
    accum: Accum,
    a: Mat<'a, f32>,
    b: Mat<'a, f32>,
    next: *const f32,
    c: MatMut<'a, f32>,
}

impl WithSimd for Product<'_> {
    type Output = ();

    /// Blocks of C that fill the registers, as those of [`super::panels`].
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => self.run::<S, 2, 12>(simd),
            8 => self.run::<S, 2, 6>(simd),
            _ => self.run::<S, 4, 3>(simd),
        }
    }
}

impl Product<'_> {
    /// In strips of `V` vectors and blocks of `R` rows.
    #[inline(always)]
    fn run<S: Simd, const V: usize, const R: usize>(self, simd: S) {
        let Product { accum, a, b, next, mut c } = self;
        let cols = c.cols;
        let cut = Cut::new(c.rows, R, |blocks| Share::rows::<f32>(b.rows, b.ld, blocks));
        let next = |end: usize| if end < cols { b.data.as_ptr().wrapping_add(end) } else { next };
        strips::multiply::<S, V, R, true>(simd, accum, (a, b), &mut c, cut, next);
    }
}

#[cfg(test)]
mod tests {
    use pulp::Scalar;

    use super::*;
    use crate::blas::tests::{integers, is_one_chain, refuses};
    use crate::simd::rows_reach;

    /// Checks a product of this size, and that it touches nothing else.
    fn check(accum: Accum, m: usize, n: usize, k: usize) {
        let (a_ld, b_ld, c_ld) = (m + 3, n + 5, n + LANES);
        // no element more than they have
        let end = |rows, cols, ld| rows_reach(rows, cols, ld).unwrap();
        let (a, b): (Vec<f32>, Vec<f32>) = (integers(end(k, m, a_ld), 2), integers(end(k, n, b_ld), 1));
        let (a, b) = (Mat::new(&a, k, m, a_ld), Mat::new(&b, k, n, b_ld));
        let before: Vec<f32> = integers(m * c_ld, 3);
        let (mut c, mut strips) = (before.clone(), before.clone());
        multiply(accum, a, b, &[], MatMut::new(&mut c, m, n, c_ld));
        // in strips as wide as those of AVX-512, on any processor: the last may have half of their columns
        const { assert!(32 * <Scalar as Simd>::F32_LANES == 2 * LANES) };
        let c_of_strips = MatMut::new(&mut strips, m, n, c_ld);
        let product = Product { accum, a: a.t(), b, next: b.data.as_ptr(), c: c_of_strips };
        product.run::<Scalar, 32, 3>(Scalar::new());
        assert!(c == strips, "{m} x {n} x {k}, {accum:?}: in strips");
        for (at, &got) in c.iter().enumerate() {
            let (i, j) = (at / c_ld, at % c_ld);
            let sum = |p: usize| a.at(p, i) * b.at(p, j);
            let want = match accum {
                _ if j >= n => before[at],
                Accum::Replace => (0..k).map(sum).sum(),
                Accum::Add => before[at] + (0..k).map(sum).sum::<f32>(),
            };
            assert_eq!(got, want, "{m} x {n} x {k}, {accum:?}: element {i}, {j}");
        }
    }

    /// Sizes with every height of a last block, and every number of terms left over of the steps; of no terms at all.
    #[test]
    fn products_are_right_at_every_edge() {
        for m in (1..=25).chain([64]) {
            for (n, k) in [(16, 1), (32, 2), (48, 7), (80, 52), (16, 0)] {
                check(Accum::Replace, m, n, k);
                check(Accum::Add, m, n, k);
            }
        }
    }

    /// An element has the same bits wherever its row and column stand, and where sums are gone on with.
    #[test]
    fn an_element_is_one_chain() {
        let (m, n, k) = (23, 48, 53);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 7.0;
        let (a, b): (Vec<f32>, Vec<f32>) = ((0..k * m).map(value).collect(), (0..k * n).map(value).collect());
        let mut whole = vec![f32::NAN; m * n];
        multiply(Accum::Replace, Mat::new(&a, k, m, m), Mat::new(&b, k, n, n), &b, MatMut::new(&mut whole, m, n, n));
        for split in [1, 20, 52] {
            let mut c = vec![f32::NAN; m * n];
            for (accum, terms) in [(Accum::Replace, 0..split), (Accum::Add, split..k)] {
                let a = Mat::new(&a, k, m, m).block(terms.clone(), 0..m);
                let b = Mat::new(&b, k, n, n).block(terms, 0..n);
                multiply(accum, a, b, &[], MatMut::new(&mut c, m, n, n));
            }
            assert!(c == whole, "cut after {split} terms");
        }
        for (at, &got) in whole.iter().enumerate() {
            let (i, j) = (at / n, at % n);
            let terms = (0..k).map(|p| (a[p * m + i], b[p * n + j]));
            assert!(is_one_chain(got, terms), "element {i}, {j}: {got:e}");
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (m, n, k) = (5, 32, 6);
        let (a, b) = (vec![1.0_f32; m * k], vec![1.0_f32; k * n]);
        let product = |a: Mat<'_, f32>, b: Mat<'_, f32>, rows: usize, cols: usize| {
            let mut c = vec![0.0; m * n];
            multiply(Accum::Replace, a, b, &[], MatMut::new(&mut c, rows, cols, n));
        };
        let (left, right) = (Mat::new(&a, k, m, m), Mat::new(&b, k, n, n));
        product(left, right, m, n);
        assert!(refuses(|| product(left, right, m - 1, n)) && refuses(|| product(left, right, m, n - LANES)));
        assert!(refuses(|| product(left.block(0..k - 1, 0..m), right, m, n)), "terms");
        assert!(refuses(|| product(left, right.block(0..k, 0..20), m, 20)), "no whole vectors");
        assert!(refuses(|| product(Mat::new(&a, m, k, k).t(), right, m, n)), "A transposed");
        assert!(refuses(|| product(left, Mat::new(&b, n, k, k).t(), m, n)), "B transposed");
    }
}
