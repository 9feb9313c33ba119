//! Level 3. What is decided about a convolution before it runs: the algorithm, and how the work is cut. Every threshold
//! that was measured stands here.
//!
//! # What may depend on the number of images and of threads
//! How the work is dealt out to threads may; a bit of the result may not. An image has the same output alone and in any batch:
//! the algorithm follows from the sizes of one image, and no sum runs over more than one. (A session may choose another
//! algorithm, or other tiles, for the largest batch that it takes: [`ConvPlan::for_images`].) Gradients of weights are sums over
//! the images; their order is that of [`Slots`].

use std::cmp::Reverse;
use std::ops::Range;

use crate::blas::panels::PANEL;
use crate::element::{Element, Kind};
use crate::error::{Error, Result};
use crate::ops::conv::slots::Slots;
use crate::ops::conv::{direct, winograd};
use crate::ops::layout::Formats;
use crate::parallel::current_threads;
use crate::shape::{Algorithm, Axis, Conv2dShape};
use crate::simd::LANES;
use crate::workspace::Buffer;

/// What the columns and the product of a tile may take of the L2 cache: half of the smallest that today's server cores
/// have (1 MiB), and half as much again, because the product's part is used once.
const TILE_BYTES: usize = 768 << 10;

/// Pixels that a tile may have whatever they take: with fewer, the filters are read too often.
const TILE_PIXELS: usize = 2 * PANEL;

/// Bytes of pixels and product of a piece without columns, which the L2 cache is to hold beside the weights; and pixels that one
/// has whatever they take.
const DIRECT_BYTES: usize = 768 << 10;
const DIRECT_PIXELS: usize = PANEL;

/// Channels and filters from which on Winograd's algorithm is faster than im2col.
const WINOGRAD_CHANNELS: usize = 16;

/// Output pixels that transformed filters are used for in a call, from which on larger tiles save more than the reading of their
/// filters takes.
const MANY_PIXELS: usize = 1536;

/// Tiles that transformed filters are used for in a call, up to which it takes longer to read them from memory than im2col
/// takes in all; and from which size on they come from memory.
const FEW_TILES: usize = 4;
const UNCACHED: usize = 16 << 20;

/// Tiles that one group of images should have in Winograd's algorithm: enough rows for the products, few enough for the
/// cache.
const GROUP_TILES: usize = 64;

/// Output pixels whose transforms, which every piece makes for itself, take as long as the reading of one filter.
const READ_PIXELS: usize = 16;

/// Tiles up to which a slot is one group: larger groups than [`GROUP_TILES`] cost less than to keep the products of a slot
/// from one group to the next.
const SLOT_TILES: usize = 72;

/// Channels and filters whose products, up to 64, become a gradient of filters before the next ones begin: up to 768 KiB, which
/// stay in the L2 cache. Few channels and many filters, because the rows of products and gradients are filters.
pub(super) const GRADIENT_BLOCK: (usize, usize) = (24, 128);

/// Images from which on there are enough of them for all threads: below, each is cut into several pieces.
const MANY_IMAGES: usize = 16;

/// What the number of groups of images is about a multiple of, so that several threads share them evenly.
const GROUPS: usize = 4;

/// Elements of a padded plane in the depthwise algorithm, from which on most of it may not be padding.
const MOST_PADDED: usize = 1 << 20;

/// Pieces of a single image's channels in the depthwise algorithm.
const CHANNEL_PIECES: usize = 16;

/// Partial sums over the images of a batch: the least that a large batch has, the most, and the memory for more than the
/// least.
const SLOTS: usize = 16;
pub(super) const MOST_SLOTS: usize = 32;
const SLOT_BYTES: usize = 32 << 20;

/// Terms that the sums of a slot's products should have: with fewer, products and their transforms cost more by what they
/// write than by what they add up. (3x3 pixels of 128 channels, a single tile in each of 125 images, as 32 slots of 4 terms
/// took 2 to 4 times as long as 4 slots of 31.)
const SLOT_TERMS: usize = 48;

