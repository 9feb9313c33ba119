//! Level 2. Convolution with fewer multiplications: Winograd's F(4x4, 3x3) as 36 matrix products.
//!
//! For 3x3 filters with stride 1 (Lavin & Gray 2015, arXiv 1509.09308). The output is cut into 4x4 tiles, each of which
//! sees 6x6 pixels `d`; with the constant matrices `A`, `B`, `G`,
//!
//! ```text
//! V = B^T d B   per tile and channel          U = G g G^T   per filter and channel
//! M_q[F, tiles] = U_q[F, C] . V_q[C, tiles]   for each of the 36 elements q
//! y = A^T M A   per tile and filter
//! ```
//!
//! 36 multiplications do the work of 144. Images go through in groups small enough that `V` and `M` stay in the cache.
//! Backward is the adjoint, step by step, and shares the transform of `dy` between both gradients:
//!
//! ```text
//! dM = A dy A^T       dU_q[F, C] += dM_q[F, tiles] . V_q^T[tiles, C]       dg = G^T dU G
//!                     dV_q[C, tiles] = U_q^T[C, F] . dM_q[F, tiles]        dx += B dV B^T, tiles overlapping by 2
//! ```
//!
//! The error in `f32` is about 1e-6 to 1e-5 relative (im2col: 2e-7), because the transforms add and subtract numbers of
//! different size; in `f64` nobody wants that, so [`crate::shape::Algorithm::Auto`] never chooses it there.

use std::ops::Range;

use crate::blas::{Accum, Mat, MatMut, gemm};
use crate::element::Element;
use crate::ops::conv::{PlaneRows, slot_count, sum_slots};
use crate::parallel::{Disjoint, for_each_chunk_mut, for_each_piece, piece_range};
use crate::shape::Conv2dShape;
use crate::simd::{sum, vectorized};
use crate::workspace::Workspace;

/// Side of an output tile, and of the pixels it sees.
const TILE: usize = 4;
const SPAN: usize = 6;
/// Elements of a transformed tile: the number of products.
const PRODUCTS: usize = SPAN * SPAN;
/// Tiles transformed side by side: one AVX-512 vector of `f32`.
const LANES: usize = 16;
/// Tiles that one group of images should have: enough columns for the products, few enough for the cache.
const GROUP_TILES: usize = 64;

/// One number for each of `LANES` tiles.
type Lanes<T> = [T; LANES];

/// `B^T d`
#[inline(always)]
fn input_1d<T: Element>(d: [T; 6]) -> [T; 6] {
    let (two, four, five) = (T::of(2.0), T::of(4.0), T::of(5.0));
    [
        four * d[0] - five * d[2] + d[4],
        (d[4] - four * d[2]) + (d[3] - four * d[1]),
        (d[4] - four * d[2]) - (d[3] - four * d[1]),
        (d[4] - d[2]) + two * (d[3] - d[1]),
        (d[4] - d[2]) - two * (d[3] - d[1]),
        four * d[1] - five * d[3] + d[5],
    ]
}

/// `B v`, the adjoint of [`input_1d`].
#[inline(always)]
fn input_adjoint_1d<T: Element>(v: [T; 6]) -> [T; 6] {
    let (two, four, five) = (T::of(2.0), T::of(4.0), T::of(5.0));
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

/// `A^T m`
#[inline(always)]
fn output_1d<T: Element>(m: [T; 6]) -> [T; 4] {
    let (two, four, eight) = (T::of(2.0), T::of(4.0), T::of(8.0));
    let (s12, d12, s34, d34) = (m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]);
    [m[0] + s12 + s34, d12 + two * d34, s12 + four * s34, d12 + eight * d34 + m[5]]
}

/// `A y`, the adjoint of [`output_1d`].
#[inline(always)]
fn output_adjoint_1d<T: Element>(y: [T; 4]) -> [T; 6] {
    let (two, four, eight) = (T::of(2.0), T::of(4.0), T::of(8.0));
    let (even, odd) = (y[0] + y[2], y[1] + y[3]);
    let (even4, odd8) = (y[0] + four * y[2], two * y[1] + eight * y[3]);
    [y[0], even + odd, even - odd, even4 + odd8, even4 - odd8, y[3]]
}

