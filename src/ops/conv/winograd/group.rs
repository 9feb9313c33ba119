//! Level 3. What goes through Winograd's transforms together: how images are cut into tiles, and their pixels dealt out.

use std::ops::Range;

use super::order::{Order, Tile};
use super::pixels::{planes_to_rows, rows_to_planes};
use super::products::Stack;
use super::transforms::{Half, Input, InputAdjoint, Output, OutputAdjoint, SPAN, TILE, transform_2d};
use super::{cuts, tiles};
use crate::element::Element;
use crate::ops::conv::plan::{ConvPlan, WinogradPart};
use crate::ops::layout::{Formats, MemoryFormat};
use crate::shape::{Axis, Conv2dShape};
use crate::simd::{Aligned, LANES, Lanes, vectorized};

/// What goes through together, and the tiles that it is cut into.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub(super) shape: Conv2dShape,
    /// Rows and columns of tiles of an image, or of a band of it.
    tiles: (usize, usize),
    /// Images, at most.
    pub(super) images: usize,
    /// `V` and `dV`: tiles x channels.
    pub(super) v: Stack,
    /// `M` and `dM`: tiles x filters, all of them or some.
    pub(super) m: Stack,
    /// Rows and columns of an image with its padding, filled up to whole tiles.
    pub(super) padded: (usize, usize),
    /// Rows and columns of the output, filled up to whole tiles.
    pub(super) whole: (usize, usize),
    /// How x and the output of the forward pass lie.
    formats: Formats,
    /// Rows of tiles at whose multiples finished rows of the output begin.
    step: usize,
}

/// Which tiles go through together: rows of them, of some images.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) images: Range<usize>,
    rows: Range<usize>,
}

impl Place {
    /// That of part (i, j), and its filters, where `images` images are cut into parts.
    pub(super) fn of(
        shape: &Conv2dShape,
        part: WinogradPart,
        images: usize,
        (i, j): (usize, usize),
    ) -> (Self, Range<usize>) {
        let tile_rows = tiles(shape).0;
        let (band, filters) = if part.tile_rows < tile_rows { (j, 0) } else { (0, j) };
        let range = |index: usize, len: usize, all: usize| index * len..((index + 1) * len).min(all);
        let place = Place { images: range(i, part.images, images), rows: range(band, part.tile_rows, tile_rows) };
        (place, range(filters, part.filters, shape.filters))
    }
}

impl Group {
    pub(super) fn new(plan: &ConvPlan, part: WinogradPart) -> Self {
        let shape = &plan.shape;
        let tiles = (part.tile_rows, tiles(shape).1);
        let whole = (tiles.0 * TILE, tiles.1 * TILE);
        let rows = part.images * tiles.0 * tiles.1;
        Group {
            shape: *shape,
            tiles,
            images: part.images,
            v: Stack::new(rows, shape.channels),
            m: Stack::new(rows, part.filters),
            padded: (whole.0 + SPAN - TILE, whole.1 + SPAN - TILE),
            whole,
            formats: plan.formats,
            step: plan.winograd_step(),
        }
    }

    /// All tiles of these images.
    pub(super) fn place(&self, images: Range<usize>) -> Place {
        Place { images, rows: 0..self.tiles.0 }
    }

    /// The order of the tiles at a place, which all go through together.
    pub(super) fn order(&self, place: &Place) -> Order {
        Order::new(cuts(&self.shape), place.images.len(), &place.rows)
    }

    /// Rows and columns of an input image, and of the output.
    pub(super) fn sizes(&self) -> [(usize, usize); 2] {
        let Conv2dShape { rows, cols, .. } = self.shape;
        [(rows.input, cols.input), (rows.output, cols.output)]
    }

    /// Elements of: `V`; `M`; the pixels of one block of channels or filters; the output planes of one. Forward, fewer of the last
    /// two are used.
    pub(super) fn lens(&self) -> [usize; 4] {
        let pixels = self.images * self.padded.0 * self.padded.1 * LANES;
        [self.v.len(), self.m.len(), pixels, LANES * self.shape.out_plane()]
    }

    /// The index of a tile's first pixel where images have `size` rows and columns.
    #[inline(always)]
    fn first((rows, cols): (usize, usize), tile: &Tile) -> usize {
        (tile.image * rows + tile.row * TILE) * cols + tile.col * TILE
    }