/// Slots that a batch has whatever their terms, if it has as many images: each is a piece of the work.
const FEWEST_SLOTS: usize = 4;

/// How a convolution runs: made once for a layer, used for any number of images.
///
/// [`Algorithm::Auto`] becomes
///
/// - [`Algorithm::Depthwise`] where every channel is a group of its own, unless filters are dilated so far that a padded plane
///   would be little but padding;
/// - [`Algorithm::Winograd`] in `f32` for 3x3 filters with stride 1, no dilation and one group, for at least 16 channels
///   and 16 filters, for outputs of 2x2 pixels and more;
/// - [`Algorithm::Im2col`] elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvPlan {
    /// Of one image.
    pub(super) shape: Conv2dShape,
    /// Never `Auto`.
    pub(super) algorithm: Algorithm,
    /// The elements it is for.
    pub(super) kind: Kind,
    pub(super) tiling: Tiling,
    /// Outputs of a tile of Winograd's algorithm, down and across.
    pub(super) tile: (usize, usize),
    /// Rows of the output at whose multiples its parts begin.
    pub(super) band: usize,
    /// How x and the output lie.
    pub(super) formats: Formats,
}

impl ConvPlan {
    /// The plan for elements of type `T`. The number of images in `shape` plays no role.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the algorithm that `shape` was made with cannot compute it: Winograd's is for 3x3 filters with
    /// stride 1, no dilation and one group, and would cost `f64` its digits; the depthwise one is for one channel per group,
    /// and for filters that do not reach far beyond the image.
    pub fn new<T: Element>(shape: &Conv2dShape) -> Result<Self> {
        let shape = shape.with_images(1);
        let tiling = Tiling::new::<T>(&shape, 1);
        let (algorithm, tile) = (resolve::<T>(&shape)?, winograd::best_tile(&shape, winograd::MOST));
        Ok(ConvPlan { shape, algorithm, kind: T::KIND, tiling, tile, band: 1, formats: Formats::default() })
    }

    /// The same with tiles, or bands of Winograd's tiles, that begin at multiples of `rows` output rows: the height of a pooling
    /// window that is fused with the product.
    pub(crate) fn with_bands(self, rows: usize) -> Self {
        let tiling = match self.kind {
            Kind::F32 => Tiling::new::<f32>(&self.shape, rows),
            Kind::F64 => Tiling::new::<f64>(&self.shape, rows),
        };
        ConvPlan { tiling, band: rows, ..self }
    }

    /// The same for x or an output that lies in blocks of channels.
    ///
    /// # Panics
    /// Where [`ConvPlan::may_be_blocked`] says that it cannot.
    pub(crate) fn with_formats(self, formats: Formats) -> Self {
        assert!(
            formats == Formats::default() || self.may_be_blocked(),
            "x and the output of {:?} cannot lie in blocks",
            self.shape
        );
        ConvPlan { formats, ..self }
    }

    /// Whether x and the output may lie in blocks of channels in the forward pass.
    pub(crate) fn may_be_blocked(&self) -> bool {
        self.shape.groups == 1 && (self.algorithm == Algorithm::Winograd || self.is_direct())
    }

    /// Whether gradients may lie as x and the output do, where these lie in blocks of channels.
    pub(crate) fn gradients_may_be_blocked(&self) -> bool {
        self.algorithm == Algorithm::Winograd
    }