/// `G g`
#[inline(always)]
fn filter_1d<T: Element>(g: [T; 3]) -> [T; 6] {
    let (quarter, sixth) = (T::of(0.25), T::of(1.0 / 6.0));
    let (twelfth, twenty_fourth) = (T::of(1.0 / 12.0), T::of(1.0 / 24.0));
    let (even, even24) = (sixth * (g[0] + g[2]), twenty_fourth * g[0] + sixth * g[2]);
    [quarter * g[0], -even - sixth * g[1], sixth * g[1] - even, even24 + twelfth * g[1], even24 - twelfth * g[1], g[2]]
}

/// `G^T u`, the adjoint of [`filter_1d`].
#[inline(always)]
fn filter_adjoint_1d<T: Element>(u: [T; 6]) -> [T; 3] {
    let (quarter, sixth) = (T::of(0.25), T::of(1.0 / 6.0));
    let (twelfth, twenty_fourth) = (T::of(1.0 / 12.0), T::of(1.0 / 24.0));
    let (s12, d21, s34, d34) = (u[1] + u[2], u[2] - u[1], u[3] + u[4], u[3] - u[4]);
    [quarter * u[0] - sixth * s12 + twenty_fourth * s34, sixth * d21 + twelfth * d34, sixth * (s34 - s12) + u[5]]
}

/// Applies a one-dimensional transform to the columns, then to the rows, of `I x I` matrices: `O x O`.
#[inline(always)]
fn transform_2d<T: Element, const I: usize, const O: usize>(
    from: &[Lanes<T>],
    to: &mut [Lanes<T>],
    transform: impl Fn([T; I]) -> [T; O],
) {
    let mut half = [[[T::zero(); LANES]; SPAN]; SPAN];
    for j in 0..I {
        for lane in 0..LANES {
            let column = transform(std::array::from_fn(|i| from[i * I + j][lane]));
            for i in 0..O {
                half[i][j][lane] = column[i];
            }
        }
    }
    for i in 0..O {
        for lane in 0..LANES {
            let row = transform(std::array::from_fn(|j| half[i][j][lane]));
            for j in 0..O {
                to[i * O + j][lane] = row[j];
            }
        }
    }
}

/// The tiles of an image, and how images go through in groups.
#[derive(Clone, Copy, Debug)]
struct Plan {
    channels: usize,
    filters: usize,
    /// Tiles of an image, vertically and horizontally.
    tiles: (usize, usize),
    /// Images of the largest group.
    group: usize,
    /// Elements from one row of `V_q` and `M_q` to the next.
    ld: usize,
    /// Rows and columns of an image with its padding, filled up to whole tiles.
    padded: (usize, usize),
}

impl Plan {
    fn new(shape: &Conv2dShape, group: usize) -> Self {
        let tiles = (shape.rows.output.div_ceil(TILE), shape.cols.output.div_ceil(TILE));
        Plan {
            channels: shape.channels,
            filters: shape.filters,
            tiles,
            group,
            ld: (group * tiles.0 * tiles.1).next_multiple_of(LANES),
            padded: (tiles.0 * TILE + 2, tiles.1 * TILE + 2),
        }
    }

    /// Groups that `images` images are cut into: about [`GROUP_TILES`] tiles each, and a number that several threads
    /// can share evenly.
    fn groups(shape: &Conv2dShape, images: usize) -> usize {
        let tiles = shape.rows.output.div_ceil(TILE) * shape.cols.output.div_ceil(TILE);
        let together = (GROUP_TILES / tiles).max(1);
        images.div_ceil(together).next_multiple_of(4).min(images).max(1)
    }

    fn v_len(&self) -> usize {
        PRODUCTS * self.channels * self.ld
    }

    fn m_len(&self) -> usize {
        PRODUCTS * self.filters * self.ld
    }

    /// Elements of one channel's padded planes, for a whole group.
    fn planes_len(&self) -> usize {
        self.group * self.padded.0 * self.padded.1
    }

