//! Level 3. The matrices that Winograd's transforms fill, and their products.

use std::ops::Range;

use super::maps::Along;
use super::order::Order;
use crate::blas::panels::{self, PANEL, Panels, Right, panel_len};
use crate::blas::{Accum, Mat, MatMut, gemm, transposed};
use crate::element::Element;
use crate::simd::LANES;

/// Matrices of the same shape, one after the other: one for each element of a transformed tile. Lengths are in vectors, and so
/// that transforms, which know i and j beforehand, find their places by sums.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stack {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Outputs of the longest tile, down and across.
    pub(super) tile: (usize, usize),
    /// From one row to the next: an odd number, lest the rows of a matrix, a power of two apart, share a few sets of the L1 cache.
    row_len: usize,
    /// From one matrix to the next, of an odd number of rows, lest matrices are a multiple of 4 KiB apart.
    matrix_len: usize,
    /// From matrix (i, j) to (i + 1, j).
    line_len: usize,
}

impl Stack {
    pub(super) fn new(tile: (usize, usize), rows: usize, cols: usize) -> Self {
        let row_len = cols.div_ceil(LANES) | 1;
        let matrix_len = (rows | 1) * row_len;
        Stack { rows, cols, tile, row_len, matrix_len, line_len: Along::Points.count(tile.1) * matrix_len }
    }

    pub(super) fn len(&self) -> usize {
        Along::Points.count(self.tile.0) * self.line_len * LANES
    }

    /// The index of an element of matrix `q`.
    fn index(&self, q: usize, row: usize, col: usize) -> usize {
        (q * self.matrix_len + row * self.row_len) * LANES + col
    }

    /// A block of matrix `q`.
    fn block<'a, T>(&self, data: &'a [T], q: usize, rows: Range<usize>, cols: Range<usize>) -> Mat<'a, T> {
        Mat::new(&data[self.index(q, rows.start, cols.start)..], rows.len(), cols.len(), self.row_len * LANES)
    }

    /// The first `cols` columns of some rows of matrix `q`.
    fn block_mut<'a, T>(&self, data: &'a mut [T], q: usize, rows: Range<usize>, cols: usize) -> MatMut<'a, T> {
        MatMut::new(&mut data[self.index(q, rows.start, 0)..], rows.len(), cols, self.row_len * LANES)
    }

    /// Which of the data's vectors begins at column `col`, a multiple of [`LANES`], of row `row` in matrix (i, j).
    #[inline(always)]
    pub(super) fn at(&self, i: usize, j: usize, row: usize, col: usize) -> usize {
        i * self.line_len + j * self.matrix_len + row * self.row_len + col / LANES
    }
}

/// The matrices of transformed filters, in the panels that the products take: what stays the same over many of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct FilterPanels {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Outputs of the longest tile, down and across.
    pub(super) tile: (usize, usize),
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

    /// Matrices.
    pub(super) fn count(&self) -> usize {
        Along::Points.count(self.tile.0) * Along::Points.count(self.tile.1)
    }

    /// The number of matrix (i, j).
    pub(super) fn index(&self, i: usize, j: usize) -> usize {
        i * Along::Points.count(self.tile.1) + j
    }

    pub(super) fn len(&self) -> usize {
        self.count() * self.panels() * self.panel()
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
    let (down, across) = order.span();
    let rows = move |q: usize| (q, order.rows(q / across, q % across));
    (0..down * across).map(rows).filter(|(_, rows)| !rows.is_empty())
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

/// `C_q = A_q[rows, a_cols]^T . B_q[rows, b_cols]`, or added to it, for all `q` that tiles have: sums over them, the rows. Both
/// operands change with every group of tiles, so there is nothing to prepare.
pub(super) fn multiply_transposed<T: Element>(
    accum: Accum,
    order: &Order,
    (a_stack, a, a_cols): (&Stack, &[T], Range<usize>),
    (b_stack, b, b_cols): (&Stack, &[T], Range<usize>),
    (c_stack, c): (&Stack, &mut [T]),
) {
    let ours = transposed::pay::<T>();
    // Whole vectors, as above.
    let width = if ours { b_cols.len().next_multiple_of(LANES) } else { b_cols.len() };
    let b_cols = b_cols.start..b_cols.start + width;
    let mut products = products(order).peekable();
    while let Some((q, rows)) = products.next() {
        let a = a_stack.block(a, q, rows.clone(), a_cols.clone());
        let c = c_stack.block_mut(c, q, 0..a_cols.len(), width);
        let next = products.peek().map_or(&[][..], |(q, rows)| &b[b_stack.index(*q, rows.start, b_cols.start)..]);
        let b = b_stack.block(b, q, rows, b_cols.clone());
        if ours {
            transposed::multiply(accum, a, b, next, c);
        } else {
            gemm(accum, T::one(), a.t(), b, c);
        }
    }
}
