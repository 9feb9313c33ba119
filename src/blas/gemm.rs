//! Level 2. The product of two matrices by the library, cut into the blocks that it multiplies fastest.

use std::ops::Range;

use super::{Accum, Mat, MatMut, library, setup};
use crate::element::{Element, Kind};
use crate::simd::{dot, vectorized};

/// `C <- alpha A B` or `C <- C + alpha A B`, on the calling thread. Shapes: A `(m, k)`, B `(k, n)`, C `(m, n)`.
///
/// # Panics
/// If the shapes do not fit together: that is a bug of the caller.
#[track_caller]
pub fn gemm<T: Element>(accum: Accum, alpha: T, a: Mat<'_, T>, b: Mat<'_, T>, mut c: MatMut<'_, T>) {
    assert!(
        a.cols == b.rows && c.rows == a.rows && c.cols == b.cols,
        "product of {:?} and {:?} into {:?}",
        (a.rows, a.cols),
        (b.rows, b.cols),
        (c.rows, c.cols)
    );
    if c.rows == 0 || c.cols == 0 {
        return;
    }
    if a.cols == 0 {
        if accum == Accum::Replace {
            (0..c.rows).for_each(|i| c.row(i).fill(T::zero()));
        }
        return;
    }
    let blocks = Blocks::new::<T>(a, b);
    for (k, inner) in Blocks::ranges(a.cols, blocks.k).enumerate() {
        let beta = if accum == Accum::Add || k > 0 { T::one() } else { T::zero() };
        for rows in Blocks::ranges(c.rows, blocks.m) {
            for cols in Blocks::ranges(c.cols, blocks.n) {
                let (a, b) = (a.block(rows.clone(), inner.clone()), b.block(inner.clone(), cols.clone()));
                run(Product { alpha, a, b, beta, c: c.block(rows.clone(), cols) });
            }
        }
    }
}

/// Terms of a sum that every kernel of the library adds up in one chain.
const TERMS: usize = 256;

/// [`gemm`] of matrices that are not transposed, its sums taken in an order that depends on their length alone: an element
/// of C has the same bits wherever its row stands among however many, so a sample's scores do not depend on its batch.
///
/// The AVX-512 kernels of OpenBLAS make an element by a chain of multiply-adds over the terms in their order, wherever the
/// number of columns is a multiple of four. Where they end one chain and begin another, to stay within a cache, depends on
/// all sides of the product, but it is never within `TERMS` terms. So sums are cut into runs of no more than that, as even
/// as may be, and the last one to three columns are added up here. The AVX2 kernels add up in two chains in some rows and in
/// one in others: there the last digits still depend on a row's place
/// ([`BackendInfo::rows_alike`](super::BackendInfo::rows_alike)).
///
/// # Panics
/// As [`gemm`], and if A or B is transposed.
#[track_caller]
pub fn gemm_in_terms<T: Element>(accum: Accum, alpha: T, a: Mat<'_, T>, b: Mat<'_, T>, mut c: MatMut<'_, T>) {
    assert!(!a.transposed && !b.transposed, "neither matrix is transposed");
    assert_eq!((a.cols, c.rows, c.cols), (b.rows, a.rows, b.cols), "shapes of A, B and C");
    let parts = a.cols.div_ceil(TERMS).max(1);
    let (rows, whole) = (0..c.rows, c.cols / 4 * 4);
    for (i, inner) in Blocks::ranges(a.cols.max(1), a.cols.div_ceil(parts).max(1)).enumerate() {
        let accum = if i == 0 { accum } else { Accum::Add };
        let inner = inner.start..inner.end.min(a.cols);
        let (a, b) = (a.block(rows.clone(), inner.clone()), b.block(inner, 0..b.cols));
        if whole > 0 {
            gemm(accum, alpha, a, b.block(0..b.rows, 0..whole), c.block(rows.clone(), 0..whole));
        }
        add_last_columns(accum, alpha, a, b, whole, &mut c);
    }
}

