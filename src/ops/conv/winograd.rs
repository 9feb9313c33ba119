//! Level 3. Convolution with fewer multiplications: Winograd's F(6x6, 3x3), or of smaller tiles, as matrix products.
//!
//! For 3x3 filters with stride 1 (Lavin & Gray 2015, arXiv 1509.09308). The output is cut into tiles of 6x6, each of which
//! sees 8x8 pixels `d`; with the constant matrices `A`, `B`, `G`,
//!
//! ```text
//! V = B^T d B   per tile and channel          U = G g G^T   per filter and channel
//! M_q[tiles, F] = V_q[tiles, C] . U_q[C, F]   for each of the 64 elements q
//! y = A^T M A   per tile and filter
//! ```
//!
//! 64 multiplications do the work of 324; a tile of m x m outputs takes (m + 2)^2. An axis is cut into tiles of the length with
//! which the fewest are left, 30 outputs into five of 6, 8 into two of 4; where tiles do not divide the output, those at its end
//! are shorter, and take part in fewer of the products. `U` is laid out in the panels that
//! `blas::panels` takes, `V` is used as it lies: these products copy no operand. Those of `dU`, whose operands both change,
//! are OpenBLAS' where it copies none either, and else those of `blas::transposed`. Images go through in groups of about 64 tiles: enough rows for the products to be efficient, few enough for
//! `V` and `M` to be in a core's share of the caches when they are used. An image with many tiles goes forward in bands; where
//! there are fewer images than threads, bands are as high as is even, or panels of filters are dealt out, each with a `V` of
//! its own. Backward is the adjoint, step by step, and shares the transform of `dy` between both gradients:
//!
//! ```text
//! dM = A dy A^T       dU_q[C, F] = V_q^T[C, tiles] . dM_q[tiles, F]        dg = G^T dU G
//!                     dV_q[tiles, C] = dM_q[tiles, F] . U_q^T[F, C]        dx += B dV B^T, tiles overlapping by 2
//! ```
//!
//! `dU` has two to seven times the elements of `dg`. It is made for a block of channels and filters at a time, and becomes `dg`
//! before it leaves the L2 cache. A slot of few tiles is one group; where it has several, all of its `dU` is kept from one to the
//! next.
//!
//! The larger a tile, the more elements has `U`: 64 where tiles of 4x4 take 36. Where it is used for a few tiles, as in a session
//! for single images, larger tiles save less than the reading of their `U` takes, and tiles are of 4x4 at most
//! (`ConvPlan::for_images`).
//!
//! # Channels side by side
//! A transform takes the same sums of differently placed pixels. `LANES` channels are transformed at once: their planes
//! are dealt out so that a pixel is a vector of channels (`planes_to_lanes`), and from then on every load and store,
//! also of the rows of `V` and `M`, is a whole vector. In a session, and in training between layers with batchnorm, x and the
//! output may lie so already (`MemoryFormat::Blocked`): then pixels are transformed from where they lie, and only tiles at the
//! edge are put together before. Products are finished a few tiles at a time, which stay in the L1 cache.
//!
//! The transforms add and subtract numbers of different size. So the error in `f32` is about 1e-6 to 1e-5 relative for up to 512
//! channels and filters, and grows with the root of their number (im2col: 2e-7); with tiles of 6x6 it is twice that of 4x4. In
//! `f64` nobody wants that, so [`crate::ops::conv::ConvPlan`] refuses it there.

mod group;
mod maps;
mod order;
mod pixels;
mod products;
mod transforms;

use crate::blas::Accum;
use crate::blas::panels::PANEL;
use crate::element::Element;
use crate::ops::conv::backward::{Piece, Steps, Wanted};
use crate::ops::conv::plan::{ConvPlan, Filters, GRADIENT_BLOCK, WinogradPart};
use crate::ops::conv::rows::{Outputs, PlaneRows};
use crate::ops::conv::slots::Slots;
use crate::ops::layout::MemoryFormat;
use crate::parallel::{Grid, for_each_share, piece_range};
use crate::shape::Conv2dShape;
use crate::simd::{Aligned, LANES, Lanes, fetch, planes_to_lanes, sum, vectorized};
use crate::workspace::Workspace;

use group::{Group, Place};
use maps::{Filter, FilterAdjoint};
pub(super) use maps::{MOST, SHORTER};
use order::Cut;
use pixels::{planes_to_rows, rows_to_planes};
use products::{FilterPanels, Stack, multiply, multiply_transposed};
use transforms::{Half, transform_2d};

