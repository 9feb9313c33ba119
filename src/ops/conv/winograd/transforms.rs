//! Level 3. The small linear maps of Winograd's F(4x4, 3x3), and the matrices that they fill.
//!
//! `B`, `A` and `G` are those of Lavin & Gray 2015 (arXiv 1509.09308), section 4.2; each map has its adjoint beside it.

use std::ops::Range;

use crate::blas::panels::{self, PANEL, Panels, Right, panel_len};
use crate::blas::{Accum, Mat, MatMut, gemm};
use crate::element::Element;
use crate::simd::{Aligned, LANES, Lanes};

/// Side of an output tile, and of the pixels it sees.
pub(in crate::ops::conv) const TILE: usize = 4;
pub(super) const SPAN: usize = 6;
/// Elements of a transformed tile: the number of products.
pub(in crate::ops::conv) const PRODUCTS: usize = SPAN * SPAN;

/// `B^T d`
#[inline(always)]
pub(super) fn input_1d<T: Element>(d: [T; 6]) -> [T; 6] {
    let (two, four, five) = (T::of(2.0), T::of(4.0), T::of(5.0));
    [
        four * d[0] - five * d[2] + d[4],
        (d[4] - four * d[2]) + (d[3] - four * d[1]),
        (d[4] - four * d[2]) - (d[3] - four * d[1]),
        (d[4] - d[2]) + two * (d[3] - d[1]),
        (d[4] - d[2]) - two * (d[3] - d[1]),
        four * d[1] - five * d[3] + d[5],
    ]
}

/// `B v`, the adjoint of [`input_1d`].
#[inline(always)]
pub(super) fn input_adjoint_1d<T: Element>(v: [T; 6]) -> [T; 6] {
    let (two, four, five) = (T::of(2.0), T::of(4.0), T::of(5.0));
    let (s12, d12, s34, d34) = (v[1] + v[2], v[1] - v[2], v[3] + v[4], v[3] - v[4]);
    [
        four * v[0],
        four * v[5] - four * d12 - two * d34,
        -five * v[0] - four * s12 - s34,
        d12 + two * d34 - five * v[5],
        v[0] + s12 + s34,
        v[5],
    ]
}

/// `A^T m`
#[inline(always)]
pub(super) fn output_1d<T: Element>(m: [T; 6]) -> [T; 4] {
    let (two, four, eight) = (T::of(2.0), T::of(4.0), T::of(8.0));
    let (s12, d12, s34, d34) = (m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]);
    [m[0] + s12 + s34, d12 + two * d34, s12 + four * s34, d12 + eight * d34 + m[5]]
}

/// `A y`, the adjoint of [`output_1d`].
#[inline(always)]
pub(super) fn output_adjoint_1d<T: Element>(y: [T; 4]) -> [T; 6] {
    let (two, four, eight) = (T::of(2.0), T::of(4.0), T::of(8.0));
    let (even, odd) = (y[0] + y[2], y[1] + y[3]);
    let (even4, odd8) = (y[0] + four * y[2], two * y[1] + eight * y[3]);
    [y[0], even + odd, even - odd, even4 + odd8, even4 - odd8, y[3]]
}

/// `G g`
#[inline(always)]
pub(super) fn filter_1d<T: Element>(g: [T; 3]) -> [T; 6] {
    let (quarter, sixth) = (T::of(0.25), T::of(1.0 / 6.0));
    let (twelfth, twenty_fourth) = (T::of(1.0 / 12.0), T::of(1.0 / 24.0));
    let (even, even24) = (sixth * (g[0] + g[2]), twenty_fourth * g[0] + sixth * g[2]);
    [quarter * g[0], -even - sixth * g[1], sixth * g[1] - even, even24 + twelfth * g[1], even24 - twelfth * g[1], g[2]]
}

/// `G^T u`, the adjoint of [`filter_1d`].
#[inline(always)]
pub(super) fn filter_adjoint_1d<T: Element>(u: [T; 6]) -> [T; 3] {
    let (quarter, sixth) = (T::of(0.25), T::of(1.0 / 6.0));
    let (twelfth, twenty_fourth) = (T::of(1.0 / 12.0), T::of(1.0 / 24.0));
    let (s12, d21, s34, d34) = (u[1] + u[2], u[2] - u[1], u[3] + u[4], u[3] - u[4]);
    [quarter * u[0] - sixth * s12 + twenty_fourth * s34, sixth * d21 + twelfth * d34, sixth * (s34 - s12) + u[5]]
}

