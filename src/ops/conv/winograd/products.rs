//! Level 3. The matrices that Winograd's transforms fill, and their products.

use std::ops::Range;

use super::order::Order;
use super::transforms::SPAN;
use crate::blas::panels::{self, PANEL, Panels, Right, panel_len};
use crate::blas::{Accum, Mat, MatMut, gemm};
use crate::element::Element;
use crate::simd::LANES;

/// Elements of a transformed tile: the number of products.
pub(super) const PRODUCTS: usize = SPAN * SPAN;

/// [`PRODUCTS`] matrices of the same shape, one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stack {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Elements from one row to the next: an odd number of vectors, lest the rows of a matrix, a power of two apart,
    /// share a few sets of the L1 cache.
    ld: usize,
    /// Rows of a matrix, as they lie in memory: an odd number, lest matrices are a multiple of 4 KiB apart.
    rows_in_memory: usize,
}

impl Stack {
    pub(super) fn new(rows: usize, cols: usize) -> Self {
        let ld = (cols.div_ceil(LANES) | 1) * LANES;
        Stack { rows, cols, ld, rows_in_memory: rows | 1 }
    }

    pub(super) fn len(&self) -> usize {
        PRODUCTS * self.rows_in_memory * self.ld
    }

    /// A block of matrix `q`.
    fn block<'a, T>(&self, data: &'a [T], q: usize, rows: Range<usize>, cols: Range<usize>) -> Mat<'a, T> {
        let data = &data[(q * self.rows_in_memory + rows.start) * self.ld + cols.start..];
        Mat::new(data, rows.len(), cols.len(), self.ld)
    }

    /// The first `cols` columns of some rows of matrix `q`.
    fn block_mut<'a, T>(&self, data: &'a mut [T], q: usize, rows: Range<usize>, cols: usize) -> MatMut<'a, T> {
        MatMut::new(&mut data[(q * self.rows_in_memory + rows.start) * self.ld..], rows.len(), cols, self.ld)
    }

    /// Which of the data's vectors begins at column `col`, a multiple of [`LANES`], of row `row` in matrix (i, j).
    #[inline(always)]
    pub(super) fn at(&self, i: usize, j: usize, row: usize, col: usize) -> usize {
        ((i * SPAN + j) * self.rows_in_memory + row) * (self.ld / LANES) + col / LANES
    }
}

/// [`PRODUCTS`] matrices of transformed filters, in the panels that the products take: what stays the same over many of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct FilterPanels {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Of the longest tile, down and across: matrices of points that it does not have are left as they are, and not read.
    pub(super) outputs: (usize, usize),
}

impl FilterPanels {
    /// Panels of a matrix, as they lie in memory: an odd number of them, for the reason that [`Stack`] has.
    pub(super) fn panels(&self) -> usize {
        self.cols.div_ceil(PANEL) | 1
    }

    /// Elements from one panel to the next.
    pub(super) fn panel(&self) -> usize {
        panel_len(self.rows)
    }

    pub(super) fn len(&self) -> usize {
        PRODUCTS * self.panels() * self.panel()
    }

    /// Matrix `q` from a column on, the first of a panel; the same panels of matrix `next` are wanted next.
    fn matrix<'a, T>(&self, data: &'a [T], q: usize, next: Option<usize>, col: usize) -> Panels<'a, T> {
        debug_assert!(col.is_multiple_of(PANEL), "column {col} is the first of a panel");
        let from = |q: usize| &data[(q * self.panels() + col / PANEL) * self.panel()..];
        Panels { next: next.map_or(&[], from), ..Panels::new(from(q), self.rows) }
    }
}

/// The products that tiles have, each with their rows.
fn products(order: &Order) -> impl Iterator<Item = (usize, Range<usize>)> {
    let rows = |q: usize| (q, order.rows(q / SPAN, q % SPAN));
    (0..PRODUCTS).map(rows).filter(|(_, rows)| !rows.is_empty())
}

/// `C_q = A_q . B_q[:, cols]` for all `q` and those rows, the tiles, that have a product there; `cols` begin with a panel.
pub(super) fn multiply<T: Element>(
    order: &Order,
    (a_stack, a): (&Stack, &[T]),
    (b_panels, b, cols): (&FilterPanels, &[T], Range<usize>),
    (c_stack, c): (&Stack, &mut [T]),
) {
    // Whole vectors: the columns beyond the last are there, and of no use.
    let width = cols.len().next_multiple_of(LANES);
    let mut products = products(order).peekable();
    while let Some((q, rows)) = products.next() {
        let next = products.peek().map(|&(q, _)| q);
        let (a, b) = (a_stack.block(a, q, rows.clone(), 0..a_stack.cols), b_panels.matrix(b, q, next, cols.start));
        panels::multiply(a, Right::Panels(b), c_stack.block_mut(c, q, rows, width), false, &mut []);
    }
}

/// `C_q = A_q[rows, a_cols]^T . B_q[rows, b_cols]`, or added to it, for all `q` that tiles have: sums over them, the rows. Neither
/// operand is used again, so there is nothing to prepare.
pub(super) fn multiply_transposed<T: Element>(
    accum: Accum,
    order: &Order,
    (a_stack, a, a_cols): (&Stack, &[T], Range<usize>),
    (b_stack, b, b_cols): (&Stack, &[T], Range<usize>),
    (c_stack, c): (&Stack, &mut [T]),
) {
    for (q, rows) in products(order) {
        let a = a_stack.block(a, q, rows.clone(), a_cols.clone());
        let b = b_stack.block(b, q, rows, b_cols.clone());
        gemm(accum, T::one(), a.t(), b, c_stack.block_mut(c, q, 0..a_cols.len(), b_cols.len()));
    }
}