/// Outputs of a tile down and across, `most` at most, with which the fewest multiplications are left.
pub(super) fn best_tile(shape: &Conv2dShape, most: usize) -> (usize, usize) {
    (Cut::best(shape.rows.output, most), Cut::best(shape.cols.output, most))
}

/// How the output of an image is cut into tiles, down and across.
fn cuts(plan: &ConvPlan) -> (Cut, Cut) {
    let ConvPlan { shape, tile, .. } = plan;
    (Cut::new(shape.rows.output, tile.0), Cut::new(shape.cols.output, tile.1))
}

/// Rows and columns of tiles of an image.
pub(super) fn tiles(plan: &ConvPlan) -> (usize, usize) {
    let (rows, cols) = cuts(plan);
    (rows.tiles(), cols.tiles())
}

/// Tiles of an image.
pub(super) fn tiles_of(plan: &ConvPlan) -> usize {
    let (rows, cols) = tiles(plan);
    rows * cols
}

/// `U_q` `[C, F]`, as the forward pass needs it.
fn filters(plan: &ConvPlan) -> FilterPanels {
    FilterPanels { rows: plan.shape.channels, cols: plan.shape.filters, tile: plan.tile }
}

/// Elements of [`prepare_filters`].
pub(super) fn filters_len(plan: &ConvPlan) -> usize {
    filters(plan).len()
}

/// `U` of the filters w `[F, C, 3, 3]`.
pub(super) fn prepare_filters<T: Element>(plan: &ConvPlan, w: &[T], u: &mut [T]) {
    transform_filters(&filters(plan), (9, plan.shape.channels * 9), w, u);
}

/// Rows of transformed filters that a piece makes.
const FILTER_ROWS: usize = 16;

/// Transforms the filters whose elements begin at `row * steps.0 + col * steps.1` in `w`.
fn transform_filters<T: Element>(to: &FilterPanels, steps: (usize, usize), w: &[T], u: &mut [T]) {
    // a piece has the same rows of each of the panels
    let (panels, panel) = (to.count() * to.panels(), to.panel());
    let rows = Grid::new(&mut u[..to.len()], (panels, panel), (panels, FILTER_ROWS * PANEL));
    for_each_share(rows, |piece, mut u| {
        let first = piece * FILTER_ROWS;
        let count = FILTER_ROWS.min(to.rows.saturating_sub(first));
        let Aligned(filters) = &mut Aligned([[[T::zero(); LANES]; 9]; FILTER_ROWS]);
        for col in (0..to.cols).step_by(LANES) {
            if col + LANES > to.cols {
                // there is no filter in the lanes that are left over
                filters.fill([[T::zero(); LANES]; 9]);
            }
            for (row, filters) in filters.iter_mut().enumerate().take(count) {
                let w = &w[(first + row) * steps.0 + col * steps.1..];
                planes_to_lanes(w, steps.1, LANES.min(to.cols - col), filters);
            }
            vectorized!(transform_filter_rows(
                &filters[..count],
                to.tile,
                #[inline(always)]
                |i, j, row, vector| {
                    let panel = u.get(to.index(i, j) * to.panels() + col / PANEL);
                    panel[row * PANEL..].as_chunks_mut().0[col % PANEL / LANES] = vector;
                },
            ));
        }
    });
}

/// `U = G g G^T` of several vectors of filters, at the points of a tile with `outputs`: calls `store(i, j, row, vector)`.
#[inline(always)]
fn transform_filter_rows<T: Element>(
    filters: &[[Lanes<T>; 9]],
    outputs: (usize, usize),
    mut store: impl FnMut(usize, usize, usize, Lanes<T>),
) {
    let mut half = Half::new();
    for (row, g) in filters.iter().enumerate() {
        transform_2d::<Filter, T>(
            &mut half,
            outputs,
            #[inline(always)]
            |i, j| g[i * 3 + j],
            #[inline(always)]
            |i, j, vector| store(i, j, row, vector),
        );
    }
}

