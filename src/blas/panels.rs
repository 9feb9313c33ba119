//! Level 2. A matrix product of our own, for operands that whoever makes them can lay out for it.
//!
//! OpenBLAS copies the operands of every product into panels before it multiplies. Winograd's algorithm and prepared affine layers
//! lay one of theirs out in panels when they make it: here nothing is copied, but for long rows of A. A block of C is kept in the
//! vector registers, and for each term of its sums takes a column of A, element by element, and a row of B. Affine layers whose
//! weights change have them copied, too, some terms at a time, which with the vectors of AVX-512 is faster all the same.
//!
//! Every element of C is one chain of multiply-adds over the terms in their order, so its bits depend on nothing but its row
//! of A and its column of B. Sums of few terms are left to those kernels of OpenBLAS that copy nothing for small products and
//! treat all rows alike.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::blas::strips::{self, Cut};
use crate::blas::{Accum, Mat, MatMut, gemm, setup, steps};
use crate::element::{Element, Kind};
use crate::parallel::StridedMut;
use crate::simd::{Isa, LANES, Share, arch, transpose};

/// Columns of a panel.
pub(crate) const PANEL: usize = 2 * LANES;

/// B, whose rows are cut into panels of [`PANEL`] columns. The last may have fewer, and lies as a whole one with zeros.
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

