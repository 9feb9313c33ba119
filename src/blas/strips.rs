//! Level 2. How our own products go through C: strips of columns, and in each blocks of rows that are kept in the vector registers.

use pulp::Simd;

use super::{Accum, Mat, MatMut, add_terms, load_block, store_block};
use crate::simd::{Ahead, Share, with_count};

/// How rows of C are cut into blocks, and what of a strip's next one is fetched at every step of each: the same for all strips of
/// some terms, because divisions take as long as a few steps.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    blocks: usize,
    /// Rows of a block; of the first `taller` one more.
    height: usize,
    taller: usize,
    share: Share,
}

impl Cut {
    /// `rows` rows in blocks of at most `most` and of as even height as possible: a block of few rows keeps the adders waiting for
    /// each other. `share(blocks)` is what so many of them fetch.
    #[inline(always)]
    pub(super) fn new(rows: usize, most: usize, share: impl FnOnce(usize) -> Share) -> Self {
        let blocks = rows.div_ceil(most).max(1);
        Cut { blocks, height: rows / blocks, taller: rows % blocks, share: share(blocks) }
    }
}

/// `C <- A B`, or added to it, in strips of `V` vectors, and of one where fewer are left; of blocks of `R` rows at most, as `cut` has
/// them. C has whole vectors, `TRANSPOSED` is whether A is. `next(end)` is where the rows of B begin that are wanted after the strip
/// that ends with column `end`, and need not be there.
#[inline(always)]
pub(super) fn multiply<S: Simd, const V: usize, const R: usize, const TRANSPOSED: bool>(
    simd: S,
    accum: Accum,
    (a, b): (Mat<'_, f32>, Mat<'_, f32>),
    c: &mut MatMut<'_, f32>,
    cut: Cut,
    next: impl Fn(usize) -> *const f32,
) {
    let mut column = 0;
    while column < c.cols {
        if column + V * S::F32_LANES <= c.cols {
            let end = column + V * S::F32_LANES;
            strip::<S, V, R, TRANSPOSED>(simd, accum, (a, b), column, c, (cut, next(end)));
            column = end;
        } else {
            let end = column + S::F32_LANES;
            strip::<S, 1, R, TRANSPOSED>(simd, accum, (a, b), column, c, (cut, next(end)));
            column = end;
        }
    }
}

/// The columns of C from `column` on, `V` vectors of them.
#[inline(always)]
fn strip<S: Simd, const V: usize, const R: usize, const TRANSPOSED: bool>(
    simd: S,
    accum: Accum,
    (a, b): (Mat<'_, f32>, Mat<'_, f32>),
    column: usize,
    c: &mut MatMut<'_, f32>,
    (cut, next): (Cut, *const f32),
) {
    let mut row = 0;
    for index in 0..cut.blocks {
        let ahead = Ahead::new([next], cut.share, index);
        let height = cut.height + usize::from(index < cut.taller);
        with_count!(simd, height, R, |H| block::<S, V, H, TRANSPOSED>(simd, accum, (a, b, ahead), (row, column), c));
        row += height;
    }
}

/// `R` rows and `V` vectors of C from `at` on; what comes next is fetched meanwhile.
#[inline(always)]
fn block<S: Simd, const V: usize, const R: usize, const TRANSPOSED: bool>(
    simd: S,
    accum: Accum,
    (a, b, ahead): (Mat<'_, f32>, Mat<'_, f32>, Ahead<1>),
    at: (usize, usize),
    c: &mut MatMut<'_, f32>,
) {
    let sums = match accum {
        Accum::Replace => [[simd.splat_f32s(0.0); V]; R],
        Accum::Add => load_block(simd, c, at),
    };
    let sums = add_terms::<S, V, R, TRANSPOSED>(simd, sums, (a, at.0), (b, at.1), ahead);
    store_block::<S, V, R>(c, at, &sums);
}