/// `dg = G^T dU G` of the first `channels` channels and `filters` filters of dU: the adjoint of [`transform_filters`].
/// Into dw, nine rows for each channel, which are `dw_row` elements apart.
#[inline(always)]
fn filter_gradient<T: Element>(
    stack: &Stack,
    (channels, filters): (usize, usize),
    du: &[T],
    dw: &mut [T],
    dw_row: usize,
) {
    let (du, _) = du.as_chunks::<LANES>();
    // Collected before they are stored: with the case of an incomplete vector in it, a transform is not unrolled.
    let Aligned(dg) = &mut Aligned([[T::zero(); LANES]; 9]);
    let mut half = Half::new();
    for c in 0..channels {
        let mut rows = dw[c * 9 * dw_row..].chunks_mut(dw_row);
        let mut rows: [_; 9] = std::array::from_fn(
            #[inline(always)]
            |_| rows.next().expect("nine rows")[..filters].as_chunks_mut::<LANES>(),
        );
        for at in 0..filters.div_ceil(LANES) {
            transform_2d::<FilterAdjoint, T>(
                &mut half,
                stack.tile,
                #[inline(always)]
                |i, j| du[stack.at(i, j, c, at * LANES)],
                #[inline(always)]
                |i, j, vector| dg[i * 3 + j] = vector,
            );
            for (dg, (whole, rest)) in dg.iter().zip(&mut rows) {
                // The next channel's row, if there is one: the processor does not fetch nine of them by itself in time.
                fetch(whole.as_ptr().wrapping_add(at).cast::<T>().wrapping_add(9 * dw_row).cast());
                match whole.get_mut(at) {
                    Some(whole) => *whole = *dg,
                    None => rest.copy_from_slice(&dg[..rest.len()]),
                }
            }
        }
    }
}

/// Elements of scratch that a piece of [`forward`] takes.
pub(super) fn scratch_len(plan: &ConvPlan, images: usize) -> usize {
    Group::new(plan, plan.winograd_part(images)).lens().iter().sum()
}

/// As [`crate::ops::conv::forward`].
pub(super) fn forward<T: Element>(
    plan: &ConvPlan,
    images: usize,
    x: &[T],
    w: Filters<'_, T>,
    outputs: Outputs<'_, T>,
    finish: impl Fn(usize, &mut [T], &mut [T], &mut [u8]) + Sync + Send,
    ws: &mut Workspace,
) {
    let (shape, part) = (&plan.shape, plan.winograd_part(images));
    let (group, u_panels) = (Group::new(plan, part), filters(plan));
    let [v_len, m_len, pixels_len, planes_len] = group.lens();
    let (u, scratch) = ws.lend(w.memory_len(plan), v_len + m_len + pixels_len + planes_len);
    let u = w.prepared(plan, u);
    outputs.for_each_part(shape, (part.images, part.filters, part.tile_rows * plan.tile.0), |at, mut out| {
        let (place, filters) = Place::of(plan, part, images, at);
        scratch.with(|scratch: &mut [T]| {
            let (v, scratch) = scratch.split_at_mut(v_len);
            let (m, scratch) = scratch.split_at_mut(m_len);
            let (pixels, planes) = scratch.split_at_mut(pixels_len);
            let (pixels, _) = pixels.as_chunks_mut::<LANES>();
            // Where the filters are dealt out, every piece makes this for itself: it takes less time than to get it from another
            // core.
            group.transform_images(&place, |image| plan.image(x, image), pixels, v);
            // M_q[tiles, F] = V_q[tiles, C] . U_q[C, F]
            multiply(&group.order(&place), (&group.v, &*v), (&u_panels, u, filters.clone()), (&group.m, m));
            group.for_each_plane(&place, filters.len(), m, (pixels, planes), |(image, rows), filter, product| {
                let (out, cells) = out.rows(image, filter, rows);
                finish(filters.start + filter, product, out, cells);
            });
        });
    });
}

/// What every group needs to know backward.
#[derive(Clone, Copy, Debug)]
pub(super) struct Winograd {
    group: Group,
    /// `dU` of the channels and filters that become gradients together: all of them, if a slot has several groups.
    du: Stack,
    /// `U_q^T` `[F, C]`.
    filters: FilterPanels,
    wanted: Wanted,
}

/// Adds the sums of a block's planes to `sums`, as many of them as there are.
fn add_planes<T: Element>(block: &[Lanes<T>], sums: &mut [T]) {
    let mut of_block = [T::zero(); LANES];
    for pixel in block {
        of_block.iter_mut().zip(pixel).for_each(|(sum, &value)| *sum += value);
    }
    sums.iter_mut().zip(of_block).for_each(|(sum, of_block)| *sum += of_block);
}

