//! Level 2. Convolution with fewer multiplications: Winograd's F(4x4, 3x3) as 36 matrix products.
//!
//! For 3x3 filters with stride 1 (Lavin & Gray 2015, arXiv 1509.09308). The output is cut into 4x4 tiles, each of which
//! sees 6x6 pixels `d`; with the constant matrices `A`, `B`, `G`,
//!
//! ```text
//! V = B^T d B   per tile and channel          U = G g G^T   per filter and channel
//! M_q[tiles, F] = V_q[tiles, C] . U_q[C, F]   for each of the 36 elements q
//! y = A^T M A   per tile and filter
//! ```
//!
//! 36 multiplications do the work of 144. Images go through in groups small enough that `V` and `M` stay in the cache.
//! Backward is the adjoint, step by step, and shares the transform of `dy` between both gradients:
//!
//! ```text
//! dM = A dy A^T       dU_q[C, F] += V_q^T[C, tiles] . dM_q[tiles, F]       dg = G^T dU G
//!                     dV_q[tiles, C] = dM_q[tiles, F] . U_q^T[F, C]        dx += B dV B^T, tiles overlapping by 2
//! ```
//!
//! The smaller F(2x2, 3x3) is not here: for the same output it takes 64 multiplications where this takes 36, and its
//! transforms load and store as much more. It would win only where planes have no more than 2x2 pixels.
//!
//! # Channels side by side
//! A transform takes the same sums of differently placed pixels. `LANES` channels are transformed at once: their planes
//! are dealt out so that a pixel is a vector of channels (`planes_to_lanes`), and from then on every load and store,
//! also of the rows of `V` and `M`, is a whole vector.
//!
//! The error in `f32` is about 1e-6 to 1e-5 relative (im2col: 2e-7), because the transforms add and subtract numbers of
//! different size; in `f64` nobody wants that, so [`crate::shape::Algorithm::Auto`] never chooses it there.

use std::ops::Range;

use crate::blas::{Accum, Mat, MatMut, gemm};
use crate::element::Element;
use crate::ops::conv::PlaneRows;
use crate::ops::slots::Slots;
use crate::parallel::{Disjoint, for_each_chunk_mut, for_each_piece, piece_range};
use crate::shape::Conv2dShape;
use crate::simd::{LANES, Lanes, lanes_to_planes, planes_to_lanes, sum, vectorized};
use crate::workspace::Workspace;

/// Side of an output tile, and of the pixels it sees.
const TILE: usize = 4;
const SPAN: usize = 6;
/// Elements of a transformed tile: the number of products.
const PRODUCTS: usize = SPAN * SPAN;
/// Tiles that one group of images should have: enough rows for the products, few enough for the cache.
const GROUP_TILES: usize = 64;

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

/// Applies a one-dimensional transform to the columns, then to the rows, of an `I x I` matrix of vectors whose element
/// (i, j) is `load(i, j)`, and hands element (i, j) of the `O x O` result to `store`.
#[inline(always)]
fn transform_2d<T: Element, const I: usize, const O: usize>(
    load: impl Fn(usize, usize) -> Lanes<T>,
    transform: impl Fn([T; I]) -> [T; O],
    mut store: impl FnMut(usize, usize, Lanes<T>),
) {
    let mut half = [[[T::zero(); LANES]; SPAN]; SPAN];
    for j in 0..I {
        let column: [Lanes<T>; I] = std::array::from_fn(
            #[inline(always)]
            |i| load(i, j),
        );
        for lane in 0..LANES {
            let transformed = transform(std::array::from_fn(
                #[inline(always)]
                |i| column[i][lane],
            ));
            for i in 0..O {
                half[i][j][lane] = transformed[i];
            }
        }
    }
    for i in 0..O {
        let mut row = [[T::zero(); LANES]; O];
        for lane in 0..LANES {
            let transformed = transform(std::array::from_fn(
                #[inline(always)]
                |j| half[i][j][lane],
            ));
            for j in 0..O {
                row[j][lane] = transformed[j];
            }
        }
        for j in 0..O {
            store(i, j, row[j]);
        }
    }
}

