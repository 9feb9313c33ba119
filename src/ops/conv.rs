//! Level 2. Fast convolution: tiles of im2col columns times the filters.
//!
//! # How a product is cut
//! A *tile* is a run of output rows of one image, small enough that its columns and its product stay in the L2 cache
//! (`Tiling`). Forward, per image and group `g`:
//!
//! ```text
//! out_g[F/G, tile] = w_g[F/G, K] . cols_g[K, tile]                      K = C/G KH KW
//! ```
//!
//! and the tile is handed over at once, still in the cache, to the caller's *sink*, which adds the bias and whatever is
//! fused with it, and writes the result. Backward, the caller's *source* fills a tile of `dout`, the columns are built
//! again (cheaper than fetching them from memory), and
//!
//! ```text
//! dw_g^T[K, F/G] += cols_g[K, tile] . dout_g^T[tile, F/G]               because out = w . cols
//! dcols_g[K, tile] = w_g^T[K, F/G] . dout_g[F/G, tile];   dx += col2im(dcols)
//! ```
//!
//! The transposed products are chosen so that OpenBLAS transposes the smaller operand. `dw` is summed by
//! `Slots`: the same bits at any number of threads.
//!
//! A 1x1 convolution with stride 1 and no padding needs no columns: the image is the matrix. Where
//! [`Conv2dShape::algorithm_for`] says so, [`winograd`] or [`depthwise`] take the place of all this.

use std::ops::Range;

use ndarray::{Array1, Array4, ArrayView1, ArrayView4};

use crate::blas::{Accum, Mat, MatMut, gemm};
use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::ops::im2col::Phases;
use crate::ops::slots::Slots;
use crate::ops::{depthwise, winograd};
use crate::parallel::{Disjoint, for_each_piece};
use crate::shape::{Algorithm, Conv2d, Conv2dShape};
use crate::simd::{Write, sum, vectorized};
use crate::workspace::Workspace;

/// Gradients of a convolution.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv2dGrads<T> {
    /// Gradient of the images, `(N, C, H, W)`.
    pub dx: Array4<T>,
    /// Gradient of the filters, `(F, C / groups, KH, KW)`.
    pub dw: Array4<T>,
    /// Gradient of the bias, `(F)`.
    pub db: Array1<T>,
}

/// Rows of one output plane: what a sink receives and a source delivers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlaneRows {
    /// Image.
    pub(crate) image: usize,
    /// Filter: the output channel.
    pub(crate) filter: usize,
    /// First row; how many follow is told by the slice that comes along.
    pub(crate) row: usize,
}

impl PlaneRows {
    /// Where the rows begin in an output `[N, F, H', W']`.
    fn index(&self, shape: &Conv2dShape) -> usize {
        (self.image * shape.filters + self.filter) * shape.out_plane() + self.row * shape.cols.output
    }
}

/// How the output rows of an image are cut into tiles.
#[derive(Clone, Copy, Debug)]
struct Tiling {
    /// Rows of a tile; the last may have fewer.
    rows: usize,
    /// Tiles of an image.
    tiles: usize,
    /// Elements from one row of a tile's matrices to the next.
    ld: usize,
}

impl Tiling {
    /// What columns and product may take of the L2 cache: half of the smallest that today's server cores have (1 MiB),
    /// and half as much again, because the product's part is used once.
    const BYTES: usize = 768 << 10;

    /// Tiles of a multiple of `multiple` rows (the height of a pooling window that is fused with the product).
    fn new<T>(shape: &Conv2dShape, multiple: usize) -> Self {
        let per_row = (shape.column() + shape.filters) * shape.cols.output * size_of::<T>();
        let fitting = (Self::BYTES / per_row.max(1)).clamp(1, shape.rows.output);
        let tiles = shape.rows.output.div_ceil(fitting);
        let rows = shape.rows.output.div_ceil(tiles).next_multiple_of(multiple);
        let width = rows.min(shape.rows.output) * shape.cols.output;
        // Rows a multiple of 1 KiB apart fall into the same few sets of the L1 cache: shift them by a cache line.
        let line = 64 / size_of::<T>();
        let aligned = width.next_multiple_of(line);
        let ld = if aligned.is_multiple_of(1024 / size_of::<T>()) { aligned + line } else { aligned };
        Tiling { rows, tiles: shape.rows.output.div_ceil(rows), ld }
    }

    fn tile(&self, index: usize, shape: &Conv2dShape) -> Range<usize> {
        index * self.rows..((index + 1) * self.rows).min(shape.rows.output)
    }
}

