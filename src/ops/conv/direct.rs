//! Level 3. Convolution in `f32`, forward, as a product whose columns are never written.
//!
//! It is im2col's product, with the pixels in the part of the left operand:
//!
//! ```text
//! out_g^T[pixels, F/G] = cols_g^T[pixels, K] . w_g^T[K, F/G]              K = C/G KH KW
//! ```
//!
//! Of the columns only the places of the pixels are kept, one for each term, since a stride is undone and the padding written
//! out first (`padded`): the pixels of a row then lie side by side, whichever cell of the window sees them. A block of the
//! output stays in the registers while the terms go by (`product`): some pixels of a row by vectors of filters, whose product is
//! transposed afterwards, or some filters by vectors of pixels, where rows are as long as some vectors. Where x lies in blocks of
//! channels, so do the padded pixels, and the first kernel reads every [`LANES`]th of them; where the output does, its product is
//! a row of a block as it is.
//!
//! A piece computes a band of rows for all filters of a group, or all of them for some filters. Every element of the output is one
//! chain of multiply-adds over its terms in their order, so its bits do not depend on how the output is cut.

mod padded;
mod product;

use std::ops::Range;

use self::padded::Padded;
use self::product::{BEYOND, PAIR, PlaneProduct, Product, Runs};
use crate::blas::Offsets;
use crate::element::Element;
use crate::ops::conv::plan::{ConvPlan, DirectPart, Filters};
use crate::ops::conv::rows::Outputs;
use crate::ops::layout::{Formats, MemoryFormat};
use crate::parallel::{Chunks, for_each_share};
use crate::shape::Conv2dShape;
use crate::simd::{LANES, Lanes, arch, lanes_to_planes, planes_to_lanes, vectorized};
use crate::workspace::Workspace;

/// Terms up to which a product may be one of planes.
const PLANE_TERMS: usize = 256;

/// Vectors of a group's filters; the last may not be full.
fn vectors(shape: &Conv2dShape) -> usize {
    (shape.filters / shape.groups).div_ceil(LANES)
}

/// Elements of [`prepare_filters`].
pub(super) fn filters_len(shape: &Conv2dShape) -> usize {
    shape.groups * vectors(shape) * shape.column() * LANES
}

/// The filters w `[F, C / G, KH, KW]` as vectors of [`LANES`] filters of a group, term by term: zeros where there are fewer.
pub(super) fn prepare_filters<T: Element>(shape: &Conv2dShape, w: &[T], filters: &mut [T]) {
    let (terms, per_group, vectors) = (shape.column(), shape.filters / shape.groups, vectors(shape));
    for_each_share(Chunks::new(filters, terms * LANES), |index, to| {
        let first = index % vectors * LANES;
        let count = LANES.min(per_group - first);
        let (to, _) = to.as_chunks_mut();
        if count < LANES {
            to.fill([T::zero(); LANES]);
        }
        planes_to_lanes(&w[(index / vectors * per_group + first) * terms..], terms, count, to);
    });
}

/// What every piece needs to know.
struct Direct {
    shape: Conv2dShape,
    part: DirectPart,
    formats: Formats,
    padded: Padded,
    /// Pieces of a group's filters.
    pieces: usize,
}

/// What a piece computes.
struct Place {
    /// The number of its group, over all images.
    index: usize,
    group: usize,
    /// Of the group.
    filters: Range<usize>,
    rows: Range<usize>,
}

impl Direct {
    fn new(plan: &ConvPlan, images: usize) -> Self {
        let (shape, part) = (plan.shape, plan.direct_part(images));
        Direct {
            shape,
            part,
            formats: plan.formats,
            padded: Padded::new(&shape, plan.formats.input, part.rows),
            pieces: shape.filters / shape.groups / part.filters,
        }
    }

    /// Planes, or blocks of them, of a group.
    fn planes(&self) -> usize {
        (self.shape.channels / self.shape.groups).div_ceil(self.formats.input.side_by_side())
    }

    /// Elements of one of them.
    fn plane_len(&self) -> usize {
        self.shape.in_plane() * self.formats.input.side_by_side()
    }

    /// Elements of a group's padded pixels, for one band.
    fn padded_len(&self) -> usize {
        self.planes() * self.padded.plane_len() + BEYOND
    }

    /// Elements of the product of a vector of filters.
    fn plane_vectors_len(&self) -> usize {
        (self.part.rows * self.shape.cols.output + BEYOND) * LANES
    }

    /// Elements of scratch that a piece takes: padded pixels, the product of a pair of vectors, and planes of one.
    fn scratch_len(&self) -> usize {
        self.padded_len() + (PAIR + 1) * self.plane_vectors_len()
    }

    /// Output rows of a band.
    fn rows(&self, band: usize) -> Range<usize> {
        band * self.part.rows..((band + 1) * self.part.rows).min(self.shape.rows.output)
    }

