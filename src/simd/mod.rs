//! Level 1. Plain loops, compiled for the vector instructions that the processor turns out to have.
//!
//! The crate is built for the baseline of its target, so that a binary runs everywhere. [`vectorized!`] compiles the
//! loops inside it again for AVX2 and AVX-512 and chooses at run time ([`Isa`]). The loops are ordinary Rust; sums that should be
//! vectorised say their order of addition ([`sum`], [`dot`]), so the bits do not depend on which version runs.
//!
//! What is written by hand, because the compiler does not make it of loops: transposing planes and matrices, dealing out pairs, outputs
//! that bypass the cache, and fetching what is needed next. That moves bits and calculates nothing.

mod ahead;
mod compiled;
mod isa;

use crate::element::{Element, Kind};

pub(crate) use ahead::{Ahead, Share};
pub(crate) use compiled::{Once, apart, dispatch, vectorized, with_count};
pub(crate) use isa::{Isa, arch};

/// Numbers worked on side by side: one AVX-512 vector of `f32`, two of `f64`.
pub(crate) const LANES: usize = 16;

/// One number of each of [`LANES`] planes, tiles or partial sums.
pub(crate) type Lanes<T> = [T; LANES];

/// Vectors on the stack that begin with a cache line. Where the compiler puts them, they mostly begin within one, and every load and
/// store of what lies across two takes twice as long.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(crate) struct Aligned<V>(pub(crate) V);

/// Has a cache line fetched into the L1 cache.
#[inline(always)]
pub(crate) fn fetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: it is part of SSE, which every x86_64 has, and reads nothing: any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Partial sums of a reduction kept side by side: four vectors, because an addition waits four cycles for the one before.
const PARTIAL_SUMS: usize = 4 * LANES;

/// Adds up `N` terms of `a[i], b[i]` each, every partial sum by itself, then these pairwise: a fixed order, exact to about
/// `len / 64 + 6` roundings. Whole chunks, without an index that could be out of bounds, are what the compiler vectorises.
#[inline(always)]
fn reduce<T: Element, const N: usize>(a: &[T], b: &[T], terms: impl Fn(T, T) -> [T; N]) -> [T; N] {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks(), b.as_chunks());
    let mut sums = partial_sums(a, b, &terms);
    for (i, (&a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
        let terms = terms(a, b);
        for n in 0..N {
            sums[n][i] += terms[n];
        }
    }
    let mut width = PARTIAL_SUMS / 2;
    while width > 0 {
        for sums in &mut sums {
            for i in 0..width {
                let other = sums[i + width];
                sums[i] += other;
            }
        }
        width /= 2;
    }
    std::array::from_fn(
        #[inline(always)]
        |n| sums[n][0],
    )
}

/// The partial sums of whole chunks: by themselves, since what is indexed by more than constants is not kept in registers.
#[inline(always)]
fn partial_sums<T: Element, const N: usize>(
    a: &[[T; PARTIAL_SUMS]],
    b: &[[T; PARTIAL_SUMS]],
    terms: &impl Fn(T, T) -> [T; N],
) -> [[T; PARTIAL_SUMS]; N] {
    let mut sums = [[T::zero(); PARTIAL_SUMS]; N];
    for (a, b) in a.iter().zip(b) {
        for i in 0..PARTIAL_SUMS {
            let terms = terms(a[i], b[i]);
            for n in 0..N {
                sums[n][i] += terms[n];
            }
        }
    }
    sums
}

/// Sum of `a`.
#[inline(always)]
pub(crate) fn sum<T: Element>(a: &[T]) -> T {
    let [sum] = reduce(
        a,
        a,
        #[inline(always)]
        |a, _| [a],
    );
    sum
}

/// Sum of `a[i] * b[i]`.
#[inline(always)]
pub(crate) fn dot<T: Element>(a: &[T], b: &[T]) -> T {
    let [sum] = reduce(
        a,
        &b[..a.len()],
        #[inline(always)]
        |a, b| [a * b],
    );
    sum
}