    /// Calls `chunk(first tile, offsets)` for every `LANES` tiles of `images` images: for each tile the index of its
    /// first pixel in planes of `size` rows and columns.
    #[inline(always)]
    fn for_each_chunk(&self, images: usize, size: (usize, usize), mut chunk: impl FnMut(usize, &[usize])) {
        let (mut offsets, mut count, mut first) = ([0; LANES], 0, 0);
        let total = images * self.tiles.0 * self.tiles.1;
        for image in 0..images {
            for i in 0..self.tiles.0 {
                for j in 0..self.tiles.1 {
                    offsets[count] = (image * size.0 + i * TILE) * size.1 + j * TILE;
                    count += 1;
                    // one place to call it from, so that it is inlined, and compiled for the vectors, once
                    if count == LANES || first + count == total {
                        chunk(first, &offsets[..count]);
                        (first, count) = (first + count, 0);
                    }
                }
            }
        }
    }

    /// `V = B^T d B` of one channel: `planes` holds its padded images, `v` its row of every `V_q`.
    #[inline(always)]
    fn input<T: Element>(&self, images: usize, channel: usize, planes: &[T], v: &mut [T]) {
        let mut d = [[T::zero(); LANES]; PRODUCTS];
        let mut out = [[T::zero(); LANES]; PRODUCTS];
        self.for_each_chunk(
            images,
            self.padded,
            #[inline(always)]
            |first, offsets| {
                for (lane, &offset) in offsets.iter().enumerate() {
                    for i in 0..SPAN {
                        let row = &planes[offset + i * self.padded.1..][..SPAN];
                        for j in 0..SPAN {
                            d[i * SPAN + j][lane] = row[j];
                        }
                    }
                }
                transform_2d(&d, &mut out, input_1d);
                store(&out, v, self.channels, channel, first, self.ld);
            },
        );
    }

    /// `d = B dV B^T` of one channel, added to its padded images: the adjoint of [`Plan::input`].
    #[inline(always)]
    fn input_adjoint<T: Element>(&self, images: usize, channel: usize, dv: &[T], planes: &mut [T]) {
        let mut d = [[T::zero(); LANES]; PRODUCTS];
        let mut out = [[T::zero(); LANES]; PRODUCTS];
        self.for_each_chunk(
            images,
            self.padded,
            #[inline(always)]
            |first, offsets| {
                load(dv, &mut d, self.channels, channel, first, self.ld);
                transform_2d(&d, &mut out, input_adjoint_1d);
                for (lane, &offset) in offsets.iter().enumerate() {
                    for i in 0..SPAN {
                        let row = &mut planes[offset + i * self.padded.1..][..SPAN];
                        for j in 0..SPAN {
                            row[j] += out[i * SPAN + j][lane];
                        }
                    }
                }
            },
        );
    }

    /// `y = A^T M A` of one filter, into planes of whole tiles.
    #[inline(always)]
    fn output<T: Element>(&self, images: usize, filter: usize, m: &[T], planes: &mut [T]) {
        let size = (self.tiles.0 * TILE, self.tiles.1 * TILE);
        let mut d = [[T::zero(); LANES]; PRODUCTS];
        let mut out = [[T::zero(); LANES]; TILE * TILE];
        self.for_each_chunk(
            images,
            size,
            #[inline(always)]
            |first, offsets| {
                load(m, &mut d, self.filters, filter, first, self.ld);
                transform_2d(&d, &mut out, output_1d);
                for (lane, &offset) in offsets.iter().enumerate() {
                    for i in 0..TILE {
                        let row = &mut planes[offset + i * size.1..][..TILE];
                        for j in 0..TILE {
                            row[j] = out[i * TILE + j][lane];
                        }
                    }
                }
            },
        );
    }