    /// That of block (i, j) of the output.
    fn place(&self, (i, band): (usize, usize)) -> Place {
        let (index, first) = (i / self.pieces, i % self.pieces * self.part.filters);
        let (group, filters) = (index % self.shape.groups, first..first + self.part.filters);
        Place { index, group, filters, rows: self.rows(band) }
    }

    /// The pixels of planes x that output rows `rows` see.
    fn fill<T: Element>(&self, x: &[T], rows: Range<usize>, padded: &mut [T]) {
        vectorized!(match self.formats.input {
            MemoryFormat::Planar => self.padded.fill(T::zero(), x, rows, padded),
            MemoryFormat::Blocked => {
                self.padded.fill([T::zero(); LANES], x.as_chunks().0, rows, padded.as_chunks_mut().0);
            }
        });
    }

    /// Whether vectors of pixels are multiplied: where these lie side by side, before and after, few of the vectors reach beyond a
    /// row, and sums are not cut.
    fn by_planes(&self, runs: Runs) -> bool {
        self.formats == Formats::default()
            && self.shape.column() <= PLANE_TERMS
            && 16 * runs.len >= 15 * runs.len.next_multiple_of(LANES)
    }

    /// The product of a place: calls `finish(filter, plane)` for every filter of it, counted within its group, with the rows of
    /// its plane; for every block of filters, with the first of them. `product` and `planes` are scratch.
    fn multiply<T: Element>(
        &self,
        place: &Place,
        (padded, offsets, weights): (&[T], Offsets<'_>, &[T]),
        (product, planes): (&mut [T], &mut [T]),
        mut finish: impl FnMut(usize, &mut [T]),
    ) {
        let (terms, runs) = (self.shape.column(), self.padded.runs(place.rows.len()));
        let (pixels, x) = (runs.count * runs.len, bytemuck::cast_slice(padded));
        let weights = &weights[place.group * vectors(&self.shape) * terms * LANES..];
        let by_planes = self.by_planes(runs);
        // of planes half as many at a time: small ones stay in the L1 cache until they are finished
        let together = if by_planes { LANES } else { PAIR * LANES };
        for first in place.filters.clone().step_by(together) {
            let filters = (place.filters.end - first).min(together);
            let weights = &weights[first * terms..][..filters.next_multiple_of(LANES) * terms];
            let weights = bytemuck::cast_slice(weights);
            if by_planes {
                let plane = pixels + BEYOND;
                let product = bytemuck::cast_slice_mut(&mut product[..filters * plane]);
                arch().dispatch(PlaneProduct { x, offsets, weights, filters, runs, product, plane });
                let planes = product.chunks_exact_mut(plane).enumerate();
                planes.for_each(|(f, plane)| finish(first + f, bytemuck::cast_slice_mut(&mut plane[..pixels])));
            } else {
                let product = &mut product[..filters.next_multiple_of(LANES) * pixels];
                let product: &mut [Lanes<T>] = bytemuck::cast_slice_mut(product);
                arch().dispatch(Product { x, offsets, weights, runs, product: bytemuck::cast_slice_mut(product) });
                for (vector, product) in product.chunks_exact_mut(pixels).enumerate() {
                    if self.formats.output == MemoryFormat::Blocked {
                        finish(first + vector * LANES, product.as_flattened_mut());
                        continue;
                    }
                    // all planes of a vector, also those that nobody wants: they cost less than the question
                    lanes_to_planes(product, LANES, &mut planes[..LANES * pixels], pixels);
                    let wanted = LANES.min(filters - vector * LANES);
                    let planes = planes.chunks_exact_mut(pixels).take(wanted).enumerate();
                    planes.for_each(|(f, plane)| finish(first + vector * LANES + f, plane));
                }
            }
        }
    }
}

/// Elements of scratch that a piece of [`forward`] takes.
pub(super) fn scratch_len(plan: &ConvPlan, images: usize) -> usize {
    Direct::new(plan, images).scratch_len()
}

/// As [`crate::ops::conv::forward`], for elements of `f32`.
pub(super) fn forward<T: Element>(
    plan: &ConvPlan,
    images: usize,
    x: &[T],
    w: Filters<'_, T>,
    outputs: Outputs<'_, T>,
    finish: impl Fn(usize, &mut [T], &mut [T], &mut [u8]) + Sync + Send,
    ws: &mut Workspace,
) {
    let direct = Direct::new(plan, images);
    let (shape, part) = (&direct.shape, direct.part);
    let weights_len = w.memory_len(plan);
    let (padded_len, plane_len) = (direct.padded_len(), direct.plane_vectors_len());
    let terms = shape.column();
    let (common, scratch) = ws.lend(weights_len + terms, direct.scratch_len());
    let (weights, offsets) = common.split_at_mut(weights_len);
    let offsets: &mut [u32] = bytemuck::cast_slice_mut(offsets);
    direct.padded.offsets(offsets);
    let (weights, offsets) = (w.prepared(plan, weights), Offsets::new(offsets));
    outputs.for_each_block(part.filters, part.rows, |at, mut block| {
        let place = direct.place(at);
        scratch.with(|scratch: &mut [T]| {
            let (padded, scratch) = scratch.split_at_mut(padded_len);
            // Where the filters are dealt out, every piece does this for itself: it takes less time than to get them from another
            // core.
            let len = direct.planes() * direct.plane_len();
            direct.fill(&x[place.index * len..][..len], place.rows.clone(), padded);
            let scratch = scratch.split_at_mut(PAIR * plane_len);
            direct.multiply(&place, (&*padded, offsets, weights), scratch, |filter, plane| {
                let (out, cells) = block.rows(0, filter - place.filters.start, 0..place.rows.len());
                finish(place.group * (shape.filters / shape.groups) + filter, plane, out, cells);
            });
        });
    });
}

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use crate::ops::conv::conv2d_forward;
    use crate::parallel::with_threads;
    use crate::shape::{Algorithm, Conv2d, Padding};