/// Whether the image itself is the matrix of columns.
fn is_pointwise(shape: &Conv2dShape) -> bool {
    let unit = |axis: crate::shape::Axis| axis.window == 1 && axis.stride == 1 && axis.before == 0 && axis.after == 0;
    unit(shape.rows) && unit(shape.cols)
}

/// The columns of one group and tile: `K` x tile.
fn columns<'a, T: Element>(
    shape: &Conv2dShape,
    phases: &Phases,
    image: &'a [T],
    group: usize,
    tile: Range<usize>,
    cols: &'a mut [T],
    ld: usize,
) -> Mat<'a, T> {
    let (width, group_channels) = (tile.len() * shape.cols.output, shape.channels / shape.groups);
    if is_pointwise(shape) {
        let start = group * group_channels * shape.in_plane() + tile.start * shape.cols.output;
        return Mat::new(&image[start..], shape.column(), width, shape.in_plane());
    }
    let channels = group_channels * phases.channel();
    vectorized!(phases.im2col(&image[group * channels..][..channels], tile, cols, ld),);
    Mat::new(cols, shape.column(), width, ld)
}

/// `sink(rows, product)` for every tile of `w * x`, in no particular order; `product` holds the rows of one output
/// plane, without bias, and may be changed in place. Tiles begin at multiples of `row_multiple` rows.
/// Shapes: x `[N, C, H, W]`, w `[F, C / G, KH, KW]`.
pub(crate) fn forward<T: Element>(
    shape: &Conv2dShape,
    row_multiple: usize,
    x: &[T],
    w: &[T],
    ws: &mut Workspace,
    sink: impl Fn(PlaneRows, &mut [T]) + Sync + Send,
) {
    assert!(shape.check_algorithm::<T>().is_ok(), "{:?} is not for {}", shape.algorithm, T::NAME);
    match shape.algorithm_for::<T>() {
        Algorithm::Winograd => winograd::forward(shape, x, w, ws, sink),
        Algorithm::Depthwise => depthwise::forward(shape, x, w, ws, sink),
        Algorithm::Auto | Algorithm::Im2col => forward_tiles(shape, row_multiple, x, w, ws, None, sink),
    }
}

/// [`forward`] by im2col. With `out` `[N, F, H', W']`, the product is written there and not to scratch, and `sink` gets
/// its rows there.
fn forward_tiles<T: Element>(
    shape: &Conv2dShape,
    row_multiple: usize,
    x: &[T],
    w: &[T],
    ws: &mut Workspace,
    out: Option<&Disjoint<'_, T>>,
    sink: impl Fn(PlaneRows, &mut [T]) + Sync + Send,
) {
    let (tiling, phases) = (Tiling::new::<T>(shape, row_multiple), Phases::new(shape));
    let (k, filters) = (shape.column(), shape.filters / shape.groups);
    let image_len = shape.channels * shape.in_plane();
    let phases_len = if Phases::is_image(shape) { 0 } else { shape.channels * phases.channel() };
    let cols_len = if is_pointwise(shape) { 0 } else { k * tiling.ld };
    // Few images: their tiles are the pieces, so that a single image is spread over the threads too.
    let tiles_per_piece = if shape.images < 16 { 1 } else { tiling.tiles };
    let pieces_per_image = tiling.tiles / tiles_per_piece;
    let product_len = if out.is_some() { 0 } else { filters * tiling.ld };
    let (_, scratch) = ws.lend(0, phases_len + cols_len + product_len);
    for_each_piece(shape.images * pieces_per_image, |piece| {
        let (n, first_tile) = (piece / pieces_per_image, piece % pieces_per_image * tiles_per_piece);
        let image = &x[n * image_len..][..image_len];
        scratch.with(|scratch: &mut [T]| {
            let (split, scratch) = scratch.split_at_mut(phases_len);
            let (cols, product) = scratch.split_at_mut(cols_len);
            let image = if phases_len == 0 {
                image
            } else {
                vectorized!(phases.split(image, split),);
                split
            };
            for tile in first_tile..first_tile + tiles_per_piece {
                let rows = tiling.tile(tile, shape);
                let width = rows.len() * shape.cols.output;
                for group in 0..shape.groups {
                    let cols = columns(shape, &phases, image, group, rows.clone(), cols, tiling.ld);
                    // out_g[F/G, tile] = w_g[F/G, K] . cols_g[K, tile]
                    let w = Mat::new(&w[group * filters * k..], filters, k, k);
                    let at = |f: usize| PlaneRows { image: n, filter: group * filters + f, row: rows.start };
                    let Some(out) = out else {
                        gemm(Accum::Replace, T::one(), w, cols, MatMut::new(product, filters, width, tiling.ld));
                        for (f, product) in product.chunks_mut(tiling.ld).take(filters).enumerate() {
                            sink(at(f), &mut product[..width]);
                        }
                        continue;
                    };
                    let start = |f: usize| at(f).index(shape);
                    let pointer = out.pointer(start(0), (filters - 1) * shape.out_plane() + width);
                    // SAFETY: the tiles of all images and filters are disjoint.
                    let product = unsafe { MatMut::from_pointer(pointer, filters, width, shape.out_plane()) };
                    gemm(Accum::Replace, T::one(), w, cols, product);
                    for f in 0..filters {
                        // SAFETY: as above; the product is done.
                        sink(at(f), unsafe { out.slice(start(f), width) });
                    }
                }
            }
        });
    });
}