/// What a piece of the backward pass works with: parts of its scratch.
struct Parts<'a, T> {
    /// `V`, then `dV`.
    v: &'a mut [T],
    dm: &'a mut [T],
    pixels: &'a mut [Lanes<T>],
    planes: &'a mut [T],
    du: &'a mut [T],
}

impl Winograd {
    pub(super) fn new(plan: &ConvPlan, slots: Slots, wanted: Wanted) -> Self {
        let images = plan.gradient_group_images(slots.largest());
        let (channels, filters) = (plan.shape.channels, plan.shape.filters);
        let tile = plan.tile;
        let du = if images == slots.largest() {
            Stack::new(tile, channels.min(GRADIENT_BLOCK.0), filters.min(GRADIENT_BLOCK.1))
        } else {
            Stack::new(tile, channels, filters)
        };
        let part = WinogradPart { images, filters, tile_rows: tiles(plan).0 };
        let filters = FilterPanels { rows: filters, cols: channels, tile };
        Winograd { group: Group::new(plan, part), du, filters, wanted }
    }

    /// Elements of [`Parts::du`].
    fn du_len(&self) -> usize {
        if self.wanted.dw { self.du.len() } else { 0 }
    }

    fn parts<'a, T>(&self, scratch: &'a mut [T]) -> Parts<'a, T> {
        let [v, dm, pixels, planes] = self.group.lens();
        let (v, scratch) = scratch.split_at_mut(v);
        let (dm, scratch) = scratch.split_at_mut(dm);
        let (pixels, scratch) = scratch.split_at_mut(pixels);
        let (planes, du) = scratch.split_at_mut(planes);
        Parts { v, dm, pixels: pixels.as_chunks_mut().0, planes, du: &mut du[..self.du_len()] }
    }

    /// `dM = A dy A^T` of the images at `place`, and the sums of `dy`.
    fn transform_output_gradient<T: Element>(
        &self,
        piece: &mut Piece<'_, T>,
        place: &Place,
        source: &impl Fn(PlaneRows, &mut [T]),
        parts: &mut Parts<'_, T>,
    ) {
        let Parts { dm, pixels, planes, .. } = parts;
        let (filters, out_plane) = (self.group.shape.filters, self.group.shape.out_plane());
        let (whole, [_, size]) = (self.group.whole, self.group.sizes());
        let blocked = self.group.formats.output == MemoryFormat::Blocked;
        // what lies beyond the edge, where a single output left over is taken for two, is zero
        pixels.fill([T::zero(); LANES]);
        let order = self.group.order(place);
        for filter in (0..filters).step_by(LANES) {
            let count = LANES.min(filters - filter);
            for (image, rows) in place.images.clone().zip(Group::runs(pixels, whole, (0, 0), size)) {
                if blocked {
                    source(PlaneRows { image, filter, row: 0 }, planes);
                    let (block, _) = planes.as_chunks();
                    if self.wanted.db {
                        add_planes(block, &mut piece.db[filter..]);
                    }
                    block.chunks_exact(size.1).zip(rows).for_each(|(from, to)| to.copy_from_slice(from));
                    continue;
                }
                for (f, plane) in planes.chunks_exact_mut(out_plane).enumerate().take(count) {
                    source(PlaneRows { image, filter: filter + f, row: 0 }, plane);
                    if let Some(db) = piece.db.get_mut(filter + f) {
                        *db += vectorized!(sum(plane));
                    }
                }
                planes_to_rows(planes, out_plane, count, size, rows);
            }
            vectorized!(self.group.output_adjoint(&order, filter, pixels, dm));
        }
    }

    /// `dw` of the images at `place`, added to that of the `first` group of a slot, and complete with the `last`.
    fn add_filter_gradient<T: Element>(
        &self,
        piece: &mut Piece<'_, T>,
        place: &Place,
        (first, last): (bool, bool),
        parts: &mut Parts<'_, T>,
    ) {
        let Winograd { group, du: stack, .. } = self;
        let Parts { v, dm, pixels, du, .. } = parts;
        group.transform_images(place, |image| piece.x(image), pixels, v);
        let order = group.order(place);
        let accum = if first { Accum::Replace } else { Accum::Add };
        let (channels, filters) = (group.shape.channels, group.shape.filters);
        for start in (0..channels).step_by(stack.rows) {
            let of_channels = start..(start + stack.rows).min(channels);
            for start in (0..filters).step_by(stack.cols) {
                let of_filters = start..(start + stack.cols).min(filters);
                let (v, dm) = ((&group.v, &**v, of_channels.clone()), (&group.m, &**dm, of_filters.clone()));
                // dU_q[C, F] = V_q^T[C, tiles] . dM_q[tiles, F]               because M_q = V_q . U_q
                multiply_transposed(accum, &order, v, dm, (stack, &mut **du));
                if last {
                    let dw = &mut piece.dw[of_channels.start * 9 * filters + of_filters.start..];
                    let size = (of_channels.len(), of_filters.len());
                    vectorized!(filter_gradient(stack, size, du, dw, filters));
                }
            }
        }
    }

    /// `dV_q[tiles, C] = dM_q[tiles, F] . U_q^T[F, C]`, and `dx` of the images at `place`.
    fn image_gradient<T: Element>(&self, piece: &mut Piece<'_, T>, place: &Place, parts: &mut Parts<'_, T>) {
        let (group, Parts { v: dv, dm, pixels, .. }) = (&self.group, parts);
        let Conv2dShape { channels, rows, cols, .. } = group.shape;
        let (plane, corner, [size, _]) = (group.shape.in_plane(), (rows.before, cols.before), group.sizes());
        let u = (&self.filters, piece.filters, 0..channels);
        let order = group.order(place);
        multiply(&order, (&group.m, &**dm), u, (&group.v, &mut **dv));
        for channel in (0..channels).step_by(LANES) {
            let count = LANES.min(channels - channel);
            pixels.fill([T::zero(); LANES]);
            vectorized!(group.input_adjoint(&order, channel, dv, pixels));
            for (image, rows) in place.images.clone().zip(Group::runs(pixels, group.padded, corner, size)) {
                let dx = &mut piece.dx.image(image)[channel * plane..];
                if group.formats.input == MemoryFormat::Blocked {
                    let to = dx.as_chunks_mut().0.chunks_exact_mut(size.1);
                    to.zip(rows).for_each(|(to, from)| to.copy_from_slice(from));
                } else {
                    rows_to_planes(rows, size, count, dx, plane);
                }
            }
        }
    }
}

