//! Level 3. The small linear maps of Winograd's F(4x4, 3x3).
//!
//! `B`, `A` and `G` are those of Lavin & Gray 2015 (arXiv 1509.09308), section 4.2; each map has its adjoint beside it. `G`
//! takes the values of a filter, as a polynomial, at the points 0, 1, -1, 2, -2 and infinity. At the end of an axis a tile may
//! have fewer outputs, 3 or 2 of them, for which the first 4 or 3 points and infinity are enough: its `B` and `A` are those of
//! Toom and Cook for these points, `B` scaled by what `G` divides by for the points left out, so that filters stay as they are.

use crate::element::Element;
use crate::simd::{Aligned, LANES, Lanes};

/// Side of an output tile, and of the pixels it sees.
pub(in crate::ops::conv) const TILE: usize = 4;
pub(super) const SPAN: usize = 6;

/// What lies along an axis of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Along {
    /// The pixels that it sees.
    Pixels,
    /// Values at the points 0, 1, -1, 2, -2 and infinity.
    Points,
    Outputs,
    /// The cells of a filter.
    Cells,
}

impl Along {
    /// Whether a tile with so many outputs along the axis has the element `index` of six.
    #[inline(always)]
    pub(super) fn has(self, outputs: usize, index: usize) -> bool {
        match self {
            Along::Pixels => index < outputs + 2,
            Along::Points => index <= outputs || index + 1 == SPAN,
            Along::Outputs => index < outputs,
            Along::Cells => index < 3,
        }
    }
}

/// A linear map along one axis of a tile with 4, 3 or 2 outputs. What the tile does not have of six elements is neither read
/// nor of any meaning.
pub(super) trait Map {
    const FROM: Along;
    const TO: Along;

    fn apply<T: Element, const OUTPUTS: usize>(from: [T; SPAN]) -> [T; SPAN];
}

/// `B^T d`
pub(super) struct Input;

impl Map for Input {
    const FROM: Along = Along::Pixels;
    const TO: Along = Along::Points;

    #[inline(always)]
    fn apply<T: Element, const OUTPUTS: usize>(d: [T; SPAN]) -> [T; SPAN] {
        let [zero, two, three, four, five] = [0.0, 2.0, 3.0, 4.0, 5.0].map(T::of);
        match OUTPUTS {
            TILE => [
                four * d[0] - five * d[2] + d[4],
                (d[4] - four * d[2]) + (d[3] - four * d[1]),
                (d[4] - four * d[2]) - (d[3] - four * d[1]),
                (d[4] - d[2]) + two * (d[3] - d[1]),
                (d[4] - d[2]) - two * (d[3] - d[1]),
                four * d[1] - five * d[3] + d[5],
            ],
            3 => {
                let (d02, d13, d31) = (d[0] - d[2], d[1] - d[3], d[3] - d[1]);
                [
                    four * d02 - two * d13,
                    three * ((d[3] - d[2]) - two * d[1]),
                    (d[3] + two * d[1]) - three * d[2],
                    four * d31,
                    zero,
                    (d[4] - d[2]) - two * d31,
                ]
            }
            _ => [four * (d[0] - d[2]), -(three * (d[1] + d[2])), three * (d[1] - d[2]), zero, zero, d[3] - d[1]],
        }
    }
}

/// `B v`, the adjoint of [`Input`].
pub(super) struct InputAdjoint;

impl Map for InputAdjoint {
    const FROM: Along = Along::Points;
    const TO: Along = Along::Pixels;

    #[inline(always)]
    fn apply<T: Element, const OUTPUTS: usize>(v: [T; SPAN]) -> [T; SPAN] {
        let [zero, two, three, four, five] = [0.0, 2.0, 3.0, 4.0, 5.0].map(T::of);
        match OUTPUTS {
            TILE => {
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
            3 => {
                let (v1, odd) = (three * v[1], two * (v[5] - v[0]));
                [
                    four * v[0],
                    (odd - four * v[3]) + two * (v[2] - v1),
                    -(four * v[0]) - (v1 + three * v[2]) - v[5],
                    (four * v[3] - odd) + (v1 + v[2]),
                    v[5],
                    zero,
                ]
            }
            _ => [four * v[0], three * (v[2] - v[1]) - v[5], -(four * v[0]) - three * (v[1] + v[2]), v[5], zero, zero],
        }
    }
}

/// `A^T m`
pub(super) struct Output;

impl Map for Output {
    const FROM: Along = Along::Points;
    const TO: Along = Along::Outputs;