/// `PRODUCTS` matrices of the same shape, one after the other.
#[derive(Clone, Copy, Debug)]
struct Stack {
    rows: usize,
    cols: usize,
    /// Elements from one row to the next: an odd number of vectors, lest the rows of a matrix, a power of two apart,
    /// share a few sets of the L1 cache.
    ld: usize,
    /// Elements from one matrix to the next: not a multiple of 4 KiB either.
    matrix: usize,
}

impl Stack {
    fn new(rows: usize, cols: usize) -> Self {
        let ld = (cols.div_ceil(LANES) | 1) * LANES;
        Stack { rows, cols, ld, matrix: ((rows * ld / LANES) | 1) * LANES }
    }

    fn len(&self) -> usize {
        PRODUCTS * self.matrix
    }

    /// The first `rows` rows of matrix `q`.
    fn mat<'a, T>(&self, data: &'a [T], q: usize, rows: usize) -> Mat<'a, T> {
        Mat::new(&data[q * self.matrix..][..self.matrix], rows, self.cols, self.ld)
    }

    /// The first `rows` rows of matrix `q`.
    fn mat_mut<'a, T>(&self, data: &'a mut [T], q: usize, rows: usize) -> MatMut<'a, T> {
        MatMut::new(&mut data[q * self.matrix..][..self.matrix], rows, self.cols, self.ld)
    }

    /// Index of the vector from column `col` of row `row` on, in matrix (i, j).
    #[inline(always)]
    fn at(&self, i: usize, j: usize, row: usize, col: usize) -> usize {
        (i * SPAN + j) * self.matrix + row * self.ld + col
    }
}

/// The vector at `start`.
#[inline(always)]
fn lanes<T: Element>(data: &[T], start: usize) -> Lanes<T> {
    data[start..][..LANES].try_into().expect("as many as there are lanes")
}

/// The tiles of an image, and how images go through in groups.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// Tiles of an image, vertically and horizontally.
    tiles: (usize, usize),
    /// Images of the largest group.
    group: usize,
    /// `V` and `dV`: tiles x channels.
    v: Stack,
    /// `M` and `dM`: tiles x filters.
    m: Stack,
    /// Rows and columns of an image with its padding, filled up to whole tiles.
    padded: (usize, usize),
    /// Rows and columns of the output, filled up to whole tiles.
    whole: (usize, usize),
}

impl Plan {
    fn new(shape: &Conv2dShape, group: usize) -> Self {
        let tiles = (shape.rows.output.div_ceil(TILE), shape.cols.output.div_ceil(TILE));
        let whole = (tiles.0 * TILE, tiles.1 * TILE);
        let rows = group * tiles.0 * tiles.1;
        Plan {
            tiles,
            group,
            v: Stack::new(rows, shape.channels),
            m: Stack::new(rows, shape.filters),
            padded: (whole.0 + SPAN - TILE, whole.1 + SPAN - TILE),
            whole,
        }
    }

    /// Images of about [`GROUP_TILES`] tiles.
    fn together(shape: &Conv2dShape) -> usize {
        let tiles = shape.rows.output.div_ceil(TILE) * shape.cols.output.div_ceil(TILE);
        (GROUP_TILES / tiles).max(1)
    }

    fn tiles(&self, images: usize) -> usize {
        images * self.tiles.0 * self.tiles.1
    }

    /// Elements of the pixels of one block of channels or filters, for a whole group.
    fn pixels_len(&self) -> usize {
        self.group * self.padded.0 * self.padded.1 * LANES
    }

