//! Level 3. What goes through Winograd's transforms together: how images are cut into tiles, and their pixels dealt out.

use std::ops::Range;

use super::pixels::{planes_to_rows, rows_to_planes};
use super::tiles;
use super::transforms::{
    Half, SPAN, Stack, TILE, input_1d, input_adjoint_1d, output_1d, output_adjoint_1d, transform_2d,
};
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

    /// Tiles of so many images.
    pub(super) fn tiles(&self, images: usize) -> usize {
        images * self.tiles.0 * self.tiles.1
    }

    /// Tiles of a place.
    pub(super) fn tiles_of(&self, place: &Place) -> usize {
        place.images.len() * place.rows.len() * self.tiles.1
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

    /// Calls `tile(index, first)` for every tile of `images` images with `rows` rows of tiles, with the index of its first
    /// pixel where images have `size` rows and columns.
    #[inline(always)]
    fn for_each_tile(&self, (images, rows): (usize, usize), size: (usize, usize), mut tile: impl FnMut(usize, usize)) {
        let mut index = 0;
        for image in 0..images {
            for i in 0..rows {
                for j in 0..self.tiles.1 {
                    tile(index, (image * size.0 + i * TILE) * size.1 + j * TILE);
                    index += 1;
                }
            }
        }
    }

    /// `V = B^T d B` of a block of channels, whose padded images `pixels` holds: calls `store(i, j, tile, vector)`.
    #[inline(always)]
    fn input<T: Element>(
        &self,
        place: &Place,
        pixels: &[Lanes<T>],
        mut store: impl FnMut(usize, usize, usize, Lanes<T>),
    ) {
        let mut half = Half::new();
        self.for_each_tile(
            (place.images.len(), place.rows.len()),
            self.padded,
            #[inline(always)]
            |tile, first| {
                transform_2d(
                    &mut half,
                    #[inline(always)]
                    |i, j| pixels[first + i * self.padded.1 + j],
                    input_1d,
                    #[inline(always)]
                    |i, j, vector| store(i, j, tile, vector),
                );
            },
        );
    }

    /// The same of the channels from `channel` on, which lie in a block of every image `x(image)`.
    #[inline(always)]
    fn input_of_blocks<'a, T: Element>(
        &self,
        place: &Place,
        channel: usize,
        x: impl Fn(usize) -> &'a [T],
        mut store: impl FnMut(usize, usize, usize, Lanes<T>),
    ) {
        let (mut half, mut tile) = (Half::new(), 0);
        let Aligned(edge) = &mut Aligned([[[T::zero(); LANES]; SPAN]; SPAN]);
        for image in place.images.clone() {
            let (pixels, _) = x(image)[channel * self.shape.in_plane()..].as_chunks();
            for row in place.rows.clone() {
                for col in 0..self.tiles.1 {
                    let d = self.patch(pixels, (row, col), edge);
                    transform_2d(
                        &mut half,
                        #[inline(always)]
                        |i, j| d[i][j],
                        input_1d,
                        #[inline(always)]
                        |i, j, vector| store(i, j, tile, vector),
                    );
                    tile += 1;
                }
            }
        }
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

    /// `d = B dV B^T` of the channels from `channel` on, added to their padded images: the adjoint of [`Group::input`].
    #[inline(always)]
    pub(super) fn input_adjoint<T: Element>(&self, images: usize, channel: usize, dv: &[T], pixels: &mut [Lanes<T>]) {
        let (dv, _) = dv.as_chunks::<LANES>();
        let mut half = Half::new();
        self.for_each_tile(
            (images, self.tiles.0),
            self.padded,
            #[inline(always)]
            |tile, first| {
                transform_2d(
                    &mut half,
                    #[inline(always)]
                    |i, j| dv[self.v.at(i, j, tile, channel)],
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

    /// `y = A^T M A` of the filters from `filter` on, into the pixels of whole tiles: those of the images and rows of tiles of
    /// `chunk`, which are among those at `place`.
    #[inline(always)]
    fn output<T: Element>(&self, place: &Place, chunk: &Place, filter: usize, m: &[T], pixels: &mut [Lanes<T>]) {
        let (m, _) = m.as_chunks::<LANES>();
        let mut half = Half::new();
        let [image, row] = [chunk.images.start - place.images.start, chunk.rows.start - place.rows.start];
        let first_tile = (image * place.rows.len() + row) * self.tiles.1;
        self.for_each_tile(
            (chunk.images.len(), chunk.rows.len()),
            (chunk.rows.len() * TILE, self.whole.1),
            #[inline(always)]
            |tile, first| {
                transform_2d(
                    &mut half,
                    #[inline(always)]
                    |i, j| m[self.m.at(i, j, first_tile + tile, filter)],
                    output_1d,
                    #[inline(always)]
                    |i, j, vector| pixels[first + i * self.whole.1 + j] = vector,
                );
            },
        );
    }

    /// `dM = A dy A^T` of the filters from `filter` on, from the pixels of whole tiles: the adjoint of [`Group::output`].
    #[inline(always)]
    pub(super) fn output_adjoint<T: Element>(&self, images: usize, filter: usize, pixels: &[Lanes<T>], dm: &mut [T]) {
        let (dm, _) = dm.as_chunks_mut::<LANES>();
        let mut half = Half::new();
        self.for_each_tile(
            (images, self.tiles.0),
            self.whole,
            #[inline(always)]
            |tile, first| {
                transform_2d(
                    &mut half,
                    #[inline(always)]
                    |i, j| pixels[first + i * self.whole.1 + j],
                    output_adjoint_1d,
                    #[inline(always)]
                    |i, j, vector| dm[self.m.at(i, j, tile, filter)] = vector,
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
        let (v, _) = v.as_chunks_mut::<LANES>();
        if self.formats.input == MemoryFormat::Blocked {
            for channel in (0..self.shape.channels).step_by(LANES) {
                vectorized!(self.input_of_blocks(
                    place,
                    channel,
                    &x,
                    #[inline(always)]
                    |i, j, tile, vector| v[self.v.at(i, j, tile, channel)] = vector,
                ));
            }
            return;
        }
        pixels.fill([T::zero(); LANES]);
        for channel in (0..self.shape.channels).step_by(LANES) {
            self.load_pixels(place, channel, &x, pixels);
            vectorized!(self.input(
                place,
                pixels,
                #[inline(always)]
                |i, j, tile, vector| v[self.v.at(i, j, tile, channel)] = vector,
            ));
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