    /// The algorithm that runs.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// A plan as it was made, for filters that are used for no more than `images` images at a time, as in a session. Winograd's
    /// are up to seven times as many as w has. For few images they have smaller tiles, which have fewer; and im2col in their place
    /// where they take longer to read from memory than im2col in all.
    pub(crate) fn for_images(self, images: usize) -> Self {
        if self.algorithm != Algorithm::Winograd || images.saturating_mul(self.shape.out_plane()) >= MANY_PIXELS {
            return self;
        }
        let plan = ConvPlan { tile: winograd::best_tile(&self.shape, winograd::SHORTER), ..self };
        let takes_memory = plan.shape.wish == Algorithm::Auto
            && images.saturating_mul(winograd::tiles_of(&plan)) <= FEW_TILES
            && plan.winograd_filters_are_uncached();
        if takes_memory { ConvPlan { algorithm: Algorithm::Im2col, ..plan } } else { plan }
    }

    /// Whether Winograd's filters are so many that they come from memory.
    fn winograd_filters_are_uncached(&self) -> bool {
        winograd::filters_len(self) * size_of::<f32>() >= UNCACHED
    }

    /// Whether the products of im2col's forward pass run without columns.
    pub(super) fn is_direct(&self) -> bool {
        self.algorithm == Algorithm::Im2col && self.kind == Kind::F32
    }

    /// The sizes, for one image.
    pub fn shape(&self) -> &Conv2dShape {
        &self.shape
    }

    /// The filters w `[F, C / G, KH, KW]` as the forward pass needs them: worth the while where they stay the same over
    /// several calls.
    ///
    /// # Panics
    /// If `w` has not the length of its shape, or the plan is for another type of element.
    pub fn prepare<T: Element>(&self, w: &[T]) -> Prepared<T> {
        self.check_filters(w);
        let mut filters = Buffer::zeroed(self.prepared_len());
        self.prepare_into(w, &mut filters);
        Prepared { shape: self.shape, algorithm: self.algorithm, tile: self.tile, filters }
    }

    /// Elements of prepared filters.
    fn prepared_len(&self) -> usize {
        match self.algorithm {
            Algorithm::Winograd => winograd::filters_len(self),
            _ if self.is_direct() => direct::filters_len(&self.shape),
            _ => self.shape.w().iter().product(),
        }
    }

    fn prepare_into<T: Element>(&self, w: &[T], filters: &mut [T]) {
        match self.algorithm {
            Algorithm::Winograd => winograd::prepare_filters(self, w, filters),
            _ if self.is_direct() => direct::prepare_filters(&self.shape, w, filters),
            _ => filters.copy_from_slice(w),
        }
    }

    /// # Panics
    /// If `w` has not the length of its shape, or the plan is for another type of element.
    #[track_caller]
    pub(super) fn check_filters<T: Element>(&self, w: &[T]) {
        assert_eq!(self.kind, T::KIND, "the elements that the plan is for");
        assert_eq!(w.len(), self.shape.w().iter().product::<usize>(), "w has the length of {:?}", self.shape.w());
    }

    /// # Panics
    /// If `x` does not hold `images` images.
    #[track_caller]
    pub(super) fn check_images<T>(&self, images: usize, x: &[T]) {
        assert_eq!(x.len(), images * self.image_len(), "x holds {images} images of {:?}", &self.shape.x()[1..]);
    }

    /// Terms that an image adds to an element of the filters' gradient, in the products that make it.
    fn gradient_terms(&self) -> usize {
        if self.algorithm == Algorithm::Winograd { winograd::tiles_of(self) } else { self.shape.out_plane() }
    }

    /// Elements of scratch that a piece of the forward pass takes for so many images; 0 where that is the same for any number.
    pub(crate) fn scratch_len(&self, images: usize) -> usize {
        match self.algorithm {
            Algorithm::Winograd => winograd::scratch_len(self, images),
            _ if self.is_direct() => direct::scratch_len(self, images),
            _ => 0,
        }
    }

    /// How a batch is cut for the gradient of the filters.
    pub(super) fn slots(&self, images: usize) -> Slots {
        let weights = self.shape.w().iter().product();
        let count = match self.kind {
            Kind::F32 => slot_count::<f32>(images, self.gradient_terms(), weights),
            Kind::F64 => slot_count::<f64>(images, self.gradient_terms(), weights),
        };
        Slots::new(images, count)
    }