    /// Calls `tile(index, first)` for every tile of `images` images, with the index of its first pixel where images have
    /// `size` rows and columns.
    #[inline(always)]
    fn for_each_tile(&self, images: usize, size: (usize, usize), mut tile: impl FnMut(usize, usize)) {
        let mut index = 0;
        for image in 0..images {
            for i in 0..self.tiles.0 {
                for j in 0..self.tiles.1 {
                    tile(index, (image * size.0 + i * TILE) * size.1 + j * TILE);
                    index += 1;
                }
            }
        }
    }

    /// `V = B^T d B` of the channels from `channel` on: `pixels` holds their padded images.
    #[inline(always)]
    fn input<T: Element>(&self, images: usize, channel: usize, pixels: &[Lanes<T>], v: &mut [T]) {
        self.for_each_tile(
            images,
            self.padded,
            #[inline(always)]
            |tile, first| {
                transform_2d(
                    #[inline(always)]
                    |i, j| pixels[first + i * self.padded.1 + j],
                    input_1d,
                    #[inline(always)]
                    |i, j, vector| v[self.v.at(i, j, tile, channel)..][..LANES].copy_from_slice(&vector),
                );
            },
        );
    }

    /// `d = B dV B^T` of the channels from `channel` on, added to their padded images: the adjoint of [`Plan::input`].
    #[inline(always)]
    fn input_adjoint<T: Element>(&self, images: usize, channel: usize, dv: &[T], pixels: &mut [Lanes<T>]) {
        self.for_each_tile(
            images,
            self.padded,
            #[inline(always)]
            |tile, first| {
                transform_2d(
                    #[inline(always)]
                    |i, j| lanes(dv, self.v.at(i, j, tile, channel)),
                    input_adjoint_1d,
                    #[inline(always)]
                    |i, j, vector| {
                        let pixel = &mut pixels[first + i * self.padded.1 + j];
                        for lane in 0..LANES {
                            pixel[lane] += vector[lane];
                        }
                    },
                );
            },
        );
    }

    /// `y = A^T M A` of the filters from `filter` on, into the pixels of whole tiles.
    #[inline(always)]
    fn output<T: Element>(&self, images: usize, filter: usize, m: &[T], pixels: &mut [Lanes<T>]) {
        self.for_each_tile(
            images,
            self.whole,
            #[inline(always)]
            |tile, first| {
                transform_2d(
                    #[inline(always)]
                    |i, j| lanes(m, self.m.at(i, j, tile, filter)),
                    output_1d,
                    #[inline(always)]
                    |i, j, vector| pixels[first + i * self.whole.1 + j] = vector,
                );
            },
        );
    }

    /// `dM = A dy A^T` of the filters from `filter` on, from the pixels of whole tiles: the adjoint of [`Plan::output`].
    #[inline(always)]
    fn output_adjoint<T: Element>(&self, images: usize, filter: usize, pixels: &[Lanes<T>], dm: &mut [T]) {
        self.for_each_tile(
            images,
            self.whole,
            #[inline(always)]
            |tile, first| {
                transform_2d(
                    #[inline(always)]
                    |i, j| pixels[first + i * self.whole.1 + j],
                    output_adjoint_1d,
                    #[inline(always)]
                    |i, j, vector| dm[self.m.at(i, j, tile, filter)..][..LANES].copy_from_slice(&vector),
                );
            },
        );
    }

    /// The pixels of images of `size`, each a run per row: `rows` rows of `cols` pixels from `corner` on.
    fn runs<P>(
        pixels: &mut [P],
        size: (usize, usize),
        corner: (usize, usize),
        (rows, cols): (usize, usize),
    ) -> impl Iterator<Item = impl Iterator<Item = &mut [P]>> {
        pixels.chunks_exact_mut(size.0 * size.1).map(move |image| {
            image.chunks_exact_mut(size.1).skip(corner.0).take(rows).map(move |row| &mut row[corner.1..][..cols])
        })
    }

