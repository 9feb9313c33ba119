//! Level 3. The gradients of a convolution: one driver for all algorithms.
//!
//! The images of a batch are cut into [`Slots`]. A piece goes through the images of one by an algorithm's [`Steps`]: it
//! asks the source for `dout`, sets `dx` of its images, and sums up `dw` and `db` over them. The sums of all pieces are then
//! added up by the slots' tree. What nobody asks for is not computed.

use std::ops::Range;

use crate::element::Element;
use crate::ops::conv::depthwise::Depthwise;
use crate::ops::conv::plan::ConvPlan;
use crate::ops::conv::rows::PlaneRows;
use crate::ops::conv::slots::{Slots, add_up};
use crate::ops::conv::tiles::Tiles;
use crate::ops::conv::winograd::Winograd;
use crate::ops::conv::{ConvGradsMut, ConvInput};
use crate::ops::layout::Formats;
use crate::parallel::{Even, for_each_chunk_mut, for_each_share};
use crate::shape::Algorithm;
use crate::simd::{Aligned, LANES, lanes_to_planes};
use crate::workspace::Workspace;

/// Which gradients are asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) dx: bool,
    pub(super) dw: bool,
    pub(super) db: bool,
}

/// One algorithm's part: what happens to the images of a piece. Gradients of the filters are summed as `dw_g^T`
/// `[K, F/G]`, group by group.
pub(super) trait Steps<T: Element>: Sync {
    /// Elements of the filters as [`Steps::prepare`] lays them out for `dx`.
    fn filters_len(&self) -> usize;

    /// Lays w `[F, C / G, KH, KW]` out for `dx`, once for all pieces.
    fn prepare(&self, w: &[T], filters: &mut [T]);

    /// Elements of scratch that a piece needs.
    fn scratch_len(&self) -> usize;

    /// Sets the gradients of a piece that has images. `source` is asked once for every row of their `dout`.
    fn run(&self, piece: Piece<'_, T>, source: &(impl Fn(PlaneRows, &mut [T]) + Sync), scratch: &mut [T]);
}

/// The images of a slot, and their gradients.
pub(super) struct Piece<'a, T> {
    pub(super) images: Range<usize>,
    /// `x` of all images.
    x: &'a [T],
    /// The filters for `dx`.
    pub(super) filters: &'a [T],
    pub(super) dx: ImageGrads<'a, T>,
    /// The sum over its images as `dw_g^T` `[K, F/G]`, or empty.
    pub(super) dw: &'a mut [T],
    /// The sum over its images `[F]`, or empty.
    pub(super) db: &'a mut [T],
}

impl<'a, T> Piece<'a, T> {
    /// One of its images.
    pub(super) fn x(&self, image: usize) -> &'a [T] {
        &self.x[image * self.dx.image_len..][..self.dx.image_len]
    }
}

/// `dx` of the images of a piece, or nothing.
pub(super) struct ImageGrads<'a, T> {
    data: &'a mut [T],
    first: usize,
    image_len: usize,
}

impl<T> ImageGrads<'_, T> {
    /// That of one image, by its number in the batch; empty if nobody asks for `dx`.
    pub(super) fn image(&mut self, image: usize) -> &mut [T] {
        if self.data.is_empty() {
            return &mut [];
        }
        &mut self.data[(image - self.first) * self.image_len..][..self.image_len]
    }
}

/// Gradients of `out = w * x + b`, all set, not added to. `source(rows, slice)` fills `slice` with rows of `dout`; it is
/// asked once for each. Where the plan is for an output in blocks of channels, it is asked for blocks of whole planes, by the first
/// filter of each; where x lies in blocks, dx does, too.
///
/// # Panics
/// If a slice has not the length of its shape, or the plan is for another type of element, or for blocks of channels where
/// [`ConvPlan::gradients_may_be_blocked`] says that they cannot be.
pub(crate) fn backward<T: Element>(
    plan: &ConvPlan,
    input: ConvInput<'_, T>,
    source: impl Fn(PlaneRows, &mut [T]) + Sync + Send,
    grads: ConvGradsMut<'_, T>,
    ws: &mut Workspace,
) {
    plan.check_images(input.images, input.x);
    plan.check_filters(input.w);
    assert!(
        plan.formats == Formats::default() || plan.gradients_may_be_blocked(),
        "of this algorithm only the forward pass knows blocks of channels"
    );
    let ConvGradsMut { dx, dw, db } = &grads;
    assert!(dx.as_ref().is_none_or(|dx| dx.len() == input.x.len()), "dx has the length of x");
    assert!(dw.as_ref().is_none_or(|dw| dw.len() == input.w.len()), "dw has the length of w");
    assert!(db.as_ref().is_none_or(|db| db.len() == plan.shape.filters), "db has an element for each filter");
    let wanted = Wanted { dx: dx.is_some(), dw: dw.is_some(), db: db.is_some() };
    if input.images == 0 {
        [grads.dw, grads.db].into_iter().flatten().for_each(|sums| sums.fill(T::zero()));
        return;
    }
    let slots = plan.slots(input.images);
    match plan.algorithm {
        _ if !(wanted.dx || wanted.dw || wanted.db) => {}
        Algorithm::Winograd => run(&Winograd::new(plan, slots, wanted), slots, plan, input, &source, grads, ws),
        Algorithm::Depthwise => run(&Depthwise::new(&plan.shape, wanted), slots, plan, input, &source, grads, ws),
        Algorithm::Auto | Algorithm::Im2col => run(&Tiles::new(plan, wanted), slots, plan, input, &source, grads, ws),
    }
}