    /// Image `image` of x.
    pub(super) fn image<'a, T>(&self, x: &'a [T], image: usize) -> &'a [T] {
        &x[image * self.image_len()..][..self.image_len()]
    }

    /// Elements of an image.
    pub(super) fn image_len(&self) -> usize {
        self.formats.input.planes(self.shape.channels) * self.shape.in_plane()
    }

    /// Tiles of an image that one piece goes through: all, where a stride is undone first for the whole image.
    pub(super) fn tiles_per_piece(&self, images: usize) -> usize {
        let strided = self.shape.rows.stride > 1 || self.shape.cols.stride > 1;
        if strided && images >= MANY_IMAGES { self.tiling.tiles } else { 1 }
    }

    /// Pieces that the channels of an image are dealt out to in the depthwise algorithm.
    pub(super) fn channel_pieces(&self, images: usize) -> usize {
        if images < MANY_IMAGES { self.shape.channels.min(CHANNEL_PIECES) } else { 1 }
    }
}

/// What a piece of the forward pass without columns computes: some rows of some filters of one group of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectPart {
    pub(super) rows: usize,
    /// A divisor of the filters of a group.
    pub(super) filters: usize,
}

impl ConvPlan {
    /// What a piece is, for so many images: a band of rows. Where these are fewer than threads share evenly, they get narrower,
    /// or the filters are dealt out, whichever reads less memory again. No bit of the output depends on it.
    pub(super) fn direct_part(&self, images: usize) -> DirectPart {
        let (shape, all) = (&self.shape, self.shape.rows.output);
        let (filters, channels) = (shape.filters / shape.groups, shape.channels / shape.groups);
        let row = channels * shape.rows.stride * shape.cols.input + 3 * LANES * shape.cols.output;
        let least = DIRECT_PIXELS.div_ceil(shape.cols.output);
        let fitting = (DIRECT_BYTES / size_of::<f32>() / row).max(least).min(all);
        let bands = all.div_ceil(fitting);
        let rows = all.div_ceil(bands).next_multiple_of(self.band);
        let wanted = pieces_of_each(images * shape.groups * bands);
        if wanted == 1 {
            return DirectPart { rows, filters };
        }
        let whole = |pieces: &usize| filters.is_multiple_of(pieces * PANEL);
        let pieces = (wanted..=2 * wanted).find(whole).or_else(|| (2..wanted).rev().find(whole));
        if let Some(pieces) = pieces.filter(|_| filters > shape.out_plane()) {
            return DirectPart { rows, filters: filters / pieces };
        }
        let narrower = all.div_ceil(wanted * bands).max(least).next_multiple_of(self.band);
        DirectPart { rows: narrower.min(rows), filters }
    }
}

/// Pieces that each of so many places is cut into, so that the threads share them evenly: the fewest, since what every piece of a
/// place needs is read, or made, by each of them.
fn pieces_of_each(places: usize) -> usize {
    let threads = current_threads();
    (1..)
        .find(|pieces| pieces * places >= 2 * threads || (pieces * places).is_multiple_of(threads))
        .expect("some are enough")
}

/// What a piece of Winograd's forward pass computes: all rows of tiles of some images and filters, or some of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WinogradPart {
    pub(super) images: usize,
    pub(super) filters: usize,
    pub(super) tile_rows: usize,
}

/// How Winograd's algorithm takes images together.
impl ConvPlan {
    /// Images of about [`GROUP_TILES`] tiles.
    fn group_images(&self) -> usize {
        (GROUP_TILES / winograd::tiles_of(self)).max(1)
    }

