//! Level 3. Winograd's maps applied to both axes of a tile, many channels at once.

use super::maps::{MOST, Map, SPAN};
use crate::element::Element;
use crate::simd::{Aligned, LANES, Lanes};

/// Matrices of vectors between the two halves of [`transform_2d`]: kept by whoever calls it many times, since clearing one
/// takes as long as a third of a transform.
pub(super) struct Half<T>(Aligned<[[Lanes<T>; SPAN]; SPAN]>);

impl<T: Element> Half<T> {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Half(Aligned([[[T::zero(); LANES]; SPAN]; SPAN]))
    }
}

/// Applies a map to the columns, then to the rows, of a matrix of vectors whose element (i, j) is `load(i, j)`, and hands
/// element (i, j) of the result to `store`. `outputs` are those of the tile, down and across.
#[inline(always)]
pub(super) fn transform_2d<M: Map, T: Element>(
    half: &mut Half<T>,
    outputs: (usize, usize),
    load: impl Fn(usize, usize) -> Lanes<T>,
    mut store: impl FnMut(usize, usize, Lanes<T>),
) {
    // The usual tiles by themselves: their loops are unrolled.
    match outputs {
        (MOST, MOST) => return square::<M, T, MOST>(half, &load, &mut store),
        (5, 5) => return square::<M, T, 5>(half, &load, &mut store),
        (4, 4) => return square::<M, T, 4>(half, &load, &mut store),
        _ => {}
    }
    match outputs.0 {
        MOST => columns::<M, T, MOST>(half, outputs.1, &load),
        5 => columns::<M, T, 5>(half, outputs.1, &load),
        4 => columns::<M, T, 4>(half, outputs.1, &load),
        3 => columns::<M, T, 3>(half, outputs.1, &load),
        _ => columns::<M, T, 2>(half, outputs.1, &load),
    }
    match outputs.1 {
        MOST => rows::<M, T, MOST>(half, outputs.0, &mut store),
        5 => rows::<M, T, 5>(half, outputs.0, &mut store),
        4 => rows::<M, T, 4>(half, outputs.0, &mut store),
        3 => rows::<M, T, 3>(half, outputs.0, &mut store),
        _ => rows::<M, T, 2>(half, outputs.0, &mut store),
    }
}

/// [`transform_2d`] of a tile with as many outputs down as across.
#[inline(always)]
fn square<M: Map, T: Element, const OUTPUTS: usize>(
    half: &mut Half<T>,
    load: &impl Fn(usize, usize) -> Lanes<T>,
    store: &mut impl FnMut(usize, usize, Lanes<T>),
) {
    columns::<M, T, OUTPUTS>(half, OUTPUTS, load);
    rows::<M, T, OUTPUTS>(half, OUTPUTS, store);
}

/// The first half: the columns of a tile with `DOWN` outputs down and `across` across.
#[inline(always)]
fn columns<M: Map, T: Element, const DOWN: usize>(
    Half(Aligned(half)): &mut Half<T>,
    across: usize,
    load: &impl Fn(usize, usize) -> Lanes<T>,
) {
    // Loops instead of iterators: a function of its own would not be compiled for the processor at hand.
    for j in 0..M::FROM.count(across) {
        let mut column = [[T::zero(); LANES]; SPAN];
        for i in 0..M::FROM.count(DOWN) {
            column[i] = load(i, j);
        }
        let transformed = transform_lanes::<M, T, DOWN>(&column);
        for i in 0..M::TO.count(DOWN) {
            half[i][j] = transformed[i];
        }
    }
}

/// The second half: the rows.
#[inline(always)]
fn rows<M: Map, T: Element, const ACROSS: usize>(
    Half(Aligned(half)): &Half<T>,
    down: usize,
    store: &mut impl FnMut(usize, usize, Lanes<T>),
) {
    for i in 0..M::TO.count(down) {
        let row = transform_lanes::<M, T, ACROSS>(&half[i]);
        for j in 0..M::TO.count(ACROSS) {
            store(i, j, row[j]);
        }
    }
}

/// Applies a map to vectors, lane by lane.
#[inline(always)]
fn transform_lanes<M: Map, T: Element, const OUTPUTS: usize>(from: &[Lanes<T>; SPAN]) -> [Lanes<T>; SPAN] {
    let mut to = [[T::zero(); LANES]; SPAN];
    for lane in 0..LANES {
        let mut one = [T::zero(); SPAN];
        for i in 0..M::FROM.count(OUTPUTS) {
            one[i] = from[i][lane];
        }
        let one = M::apply::<T, OUTPUTS>(one);
        for i in 0..M::TO.count(OUTPUTS) {
            to[i][lane] = one[i];
        }
    }
    to
}