impl<'a, T> Panels<'a, T> {
    /// `data` as panels of so many rows, [`panel_len`] elements apart.
    pub(crate) fn new(data: &'a [T], rows: usize) -> Self {
        Panels { data, rows, panel: panel_len(rows), next: &[] }
    }
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

/// The same where A and B have to be copied first: with the vectors of AVX-512 alone. For AVX2, OpenBLAS' kernels are faster than
/// ours.
pub(crate) fn pay_copied<T: Element>(terms: usize) -> bool {
    pay::<T>(terms) && Isa::used() == Isa::Avx512
}

/// B of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Right<'a, T> {
    /// In panels.
    Panels(Panels<'a, T>),
    /// As it lies, transposed or not: some terms of a panel's columns are copied at a time, and what comes next is fetched meanwhile.
    Rows(Mat<'a, T>),
}

impl<'a, T: Element> Right<'a, T> {
    /// These columns, from the first of a panel on.
    pub(crate) fn columns(self, cols: Range<usize>) -> Self {
        debug_assert!(cols.start.is_multiple_of(PANEL), "column {} is the first of a panel", cols.start);
        match self {
            Right::Panels(b) => Right::Panels(Panels { data: &b.data[cols.start / PANEL * b.panel..], ..b }),
            Right::Rows(b) => Right::Rows(b.block(0..b.rows, cols)),
        }
    }

    /// The same elements, where `T` is `U` under another name.
    fn cast<U: Element>(self) -> Right<'a, U> {
        match self {
            Right::Panels(Panels { data, rows, panel, next }) => {
                assert_eq!(T::KIND, U::KIND, "the same type");
                let (data, next) = (bytemuck::cast_slice(data), bytemuck::cast_slice(next));
                Right::Panels(Panels { data, rows, panel, next })
            }
            Right::Rows(b) => Right::Rows(b.cast()),
        }
    }

    /// Rows: terms of a sum.
    fn rows(&self) -> usize {
        match self {
            Right::Panels(b) => b.rows,
            Right::Rows(b) => b.rows,
        }
    }

    /// What is fetched of a panel's next terms, of which there are so many, by `parts` loops.
    #[inline(always)]
    fn share(&self, terms: usize, parts: usize) -> Share {
        match self {
            Right::Panels(_) => Share::new::<T>(terms * PANEL, parts, steps(terms)),
            Right::Rows(b) if b.transposed => Share::rows::<T>(PANEL, b.ld, parts),
            Right::Rows(b) => Share::rows::<T>(terms, b.ld, parts),
        }
    }

    /// Element `p`, `j`.
    fn at(&self, p: usize, j: usize) -> T {
        match self {
            Right::Panels(b) => b.data[j / PANEL * b.panel + p * PANEL + j % PANEL],
            Right::Rows(b) => b.at(p, j),
        }
    }
}

/// Elements of scratch that [`multiply`] takes for so many rows of C, with `copy` or without.
pub(crate) fn scratch_len(rows: usize, copy: bool) -> usize {
    copied_len(rows, copy) + (rows + TERMS) * PANEL
}

/// Those for some terms of A.
fn copied_len(rows: usize, copy: bool) -> usize {
    if copy { rows * TERMS } else { 0 }
}

/// `C <- A B`. Shapes: A `(m, k)`, B `(k, n)`, C `(m, n)`.
///
/// With `copy`, A is read once, some terms at a time: for long rows, which are often a power of two apart, so that a cache has room
/// for few of them, and which all panels read again. What is copied, and columns that are no whole vectors, take scratch of
/// [`scratch_len`] elements; where there is nothing of all this, it may be empty.
///
/// # Panics
/// If the shapes do not fit together, A is transposed and not copied, or scratch is too short: that is a bug of the caller.
#[track_caller]
pub(crate) fn multiply<T: Element>(a: Mat<'_, T>, b: Right<'_, T>, c: MatMut<'_, T>, copy: bool, scratch: &mut [T]) {
    assert_eq!((a.rows, a.cols), (c.rows, b.rows()), "rows of A and C, and terms of A and B");
    assert!(copy || !a.transposed, "A is used as it lies");
    let copies = copy || !c.cols.is_multiple_of(LANES) || matches!(b, Right::Rows(_));
    assert!(!copies || scratch.len() >= scratch_len(c.rows, copy), "there is scratch for {} rows", c.rows);
    if let Right::Rows(b) = b {
        assert_eq!(b.cols, c.cols, "columns of B and C");
    }
    match T::KIND {
        Kind::F32 if pay::<T>(b.rows()) => {
            let scratch = Copies::new(c.rows, copy, bytemuck::cast_slice_mut(scratch));
            arch().dispatch(Product { a: a.cast(), b: b.cast(), c: c.cast(), copy, scratch });
        }
        Kind::F32 => multiply_by_blas(a, b, c),
        Kind::F64 => multiply_plainly(a, b, c),
    }
}

/// The same product, panel by panel.
fn multiply_by_blas<T: Element>(a: Mat<'_, T>, b: Right<'_, T>, mut c: MatMut<'_, T>) {
    let b = match b {
        Right::Panels(b) => b,
        Right::Rows(b) => return gemm(Accum::Replace, T::one(), a, b, c),
    };
    for start in (0..c.cols).step_by(PANEL) {
        let cols = start..(start + PANEL).min(c.cols);
        let panel = Mat::new(&b.data[start / PANEL * b.panel..], b.rows, cols.len(), PANEL);
        gemm(Accum::Replace, T::one(), a, panel, c.block(0..a.rows, cols));
    }
}

/// The same sums, in `f64`, in which our own products are only tested.
fn multiply_plainly<T: Element>(a: Mat<'_, T>, b: Right<'_, T>, mut c: MatMut<'_, T>) {
    for i in 0..c.rows {
        for (j, c) in c.row(i).iter_mut().enumerate() {
            *c = (0..b.rows()).fold(T::zero(), |sum, p| a.at(i, p).mul_add(b.at(p, j), sum));
        }
    }
}

struct Product<'a> {
    a: Mat<'a, f32>,
    b: Right<'a, f32>,
    c: MatMut<'a, f32>,
    copy: bool,
    scratch: Copies<'a>,
}

/// Where a product keeps what it copies, if there is anything.
struct Copies<'a> {
    /// Some terms of A.
    a: &'a mut [f32],
    /// The same terms of B, of a panel's columns.
    b: &'a mut [[f32; PANEL]],
    /// The last columns of C, if they are no whole vectors.
    c: &'a mut [f32],
}

