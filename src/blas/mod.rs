//! Level 2. The matrix product: the only room that calls OpenBLAS.
//!
//! [`gemm`] takes views with explicit leading dimensions, so nothing is ever copied to suit a layout, and nothing falls
//! back in silence. OpenBLAS runs on one thread: the parallelism of this crate is [`crate::parallel`]'s, around it.
//! Without the BLAS features the product is `matrixmultiply`'s, pure Rust.
//!
//! # A processor that OpenBLAS does not know
//! OpenBLAS picks its kernels from a list of processors. One that is newer than the library falls through to 20-year-old
//! SSE kernels, five times slower (seen with 0.3.21 on Intel's fifth-generation Xeon). [`setup`] notices and says so;
//! [`choose_kernels`], which a program calls first thing, makes it choose again, by the instructions the processor has.
//! It also keeps OpenBLAS within the instructions that `GEMMNET_MAX_ISA` allows. `OPENBLAS_CORETYPE`, if set, is left alone.
//!
//! # Products of the size of a tile
//! OpenBLAS copies both matrices into packed panels before it multiplies: for a tile of a convolution that takes a quarter
//! of the time. Its AVX-512 kernels have a second path, without copies, for small products. [`gemm`] cuts a product whose
//! operands stay in the cache into blocks for that path (`Blocks`), by shape alone. Where a layout can be chosen to suit
//! the product, there is one that copies little on any processor: `panels`. Of sums over the rows of both matrices nothing has to be
//! copied: `transposed` makes them where the library would.

mod gemm;
mod library;
pub(crate) mod panels;
mod strips;
pub(crate) mod transposed;

use std::hint::black_box;
use std::marker::PhantomData;
use std::ops::Range;

use pulp::Simd;

use crate::element::Element;
use crate::parallel::StridedMut;
use crate::simd::{Ahead, LANES, Lanes, assert_fits};

pub use gemm::{gemm, gemm_in_terms};

/// Whether a product replaces what is in the output or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accum {
    /// `C <- A B`
    Replace,
    /// `C <- C + A B`
    Add,
}

/// A read-only matrix: `rows` x `cols`, row-major with `ld` elements between rows, possibly seen transposed.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    ld: usize,
    transposed: bool,
}

impl<'a, T> Mat<'a, T> {
    /// A view of `data` as `rows` x `cols` with `ld` elements from one row to the next.
    ///
    /// # Panics
    /// If `ld < cols` or `data` ends before the last element.
    #[track_caller]
    pub fn new(data: &'a [T], rows: usize, cols: usize, ld: usize) -> Self {
        assert_fits(data.len(), rows, cols, ld);
        Mat { data, rows, cols, ld, transposed: false }
    }

    /// The matrix of these rows.
    fn of<const COLS: usize>(rows: &'a [[T; COLS]]) -> Self {
        Mat { data: rows.as_flattened(), rows: rows.len(), cols: COLS, ld: COLS, transposed: false }
    }

    /// The transposed view; costs nothing.
    pub fn t(self) -> Self {
        Mat { transposed: !self.transposed, rows: self.cols, cols: self.rows, ..self }
    }

    /// The same elements, where `T` is `U` under another name.
    fn cast<U: Element>(self) -> Mat<'a, U>
    where
        T: Element,
    {
        assert_eq!(T::KIND, U::KIND, "the same type");
        let Mat { data, rows, cols, ld, transposed } = self;
        Mat { data: bytemuck::cast_slice(data), rows, cols, ld, transposed }
    }

    /// Element `i`, `j`.
    fn at(&self, i: usize, j: usize) -> T
    where
        T: Copy,
    {
        self.data[if self.transposed { j * self.ld + i } else { i * self.ld + j }]
    }

    /// The block of these rows and columns.
    pub(crate) fn block(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && cols.end <= self.cols, "{rows:?} x {cols:?} of {} x {}", self.rows, self.cols);
        let (i, j) = if self.transposed { (cols.start, rows.start) } else { (rows.start, cols.start) };
        // A matrix with nothing in it need not reach to where an empty block of it would begin.
        let data = if rows.is_empty() || cols.is_empty() { &[] } else { &self.data[i * self.ld + j..] };
        Mat { data, rows: rows.len(), cols: cols.len(), ..self }
    }
}

