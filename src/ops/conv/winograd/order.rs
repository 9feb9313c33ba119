//! Level 3. The tiles of images, in the order in which they are rows of `V` and `M`.
//!
//! At the end of an axis a tile has as many outputs as are left over, for which fewer products do. Those of a product follow one
//! another, if tiles with as many outputs lie together, and both kinds that are long along one axis beside those that are long
//! along both:
//!
//! ```text
//! long down, short across      long both ways      short down, long across      short both ways
//! ```

use std::ops::Range;

use super::maps::Along;

/// The outputs along an axis, cut into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Outputs of a long tile.
    pub(super) length: usize,
    /// Long tiles.
    long: usize,
    /// Outputs of the tile behind them, what is left over; 0 where that is nothing. A single output is taken for two.
    short: usize,
}

impl Cut {
    pub(super) fn new(outputs: usize, length: usize) -> Self {
        let rest = outputs % length;
        Cut { length, long: outputs / length, short: if rest == 0 { 0 } else { rest.max(2) } }
    }

    /// The length of tiles, 2 to `most`, that have the fewest points in all, and of these the shortest, for which filters have the
    /// fewest.
    pub(super) fn best(outputs: usize, most: usize) -> usize {
        let points = |&length: &usize| Cut::new(outputs, length).points();
        (2..=most).min_by_key(points).expect("a tile has two outputs and more")
    }

    /// Points of all tiles.
    fn points(self) -> usize {
        let short = if self.short > 0 { Along::Points.count(self.short) } else { 0 };
        self.long * self.span() + short
    }

    pub(super) fn tiles(self) -> usize {
        self.long + usize::from(self.short > 0)
    }

    /// These of its tiles.
    fn part(self, tiles: &Range<usize>) -> Self {
        let short = if tiles.end > self.long { self.short } else { 0 };
        Cut { long: tiles.end.min(self.long).saturating_sub(tiles.start), short, ..self }
    }

    /// Its long tiles, and the short one.
    fn kinds(self) -> [Range<usize>; 2] {
        [0..self.long, self.long..self.tiles()]
    }

    /// Outputs of the tiles of each kind.
    fn outputs(self) -> [usize; 2] {
        [self.length, self.short]
    }

    /// Points of a long tile, which has all that there are.
    pub(super) fn span(self) -> usize {
        Along::Points.count(self.length)
    }
}

/// Indices of long and short tiles in [`Cut::kinds`].
const LONG: usize = 0;
const SHORT: usize = 1;

/// Kinds of tiles, down and across, in their order.
const KINDS: [(usize, usize); 4] = [(LONG, SHORT), (LONG, LONG), (SHORT, LONG), (SHORT, SHORT)];

/// A tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    /// Its row of `V` and `M`.
    pub(super) index: usize,
    /// Its outputs, down and across.
    pub(super) outputs: (usize, usize),
    pub(super) image: usize,
    pub(super) row: usize,
    pub(super) col: usize,
}

/// The tiles of a number of images, or of a band of each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order {
    images: usize,
    rows: Cut,
    cols: Cut,
}

impl Order {
    /// Of images with these rows of tiles of `rows`.
    pub(super) fn new((rows, cols): (Cut, Cut), images: usize, tile_rows: &Range<usize>) -> Self {
        Order { images, rows: rows.part(tile_rows), cols }
    }

    /// Points of a long tile, down and across.
    pub(super) fn span(&self) -> (usize, usize) {
        (self.rows.span(), self.cols.span())
    }

    /// Tiles of one image of each kind.
    fn counts(&self) -> [usize; 4] {
        let (rows, cols) = (self.rows.kinds(), self.cols.kinds());
        KINDS.map(|(down, across)| rows[down].len() * cols[across].len())
    }

    /// The row of `V` and `M` where the tiles of each kind begin, and where they end.
    fn starts(&self) -> [usize; 5] {
        let [a, b, c, d] = self.counts().map(|count| count * self.images);
        [0, a, a + b, a + b + c, a + b + c + d]
    }

    /// The rows of the matrices (i, j): the tiles that have a product there.
    pub(super) fn rows(&self, i: usize, j: usize) -> Range<usize> {
        let [long_down, long_both, short_down, short_both, end] = self.starts();
        match (i < Along::Points.count(self.rows.short), j < Along::Points.count(self.cols.short)) {
            (true, true) => long_down..end,
            (false, true) => long_down..short_down,
            (true, false) => long_both..short_both,
            (false, false) => long_both..short_down,
        }
    }

    /// Calls `tile` for every tile.
    #[inline(always)]
    pub(super) fn for_each_tile(&self, tile: impl FnMut(Tile)) {
        self.for_each_tile_of(0..self.images, 0..self.rows.tiles(), tile);
    }