/// Columns `first` on of a product of at most [`TERMS`] terms; fewer than four.
fn add_last_columns<T: Element>(
    accum: Accum,
    alpha: T,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    first: usize,
    c: &mut MatMut<'_, T>,
) {
    let mut terms = [T::zero(); TERMS];
    for column in first..c.cols {
        for (p, term) in terms[..b.rows].iter_mut().enumerate() {
            *term = b.data[p * b.ld + column];
        }
        for i in 0..a.rows {
            let row = &a.data[i * a.ld..][..a.cols];
            let sum = alpha * vectorized!(dot(row, &terms[..row.len()]));
            let to = &mut c.row(i)[column];
            *to = if accum == Accum::Add { *to + sum } else { sum };
        }
    }
}

/// How [`gemm`] cuts a product: at most `m` rows and `n` columns of C, and `k` terms of their sums, at a time.
///
/// Measured with OpenBLAS 0.3.21, kernels SkylakeX, in GFLOP/s on one core that reaches 157 with large matrices, whole
/// and cut: 128x64x128 120 and 173, 64x512x576 135 and 152, 128x128x64 in `f64` 56 and 84, 27x64x512 with B transposed
/// 60 and 138.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Blocks {
    m: usize,
    n: usize,
    k: usize,
}

impl Blocks {
    /// Multiply-adds up to which OpenBLAS does not pack: `interface/gemm.c` and `kernel/x86_64/*_small_kernel_permit*`.
    const IN_PLACE: usize = 1_000_000;
    /// Elements of C up to which it does not if B is transposed, and the terms from which on that pays.
    const IN_PLACE_TRANSPOSED: usize = 1200;
    const LEAST_TERMS_TRANSPOSED: usize = 256;
    /// Terms of a sum that leave room for blocks of a useful width.
    const TERMS: usize = 640;
    /// The same if A is transposed: every term is then in another row of A, often on another page.
    const TERMS_TRANSPOSED: usize = 256;
    /// How often C may be read again to add the next terms.
    const PARTS: usize = 4;
    /// What B, which is read again for every block of rows, may take of the L2 cache.
    const B_BYTES: usize = 640 << 10;
    /// Columns that fill the kernels' registers without a remainder.
    const COLUMNS: usize = 64;

    fn new<T>(a: Mat<'_, T>, b: Mat<'_, T>) -> Self {
        let (m, n, k) = (a.rows, b.cols, a.cols);
        let whole = Blocks { m, n, k };
        if !setup().multiplies_in_place || (!b.transposed && m * n * k <= Self::IN_PLACE) {
            return whole;
        }
        let parts = if a.transposed { 1 } else { k.div_ceil(Self::TERMS) };
        let k = k.div_ceil(parts);
        let cached = k * n * size_of::<T>() <= Self::B_BYTES;
        if b.transposed {
            let n = (Self::IN_PLACE_TRANSPOSED / m).clamp(16, 32).min(n);
            let blocks = Blocks { m: Self::IN_PLACE_TRANSPOSED / n, n, k };
            let pays = !a.transposed && parts <= Self::PARTS && k >= Self::LEAST_TERMS_TRANSPOSED;
            return if pays && (cached || m <= blocks.m) { blocks } else { whole };
        }
        if parts > Self::PARTS || !cached || (a.transposed && k > Self::TERMS_TRANSPOSED) {
            return whole;
        }
        // Blocks of even height, as wide as may be.
        let columns = Self::COLUMNS.min(n);
        let rows = (Self::IN_PLACE / (columns * k)).min(64);
        let rows = m.div_ceil(m.div_ceil(rows)).next_multiple_of(8).min(rows);
        Blocks { m: rows, n: Self::IN_PLACE / (rows * k) / columns * columns, k }
    }

    /// `0..len` in runs of `block`.
    fn ranges(len: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
        (0..len).step_by(block).map(move |start| start..(start + block).min(len))
    }
}

/// A product whose shapes have been checked: what the library calls get.
pub(super) struct Product<'a, T> {
    pub(super) alpha: T,
    pub(super) a: Mat<'a, T>,
    pub(super) b: Mat<'a, T>,
    pub(super) beta: T,
    pub(super) c: MatMut<'a, T>,
}