    #[inline(always)]
    fn apply<T: Element, const OUTPUTS: usize>(m: [T; SPAN]) -> [T; SPAN] {
        let [zero, two, four, eight] = [0.0, 2.0, 4.0, 8.0].map(T::of);
        let (s12, d12) = (m[1] + m[2], m[1] - m[2]);
        match OUTPUTS {
            TILE => {
                let (s34, d34) = (m[3] + m[4], m[3] - m[4]);
                [m[0] + s12 + s34, d12 + two * d34, s12 + four * s34, d12 + eight * d34 + m[5], zero, zero]
            }
            3 => [(m[0] + s12) + m[3], d12 + two * m[3], (s12 + four * m[3]) + m[5], zero, zero, zero],
            _ => [m[0] + s12, d12 + m[5], zero, zero, zero, zero],
        }
    }
}

/// `A y`, the adjoint of [`Output`].
pub(super) struct OutputAdjoint;

impl Map for OutputAdjoint {
    const FROM: Along = Along::Outputs;
    const TO: Along = Along::Points;

    #[inline(always)]
    fn apply<T: Element, const OUTPUTS: usize>(y: [T; SPAN]) -> [T; SPAN] {
        let [zero, two, four, eight] = [0.0, 2.0, 4.0, 8.0].map(T::of);
        match OUTPUTS {
            TILE => {
                let (even, odd) = (y[0] + y[2], y[1] + y[3]);
                let (even4, odd8) = (y[0] + four * y[2], two * y[1] + eight * y[3]);
                [y[0], even + odd, even - odd, even4 + odd8, even4 - odd8, y[3]]
            }
            3 => {
                let even = y[0] + y[2];
                [y[0], even + y[1], even - y[1], (y[0] + two * y[1]) + four * y[2], zero, y[2]]
            }
            _ => [y[0], y[0] + y[1], y[0] - y[1], zero, zero, y[1]],
        }
    }
}

/// `G g`: for tiles of 4 outputs, whose points include those of all others.
pub(super) struct Filter;

impl Map for Filter {
    const FROM: Along = Along::Cells;
    const TO: Along = Along::Points;

    #[inline(always)]
    fn apply<T: Element, const OUTPUTS: usize>(g: [T; SPAN]) -> [T; SPAN] {
        let (quarter, sixth) = (T::of(0.25), T::of(1.0 / 6.0));
        let (twelfth, twenty_fourth) = (T::of(1.0 / 12.0), T::of(1.0 / 24.0));
        let (even, even24) = (sixth * (g[0] + g[2]), twenty_fourth * g[0] + sixth * g[2]);
        [
            quarter * g[0],
            -even - sixth * g[1],
            sixth * g[1] - even,
            even24 + twelfth * g[1],
            even24 - twelfth * g[1],
            g[2],
        ]
    }
}

/// `G^T u`, the adjoint of [`Filter`].
pub(super) struct FilterAdjoint;

impl Map for FilterAdjoint {
    const FROM: Along = Along::Points;
    const TO: Along = Along::Cells;

    #[inline(always)]
    fn apply<T: Element, const OUTPUTS: usize>(u: [T; SPAN]) -> [T; SPAN] {
        let (quarter, sixth, zero) = (T::of(0.25), T::of(1.0 / 6.0), T::zero());
        let (twelfth, twenty_fourth) = (T::of(1.0 / 12.0), T::of(1.0 / 24.0));
        let (s12, d21, s34, d34) = (u[1] + u[2], u[2] - u[1], u[3] + u[4], u[3] - u[4]);
        [
            quarter * u[0] - sixth * s12 + twenty_fourth * s34,
            sixth * d21 + twelfth * d34,
            sixth * (s34 - s12) + u[5],
            zero,
            zero,
            zero,
        ]
    }
}

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
    // The usual tile by itself: its loops are unrolled.
    if outputs == (TILE, TILE) {
        columns::<M, T, TILE>(half, TILE, &load);
        return rows::<M, T, TILE>(half, TILE, &mut store);
    }
    match outputs.0 {
        TILE => columns::<M, T, TILE>(half, outputs.1, &load),
        3 => columns::<M, T, 3>(half, outputs.1, &load),
        _ => columns::<M, T, 2>(half, outputs.1, &load),
    }
    match outputs.1 {
        TILE => rows::<M, T, TILE>(half, outputs.0, &mut store),
        3 => rows::<M, T, 3>(half, outputs.0, &mut store),
        _ => rows::<M, T, 2>(half, outputs.0, &mut store),
    }
}