impl<'a> Copies<'a> {
    fn new(rows: usize, copy: bool, scratch: &'a mut [f32]) -> Self {
        let scratch = if scratch.len() < scratch_len(rows, copy) { &mut [] } else { scratch };
        let (a, scratch) = scratch.split_at_mut(scratch.len().min(copied_len(rows, copy)));
        let (b, c) = scratch.split_at_mut(scratch.len().min(TERMS * PANEL));
        Copies { a, b: b.as_chunks_mut().0, c }
    }
}

impl WithSimd for Product<'_> {
    type Output = ();

    /// Blocks of C that fill the registers: 12 x 2 vectors of the 32 of AVX-512, 6 x 2 of the 16 of AVX2 (which leaves two for
    /// the row of B and one for an element of A).
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let transposed = self.a.transposed;
        // The constant alone is matched: arms for other vectors are then not compiled. In a tuple with `transposed` they would be.
        match S::F32_LANES {
            16 if transposed => self.run::<S, 2, 12, true>(simd),
            16 => self.run::<S, 2, 12, false>(simd),
            8 if transposed => self.run::<S, 2, 6, true>(simd),
            8 => self.run::<S, 2, 6, false>(simd),
            _ if transposed => self.run::<S, 4, 3, true>(simd),
            _ => self.run::<S, 4, 3, false>(simd),
        }
    }
}

impl Product<'_> {
    /// Some terms after the others, and of these one panel after the other.
    #[inline(always)]
    fn run<S: Simd, const V: usize, const R: usize, const TRANSPOSED: bool>(self, simd: S) {
        let Product { a, b, mut c, copy, scratch } = self;
        let (rows, cols) = (c.rows, c.cols);
        let whole = if cols.is_multiple_of(LANES) { cols } else { cols / PANEL * PANEL };
        // of no terms at all, the sums are zero
        for start in (0..a.cols.max(1)).step_by(TERMS) {
            let terms = start..(start + TERMS).min(a.cols);
            let mut left = a.block(0..a.rows, terms.clone());
            if copy {
                left = copy_left(left, scratch.a);
            }
            let accum = if start > 0 { Accum::Add } else { Accum::Replace };
            let cut = Cut::new(rows, R, |blocks| b.share(terms.len(), blocks));
            for first in (0..cols).step_by(PANEL) {
                let (panel, next) = panel(&b, (first, cols), &terms, scratch.b);
                let width = (cols - first).min(PANEL);
                let mut c = if first < whole {
                    c.block(0..rows, first..first + width)
                } else {
                    MatMut::new(&mut *scratch.c, rows, width.next_multiple_of(LANES), PANEL)
                };
                // the next panel, whichever of this one's strips it is
                let next = |_| next;
                strips::multiply::<S, V, R, TRANSPOSED>(simd, accum, (left, Mat::of(panel)), &mut c, cut, next);
            }
        }
        if whole < cols {
            for (i, last) in scratch.c.chunks_exact(PANEL).take(rows).enumerate() {
                c.row(i)[whole..].copy_from_slice(&last[..cols - whole]);
            }
        }
    }
}

/// Some terms of A, one row after the other as they lie.
#[inline(always)]
fn copy_left<'a>(a: Mat<'_, f32>, to: &'a mut [f32]) -> Mat<'a, f32> {
    let Mat { data, rows, cols, ld, transposed } = a;
    let (count, len) = if transposed { (cols, rows) } else { (rows, cols) };
    if len > 0 {
        for (i, to) in to.chunks_exact_mut(len).take(count).enumerate() {
            to.copy_from_slice(&data[i * ld..][..len]);
        }
    }
    let copy = Mat::new(to, count, len, len);
    if transposed { copy.t() } else { copy }
}