    /// What a piece of the forward pass is, for so many images: some images, or where one has many tiles, a band of it. Where
    /// there are fewer images than threads, the filters are dealt out, or bands are as high as lets the last thread be done
    /// first, whichever reads less memory again; filters that come from memory are dealt out, too, if all images are one group.
    /// No bit of the output depends on it.
    pub(super) fn winograd_part(&self, images: usize) -> WinogradPart {
        let (shape, (rows, cols)) = (&self.shape, winograd::tiles(self));
        let threads = current_threads();
        let one_group = threads > 1 && images <= self.group_images() && self.winograd_filters_are_uncached();
        let read = (images * shape.out_plane()).div_ceil(READ_PIXELS);
        if (images < threads || one_group) && shape.filters > read.max(PANEL) {
            let filters = shape.filters.div_ceil(threads).next_multiple_of(PANEL).min(shape.filters);
            return WinogradPart { images, filters, tile_rows: rows };
        }
        let (bands, step) = ((rows * cols / GROUP_TILES).clamp(1, (rows / 2).max(1)), self.winograd_step());
        let most = rows.div_ceil(bands).next_multiple_of(step);
        let band =
            |tile_rows: usize| WinogradPart { images: 1, filters: shape.filters, tile_rows: tile_rows.min(rows) };
        if images < threads && rows > 1 {
            // Of heights that are alike in this, the largest, and up to twice what a group should have: two halves of an image
            // are better than three bands on two threads.
            let until = |tile_rows: usize| (images * rows.div_ceil(tile_rows)).div_ceil(threads) * tile_rows.min(rows);
            let heights = (step..=2 * most).step_by(step);
            let best = heights.min_by_key(|&tile_rows| (until(tile_rows), Reverse(tile_rows)));
            return band(best.expect("a step is a height"));
        }
        if bands > 1 {
            return band(most);
        }
        let groups = images.div_ceil(self.group_images().min(images));
        let groups = if threads == 1 { groups } else { groups.next_multiple_of(GROUPS).min(images) };
        WinogradPart { images: images.div_ceil(groups), filters: shape.filters, tile_rows: rows }
    }

    /// Rows of tiles at whose multiples bands of the output begin: where a window of the pool begins.
    pub(super) fn winograd_step(&self) -> usize {
        (1..).find(|rows| (rows * self.tile.0).is_multiple_of(self.band)).expect("the band itself is one")
    }

    /// Images of a group backward, for slots of `images` images at most: all of them if they have few tiles.
    pub(super) fn gradient_group_images(&self, images: usize) -> usize {
        if images * winograd::tiles_of(self) <= SLOT_TILES { images } else { self.group_images().min(images) }
    }
}

/// Slots for sums over `images` images, of `terms` terms each, of gradients of `weights` elements: a power of two, by sizes
/// alone.
pub(super) fn slot_count<T>(images: usize, terms: usize, weights: usize) -> usize {
    let fitting = SLOT_BYTES / (weights * size_of::<T>()).max(1);
    let long_enough = (images * terms / SLOT_TERMS).max(FEWEST_SLOTS);
    let most = fitting.clamp(SLOTS, MOST_SLOTS).min(long_enough).min(images).max(1);
    1 << most.ilog2()
}