/// The first half: the columns of a tile with `DOWN` outputs down and `across` across.
#[inline(always)]
fn columns<M: Map, T: Element, const DOWN: usize>(
    Half(Aligned(half)): &mut Half<T>,
    across: usize,
    load: &impl Fn(usize, usize) -> Lanes<T>,
) {
    // Loops instead of iterators: a function of its own would not be compiled for the processor at hand.
    for j in 0..SPAN {
        if M::FROM.has(across, j) {
            let mut column = [[T::zero(); LANES]; SPAN];
            for i in 0..SPAN {
                if M::FROM.has(DOWN, i) {
                    column[i] = load(i, j);
                }
            }
            let transformed = transform_lanes::<M, T, DOWN>(&column);
            for i in 0..SPAN {
                if M::TO.has(DOWN, i) {
                    half[i][j] = transformed[i];
                }
            }
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
    for i in 0..SPAN {
        if M::TO.has(down, i) {
            let row = transform_lanes::<M, T, ACROSS>(&half[i]);
            for j in 0..SPAN {
                if M::TO.has(ACROSS, j) {
                    store(i, j, row[j]);
                }
            }
        }
    }
}

/// Applies a map to vectors, lane by lane.
#[inline(always)]
fn transform_lanes<M: Map, T: Element, const OUTPUTS: usize>(from: &[Lanes<T>; SPAN]) -> [Lanes<T>; SPAN] {
    let mut to = [[T::zero(); LANES]; SPAN];
    for lane in 0..LANES {
        let mut one = [T::zero(); SPAN];
        for i in 0..SPAN {
            if M::FROM.has(OUTPUTS, i) {
                one[i] = from[i][lane];
            }
        }
        let one = M::apply::<T, OUTPUTS>(one);
        for i in 0..SPAN {
            if M::TO.has(OUTPUTS, i) {
                to[i][lane] = one[i];
            }
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `y_k = sum of g_i d_(k+i)`, and the adjoint of every map is its transpose.
    #[test]
    fn maps_along_an_axis_are_those_of_a_convolution() {
        fn matrix<M: Map, const OUTPUTS: usize>() -> [[f64; SPAN]; SPAN] {
            let column = |j| M::apply::<f64, OUTPUTS>(std::array::from_fn(|i| if i == j { 1.0 } else { 0.0 }));
            let columns: [_; SPAN] = std::array::from_fn(column);
            std::array::from_fn(|i| {
                std::array::from_fn(
                    |j| {
                        if M::TO.has(OUTPUTS, i) && M::FROM.has(OUTPUTS, j) { columns[j][i] } else { 0.0 }
                    },
                )
            })
        }
        fn check<const OUTPUTS: usize>() {
            let (input, output, filter) =
                (matrix::<Input, OUTPUTS>(), matrix::<Output, OUTPUTS>(), matrix::<Filter, OUTPUTS>());
            for (k, i, pixel) in (0..SPAN * 3 * SPAN).map(|at| (at / (3 * SPAN), at / SPAN % 3, at % SPAN)) {
                let got: f64 = (0..SPAN).map(|q| output[k][q] * filter[q][i] * input[q][pixel]).sum();
                let want = if k < OUTPUTS && pixel == k + i { 1.0 } else { 0.0 };
                assert!((got - want).abs() < 1e-14, "{OUTPUTS} outputs: y_{k}, g_{i}, d_{pixel}: {got}");
            }
            for (map, adjoint) in [
                (input, matrix::<InputAdjoint, OUTPUTS>()),
                (output, matrix::<OutputAdjoint, OUTPUTS>()),
                (filter, matrix::<FilterAdjoint, OUTPUTS>()),
            ] {
                for (i, j) in (0..SPAN * SPAN).map(|at| (at / SPAN, at % SPAN)) {
                    assert!((map[i][j] - adjoint[j][i]).abs() < 1e-15, "{OUTPUTS} outputs: {i}, {j}");
                }
            }
        }
        check::<4>();
        check::<3>();
        check::<2>();
    }
}