/// Gradients of `out = w * x + b`, all set, not added to: `dx` `[N, C, H, W]` if asked for, `dw` `[F, C / G, KH, KW]`,
/// `db` `[F]` if there is a bias. `source(rows, slice)` fills `slice` with rows of `dout`; it is asked once for each.
pub(crate) fn backward<T: Element>(
    shape: &Conv2dShape,
    row_multiple: usize,
    x: &[T],
    w: &[T],
    source: impl Fn(PlaneRows, &mut [T]) + Sync + Send,
    dx: Option<&mut [T]>,
    dw: &mut [T],
    db: Option<&mut [T]>,
    ws: &mut Workspace,
) {
    assert!(shape.check_algorithm::<T>().is_ok(), "{:?} is not for {}", shape.algorithm, T::NAME);
    match shape.algorithm_for::<T>() {
        Algorithm::Winograd => return winograd::backward(shape, x, w, source, dx, dw, db, ws),
        Algorithm::Depthwise => return depthwise::backward(shape, x, w, source, dx, dw, db, ws),
        Algorithm::Auto | Algorithm::Im2col => {}
    }
    let (tiling, phases) = (Tiling::new::<T>(shape, row_multiple), Phases::new(shape));
    let (k, filters, groups) = (shape.column(), shape.filters / shape.groups, shape.groups);
    let image_len = shape.channels * shape.in_plane();
    let (split, pointwise) = (!Phases::is_image(shape), is_pointwise(shape));
    let phases_len = if split { shape.channels * phases.channel() } else { 0 };
    let dphases_len = if dx.is_some() { phases_len } else { 0 };
    let cols_len = if pointwise { 0 } else { k * tiling.ld };
    let dw_len = shape.filters * k;
    let slots = Slots::new::<T>(shape.images, dw_len + shape.filters);
    let dx = dx.map(|dx| Disjoint::new(&mut dx[..shape.images * image_len]));
    let scratch_len = phases_len + dphases_len + cols_len + shape.filters * tiling.ld;
    let (shared, scratch) = ws.lend(dw_len + slots.len(), scratch_len);
    {
        let (wt, slot_data) = shared.split_at_mut(dw_len);
        // w_g^T[K, F/G], once, so that no product has to transpose it
        for (w, wt) in w.chunks_exact(filters * k).zip(wt.chunks_exact_mut(filters * k)) {
            transpose(w, filters, k, wt);
        }
        let wt = &*wt;
        let sums = slots.sum(slot_data, |images, sums| {
            let (dwt, db) = sums.split_at_mut(dw_len);
            db.fill(T::zero());
            let mut accum = Accum::Replace;
            scratch.with(|scratch: &mut [T]| {
                let (x_phases, scratch) = scratch.split_at_mut(phases_len);
                let (dx_phases, scratch) = scratch.split_at_mut(dphases_len);
                let (cols, dout) = scratch.split_at_mut(cols_len);
                for n in images {
                    let image = &x[n * image_len..][..image_len];
                    let image = if split {
                        vectorized!(phases.split(image, x_phases),);
                        &*x_phases
                    } else {
                        image
                    };
                    // SAFETY: image n belongs to this slot alone.
                    let dx = dx.as_ref().map(|dx| unsafe { dx.slice(n * image_len, image_len) });
                    let mut dx_phases = match dx {
                        None => None,
                        Some(dx) if split => Some((&mut *dx_phases, Some(dx))),
                        Some(dx) => Some((dx, None)),
                    };
                    if let Some((sums, _)) = &mut dx_phases {
                        sums.fill(T::zero());
                    }
                    for tile in 0..tiling.tiles {
                        let rows = tiling.tile(tile, shape);
                        let width = rows.len() * shape.cols.output;
                        for (f, dout) in dout.chunks_mut(tiling.ld).enumerate() {
                            source(PlaneRows { image: n, filter: f, row: rows.start }, &mut dout[..width]);
                            db[f] += vectorized!(sum(&dout[..width]),);
                        }
                        for group in 0..groups {
                            let dout = Mat::new(&dout[group * filters * tiling.ld..], filters, width, tiling.ld);
                            let group_columns = columns(shape, &phases, image, group, rows.clone(), cols, tiling.ld);
                            // dw_g^T[K, F/G] += cols_g[K, tile] . dout_g^T[tile, F/G]
                            let dwt = &mut dwt[group * filters * k..];
                            gemm(accum, T::one(), group_columns, dout.t(), MatMut::new(dwt, k, filters, filters));
                            let Some((sums, _)) = &mut dx_phases else { continue };
                            // dcols_g[K, tile] = w_g^T[K, F/G] . dout_g[F/G, tile]
                            let wt = Mat::new(&wt[group * filters * k..], k, filters, filters);
                            if pointwise {
                                let start = group * k * shape.in_plane() + rows.start * shape.cols.output;
                                let dx = MatMut::new(&mut sums[start..], k, width, shape.in_plane());
                                gemm(Accum::Replace, T::one(), wt, dout, dx);
                            } else {
                                gemm(Accum::Replace, T::one(), wt, dout, MatMut::new(cols, k, width, tiling.ld));
                                let channels = shape.channels / groups * phases.channel();
                                let sums = &mut sums[group * channels..][..channels];
                                vectorized!(phases.col2im_add(cols, rows.clone(), sums, tiling.ld),);
                            }
                        }
                        accum = Accum::Add;
                    }
                    if let Some((sums, Some(dx))) = dx_phases {
                        vectorized!(phases.merge(sums, dx),);
                    }
                }
            });
        });
        let (dwt, db_sums) = sums.split_at(dw_len);
        for (dwt, dw) in dwt.chunks_exact(filters * k).zip(dw.chunks_exact_mut(filters * k)) {
            transpose(dwt, k, filters, dw);
        }
        if let Some(db) = db {
            db.copy_from_slice(&db_sums[..shape.filters]);
        }
    }
}

