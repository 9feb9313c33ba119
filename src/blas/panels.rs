//! Level 2. A matrix product of our own, for many small products of the same shape.
//!
//! OpenBLAS copies the operands of every product into panels before it multiplies. Winograd's algorithm makes 36 products
//! of matrices that stay in the cache, and lays its matrices out itself: here nothing is copied. A block of C is kept in
//! the vector registers, and for each term of its sums takes a column of A, element by element, and a row of B.
//!
//! Every element of C is one chain of multiply-adds over the terms in their order, so its bits depend on nothing but its row
//! of A and its column of B; a sum that is added to in several calls goes on where it was.

use pulp::{Arch, Simd, WithSimd};

use crate::blas::{Accum, Mat, MatMut};
use crate::element::{Element, Kind};
use crate::simd::LANES;

/// Columns of a panel.
pub(crate) const PANEL: usize = 2 * LANES;

/// B, whose rows are cut into panels of [`PANEL`] columns; the last may have [`LANES`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Panels<'a, T> {
    pub(crate) data: &'a [T],
    /// Rows of B: terms of a sum.
    pub(crate) rows: usize,
    /// Elements from one row of a panel to the next.
    pub(crate) row: usize,
    /// Elements from one panel to the next.
    pub(crate) panel: usize,
}

/// `C <- A B` or `C <- C + A B`. Shapes: A `(m, k)`, B `(k, n)`, C `(m, n)`, n a multiple of [`LANES`].
///
/// # Panics
/// If the shapes do not fit together: that is a bug of the caller.
#[track_caller]
pub(crate) fn multiply<T: Element>(accum: Accum, a: Mat<'_, T>, b: Panels<'_, T>, c: MatMut<'_, T>) {
    assert_eq!((a.rows, a.cols), (c.rows, b.rows), "rows of A and C, and terms of A and B");
    assert!(c.cols.is_multiple_of(LANES), "{} columns are whole vectors", c.cols);
    match T::KIND {
        Kind::F32 => {
            let Panels { data, rows, row, panel } = b;
            let b = Panels { data: bytemuck::cast_slice(data), rows, row, panel };
            Arch::new().dispatch(Product { accum, a: a.cast(), b, c: c.cast() });
        }
        Kind::F64 => multiply_plainly(accum, a, b, c),
    }
}

/// The same sums, in `f64`, in which Winograd's algorithm is only tested.
fn multiply_plainly<T: Element>(accum: Accum, a: Mat<'_, T>, b: Panels<'_, T>, mut c: MatMut<'_, T>) {
    for i in 0..c.rows {
        for (j, c) in c.row(i).iter_mut().enumerate() {
            let column = &b.data[j / PANEL * b.panel + j % PANEL..];
            let start = if accum == Accum::Add { *c } else { T::zero() };
            *c = (0..b.rows).fold(start, |sum, p| a.element(i, p).mul_add(column[p * b.row], sum));
        }
    }
}

struct Product<'a> {
    accum: Accum,
    a: Mat<'a, f32>,
    b: Panels<'a, f32>,
    c: MatMut<'a, f32>,
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
    /// In blocks of `R` rows and `V` vectors, or what is left at the edges.
    #[inline(always)]
    fn run<S: Simd, const V: usize, const R: usize>(mut self, simd: S) {
        let mut start = 0;
        while start < self.c.cols {
            let vectors = ((self.c.cols - start).min(PANEL - start % PANEL) / S::F32_LANES).min(V);
            let b = Strip { data: &self.b.data[start / PANEL * self.b.panel + start % PANEL..], row: self.b.row };
            if vectors == V {
                self.columns::<S, V, R>(simd, b, start);
            } else {
                self.columns::<S, 1, R>(simd, b, start);
            }
            start += if vectors == V { V } else { 1 } * S::F32_LANES;
        }
    }

    /// The columns from `start` on, `V` vectors of them.
    #[inline(always)]
    fn columns<S: Simd, const V: usize, const R: usize>(&mut self, simd: S, b: Strip<'_>, start: usize) {
        let mut i = 0;
        while i + R <= self.c.rows {
            self.block::<S, V, R>(simd, b, i, start);
            i += R;
        }
        match self.c.rows - i {
            0 => {}
            1 => self.block::<S, V, 1>(simd, b, i, start),
            2 => self.block::<S, V, 2>(simd, b, i, start),
            3 => self.block::<S, V, 3>(simd, b, i, start),
            4 => self.block::<S, V, 4>(simd, b, i, start),
            5 => self.block::<S, V, 5>(simd, b, i, start),
            6 => self.block::<S, V, 6>(simd, b, i, start),
            7 => self.block::<S, V, 7>(simd, b, i, start),
            8 => self.block::<S, V, 8>(simd, b, i, start),
            9 => self.block::<S, V, 9>(simd, b, i, start),
            10 => self.block::<S, V, 10>(simd, b, i, start),
            _ => self.block::<S, V, 11>(simd, b, i, start),
        }
    }

    /// `R` rows and `V` vectors of C, from row `i` and column `j` on.
    #[inline(always)]
    fn block<S: Simd, const V: usize, const R: usize>(&mut self, simd: S, b: Strip<'_>, i: usize, j: usize) {
        let width = V * S::F32_LANES;
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        if self.accum == Accum::Add {
            for (r, sums) in sums.iter_mut().enumerate() {
                let (c, _) = S::as_simd_f32s(&self.c.row(i + r)[j..j + width]);
                sums.copy_from_slice(c);
            }
        }
        let (a, terms) = (self.a, self.b.rows);
        if a.transposed {
            // Elements of a column of A lie side by side.
            for (column, b) in a.data.chunks(a.ld).zip(b.data.chunks(b.row)).take(terms) {
                let column = &column[i..i + R];
                add_term(
                    simd,
                    &mut sums,
                    #[inline(always)]
                    |r| column[r],
                    b,
                );
            }
        } else {
            let mut rows = [&a.data[..0]; R];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = &a.data[(i + r) * a.ld..][..terms];
            }
            for (p, b) in b.data.chunks(b.row).take(terms).enumerate() {
                add_term(
                    simd,
                    &mut sums,
                    #[inline(always)]
                    |r| rows[r][p],
                    b,
                );
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let (c, _) = S::as_mut_simd_f32s(&mut self.c.row(i + r)[j..j + width]);
            c.copy_from_slice(sums);
        }
    }
}