/// A writable matrix: `rows` x `cols`, row-major with `ld` elements between rows. The cells between `cols` and `ld` are
/// not its own: several blocks of one matrix may be written at once.
#[derive(Debug)]
pub struct MatMut<'a, T> {
    pointer: *mut T,
    rows: usize,
    cols: usize,
    ld: usize,
    lifetime: PhantomData<&'a mut T>,
}

impl<'a, T> MatMut<'a, T> {
    /// A view of `data` as `rows` x `cols` with `ld` elements from one row to the next.
    ///
    /// # Panics
    /// If `ld < cols` or `data` ends before the last element.
    #[track_caller]
    pub fn new(data: &'a mut [T], rows: usize, cols: usize, ld: usize) -> Self {
        assert_fits(data.len(), rows, cols, ld);
        MatMut { pointer: data.as_mut_ptr(), rows, cols, ld, lifetime: PhantomData }
    }

    /// The same elements, where `T` is `U` under another name.
    fn cast<U: Element>(self) -> MatMut<'a, U>
    where
        T: Element,
    {
        assert_eq!(T::KIND, U::KIND, "the same type");
        let MatMut { pointer, rows, cols, ld, .. } = self;
        MatMut { pointer: pointer.cast(), rows, cols, ld, lifetime: PhantomData }
    }

    /// The matrix whose rows are these runs.
    pub(crate) fn of(runs: &'a mut StridedMut<'_, T>) -> Self {
        let (rows, cols, ld) = (runs.count(), runs.run(), runs.stride());
        MatMut { pointer: runs.as_mut_ptr(), rows, cols, ld, lifetime: PhantomData }
    }

    /// The block of these rows and columns, as long as it is needed.
    fn block(&mut self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_, T> {
        assert!(rows.end <= self.rows && cols.end <= self.cols, "{rows:?} x {cols:?} of {} x {}", self.rows, self.cols);
        let pointer = self.pointer.wrapping_add(rows.start * self.ld + cols.start);
        MatMut { pointer, rows: rows.len(), cols: cols.len(), ld: self.ld, lifetime: PhantomData }
    }

    /// Row `i`.
    fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: both constructors promise the elements of every row.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(i * self.ld), self.cols) }
    }
}

/// A block of C: `R` rows from row `i` on, and of these `V` vectors from column `j` on.
///
/// # Panics
/// If C has no such block.
#[inline(always)]
fn load_block<S: Simd, const V: usize, const R: usize>(
    simd: S,
    c: &MatMut<'_, f32>,
    (i, j): (usize, usize),
) -> [[S::f32s; V]; R] {
    assert!(i + R <= c.rows && j + V * S::F32_LANES <= c.cols, "C has this block");
    let mut block = [[simd.splat_f32s(0.0); V]; R];
    for r in 0..R {
        // SAFETY: C has these elements, as was checked.
        block[r].copy_from_slice(unsafe { vectors::<S, V>(c.pointer.add((i + r) * c.ld + j)) });
    }
    block
}

/// Writes the block that [`load_block`] reads.
///
/// # Panics
/// If C has no such block.
#[inline(always)]
fn store_block<S: Simd, const V: usize, const R: usize>(
    c: &mut MatMut<'_, f32>,
    (i, j): (usize, usize),
    block: &[[S::f32s; V]; R],
) {
    assert!(i + R <= c.rows && j + V * S::F32_LANES <= c.cols, "C has this block");
    for r in 0..R {
        // SAFETY: C has these elements, as was checked, and they are its own.
        let to = unsafe { std::slice::from_raw_parts_mut(c.pointer.add((i + r) * c.ld + j), V * S::F32_LANES) };
        S::as_mut_simd_f32s(to).0.copy_from_slice(&block[r]);
    }
}

/// Terms that the innermost loops go on by: whatever they do besides multiplying is done once for all of them. A processor that
/// begins four instructions in a cycle has no time for more. They are added by one call after the other: in a loop the compiler
/// would keep the sums in memory.
const TOGETHER: usize = 4;

/// Steps of the innermost loops for so many terms, those of [`Ahead`].
#[inline(always)]
pub(crate) fn steps(terms: usize) -> usize {
    terms / TOGETHER
}