    /// `V` of `images`. `pixels` is scratch.
    fn transform_images<T: Element>(
        &self,
        shape: &Conv2dShape,
        images: Range<usize>,
        x: &[T],
        pixels: &mut [Lanes<T>],
        v: &mut [T],
    ) {
        let (plane, cols) = (shape.in_plane(), shape.cols.input);
        let (corner, size) = ((shape.rows.before, shape.cols.before), (shape.rows.input, cols));
        // the padding, which stays as it is
        pixels.fill([T::zero(); LANES]);
        for channel in (0..shape.channels).step_by(LANES) {
            let count = LANES.min(shape.channels - channel);
            for (image, rows) in images.clone().zip(Self::runs(pixels, self.padded, corner, size)) {
                let x = &x[(image * shape.channels + channel) * plane..];
                rows.enumerate().for_each(|(y, row)| planes_to_lanes(&x[y * cols..], plane, count, row));
            }
            vectorized!(self.input(images.len(), channel, pixels, v),);
        }
    }
}

/// `U_q` `[C, F]` of the filters w `[F, C, 3, 3]`, or, with `transposed`, `U_q^T` `[F, C]`.
fn transform_filters<T: Element>(shape: &Conv2dShape, transposed: bool, w: &[T], u: &mut [T]) -> Stack {
    let (filters, channels) = (shape.filters, shape.channels);
    // from one row, and from one column, of U_q to the next
    let (stack, row_step, col_step) = if transposed {
        (Stack::new(filters, channels), channels * 9, 9)
    } else {
        (Stack::new(channels, filters), 9, channels * 9)
    };
    let u = Disjoint::new(u);
    for_each_piece(stack.rows, |row| {
        vectorized!({
            for col in (0..stack.cols).step_by(LANES) {
                let mut g = [[T::zero(); LANES]; 9];
                for lane in 0..LANES.min(stack.cols - col) {
                    let filter = &w[row * row_step + (col + lane) * col_step..][..9];
                    (0..9).for_each(|i| g[i][lane] = filter[i]);
                }
                transform_2d(
                    #[inline(always)]
                    |i, j| g[i * 3 + j],
                    filter_1d,
                    #[inline(always)]
                    // SAFETY: a piece owns one row of each of the matrices; rows are whole vectors long.
                    |i, j, vector| unsafe { u.slice(stack.at(i, j, row, col), LANES) }.copy_from_slice(&vector),
                );
            }
        },);
    });
    stack
}

/// `dw = G^T dU G`, dU `[C, F]`: the adjoint of [`transform_filters`].
fn transform_filters_adjoint<T: Element>(stack: &Stack, du: &[T], dw: &mut [T]) {
    let channels = stack.rows;
    for_each_chunk_mut(dw, LANES * channels * 9, |block, dw| {
        vectorized!({
            for c in 0..channels {
                transform_2d(
                    #[inline(always)]
                    |i, j| lanes(du, stack.at(i, j, c, block * LANES)),
                    filter_adjoint_1d,
                    #[inline(always)]
                    |i, j, vector| {
                        for (filter, &value) in dw.chunks_exact_mut(channels * 9).zip(&vector) {
                            filter[c * 9 + i * 3 + j] = value;
                        }
                    },
                );
            }
        },);
    });
}

