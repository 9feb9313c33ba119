//! Level 3. Convolution as matrix products: tiles of im2col columns times the filters.
//!
//! A *tile* is a run of output rows of one image, small enough that its columns and its product stay in the L2 cache
//! (`Tiling`). Forward, per image and group `g`:
//!
//! ```text
//! out_g[F/G, tile] = w_g[F/G, K] . cols_g[K, tile]                      K = C/G KH KW
//! ```
//!
//! and the tile is finished at once, still in the cache. Backward, the columns are built again (cheaper than fetching them
//! from memory), and
//!
//! ```text
//! dw_g^T[K, F/G] += cols_g[K, tile] . dout_g^T[tile, F/G]               because out = w . cols
//! dcols_g[K, tile] = w_g^T[K, F/G] . dout_g[F/G, tile];   dx += col2im(dcols)
//! ```
//!
//! The transposed products are chosen so that OpenBLAS transposes the smaller operand.
//!
//! The columns of a 1x1 convolution with stride 1 and no padding are the image itself. Forward in `f32` no columns are made: see
//! `direct`.

use std::ops::Range;

use crate::blas::{Accum, Mat, MatMut, gemm};
use crate::element::Element;
use crate::ops::conv::backward::{Piece, Steps, Wanted, transpose_groups};
use crate::ops::conv::im2col::Polyphase;
use crate::ops::conv::plan::{ConvPlan, Tiling};
use crate::ops::conv::rows::{Outputs, PlaneRows};
use crate::parallel::{Grid, for_each_share};
use crate::shape::{Axis, Conv2dShape};
use crate::simd::{sum, vectorized};
use crate::workspace::Workspace;

/// What every tile needs to know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles {
    shape: Conv2dShape,
    tiling: Tiling,
    phases: Polyphase,
    /// Whether there is a stride to undo.
    split: bool,
    /// Whether the image itself is the matrix of columns.
    pointwise: bool,
    wanted: Wanted,
}

/// Some tiles of one group of an image.
struct Place {
    image: usize,
    group: usize,
    tiles: Range<usize>,
}

impl Tiles {
    pub(super) fn new(plan: &ConvPlan, wanted: Wanted) -> Self {
        let (shape, tiling) = (plan.shape, plan.tiling);
        let unit = |axis: Axis| axis.window == 1 && axis.stride == 1 && axis.before == 0 && axis.after == 0;
        Tiles {
            shape,
            tiling,
            phases: Polyphase::new(shape.rows, shape.cols),
            split: shape.rows.stride > 1 || shape.cols.stride > 1,
            pointwise: unit(shape.rows) && unit(shape.cols),
            wanted,
        }
    }

    /// Channels and filters of a group.
    fn of_group(&self) -> (usize, usize) {
        (self.shape.channels / self.shape.groups, self.shape.filters / self.shape.groups)
    }

    /// Elements of the phases of one channel, if they are not the channel itself.
    fn phases_len(&self) -> usize {
        if self.split { self.phases.channel() } else { 0 }
    }

    fn columns_len(&self) -> usize {
        if self.pointwise { 0 } else { self.shape.column() * self.tiling.ld }
    }

    /// The pixels of some channels as [`Tiles::columns`] wants them, for output rows `rows`; `phases` is scratch.
    fn pixels<'a, T: Element>(&self, x: &'a [T], rows: Range<usize>, phases: &'a mut [T]) -> &'a [T] {
        if !self.split {
            return x;
        }
        vectorized!(self.phases.split(x, rows, phases));
        phases
    }

    /// The columns of one group and tile, `K` x tile. `pixels` holds the group's channels, `cols` is scratch.
    fn columns<'a, T: Element>(&self, pixels: &'a [T], rows: Range<usize>, cols: &'a mut [T]) -> Mat<'a, T> {
        let (k, width) = (self.shape.column(), rows.len() * self.shape.cols.output);
        if self.pointwise {
            return Mat::new(&pixels[rows.start * self.shape.cols.output..], k, width, self.shape.in_plane());
        }
        vectorized!(self.phases.im2col(pixels, rows, cols, self.tiling.ld));
        Mat::new(cols, k, width, self.tiling.ld)
    }

    /// The `j`-th run of `tiles` tiles of the `i`-th group, over all images.
    fn place(&self, (i, j): (usize, usize), tiles: usize) -> Place {
        Place { image: i / self.shape.groups, group: i % self.shape.groups, tiles: j * tiles..(j + 1) * tiles }
    }