    /// Small integers, whose sums are exact in any order.
    fn integers(shape: [usize; 4], seed: usize) -> Array4<f32> {
        let mut i = seed;
        Array4::from_shape_simple_fn(shape, || {
            i += 1;
            ((i * 7 + i / 11 * 5) % 7) as f32 - 3.0
        })
    }

    #[track_caller]
    fn check(x: [usize; 4], w: [usize; 4], conv: Conv2d) {
        let (x, w, conv) = (integers(x, 1), integers(w, 2), Conv2d { algorithm: Algorithm::Im2col, ..conv });
        let got = conv2d_forward(x.view(), w.view(), None, &conv).unwrap();
        let want = conv2d_forward(x.mapv(f64::from).view(), w.mapv(f64::from).view(), None, &conv).unwrap();
        assert!(got.iter().map(|&v| f64::from(v)).eq(want), "{:?} by {:?}, {conv:?}", x.dim(), w.dim());
    }

    /// Blocks of all widths, full and half vectors, and sums that are cut.
    #[test]
    fn it_is_exact_at_every_edge() {
        let same = Conv2d { padding: Padding::Same, ..Conv2d::default() };
        for cols in (1..=34).chain([57, 112]) {
            let filters = [1, 15, 16, 17, 32, 33, 50][cols % 7];
            check([2, 3, 3, cols], [filters, 3, 3, 3], same);
        }
        for channels in [28, 29, 57, 100] {
            check([1, channels, 4, 5], [20, channels, 3, 3], same);
            check([1, 3 * channels, 4, 5], [34, 3 * channels, 1, 1], same);
        }
    }

    /// Bands above, between and below the pixels, with more threads than there are processors: bands are as narrow as may be.
    #[test]
    fn bands_without_a_pixel_are_zero() {
        let all = |padding| Conv2d { padding: Padding::All(padding), ..Conv2d::default() };
        for threads in [1, 4, 16, 64] {
            with_threads(threads, || {
                check([1, 256, 28, 28], [3, 256, 1, 1], all(15));
                check([1, 3, 4, 4], [3, 3, 1, 1], all(10));
                check([1, 3, 4, 40], [17, 3, 3, 3], all(40));
                check([2, 6, 39, 42], [4, 3, 1, 1], Conv2d { stride: (4, 1), groups: 2, ..all(6) });
                check([2, 6, 39, 42], [4, 3, 3, 3], Conv2d { stride: (2, 3), groups: 2, ..all(20) });
            })
            .unwrap();
        }
    }

    #[test]
    fn padding_strides_and_dilation_find_their_pixels() {
        let sides = |top, bottom, left, right| Padding::Sides { top, bottom, left, right };
        let paddings = [Padding::Valid, Padding::Same, sides(0, 3, 2, 1), sides(5, 0, 0, 4), Padding::All(6)];
        for (stride, dilation) in [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 6), (40, 1)] {
            for padding in paddings {
                for (rows, cols) in [(3, 3), (1, 1), (2, 5), (7, 1)] {
                    let conv = Conv2d {
                        padding,
                        stride: (stride, 5 - stride.min(4)),
                        dilation: (dilation, 1),
                        ..Conv2d::default()
                    };
                    check([1, 4, 41, 38], [3, 4, rows, cols], conv);
                    let (stride, dilation) = ((5 - stride.min(4), stride), (1, dilation));
                    check([2, 6, 39, 42], [4, 3, cols, rows], Conv2d { stride, dilation, groups: 2, ..conv });
                }
            }
        }
    }
}
