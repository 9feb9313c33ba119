//! Level 3. The small linear maps of Winograd's F(m x m, 3x3), for m from 2 to 6, along one axis.
//!
//! They are those of Toom and Cook (Lavin & Gray 2015, arXiv 1509.09308, section 4.2, has m = 4); each map has its adjoint beside
//! it. `G` takes the values of a filter, as a polynomial, at the points infinity, 0, 1, -1, 2, -2, 1/2 and -1/2. A tile with m
//! outputs along an axis has the first m + 2 of them: what differs between tiles are `B` and `A`, while filters stay as they are.

mod input;

use crate::element::Element;
pub(super) use input::{Input, InputAdjoint};

/// Side of the largest output tile, and of the largest where few tiles are to take few points.
pub(in crate::ops::conv) const MOST: usize = 6;
pub(in crate::ops::conv) const SHORTER: usize = 4;

/// Points, and pixels that the largest tile sees.
pub(super) const SPAN: usize = MOST + 2;

/// What lies along an axis of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Along {
    /// The pixels that it sees.
    Pixels,
    /// Values at the points.
    Points,
    Outputs,
    /// The cells of a filter.
    Cells,
}

impl Along {
    /// How many a tile with so many outputs along the axis has.
    #[inline(always)]
    pub(super) const fn count(self, outputs: usize) -> usize {
        match self {
            Along::Pixels | Along::Points => outputs + 2,
            Along::Outputs => outputs,
            Along::Cells => 3,
        }
    }
}

/// A linear map along one axis of a tile with 2 to [`MOST`] outputs. What the tile does not have of [`SPAN`] elements is
/// zero in what is mapped, and has no meaning in what comes of it.
pub(super) trait Map {
    const FROM: Along;
    const TO: Along;

    fn apply<T: Element, const OUTPUTS: usize>(from: [T; SPAN]) -> [T; SPAN];
}

/// Values at the points: at 1, 2 and 1/2 the sum of an even and an odd part, at their negatives the difference.
#[inline(always)]
fn at_points<T: Element>(infinite: T, at_0: T, [one, two, half]: [(T, T); 3]) -> [T; SPAN] {
    [infinite, at_0, one.0 + one.1, one.0 - one.1, two.0 + two.1, two.0 - two.1, half.0 + half.1, half.0 - half.1]
}

/// `A^T m`
pub(super) struct Output;

impl Map for Output {
    const FROM: Along = Along::Points;
    const TO: Along = Along::Outputs;

    #[inline(always)]
    fn apply<T: Element, const OUTPUTS: usize>(m: [T; SPAN]) -> [T; SPAN] {
        let [zero, two, four, eight] = [0.0, 2.0, 4.0, 8.0].map(T::of);
        let [half, quarter, eighth] = [0.5, 0.25, 0.125].map(T::of);
        let [sixteen, sixteenth] = [16.0, 0.0625].map(T::of);
        let (infinite, s1, d1) = (m[0], m[2] + m[3], m[2] - m[3]);
        let (s2, d2) = (m[4] + m[5], m[4] - m[5]);
        match OUTPUTS {
            MOST => {
                let (s_half, d_half) = (m[6] + m[7], m[6] - m[7]);
                [
                    (m[1] + s1) + (s2 + s_half),
                    d1 + (two * d2 + half * d_half),
                    s1 + (four * s2 + quarter * s_half),
                    d1 + (eight * d2 + eighth * d_half),
                    s1 + (sixteen * s2 + sixteenth * s_half),
                    (d1 + infinite) + (T::of(32.0) * d2 + T::of(0.03125) * d_half),
                    zero,
                    zero,
                ]
            }
            5 => [
                (m[1] + s1) + (s2 + m[6]),
                d1 + (two * d2 + half * m[6]),
                s1 + (four * s2 + quarter * m[6]),
                d1 + (eight * d2 + eighth * m[6]),
                (s1 + infinite) + (sixteen * s2 + sixteenth * m[6]),
                zero,
                zero,
                zero,
            ],
            4 => [m[1] + s1 + s2, d1 + two * d2, s1 + four * s2, d1 + eight * d2 + infinite, zero, zero, zero, zero],
            3 => [(m[1] + s1) + m[4], d1 + two * m[4], (s1 + infinite) + four * m[4], zero, zero, zero, zero, zero],
            _ => [m[1] + s1, d1 + infinite, zero, zero, zero, zero, zero, zero],
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
        let [half, quarter, eighth] = [0.5, 0.25, 0.125].map(T::of);
        let [sixteen, sixteenth] = [16.0, 0.0625].map(T::of);
        match OUTPUTS {
            MOST => {
                let (even1, odd1) = ((y[0] + y[2]) + y[4], (y[1] + y[3]) + y[5]);
                let even2 = (y[0] + four * y[2]) + sixteen * y[4];
                let odd2 = (two * y[1] + eight * y[3]) + T::of(32.0) * y[5];
                let even_half = (y[0] + quarter * y[2]) + sixteenth * y[4];
                let odd_half = (half * y[1] + eighth * y[3]) + T::of(0.03125) * y[5];
                at_points(y[5], y[0], [(even1, odd1), (even2, odd2), (even_half, odd_half)])
            }
            5 => {
                let (even1, odd1) = ((y[0] + y[2]) + y[4], y[1] + y[3]);
                let (even2, odd2) = ((y[0] + four * y[2]) + sixteen * y[4], two * y[1] + eight * y[3]);
                let even_half = (y[0] + quarter * y[2]) + sixteenth * y[4];
                let at_half = even_half + (half * y[1] + eighth * y[3]);
                [y[4], y[0], even1 + odd1, even1 - odd1, even2 + odd2, even2 - odd2, at_half, zero]
            }
            4 => {
                let (even1, odd1) = (y[0] + y[2], y[1] + y[3]);
                let (even2, odd2) = (y[0] + four * y[2], two * y[1] + eight * y[3]);
                at_points(y[3], y[0], [(even1, odd1), (even2, odd2), (zero, zero)])
            }
            3 => {
                let even1 = y[0] + y[2];
                let at_2 = (y[0] + two * y[1]) + four * y[2];
                [y[2], y[0], even1 + y[1], even1 - y[1], at_2, zero, zero, zero]
            }
            _ => [y[1], y[0], y[0] + y[1], y[0] - y[1], zero, zero, zero, zero],
        }
    }
}

/// `G g`: the same at the points of tiles with any number of outputs.
pub(super) struct Filter;

impl Map for Filter {
    const FROM: Along = Along::Cells;
    const TO: Along = Along::Points;

