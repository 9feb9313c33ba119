//! Level 3. What goes through Winograd's transforms together: how images are cut into tiles, and their pixels dealt out.

use std::ops::Range;

use super::maps::{Along, Input, InputAdjoint, Output, OutputAdjoint, SPAN};
use super::order::{Cut, Order, Tile};
use super::pixels::{planes_to_rows, rows_to_planes};
use super::products::Stack;
use super::transforms::{Half, transform_2d};
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
    /// How the output of an image is cut, down and across.
    cuts: (Cut, Cut),
    /// Rows and columns of tiles of an image, or of a band of it.
    tiles: (usize, usize),
    /// Images, at most.
    pub(super) images: usize,
    /// `V` and `dV`: tiles x channels.
    pub(super) v: Stack,
    /// `M` and `dM`: tiles x filters, all of them or some.
    pub(super) m: Stack,
    /// Rows and columns of an image with its padding, filled up to long tiles.
    pub(super) padded: (usize, usize),
    /// Rows and columns of the output, filled up to long tiles.
    pub(super) whole: (usize, usize),
    /// How x and the output lie, and their gradients.
    pub(super) formats: Formats,
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
        plan: &ConvPlan,
        part: WinogradPart,
        images: usize,
        (i, j): (usize, usize),
    ) -> (Self, Range<usize>) {
        let tile_rows = tiles(plan).0;
        let (band, filters) = if part.tile_rows < tile_rows { (j, 0) } else { (0, j) };
        let range = |index: usize, len: usize, all: usize| index * len..((index + 1) * len).min(all);
        let place = Place { images: range(i, part.images, images), rows: range(band, part.tile_rows, tile_rows) };
        (place, range(filters, part.filters, plan.shape.filters))
    }
}

impl Group {
    pub(super) fn new(plan: &ConvPlan, part: WinogradPart) -> Self {
        let (shape, cuts) = (&plan.shape, cuts(plan));
        let tiles = (part.tile_rows, cuts.1.tiles());
        let whole = (tiles.0 * cuts.0.length, tiles.1 * cuts.1.length);
        let rows = part.images * tiles.0 * tiles.1;
        let seen = |outputs: usize| Along::Pixels.count(outputs);
        Group {
            shape: *shape,
            cuts,
            tiles,
            images: part.images,
            v: Stack::new(plan.tile, rows, shape.channels),
            m: Stack::new(plan.tile, rows, part.filters),
            padded: (seen(whole.0), seen(whole.1)),
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
        Order::new(self.cuts, place.images.len(), &place.rows)
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
    fn first(&self, (rows, cols): (usize, usize), tile: &Tile) -> usize {
        (tile.image * rows + tile.row * self.cuts.0.length) * cols + tile.col * self.cuts.1.length
    }

    /// `V = B^T d B` of the channels from `channel` on, whose padded images `pixels` holds, of all tiles of `order`.
    #[inline(always)]
    fn input<T: Element>(&self, order: &Order, channel: usize, pixels: &[Lanes<T>], v: &mut [Lanes<T>]) {
        let mut half = Half::new();
        order.for_each_tile(
            #[inline(always)]
            |tile| {
                let first = self.first(self.padded, &tile);
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
                let at = ((place.rows.start + tile.row) * self.cuts.0.length, tile.col * self.cuts.1.length);
                let d = self.patch(pixels, at, tile.outputs, edge);
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

    /// The pixels that a tile with `outputs` from `first` on sees: where they lie, or in `edge`, where there is padding among them or
    /// the image ends soon after them.
    #[inline(always)]
    fn patch<'p, T: Element>(
        &self,
        pixels: &'p [Lanes<T>],
        first: (usize, usize),
        outputs: (usize, usize),
        edge: &'p mut [[Lanes<T>; SPAN]; SPAN],
    ) -> [&'p [Lanes<T>; SPAN]; SPAN] {
        let Conv2dShape { rows, cols, .. } = self.shape;
        let (down, across) = (Along::Pixels.count(outputs.0), Along::Pixels.count(outputs.1));
        let within = |first: usize, seen: usize, axis: &Axis| {
            axis.before.saturating_sub(first).min(seen)..(axis.input + axis.before).saturating_sub(first).min(seen)
        };
        let (rows_within, cols_within) = (within(first.0, down, &rows), within(first.1, across, &cols));
        // where the tile's corner is, which may be in the padding above
        let corner = first.0.wrapping_sub(rows.before).wrapping_mul(cols.input);
        let corner = corner.wrapping_add(first.1).wrapping_sub(cols.before);
        // The array's lines go on beyond what the tile sees: the end of the last must lie within the image, too.
        let end = corner.wrapping_add((SPAN - 1) * cols.input + SPAN);
        if (rows_within.len(), cols_within.len()) == (down, across) && end <= pixels.len() {
            let mut lines = [&edge[0]; SPAN];
            for (i, line) in lines.iter_mut().enumerate() {
                *line = pixels[corner + i * cols.input..].first_chunk().expect("the lines lie within the image");
            }
            return lines;
        }
        let zero = [T::zero(); LANES];
        for (i, line) in edge.iter_mut().enumerate().take(down) {
            if cols_within.is_empty() || !rows_within.contains(&i) {
                line.fill(zero);
                continue;
            }
            let first = corner.wrapping_add(i * cols.input + cols_within.start);
            copy_pixels(&pixels[first..first + cols_within.len()], &mut line[cols_within.clone()]);
            line[..cols_within.start].fill(zero);
            line[cols_within.end..].fill(zero);
        }
        edge.each_ref()
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
                let first = self.first(self.padded, &tile);
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
                let first = self.first((rows.len() * self.cuts.0.length, self.whole.1), &of_chunk);
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
                let first = self.first(self.whole, &tile);
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
        let [top, bottom] =
            [place.rows.start * self.cuts.0.length, Along::Pixels.count(place.rows.end * self.cuts.0.length)];
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
        let chunk = CHUNK_PIXELS.div_ceil(self.cuts.0.length * self.cuts.1.length);
        let images = (chunk / image_tiles).max(1);
        let rows = if images > 1 { place.rows.len() } else { chunk.div_ceil(self.tiles.1) };
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
        let length = self.cuts.0.length;
        let first_row = |place: &Place| place.rows.start * length;
        for chunk in self.chunks(place) {
            let size = ((chunk.rows.end * length).min(rows.output) - first_row(&chunk), cols.output);
            let first = first_row(&chunk) - first_row(place);
            let whole = chunk.rows.len() * length * self.whole.1;
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

/// Copies a few pixels, four at a time: of so many the compiler makes moves, and of more a call, which takes longer than they do.
#[inline(always)]
fn copy_pixels<T: Element>(from: &[Lanes<T>], to: &mut [Lanes<T>]) {
    let ((fours, rest), (to_fours, to_rest)) = (from.as_chunks::<4>(), to.as_chunks_mut::<4>());
    for (from, to) in fours.iter().zip(to_fours) {
        *to = *from;
    }
    match rest.len() {
        1 => to_rest[0] = rest[0],
        2 => to_rest[..2].copy_from_slice(&rest[..2]),
        3 => to_rest[..3].copy_from_slice(&rest[..3]),
        _ => {}
    }
}

/// Pixels between their transforms and what follows them, filled up to whole tiles: 8 to 9 KiB of a block of filters, or as much as
/// the least rows of tiles have.
const CHUNK_PIXELS: usize = 128;
