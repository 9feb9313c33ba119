//! Level 3. `B` of Winograd's transforms: from the pixels that a tile sees to the points, and the adjoint.
//!
//! Row q of `B^T` are the coefficients of the product of `x - p` over all other finite points p of the tile; of infinity, over
//! all. It is scaled by what `G` divides by at that point, and divided by what that product is there.

use super::{Along, MOST, Map, SPAN, at_points};
use crate::element::Element;

/// `B^T d`
pub(in super::super) struct Input;

impl Map for Input {
    const FROM: Along = Along::Pixels;
    const TO: Along = Along::Points;

    #[inline(always)]
    fn apply<T: Element, const OUTPUTS: usize>(d: [T; SPAN]) -> [T; SPAN] {
        match OUTPUTS {
            MOST => input_of_6(d),
            5 => input_of_5(d),
            4 => input_of_4(d),
            3 => input_of_3(d),
            _ => input_of_2(d),
        }
    }
}

/// `B v`, the adjoint of [`Input`].
pub(in super::super) struct InputAdjoint;

impl Map for InputAdjoint {
    const FROM: Along = Along::Points;
    const TO: Along = Along::Pixels;

    #[inline(always)]
    fn apply<T: Element, const OUTPUTS: usize>(v: [T; SPAN]) -> [T; SPAN] {
        match OUTPUTS {
            MOST => adjoint_of_6(v),
            5 => adjoint_of_5(v),
            4 => adjoint_of_4(v),
            3 => adjoint_of_3(v),
            _ => adjoint_of_2(v),
        }
    }
}

/// Elements of `B` for 6 and 5 outputs, beside powers of two.
const OF_6: [f64; 8] = [4.0 / 3.0, 17.0 / 3.0, 21.0, 4.0 / 15.0, 2.0 / 15.0, 21.0 / 4.0, 1.0 / 3.0, 1.0 / 15.0];
const OF_5: [f64; 2] = [2.0 / 3.0, 2.0 / 5.0];

/// `B^T` for 6 outputs.
#[inline(always)]
fn input_of_6<T: Element>(d: [T; SPAN]) -> [T; SPAN] {
    let [half, four, five] = [0.5, 4.0, 5.0].map(T::of);
    let [a, b, c, e, f, g, third, fifteenth] = OF_6.map(T::of);
    let (even1, odd1) = (a * (d[2] + d[6]) - b * d[4], a * (d[1] + d[5]) - b * d[3]);
    let even2 = (fifteenth * d[2] - third * d[4]) + e * d[6];
    let odd2 = f * ((d[1] - five * d[3]) + four * d[5]);
    let even_half = (four * d[2] - five * d[4]) + d[6];
    let odd_half = half * ((four * d[1] - five * d[3]) + d[5]);
    let (infinite, at_0) = ((d[7] - d[1]) + g * (d[3] - d[5]), four * (d[0] - d[6]) + c * (d[4] - d[2]));
    at_points(infinite, at_0, [(even1, odd1), (even2, odd2), (even_half, odd_half)])
}

/// `B^T` for 5 outputs.
#[inline(always)]
fn input_of_5<T: Element>(d: [T; SPAN]) -> [T; SPAN] {
    let [zero, half, two, four, five] = [0.0, 0.5, 2.0, 4.0, 5.0].map(T::of);
    // Four outputs of what the factor of the point 1/2 makes of the pixels.
    let e: [T; 6] = [
        d[1] - half * d[0],
        d[2] - half * d[1],
        d[3] - half * d[2],
        d[4] - half * d[3],
        d[5] - half * d[4],
        d[6] - half * d[5],
    ];
    let [a, b] = OF_5.map(T::of);
    let (even1, odd1) = (e[4] - four * e[2], e[3] - four * e[1]);
    let (even2, odd2) = (e[4] - e[2], two * (e[3] - e[1]));
    [
        (four * e[1] - five * e[3]) + e[5],
        two * ((five * e[2] - four * e[0]) - e[4]),
        two * (even1 + odd1),
        a * (odd1 - even1),
        a * (even2 + odd2),
        b * (odd2 - even2),
        (four * d[1] - five * d[3]) + d[5],
        zero,
    ]
}

/// `B^T` for 4 outputs.
#[inline(always)]
fn input_of_4<T: Element>(d: [T; SPAN]) -> [T; SPAN] {
    let [zero, two, four, five] = [0.0, 2.0, 4.0, 5.0].map(T::of);
    let (even1, odd1) = (d[4] - four * d[2], d[3] - four * d[1]);
    let (even2, odd2) = (d[4] - d[2], two * (d[3] - d[1]));
    let (infinite, at_0) = (four * d[1] - five * d[3] + d[5], four * d[0] - five * d[2] + d[4]);
    at_points(infinite, at_0, [(even1, odd1), (even2, odd2), (zero, zero)])
}