impl<'a, T: Element> Product<'a, T> {
    /// The same product, where `T` is `U` under another name.
    fn cast<U: Element>(self) -> Product<'a, U> {
        let Product { alpha, a, b, beta, c } = self;
        Product { alpha: U::of(alpha.f64()), a: a.cast(), b: b.cast(), beta: U::of(beta.f64()), c: c.cast() }
    }
}

/// The library's product for elements of type `T`.
fn run<T: Element>(product: Product<'_, T>) {
    match T::KIND {
        Kind::F32 => library::sgemm(product.cast()),
        Kind::F64 => library::dgemm(product.cast()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blas::tests::integers;

    /// Checks a product of this size in every orientation, set and added, and that it touches nothing else.
    fn check_product<T: Element>(m: usize, n: usize, k: usize) {
        for (transpose_a, transpose_b) in [(false, false), (true, false), (false, true), (true, true)] {
            let (a_rows, a_cols) = if transpose_a { (k, m) } else { (m, k) };
            let (b_rows, b_cols) = if transpose_b { (n, k) } else { (k, n) };
            let (a_ld, b_ld, c_ld) = (a_cols + 1, b_cols + 2, n + 3);
            let (a, b) = (integers::<T>(a_rows * a_ld, 1), integers::<T>(b_rows * b_ld, 2));
            let at = |i: usize, p: usize| if transpose_a { a[p * a_ld + i] } else { a[i * a_ld + p] };
            let bt = |p: usize, j: usize| if transpose_b { b[j * b_ld + p] } else { b[p * b_ld + j] };
            let (a_mat, b_mat) = (Mat::new(&a, a_rows, a_cols, a_ld), Mat::new(&b, b_rows, b_cols, b_ld));
            let a_mat = if transpose_a { a_mat.t() } else { a_mat };
            let b_mat = if transpose_b { b_mat.t() } else { b_mat };
            for accum in [Accum::Replace, Accum::Add] {
                let before = integers::<T>(m * c_ld, 3);
                let mut c = before.clone();
                gemm(accum, T::one(), a_mat, b_mat, MatMut::new(&mut c, m, n, c_ld));
                for (index, (&got, &before)) in c.iter().zip(&before).enumerate() {
                    let (i, j) = (index / c_ld, index % c_ld);
                    let mut want = if j < n && accum == Accum::Replace { T::zero() } else { before };
                    if j < n {
                        (0..k).for_each(|p| want += at(i, p) * bt(p, j));
                    }
                    let orientation = (transpose_a, transpose_b);
                    assert!(
                        got == want,
                        "{} {m}x{n}x{k} {orientation:?} {accum:?}: {got} and not {want} at {i}, {j}",
                        T::NAME
                    );
                }
            }
        }
    }

    /// A product, whole or cut, is the sum that defines it, in every orientation, and touches nothing else.
    #[test]
    fn a_product_is_the_sum_of_its_terms() {
        for (m, n, k) in [
            (1, 1, 1),
            (3, 5, 0),
            (128, 67, 129),  // rows and columns cut, with a remainder
            (27, 64, 512),   // in place if B is transposed
            (70, 33, 700),   // terms cut
            (9, 130, 1300),  // terms cut more than once
            (2, 3, 200_000), // more terms than are cut
        ] {
            check_product::<f32>(m, n, k);
            check_product::<f64>(m, n, k);
        }
    }

    /// The sizes that [`Blocks`] promises, where OpenBLAS has the kernels for them.
    #[test]
    fn blocks_are_small_enough_to_stay_unpacked() {
        let data = vec![0_f32; 1 << 20];
        for (m, n, k) in [(128, 64, 128), (64, 256, 576), (256, 64, 256), (27, 512, 64), (512, 64, 64), (33, 65, 1200)]
        {
            let (a, b) = (Mat::new(&data, m, k, k), Mat::new(&data, k, n, n));
            let blocks = Blocks::new(a, b);
            if setup().multiplies_in_place {
                assert!(blocks.m * blocks.n.min(n) * blocks.k <= Blocks::IN_PLACE, "{m}x{n}x{k}: {blocks:?}");
            } else {
                assert_eq!(blocks, Blocks { m, n, k });
            }
        }
    }
}
