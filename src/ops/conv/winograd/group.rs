//! Level 3. What goes through Winograd's transforms together: how images are cut into tiles, and their pixels dealt out.

use std::ops::Range;

use super::tiles;
use super::transforms::{
    Half, SPAN, Stack, TILE, input_1d, input_adjoint_1d, output_1d, output_adjoint_1d, transform_2d,
};
use crate::element::Element;
use crate::ops::conv::plan::WinogradPart;
use crate::parallel::{Grid, for_each_share};
use crate::shape::Conv2dShape;
use crate::simd::{LANES, Lanes, lanes_to_planes, planes_to_lanes, vectorized};
use crate::workspace::Scratch;

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
    pub(super) fn new(shape: &Conv2dShape, part: WinogradPart) -> Self {
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

    /// Elements of: `V`; `M`; the pixels of one block of channels or filters; the output planes of one.
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

    /// `y = A^T M A` of the filters from `filter` on, into the pixels of whole tiles.
    #[inline(always)]
    fn output<T: Element>(&self, place: &Place, filter: usize, m: &[T], pixels: &mut [Lanes<T>]) {
        let (m, _) = m.as_chunks::<LANES>();
        let mut half = Half::new();
        self.for_each_tile(
            (place.images.len(), place.rows.len()),
            self.whole,
            #[inline(always)]
            |tile, first| {
                transform_2d(
                    &mut half,
                    #[inline(always)]
                    |i, j| m[self.m.at(i, j, tile, filter)],
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

    /// `V` of all of the group's images, the channels dealt out to the threads; `x(image)` holds all channels. `scratch` is for
    /// the pixels.
    pub(super) fn transform_channels<'a, T: Element>(
        &self,
        x: impl Fn(usize) -> &'a [T] + Sync + Send,
        scratch: &Scratch<'_, T>,
        v: &mut [T],
    ) {
        let (rows, place) = (self.v.all_rows(), self.place(0..self.images));
        for_each_share(Grid::new(v, (rows, self.v.ld), (rows, LANES)), |block, mut v| {
            let channel = block * LANES;
            if channel >= self.shape.channels {
                return;
            }
            scratch.with(|scratch: &mut [T]| {
                let (pixels, _) = scratch[..self.lens()[2]].as_chunks_mut();
                pixels.fill([T::zero(); LANES]);
                self.load_pixels(&place, channel, &x, pixels);
                vectorized!(self.input(
                    &place,
                    pixels,
                    #[inline(always)]
                    |i, j, tile, vector| v.get(self.v.row(i, j, tile)).as_chunks_mut().0[0] = vector,
                ));
            });
        });
    }

    /// Calls `plane(image, filter, product)` for the planes at `place` of `filters` filters whose products are in `m`, with
    /// the rows of them that its tiles cover. `pixels` and `planes` are scratch.
    pub(super) fn for_each_plane<T: Element>(
        &self,
        place: &Place,
        filters: usize,
        m: &[T],
        (pixels, planes): (&mut [Lanes<T>], &mut [T]),
        mut plane: impl FnMut(usize, usize, &mut [T]),
    ) {
        let Conv2dShape { rows, cols, .. } = self.shape;
        let size = ((place.rows.end * TILE).min(rows.output) - place.rows.start * TILE, cols.output);
        let pitch = size.0 * size.1;
        for filter in (0..filters).step_by(LANES) {
            let count = LANES.min(filters - filter);
            vectorized!(self.output(place, filter, m, pixels));
            for (image, runs) in Self::runs(pixels, self.whole, (0, 0), size).enumerate().take(place.images.len()) {
                rows_to_planes(runs, size, count, planes, pitch);
                for (f, product) in planes.chunks_exact_mut(pitch).enumerate().take(count) {
                    plane(image, filter + f, product);
                }
            }
        }
    }
}

/// Pixels of short rows that are dealt out together.
const TOGETHER: usize = 64;

/// Rows of `cols` pixels to deal out together: one, if that is a run that the transposition can take by itself.
fn rows_together(cols: usize) -> usize {
    if cols >= LANES / 2 { 1 } else { TOGETHER / cols }
}

/// [`planes_to_lanes`] of planes of `size`, to rows that do not lie one after the other.
pub(super) fn planes_to_rows<'a, T: Element>(
    planes: &[T],
    pitch: usize,
    channels: usize,
    size: (usize, usize),
    mut rows: impl Iterator<Item = &'a mut [Lanes<T>]>,
) {
    let (together, cols) = (rows_together(size.1), size.1);
    if together == 1 {
        return rows.enumerate().for_each(|(y, row)| planes_to_lanes(&planes[y * cols..], pitch, channels, row));
    }
    let mut lanes = [[T::zero(); LANES]; TOGETHER];
    for y in (0..size.0).step_by(together) {
        let lanes = &mut lanes[..together.min(size.0 - y) * cols];
        planes_to_lanes(&planes[y * cols..], pitch, channels, lanes);
        lanes.chunks_exact(cols).zip(&mut rows).for_each(|(lanes, row)| row.copy_from_slice(lanes));
    }
}

/// The inverse of [`planes_to_rows`].
pub(super) fn rows_to_planes<'a, T: Element>(
    mut rows: impl Iterator<Item = &'a mut [Lanes<T>]>,
    size: (usize, usize),
    channels: usize,
    planes: &mut [T],
    pitch: usize,
) {
    let (together, cols) = (rows_together(size.1), size.1);
    if together == 1 {
        return rows.enumerate().for_each(|(y, row)| lanes_to_planes(row, channels, &mut planes[y * cols..], pitch));
    }
    let mut lanes = [[T::zero(); LANES]; TOGETHER];
    for y in (0..size.0).step_by(together) {
        let lanes = &mut lanes[..together.min(size.0 - y) * cols];
        lanes.chunks_exact_mut(cols).zip(&mut rows).for_each(|(lanes, row)| lanes.copy_from_slice(row));
        lanes_to_planes(lanes, channels, &mut planes[y * cols..], pitch);
    }
}