/// As [`crate::ops::conv::forward`], whose sink gets whole planes here.
pub(crate) fn forward<T: Element>(
    shape: &Conv2dShape,
    x: &[T],
    w: &[T],
    ws: &mut Workspace,
    sink: impl Fn(PlaneRows, &mut [T]) + Sync + Send,
) {
    // a number of groups that several threads can share evenly
    let groups = shape.images.div_ceil(Plan::together(shape)).next_multiple_of(4).min(shape.images).max(1);
    let plan = Plan::new(shape, shape.images.div_ceil(groups));
    let (filters, out_plane, size) = (shape.filters, shape.out_plane(), (shape.rows.output, shape.cols.output));
    let scratch_len = plan.v.len() + plan.m.len() + plan.pixels_len() + LANES * out_plane;
    let (u, scratch) = ws.lend(Stack::new(shape.channels, filters).len(), scratch_len);
    {
        let u_stack = transform_filters(shape, false, w, u);
        let u = &*u;
        for_each_piece(groups, |group| {
            let images = piece_range(shape.images, groups, group);
            scratch.with(|scratch: &mut [T]| {
                let (v, scratch) = scratch.split_at_mut(plan.v.len());
                let (m, scratch) = scratch.split_at_mut(plan.m.len());
                let (pixels, planes) = scratch.split_at_mut(plan.pixels_len());
                let (pixels, _) = pixels.as_chunks_mut::<LANES>();
                plan.transform_images(shape, images.clone(), x, pixels, v);
                let tiles = plan.tiles(images.len());
                for q in 0..PRODUCTS {
                    // M_q[tiles, F] = V_q[tiles, C] . U_q[C, F]
                    let (v, u) = (plan.v.mat(v, q, tiles), u_stack.mat(u, q, shape.channels));
                    gemm(Accum::Replace, T::one(), v, u, plan.m.mat_mut(m, q, tiles));
                }
                for filter in (0..filters).step_by(LANES) {
                    let count = LANES.min(filters - filter);
                    vectorized!(plan.output(images.len(), filter, m, pixels),);
                    for (image, rows) in images.clone().zip(Plan::runs(pixels, plan.whole, (0, 0), size)) {
                        for (i, row) in rows.enumerate() {
                            lanes_to_planes(row, count, &mut planes[i * size.1..], out_plane);
                        }
                        for (f, plane) in planes.chunks_exact_mut(out_plane).enumerate().take(count) {
                            sink(PlaneRows { image, filter: filter + f, row: 0 }, plane);
                        }
                    }
                }
            });
        });
    }
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
    ws: &mut Workspace,
) {
    let (channels, filters, out_plane) = (shape.channels, shape.filters, shape.out_plane());
    let (in_plane, in_cols) = (shape.in_plane(), shape.cols.input);
    let (in_size, out_size) = ((shape.rows.input, in_cols), (shape.rows.output, shape.cols.output));
    let corner = (shape.rows.before, shape.cols.before);
    let du_stack = Stack::new(channels, filters);
    let slots = Slots::new::<T>(shape.images, du_stack.len() + filters);
    let groups = slots.images().div_ceil(Plan::together(shape)).max(1);
    let plan = Plan::new(shape, slots.images().div_ceil(groups));
    let dx = dx.map(|dx| Disjoint::new(&mut dx[..shape.images * channels * in_plane]));
    let u_len = if dx.is_some() { Stack::new(filters, channels).len() } else { 0 };
    let scratch_len = plan.v.len() + plan.m.len() + plan.pixels_len() + LANES * out_plane;
    let (shared, scratch) = ws.lend(u_len + slots.len(), scratch_len);
    {
        let (u, slot_data) = shared.split_at_mut(u_len);
        let dx = dx.as_ref().map(|dx| (dx, transform_filters(shape, true, w, u)));
        let u = &*u;
        let sums = slots.sum(slot_data, |slot_images, sums| {
            let (du, db) = sums.split_at_mut(du_stack.len());
            db.fill(T::zero());
            scratch.with(|scratch: &mut [T]| {
                let (v, scratch) = scratch.split_at_mut(plan.v.len());
                let (dm, scratch) = scratch.split_at_mut(plan.m.len());
                let (pixels, planes) = scratch.split_at_mut(plan.pixels_len());
                let (pixels, _) = pixels.as_chunks_mut::<LANES>();
                for group in 0..groups {
                    let within = piece_range(slot_images.len(), groups, group);
                    let images = slot_images.start + within.start..slot_images.start + within.end;
                    let tiles = plan.tiles(images.len());
                    // dM = A dy A^T; what tiles beyond the edge would see is zero
                    pixels.fill([T::zero(); LANES]);
                    for filter in (0..filters).step_by(LANES) {
                        let count = LANES.min(filters - filter);
                        for (image, rows) in images.clone().zip(Plan::runs(pixels, plan.whole, (0, 0), out_size)) {
                            for (f, plane) in planes.chunks_exact_mut(out_plane).enumerate().take(count) {
                                source(PlaneRows { image, filter: filter + f, row: 0 }, plane);
                                db[filter + f] += vectorized!(sum(plane),);
                            }
                            for (i, row) in rows.enumerate() {
                                planes_to_lanes(&planes[i * out_size.1..], out_plane, count, row);
                            }
                        }
                        vectorized!(plan.output_adjoint(images.len(), filter, pixels, dm),);
                    }
                    plan.transform_images(shape, images.clone(), x, pixels, v);
                    let accum = if group == 0 { Accum::Replace } else { Accum::Add };
                    for q in 0..PRODUCTS {
                        // dU_q[C, F] += V_q^T[C, tiles] . dM_q[tiles, F]               because M_q = V_q . U_q
                        let (v, dm) = (plan.v.mat(v, q, tiles), plan.m.mat(dm, q, tiles));
                        gemm(accum, T::one(), v.t(), dm, du_stack.mat_mut(du, q, channels));
                    }
                    let Some((dx, u_stack)) = &dx else { continue };
                    for q in 0..PRODUCTS {
                        // dV_q[tiles, C] = dM_q[tiles, F] . U_q^T[F, C], in the place of V
                        let (dm, u) = (plan.m.mat(dm, q, tiles), u_stack.mat(u, q, filters));
                        gemm(Accum::Replace, T::one(), dm, u, plan.v.mat_mut(v, q, tiles));
                    }
                    for channel in (0..channels).step_by(LANES) {
                        let count = LANES.min(channels - channel);
                        pixels.fill([T::zero(); LANES]);
                        vectorized!(plan.input_adjoint(images.len(), channel, v, pixels),);
                        for (image, rows) in images.clone().zip(Plan::runs(pixels, plan.padded, corner, in_size)) {
                            // SAFETY: the image belongs to this slot alone.
                            let dx = unsafe { dx.slice((image * channels + channel) * in_plane, count * in_plane) };
                            for (y, row) in rows.enumerate() {
                                lanes_to_planes(row, count, &mut dx[y * in_cols..], in_plane);
                            }
                        }
                    }
                }
            });
        });
        transform_filters_adjoint(&du_stack, sums, dw);
        if let Some(db) = db {
            db.copy_from_slice(&sums[du_stack.len()..][..filters]);
        }
    }
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
    ) -> (Array4<T>, crate::ops::conv::Conv2dGrads<T>) {
        let shape = Conv2dShape::new(x.dim().into(), w.dim().into(), conv).unwrap();
        let (mut out, mut ws) = (Array4::zeros(shape.out()), Workspace::new());
        let (x, w) = (x.as_slice().unwrap(), w.as_slice().unwrap());
        let plane = |at: PlaneRows| (at.image * shape.filters + at.filter) * shape.out_plane();
        {
            let out = Disjoint::new(out.as_slice_mut().unwrap());
            // SAFETY: planes are disjoint.
            forward(&shape, x, w, &mut ws, |at, y| unsafe { out.slice(plane(at), y.len()) }.copy_from_slice(y));
        }
        let (mut dx, mut dw, mut db) =
            (random::<T>(shape.x(), 9), Array4::zeros(shape.w()), Array1::zeros(shape.filters));
        let dout = dout.as_slice().unwrap();
        let source = |at: PlaneRows, rows: &mut [T]| rows.copy_from_slice(&dout[plane(at)..][..rows.len()]);
        let (dx_slice, dw_slice) = (dx.as_slice_mut().unwrap(), dw.as_slice_mut().unwrap());
        backward(&shape, x, w, source, Some(dx_slice), dw_slice, Some(db.as_slice_mut().unwrap()), &mut ws);
        (out, crate::ops::conv::Conv2dGrads { dx, dw, db })
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
