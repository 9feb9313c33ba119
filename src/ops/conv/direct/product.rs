//! Level 3. The product of `direct`: pixels from wherever they lie, filters in vectors.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::blas::{Offsets, steps};
use crate::parallel::piece_range;
use crate::simd::{Ahead, LANES, Lanes, Share, with_count};

/// Most terms that are added up before the next ones: their weights stay in the L1 cache while the pixels go by.
const TERMS: usize = 128;

/// Vectors of filters that are multiplied together.
pub(super) const PAIR: usize = 2;

/// Runs of pixels that lie side by side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Runs {
    pub(super) count: usize,
    /// Pixels of each.
    pub(super) len: usize,
    /// Elements from the first pixel of a run to that of the next.
    pub(super) pitch: usize,
    /// Elements from a pixel to the next: 1 or [`LANES`].
    pub(super) step: usize,
}

/// `product[v][i, j][f] = sum over t of weights[v][t][f] x[offsets[t] + i pitch + j step]` for pixel j of run i, and filter f of
/// vector v, one or [`PAIR`] of them.
pub(super) struct Product<'a> {
    pub(super) x: &'a [f32],
    pub(super) offsets: Offsets<'a>,
    pub(super) weights: &'a [Lanes<f32>],
    pub(super) runs: Runs,
    pub(super) product: &'a mut [Lanes<f32>],
}

impl WithSimd for Product<'_> {
    type Output = ();

    /// Blocks of pixels and filters that fill the registers: 14 x 2 vectors of the 32 of AVX-512, 3 x 4 of the 16 of AVX2, or
    /// more pixels by half as many filters.
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let pair = self.weights.len() > self.offsets.len();
        // The constant alone is matched: arms for other vectors are then not compiled. In a tuple with `pair` they would be.
        match S::F32_LANES {
            16 if pair => self.with_step::<S, PAIR, 1, 14>(simd),
            16 => self.with_step::<S, 1, 1, 16>(simd),
            _ if pair => self.with_step::<S, PAIR, 2, 3>(simd),
            _ => self.with_step::<S, 1, 2, 6>(simd),
        }
    }
}

/// Where a block of the product is: a run, its first pixel in it, and the first of its filters in a vector.
#[derive(Clone, Copy)]
struct At {
    run: usize,
    pixel: usize,
    lane: usize,
}

impl Product<'_> {
    /// In blocks of `R` pixels, `H` vectors of filters, and of each of these `V` vectors of the processor's.
    #[inline(always)]
    fn with_step<S: Simd, const H: usize, const V: usize, const R: usize>(&mut self, simd: S) {
        match self.runs.step {
            1 => self.run::<S, H, V, R, 1>(simd),
            LANES => self.run::<S, H, V, R, LANES>(simd),
            step => unreachable!("pixels {step} elements apart"),
        }
    }

    #[inline(always)]
    fn run<S: Simd, const H: usize, const V: usize, const R: usize, const STEP: usize>(&mut self, simd: S) {
        let all = self.offsets.len();
        let parts = all.div_ceil(TERMS);
        for part in 0..parts {
            let terms = piece_range(all, parts, part);
            for lane in (0..LANES).step_by(V * S::F32_LANES) {
                self.add::<S, H, V, R, STEP>(simd, &terms, lane);
            }
        }
    }

    /// Some terms after the others, in blocks as even as possible.
    #[inline(always)]
    fn add<S: Simd, const H: usize, const V: usize, const R: usize, const STEP: usize>(
        &mut self,
        simd: S,
        terms: &Range<usize>,
        lane: usize,
    ) {
        let Runs { count, len, .. } = self.runs;
        let blocks = len.div_ceil(R);
        // The first blocks of a run have a pixel more, if they are not all alike. Counted along, because a division for every block
        // takes as long as a tenth of one of few terms.
        let (width, wider) = (len / blocks, len % blocks);
        let (mut at, mut within) = (At { run: 0, pixel: 0, lane }, 0);
        let share = Share::new::<Lanes<f32>>(terms.len(), (count * blocks).max(1), steps(terms.len()));
        for index in 0..count * blocks {
            let (width, part) = (width + usize::from(within < wider), (index, share));
            with_count!(simd, width, R, |W| self.block::<S, H, V, W, STEP>(simd, terms.clone(), at, part));
            (at.pixel, within) = (at.pixel + width, within + 1);
            if within == blocks {
                (at, within) = (At { run: at.run + 1, pixel: 0, lane }, 0);
            }
        }
    }

    /// Block `index` of those that add up the same terms; it fetches its share of the next ones' weights.
    #[inline(always)]
    fn block<S: Simd, const H: usize, const V: usize, const R: usize, const STEP: usize>(
        &mut self,
        simd: S,
        terms: Range<usize>,
        at: At,
        (index, share): (usize, Share),
    ) {
        let (all, pixels, lanes) = (self.offsets.len(), self.product.len() / H, at.lane..at.lane + V * S::F32_LANES);
        let place = at.run * self.runs.len + at.pixel;
        let mut sums = [[[simd.splat_f32s(0.0); V]; H]; R];
        if terms.start > 0 {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (h, sums) in sums.iter_mut().enumerate() {
                    let (product, _) = S::as_simd_f32s(&self.product[h * pixels + place + r][lanes.clone()]);
                    sums.copy_from_slice(product);
                }
            }
        }
        // After the last terms come the first ones of the next vectors.
        let next = if terms.end < all { terms.end } else { H * all };
        let next = self.weights.as_ptr().wrapping_add(next);
        let (mut weights, mut from) = ([&self.weights[..0]; H], [next; H]);
        for h in 0..H {
            weights[h] = &self.weights[h * all..][terms.clone()];
            from[h] = next.wrapping_add(h * all);
        }
        let ahead = Ahead::new(from, share, index);
        let x = &self.x[at.run * self.runs.pitch + at.pixel * STEP..];
        let sums = self.offsets.add_terms::<S, H, V, R, STEP>(simd, sums, terms, x, (weights, at.lane), ahead);
        for (r, sums) in sums.iter().enumerate() {
            for (h, sums) in sums.iter().enumerate() {
                let (product, _) = S::as_mut_simd_f32s(&mut self.product[h * pixels + place + r][lanes.clone()]);
                product.copy_from_slice(sums);
            }
        }
    }
}