/// `to[cols, rows] = from[rows, cols]^T`
fn transpose<T: Element>(from: &[T], rows: usize, cols: usize, to: &mut [T]) {
    for (j, to) in to.chunks_exact_mut(rows).take(cols).enumerate() {
        for (i, to) in to.iter_mut().enumerate() {
            *to = from[i * cols + j];
        }
    }
}

/// `out = w * x + b` into the caller's buffer. Shapes: x `[N, C, H, W]`, w `[F, C / G, KH, KW]`, b `[F]`,
/// out `[N, F, H', W']`, all row-major. Allocates nothing once `ws` has grown.
///
/// # Panics
/// If a slice has not the length of its shape, or for Winograd's algorithm in `f64`.
pub fn conv2d_forward_into<T: Element>(
    shape: &Conv2dShape,
    x: &[T],
    w: &[T],
    b: Option<&[T]>,
    out: &mut [T],
    ws: &mut Workspace,
) {
    assert_lengths(shape, x, w, out);
    assert!(b.is_none_or(|b| b.len() == shape.filters), "b has one element per filter");
    let (write, out) = (Write::of::<T>(out.len()), Disjoint::new(out));
    if shape.algorithm_for::<T>() == Algorithm::Im2col && write == Write::Cached {
        return forward_tiles(shape, 1, x, w, ws, Some(&out), |at, out| {
            let Some(b) = b else { return };
            vectorized!(out.iter_mut().for_each(|out| *out += b[at.filter]),);
        });
    }
    forward(shape, 1, x, w, ws, |at, product| {
        // SAFETY: the tiles of all images and filters are disjoint.
        let out = unsafe { out.slice(at.index(shape), product.len()) };
        let b = b.map_or(T::zero(), |b| b[at.filter]);
        vectorized!(write.map(out, product, product, |product, _| product + b),);
    });
}

