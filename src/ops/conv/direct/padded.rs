//! Level 3. Pixels as the products of `direct` read them: dealt out by phase, with their padding.

use std::ops::Range;

use super::product::Runs;
use crate::ops::conv::im2col::{Tap, tap};
use crate::ops::layout::MemoryFormat;
use crate::shape::{Axis, Conv2dShape};
use crate::simd::LANES;

/// One axis of the pixels that a run of outputs sees, of each phase those that its cells' taps find.
#[derive(Clone, Copy, Debug)]
struct Reach {
    axis: Axis,
    /// Phases that cells have, numbered in the order of the first cells that have them.
    phases: usize,
    /// The least shift.
    first: isize,
    /// Pixels of a phase that a run of outputs sees on top of one each.
    more: usize,
}

impl Reach {
    fn new(axis: Axis) -> Self {
        // so many cells further, the phase is the same
        let period = (1..=axis.stride).find(|cells| (cells * axis.dilation).is_multiple_of(axis.stride));
        let phases = period.expect("the stride is one").min(axis.window);
        let [first, last] = [0, axis.window - 1].map(|cell| tap(&axis, cell).shift);
        Reach { axis, phases, first, more: (last - first) as usize }
    }

    /// The number of a cell's phase, and the place in it where the first output finds its pixel.
    fn cell(&self, cell: usize) -> (usize, usize) {
        (cell % self.phases, (tap(&self.axis, cell).shift - self.first) as usize)
    }

    /// The first `count` places of a phase, by its number, for outputs from `start` on: which of them are pixels and not padding,
    /// and the first of these.
    #[inline(always)]
    fn pixels(&self, number: usize, start: usize, count: usize) -> (Range<usize>, usize) {
        let Tap { phase, len, .. } = tap(&self.axis, number);
        let index = start as isize + self.first;
        let within = |place: isize| place.clamp(0, count as isize) as usize;
        let places = within(-index)..within(len as isize - index).max(within(-index));
        (places, index.max(0) as usize * self.axis.stride + phase)
    }
}

/// Planes as the products read them: of each phase, rows of pixels and padding. Where channels lie in blocks, a pixel is a vector
/// of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Padded {
    rows: Reach,
    cols: Reach,
    /// Pixels from a row to the next, and from a phase to the next.
    pitch: usize,
    phase: usize,
    /// Elements of a pixel.
    pixel: usize,
}

impl Padded {
    /// For up to `rows` rows of outputs.
    pub(super) fn new(shape: &Conv2dShape, input: MemoryFormat, rows: usize) -> Self {
        let (down, across) = (Reach::new(shape.rows), Reach::new(shape.cols));
        let pitch = shape.cols.output + across.more;
        // an odd number of cache lines, lest channels share a few sets of the L1 cache
        let phase = (((rows + down.more) * pitch).div_ceil(LANES) | 1) * LANES;
        Padded { rows: down, cols: across, pitch, phase, pixel: input.side_by_side() }
    }

    /// Pixels of a plane.
    fn pixels(&self) -> usize {
        self.rows.phases * self.cols.phases * self.phase
    }

    /// Elements of a plane.
    pub(super) fn plane_len(&self) -> usize {
        self.pixels() * self.pixel
    }

    /// The pixels of `rows` rows of outputs, as a cell sees them: those of all rows lie side by side where windows are one
    /// pixel wide.
    pub(super) fn runs(&self, rows: usize) -> Runs {
        let (pitch, cols) = (self.pitch, self.cols.axis.output);
        let (count, len) = if pitch == cols { (1, rows * cols) } else { (rows, cols) };
        Runs { count, len, pitch: pitch * self.pixel, step: self.pixel }
    }

    /// Where the first output finds the pixel of each term: of each channel, of each cell in row-major order.
    ///
    /// # Panics
    /// If they are 2^32 elements apart.
    pub(super) fn offsets(&self, offsets: &mut [u32]) {
        let (width, cells) = (self.cols.axis.window, self.rows.axis.window * self.cols.axis.window);
        let channel = |channel| channel / self.pixel * self.plane_len() + channel % self.pixel;
        let all = u32::try_from((offsets.len() / cells).div_ceil(self.pixel) * self.plane_len());
        all.expect("the pixels of a band have fewer than 2^32 elements");
        let (first, others) = offsets.split_at_mut(cells);
        for (cell, offset) in first.iter_mut().enumerate() {
            let ((down, row), (across, col)) = (self.rows.cell(cell / width), self.cols.cell(cell % width));
            let pixel = (down * self.cols.phases + across) * self.phase + row * self.pitch + col;
            *offset = (pixel * self.pixel) as u32;
        }
        for (index, others) in others.chunks_exact_mut(cells).enumerate() {
            let base = channel(index + 1) as u32;
            others.iter_mut().zip(&*first).for_each(|(offset, first)| *offset = base + first);
        }
    }

