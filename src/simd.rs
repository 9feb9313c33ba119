//! Level 1. Plain loops, compiled for the vector instructions that the processor turns out to have.
//!
//! The crate is built for the baseline of its target, so that a binary runs everywhere. [`vectorized`] compiles the
//! loops inside it again for AVX2 and AVX-512 and chooses at run time. The loops are ordinary Rust; sums that should be
//! vectorised say their order of addition ([`sum`], [`dot`]), so the bits do not depend on which version runs.

use crate::element::Element;

/// Runs `work`, compiled for the widest vectors this processor has. `work` itself and all that it calls must be inlined
/// here (`#[inline(always)]`, on the closure too): what is not stays as it was compiled, for the baseline.
#[inline(always)]
pub(crate) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// Numbers worked on side by side: one AVX-512 vector of `f32`, two of `f64`.
pub(crate) const LANES: usize = 16;

/// One number of each of [`LANES`] planes, tiles or partial sums.
pub(crate) type Lanes<T> = [T; LANES];

/// Adds up `term(a[i], b[i])` lane by lane, then the lanes pairwise: a fixed order, exact to about `len / 16 + 4`
/// roundings. Whole chunks, without an index that could be out of bounds, are what the compiler vectorises.
#[inline(always)]
fn reduce<T: Element>(a: &[T], b: &[T], term: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    for (a, b) in a.zip(b) {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane]);
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(rest) {
        *lane += term(a, b);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] += other;
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of `a`.
#[inline(always)]
pub(crate) fn sum<T: Element>(a: &[T]) -> T {
    reduce(
        a,
        a,
        #[inline(always)]
        |a, _| a,
    )
}

/// Sum of `a[i] * b[i]`.
#[inline(always)]
pub(crate) fn dot<T: Element>(a: &[T], b: &[T]) -> T {
    reduce(
        a,
        &b[..a.len()],
        #[inline(always)]
        |a, b| a * b,
    )
}

/// Sum of `(a[i] - center)^2`.
#[inline(always)]
pub(crate) fn sum_squared_deviations<T: Element>(a: &[T], center: T) -> T {
    reduce(
        a,
        a,
        #[inline(always)]
        |a, _| (a - center) * (a - center),
    )
}