/// Gradients of [`conv2d_forward_into`] into the caller's buffers, all of them set, not added to. `dx` costs a third of
/// the work: leave it out for the first layer of a network.
///
/// # Panics
/// If a slice has not the length of its shape, or for Winograd's algorithm in `f64`.
pub fn conv2d_backward_into<T: Element>(
    shape: &Conv2dShape,
    dout: &[T],
    x: &[T],
    w: &[T],
    dx: Option<&mut [T]>,
    dw: &mut [T],
    db: Option<&mut [T]>,
    ws: &mut Workspace,
) {
    assert_lengths(shape, x, w, dout);
    assert!(
        dx.as_ref().is_none_or(|dx| dx.len() == x.len()) && dw.len() == w.len(),
        "gradients have their inputs' shapes"
    );
    let source = |at: PlaneRows, rows: &mut [T]| {
        rows.copy_from_slice(&dout[at.index(shape)..][..rows.len()]);
    };
    backward(shape, 1, x, w, source, dx, dw, db, ws);
}

fn assert_lengths<T>(shape: &Conv2dShape, x: &[T], w: &[T], out: &[T]) {
    let len = |dim: [usize; 4]| dim.iter().product::<usize>();
    assert_eq!(
        (x.len(), w.len(), out.len()),
        (len(shape.x()), len(shape.w()), len(shape.out())),
        "lengths of x, w, out for {shape:?}"
    );
}

/// `out[n, f, i, j] = b[f] + sum over c, ki, kj of w[f, c, ki, kj] x[n, c, i s - p + ki d, j s - p + kj d]`
///
/// x `(N, C, H, W)`, w `(F, C / groups, KH, KW)`, b `(F)`; result `(N, F, H', W')`. The twin of
/// [`crate::naive::conv2d_forward`].
///
/// # Errors
/// As [`Conv2dShape::new`], [`crate::Error::Shape`] if `b` does not have one element per filter, and [`crate::Error::Invalid`] for
/// Winograd's algorithm in `f64`.
pub fn conv2d_forward<T: Element>(
    x: ArrayView4<'_, T>,
    w: ArrayView4<'_, T>,
    b: Option<ArrayView1<'_, T>>,
    conv: &Conv2d,
) -> Result<Array4<T>> {
    let shape = Conv2dShape::new(x.dim().into(), w.dim().into(), conv)?;
    shape.check_algorithm::<T>()?;
    if let Some(b) = &b {
        check_shape("conv2d", "b", b.shape(), &[shape.filters])?;
    }
    let (x, w, b) = (x.as_standard_layout(), w.as_standard_layout(), b.as_ref().map(|b| b.as_standard_layout()));
    let mut out = Array4::zeros(shape.out());
    conv2d_forward_into(
        &shape,
        x.as_slice().expect("standard layout"),
        w.as_slice().expect("standard layout"),
        b.as_ref().map(|b| b.as_slice().expect("standard layout")),
        out.as_slice_mut().expect("freshly made"),
        &mut Workspace::new(),
    );
    Ok(out)
}

/// Gradients of [`conv2d_forward`] with respect to x, w and b, for `dout` `(N, F, H', W')`. The twin of
/// [`crate::naive::conv2d_backward`].
///
/// # Errors
/// As [`conv2d_forward`], and [`crate::Error::Shape`] if `dout` does not have the output's shape.
pub fn conv2d_backward<T: Element>(
    dout: ArrayView4<'_, T>,
    x: ArrayView4<'_, T>,
    w: ArrayView4<'_, T>,
    conv: &Conv2d,
) -> Result<Conv2dGrads<T>> {
    let shape = Conv2dShape::new(x.dim().into(), w.dim().into(), conv)?;
    shape.check_algorithm::<T>()?;
    check_shape("conv2d backward", "dout", dout.shape(), &shape.out())?;
    let (dout, x, w) = (dout.as_standard_layout(), x.as_standard_layout(), w.as_standard_layout());
    let (mut dx, mut dw, mut db) = (Array4::zeros(shape.x()), Array4::zeros(shape.w()), Array1::zeros(shape.filters));
    conv2d_backward_into(
        &shape,
        dout.as_slice().expect("standard layout"),
        x.as_slice().expect("standard layout"),
        w.as_slice().expect("standard layout"),
        Some(dx.as_slice_mut().expect("freshly made")),
        dw.as_slice_mut().expect("freshly made"),
        Some(db.as_slice_mut().expect("freshly made")),
        &mut Workspace::new(),
    );
    Ok(Conv2dGrads { dx, dw, db })
}