    /// `dM = A dy A^T` of one filter, from planes of whole tiles: the adjoint of [`Plan::output`].
    #[inline(always)]
    fn output_adjoint<T: Element>(&self, images: usize, filter: usize, planes: &[T], dm: &mut [T]) {
        let size = (self.tiles.0 * TILE, self.tiles.1 * TILE);
        let mut d = [[T::zero(); LANES]; TILE * TILE];
        let mut out = [[T::zero(); LANES]; PRODUCTS];
        self.for_each_chunk(
            images,
            size,
            #[inline(always)]
            |first, offsets| {
                for (lane, &offset) in offsets.iter().enumerate() {
                    for i in 0..TILE {
                        let row = &planes[offset + i * size.1..][..TILE];
                        for j in 0..TILE {
                            d[i * TILE + j][lane] = row[j];
                        }
                    }
                }
                transform_2d(&d, &mut out, output_adjoint_1d);
                store(&out, dm, self.filters, filter, first, self.ld);
            },
        );
    }
}

/// Writes 36 vectors to row `row` of the 36 matrices of `rows` rows.
#[inline(always)]
fn store<T: Element>(from: &[Lanes<T>; PRODUCTS], to: &mut [T], rows: usize, row: usize, first: usize, ld: usize) {
    for (q, from) in from.iter().enumerate() {
        to[(q * rows + row) * ld + first..][..LANES].copy_from_slice(from);
    }
}

/// Reads what [`store`] writes.
#[inline(always)]
fn load<T: Element>(from: &[T], to: &mut [Lanes<T>; PRODUCTS], rows: usize, row: usize, first: usize, ld: usize) {
    for (q, to) in to.iter_mut().enumerate() {
        to.copy_from_slice(&from[(q * rows + row) * ld + first..][..LANES]);
    }
}

/// Copies `[rows, cols]` into a plane of `pitch` columns, or out of it.
#[inline(always)]
fn copy_rows<T: Element>(from: &[T], from_pitch: usize, to: &mut [T], to_pitch: usize, rows: usize, cols: usize) {
    for i in 0..rows {
        to[i * to_pitch..][..cols].copy_from_slice(&from[i * from_pitch..][..cols]);
    }
}

/// `U_q[F, C]` of the filters w `[F, C, 3, 3]`.
fn transform_filters<T: Element>(filters: usize, channels: usize, w: &[T], u: &mut [T]) {
    let u = Disjoint::new(u);
    for_each_piece(filters, |f| {
        vectorized(
            #[inline(always)]
            || {
                let mut g = [[T::zero(); LANES]; 9];
                let mut out = [[T::zero(); LANES]; PRODUCTS];
                for c in (0..channels).step_by(LANES) {
                    let count = LANES.min(channels - c);
                    for (lane, filter) in w[(f * channels + c) * 9..].chunks_exact(9).take(count).enumerate() {
                        (0..9).for_each(|i| g[i][lane] = filter[i]);
                    }
                    transform_2d(&g, &mut out, filter_1d);
                    for (q, out) in out.iter().enumerate() {
                        // SAFETY: a piece owns row f of each of the 36 matrices.
                        unsafe { u.slice((q * filters + f) * channels + c, count) }.copy_from_slice(&out[..count]);
                    }
                }
            },
        );
    });
}

/// `dw = G^T dU G`: the adjoint of [`transform_filters`].
fn transform_filters_adjoint<T: Element>(filters: usize, channels: usize, du: &[T], dw: &mut [T]) {
    for_each_chunk_mut(dw, channels * 9, |f, dw| {
        vectorized(
            #[inline(always)]
            || {
                let mut d = [[T::zero(); LANES]; PRODUCTS];
                let mut out = [[T::zero(); LANES]; 9];
                for c in (0..channels).step_by(LANES) {
                    let count = LANES.min(channels - c);
                    for (q, d) in d.iter_mut().enumerate() {
                        d[..count].copy_from_slice(&du[(q * filters + f) * channels + c..][..count]);
                    }
                    transform_2d(&d, &mut out, filter_adjoint_1d);
                    for (lane, dw) in dw[c * 9..].chunks_exact_mut(9).take(count).enumerate() {
                        (0..9).for_each(|i| dw[i] = out[i][lane]);
                    }
                }
            },
        );
    });
}