    #[inline(always)]
    fn apply<T: Element, const OUTPUTS: usize>(g: [T; SPAN]) -> [T; SPAN] {
        let [sixth, twelfth, twenty_fourth] = [1.0 / 6.0, 1.0 / 12.0, 1.0 / 24.0].map(T::of);
        let [a, b, c] = [32.0 / 45.0, 16.0 / 45.0, 8.0 / 45.0].map(T::of);
        let one = (-(sixth * (g[0] + g[2])), -(sixth * g[1]));
        let two = (twenty_fourth * g[0] + sixth * g[2], twelfth * g[1]);
        let half = (a * g[0] + c * g[2], b * g[1]);
        at_points(g[2], T::of(0.25) * g[0], [one, two, half])
    }
}

/// `G^T u`, the adjoint of [`Filter`].
pub(super) struct FilterAdjoint;

impl Map for FilterAdjoint {
    const FROM: Along = Along::Points;
    const TO: Along = Along::Cells;

    #[inline(always)]
    fn apply<T: Element, const OUTPUTS: usize>(u: [T; SPAN]) -> [T; SPAN] {
        let [zero, quarter, sixth, twelfth, twenty_fourth] = [0.0, 0.25, 1.0 / 6.0, 1.0 / 12.0, 1.0 / 24.0].map(T::of);
        let [a, b, c] = [32.0 / 45.0, 16.0 / 45.0, 8.0 / 45.0].map(T::of);
        let (s1, d1, s2, d2) = (u[2] + u[3], u[2] - u[3], u[4] + u[5], u[4] - u[5]);
        let four =
            [quarter * u[1] - sixth * s1 + twenty_fourth * s2, twelfth * d2 - sixth * d1, sixth * (s2 - s1) + u[0]];
        let [g0, g1, g2] = match OUTPUTS {
            MOST => {
                let (s_half, d_half) = (u[6] + u[7], u[6] - u[7]);
                [four[0] + a * s_half, four[1] + b * d_half, four[2] + c * s_half]
            }
            5 => [four[0] + a * u[6], four[1] + b * u[6], four[2] + c * u[6]],
            _ => four,
        };
        [g0, g1, g2, zero, zero, zero, zero, zero]
    }
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
                std::array::from_fn(|j| {
                    if i < M::TO.count(OUTPUTS) && j < M::FROM.count(OUTPUTS) { columns[j][i] } else { 0.0 }
                })
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
        check::<6>();
        check::<5>();
        check::<4>();
        check::<3>();
        check::<2>();
    }
}
