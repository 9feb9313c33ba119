//! Level 2. A matrix product of our own, for operands that whoever makes them can lay out for it.
//!
//! OpenBLAS copies the operands of every product into panels before it multiplies. Winograd's algorithm and prepared affine layers
//! lay one of theirs out in panels when they make it: here nothing is copied, but for long rows of A. A block of C is kept in the
//! vector registers, and for each term of its sums takes a column of A, element by element, and a row of B.
//!
//! Every element of C is one chain of multiply-adds over the terms in their order, so its bits depend on nothing but its row
//! of A and its column of B. Sums of few terms are left to those kernels of OpenBLAS that copy nothing for small products and
//! treat all rows alike.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::blas::{Accum, Mat, MatMut, add_terms, gemm, setup, steps};
use crate::element::{Element, Kind};
use crate::parallel::{StridedMut, piece_range};
use crate::simd::{Ahead, LANES, arch};

/// Columns of a panel.
pub(crate) const PANEL: usize = 2 * LANES;

/// B, whose rows are cut into panels of [`PANEL`] columns; the last may have [`LANES`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Panels<'a, T> {
    pub(crate) data: &'a [T],
    /// Rows of B: terms of a sum.
    pub(crate) rows: usize,
    /// Elements from one panel to the next.
    pub(crate) panel: usize,
    /// What is likely to be multiplied with next: it is fetched while the last panel is used. Empty, if nothing is known.
    pub(crate) next: &'a [T],
}

/// Elements from one panel of so many rows to the next: an odd number of rows, lest panels are a multiple of 4 KiB apart.
pub(crate) fn panel_len(rows: usize) -> usize {
    (rows | 1) * PANEL
}

/// Sets row `row` of B, whose panels these are. Columns beyond the last are zero.
#[inline(always)]
pub(crate) fn set_row<T: Element>(panels: &mut StridedMut<'_, T>, row: usize, values: &[T]) {
    let (whole, rest) = values.as_chunks::<PANEL>();
    let mut parts = panels.parts(row * PANEL..(row + 1) * PANEL);
    for (values, to) in whole.iter().zip(&mut parts) {
        to.copy_from_slice(values);
    }
    if let Some(to) = parts.next().filter(|_| !rest.is_empty()) {
        let (to, beyond) = to.split_at_mut(rest.len());
        to.copy_from_slice(rest);
        beyond.fill(T::zero());
    }
}

/// Terms of the sums that are added up before the next ones: a panel of so many rows, the next one, and what it is multiplied with
/// stay in the L1 cache.
const TERMS: usize = 128;

/// Terms up to which OpenBLAS is faster where it copies nothing either: there is less to gain than to keep up.
const FEW_TERMS: usize = 32;

/// Whether sums of so many terms are better made here than by OpenBLAS, where B can be made in panels at no cost.
pub(crate) fn pay<T: Element>(terms: usize) -> bool {
    T::KIND == Kind::F32 && !(terms <= FEW_TERMS && setup().multiplies_in_place)
}

/// Elements of scratch with which [`multiply`] copies what it reads of so many rows of A.
pub(crate) fn copy_len(rows: usize) -> usize {
    rows * TERMS
}

/// `C <- A B`. Shapes: A `(m, k)`, B `(k, n)`, C `(m, n)`, n a multiple of [`LANES`].
///
/// `copy` is scratch of [`copy_len`] elements or more, or none; it is used only where the product is made here. With it, A is read
/// once, some terms at a time: for long rows, which are often a power of two apart, so that a cache has room for few of them, and
/// which all panels read again.
///
/// # Panics
/// If the shapes do not fit together, or scratch is too short: that is a bug of the caller.
#[track_caller]
pub(crate) fn multiply<T: Element>(a: Mat<'_, T>, b: Panels<'_, T>, c: MatMut<'_, T>, copy: &mut [T]) {
    assert_eq!((a.rows, a.cols), (c.rows, b.rows), "rows of A and C, and terms of A and B");
    assert!(!a.transposed, "A is used as it lies");
    assert!(copy.is_empty() || copy.len() >= copy_len(a.rows), "there is room for a copy of {} rows", a.rows);
    assert!(c.cols.is_multiple_of(LANES), "{} columns are whole vectors", c.cols);
    match T::KIND {
        Kind::F32 if pay::<T>(b.rows) => {
            let Panels { data, rows, panel, next } = b;
            let b = Panels { data: bytemuck::cast_slice(data), rows, panel, next: bytemuck::cast_slice(next) };
            let copy = bytemuck::cast_slice_mut(copy);
            arch().dispatch(Product { a: a.cast(), b, c: c.cast(), copy });
        }
        Kind::F32 => multiply_by_blas(a, b, c),
        Kind::F64 => multiply_plainly(a, b, c),
    }
}