fn resolve<T: Element>(shape: &Conv2dShape) -> Result<Algorithm> {
    let group_channels = shape.channels / shape.groups;
    let refuse = |problem: String, fix| Err(Error::invalid("conv2d", problem, fix));
    match shape.wish {
        Algorithm::Auto if shape.groups > 1 && group_channels == 1 && fits_depthwise(shape) => Ok(Algorithm::Depthwise),
        Algorithm::Auto if fits_winograd(shape) && T::KIND == Kind::F32 && winograd_pays(shape) => {
            Ok(Algorithm::Winograd)
        }
        Algorithm::Auto => Ok(Algorithm::Im2col),
        Algorithm::Winograd if !fits_winograd(shape) => refuse(
            "Winograd's algorithm is for 3x3 filters with stride 1, dilation 1 and one group".into(),
            "choose Algorithm::Auto or Algorithm::Im2col",
        ),
        Algorithm::Winograd if T::KIND == Kind::F64 => refuse(
            format!("Winograd's algorithm would cost {} its digits", T::NAME),
            "choose Algorithm::Auto or Algorithm::Im2col",
        ),
        Algorithm::Depthwise if group_channels != 1 => refuse(
            format!("the depthwise algorithm is for 1 channel per group, not for {group_channels}"),
            "choose Algorithm::Auto or Algorithm::Im2col, or as many groups as channels",
        ),
        Algorithm::Depthwise if !fits_depthwise(shape) => refuse(
            "the depthwise algorithm would fill most of its memory with padding, so far are filters dilated".into(),
            "choose Algorithm::Auto or Algorithm::Im2col",
        ),
        wish => Ok(wish),
    }
}

/// Whether the padded plane that the depthwise algorithm makes of a channel is small, or little more than its pixels.
fn fits_depthwise(shape: &Conv2dShape) -> bool {
    let padded = shape.rows.filled_up().input.saturating_mul(shape.cols.filled_up().input);
    padded <= MOST_PADDED.max(16 * (shape.in_plane() + shape.out_plane()))
}

/// Whether Winograd's algorithm can compute it.
fn fits_winograd(shape: &Conv2dShape) -> bool {
    let fits = |axis: Axis| axis.window == 3 && axis.stride == 1 && axis.dilation == 1;
    fits(shape.rows) && fits(shape.cols) && shape.groups == 1
}

/// Whether Winograd's algorithm is faster than im2col.
fn winograd_pays(shape: &Conv2dShape) -> bool {
    // A tile of 2x2 outputs takes 16 multiplications for 36; along an axis with one output there is next to nothing to save.
    let outputs = shape.rows.output.min(shape.cols.output);
    outputs >= 2 && shape.channels.min(shape.filters) >= WINOGRAD_CHANNELS
}

/// How the output rows of an image are cut into tiles, for im2col.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Rows of a tile; the last may have fewer.
    pub(super) rows: usize,
    /// Tiles of an image.
    pub(super) tiles: usize,
    /// Elements from one row of a tile's matrices to the next.
    pub(super) ld: usize,
}

impl Tiling {
    /// Tiles of a multiple of `multiple` rows.
    fn new<T>(shape: &Conv2dShape, multiple: usize) -> Self {
        let per_row = (shape.column() + shape.filters) * shape.cols.output * size_of::<T>();
        let fitting = (TILE_BYTES / per_row.max(1)).max(TILE_PIXELS / shape.cols.output).clamp(1, shape.rows.output);
        let tiles = shape.rows.output.div_ceil(fitting);
        let rows = shape.rows.output.div_ceil(tiles).next_multiple_of(multiple);
        let width = rows.min(shape.rows.output) * shape.cols.output;
        // Rows a multiple of 1 KiB apart fall into the same few sets of the L1 cache: shift them by a cache line.
        let line = 64 / size_of::<T>();
        let aligned = width.next_multiple_of(line);
        let ld = if aligned.is_multiple_of(1024 / size_of::<T>()) { aligned + line } else { aligned };
        Tiling { rows, tiles: shape.rows.output.div_ceil(rows), ld }
    }

    /// Output rows of tile `index`.
    pub(super) fn tile(&self, index: usize, shape: &Conv2dShape) -> Range<usize> {
        self.rows_of(&(index..index + 1), shape)
    }

    /// Output rows of these tiles.
    pub(super) fn rows_of(&self, tiles: &Range<usize>, shape: &Conv2dShape) -> Range<usize> {
        tiles.start * self.rows..(tiles.end * self.rows).min(shape.rows.output)
    }
}

/// Filters as [`ConvPlan::prepare`] made them for one convolution.
#[derive(Debug)]
pub struct Prepared<T> {
    shape: Conv2dShape,
    algorithm: Algorithm,
    tile: (usize, usize),
    filters: Buffer<T>,
}