    /// Fills in planes x `[H][W]` of pixels, for output rows `rows`.
    #[inline(always)]
    pub(super) fn fill<P: Copy>(&self, zero: P, x: &[P], rows: Range<usize>, to: &mut [P]) {
        let (width, height) = (self.cols.axis.input, rows.len() + self.rows.more);
        for number in 0..self.rows.phases * self.cols.phases {
            let (places, first) = self.rows.pixels(number / self.cols.phases, rows.start, height);
            let (cols, first_col) = self.cols.pixels(number % self.cols.phases, 0, self.pitch);
            let [above, below] = [places.start, places.end].map(|place| place * self.pitch);
            let planes = x.chunks_exact(self.rows.axis.input * width).zip(to.chunks_exact_mut(self.pixels()));
            for (x, plane) in planes {
                let to = &mut plane[number * self.phase..][..self.phase];
                if !cols.is_empty() {
                    // in their order: what is written beyond the end of one, the next one sets, or what comes after them
                    for (i, place) in places.clone().enumerate() {
                        let x = &x[(first + i * self.rows.axis.stride) * width + first_col..];
                        every(self.cols.axis.stride, x, &mut to[place * self.pitch + cols.start..], cols.len());
                    }
                }
                // down the columns, of which rows mostly have one or two
                for col in (0..cols.start).chain(cols.end..self.pitch) {
                    to[above..below].chunks_exact_mut(self.pitch).for_each(|row| row[col] = zero);
                }
                to[..above].fill(zero);
                to[below..height * self.pitch].fill(zero);
            }
        }
    }
}

/// `to[i] = from[i stride]` for the first `count` pixels, and maybe some after them: [`LANES`] are moved at a time, unless a pixel
/// is a vector of channels, and so a cache line or two by itself.
#[inline(always)]
fn every<P: Copy>(stride: usize, from: &[P], to: &mut [P], count: usize) {
    let mut done = 0;
    while size_of::<P>() <= size_of::<f64>()
        && stride <= 2
        && done < count
        && done + LANES <= to.len()
        && stride * (done + LANES) <= from.len()
    {
        let to: &mut [P; LANES] = (&mut to[done..done + LANES]).try_into().expect("as many");
        if stride == 1 {
            to.copy_from_slice(&from[done..done + LANES]);
        } else {
            let from: &[P; 2 * LANES] = from[2 * done..2 * (done + LANES)].try_into().expect("twice as many");
            (0..LANES).for_each(|i| to[i] = from[2 * i]);
        }
        done += LANES;
    }
    (done..count).for_each(|i| to[i] = from[i * stride]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::{Conv2d, Padding};

    /// Checks every pixel that a cell sees, of every band, in memory that held something else.
    fn check(shape: &Conv2dShape, input: MemoryFormat, band: usize) {
        let padded = Padded::new(shape, input, band);
        let lanes = padded.pixel;
        let cells = shape.rows.window * shape.cols.window;
        let (planes, plane, width) = (shape.channels / lanes, shape.in_plane() * lanes, shape.cols.input);
        let x: Vec<f32> = (0..planes * plane).map(|i| i as f32 + 1.0).collect();
        let mut offsets = vec![0; shape.column()];
        padded.offsets(&mut offsets);
        for start in (0..shape.rows.output).step_by(band) {
            let rows = start..(start + band).min(shape.rows.output);
            let mut to = vec![f32::NAN; planes * padded.plane_len()];
            match input {
                MemoryFormat::Planar => padded.fill(0.0, &x, rows.clone(), &mut to),
                MemoryFormat::Blocked => {
                    padded.fill([0.0; LANES], x.as_chunks().0, rows.clone(), to.as_chunks_mut().0);
                }
            }
            let pixel = |axis: Axis, output: usize, cell: usize| {
                (output * axis.stride + cell * axis.dilation).checked_sub(axis.before).filter(|&at| at < axis.input)
            };
            for (term, &offset) in offsets.iter().enumerate() {
                let (cell, channel) = (term % cells, term / cells);
                let (down, across) = (cell / shape.cols.window, cell % shape.cols.window);
                for (i, j) in rows.clone().flat_map(|i| (0..shape.cols.output).map(move |j| (i, j))) {
                    let at = pixel(shape.rows, i, down).zip(pixel(shape.cols, j, across));
                    let want = at.map_or(0.0, |(row, col)| {
                        x[channel / lanes * plane + (row * width + col) * lanes + channel % lanes]
                    });
                    let got = to[offset as usize + ((i - start) * padded.pitch + j) * lanes];
                    assert_eq!(got, want, "term {term} of output {i}, {j}; {input:?}, bands of {band}, {shape:?}");
                }
            }
        }
    }

    fn check_bands(shape: &Conv2dShape) {
        for band in [1, 3, shape.rows.output] {
            check(shape, MemoryFormat::Planar, band);
            check(shape, MemoryFormat::Blocked, band);
        }
    }

    #[test]
    fn every_pixel_that_a_cell_sees_is_set() {
        let steps = [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((2, 1), (2, 3)), ((3, 2), (1, 2)), ((40, 3), (1, 1))];
        for (stride, dilation) in steps {
            for (padding, (h, w)) in [0, 1, 2, 7, 20].into_iter().flat_map(|p| [(1, 1), (2, 5), (3, 3)].map(|w| (p, w)))
            {
                let conv = Conv2d { stride, dilation, padding: Padding::All(padding), ..Conv2d::default() };
                for (rows, cols) in [(4, 4), (9, 31), (7, 32), (5, 3)] {
                    // but where the window is larger than the image
                    Conv2dShape::new([1, 32, rows, cols], [1, 32, h, w], &conv).iter().for_each(check_bands);
                }
            }
        }
    }
}
