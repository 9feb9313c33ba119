//! Level 3. Rows of output planes: what a product hands over forward, and is handed backward.

use std::ops::Range;

use crate::ops::conv::plan::ConvPlan;
use crate::parallel::{Even, Grid, StridedMut, for_each_share};
use crate::shape::Conv2dShape;

/// Rows of one output plane: what a source delivers.
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
    /// Where the rows begin in the output of a plan.
    pub(super) fn index(&self, ConvPlan { shape, formats, .. }: &ConvPlan) -> usize {
        let planes = formats.output.planes(shape.filters);
        (self.image * planes + self.filter) * shape.out_plane() + self.row * shape.cols.output
    }
}

/// Where the finished product goes: planes of `out_plane` values, which may be smaller than those of the product; or where it lies
/// in blocks of channels, blocks of planes, which are then what `out_plane` and `out_cols` tell the sizes of.
#[derive(Debug)]
pub(crate) struct Outputs<'a, T> {
    /// `[N, ceil(F / side_by_side), out_plane]`
    pub(crate) out: &'a mut [T],
    /// One for each value of `out`, or empty.
    pub(crate) cells: &'a mut [u8],
    /// Values of a plane.
    pub(crate) out_plane: usize,
    /// Values of a row of a plane.
    pub(crate) out_cols: usize,
    /// Rows of the product that make one row of `out`.
    pub(crate) band: usize,
    /// Planes of a block: 1 where there are no blocks.
    pub(crate) side_by_side: usize,
}

impl<'a, T: Send> Outputs<'a, T> {
    /// The product as it is: `out` `[N, F, H', W']`.
    pub(crate) fn plain(plan: &ConvPlan, out: &'a mut [T]) -> Self {
        let side_by_side = plan.formats.output.side_by_side();
        let [out_plane, out_cols] = [plan.shape.out_plane(), plan.shape.cols.output].map(|len| len * side_by_side);
        Outputs { out, cells: &mut [], out_plane, out_cols, band: 1, side_by_side }
    }

    /// # Panics
    /// If they are not those of `images` images of `plan`.
    #[track_caller]
    pub(super) fn check(&self, plan: &ConvPlan, images: usize) {
        let (shape, Outputs { out, cells, out_plane, out_cols, band, side_by_side }) = (&plan.shape, self);
        assert_eq!(*side_by_side, plan.formats.output.side_by_side(), "the format that the plan is for");
        assert_eq!(*out_plane, shape.rows.output / band * out_cols, "{band} rows of the product make a row");
        let planes = shape.filters.div_ceil(*side_by_side);
        assert_eq!(out.len(), images * planes * out_plane, "out holds {images} images of {shape:?}");
        assert!(cells.is_empty() || cells.len() == out.len(), "a cell for each value");
    }