/// Matrices of vectors between the two halves of [`transform_2d`]: kept by whoever calls it many times, since clearing one
/// takes as long as a third of a transform.
pub(super) struct Half<T, const I: usize, const O: usize>(Aligned<[[Lanes<T>; I]; O]>);

impl<T: Element, const I: usize, const O: usize> Half<T, I, O> {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Half(Aligned([[[T::zero(); LANES]; I]; O]))
    }
}

/// Applies a one-dimensional transform to the columns, then to the rows, of an `I x I` matrix of vectors whose element
/// (i, j) is `load(i, j)`, and hands element (i, j) of the `O x O` result to `store`.
#[inline(always)]
pub(super) fn transform_2d<T: Element, const I: usize, const O: usize>(
    Half(Aligned(half)): &mut Half<T, I, O>,
    load: impl Fn(usize, usize) -> Lanes<T>,
    transform: impl Fn([T; I]) -> [T; O],
    mut store: impl FnMut(usize, usize, Lanes<T>),
) {
    // Loops instead of `array::from_fn`: a function of its own would not be compiled for the processor at hand.
    for j in 0..I {
        let mut column = [[T::zero(); LANES]; I];
        for i in 0..I {
            column[i] = load(i, j);
        }
        let transformed = transform_lanes(&column, &transform);
        for i in 0..O {
            half[i][j] = transformed[i];
        }
    }
    for i in 0..O {
        let row = transform_lanes(&half[i], &transform);
        for j in 0..O {
            store(i, j, row[j]);
        }
    }
}

/// Applies a one-dimensional transform to `I` vectors, lane by lane.
#[inline(always)]
fn transform_lanes<T: Element, const I: usize, const O: usize>(
    from: &[Lanes<T>; I],
    transform: &impl Fn([T; I]) -> [T; O],
) -> [Lanes<T>; O] {
    let mut to = [[T::zero(); LANES]; O];
    for lane in 0..LANES {
        let mut one = [T::zero(); I];
        for i in 0..I {
            one[i] = from[i][lane];
        }
        let one = transform(one);
        for i in 0..O {
            to[i][lane] = one[i];
        }
    }
    to
}

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

    /// The first `rows` rows of matrix `q`.
    fn mat_mut<'a, T>(&self, data: &'a mut [T], q: usize, rows: usize, cols: usize) -> MatMut<'a, T> {
        MatMut::new(&mut data[q * self.rows_in_memory * self.ld..], rows, cols, self.ld)
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

    /// Matrix `q` from a column on, the first of a panel.
    fn matrix<'a, T>(&self, data: &'a [T], q: usize, col: usize) -> Panels<'a, T> {
        debug_assert!(col.is_multiple_of(PANEL), "column {col} is the first of a panel");
        let panel = self.panel();
        let data = &data[(q * self.panels() + col / PANEL) * panel..];
        // the same panels of the matrix after it
        let next = data.get(self.panels() * panel..).unwrap_or(&[]);
        Panels { next, ..Panels::new(data, self.rows) }
    }
}

/// `C_q = A_q . B_q[:, cols]` for all `q` and the first `rows` rows, the tiles; `cols` begin with a panel.
pub(super) fn multiply<T: Element>(
    rows: usize,
    (a_stack, a): (&Stack, &[T]),
    (b_panels, b, cols): (&FilterPanels, &[T], Range<usize>),
    (c_stack, c): (&Stack, &mut [T]),
) {
    // Whole vectors: the columns beyond the last are there, and of no use.
    let width = cols.len().next_multiple_of(LANES);
    for q in 0..PRODUCTS {
        let (a, b) = (a_stack.block(a, q, 0..rows, 0..a_stack.cols), b_panels.matrix(b, q, cols.start));
        panels::multiply(a, Right::Panels(b), c_stack.mat_mut(c, q, rows, width), false, &mut []);
    }
}

/// `C_q = A_q[rows, a_cols]^T . B_q[rows, b_cols]`, or added to it, for all `q`: sums over the tiles `rows`. Neither operand is
/// used again, so there is nothing to prepare.
pub(super) fn multiply_transposed<T: Element>(
    accum: Accum,
    rows: Range<usize>,
    (a_stack, a, a_cols): (&Stack, &[T], Range<usize>),
    (b_stack, b, b_cols): (&Stack, &[T], Range<usize>),
    (c_stack, c): (&Stack, &mut [T]),
) {
    for q in 0..PRODUCTS {
        let a = a_stack.block(a, q, rows.clone(), a_cols.clone());
        let b = b_stack.block(b, q, rows.clone(), b_cols.clone());
        gemm(accum, T::one(), a.t(), b, c_stack.mat_mut(c, q, a_cols.len(), b_cols.len()));
    }
}