/// The filters of a forward pass. Both give the same bits.
#[derive(Clone, Copy, Debug)]
pub enum Filters<'a, T> {
    /// w `[F, C / G, KH, KW]`.
    Plain(&'a [T]),
    /// Prepared by the very plan that runs.
    Prepared(&'a Prepared<T>),
}

impl<'a, T: Element> Filters<'a, T> {
    /// The elements as they are: w, or what was made of it.
    ///
    /// # Panics
    /// If they are not for this plan.
    #[track_caller]
    pub(super) fn values(self, plan: &ConvPlan) -> &'a [T] {
        match self {
            Filters::Plain(w) => {
                plan.check_filters(w);
                w
            }
            Filters::Prepared(prepared) => {
                assert_eq!(plan.kind, T::KIND, "the elements that the plan is for");
                let own =
                    (prepared.shape, prepared.algorithm, prepared.tile) == (plan.shape, plan.algorithm, plan.tile);
                let Prepared { shape, algorithm, tile, .. } = prepared;
                assert!(own, "filters prepared for {algorithm:?} in {shape:?}, tiles of {tile:?}");
                &prepared.filters
            }
        }
    }

    /// Elements of the memory that [`Filters::prepared`] needs.
    pub(super) fn memory_len(self, plan: &ConvPlan) -> usize {
        if let Filters::Plain(_) = self { plan.prepared_len() } else { 0 }
    }

    /// The elements as the plan prepares them, in `memory` if that has not been done.
    ///
    /// # Panics
    /// As [`Filters::values`].
    #[track_caller]
    pub(super) fn prepared<'m>(self, plan: &ConvPlan, memory: &'m mut [T]) -> &'m [T]
    where
        'a: 'm,
    {
        let values = self.values(plan);
        if let Filters::Prepared(_) = self {
            return values;
        }
        plan.prepare_into(values, memory);
        memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::{Conv2d, Padding};

    fn shape(x: [usize; 4], w: [usize; 4], conv: Conv2d) -> Conv2dShape {
        Conv2dShape::new(x, w, &conv).unwrap()
    }

    #[test]
    fn auto_takes_what_is_fastest() {
        let same = Conv2d { padding: Padding::Same, ..Conv2d::default() };
        for (why, x, w, conv, want) in [
            ("a group per channel", [8, 32, 16, 16], [32, 1, 3, 3], same, Algorithm::Depthwise),
            ("two channels per group", [8, 32, 16, 16], [32, 2, 3, 3], same, Algorithm::Im2col),
            ("one channel, many filters: a product", [8, 1, 16, 16], [32, 1, 3, 3], same, Algorithm::Im2col),
            ("the usual", [8, 32, 16, 16], [32, 32, 3, 3], same, Algorithm::Winograd),
            ("too few filters", [8, 32, 16, 16], [15, 32, 3, 3], same, Algorithm::Im2col),
            ("a single short tile", [8, 32, 3, 3], [32, 32, 3, 3], same, Algorithm::Winograd),
            ("the smallest", [8, 32, 2, 2], [32, 32, 3, 3], same, Algorithm::Winograd),
            ("a tile for a single pixel more", [8, 32, 5, 5], [32, 32, 3, 3], same, Algorithm::Winograd),
            ("a row", [8, 32, 1, 16], [32, 32, 3, 3], same, Algorithm::Im2col),
            ("a stride", [8, 32, 16, 16], [32, 32, 3, 3], Conv2d { stride: (1, 2), ..same }, Algorithm::Im2col),
            (
                "cells a thousand pixels apart",
                [8, 3, 8, 8],
                [3, 1, 3, 3],
                Conv2d { dilation: (999, 999), ..same },
                Algorithm::Im2col,
            ),
        ] {
            let conv = Conv2d { groups: x[1] / w[1], ..conv };
            let plans = [1, 2, 500].map(|images| ConvPlan::new::<f32>(&shape(x, w, conv).with_images(images)).unwrap());
            assert_eq!(plans[0].algorithm(), want, "{why}");
            assert_eq!([plans[1], plans[2]], [plans[0]; 2], "{why}: the number of images plays no role");
        }
        let plan = ConvPlan::new::<f64>(&shape([8, 32, 16, 16], [32, 32, 3, 3], same)).unwrap();
        assert_eq!(plan.algorithm(), Algorithm::Im2col, "f64 keeps its digits");
    }

    #[test]
    fn a_wish_that_cannot_be_granted_is_an_error_with_the_fix() {
        let wish = |algorithm| Conv2d { padding: Padding::All(2), algorithm, ..Conv2d::default() };
        let winograd = wish(Algorithm::Winograd);
        let far = |algorithm| Conv2d { dilation: (9999, 9999), padding: Padding::Same, groups: 4, ..wish(algorithm) };
        for (x, w, conv, want) in [
            ([1, 4, 8, 8], [8, 4, 5, 5], winograd, "for 3x3 filters"),
            ([1, 4, 8, 8], [8, 4, 3, 3], Conv2d { stride: (2, 1), ..winograd }, "for 3x3 filters"),
            ([1, 4, 8, 8], [8, 2, 3, 3], Conv2d { groups: 2, ..winograd }, "for 3x3 filters"),
            ([1, 4, 8, 8], [8, 2, 3, 3], Conv2d { groups: 2, ..wish(Algorithm::Depthwise) }, "not for 2"),
            ([1, 4, 8, 8], [4, 1, 3, 3], far(Algorithm::Depthwise), "filters dilated"),
        ] {
            let error = ConvPlan::new::<f32>(&shape(x, w, conv)).unwrap_err().to_string();
            assert!(error.contains(want) && error.contains("Algorithm::Auto"), "{error}");
        }
        let fits = shape([1, 4, 8, 8], [8, 4, 3, 3], winograd);
        assert_eq!(ConvPlan::new::<f32>(&fits).unwrap().algorithm(), Algorithm::Winograd);
        assert!(ConvPlan::new::<f64>(&fits).unwrap_err().to_string().contains("cost f64 its digits"));
    }

    #[test]
    fn few_images_have_small_tiles_or_none() {
        let same = Conv2d { padding: Padding::Same, ..Conv2d::default() };
        let plan = |channels, side| {
            let shape = shape([1, channels, side, side], [channels, channels, 3, 3], same);
            ConvPlan::new::<f32>(&shape).unwrap().with_bands(2)
        };
        let (large, small) = (plan(32, 12), plan(512, 4));
        assert_eq!(large.tile, (6, 6));
        assert_eq!(large.for_images(1), ConvPlan { tile: (4, 4), ..large });
        assert_eq!(large.for_images(100), large);
        assert_eq!(small.for_images(1), ConvPlan { algorithm: Algorithm::Im2col, ..small });
        assert_eq!(small.for_images(5), small, "of 4x4 outputs there is no smaller tile");
    }

    #[test]
    fn slots_are_a_power_of_two_that_no_machine_decides() {
        let images = [0, 1, 3, 15, 16, 31, 32, 100, 1000];
        let counts = |terms, weights| images.map(|images| slot_count::<f32>(images, terms, weights));
        assert_eq!(counts(SLOT_TERMS, 9), [1, 1, 2, 8, 16, 16, 32, 32, 32]);
        assert_eq!(counts(SLOT_TERMS, 1 << 20), [1, 1, 2, 8, 16, 16, 16, 16, 16]);
        assert_eq!(counts(SLOT_TERMS / 8, 9), [1, 1, 2, 4, 4, 4, 4, 8, 32], "sums of few terms each");
    }
}