/// `a[i] += b[i]`.
#[inline(always)]
pub(crate) fn add_assign<T: Element>(a: &mut [T], b: &[T]) {
    for (a, &b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

/// The pixels of up to [`LANES`] planes side by side: `to[p][c] = planes[c * pitch + p]` for `c` below `channels`.
pub(crate) fn planes_to_lanes<T: Element>(planes: &[T], pitch: usize, channels: usize, to: &mut [Lanes<T>]) {
    let pixels = to.len();
    assert!(
        channels <= LANES && (channels == 0 || planes.len() >= (channels - 1) * pitch + pixels),
        "planes are whole"
    );
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if channels == LANES && size_of::<T>() == size_of::<f32>() && is_x86_feature_detected!("avx") {
        done = pixels / 8 * 8;
        let (from, to) = (planes.as_ptr().cast::<f32>(), to.as_mut_ptr().cast::<f32>());
        for p in (0..done).step_by(8) {
            for c in (0..LANES).step_by(8) {
                // SAFETY: AVX is there; T is as large as f32, and bits are moved only; the 8 pixels from p on lie within
                // each plane and within `to`, by the assertion.
                unsafe { transpose_8x8(from.add(c * pitch + p), pitch, to.add(p * LANES + c), LANES) };
            }
        }
    }
    for (p, to) in to.iter_mut().enumerate().skip(done) {
        for (c, to) in to.iter_mut().enumerate().take(channels) {
            *to = planes[c * pitch + p];
        }
    }
}

/// The inverse of [`planes_to_lanes`]: `planes[c * pitch + p] = from[p][c]` for `c` below `channels`.
pub(crate) fn lanes_to_planes<T: Element>(from: &[Lanes<T>], channels: usize, planes: &mut [T], pitch: usize) {
    let pixels = from.len();
    assert!(
        channels <= LANES && (channels == 0 || planes.len() >= (channels - 1) * pitch + pixels),
        "planes are whole"
    );
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if channels == LANES && size_of::<T>() == size_of::<f32>() && is_x86_feature_detected!("avx") {
        done = pixels / 8 * 8;
        let (from, to) = (from.as_ptr().cast::<f32>(), planes.as_mut_ptr().cast::<f32>());
        // Eight planes at a time: sixteen, a power of two apart, would not stay in the L1 cache together.
        for c in (0..LANES).step_by(8) {
            for p in (0..done).step_by(8) {
                // SAFETY: as in `planes_to_lanes`.
                unsafe { transpose_8x8(from.add(p * LANES + c), LANES, to.add(c * pitch + p), pitch) };
            }
        }
    }
    for (p, from) in from.iter().enumerate().skip(done) {
        for (c, &from) in from.iter().enumerate().take(channels) {
            planes[c * pitch + p] = from;
        }
    }
}

/// `to[j][i] = from[i][j]` for 8 rows of 8, `from_pitch` and `to_pitch` apart. The compiler makes scalar code of the plain
/// loop, five times slower.
///
/// # Safety
/// The processor has AVX; the 8 rows of 8 are valid, at `from` to read, at `to` to write.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn transpose_8x8(from: *const f32, from_pitch: usize, to: *mut f32, to_pitch: usize) {
    use std::arch::x86_64::{
        _mm_loadu_ps, _mm256_set_m128, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };
    for half in [0, 4] {
        // Elements half .. half + 4 of rows i and i + 4.
        let rows = |i: usize| {
            // SAFETY: by the contract, rows i and i + 4 have 8 elements each.
            unsafe {
                let row = from.add(i * from_pitch + half);
                _mm256_set_m128(_mm_loadu_ps(row.add(4 * from_pitch)), _mm_loadu_ps(row))
            }
        };
        let (a, b, c, d) = (rows(0), rows(1), rows(2), rows(3));
        let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
        // Within each half of a vector: the first, or the last, two of the one, then of the other.
        const FIRST: i32 = 0b0100_0100;
        const LAST: i32 = 0b1110_1110;
        // SAFETY: by the contract, rows half .. half + 4 of `to` have 8 elements each.
        unsafe {
            _mm256_storeu_ps(to.add(half * to_pitch), _mm256_shuffle_ps::<FIRST>(ab, cd));
            _mm256_storeu_ps(to.add((half + 1) * to_pitch), _mm256_shuffle_ps::<LAST>(ab, cd));
            _mm256_storeu_ps(to.add((half + 2) * to_pitch), _mm256_shuffle_ps::<FIRST>(ab_high, cd_high));
            _mm256_storeu_ps(to.add((half + 3) * to_pitch), _mm256_shuffle_ps::<LAST>(ab_high, cd_high));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_right_at_every_length_and_the_same_when_vectorized() {
        for len in [0, 1, 15, 16, 17, 100] {
            let a: Vec<f64> = (0..len).map(|i| f64::from(i) * 0.1 - 3.0).collect();
            let plain: f64 = a.iter().sum();
            assert!((sum(&a) - plain).abs() <= 1e-12);
            assert_eq!(
                sum(&a).to_bits(),
                vectorized(
                    #[inline(always)]
                    || sum(&a)
                )
                .to_bits()
            );
            let squares: f64 = a.iter().map(|v| v * v).sum();
            assert!((dot(&a, &a) - squares).abs() <= 1e-11);
            assert!((sum_squared_deviations(&a, 0.0) - squares).abs() <= 1e-11);
        }
    }

    #[test]
    fn planes_and_lanes_are_each_others_transposes() {
        fn check<T: Element>() {
            for (pixels, channels) in [(0, 16), (1, 16), (8, 16), (21, 16), (32, 16), (9, 15), (8, 1)] {
                let pitch = pixels + 3;
                let planes: Vec<T> = (0..channels * pitch).map(|i| T::of(i as f64)).collect();
                let mut lanes = vec![[T::of(-1.0); LANES]; pixels];
                planes_to_lanes(&planes, pitch, channels, &mut lanes);
                for (p, lanes) in lanes.iter().enumerate() {
                    for (c, &got) in lanes.iter().enumerate() {
                        let want = if c < channels { planes[c * pitch + p] } else { T::of(-1.0) };
                        assert_eq!(got, want, "pixel {p}, channel {c} of {pixels}, {channels}");
                    }
                }
                let mut back = vec![T::of(-2.0); planes.len()];
                lanes_to_planes(&lanes, channels, &mut back, pitch);
                for (i, (&got, &from)) in back.iter().zip(&planes).enumerate() {
                    assert_eq!(got, if i % pitch < pixels { from } else { T::of(-2.0) }, "{i} of {pixels}, {channels}");
                }
            }
        }
        check::<f32>();
        check::<f64>();
    }
}