    /// The same for some of the images, and some rows of tiles.
    #[inline(always)]
    pub(super) fn for_each_tile_of(&self, images: Range<usize>, tile_rows: Range<usize>, mut tile: impl FnMut(Tile)) {
        let (rows, cols) = (self.rows.kinds(), self.cols.kinds());
        for (start, (down, across)) in self.starts().into_iter().zip(KINDS) {
            let outputs = (self.rows.outputs()[down], self.cols.outputs()[across]);
            let (rows, cols) = (&rows[down], &cols[across]);
            let within = rows.start.max(tile_rows.start)..rows.end.min(tile_rows.end);
            for (image, row) in images.clone().flat_map(|image| within.clone().map(move |row| (image, row))) {
                let first = start + (image * rows.len() + row - rows.start) * cols.len();
                for col in cols.clone() {
                    tile(Tile { index: first + col - cols.start, outputs, image, row, col });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_over_makes_a_short_tile() {
        let cuts = |outputs: [usize; 10], most| {
            outputs.map(|outputs| {
                let cut = Cut::new(outputs, Cut::best(outputs, most));
                (cut.long, cut.length, cut.short)
            })
        };
        let outputs = [1, 2, 3, 5, 7, 8, 14, 16, 31, 32];
        let want = [
            (0, 2, 2),
            (1, 2, 0),
            (1, 3, 0),
            (1, 5, 0),
            (1, 4, 3),
            (2, 4, 0),
            (2, 5, 4),
            (2, 6, 4),
            (5, 6, 2),
            (5, 6, 2),
        ];
        assert_eq!(cuts(outputs, 6), want);
        let want = [
            (0, 2, 2),
            (1, 2, 0),
            (1, 3, 0),
            (1, 3, 2),
            (1, 4, 3),
            (2, 4, 0),
            (3, 4, 2),
            (4, 4, 0),
            (7, 4, 3),
            (8, 4, 0),
        ];
        assert_eq!(cuts(outputs, 4), want);
    }

    /// As [`super::super::best_tile`] has them, each of whose points some tile has.
    #[test]
    fn the_best_cut_covers_the_outputs_with_the_fewest_points() {
        for (outputs, most) in (1..=300).flat_map(|outputs| [4, 6].map(|most| (outputs, most))) {
            let cut = Cut::new(outputs, Cut::best(outputs, most));
            assert!(cut.long > 0 || outputs == 1, "{outputs}: {cut:?}");
            assert_eq!(cut.long * cut.length + cut.short, outputs + usize::from(outputs % cut.length == 1), "{cut:?}");
            let fewest = (2..=most).map(|length| Cut::new(outputs, length).points()).min().unwrap();
            assert_eq!(cut.points(), fewest, "{outputs}: {cut:?}");
        }
    }

    fn tiles(order: &Order, images: Range<usize>, rows: Range<usize>) -> Vec<Tile> {
        let mut tiles = Vec::new();
        order.for_each_tile_of(images, rows, |tile| tiles.push(tile));
        tiles
    }

    #[test]
    fn the_tiles_of_a_product_follow_one_another() {
        for (rows, cols) in [(8, 8), (7, 7), (3, 3), (2, 5), (15, 4), (9, 6)] {
            let cut = |outputs| Cut::new(outputs, Cut::best(outputs, 6));
            let cuts = (cut(rows), cut(cols));
            let all = 0..cuts.0.tiles();
            let order = Order::new(cuts, 3, &all);
            let tiles = tiles(&order, 0..3, all.clone());
            let of_image = cuts.0.tiles() * cuts.1.tiles();
            assert_eq!(tiles.iter().map(|tile| tile.index).collect::<Vec<_>>(), Vec::from_iter(0..3 * of_image));
            let (down, across) = order.span();
            for (i, j) in (0..down * across).map(|q| (q / across, q % across)) {
                let points = |outputs| Along::Points.count(outputs);
                let has = |tile: &&Tile| i < points(tile.outputs.0) && j < points(tile.outputs.1);
                let want: Vec<_> = tiles.iter().filter(has).map(|tile| tile.index).collect();
                assert_eq!(Vec::from_iter(order.rows(i, j)), want, "{rows} x {cols}: {i}, {j}");
            }
        }
    }

    #[test]
    fn a_part_of_the_images_and_rows_has_its_tiles_where_the_whole_has_them() {
        for (rows, cols) in [(8, 8), (14, 7), (32, 3), (13, 1)] {
            let cut = |outputs| Cut::new(outputs, Cut::best(outputs, 6));
            let cuts = (cut(rows), cut(cols));
            for band in [0..cuts.0.tiles(), 0..1, 1..cuts.0.tiles()] {
                let order = Order::new(cuts, 4, &band);
                let all = tiles(&order, 0..4, 0..band.len());
                assert!(all.iter().all(|tile| {
                    let (length, rest) = (cuts.0.length, rows - (band.start + tile.row) * cuts.0.length);
                    tile.outputs.0 == if rest >= length { length } else { rest.max(2) }
                }));
                for (images, rows) in [(0..4, 0..1), (1..3, 0..band.len()), (3..4, 1..band.len().max(1))] {
                    let of = |tile: &Tile| images.contains(&tile.image) && rows.contains(&tile.row);
                    let want: Vec<_> = all.iter().copied().filter(of).collect();
                    assert_eq!(tiles(&order, images.clone(), rows.clone()), want);
                }
            }
        }
    }
}