/// Adds to a block of C, `R` rows and `V` vectors, the products of two blocks: of A from row `i` on, and of B, which has a row for
/// each term, from column `column` on. Fetches `ahead` once for [`TOGETHER`] terms.
///
/// # Panics
/// If the matrices do not have these elements.
#[inline(always)]
fn add_terms<S: Simd, const V: usize, const R: usize, const TRANSPOSED: bool>(
    simd: S,
    mut sums: [[S::f32s; V]; R],
    (a, i): (Mat<'_, f32>, usize),
    (b, column): (Mat<'_, f32>, usize),
    mut ahead: Ahead<1>,
) -> [[S::f32s; V]; R] {
    let (terms, ld) = (b.rows, b.ld);
    assert!(a.transposed == TRANSPOSED && i + R <= a.rows && terms <= a.cols, "A has these rows and columns");
    assert!(!b.transposed && column + V * S::F32_LANES <= b.cols, "B has these columns");
    let mut rows =
        Rows::<R, TRANSPOSED>::new(a.data.as_ptr().wrapping_add(if TRANSPOSED { i } else { i * a.ld }), a.ld);
    let mut b = b.data.as_ptr().wrapping_add(column);
    for _ in 0..steps(terms) {
        ahead.fetch();
        // SAFETY: all rows have as many elements left, and B as many rows; both were checked.
        unsafe {
            sums = rows.add(simd, sums, 0, b);
            sums = rows.add(simd, sums, 1, b.wrapping_add(ld));
            sums = rows.add(simd, sums, 2, b.wrapping_add(2 * ld));
            sums = rows.add(simd, sums, 3, b.wrapping_add(3 * ld));
        }
        rows.advance(TOGETHER);
        b = b.wrapping_add(TOGETHER * ld);
    }
    for _ in 0..terms % TOGETHER {
        // SAFETY: this many are left.
        sums = unsafe { rows.add(simd, sums, 0, b) };
        rows.advance(1);
        b = b.wrapping_add(ld);
    }
    sums
}

/// Where the elements of `R` rows of a matrix lie: every third row by itself, the others from there. That is how many addresses
/// the processor's registers have room for, and it reads from all of them as fast.
///
/// Of a transposed matrix they lie side by side, and the first address is enough.
struct Rows<const R: usize, const TRANSPOSED: bool> {
    thirds: [*const f32; R],
    ld: usize,
}

impl<const R: usize, const TRANSPOSED: bool> Rows<R, TRANSPOSED> {
    /// Addresses that are kept.
    const THIRDS: usize = if TRANSPOSED { 1 } else { R.div_ceil(3) };

    #[inline(always)]
    fn new(first: *const f32, ld: usize) -> Self {
        let mut thirds = [std::ptr::null(); R];
        for third in 0..Self::THIRDS {
            thirds[third] = first.wrapping_add(3 * third * ld);
        }
        // The compiler knows how far they are apart, and would work all of them out from the first one at every term.
        Rows { thirds: black_box(thirds), ld: black_box(ld) }
    }

    /// Adds the products of element `t` of every row and `V` vectors from `b` on.
    ///
    /// # Safety
    /// All of these are there.
    #[inline(always)]
    unsafe fn add<S: Simd, const V: usize>(
        &self,
        simd: S,
        mut sums: [[S::f32s; V]; R],
        t: usize,
        b: *const f32,
    ) -> [[S::f32s; V]; R] {
        // SAFETY: as the caller promises.
        let b = unsafe { vectors::<S, V>(b) };
        // In two loops, since the compiler does not unroll one of twelve everywhere, and then keeps the sums in memory.
        for third in 0..R.div_ceil(3) {
            for r in 3 * third..R.min(3 * third + 3) {
                // SAFETY: as the caller promises.
                let a = simd.splat_f32s(unsafe { *self.at(r, t) });
                for v in 0..V {
                    sums[r][v] = simd.mul_add_e_f32s(a, b[v], sums[r][v]);
                }
            }
        }
        sums
    }

    /// Where element `t` of row `r` is.
    #[inline(always)]
    fn at(&self, r: usize, t: usize) -> *const f32 {
        if TRANSPOSED {
            self.thirds[0].wrapping_add(t * self.ld + r)
        } else {
            self.thirds[r / 3].wrapping_add(r % 3 * self.ld + t)
        }
    }

    /// Goes on by some elements of every row.
    #[inline(always)]
    fn advance(&mut self, elements: usize) {
        let apart = if TRANSPOSED { self.ld } else { 1 };
        for third in 0..Self::THIRDS {
            self.thirds[third] = self.thirds[third].wrapping_add(elements * apart);
        }
    }
}

/// Where the elements of a matrix lie that is never written, as that of im2col's columns: one offset for each term.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offsets<'a> {
    offsets: &'a [u32],
    /// The largest.
    largest: usize,
}

impl<'a> Offsets<'a> {
    pub(crate) fn new(offsets: &'a [u32]) -> Self {
        Offsets { offsets, largest: offsets.iter().max().map_or(0, |&offset| offset as usize) }
    }

    pub(crate) fn len(&self) -> usize {
        self.offsets.len()
    }

    /// Adds the products of some terms t: `sums[r][h][v] += x[offsets[t] + r STEP] weights[h][t - terms.start][v]`, where
    /// a row of weights is taken in vectors from `lane` on. Fetches `ahead` once for [`TOGETHER`] of them.
    ///
    /// # Panics
    /// If x or the weights do not have these elements.
    #[inline(always)]
    pub(crate) fn add_terms<S: Simd, const H: usize, const V: usize, const R: usize, const STEP: usize>(
        &self,
        simd: S,
        mut sums: [[[S::f32s; V]; H]; R],
        terms: Range<usize>,
        x: &[f32],
        (weights, lane): ([&[Lanes<f32>]; H], usize),
        mut ahead: Ahead<H>,
    ) -> [[[S::f32s; V]; H]; R] {
        let offsets = &self.offsets[terms];
        let terms = offsets.len();
        assert!(self.largest < x.len().saturating_sub((R - 1) * STEP), "x has an element at every offset");
        assert!(weights.iter().all(|weights| weights.len() >= terms), "a row of weights for every term");
        assert!(lane + V * S::F32_LANES <= LANES, "weights have these lanes");
        let x = x.as_ptr();
        let mut from = [std::ptr::null::<f32>(); H];
        for h in 0..H {
            from[h] = weights[h].as_ptr().cast::<f32>().wrapping_add(lane);
        }
        let (whole, rest) = offsets.as_chunks::<TOGETHER>();
        for offsets in whole {
            ahead.fetch();
            // SAFETY: it was checked that x and the weights have these elements.
            unsafe {
                sums = add_term::<S, H, V, R, STEP>(simd, sums, x.add(offsets[0] as usize), from, 0);
                sums = add_term::<S, H, V, R, STEP>(simd, sums, x.add(offsets[1] as usize), from, 1);
                sums = add_term::<S, H, V, R, STEP>(simd, sums, x.add(offsets[2] as usize), from, 2);
                sums = add_term::<S, H, V, R, STEP>(simd, sums, x.add(offsets[3] as usize), from, 3);
            }
            for h in 0..H {
                from[h] = from[h].wrapping_add(TOGETHER * LANES);
            }
        }
        for &offset in rest {
            // SAFETY: as above.
            sums = unsafe { add_term::<S, H, V, R, STEP>(simd, sums, x.add(offset as usize), from, 0) };
            for h in 0..H {
                from[h] = from[h].wrapping_add(LANES);
            }
        }
        sums
    }

    /// The same with x in vectors, for all terms: `sums[r][v] += weights[t][lane + r] x[offsets[t] + v apart]`, the
    /// first of a vector.
    ///
    /// # Panics
    /// If x or the weights do not have these elements.
    #[inline(always)]
    pub(crate) fn add_terms_of_planes<S: Simd, const V: usize, const R: usize>(
        &self,
        simd: S,
        mut sums: [[S::f32s; V]; R],
        (x, apart): (&[f32], usize),
        (weights, lane): (&[Lanes<f32>], usize),
    ) -> [[S::f32s; V]; R] {
        let reach = (V - 1).saturating_mul(apart).saturating_add(S::F32_LANES - 1);
        assert!(self.largest < x.len().saturating_sub(reach), "x has a vector at every offset");
        assert!(weights.len() >= self.len(), "a row of weights for every term");
        assert!(lane + R <= LANES, "weights have these lanes");
        let x = x.as_ptr();
        let mut weights = weights.as_ptr().cast::<f32>().wrapping_add(lane);
        let (whole, rest) = self.offsets.as_chunks::<TOGETHER>();
        for offsets in whole {
            // SAFETY: it was checked that x and the weights have these elements.
            unsafe {
                sums = add_planes_term::<S, V, R>(simd, sums, (x.add(offsets[0] as usize), apart), weights, 0);
                sums = add_planes_term::<S, V, R>(simd, sums, (x.add(offsets[1] as usize), apart), weights, 1);
                sums = add_planes_term::<S, V, R>(simd, sums, (x.add(offsets[2] as usize), apart), weights, 2);
                sums = add_planes_term::<S, V, R>(simd, sums, (x.add(offsets[3] as usize), apart), weights, 3);
            }
            weights = weights.wrapping_add(TOGETHER * LANES);
        }
        for &offset in rest {
            // SAFETY: as above.
            sums = unsafe { add_planes_term::<S, V, R>(simd, sums, (x.add(offset as usize), apart), weights, 0) };
            weights = weights.wrapping_add(LANES);
        }
        sums
    }
}

/// The `V` vectors that lie side by side from `from` on.
///
/// # Safety
/// They are there, for as long as they are used.
#[inline(always)]
unsafe fn vectors<'a, S: Simd, const V: usize>(from: *const f32) -> &'a [S::f32s] {
    // SAFETY: as the caller promises.
    S::as_simd_f32s(unsafe { std::slice::from_raw_parts(from, V * S::F32_LANES) }).0
}

/// Adds the products of `V` vectors of x, `apart` elements from each other, and `R` numbers of row `t` of weights.
///
/// # Safety
/// All of these are there.
#[inline(always)]
unsafe fn add_planes_term<S: Simd, const V: usize, const R: usize>(
    simd: S,
    mut sums: [[S::f32s; V]; R],
    (x, apart): (*const f32, usize),
    weights: *const f32,
    t: usize,
) -> [[S::f32s; V]; R] {
    let mut pixels = [simd.splat_f32s(0.0); V];
    for v in 0..V {
        // SAFETY: as the caller promises.
        pixels[v] = unsafe { vectors::<S, 1>(x.add(v * apart)) }[0];
    }
    for r in 0..R {
        // SAFETY: as the caller promises.
        let w = simd.splat_f32s(unsafe { *weights.add(t * LANES + r) });
        for v in 0..V {
            sums[r][v] = simd.mul_add_e_f32s(w, pixels[v], sums[r][v]);
        }
    }
    sums
}

/// Adds the products of `R` numbers, `STEP` apart, and row `t` of weights.
///
/// # Safety
/// All of these are there.
#[inline(always)]
unsafe fn add_term<S: Simd, const H: usize, const V: usize, const R: usize, const STEP: usize>(
    simd: S,
    mut sums: [[[S::f32s; V]; H]; R],
    x: *const f32,
    weights: [*const f32; H],
    t: usize,
) -> [[[S::f32s; V]; H]; R] {
    // Of the operand with fewer vectors, all stay in registers while those of the other come one by one.
    if R < H * V {
        let mut pixels = [simd.splat_f32s(0.0); R];
        for r in 0..R {
            // SAFETY: as the caller promises.
            pixels[r] = simd.splat_f32s(unsafe { *x.add(r * STEP) });
        }
        for h in 0..H {
            // SAFETY: as the caller promises.
            let w = unsafe { vectors::<S, V>(weights[h].add(t * LANES)) };
            for v in 0..V {
                for r in 0..R {
                    sums[r][h][v] = simd.mul_add_e_f32s(pixels[r], w[v], sums[r][h][v]);
                }
            }
        }
    } else {
        let mut filters = [[simd.splat_f32s(0.0); V]; H];
        for h in 0..H {
            // SAFETY: as the caller promises.
            let w = unsafe { vectors::<S, V>(weights[h].add(t * LANES)) };
            filters[h].copy_from_slice(w);
        }
        for r in 0..R {
            // SAFETY: as the caller promises.
            let x = simd.splat_f32s(unsafe { *x.add(r * STEP) });
            for h in 0..H {
                for v in 0..V {
                    sums[r][h][v] = simd.mul_add_e_f32s(x, filters[h][v], sums[r][h][v]);
                }
            }
        }
    }
    sums
}

/// What [`gemm`] runs on, as `gemmnet doctor` reports it.
#[derive(Clone, Debug)]
pub struct BackendInfo {
    /// `OpenBLAS` or `matrixmultiply`.
    pub name: &'static str,
    /// The library's own description: version, build options.
    pub config: String,
    /// The kernels it chose, e.g. `SkylakeX`.
    pub core: String,
    /// Threads it uses inside one product: always 1 here.
    pub threads: usize,
    /// What the user should know: that OpenBLAS uses slow kernels, and what to do.
    pub note: Option<String>,
    /// Whether an element of a product has the same bits in whichever row it stands: see [`gemm_in_terms`].
    pub rows_alike: bool,
    /// Whether these kernels have a path that does not pack: see `Blocks` in `gemm`.
    multiplies_in_place: bool,
}

/// Says what the product runs on. One thread inside OpenBLAS is seen to by every product.
pub fn setup() -> &'static BackendInfo {
    library::setup()
}