/// The same product, panel by panel.
fn multiply_by_blas<T: Element>(a: Mat<'_, T>, b: Panels<'_, T>, mut c: MatMut<'_, T>) {
    for start in (0..c.cols).step_by(PANEL) {
        let cols = start..(start + PANEL).min(c.cols);
        let panel = Mat::new(&b.data[start / PANEL * b.panel..], b.rows, cols.len(), PANEL);
        gemm(Accum::Replace, T::one(), a, panel, c.block(0..a.rows, cols));
    }
}

/// The same sums, in `f64`, in which Winograd's algorithm is only tested.
fn multiply_plainly<T: Element>(a: Mat<'_, T>, b: Panels<'_, T>, mut c: MatMut<'_, T>) {
    for i in 0..c.rows {
        for (j, c) in c.row(i).iter_mut().enumerate() {
            let column = &b.data[j / PANEL * b.panel + j % PANEL..];
            *c = (0..b.rows).fold(T::zero(), |sum, p| a.data[i * a.ld + p].mul_add(column[p * PANEL], sum));
        }
    }
}

struct Product<'a> {
    a: Mat<'a, f32>,
    b: Panels<'a, f32>,
    c: MatMut<'a, f32>,
    copy: &'a mut [f32],
}

impl WithSimd for Product<'_> {
    type Output = ();

    /// Blocks of C that fill the registers: 12 x 2 vectors of the 32 of AVX-512, 6 x 2 of the 16 of AVX2 (which leaves two for
    /// the row of B and one for an element of A).
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
    /// Some terms after the others.
    #[inline(always)]
    fn run<S: Simd, const V: usize, const R: usize>(mut self, simd: S) {
        let (a, copy) = (self.a, std::mem::take(&mut self.copy));
        // of no terms at all, the sums are zero
        for start in (0..self.b.rows.max(1)).step_by(TERMS) {
            let terms = start..(start + TERMS).min(self.b.rows);
            let mut a = a.block(0..a.rows, terms.clone());
            if !copy.is_empty() && !terms.is_empty() {
                for (i, to) in copy.chunks_exact_mut(terms.len()).take(a.rows).enumerate() {
                    to.copy_from_slice(&a.data[i * a.ld..][..terms.len()]);
                }
                a = Mat::new(copy, a.rows, terms.len(), terms.len());
            }
            self.add::<S, V, R>(simd, a, terms);
        }
    }

    /// In blocks of `R` rows and `V` vectors, or what is left at the edges.
    #[inline(always)]
    fn add<S: Simd, const V: usize, const R: usize>(&mut self, simd: S, a: Mat<'_, f32>, terms: Range<usize>) {
        let mut start = 0;
        while start < self.c.cols {
            let vectors = ((self.c.cols - start).min(PANEL - start % PANEL) / S::F32_LANES).min(V);
            let (rows, _) = self.b.data[start / PANEL * self.b.panel..].as_chunks();
            let next = self.next(start / PANEL, &terms);
            let b = Strip { rows: &rows[terms.clone()], first: terms.start, column: start % PANEL, next };
            if vectors == V {
                self.columns::<S, V, R>(simd, (a, b), start);
            } else {
                self.columns::<S, 1, R>(simd, (a, b), start);
            }
            start += if vectors == V { V } else { 1 } * S::F32_LANES;
        }
    }

    /// The rows that are used after some terms of a panel.
    #[inline(always)]
    fn next(&self, panel: usize, terms: &Range<usize>) -> *const [f32; PANEL] {
        let Panels { data, rows, panel: len, next } = self.b;
        let next = if (panel + 1) * PANEL < self.c.cols {
            &data[(panel + 1) * len + terms.start * PANEL..]
        } else if terms.end < rows {
            &data[terms.end * PANEL..]
        } else {
            next
        };
        next.as_ptr().cast()
    }

    /// The columns from `start` on, `V` vectors of them, in blocks of as even height as possible: a block of few rows keeps the
    /// adders waiting for each other.
    #[inline(always)]
    fn columns<S: Simd, const V: usize, const R: usize>(
        &mut self,
        simd: S,
        (a, b): (Mat<'_, f32>, Strip<'_>),
        start: usize,
    ) {
        let blocks = self.c.rows.div_ceil(R);
        for index in 0..blocks {
            let ahead = Ahead::new([b.next], b.rows.len(), (index, blocks), steps(b.rows.len()));
            let rows = piece_range(self.c.rows, blocks, index);
            macro_rules! of_height {
                ($($height:literal)+) => {
                    match rows.len() {
                        $($height if $height <= R => self.block::<S, V, $height>(simd, (a, b, ahead), rows.start, start),)+
                        height => unreachable!("a block of {height} rows, {R} at most"),
                    }
                };
            }
            of_height!(1 2 3 4 5 6 7 8 9 10 11 12);
        }
    }

    /// `R` rows and `V` vectors of C, from row `i` and column `j` on; what comes next is fetched meanwhile.
    #[inline(always)]
    fn block<S: Simd, const V: usize, const R: usize>(
        &mut self,
        simd: S,
        (a, b, ahead): (Mat<'_, f32>, Strip<'_>, Ahead<1>),
        i: usize,
        j: usize,
    ) {
        let width = V * S::F32_LANES;
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        if b.first > 0 {
            for (r, sums) in sums.iter_mut().enumerate() {
                let (c, _) = S::as_simd_f32s(&self.c.row(i + r)[j..j + width]);
                sums.copy_from_slice(c);
            }
        }
        let sums = add_terms(simd, sums, (a, i), (b.rows, b.column), ahead);
        for (r, sums) in sums.iter().enumerate() {
            let (c, _) = S::as_mut_simd_f32s(&mut self.c.row(i + r)[j..j + width]);
            c.copy_from_slice(sums);
        }
    }
}