/// Sums of `a[i]` and of `a[i] * (b[i] - center)`.
#[inline(always)]
pub(crate) fn sum_and_dot_centred<T: Element>(a: &[T], b: &[T], center: T) -> (T, T) {
    let [sum, dot] = reduce(
        a,
        &b[..a.len()],
        #[inline(always)]
        |a, b| [a, a * (b - center)],
    );
    (sum, dot)
}

/// Sum of `(a[i] - center)^2`.
#[inline(always)]
pub(crate) fn sum_squared_deviations<T: Element>(a: &[T], center: T) -> T {
    let [sum] = reduce(
        a,
        a,
        #[inline(always)]
        |a, _| [(a - center) * (a - center)],
    );
    sum
}

/// `a[i] += b[i]`.
#[inline(always)]
pub(crate) fn add_assign<T: Element>(a: &mut [T], b: &[T]) {
    for (a, &b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

/// Bytes of an output that will not be in a core's cache any more when it is read.
const LEAVES_CACHE: usize = 8 << 20;

/// How the elements of an operation's output are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// As ever: the cache fetches a line from memory before it changes it.
    Cached,
    /// Past the cache, in whole lines, which are not fetched before: half the traffic for an output that is larger than
    /// the caches. Only within a piece of [`crate::parallel`], whose end makes such writes visible to other threads.
    Streamed,
}

impl Write {
    /// For an output of `len` elements in all.
    pub(crate) fn of<T>(len: usize) -> Self {
        if cfg!(target_arch = "x86_64") && len * size_of::<T>() >= LEAVES_CACHE {
            Write::Streamed
        } else {
            Write::Cached
        }
    }

    /// `out[i] = from[i]`
    #[inline(always)]
    pub(crate) fn copy<T: Element>(self, out: &mut [T], from: &[T]) {
        self.map(
            out,
            from,
            from,
            #[inline(always)]
            |value, _| value,
        );
    }

    /// `out[i] = value(a[i], b[i])`
    #[inline(always)]
    pub(crate) fn map<T: Element>(self, out: &mut [T], a: &[T], b: &[T], value: impl Fn(T, T) -> T) {
        let (a, b) = (&a[..out.len()], &b[..out.len()]);
        if self == Write::Cached {
            return map(out, a, b, &value);
        }
        let head = out.as_ptr().align_offset(64).min(out.len());
        let lines = (out.len() - head) / LANES * LANES + head;
        map(&mut out[..head], &a[..head], &b[..head], &value);
        for ((out, a), b) in out[head..lines]
            .chunks_exact_mut(LANES)
            .zip(a[head..lines].chunks_exact(LANES))
            .zip(b[head..lines].chunks_exact(LANES))
        {
            let mut values = [T::zero(); LANES];
            map(&mut values, a, b, &value);
            stream(out, &values);
        }
        map(&mut out[lines..], &a[lines..], &b[lines..], &value);
    }
}

#[inline(always)]
fn map<T: Element>(out: &mut [T], a: &[T], b: &[T], value: &impl Fn(T, T) -> T) {
    // a loop and no `for_each`, whose closure would not be inlined where `value` is long
    for (out, (&a, &b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *out = value(a, b);
    }
}

/// Writes a vector to whole cache lines past the cache.
#[inline(always)]
fn stream<T: Element>(out: &mut [T], values: &Lanes<T>) {
    assert!(out.len() == LANES && out.as_ptr().addr().is_multiple_of(64), "whole lines");
    #[cfg(target_arch = "x86_64")]
    for quarter in 0..size_of::<Lanes<T>>() / 16 {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        // SAFETY: SSE2 is part of x86_64; both have LANES elements, `out` begins at a cache line by the assertion. The
        // fence that the contract of `_mm_stream_si128` asks for is at the end of the piece: see `Write::Streamed`.
        unsafe {
            let values = _mm_loadu_si128(values.as_ptr().cast::<__m128i>().add(quarter));
            _mm_stream_si128(out.as_mut_ptr().cast::<__m128i>().add(quarter), values);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    out.copy_from_slice(values);
}

/// Rows and columns that `transpose_8x8` moves at a time.
const TOGETHER: usize = 8;

/// Where runs of [`TOGETHER`] begin that cover `len`, which is no less: the last one begins early enough to end there, so that some
/// are moved twice.
#[cfg(target_arch = "x86_64")]
#[inline]
fn runs_of_eight(len: usize) -> impl Iterator<Item = usize> {
    (0..len - TOGETHER).step_by(TOGETHER).chain([len - TOGETHER])
}

/// The pixels of up to [`LANES`] planes side by side: `to[p][c] = planes[c * pitch + p]` for `c` below `channels`.
pub(crate) fn planes_to_lanes<T: Element>(planes: &[T], pitch: usize, channels: usize, to: &mut [Lanes<T>]) {
    transpose((planes, pitch), (channels, to.len()), (to.as_flattened_mut(), LANES));
}

/// The inverse of [`planes_to_lanes`]: `planes[c * pitch + p] = from[p][c]` for `c` below `channels`.
pub(crate) fn lanes_to_planes<T: Element>(from: &[Lanes<T>], channels: usize, planes: &mut [T], pitch: usize) {
    transpose((from.as_flattened(), LANES), (from.len(), channels), (planes, pitch));
}

/// Elements from the first to the last of `rows` rows of `cols` elements, `ld` apart; `None` if no memory has so many.
pub(crate) fn rows_reach(rows: usize, cols: usize, ld: usize) -> Option<usize> {
    // Checked: a size that wraps around would seem to fit.
    match rows.checked_sub(1) {
        Some(above) if cols > 0 => above.checked_mul(ld)?.checked_add(cols),
        _ => Some(0),
    }
}

/// Panics unless `len` elements have room for a matrix whose rows, `ld` apart, do not overlap.
#[track_caller]
pub(crate) fn assert_fits(len: usize, rows: usize, cols: usize, ld: usize) {
    assert!(ld >= cols, "leading dimension {ld} is less than {cols} columns");
    assert!(
        rows_reach(rows, cols, ld).is_some_and(|needed| needed <= len),
        "{rows} x {cols} with leading dimension {ld} does not fit {len} elements"
    );
}

/// `to[j to_ld + i] = from[i from_ld + j]` for `rows` rows i and `cols` columns j.
///
/// # Panics
/// If there are not as many, or they overlap.
pub(crate) fn transpose<T: Element>(
    (from, from_ld): (&[T], usize),
    (rows, cols): (usize, usize),
    (to, to_ld): (&mut [T], usize),
) {
    if rows == 0 || cols == 0 {
        return;
    }
    assert_fits(from.len(), rows, cols, from_ld);
    assert_fits(to.len(), cols, rows, to_ld);
    #[cfg(target_arch = "x86_64")]
    if T::KIND == Kind::F32 && rows.min(cols) >= TOGETHER && Isa::used() >= Isa::Avx2 {
        let (from, to) = (from.as_ptr().cast(), to.as_mut_ptr().cast());
        // SAFETY: AVX is there, T is as large as f32, and bits are moved only; both matrices fit their slices.
        unsafe { transpose_blocks(from, from_ld, (rows, cols), to, to_ld) };
        return;
    }
    for i in 0..rows {
        for j in 0..cols {
            to[j * to_ld + i] = from[i * from_ld + j];
        }
    }
}

/// `even[i] = from[2 i]`, `odd[i] = from[2 i + 1]`.
#[inline(always)]
pub(crate) fn deal_two<T: Element>(from: &[T; 2 * LANES], even: &mut Lanes<T>, odd: &mut Lanes<T>) {
    #[cfg(target_arch = "x86_64")]
    if Isa::used() >= Isa::Avx2 {
        let (from, even, odd) = (from.as_ptr(), even.as_mut_ptr(), odd.as_mut_ptr());
        // SAFETY: AVX2 is there; the references are to as many elements, of the type that `KIND` names.
        unsafe {
            return match T::KIND {
                Kind::F32 => pairs::deal_f32(from.cast(), even.cast(), odd.cast()),
                Kind::F64 => pairs::deal_f64(from.cast(), even.cast(), odd.cast()),
            };
        }
    }
    for i in 0..LANES {
        even[i] = from[2 * i];
        odd[i] = from[2 * i + 1];
    }
}

/// `to[2 i] = even[i]`, `to[2 i + 1] = odd[i]`: the inverse of [`deal_two`].
#[inline(always)]
pub(crate) fn gather_two<T: Element>(even: &Lanes<T>, odd: &Lanes<T>, to: &mut [T; 2 * LANES]) {
    #[cfg(target_arch = "x86_64")]
    if Isa::used() >= Isa::Avx2 {
        let (even, odd, to) = (even.as_ptr(), odd.as_ptr(), to.as_mut_ptr());
        // SAFETY: as in `deal_two`.
        unsafe {
            return match T::KIND {
                Kind::F32 => pairs::gather_f32(even.cast(), odd.cast(), to.cast()),
                Kind::F64 => pairs::gather_f64(even.cast(), odd.cast(), to.cast()),
            };
        }
    }
    for i in 0..LANES {
        to[2 * i] = even[i];
        to[2 * i + 1] = odd[i];
    }
}

/// [`deal_two`] and [`gather_two`] by shuffles of vectors: of the plain loops the compiler makes scalar code. All of them
/// need AVX2, and pointers to [`LANES`] elements, or twice as many.
#[cfg(target_arch = "x86_64")]
mod pairs {
    use std::arch::x86_64::{
        __m256d, _mm256_castpd_ps, _mm256_castps_pd, _mm256_loadu_pd, _mm256_loadu_ps, _mm256_permute2f128_pd,
        _mm256_permute2f128_ps, _mm256_permute4x64_pd, _mm256_shuffle_ps, _mm256_storeu_pd, _mm256_storeu_ps,
        _mm256_unpackhi_pd, _mm256_unpackhi_ps, _mm256_unpacklo_pd, _mm256_unpacklo_ps,
    };

    use super::LANES;

    /// Quarters 0, 2, 1, 3: shuffles work on each half of a vector by itself, and leave them in this order.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn in_order(halves: __m256d) -> __m256d {
        _mm256_permute4x64_pd::<0b11_01_10_00>(halves)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn deal_f32(from: *const f32, even: *mut f32, odd: *mut f32) {
        for i in (0..LANES).step_by(8) {
            // SAFETY: i + 8 <= LANES.
            unsafe {
                let (a, b) = (_mm256_loadu_ps(from.add(2 * i)), _mm256_loadu_ps(from.add(2 * i + 8)));
                let evens = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(a, b));
                let odds = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(a, b));
                _mm256_storeu_ps(even.add(i), _mm256_castpd_ps(in_order(evens)));
                _mm256_storeu_ps(odd.add(i), _mm256_castpd_ps(in_order(odds)));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn deal_f64(from: *const f64, even: *mut f64, odd: *mut f64) {
        for i in (0..LANES).step_by(4) {
            // SAFETY: i + 4 <= LANES.
            unsafe {
                let (a, b) = (_mm256_loadu_pd(from.add(2 * i)), _mm256_loadu_pd(from.add(2 * i + 4)));
                _mm256_storeu_pd(even.add(i), in_order(_mm256_unpacklo_pd(a, b)));
                _mm256_storeu_pd(odd.add(i), in_order(_mm256_unpackhi_pd(a, b)));
            }
        }
    }

    /// The first halves of two vectors, and the last.
    const FIRST: i32 = 0x20;
    const LAST: i32 = 0x31;

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn gather_f32(even: *const f32, odd: *const f32, to: *mut f32) {
        for i in (0..LANES).step_by(8) {
            // SAFETY: i + 8 <= LANES.
            unsafe {
                let (a, b) = (_mm256_loadu_ps(even.add(i)), _mm256_loadu_ps(odd.add(i)));
                let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                _mm256_storeu_ps(to.add(2 * i), _mm256_permute2f128_ps::<FIRST>(low, high));
                _mm256_storeu_ps(to.add(2 * i + 8), _mm256_permute2f128_ps::<LAST>(low, high));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn gather_f64(even: *const f64, odd: *const f64, to: *mut f64) {
        for i in (0..LANES).step_by(4) {
            // SAFETY: i + 4 <= LANES.
            unsafe {
                let (a, b) = (_mm256_loadu_pd(even.add(i)), _mm256_loadu_pd(odd.add(i)));
                let (low, high) = (_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
                _mm256_storeu_pd(to.add(2 * i), _mm256_permute2f128_pd::<FIRST>(low, high));
                _mm256_storeu_pd(to.add(2 * i + 4), _mm256_permute2f128_pd::<LAST>(low, high));
            }
        }
    }
}

/// [`transpose`] in blocks of 8 rows of 8, in a function for AVX as well, so that the blocks are no calls. Eight columns at a time:
/// sixteen planes that are written, a power of two apart, would not stay in the L1 cache together.
///
/// # Safety
/// The processor has AVX; `rows` rows of `cols` elements, no fewer than 8 of each, are valid to read at `from`, and as many columns to
/// write at `to`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn transpose_blocks(from: *const f32, from_ld: usize, (rows, cols): (usize, usize), to: *mut f32, to_ld: usize) {
    for j in runs_of_eight(cols) {
        for i in runs_of_eight(rows) {
            // SAFETY: the 8 rows from i on and the 8 columns from j on lie within both.
            unsafe { transpose_8x8(from.add(i * from_ld + j), from_ld, to.add(j * to_ld + i), to_ld) };
        }
    }
}

/// `to[j][i] = from[i][j]` for 8 rows of 8, `from_pitch` and `to_pitch` apart. The compiler makes scalar code of the plain
/// loop, five times slower.
///
/// # Safety
/// The processor has AVX; the 8 rows of 8 are valid, at `from` to read, at `to` to write.
#[cfg(target_arch = "x86_64")]
#[inline]
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
        for len in [0, 1, 63, 64, 65, 200] {
            let a: Vec<f64> = (0..len).map(|i| f64::from(i) * 0.1 - 3.0).collect();
            let plain: f64 = a.iter().sum();
            assert!((sum(&a) - plain).abs() <= 1e-12);
            assert_eq!(sum(&a).to_bits(), vectorized!(sum(&a)).to_bits());
            let squares: f64 = a.iter().map(|v| v * v).sum();
            assert!((dot(&a, &a) - squares).abs() <= 1e-11);
            assert!((sum_squared_deviations(&a, 0.0) - squares).abs() <= 1e-11);
            let (total, centred) = sum_and_dot_centred(&a, &a, 0.5);
            assert!((total - plain).abs() <= 1e-12 && (centred - (squares - 0.5 * plain)).abs() <= 1e-11);
        }
    }

    fn check_transposes<T: Element>() {
        for (pixels, channels) in
            [(0, 16), (1, 16), (7, 16), (8, 16), (9, 16), (21, 16), (32, 16), (9, 15), (8, 1), (17, 8), (9, 11)]
        {
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

    #[test]
    fn planes_and_lanes_are_each_others_transposes() {
        check_transposes::<f32>();
        check_transposes::<f64>();
    }

    #[test]
    fn matrices_are_transposed() {
        fn check<T: Element>(rows: usize, cols: usize) {
            let (from_ld, to_ld) = (cols + 2, rows + 1);
            let from: Vec<T> = (0..rows * from_ld).map(|i| T::of(i as f64)).collect();
            let mut to = vec![T::of(-1.0); cols * to_ld];
            transpose((&from, from_ld), (rows, cols), (&mut to, to_ld));
            for (at, &got) in to.iter().enumerate() {
                let (j, i) = (at / to_ld, at % to_ld);
                assert_eq!(
                    got,
                    if i < rows { from[i * from_ld + j] } else { T::of(-1.0) },
                    "{rows} x {cols}: {i}, {j}"
                );
            }
        }
        for (rows, cols) in [(0, 3), (3, 0), (1, 1), (7, 9), (8, 8), (16, 24), (21, 8), (9, 30)] {
            check::<f32>(rows, cols);
            check::<f64>(rows, cols);
        }
        // of nothing, nothing is asked
        transpose::<f32>((&[], 0), (0, 9), (&mut [], 0));
        transpose::<f32>((&[], 0), (9, 0), (&mut [], 0));
    }

    /// The vectors' loops do not ask again.
    #[test]
    fn matrices_that_do_not_reach_are_not_transposed() {
        let refused = |from_len: usize, from_ld, rows, cols, to_len: usize, to_ld| {
            let (from, mut to) = (vec![1.0_f32; from_len], vec![0.0_f32; to_len]);
            std::panic::catch_unwind(move || transpose((&from, from_ld), (rows, cols), (&mut to, to_ld))).is_err()
        };
        // 9 rows of 16, 20 apart; 16 rows of 9, 10 apart
        assert!(!refused(176, 20, 9, 16, 159, 10));
        assert!(refused(175, 20, 9, 16, 159, 10) && refused(176, 20, 9, 16, 158, 10), "one element too few");
        assert!(refused(176, 15, 9, 16, 159, 10) && refused(176, 20, 9, 16, 159, 8), "rows that overlap");
        // sizes that wrap around to less
        assert_eq!(rows_reach(9, 16, 20), Some(176));
        assert_eq!(rows_reach(9, 16, usize::MAX / 8 + 3), None);
        assert_eq!(rows_reach(2, 16, usize::MAX - 3), None);
    }

    #[test]
    fn pairs_are_dealt_out_and_gathered() {
        fn check<T: Element>() {
            let from: [T; 2 * LANES] = std::array::from_fn(|i| T::of(i as f64));
            let (mut even, mut odd, mut back) = ([T::zero(); LANES], [T::zero(); LANES], [T::zero(); 2 * LANES]);
            deal_two(&from, &mut even, &mut odd);
            for i in 0..LANES {
                assert_eq!((even[i], odd[i]), (T::of(2.0 * i as f64), T::of(2.0 * i as f64 + 1.0)));
            }
            gather_two(&even, &odd, &mut back);
            assert_eq!(back, from);
        }
        check::<f32>();
        check::<f64>();
    }

    #[test]
    fn streamed_outputs_are_the_same_as_cached_ones() {
        fn check<T: Element>() {
            for (start, len) in [(0, 0), (0, 16), (1, 15), (3, 64), (5, 100), (16, 33)] {
                let input: Vec<T> = (0..start + len).map(|i| T::of(i as f64)).collect();
                let mut outputs = [vec![T::of(-1.0); start + len + 1], vec![T::of(-1.0); start + len + 1]];
                for (write, out) in [Write::Cached, Write::Streamed].into_iter().zip(&mut outputs) {
                    let input = &input[start..];
                    write.map(&mut out[start..][..len], input, input, |a, b| a + a * b);
                }
                assert_eq!(outputs[0], outputs[1], "{len} from {start}");
                assert_eq!(outputs[1][start + len], T::of(-1.0), "nothing after the end");
            }
        }
        check::<f32>();
        check::<f64>();
    }
}