/// Elements after pixels, and after the planes of [`PlaneProduct`], that vectors may reach.
pub(super) const BEYOND: usize = 2 * LANES;

/// The same product with its planes side by side: `product[f][i, j]` for the first `filters` filters of one vector, all terms at
/// once.
///
/// Here a vector holds pixels, of which it takes any that lie side by side, and nothing is transposed afterwards; rows whose
/// length is not that of vectors cost some.
pub(super) struct PlaneProduct<'a> {
    pub(super) x: &'a [f32],
    pub(super) offsets: Offsets<'a>,
    pub(super) weights: &'a [Lanes<f32>],
    pub(super) filters: usize,
    pub(super) runs: Runs,
    pub(super) product: &'a mut [f32],
    /// Elements from a plane to the next: [`BEYOND`] more than it has.
    pub(super) plane: usize,
}

impl WithSimd for PlaneProduct<'_> {
    type Output = ();

    /// Blocks of 8 filters and 2 vectors of pixels with AVX-512, 6 and 2 with AVX2.
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        match S::F32_LANES {
            16 => self.run::<S, 2, 8>(simd),
            8 => self.run::<S, 2, 6>(simd),
            _ => self.run::<S, 4, 2>(simd),
        }
    }
}

impl PlaneProduct<'_> {
    /// In blocks of `R` filters and `V` vectors of pixels.
    #[inline(always)]
    fn run<S: Simd, const V: usize, const R: usize>(&mut self, simd: S) {
        let blocks = LANES.div_ceil(R);
        for index in 0..blocks {
            let filters = piece_range(self.filters, blocks, index);
            with_count!(simd, filters.len(), R, |H| self.rows::<S, V, H>(simd, filters.start));
        }
    }

    /// All pixels of `R` filters from `first` on, in their order: what is stored beyond the end of a row, the next one sets. Rows of
    /// one vector go together: a vector at a time would keep the adders waiting.
    #[inline(always)]
    fn rows<S: Simd, const V: usize, const R: usize>(&mut self, simd: S, first: usize) {
        let Runs { count, len, pitch, .. } = self.runs;
        let mut run = 0;
        while len <= S::F32_LANES && run + V <= count {
            self.block::<S, V, R>(simd, first, (run * pitch, pitch), (run * len, len));
            run += V;
        }
        for run in run..count {
            let mut pixel = 0;
            while pixel < len {
                let (x, product) = ((run * pitch + pixel, S::F32_LANES), (run * len + pixel, S::F32_LANES));
                if len - pixel > S::F32_LANES {
                    self.block::<S, V, R>(simd, first, x, product);
                    pixel += V * S::F32_LANES;
                } else {
                    self.block::<S, 1, R>(simd, first, x, product);
                    pixel += S::F32_LANES;
                }
            }
        }
    }

    /// `V` vectors of pixels of `R` filters from `first` on: where the first vector is, and how far the next one is from it, in x
    /// and in the product's plane.
    #[inline(always)]
    fn block<S: Simd, const V: usize, const R: usize>(
        &mut self,
        simd: S,
        first: usize,
        (x_at, x_apart): (usize, usize),
        (at, apart): (usize, usize),
    ) {
        let sums = [[simd.splat_f32s(0.0); V]; R];
        let sums = self.offsets.add_terms_of_planes(simd, sums, (&self.x[x_at..], x_apart), (self.weights, first));
        for (r, sums) in sums.iter().enumerate() {
            let plane = &mut self.product[(first + r) * self.plane + at..];
            for (v, &sums) in sums.iter().enumerate() {
                S::as_mut_simd_f32s(&mut plane[v * apart..][..S::F32_LANES]).0[0] = sums;
            }
        }
    }
}