/// [`backward`] of at least one image by `steps`.
fn run<T: Element>(
    steps: &impl Steps<T>,
    slots: Slots,
    plan: &ConvPlan,
    input: ConvInput<'_, T>,
    source: &(impl Fn(PlaneRows, &mut [T]) + Sync),
    grads: ConvGradsMut<'_, T>,
    ws: &mut Workspace,
) {
    let ConvGradsMut { dx, dw, db } = grads;
    let (pieces, image_len) = (slots.count(), plan.image_len());
    let dw_len = if dw.is_some() { input.w.len() } else { 0 };
    let db_len = if db.is_some() { plan.shape.filters } else { 0 };
    // whole cache lines
    let pitch = (dw_len + db_len).next_multiple_of(64 / size_of::<T>());
    let filters_len = if dx.is_some() { steps.filters_len() } else { 0 };
    let (shared, scratch) = ws.lend(filters_len + pieces * pitch, steps.scratch_len());
    let (filters, sums) = shared.split_at_mut(filters_len);
    if dx.is_some() {
        steps.prepare(input.w, filters);
    }
    let filters = &*filters;
    let dx_images = if dx.is_some() { input.images } else { 0 };
    let shares = (Even::new(sums, pieces, pieces), Even::new(dx.unwrap_or_default(), dx_images, pieces));
    for_each_share(shares, |piece, (sums, dx)| {
        let images = slots.images(piece);
        let (dw, db) = sums.split_at_mut(dw_len);
        let dx = ImageGrads { data: dx, first: images.start, image_len };
        let piece = Piece { images, x: input.x, filters, dx, dw, db: &mut db[..db_len] };
        scratch.with(|scratch| steps.run(piece, source, scratch));
    });
    let sums = add_up(sums, pieces);
    if let Some(dw) = dw {
        transpose_groups(&sums[..dw_len], (plan.shape.column(), plan.shape.filters / plan.shape.groups), dw);
    }
    if let Some(db) = db {
        db.copy_from_slice(&sums[dw_len..][..db_len]);
    }
}

/// `to_g[cols, rows] = from_g[rows, cols]^T` for every group `g`.
pub(super) fn transpose_groups<T: Element>(from: &[T], (rows, cols): (usize, usize), to: &mut [T]) {
    const CHUNK: usize = 4096;
    let group = rows * cols;
    if from.len() == group {
        return for_each_chunk_mut(to, LANES * rows, |block, to| {
            transpose_columns(&from[block * LANES..], cols, rows, to)
        });
    }
    let chunk = CHUNK.div_ceil(group) * group;
    for_each_chunk_mut(to, chunk, |index, to| {
        for (from, to) in from[index * chunk..].chunks_exact(group).zip(to.chunks_exact_mut(group)) {
            for (block, to) in to.chunks_mut(LANES * rows).enumerate() {
                transpose_columns(&from[block * LANES..], cols, rows, to);
            }
        }
    });
}

/// The first columns of `from`, `rows` rows that are `ld` elements apart, become the rows of `to`: as many as it has,
/// which are no more than [`LANES`].
fn transpose_columns<T: Element>(from: &[T], ld: usize, rows: usize, to: &mut [T]) {
    const TOGETHER: usize = 64;
    let cols = to.len() / rows;
    let Aligned(lanes) = &mut Aligned([[T::zero(); LANES]; TOGETHER]);
    for start in (0..rows).step_by(TOGETHER) {
        let lanes = &mut lanes[..TOGETHER.min(rows - start)];
        for (lanes, row) in lanes.iter_mut().zip(from[start * ld..].chunks(ld)) {
            lanes[..cols].copy_from_slice(&row[..cols]);
        }
        lanes_to_planes(lanes, cols, &mut to[start..], rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_transposed() {
        for (groups, rows, cols) in [(1, 1, 1), (1, 70, 35), (1, 9, 16), (3, 5, 40), (700, 9, 1), (2, 130, 17)] {
            let from: Vec<f32> = (0..groups * rows * cols).map(|i| i as f32).collect();
            let mut to = vec![-1.0; from.len()];
            transpose_groups(&from, (rows, cols), &mut to);
            for (i, &got) in to.iter().enumerate() {
                let (group, col, row) = (i / (rows * cols), i / rows % cols, i % rows);
                assert_eq!(got, from[(group * rows + row) * cols + col], "{groups} groups of {rows} x {cols}");
            }
        }
    }
}