/// Some rows of a panel of B, and in them the columns from `column` on.
#[derive(Clone, Copy)]
struct Strip<'a> {
    rows: &'a [[f32; PANEL]],
    /// The term that the first row belongs to.
    first: usize,
    column: usize,
    /// What is used after them.
    next: *const [f32; PANEL],
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blas::tests::integers;

    /// Checks a product of this size, and that it touches nothing else.
    fn check<T: Element>(m: usize, n: usize, k: usize, copied: bool) {
        let (a_ld, c_ld, panel) = (k + 3, n + LANES, (k + 1) * PANEL);
        let a: Vec<T> = integers(a_ld * m, 2);
        let b: Vec<T> = integers(n.div_ceil(PANEL) * panel, 1);
        let before: Vec<T> = integers(m * c_ld, 3);
        let mut c = before.clone();
        let panels = Panels { data: &b, rows: k, panel, next: &[] };
        let mut copy = vec![T::nan(); if copied { copy_len(m + 2) } else { 0 }];
        multiply(Mat::new(&a, m, k, a_ld), panels, MatMut::new(&mut c, m, n, c_ld), &mut copy);
        for (at, &got) in c.iter().enumerate() {
            let (i, j) = (at / c_ld, at % c_ld);
            let product = |p| a[i * a_ld + p] * b[j / PANEL * panel + p * PANEL + j % PANEL];
            let want = if j < n { (0..k).map(product).sum() } else { before[at] };
            assert_eq!(got, want, "{m} x {n} x {k}: element {i}, {j}");
        }
    }

    #[test]
    fn products_are_right_at_every_edge() {
        for m in (1..=25).chain([64]) {
            for n in [16, 32, 48, 64, 80] {
                check::<f32>(m, n, [1, 2, 7, TERMS + 54][m % 4], (m + n) % 3 == 0);
            }
        }
        // all that may be left over of steps, also where OpenBLAS has the sums of few terms
        for (k, copied) in [(1, false), (1, true), (2, false), (2, true), (3, false), (3, true)] {
            check::<f32>(13, 48, FEW_TERMS + k, copied);
        }
        check::<f32>(3, 48, 0, false);
        check::<f32>(3, 48, 0, true);
        check::<f64>(5, 48, 9, true);
    }
}