/// Some terms of the panel of B that begins with column `first` of `cols`, and where those are that are used after them.
#[inline(always)]
fn panel<'a>(
    b: &Right<'a, f32>,
    (first, cols): (usize, usize),
    terms: &Range<usize>,
    copy: &'a mut [[f32; PANEL]],
) -> (&'a [[f32; PANEL]], *const f32) {
    let (next, again) = if first + PANEL < cols { (first + PANEL, terms.start) } else { (0, terms.end) };
    match *b {
        Right::Panels(Panels { data, rows, panel, next: beyond }) => {
            let at = |first: usize| &data[first / PANEL * panel..];
            let next = if again < rows { &at(next)[again * PANEL..] } else { beyond };
            (&at(first).as_chunks().0[terms.clone()], next.as_ptr())
        }
        Right::Rows(b) => {
            let place = if b.transposed { next * b.ld + again } else { again * b.ld + next };
            copy_right(b.block(terms.clone(), first..cols.min(first + PANEL)), copy);
            (&copy[..terms.len()], b.data.as_ptr().wrapping_add(place))
        }
    }
}

/// Some terms of a panel's columns of B, row by row. Columns beyond the last are zero.
#[inline(always)]
fn copy_right(b: Mat<'_, f32>, to: &mut [[f32; PANEL]]) {
    let Mat { data, rows, cols, ld, transposed } = b;
    let to = &mut to[..rows];
    if transposed {
        transpose((data, ld), (cols, rows), (to.as_flattened_mut(), PANEL));
    } else {
        for (p, to) in to.iter_mut().enumerate() {
            let from = &data[p * ld..][..cols];
            match from.try_into() {
                Ok(whole) => *to = whole,
                Err(_) => to[..cols].copy_from_slice(from),
            }
        }
    }
    if cols < PANEL {
        to.iter_mut().for_each(|row| row[cols..].fill(0.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blas::tests::{integers, is_one_chain, refuses};
    use crate::simd::rows_reach;

    /// Checks a product of this size, whatever can be said of how A and B lie, and that it touches nothing else.
    fn check<T: Element>(m: usize, n: usize, k: usize) {
        let c_ld = n + LANES;
        let before: Vec<T> = integers(m * c_ld, 3);
        let (a, b): (Vec<T>, Vec<T>) = (integers((m + 3) * (k + 3), 2), integers((n + PANEL) * (k + 5), 1));
        // no element more than they have
        let end = |rows, cols, ld| rows_reach(rows, cols, ld).unwrap();
        let rows = Mat::new(&a[..end(m, k, k + 3)], m, k, k + 3);
        let columns = Mat::new(&a[..end(k, m, m + 3)], k, m, m + 3).t();
        let as_it_lies = Right::Rows(Mat::new(&b[..end(k, n, n + 5)], k, n, n + 5));
        let transposed = Right::Rows(Mat::new(&b[..end(n, k, k + 2)], n, k, k + 2).t());
        let panels = Right::Panels(Panels::new(&b[..n.div_ceil(PANEL) * panel_len(k)], k));
        for (a, copy) in [(rows, false), (rows, true), (columns, true)] {
            for b in [panels, as_it_lies, transposed] {
                let mut c = before.clone();
                let bare = !copy && n.is_multiple_of(LANES) && matches!(b, Right::Panels(_));
                let mut scratch = vec![T::nan(); if bare { 0 } else { scratch_len(m, copy) }];
                multiply(a, b, MatMut::new(&mut c, m, n, c_ld), copy, &mut scratch);
                for (at, &got) in c.iter().enumerate() {
                    let (i, j) = (at / c_ld, at % c_ld);
                    let want = if j < n { (0..k).map(|p| a.at(i, p) * b.at(p, j)).sum() } else { before[at] };
                    assert_eq!(got, want, "{m} x {n} x {k}, copied {copy}: element {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn products_are_right_at_every_edge() {
        for m in (1..=25).chain([64]) {
            for n in [1, 16, 32, 41, 48, 64, 80, 85] {
                check::<f32>(m, n, [1, 2, 7, TERMS + 54][(m + n / 16) % 4]);
            }
            // sums that are gone on with, in panels that are no whole vectors
            check::<f32>(m, 41, TERMS + 54);
            check::<f32>(m, 85, TERMS + 54);
        }
        check::<f32>(14, 85, TERMS);
        check::<f32>(14, 85, 2 * TERMS);
        // all that may be left over of steps, also where OpenBLAS has the sums of few terms
        for k in 1..=3 {
            check::<f32>(13, 48, FEW_TERMS + k);
        }
        check::<f32>(3, 48, 0);
        check::<f32>(3, 47, 0);
        check::<f64>(5, 45, 9);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (m, n, k) = (5, 41, 60);
        let (a, b) = (vec![1.0_f32; m * k], vec![1.0_f32; k * n]);
        let product = |a: Mat<'_, f32>, terms: usize, cols: usize, copy: bool, scratch: usize| {
            let mut c = vec![0.0; m * n];
            let b = Right::Rows(Mat::new(&b, terms, cols, cols));
            multiply(a, b, MatMut::new(&mut c, m, n, n), copy, &mut vec![0.0; scratch]);
        };
        let (rows, columns) = (Mat::new(&a, m, k, k), Mat::new(&a, k, m, m).t());
        for copy in [true, false] {
            let len = scratch_len(m, copy);
            product(rows, k, n, copy, len);
            assert!(refuses(|| product(rows, k, n, copy, len - 1)), "scratch");
            assert!(refuses(|| product(rows, k - 1, n, copy, len)), "terms");
            assert!(refuses(|| product(rows, k, n - 1, copy, len)), "columns");
        }
        product(columns, k, n, true, scratch_len(m, true));
        assert!(refuses(|| product(columns, k, n, false, scratch_len(m, true))), "transposed, as it lies");
        let higher = Mat::new(&a, m + 1, k - 10, k - 10);
        assert!(refuses(|| product(higher, k - 10, n, true, scratch_len(m + 1, true))), "rows");
    }

    /// An element has the same bits wherever its row and column stand, and however A and B lie.
    #[test]
    fn an_element_is_one_chain() {
        let (m, n, k) = (37, 75, 300);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 7.0;
        let a: Vec<f32> = (0..m * k).map(value).collect();
        let b: Vec<f32> = (0..k * n).map(value).collect();
        let (mut a_across, mut b_across) = (vec![0.0; k * m], vec![0.0; n * k]);
        transpose((&a, k), (m, k), (&mut a_across, m));
        transpose((&b, n), (k, n), (&mut b_across, k));
        let mut panels = vec![0.0; n.div_ceil(PANEL) * panel_len(k)];
        for (row, values) in b.chunks_exact(n).enumerate() {
            set_row(&mut StridedMut::rows(&mut panels, panel_len(k)), row, values);
        }
        let (rows, columns) = (Mat::new(&a, m, k, k), Mat::new(&a_across, k, m, m).t());
        let as_it_lies = Right::Rows(Mat::new(&b, k, n, n));
        let transposed = Right::Rows(Mat::new(&b_across, n, k, k).t());
        for (left, copy) in [(rows, false), (rows, true), (columns, true)] {
            for right in [Right::Panels(Panels::new(&panels, k)), as_it_lies, transposed] {
                let mut c = vec![0.0; m * n];
                multiply(left, right, MatMut::new(&mut c, m, n, n), copy, &mut vec![0.0; scratch_len(m, copy)]);
                for (at, &got) in c.iter().enumerate() {
                    let (i, j) = (at / n, at % n);
                    let terms = (0..k).map(|p| (a[i * k + p], b[p * n + j]));
                    assert!(is_one_chain(got, terms), "element {i}, {j}: {got:e}");
                }
            }
        }
    }
}