    /// Runs `piece(index, planes)` where `items` runs of planes, of equal length, are dealt out to `pieces` pieces.
    pub(super) fn for_each_run(
        self,
        items: usize,
        pieces: usize,
        piece: impl Fn(usize, OutputPlanes<'_, T>) + Sync + Send,
    ) {
        let cell_items = if self.cells.is_empty() { 0 } else { items };
        let shares = (Even::new(self.out, items, pieces), Even::new(self.cells, cell_items, pieces));
        let plane = self.out_plane;
        for_each_share(shares, |index, (out, cells)| piece(index, OutputPlanes { out, cells, plane }));
    }

    /// Runs `piece((i, j), part)` where a part is `images` images of `filters` filters each, or bands of `rows` rows of the
    /// product of one image and all filters; those at the end may have fewer. Part (i, j) is the i-th of the images, and the
    /// j-th band of them or of their filters. A band without a row of the output is none.
    pub(super) fn for_each_part(
        self,
        shape: &Conv2dShape,
        (images, filters, rows): (usize, usize, usize),
        piece: impl Fn((usize, usize), OutputPart<'_, T>) + Sync + Send,
    ) {
        if rows < shape.rows.output {
            assert_eq!((images, filters), (1, shape.filters), "bands are of one image and all filters");
            return self.for_each_block(filters, rows, piece);
        }
        let Outputs { out, cells, out_plane, out_cols, band, side_by_side } = self;
        let [image, part] = [shape.filters, filters].map(|planes| planes.div_ceil(side_by_side) * out_plane);
        let all = (out.len() / image, image);
        for_each_block_of(out, cells, (all, (images, part)), |at, out, cells| {
            piece(at, OutputPart { out, cells, plane: Some(out_plane), out_cols, band, side_by_side });
        });
    }

    /// Runs `piece((i, j), part)` where parts of `filters` filters are cut every `rows` rows of the product: part (i, j) is the
    /// j-th of its planes. One without a row of the output is none.
    pub(super) fn for_each_block(
        self,
        filters: usize,
        rows: usize,
        piece: impl Fn((usize, usize), OutputPart<'_, T>) + Sync + Send,
    ) {
        let Outputs { out, cells, out_plane, out_cols, band, side_by_side } = self;
        let (all, block) =
            ((out.len() / out_plane, out_plane), (filters.div_ceil(side_by_side), rows / band * out_cols));
        for_each_block_of(out, cells, (all, block), |at, out, cells| {
            piece(at, OutputPart { out, cells, plane: None, out_cols, band, side_by_side });
        });
    }
}

/// Runs `piece((i, j), block, cells)` for every block of the output seen as a matrix, and of the cells, if there are any: block
/// (i, j) is the i-th from above and the j-th from the left.
fn for_each_block_of<T: Send>(
    out: &mut [T],
    cells: &mut [u8],
    (all, block): ((usize, usize), (usize, usize)),
    piece: impl Fn((usize, usize), StridedMut<'_, T>, Option<StridedMut<'_, u8>>) + Sync + Send,
) {
    let out = Grid::new(out, all, block);
    let across = out.across();
    let at = |index| (index / across, index % across);
    if cells.is_empty() {
        for_each_share(out, |index, out| piece(at(index), out, None));
    } else {
        for_each_share((out, Grid::new(cells, all, block)), |index, (out, cells)| piece(at(index), out, Some(cells)));
    }
}

/// Consecutive whole planes of the output.
#[derive(Debug)]
pub(super) struct OutputPlanes<'a, T> {
    out: &'a mut [T],
    cells: &'a mut [u8],
    plane: usize,
}

impl<T> OutputPlanes<'_, T> {
    /// Values and cells of plane `index`.
    pub(super) fn plane(&mut self, index: usize) -> (&mut [T], &mut [u8]) {
        let range = index * self.plane..(index + 1) * self.plane;
        let cells = if self.cells.is_empty() { &mut *self.cells } else { &mut self.cells[range.clone()] };
        (&mut self.out[range], cells)
    }
}

/// Whole planes of some filters of some images, or the same rows of consecutive planes.
#[derive(Debug)]
pub(super) struct OutputPart<'a, T> {
    /// A run for each image, or for each filter.
    out: StridedMut<'a, T>,
    cells: Option<StridedMut<'a, u8>>,
    /// Values of a plane, where a run is an image.
    plane: Option<usize>,
    out_cols: usize,
    band: usize,
    side_by_side: usize,
}

impl<T> OutputPart<'_, T> {
    /// Values and cells of rows of a plane, counted in rows of the product from the first on, by the numbers of its image and
    /// filter within the part; of a block, by that of its first.
    pub(super) fn rows(&mut self, image: usize, filter: usize, rows: Range<usize>) -> (&mut [T], &mut [u8]) {
        let filter = filter / self.side_by_side;
        let (run, first) = match self.plane {
            Some(plane) => (image, filter * plane),
            None => (filter, 0),
        };
        let range = first + rows.start / self.band * self.out_cols..first + rows.end / self.band * self.out_cols;
        let cells = self.cells.as_mut().map_or(&mut [][..], |cells| &mut cells.get(run)[range.clone()]);
        (&mut self.out.get(run)[range], cells)
    }
}