impl<T: Element> Steps<T> for Winograd {
    fn filters_len(&self) -> usize {
        self.filters.len()
    }

    /// `U^T`, so that no product has to transpose it.
    fn prepare(&self, w: &[T], filters: &mut [T]) {
        transform_filters(&self.filters, (self.group.shape.channels * 9, 9), w, filters);
    }

    fn scratch_len(&self) -> usize {
        self.group.lens().iter().sum::<usize>() + self.du_len()
    }

    fn run(&self, mut piece: Piece<'_, T>, source: &(impl Fn(PlaneRows, &mut [T]) + Sync), scratch: &mut [T]) {
        let mut parts = self.parts(scratch);
        piece.db.fill(T::zero());
        let images = piece.images.clone();
        let groups = images.len().div_ceil(self.group.images);
        for index in 0..groups {
            let within = piece_range(images.len(), groups, index);
            let place = self.group.place(images.start + within.start..images.start + within.end);
            self.transform_output_gradient(&mut piece, &place, source, &mut parts);
            if self.wanted.dw {
                self.add_filter_gradient(&mut piece, &place, (index == 0, index + 1 == groups), &mut parts);
            }
            if self.wanted.dx {
                self.image_gradient(&mut piece, &place, &mut parts);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;
    use crate::naive;
    use crate::ops::conv;
    use crate::ops::conv::tests::{Case, random};
    use crate::shape::{Algorithm, Conv2d, Padding};

    /// Output and gradients by this module, past the public functions, which refuse f64.
    fn winograd<T: Element>(
        conv: &Conv2d,
        x: &Array4<T>,
        w: &Array4<T>,
        dout: &Array4<T>,
    ) -> (Array4<T>, conv::Conv2dGrads<T>) {
        let shape = Conv2dShape::new(x.dim().into(), w.dim().into(), conv).unwrap();
        let auto = Conv2d { algorithm: Algorithm::Auto, ..*conv };
        let plan = ConvPlan::new::<T>(&Conv2dShape::new(shape.x(), shape.w(), &auto).unwrap()).unwrap();
        let plan = ConvPlan { algorithm: Algorithm::Winograd, ..plan };
        let case = Case { plan, x: x.clone(), w: w.clone(), dout: dout.clone() };
        (case.forward(0..shape.images), case.backward(0..shape.images))
    }

    fn distance<T: Element, D: ndarray::Dimension>(a: &ndarray::Array<T, D>, b: &ndarray::Array<T, D>) -> f64 {
        assert_eq!(a.shape(), b.shape());
        let difference: f64 = a.iter().zip(b).map(|(a, b)| (a.f64() - b.f64()).powi(2)).sum();
        let norm: f64 = b.iter().map(|b| b.f64().powi(2)).sum();
        (difference / norm).sqrt()
    }

    #[test]
    fn it_is_the_convolution_and_its_gradient() {
        let sides = |top, bottom, left, right| Padding::Sides { top, bottom, left, right };
        for (x, filters, padding) in [
            ([2, 3, 12, 8], 4, Padding::Same),      // whole tiles, of six outputs and of four
            ([1, 1, 4, 4], 1, Padding::All(1)),     // one of everything
            ([3, 2, 7, 9], 5, Padding::Same),       // short tiles
            ([2, 2, 16, 14], 3, Padding::Same),     // tiles of six, five and four outputs
            ([2, 2, 31, 32], 2, Padding::Same),     // a single output left over, and two
            ([2, 2, 6, 5], 3, Padding::Valid),      // the output smaller than the input
            ([2, 2, 3, 3], 2, Padding::All(2)),     // the output larger than the input
            ([5, 17, 5, 6], 18, sides(0, 2, 1, 0)), // more channels and filters than lanes; asymmetric
            ([70, 2, 9, 4], 3, Padding::Same),      // several slots
            ([7, 2, 36, 40], 2, Padding::Same),     // several groups to a slot
            ([1, 2, 3, 30], 2, Padding::Valid),     // a single row of output
        ] {
            let conv = Conv2d { padding, algorithm: Algorithm::Winograd, ..Conv2d::default() };
            let x = random::<f64>(x, 0);
            let w = random([filters, x.dim().1, 3, 3], 1);
            let want = naive::conv2d_forward(x.view(), w.view(), None, &conv).unwrap();
            let dout = random(want.dim().into(), 2);
            let (out, grads) = winograd(&conv, &x, &w, &dout);
            let want_grads = naive::conv2d_backward(dout.view(), x.view(), w.view(), &conv).unwrap();
            let errors = [
                distance(&out, &want),
                distance(&grads.dx, &want_grads.dx),
                distance(&grads.dw, &want_grads.dw),
                distance(&grads.db, &want_grads.db),
            ];
            assert!(errors.iter().all(|&e| e <= 1e-13), "{:?} {padding:?}: out, dx, dw, db {errors:?}", x.dim());
        }
    }

    /// The bound that is promised above, on data of unit variance.
    #[test]
    fn in_single_precision_it_errs_by_less_than_1e_5() {
        for (channels, filters, side) in [
            (64, 64, 30),
            (40, 140, 12), // dU in blocks, whole ones and others
            (512, 512, 12),
            (256, 256, 6),
            (64, 64, 15),
            (256, 256, 8),
            (256, 256, 7),
            (256, 256, 3),
            (256, 256, 2),
        ] {
            let conv = Conv2d { padding: Padding::Same, algorithm: Algorithm::Winograd, ..Conv2d::default() };
            let x = random::<f32>([4, channels, side, side], 0);
            let w = random::<f32>([filters, channels, 3, 3], 1);
            let dout = random::<f32>([4, filters, side, side], 2);
            let (out, grads) = winograd(&conv, &x, &w, &dout);
            let wide = |a: &Array4<f32>| a.mapv(f64::from);
            let (x, w, dout) = (wide(&x), wide(&w), wide(&dout));
            let exact = Conv2d { algorithm: Algorithm::Im2col, ..conv };
            let want = conv::conv2d_forward(x.view(), w.view(), None, &exact).unwrap();
            let want_grads = conv::conv2d_backward(dout.view(), x.view(), w.view(), &exact).unwrap();
            let errors = [
                distance(&wide(&out), &want),
                distance(&wide(&grads.dx), &want_grads.dx),
                distance(&wide(&grads.dw), &want_grads.dw),
            ];
            println!("{channels} -> {filters} @ {side}: relative error of out, dx, dw {errors:?}");
            assert!(errors.iter().all(|&e| e <= 1e-5), "{channels} -> {filters} @ {side}: {errors:?}");
        }
    }
}