/// Some columns of B, side by side in rows that are `row` elements apart.
#[derive(Clone, Copy)]
struct Strip<'a> {
    data: &'a [f32],
    row: usize,
}

/// Adds to `sums` the products of a column of A and a row of B.
#[inline(always)]
fn add_term<S: Simd, const V: usize, const R: usize>(
    simd: S,
    sums: &mut [[S::f32s; V]; R],
    column: impl Fn(usize) -> f32,
    row: &[f32],
) {
    let (row, _) = S::as_simd_f32s(&row[..V * S::F32_LANES]);
    for r in 0..R {
        let a = simd.splat_f32s(column(r));
        for v in 0..V {
            sums[r][v] = simd.mul_add_e_f32s(a, row[v], sums[r][v]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small integers, whose sums are exact in any order.
    fn integers<T: Element>(len: usize, seed: usize) -> Vec<T> {
        (0..len).map(|i| T::of(((i * 7 + seed * 13 + i / 11 * 5) % 7) as f64 - 3.0)).collect()
    }

    /// Checks a product of this size, A in both orientations, B packed and as it lies, set and added, and that it touches
    /// nothing else.
    fn check<T: Element>(m: usize, n: usize, k: usize) {
        let ld = n + LANES;
        let (packed_len, panel) = (n.div_ceil(PANEL) * k * PANEL, k * PANEL);
        let b: Vec<T> = integers(k * ld, 1);
        let mut packed = vec![T::nan(); packed_len];
        for p in 0..k {
            for j in 0..n {
                packed[j / PANEL * panel + p * PANEL + j % PANEL] = b[p * ld + j];
            }
        }
        let panels =
            [Panels { data: &packed, rows: k, row: PANEL, panel }, Panels { data: &b, rows: k, row: ld, panel: PANEL }];
        let a_ld = m.max(k) + 3;
        let a: Vec<T> = integers(a_ld * m.max(k), 2);
        let before: Vec<T> = integers(m * ld, 3);
        for (transposed, b_panels) in [(false, panels[0]), (false, panels[1]), (true, panels[0]), (true, panels[1])] {
            for accum in [Accum::Replace, Accum::Add] {
                let mat = if transposed { Mat::new(&a, k, m, a_ld).t() } else { Mat::new(&a, m, k, a_ld) };
                let mut c = before.clone();
                multiply(accum, mat, b_panels, MatMut::new(&mut c, m, n, ld));
                for (at, &got) in c.iter().enumerate() {
                    let (i, j) = (at / ld, at % ld);
                    let start = if accum == Accum::Add || j >= n { before[at] } else { T::zero() };
                    let product =
                        |p| if transposed { a[p * a_ld + i] * b[p * ld + j] } else { a[i * a_ld + p] * b[p * ld + j] };
                    let want = if j < n { (0..k).fold(start, |sum, p| sum + product(p)) } else { start };
                    assert_eq!(got, want, "{m} x {n} x {k}, transposed {transposed}, {accum:?}: element {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn products_are_right_at_every_edge() {
        for m in (1..=25).chain([64]) {
            for n in [16, 32, 48, 64, 80] {
                check::<f32>(m, n, [1, 2, 7, 54][m % 4]);
            }
        }
        check::<f32>(3, 16, 0);
        check::<f64>(5, 48, 9);
    }
}