    /// `V = B^T d B` of the channels from `channel` on, whose padded images `pixels` holds, of all tiles of `order`.
    #[inline(always)]
    fn input<T: Element>(&self, order: &Order, channel: usize, pixels: &[Lanes<T>], v: &mut [Lanes<T>]) {
        let mut half = Half::new();
        order.for_each_tile(
            #[inline(always)]
            |tile| {
                let first = Self::first(self.padded, &tile);
                transform_2d::<Input, T>(
                    &mut half,
                    tile.outputs,
                    #[inline(always)]
                    |i, j| pixels[first + i * self.padded.1 + j],
                    #[inline(always)]
                    |i, j, vector| v[self.v.at(i, j, tile.index, channel)] = vector,
                );
            },
        );
    }

    /// The same of channels that lie in a block of every image `x(image)` at `place`.
    #[inline(always)]
    fn input_of_blocks<'a, T: Element>(
        &self,
        (order, place): (&Order, &Place),
        channel: usize,
        x: impl Fn(usize) -> &'a [T],
        v: &mut [Lanes<T>],
    ) {
        let mut half = Half::new();
        let Aligned(edge) = &mut Aligned([[[T::zero(); LANES]; SPAN]; SPAN]);
        order.for_each_tile(
            #[inline(always)]
            |tile| {
                let (pixels, _) = x(place.images.start + tile.image)[channel * self.shape.in_plane()..].as_chunks();
                let d = self.patch(pixels, (place.rows.start + tile.row, tile.col), edge);
                transform_2d::<Input, T>(
                    &mut half,
                    tile.outputs,
                    #[inline(always)]
                    |i, j| d[i][j],
                    #[inline(always)]
                    |i, j, vector| v[self.v.at(i, j, tile.index, channel)] = vector,
                );
            },
        );
    }

    /// The pixels that a tile sees: where they lie, or in `edge`, where there is padding among them.
    #[inline(always)]
    fn patch<'p, T: Element>(
        &self,
        pixels: &'p [Lanes<T>],
        (row, col): (usize, usize),
        edge: &'p mut [[Lanes<T>; SPAN]; SPAN],
    ) -> [&'p [Lanes<T>; SPAN]; SPAN] {
        let Conv2dShape { rows, cols, .. } = self.shape;
        let within = |tile: usize, axis: &Axis| {
            let first = tile * TILE;
            axis.before.saturating_sub(first).min(SPAN)..(axis.input + axis.before).saturating_sub(first).min(SPAN)
        };
        let (down, across) = (within(row, &rows), within(col, &cols));
        // where the tile's corner is, which may be in the padding above
        let corner = (row * TILE).wrapping_sub(rows.before).wrapping_mul(cols.input);
        let corner = corner.wrapping_add(col * TILE).wrapping_sub(cols.before);
        if (down.len(), across.len()) == (SPAN, SPAN) {
            let mut lines = [&edge[0]; SPAN];
            for (i, line) in lines.iter_mut().enumerate() {
                *line = pixels[corner + i * cols.input..].first_chunk().expect("the tile lies within the plane");
            }
            return lines;
        }
        edge.as_flattened_mut().fill([T::zero(); LANES]);
        for i in down.filter(|_| !across.is_empty()) {
            let first = corner.wrapping_add(i * cols.input + across.start);
            let (from, to) = (&pixels[first..first + across.len()], &mut edge[i][across.clone()]);
            match across.len() {
                4 => copy::<T, 4>(from, to),
                5 => copy::<T, 5>(from, to),
                6 => copy::<T, 6>(from, to),
                _ => to.copy_from_slice(from),
            }
        }
        [&edge[0], &edge[1], &edge[2], &edge[3], &edge[4], &edge[5]]
    }

    /// `d = B dV B^T` of the channels from `channel` on, of all tiles of `order`, added to their padded images: the adjoint of
    /// [`Group::input`].
    #[inline(always)]
    pub(super) fn input_adjoint<T: Element>(&self, order: &Order, channel: usize, dv: &[T], pixels: &mut [Lanes<T>]) {
        let (dv, _) = dv.as_chunks::<LANES>();
        let mut half = Half::new();
        order.for_each_tile(
            #[inline(always)]
            |tile| {
                let first = Self::first(self.padded, &tile);
                transform_2d::<InputAdjoint, T>(
                    &mut half,
                    tile.outputs,
                    #[inline(always)]
                    |i, j| dv[self.v.at(i, j, tile.index, channel)],
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

    /// `y = A^T M A` of the filters from `filter` on, into the pixels of whole tiles: those of the images and rows of tiles of
    /// `chunk`, which are among those at `place`.
    #[inline(always)]
    fn output<T: Element>(&self, place: &Place, chunk: &Place, filter: usize, m: &[T], pixels: &mut [Lanes<T>]) {
        let (m, _) = m.as_chunks::<LANES>();
        let mut half = Half::new();
        let within = |part: &Range<usize>, of: &Range<usize>| part.start - of.start..part.end - of.start;
        let (images, rows) = (within(&chunk.images, &place.images), within(&chunk.rows, &place.rows));
        self.order(place).for_each_tile_of(
            images.clone(),
            rows.clone(),
            #[inline(always)]
            |tile| {
                let of_chunk = Tile { image: tile.image - images.start, row: tile.row - rows.start, ..tile };
                let first = Self::first((rows.len() * TILE, self.whole.1), &of_chunk);
                transform_2d::<Output, T>(
                    &mut half,
                    tile.outputs,
                    #[inline(always)]
                    |i, j| m[self.m.at(i, j, tile.index, filter)],
                    #[inline(always)]
                    |i, j, vector| pixels[first + i * self.whole.1 + j] = vector,
                );
            },
        );
    }

    /// `dM = A dy A^T` of the filters from `filter` on, of all tiles of `order`, from the pixels of whole tiles: the adjoint of
    /// [`Group::output`].
    #[inline(always)]
    pub(super) fn output_adjoint<T: Element>(&self, order: &Order, filter: usize, pixels: &[Lanes<T>], dm: &mut [T]) {
        let (dm, _) = dm.as_chunks_mut::<LANES>();
        let mut half = Half::new();
        order.for_each_tile(
            #[inline(always)]
            |tile| {
                let first = Self::first(self.whole, &tile);
                transform_2d::<OutputAdjoint, T>(
                    &mut half,
                    tile.outputs,
                    #[inline(always)]
                    |i, j| pixels[first + i * self.whole.1 + j],
                    #[inline(always)]
                    |i, j, vector| dm[self.m.at(i, j, tile.index, filter)] = vector,
                );
            },
        );
    }

    /// The pixels of images of `size`, each a run per row: `rows` rows of `cols` pixels from `corner` on.
    pub(super) fn runs<P>(
        pixels: &mut [P],
        size: (usize, usize),
        corner: (usize, usize),
        (rows, cols): (usize, usize),
    ) -> impl Iterator<Item = impl Iterator<Item = &mut [P]>> {
        pixels.chunks_exact_mut(size.0 * size.1).map(move |image| {
            image.chunks_exact_mut(size.1).skip(corner.0).take(rows).map(move |row| &mut row[corner.1..][..cols])
        })
    }

    /// Deals out the channels from `channel` on of what tiles at `place` see; `x(image)` holds all channels. The padding stays
    /// as it is.
    fn load_pixels<'a, T: Element>(
        &self,
        place: &Place,
        channel: usize,
        x: impl Fn(usize) -> &'a [T],
        pixels: &mut [Lanes<T>],
    ) {
        let Conv2dShape { channels, rows, cols, .. } = self.shape;
        let (plane, count) = (self.shape.in_plane(), LANES.min(channels - channel));
        // The first row that the tiles see, and the one after the last, counted from the first row of padding.
        let [top, bottom] = [place.rows.start * TILE, place.rows.end * TILE + SPAN - TILE];
        let [first, end] = [top, bottom].map(|row| row.clamp(rows.before, rows.before + rows.input));
        let (corner, size) = ((first.saturating_sub(top), cols.before), (end - first, cols.input));
        for (image, runs) in place.images.clone().zip(Self::runs(pixels, self.padded, corner, size)) {
            let x = &x(image)[channel * plane + (first - rows.before) * cols.input..];
            planes_to_rows(x, plane, count, size, runs);
        }
    }

    /// `V` of the tiles at `place`; `x(image)` holds all channels. `pixels` is scratch.
    pub(super) fn transform_images<'a, T: Element>(
        &self,
        place: &Place,
        x: impl Fn(usize) -> &'a [T],
        pixels: &mut [Lanes<T>],
        v: &mut [T],
    ) {
        let (order, (v, _)) = (self.order(place), v.as_chunks_mut::<LANES>());
        if self.formats.input == MemoryFormat::Planar {
            pixels.fill([T::zero(); LANES]);
        }
        for channel in (0..self.shape.channels).step_by(LANES) {
            if self.formats.input == MemoryFormat::Blocked {
                vectorized!(self.input_of_blocks((&order, place), channel, &x, v));
            } else {
                self.load_pixels(place, channel, &x, pixels);
                vectorized!(self.input(&order, channel, pixels, v));
            }
        }
    }

    /// Cuts a place into chunks of few tiles, whose pixels stay in the L1 cache: rows of them of one image, or some images.
    fn chunks(&self, place: &Place) -> impl Iterator<Item = Place> + use<> {
        let (place, image_tiles) = (place.clone(), place.rows.len() * self.tiles.1);
        let images = (CHUNK_TILES / image_tiles).max(1);
        let rows = if images > 1 { place.rows.len() } else { CHUNK_TILES.div_ceil(self.tiles.1) };
        let rows = rows.next_multiple_of(self.step);
        place.images.clone().step_by(images).flat_map(move |image| {
            let (images, all) = (image..(image + images).min(place.images.end), place.rows.clone());
            all.clone()
                .step_by(rows)
                .map(move |row| Place { images: images.clone(), rows: row..(row + rows).min(all.end) })
        })
    }

    /// Calls `plane((image, rows), filter, product)` for rows of the planes at `place` of `filters` filters whose products are in
    /// `m`, all counted from the first at that place; for blocks of planes, with the first of each. `pixels` and `planes` are
    /// scratch.
    pub(super) fn for_each_plane<T: Element>(
        &self,
        place: &Place,
        filters: usize,
        m: &[T],
        (pixels, planes): (&mut [Lanes<T>], &mut [T]),
        mut plane: impl FnMut((usize, Range<usize>), usize, &mut [T]),
    ) {
        let Conv2dShape { rows, cols, .. } = self.shape;
        let first_row = |place: &Place| place.rows.start * TILE;
        for chunk in self.chunks(place) {
            let size = ((chunk.rows.end * TILE).min(rows.output) - first_row(&chunk), cols.output);
            let first = first_row(&chunk) - first_row(place);
            let whole = chunk.rows.len() * TILE * self.whole.1;
            for filter in (0..filters).step_by(LANES) {
                let count = LANES.min(filters - filter);
                vectorized!(self.output(place, &chunk, filter, m, pixels));
                let images = chunk.images.clone().map(|image| image - place.images.start);
                for (image, pixels) in images.zip(pixels.chunks_exact_mut(whole)) {
                    let at = (image, first..first + size.0);
                    self.take_planes(size, count, pixels, planes, |f, product| plane(at.clone(), filter + f, product));
                }
            }
        }
    }

    /// Takes the first `size` rows and columns of whole tiles apart into `count` planes, or together into a block of them, and
    /// calls `plane` for each. `planes` is scratch.
    fn take_planes<T: Element>(
        &self,
        size: (usize, usize),
        count: usize,
        pixels: &mut [Lanes<T>],
        planes: &mut [T],
        mut plane: impl FnMut(usize, &mut [T]),
    ) {
        let (pitch, whole) = (size.0 * size.1, self.whole.1);
        if self.formats.output == MemoryFormat::Blocked {
            // in the order of the rows, each of which moves to where earlier ones were
            for row in (1..size.0).filter(|_| size.1 < whole) {
                pixels.copy_within(row * whole..row * whole + size.1, row * size.1);
            }
            return plane(0, pixels[..pitch].as_flattened_mut());
        }
        let runs = pixels.chunks_exact_mut(whole).take(size.0).map(|row| &mut row[..size.1]);
        rows_to_planes(runs, size, count, planes, pitch);
        planes.chunks_exact_mut(pitch).enumerate().take(count).for_each(|(f, product)| plane(f, product));
    }
}

/// Copies `N` pixels: without a call, since their number is known.
#[inline(always)]
fn copy<T: Element, const N: usize>(from: &[Lanes<T>], to: &mut [Lanes<T>]) {
    to[..N].copy_from_slice(&from[..N]);
}

/// Tiles whose pixels are between their transforms and what follows them: of a block of filters 8 KiB, or as much as a row of tiles
/// has.
const CHUNK_TILES: usize = 8;