/// Transforms all channels of `images`: `planes` is scratch whose padding is zero and stays so.
fn transform_images<T: Element>(
    shape: &Conv2dShape,
    plan: &Plan,
    images: Range<usize>,
    x: &[T],
    planes: &mut [T],
    v: &mut [T],
) {
    let (plane, (height, pitch)) = (shape.in_plane(), plan.padded);
    // rows and columns beyond the last tile are seen by no output
    let rows = shape.rows.input.min(height - shape.rows.before);
    let cols = shape.cols.input.min(pitch - shape.cols.before);
    for c in 0..shape.channels {
        vectorized(
            #[inline(always)]
            || {
                for (image, padded) in images.clone().zip(planes.chunks_exact_mut(height * pitch)) {
                    let from = &x[(image * shape.channels + c) * plane..][..plane];
                    let to = &mut padded[shape.rows.before * pitch + shape.cols.before..];
                    copy_rows(from, shape.cols.input, to, pitch, rows, cols);
                }
                plan.input(images.len(), c, planes, v);
            },
        );
    }
}

/// As [`crate::ops::conv::forward`], whose sink gets whole planes here.
pub(crate) fn forward<T: Element>(
    shape: &Conv2dShape,
    x: &[T],
    w: &[T],
    ws: &Workspace,
    sink: impl Fn(PlaneRows, &mut [T]) + Sync + Send,
) {
    let groups = Plan::groups(shape, shape.images);
    let plan = Plan::new(shape, shape.images.div_ceil(groups));
    let (c, f) = (shape.channels, shape.filters);
    let (out_rows, out_cols) = (shape.rows.output, shape.cols.output);
    let (tile_rows, tile_cols) = (plan.tiles.0 * TILE, plan.tiles.1 * TILE);
    ws.shared(PRODUCTS * f * c, |u: &mut [T]| {
        transform_filters(f, c, w, u);
        let u = &*u;
        for_each_piece(groups, |group| {
            let images = piece_range(shape.images, groups, group);
            ws.scratch(plan.v_len() + plan.m_len() + plan.planes_len(), |scratch: &mut [T]| {
                let (v, scratch) = scratch.split_at_mut(plan.v_len());
                let (m, planes) = scratch.split_at_mut(plan.m_len());
                planes.fill(T::zero());
                transform_images(shape, &plan, images.clone(), x, planes, v);
                let tiles = images.len() * plan.tiles.0 * plan.tiles.1;
                for q in 0..PRODUCTS {
                    // M_q[F, tiles] = U_q[F, C] . V_q[C, tiles]
                    let u = Mat::new(&u[q * f * c..], f, c, c);
                    let v = Mat::new(&v[q * c * plan.ld..], c, tiles, plan.ld);
                    gemm(Accum::Replace, T::one(), u, v, MatMut::new(&mut m[q * f * plan.ld..], f, tiles, plan.ld));
                }
                for filter in 0..f {
                    vectorized(
                        #[inline(always)]
                        || plan.output(images.len(), filter, m, planes),
                    );
                    for (image, plane) in images.clone().zip(planes.chunks_exact_mut(tile_rows * tile_cols)) {
                        // close the gaps that tiles beyond the edge leave
                        if tile_cols != out_cols {
                            (1..out_rows)
                                .for_each(|i| plane.copy_within(i * tile_cols..i * tile_cols + out_cols, i * out_cols));
                        }
                        sink(PlaneRows { image, filter, row: 0 }, &mut plane[..out_rows * out_cols]);
                    }
                }
            });
        });
    });
}