    /// Calls `tile(rows, columns)` for every tile of a place.
    fn for_each_tile<T: Element>(
        &self,
        place: &Place,
        x: &[T],
        scratch: &mut [T],
        mut tile: impl FnMut(Range<usize>, Mat<'_, T>),
    ) {
        let (phases, cols) = scratch.split_at_mut(self.of_group().0 * self.phases_len());
        let pixels = self.pixels(self.group_of(x, place), self.tiling.rows_of(&place.tiles, &self.shape), phases);
        for index in place.tiles.clone() {
            let rows = self.tiling.tile(index, &self.shape);
            tile(rows.clone(), self.columns(pixels, rows, cols));
        }
    }

    /// The channels of a place.
    fn group_of<'a, T>(&self, x: &'a [T], place: &Place) -> &'a [T] {
        let len = self.of_group().0 * self.shape.in_plane();
        &x[(place.image * self.shape.groups + place.group) * len..][..len]
    }

    /// `w_g` `[F/G, K]` of group `g`.
    fn filters<'a, T>(&self, w: &'a [T], group: usize) -> Mat<'a, T> {
        let (k, filters) = (self.shape.column(), self.of_group().1);
        Mat::new(&w[group * filters * k..][..filters * k], filters, k, k)
    }
}

/// As [`crate::ops::conv::forward`].
pub(super) fn forward<T: Element>(
    plan: &ConvPlan,
    images: usize,
    x: &[T],
    w: &[T],
    outputs: Outputs<'_, T>,
    finish: impl Fn(usize, &mut [T], &mut [T], &mut [u8]) + Sync + Send,
    ws: &mut Workspace,
) {
    let tiles = Tiles::new(plan, Wanted { dx: false, dw: false, db: false });
    let ((channels, filters), Tiling { ld, rows, .. }) = (tiles.of_group(), plan.tiling);
    let per_piece = plan.tiles_per_piece(images);
    let columns_len = channels * tiles.phases_len() + tiles.columns_len();
    let (_, scratch) = ws.lend(0, columns_len + filters * ld);
    outputs.for_each_block(filters, per_piece * rows, |at, mut block| {
        let place = tiles.place(at, per_piece);
        let first = place.tiles.start * rows;
        scratch.with(|scratch: &mut [T]| {
            let (columns, product) = scratch.split_at_mut(columns_len);
            tiles.for_each_tile(&place, x, columns, |rows, cols| {
                let width = rows.len() * plan.shape.cols.output;
                // out_g[F/G, tile] = w_g[F/G, K] . cols_g[K, tile]
                let out = MatMut::new(product, filters, width, ld);
                gemm(Accum::Replace, T::one(), tiles.filters(w, place.group), cols, out);
                for (f, product) in product.chunks_mut(ld).enumerate() {
                    let (out, cells) = block.rows(0, f, rows.start - first..rows.end - first);
                    finish(place.group * filters + f, &mut product[..width], out, cells);
                }
            });
        });
    });
}

/// Whether [`forward_in_place`] can compute it: it goes through one tile at a time.
pub(super) fn has_place(plan: &ConvPlan, images: usize) -> bool {
    !plan.is_direct() && plan.tiles_per_piece(images) == 1
}

/// [`forward`] with the product written to its place in `out` `[N, F, H', W']`, where `finish` gets its rows.
pub(super) fn forward_in_place<T: Element>(
    plan: &ConvPlan,
    x: &[T],
    w: &[T],
    out: &mut [T],
    finish: impl Fn(usize, &mut [T]) + Sync + Send,
    ws: &mut Workspace,
) {
    let tiles = Tiles::new(plan, Wanted { dx: false, dw: false, db: false });
    let ((channels, filters), plane) = (tiles.of_group(), plan.shape.out_plane());
    let width = plan.tiling.rows * plan.shape.cols.output;
    let (_, scratch) = ws.lend(0, channels * tiles.phases_len() + tiles.columns_len());
    let blocks = Grid::new(out, (out.len() / plane, plane), (filters, width));
    let across = blocks.across();
    for_each_share(blocks, |index, mut out| {
        let place = tiles.place((index / across, index % across), 1);
        scratch.with(|scratch: &mut [T]| {
            tiles.for_each_tile(&place, x, scratch, |_, cols| {
                // out_g[F/G, tile] = w_g[F/G, K] . cols_g[K, tile]
                gemm(Accum::Replace, T::one(), tiles.filters(w, place.group), cols, MatMut::of(&mut out));
            });
        });
        for f in 0..filters {
            finish(place.group * filters + f, out.get(f));
        }
    });
}

/// What a piece of the backward pass works with: parts of its scratch.
struct Parts<'a, T> {
    /// The phases of an image, and of its gradient, if there is a stride.
    phases: &'a mut [T],
    dphases: &'a mut [T],
    columns: &'a mut [T],
    /// A tile of `dout`, all filters.
    dout: &'a mut [T],
}

impl Tiles {
    /// Elements of the parts.
    fn lens(&self) -> [usize; 4] {
        let phases = self.shape.channels * self.phases_len();
        let (dw, dx) = (self.wanted.dw, self.wanted.dx);
        let columns = if dw || dx { self.columns_len() } else { 0 };
        [if dw { phases } else { 0 }, if dx { phases } else { 0 }, columns, self.shape.filters * self.tiling.ld]
    }