/// `B^T` for 3 outputs.
#[inline(always)]
fn input_of_3<T: Element>(d: [T; SPAN]) -> [T; SPAN] {
    let [zero, two, three, four] = [0.0, 2.0, 3.0, 4.0].map(T::of);
    let d31 = d[3] - d[1];
    [
        (d[4] - d[2]) - two * d31,
        four * (d[0] - d[2]) + two * d31,
        three * ((d[3] - d[2]) - two * d[1]),
        (d[3] + two * d[1]) - three * d[2],
        four * d31,
        zero,
        zero,
        zero,
    ]
}

/// `B^T` for 2 outputs.
#[inline(always)]
fn input_of_2<T: Element>(d: [T; SPAN]) -> [T; SPAN] {
    let [zero, three, four] = [0.0, 3.0, 4.0].map(T::of);
    [d[3] - d[1], four * (d[0] - d[2]), -(three * (d[1] + d[2])), three * (d[1] - d[2]), zero, zero, zero, zero]
}

/// `B` for 6 outputs.
#[inline(always)]
fn adjoint_of_6<T: Element>(v: [T; SPAN]) -> [T; SPAN] {
    let [half, four, five] = [0.5, 4.0, 5.0].map(T::of);
    let (infinite, at_0) = (v[0], v[1]);
    let [a, b, c, e, f, g, third, fifteenth] = OF_6.map(T::of);
    let (s1, d1, s2, d2) = (v[2] + v[3], v[2] - v[3], v[4] + v[5], f * (v[4] - v[5]));
    let (s_half, d_half) = (v[6] + v[7], half * (v[6] - v[7]));
    let (sa, da, gi) = (a * s1, a * d1, g * infinite);
    [
        four * at_0,
        (da - infinite) + (d2 + four * d_half),
        (sa - c * at_0) + (fifteenth * s2 + four * s_half),
        (gi - b * d1) - five * (d2 + d_half),
        (c * at_0 - b * s1) - (third * s2 + five * s_half),
        (da - gi) + (four * d2 + d_half),
        (sa - four * at_0) + (e * s2 + s_half),
        infinite,
    ]
}

/// `B` for 5 outputs.
#[inline(always)]
fn adjoint_of_5<T: Element>(v: [T; SPAN]) -> [T; SPAN] {
    let [zero, half, two, four, five] = [0.0, 0.5, 2.0, 4.0, 5.0].map(T::of);
    let (infinite, at_0) = (v[0], v[1]);
    let [a, b] = OF_5.map(T::of);
    let (plus1, minus1, plus2, minus2) = (two * v[2], a * v[3], a * v[4], b * v[5]);
    let (s1, d1, s2, d2) = (plus1 - minus1, plus1 + minus1, plus2 - minus2, plus2 + minus2);
    let origin = two * at_0;
    let e = [
        -(four * origin),
        four * (infinite - d1) - two * d2,
        (five * origin - four * s1) - s2,
        (d1 - five * infinite) + two * d2,
        (s1 + s2) - origin,
        infinite,
    ];
    [
        -(half * e[0]),
        (e[0] - half * e[1]) + four * v[6],
        e[1] - half * e[2],
        (e[2] - half * e[3]) - five * v[6],
        e[3] - half * e[4],
        (e[4] - half * e[5]) + v[6],
        e[5],
        zero,
    ]
}

/// `B` for 4 outputs.
#[inline(always)]
fn adjoint_of_4<T: Element>(v: [T; SPAN]) -> [T; SPAN] {
    let [zero, two, four, five] = [0.0, 2.0, 4.0, 5.0].map(T::of);
    let (infinite, at_0) = (v[0], v[1]);
    let (s1, d1, s2, d2) = (v[2] + v[3], v[2] - v[3], v[4] + v[5], v[4] - v[5]);
    [
        four * at_0,
        four * infinite - four * d1 - two * d2,
        -five * at_0 - four * s1 - s2,
        d1 + two * d2 - five * infinite,
        at_0 + s1 + s2,
        infinite,
        zero,
        zero,
    ]
}

/// `B` for 3 outputs.
#[inline(always)]
fn adjoint_of_3<T: Element>(v: [T; SPAN]) -> [T; SPAN] {
    let [zero, two, three, four] = [0.0, 2.0, 3.0, 4.0].map(T::of);
    let (infinite, at_0) = (v[0], v[1]);
    let (plus1, odd) = (three * v[2], two * (infinite - at_0));
    [
        four * at_0,
        (odd - four * v[4]) + two * (v[3] - plus1),
        -(four * at_0) - (plus1 + three * v[3]) - infinite,
        (four * v[4] - odd) + (plus1 + v[3]),
        infinite,
        zero,
        zero,
        zero,
    ]
}

/// `B` for 2 outputs.
#[inline(always)]
fn adjoint_of_2<T: Element>(v: [T; SPAN]) -> [T; SPAN] {
    let [zero, three, four] = [0.0, 3.0, 4.0].map(T::of);
    let (infinite, at_0) = (v[0], v[1]);
    [
        four * at_0,
        three * (v[3] - v[2]) - infinite,
        -(four * at_0) - three * (v[2] + v[3]),
        infinite,
        zero,
        zero,
        zero,
        zero,
    ]
}