/// Makes OpenBLAS use the kernels for the instructions that this processor has and `GEMMNET_MAX_ISA` allows, where it has
/// fallen back to its oldest ones or goes beyond (see the [module's documentation](self)); does nothing otherwise.
/// [`setup`] says which kernels it uses.
///
/// # Safety
/// To be called first thing in a program: it changes the environment for a moment and exchanges OpenBLAS' table of
/// kernels, so while it runs no other thread may use OpenBLAS or read the environment.
pub unsafe fn choose_kernels() {
    // SAFETY: as the caller promises.
    unsafe { library::choose_kernels() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Share;
    use pulp::Scalar;

    /// Small integers, whose sums are exact in any order.
    pub(super) fn integers<T: Element>(len: usize, seed: usize) -> Vec<T> {
        (0..len).map(|i| T::of(((i * 7 + seed * 13 + i / 11 * 5) % 7) as f64 - 3.0)).collect()
    }

    /// Whether `sum` is one chain of multiply-adds over the `(a, b)` in their order. Without fused ones, as on a processor that has none,
    /// every product is rounded.
    pub(super) fn is_one_chain(sum: f32, terms: impl Iterator<Item = (f32, f32)> + Clone) -> bool {
        let fused = terms.clone().fold(0.0_f32, |sum, (a, b)| a.mul_add(b, sum));
        let rounded = terms.fold(0.0_f32, |sum, (a, b)| sum + a * b);
        sum == fused || sum == rounded
    }

    /// Whether it panics.
    pub(super) fn refuses<R>(work: impl FnOnce() -> R) -> bool {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err()
    }

    /// Elements at offsets are there to the last one, or the call panics: the loops themselves ask nothing.
    #[test]
    fn offsets_beyond_the_end_are_refused() {
        const WIDTH: usize = <Scalar as Simd>::F32_LANES;
        let (x, weights) = (vec![1.0_f32; 100], vec![[1.0_f32; LANES]; 6]);
        let offsets = [0, 7, 90, 3, 1, 2];
        // Five pixels, 2 elements apart, from 90 on: 99 elements.
        let pixels = |elements: usize, rows: usize, lane: usize| {
            let ahead = Ahead::new([x.as_ptr()], Share::new::<f32>(0, 1, 1), 0);
            let zeros = [[[Scalar::new().splat_f32s(0.0); 1]; 1]; 5];
            let (x, weights) = (&x[..elements], [&weights[..rows]]);
            Offsets::new(&offsets).add_terms::<_, 1, 1, 5, 2>(Scalar::new(), zeros, 3..6, x, (weights, lane), ahead)
        };
        let sums = pixels(99, 3, LANES - WIDTH);
        assert!(sums.as_flattened().as_flattened().iter().all(|&sum| sum == 3.0));
        assert!(refuses(|| pixels(98, 3, 0)), "also where the largest offset is none of these terms'");
        assert!(refuses(|| pixels(99, 2, 0)) && refuses(|| pixels(99, 3, LANES - WIDTH + 1)));
        // Three vectors, 4 elements apart, from 90 on.
        let end = 98 + WIDTH;
        let planes = |elements: usize, apart: usize, rows: usize, lane: usize| {
            let zeros = [[Scalar::new().splat_f32s(0.0); 3]; 2];
            let (x, weights) = (&x[..elements], &weights[..rows]);
            Offsets::new(&offsets).add_terms_of_planes(Scalar::new(), zeros, (x, apart), (weights, lane))
        };
        let sums = planes(end, 4, 6, LANES - 2);
        assert!(sums.as_flattened().iter().all(|&sum| sum == 6.0));
        assert!(refuses(|| planes(end - 1, 4, 6, 0)) && refuses(|| planes(end, usize::MAX / 2 + 1, 6, 0)));
        assert!(refuses(|| planes(end, 4, 5, 0)) && refuses(|| planes(end, 4, 6, LANES - 1)));
    }

    /// The same for blocks of C, and for the terms that are added to them.
    #[test]
    fn blocks_beyond_the_end_are_refused() {
        const WIDTH: usize = <Scalar as Simd>::F32_LANES;
        let simd = Scalar::new();
        // 5 rows of 9 columns, 10 apart
        let mut c = vec![1.0_f32; 49];
        let mut c = MatMut::new(&mut c, 5, 9, 10);
        let mut block = |at: (usize, usize)| {
            let read = !refuses(|| load_block::<_, 2, 3>(simd, &c, at));
            let written = !refuses(|| store_block::<Scalar, 2, 3>(&mut c, at, &[[simd.splat_f32s(0.0); 2]; 3]));
            assert_eq!(read, written, "block at {at:?}");
            read
        };
        assert!(block((2, 9 - 2 * WIDTH)));
        assert!(!block((3, 0)) && !block((0, 10 - 2 * WIDTH)));
        // A: 4 rows of 6 terms, as they lie and transposed; B: 6 rows
        let (rows, columns) = (vec![1.0_f32; 4 * 6], vec![1.0_f32; 6 * 4]);
        let (rows, columns) = (Mat::new(&rows, 4, 6, 6), Mat::new(&columns, 6, 4, 4).t());
        let b = [1.0_f32; 7 * (LANES + 3)];
        let of_terms = |terms: usize| Mat::new(&b, terms, LANES, LANES + 3);
        fn sums<const TRANSPOSED: bool>(
            a: Mat<'_, f32>,
            i: usize,
            b: Mat<'_, f32>,
            column: usize,
        ) -> [[<Scalar as Simd>::f32s; 1]; 3] {
            let (simd, ahead) = (Scalar::new(), Ahead::new([b.data.as_ptr()], Share::new::<f32>(0, 1, 1), 0));
            add_terms::<_, 1, 3, TRANSPOSED>(simd, [[simd.splat_f32s(0.0); 1]; 3], (a, i), (b, column), ahead)
        }
        let (six, seven) = (of_terms(6), of_terms(7));
        for column in [0, LANES - WIDTH] {
            let (plain, transposed) = (sums::<false>(rows, 1, six, column), sums::<true>(columns, 1, six, column));
            assert!(plain == transposed && plain.as_flattened().iter().all(|&sum| sum == 6.0));
        }
        assert!(refuses(|| sums::<false>(rows, 2, six, 0)) && refuses(|| sums::<true>(columns, 2, six, 0)));
        assert!(refuses(|| sums::<false>(rows, 1, seven, 0)) && refuses(|| sums::<true>(columns, 1, seven, 0)));
        assert!(refuses(|| sums::<false>(rows, 1, six, LANES - WIDTH + 1)), "columns of B");
        assert!(refuses(|| sums::<false>(rows, 1, Mat::new(&b, LANES, 6, 6).t(), 0)), "B transposed");
        assert!(refuses(|| sums::<true>(rows, 1, six, 0)) && refuses(|| sums::<false>(columns, 1, six, 0)));
    }

    /// A size in elements that does not fit the machine's integers is no size that fits.
    #[test]
    fn sizes_that_wrap_around_are_refused() {
        let refused = |rows: usize, cols: usize, ld: usize| {
            refuses(|| {
                MatMut::new(&mut [0_f32; 0], rows, cols, ld);
            })
        };
        assert!(refused(1 << 32, 1 << 32, 1 << 32), "(rows - 1) ld + cols is 0 modulo 2^64");
        assert!(refused(3, 1 << 63, 1 << 63));
        assert!(refused(2, 1, usize::MAX));
        assert!(!refused(0, 1 << 32, 1 << 32));
        assert!(!refused(1 << 32, 0, 1 << 32));
    }
}