/// As [`crate::ops::conv::backward`], whose source is asked for whole planes here.
pub(crate) fn backward<T: Element>(
    shape: &Conv2dShape,
    x: &[T],
    w: &[T],
    source: impl Fn(PlaneRows, &mut [T]) + Sync + Send,
    dx: Option<&mut [T]>,
    dw: &mut [T],
    db: Option<&mut [T]>,
    ws: &Workspace,
) {
    let (c, f, plane) = (shape.channels, shape.filters, shape.in_plane());
    let (out_rows, out_cols, out_plane) = (shape.rows.output, shape.cols.output, shape.out_plane());
    let slot_len = (PRODUCTS * f * c + f).next_multiple_of(LANES);
    let slots = slot_count::<T>(shape.images, slot_len);
    let in_slot = shape.images.div_ceil(slots);
    let groups = Plan::groups(shape, in_slot).min(in_slot);
    let plan = Plan::new(shape, in_slot.div_ceil(groups));
    let (tile_rows, tile_cols) = (plan.tiles.0 * TILE, plan.tiles.1 * TILE);
    let dx = dx.map(|dx| Disjoint::new(&mut dx[..shape.images * c * plane]));
    let u_len = if dx.is_some() { PRODUCTS * f * c } else { 0 };
    ws.shared(u_len + slots * slot_len, |shared: &mut [T]| {
        let (u, slot_data) = shared.split_at_mut(u_len);
        if dx.is_some() {
            transform_filters(f, c, w, u);
        }
        let u = &*u;
        for_each_chunk_mut(slot_data, slot_len, |slot, sums| {
            let (du, db) = sums.split_at_mut(PRODUCTS * f * c);
            db.fill(T::zero());
            let slot_images = piece_range(shape.images, slots, slot);
            let scratch_len = plan.v_len() + plan.m_len() + plan.planes_len() + out_plane;
            ws.scratch(scratch_len, |scratch: &mut [T]| {
                let (v, scratch) = scratch.split_at_mut(plan.v_len());
                let (dm, scratch) = scratch.split_at_mut(plan.m_len());
                let (planes, dout) = scratch.split_at_mut(plan.planes_len());
                for group in 0..groups {
                    let within = piece_range(slot_images.len(), groups, group);
                    let images = slot_images.start + within.start..slot_images.start + within.end;
                    let tiles = images.len() * plan.tiles.0 * plan.tiles.1;
                    // dM = A dy A^T; what tiles beyond the edge would see is zero
                    planes.fill(T::zero());
                    for filter in 0..f {
                        for (image, planes) in images.clone().zip(planes.chunks_exact_mut(tile_rows * tile_cols)) {
                            source(PlaneRows { image, filter, row: 0 }, dout);
                            vectorized(
                                #[inline(always)]
                                || {
                                    db[filter] += sum(dout);
                                    copy_rows(dout, out_cols, planes, tile_cols, out_rows, out_cols);
                                },
                            );
                        }
                        vectorized(
                            #[inline(always)]
                            || plan.output_adjoint(images.len(), filter, planes, dm),
                        );
                    }
                    planes.fill(T::zero());
                    transform_images(shape, &plan, images.clone(), x, planes, v);
                    let accum = if group == 0 { Accum::Replace } else { Accum::Add };
                    for q in 0..PRODUCTS {
                        // dU_q[F, C] += dM_q[F, tiles] . V_q^T[tiles, C]               because M_q = U_q . V_q
                        let dm = Mat::new(&dm[q * f * plan.ld..], f, tiles, plan.ld);
                        let v = Mat::new(&v[q * c * plan.ld..], c, tiles, plan.ld).t();
                        gemm(accum, T::one(), dm, v, MatMut::new(&mut du[q * f * c..], f, c, c));
                    }
                    let Some(dx) = &dx else { continue };
                    for q in 0..PRODUCTS {
                        // dV_q[C, tiles] = U_q^T[C, F] . dM_q[F, tiles], in the place of V
                        let u = Mat::new(&u[q * f * c..], f, c, c).t();
                        let dm = Mat::new(&dm[q * f * plan.ld..], f, tiles, plan.ld);
                        gemm(
                            Accum::Replace,
                            T::one(),
                            u,
                            dm,
                            MatMut::new(&mut v[q * c * plan.ld..], c, tiles, plan.ld),
                        );
                    }
                    let (height, pitch) = plan.padded;
                    let rows = shape.rows.input.min(height - shape.rows.before);
                    let cols = shape.cols.input.min(pitch - shape.cols.before);
                    for channel in 0..c {
                        vectorized(
                            #[inline(always)]
                            || {
                                planes.fill(T::zero());
                                plan.input_adjoint(images.len(), channel, v, planes);
                            },
                        );
                        for (image, planes) in images.clone().zip(planes.chunks_exact(height * pitch)) {
                            // SAFETY: the image belongs to this slot alone.
                            let dx = unsafe { dx.slice((image * c + channel) * plane, plane) };
                            if rows * cols < plane {
                                dx.fill(T::zero());
                            }
                            let from = &planes[shape.rows.before * pitch + shape.cols.before..];
                            vectorized(
                                #[inline(always)]
                                || copy_rows(from, pitch, dx, shape.cols.input, rows, cols),
                            );
                        }
                    }
                }
            });
        });
        sum_slots(slot_data, slot_len);
        let (du, sums) = slot_data[..slot_len].split_at(PRODUCTS * f * c);
        transform_filters_adjoint(f, c, du, dw);
        if let Some(db) = db {
            db.copy_from_slice(&sums[..f]);
        }
    });
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Array4};
    use rand::RngExt;

    use super::*;
    use crate::naive;
    use crate::ops::conv;
    use crate::random::{Purpose, stream};
    use crate::shape::{Algorithm, Conv2d, Padding};

    fn random<T: Element>(shape: [usize; 4], seed: u64) -> Array4<T> {
        let mut rng = stream(seed, Purpose::Example, 0, 0);
        Array4::from_shape_simple_fn(shape, || T::of(rng.sample(rand_distr::StandardNormal)))
    }

    /// Output, dx, dw, db by this module, past the public functions, which refuse f64.
    fn winograd<T: Element>(
        conv: &Conv2d,
        x: &Array4<T>,
        w: &Array4<T>,
        dout: &Array4<T>,
    ) -> (Array4<T>, naive::Conv2dGrads<T>) {
        let shape = Conv2dShape::new(x.dim().into(), w.dim().into(), conv).unwrap();
        let (mut out, ws) = (Array4::zeros(shape.out()), Workspace::new());
        let (x, w) = (x.as_slice().unwrap(), w.as_slice().unwrap());
        let plane = |at: PlaneRows| (at.image * shape.filters + at.filter) * shape.out_plane();
        {
            let out = Disjoint::new(out.as_slice_mut().unwrap());
            // SAFETY: planes are disjoint.
            forward(&shape, x, w, &ws, |at, y| unsafe { out.slice(plane(at), y.len()) }.copy_from_slice(y));
        }
        let (mut dx, mut dw, mut db) =
            (random::<T>(shape.x(), 9), Array4::zeros(shape.w()), Array1::zeros(shape.filters));
        let dout = dout.as_slice().unwrap();
        let source = |at: PlaneRows, rows: &mut [T]| rows.copy_from_slice(&dout[plane(at)..][..rows.len()]);
        let (dx_slice, dw_slice) = (dx.as_slice_mut().unwrap(), dw.as_slice_mut().unwrap());
        backward(&shape, x, w, source, Some(dx_slice), dw_slice, Some(db.as_slice_mut().unwrap()), &ws);
        (out, naive::Conv2dGrads { dx, dw, db })
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
            ([2, 3, 8, 8], 4, Padding::Same),       // whole tiles
            ([1, 1, 4, 4], 1, Padding::All(1)),     // one of everything
            ([3, 2, 7, 9], 5, Padding::Same),       // tiles beyond both edges
            ([2, 2, 6, 5], 3, Padding::Valid),      // the output smaller than the input
            ([2, 2, 3, 3], 2, Padding::All(2)),     // the output larger than the input
            ([5, 17, 5, 6], 18, sides(0, 2, 1, 0)), // more channels and filters than lanes; asymmetric
            ([70, 2, 9, 4], 3, Padding::Same),      // several groups and slots
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

    /// The bound that `Algorithm::Auto` promises, on data of unit variance.
    #[test]
    fn in_single_precision_it_errs_by_less_than_1e_4() {
        for (channels, filters, side) in [(64, 64, 16), (256, 256, 8)] {
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