    fn parts<'a, T>(&self, scratch: &'a mut [T]) -> Parts<'a, T> {
        let [phases_len, dphases_len, columns_len, _] = self.lens();
        let (phases, scratch) = scratch.split_at_mut(phases_len);
        let (dphases, scratch) = scratch.split_at_mut(dphases_len);
        let (columns, dout) = scratch.split_at_mut(columns_len);
        Parts { phases, dphases, columns, dout }
    }

    /// `dw_g^T[K, F/G] += cols_g[K, tile] . dout_g^T[tile, F/G]` for all groups.
    fn add_filter_gradient<T: Element>(
        &self,
        accum: Accum,
        pixels: &[T],
        rows: Range<usize>,
        (columns, dout): (&mut [T], &[T]),
        dw: &mut [T],
    ) {
        let (k, (channels, filters)) = (self.shape.column(), self.of_group());
        let channel = if self.split { self.phases.channel() } else { self.shape.in_plane() };
        let groups = pixels.chunks_exact(channels * channel).zip(dw.chunks_exact_mut(filters * k));
        for (group, (pixels, dw)) in groups.enumerate() {
            let dout = self.tile_of(dout, group, rows.len());
            let cols = self.columns(pixels, rows.clone(), columns);
            gemm(accum, T::one(), cols, dout.t(), MatMut::new(dw, k, filters, filters));
        }
    }

    /// `dcols_g[K, tile] = w_g^T[K, F/G] . dout_g[F/G, tile]`, added to the pixels that the columns came from, for all
    /// groups.
    fn add_image_gradient<T: Element>(
        &self,
        filters: &[T],
        rows: Range<usize>,
        (columns, dout): (&mut [T], &[T]),
        dpixels: &mut [T],
    ) {
        let (k, (channels, group_filters)) = (self.shape.column(), self.of_group());
        let (width, ld) = (rows.len() * self.shape.cols.output, self.tiling.ld);
        let channel = if self.split { self.phases.channel() } else { self.shape.in_plane() };
        for (group, dpixels) in dpixels.chunks_exact_mut(channels * channel).enumerate() {
            let dout = self.tile_of(dout, group, rows.len());
            let wt = Mat::new(&filters[group * group_filters * k..], k, group_filters, group_filters);
            if self.pointwise {
                let dx = &mut dpixels[rows.start * self.shape.cols.output..];
                gemm(Accum::Replace, T::one(), wt, dout, MatMut::new(dx, k, width, self.shape.in_plane()));
            } else {
                gemm(Accum::Replace, T::one(), wt, dout, MatMut::new(columns, k, width, ld));
                vectorized!(self.phases.col2im_add(columns, rows.clone(), dpixels, ld));
            }
        }
    }

    /// `dout_g` `[F/G, tile]` of a tile of `rows` rows.
    fn tile_of<'a, T>(&self, dout: &'a [T], group: usize, rows: usize) -> Mat<'a, T> {
        let (filters, ld) = (self.of_group().1, self.tiling.ld);
        Mat::new(&dout[group * filters * ld..], filters, rows * self.shape.cols.output, ld)
    }
}

impl<T: Element> Steps<T> for Tiles {
    fn filters_len(&self) -> usize {
        self.shape.filters * self.shape.column()
    }

    /// `w_g^T` `[K, F/G]`, so that no product has to transpose it.
    fn prepare(&self, w: &[T], filters: &mut [T]) {
        transpose_groups(w, (self.of_group().1, self.shape.column()), filters);
    }

    fn scratch_len(&self) -> usize {
        self.lens().iter().sum()
    }

    fn run(&self, mut piece: Piece<'_, T>, source: &(impl Fn(PlaneRows, &mut [T]) + Sync), scratch: &mut [T]) {
        let Parts { phases, dphases, columns, dout } = self.parts(scratch);
        let (mut accum, filters) = (Accum::Replace, piece.filters);
        piece.db.fill(T::zero());
        for image in piece.images.clone() {
            let pixels =
                if self.wanted.dw { self.pixels(piece.x(image), 0..self.shape.rows.output, phases) } else { &[] };
            let dpixels = if self.split { &mut *dphases } else { piece.dx.image(image) };
            dpixels.fill(T::zero());
            for tile in 0..self.tiling.tiles {
                let rows = self.tiling.tile(tile, &self.shape);
                let width = rows.len() * self.shape.cols.output;
                for (filter, dout) in dout.chunks_mut(self.tiling.ld).enumerate() {
                    source(PlaneRows { image, filter, row: rows.start }, &mut dout[..width]);
                    if let Some(db) = piece.db.get_mut(filter) {
                        *db += vectorized!(sum(&dout[..width]));
                    }
                }
                self.add_filter_gradient(accum, pixels, rows.clone(), (&mut *columns, &*dout), piece.dw);
                self.add_image_gradient(filters, rows, (&mut *columns, &*dout), dpixels);
                accum = Accum::Add;
            }
            if self.split && self.wanted.dx {
                let dx = piece.dx.image(image);
                vectorized!(self.phases.merge(dphases, dx));
            }
        }
    }
}
