//! Level 3. im2col and its adjoint col2im: a convolution's windows as the columns of a matrix.
//!
//! For one image, one group and output rows `r0 .. r1`, the tile of columns is
//!
//! ```text
//! cols[(c, ki, kj), (i, j)] = x[c, i * stride - pad + ki * dilation, j * stride - pad + kj * dilation]
//! (C / groups * KH * KW)  x  ((r1 - r0) * W')          zero where the index lies in the padding
//! ```
//!
//! # How a tile is filled by block copies
//! A stride is undone first: `Polyphase` deals the pixels of a plane out to `stride x stride` planes by their remainder,
//! after which every window steps by one pixel. A row of `cols` is then a *block* of such a plane, moved by a few
//! pixels. Where a phase's rows are as long as the output's (every 'same' convolution, and most others) the block is
//! contiguous: one `memcpy`, then zeros over the few cells that slid across a row's end. With stride 1 the plane is the
//! image itself and nothing is dealt out.

use std::ops::Range;

use ndarray::{Array2, Array4, ArrayView2, ArrayView4};

use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::ops::layout::{row_major, slice_mut};
use crate::parallel::{Planes, for_each_chunk_mut, for_each_share};
use crate::shape::{Axis, Conv2d, Conv2dShape};
use crate::simd::{LANES, Lanes, add_assign, deal_two, gather_two, vectorized};
use crate::workspace::Workspace;

/// Where cell `cell` of a window finds its pixels: output `o` reads element `o + shift` of phase `phase`, if that is
/// between 0 and `len`.
#[derive(Clone, Copy)]
pub(super) struct Tap {
    pub(super) phase: usize,
    pub(super) shift: isize,
    pub(super) len: usize,
}

#[inline]
pub(super) fn tap(axis: &Axis, cell: usize) -> Tap {
    let offset = (cell * axis.dilation) as isize - axis.before as isize;
    let phase = offset.rem_euclid(axis.stride as isize) as usize;
    let shift = offset.div_euclid(axis.stride as isize);
    Tap { phase, shift, len: axis.input.saturating_sub(phase).div_ceil(axis.stride) }
}

/// Planes dealt out by phase, the remainder of a pixel's position: `[C][stride_h][stride_w][height][pitch]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Polyphase {
    rows: Axis,
    cols: Axis,
    /// Rows of a phase plane.
    height: usize,
    /// Elements from one row of a phase plane to the next.
    pitch: usize,
}

impl Polyphase {
    pub(super) fn new(rows: Axis, cols: Axis) -> Self {
        let width = cols.input.div_ceil(cols.stride);
        // Rows are filled up with zeros to the output's width, where that is enough: see "block copies" above. A single
        // phase is the plane itself.
        let pitch = if rows.stride == 1 && cols.stride == 1 { cols.input } else { width.max(cols.output) };
        Polyphase { rows, cols, height: rows.input.div_ceil(rows.stride), pitch }
    }

    fn plane(&self) -> usize {
        self.height * self.pitch
    }

    /// Phases down and across. Those of a stride beyond the input are as many as there are pixels, the others are empty; two
    /// are dealt out at once, also where there is one pixel.
    pub(super) fn phases(&self) -> (usize, usize) {
        let of = |axis: Axis| axis.stride.min(axis.input.max(2));
        (of(self.rows), of(self.cols))
    }

    /// Elements of the phases of one channel.
    pub(super) fn channel(&self) -> usize {
        let (down, across) = self.phases();
        down * across * self.plane()
    }

    /// Deals out the channels of `x`, `[C][H][W]`, to `phases`: as much as the windows of output rows `tile` see.
    #[inline(always)]
    pub(super) fn split<T: Element>(&self, x: &[T], tile: Range<usize>, phases: &mut [T]) {
        let (sh, sw, width) = (self.rows.stride, self.cols.stride, self.cols.input);
        for (c, channel) in phases.chunks_exact_mut(self.channel()).enumerate() {
            for (ph, phases) in channel.chunks_exact_mut(self.phases().1 * self.plane()).enumerate() {
                for i in self.seen(ph, &tile) {
                    let (y, row) = (i * sh + ph, i * self.pitch..(i + 1) * self.pitch);
                    if y >= self.rows.input {
                        phases.chunks_exact_mut(self.plane()).for_each(|plane| plane[row.clone()].fill(T::zero()));
                        continue;
                    }
                    let start = (c * self.rows.input + y) * width;
                    if sw == 2 {
                        let (even, odd) = phases.split_at_mut(self.plane());
                        deal_row(&x[start..], width, &mut even[row.clone()], &mut odd[row]);
                        continue;
                    }
                    for (pw, plane) in phases.chunks_exact_mut(self.plane()).enumerate() {
                        let (row, source) = (&mut plane[row.clone()], x[start..][..width].iter().skip(pw).step_by(sw));
                        let filled = row.iter_mut().zip(source).map(|(to, &from)| *to = from).count();
                        row[filled..].fill(T::zero());
                    }
                }
            }
        }
    }

    /// The rows of phase `phase` that the windows of output rows `tile` see.
    #[inline(always)]
    fn seen(&self, phase: usize, tile: &Range<usize>) -> Range<usize> {
        let taps = (0..self.rows.window).map(|ki| tap(&self.rows, ki)).filter(|tap| tap.phase == phase);
        let (first, end) = taps.fold((self.height, 0), |(first, end), tap| {
            let within = |row: usize| row.saturating_add_signed(tap.shift).min(self.height);
            (first.min(within(tile.start)), end.max(within(tile.end)))
        });
        first..end.max(first)
    }

    /// Gathers `phases` back into the channels of `x`: the inverse of [`Polyphase::split`].
    #[inline(always)]
    pub(super) fn merge<T: Element>(&self, phases: &[T], x: &mut [T]) {
        let (sh, sw, width) = (self.rows.stride, self.cols.stride, self.cols.input);
        for (c, channel) in phases.chunks_exact(self.channel()).enumerate() {
            for i in 0..self.height {
                // in the order of the rows: `gather_row` may write beyond one
                for (ph, phases) in channel.chunks_exact(self.phases().1 * self.plane()).enumerate() {
                    let (y, row) = (i * sh + ph, i * self.pitch..(i + 1) * self.pitch);
                    if y >= self.rows.input {
                        continue;
                    }
                    let start = (c * self.rows.input + y) * width;
                    if sw == 2 {
                        let (even, odd) = phases.split_at(self.plane());
                        gather_row(&even[row.clone()], &odd[row], width, &mut x[start..]);
                        continue;
                    }
                    for (pw, plane) in phases.chunks_exact(self.plane()).enumerate() {
                        let to = x[start..][..width].iter_mut().skip(pw).step_by(sw);
                        to.zip(&plane[row.clone()]).for_each(|(to, &from)| *to = from);
                    }
                }
            }
        }
    }

    /// The blocks of a window's cells, in row-major order, for output rows `tile`.
    #[inline(always)]
    fn blocks(&self, tile: Range<usize>) -> impl Iterator<Item = Block> {
        (0..self.rows.window).flat_map(
            #[inline(always)]
            move |ki| {
                let (phases, tile, row) = (*self, tile.clone(), tap(&self.rows, ki));
                (0..self.cols.window).map(
                    #[inline(always)]
                    move |kj| phases.block(&tile, row, tap(&phases.cols, kj)),
                )
            },
        )
    }

    #[inline(always)]
    fn block(&self, tile: &Range<usize>, row: Tap, col: Tap) -> Block {
        let first_row = (-row.shift).max(tile.start as isize).min(tile.end as isize);
        let end_row = (row.len as isize - row.shift).clamp(first_row, tile.end as isize);
        let output = self.cols.output as isize;
        let first_col = (-col.shift).clamp(0, output);
        let end_col = (col.len as isize - col.shift).clamp(first_col, output);
        let (rows, cols) = (first_row as usize..end_row as usize, first_col as usize..end_col as usize);
        let empty = rows.is_empty() || cols.is_empty();
        Block {
            // A phase beyond the input is empty, and has no plane.
            offset: if empty { 0 } else { (row.phase * self.phases().1 + col.phase) * self.plane() },
            row,
            col,
            rows: if empty { tile.start..tile.start } else { rows },
            cols,
        }
    }

    fn contiguous(&self) -> bool {
        self.pitch == self.cols.output
    }

    /// Fills the tile of columns of output rows `tile`, `ld` elements from one row of `cols` to the next.
    #[inline(always)]
    pub(super) fn im2col<T: Element>(&self, phases: &[T], tile: Range<usize>, cols: &mut [T], ld: usize) {
        let (cells, width) = (self.rows.window * self.cols.window, tile.len() * self.cols.output);
        for (cell, block) in self.blocks(tile.clone()).enumerate() {
            for (channel, phases) in phases.chunks_exact(self.channel()).enumerate() {
                let out = &mut cols[(channel * cells + cell) * ld..][..width];
                self.fill(&block, &phases[block.offset..][..self.plane()], &tile, out);
            }
        }
    }

    /// Fills the part of a row of columns that belongs to output rows `tile`, from a plane of the block's phase.
    #[inline(always)]
    fn fill<T: Element>(&self, block: &Block, plane: &[T], tile: &Range<usize>, out: &mut [T]) {
        let width = self.cols.output;
        let (start, end) = ((block.rows.start - tile.start) * width, (block.rows.end - tile.start) * width);
        if block.rows.len() < tile.len() {
            out[..start].fill(T::zero());
            out[end..].fill(T::zero());
        }
        if block.rows.is_empty() {
            return;
        }
        if self.contiguous() {
            let (to, from) = self.overlap(block, start);
            out[to.clone()].copy_from_slice(&plane[from..from + to.len()]);
            self.clear_edges(block, &mut out[start..end]);
        } else {
            for (i, out) in block.rows.clone().zip(out[start..end].chunks_exact_mut(width)) {
                let from = (i as isize + block.row.shift) as usize * self.pitch;
                let from = (from + block.cols.start).wrapping_add_signed(block.col.shift);
                out[..block.cols.start].fill(T::zero());
                out[block.cols.clone()].copy_from_slice(&plane[from..from + block.cols.len()]);
                out[block.cols.end..].fill(T::zero());
            }
        }
    }

    /// Adds the tile of columns to `phases`: the adjoint of [`Polyphase::im2col`]. Clears cells of `cols` on the way.
    #[inline(always)]
    pub(super) fn col2im_add<T: Element>(&self, cols: &mut [T], tile: Range<usize>, phases: &mut [T], ld: usize) {
        let (cells, width) = (self.rows.window * self.cols.window, self.cols.output);
        for (cell, block) in self.blocks(tile.clone()).enumerate() {
            if block.rows.is_empty() {
                continue;
            }
            let (start, end) = ((block.rows.start - tile.start) * width, (block.rows.end - tile.start) * width);
            for (channel, phases) in phases.chunks_exact_mut(self.channel()).enumerate() {
                let plane = &mut phases[block.offset..][..self.plane()];
                let from = &mut cols[(channel * cells + cell) * ld..][..tile.len() * width];
                if self.contiguous() {
                    // in im2col these cells were cleared after the copy, so here they contribute nothing
                    self.clear_edges(&block, &mut from[start..end]);
                    let (source, to) = self.overlap(&block, start);
                    add_assign(&mut plane[to..to + source.len()], &from[source]);
                } else {
                    for (i, from) in block.rows.clone().zip(from[start..end].chunks_exact(width)) {
                        let to = (i as isize + block.row.shift) as usize * self.pitch;
                        let to = (to + block.cols.start).wrapping_add_signed(block.col.shift);
                        add_assign(&mut plane[to..to + block.cols.len()], &from[block.cols.clone()]);
                    }
                }
            }
        }
    }

    /// For contiguous blocks: the range of a row of `cols`, whose first valid element is `start`, and where it starts in
    /// the plane. What would begin before the plane or end after it lies on a row's edge, which is cleared anyway.
    #[inline(always)]
    fn overlap(&self, block: &Block, start: usize) -> (Range<usize>, usize) {
        let from = (block.rows.start as isize + block.row.shift) * self.pitch as isize + block.col.shift;
        let skip = (-from).max(0);
        let len = (block.rows.len() * self.pitch) as isize;
        let end = len.min(self.plane() as isize - from);
        (start + skip as usize..start + end as usize, (from + skip) as usize)
    }

    /// Zeros the cells of each row of `out` that a shifted contiguous copy took from the neighbouring row: one column after
    /// the other, since they are few.
    #[inline(always)]
    fn clear_edges<T: Element>(&self, block: &Block, out: &mut [T]) {
        let (width, shift) = (self.cols.output, block.col.shift);
        for column in if shift < 0 { 0..(-shift) as usize } else { width - shift as usize..width } {
            out.iter_mut().skip(column).step_by(width).for_each(|out| *out = T::zero());
        }
    }
}

/// The pixels that one cell of the window sees, for the output rows of a tile.
struct Block {
    /// Where its phase begins within a channel.
    offset: usize,
    row: Tap,
    col: Tap,
    /// Output rows and columns whose pixel exists; no rows if there is no pixel at all.
    rows: Range<usize>,
    cols: Range<usize>,
}

/// The elements with even and odd index of the first `width` of `source`, zeros after them. Rows are short, so whole
/// vectors are moved, also where they take elements of the next row along, for zeros to take their place.
#[inline(always)]
fn deal_row<T: Element>(source: &[T], width: usize, even: &mut [T], odd: &mut [T]) {
    let (evens, odds) = (width.div_ceil(2), width / 2);
    let mut done = 0;
    while done < evens && done + LANES <= even.len() && 2 * (done + LANES) <= source.len() {
        let from: &[T; 2 * LANES] = source[2 * done..][..2 * LANES].try_into().expect("two vectors");
        let [even, odd]: [&mut Lanes<T>; 2] =
            [&mut *even, &mut *odd].map(|to| (&mut to[done..done + LANES]).try_into().expect("a vector"));
        deal_two(from, even, odd);
        done += LANES;
    }
    for (to, count, first) in [(even, evens, 0), (odd, odds, 1)] {
        (done..count).for_each(|i| to[i] = source[2 * i + first]);
        to[count..].fill(T::zero());
    }
}

/// The inverse of [`deal_row`]: sets the first `width` elements of `to`, and may change some after them, which the next
/// row sets.
#[inline(always)]
fn gather_row<T: Element>(even: &[T], odd: &[T], width: usize, to: &mut [T]) {
    let mut done = 0;
    while 2 * done < width && done + LANES <= even.len() && 2 * (done + LANES) <= to.len() {
        let to: &mut [T; 2 * LANES] = (&mut to[2 * done..][..2 * LANES]).try_into().expect("two vectors");
        let [even, odd]: [&Lanes<T>; 2] =
            [even, odd].map(|from| from[done..done + LANES].try_into().expect("a vector"));
        gather_two(even, odd, to);
        done += LANES;
    }
    for i in (2 * done).min(width)..width {
        to[i] = if i % 2 == 0 { even[i / 2] } else { odd[i / 2] };
    }
}

/// im2col of a batch: x `(N, C, H, W)` to `(C KH KW, N H' W')`, columns ordered by image, row, column.
///
/// A utility for users' own layers; the convolution of this crate never builds the whole matrix.
///
/// # Errors
/// As [`Conv2dShape::new`]. Groups do not matter here.
pub fn im2col<T: Element>(x: ArrayView4<'_, T>, kernel: (usize, usize), conv: &Conv2d) -> Result<Array2<T>> {
    let dim: [usize; 4] = x.dim().into();
    let shape = Conv2dShape::new(dim, [1, dim[1], kernel.0, kernel.1], &Conv2d { groups: 1, ..*conv })?;
    let (phases, plane) = (Polyphase::new(shape.rows, shape.cols), shape.out_plane());
    let x = row_major(x);
    let mut cols = Array2::zeros((shape.column(), shape.images * plane));
    let (mut ws, image) = (Workspace::new(), shape.channels * shape.in_plane());
    let (_, scratch) = ws.lend(0, shape.channels * phases.channel() + shape.column() * plane);
    // image n owns columns n * plane .. (n + 1) * plane of every row
    let images = Planes::new(slice_mut(&mut cols), [shape.column(), shape.images, plane]);
    for_each_share(images, |n, mut cols| {
        scratch.with(|scratch: &mut [T]| {
            let (split, tile) = scratch.split_at_mut(shape.channels * phases.channel());
            vectorized!({
                phases.split(&x[n * image..][..image], 0..shape.rows.output, split);
                phases.im2col(split, 0..shape.rows.output, tile, plane);
            });
            for (k, row) in tile.chunks_exact(plane).enumerate() {
                cols.get(k).copy_from_slice(row);
            }
        });
    });
    Ok(cols)
}

/// col2im: the adjoint of [`im2col`], which adds every cell of cols `(C KH KW, N H' W')` to the pixel it came from, in
/// x `(N, C, H, W)`. It is not the inverse: a pixel is counted once for every window that covers it.
///
/// # Errors
/// As [`Conv2dShape::new`], or [`crate::Error::Shape`] if `cols` does not belong to `x`.
pub fn col2im<T: Element>(
    cols: ArrayView2<'_, T>,
    x: [usize; 4],
    kernel: (usize, usize),
    conv: &Conv2d,
) -> Result<Array4<T>> {
    let shape = Conv2dShape::new(x, [1, x[1], kernel.0, kernel.1], &Conv2d { groups: 1, ..*conv })?;
    let (phases, plane) = (Polyphase::new(shape.rows, shape.cols), shape.out_plane());
    let total = shape.images * plane;
    check_shape("col2im", "cols", cols.shape(), &[shape.column(), total])?;
    let cols = row_major(cols);
    let mut dx = Array4::zeros(x);
    let mut ws = Workspace::new();
    let (_, scratch) = ws.lend(0, shape.channels * phases.channel() + shape.column() * plane);
    for_each_chunk_mut(slice_mut(&mut dx), shape.channels * shape.in_plane(), |n, dx| {
        scratch.with(|scratch: &mut [T]| {
            let (split, tile) = scratch.split_at_mut(shape.channels * phases.channel());
            for (k, row) in tile.chunks_exact_mut(plane).enumerate() {
                row.copy_from_slice(&cols[k * total + n * plane..][..plane]);
            }
            split.fill(T::zero());
            vectorized!({
                phases.col2im_add(tile, 0..shape.rows.output, split, plane);
                phases.merge(split, dx);
            });
        });
    });
    Ok(dx)
}

#[cfg(test)]
mod tests {
    use ndarray::Array;
    use rand::RngExt;

    use super::*;
    use crate::random::{Purpose, stream};
    use crate::shape::Padding;

    /// (x, kernel, stride, padding, dilation), each with the reason it stands here.
    fn cases() -> Vec<([usize; 4], (usize, usize), Conv2d)> {
        let conv = |stride, padding, dilation| Conv2d { stride, padding, dilation, ..Conv2d::default() };
        let sides = |top, bottom, left, right| Padding::Sides { top, bottom, left, right };
        vec![
            ([2, 3, 5, 5], (3, 3), conv((1, 1), Padding::Same, (1, 1))), // contiguous blocks
            ([1, 1, 5, 7], (3, 3), conv((1, 1), Padding::Valid, (1, 1))), // rows shorter than the input's
            ([2, 3, 31, 31], (3, 3), conv((2, 2), Padding::All(1), (1, 1))), // CS231n's bench
            ([1, 2, 8, 8], (2, 2), conv((2, 2), Padding::Valid, (1, 1))), // phases as long as the output
            ([1, 2, 7, 9], (3, 2), conv((2, 3), sides(1, 2, 0, 3), (1, 1))), // everything asymmetric
            ([2, 1, 9, 8], (3, 3), conv((1, 1), Padding::Same, (2, 3))), // dilation
            ([1, 1, 4, 4], (3, 3), conv((3, 3), Padding::All(2), (2, 1))), // stride and dilation
            ([1, 2, 1, 6], (1, 3), conv((1, 1), sides(0, 0, 2, 2), (1, 1))), // one row; wider out than in
            ([1, 1, 2, 2], (5, 5), conv((1, 1), Padding::All(4), (1, 1))), // windows mostly in the padding
            ([1, 1, 3, 1], (3, 1), conv((5, 4), Padding::All(1), (1, 1))), // stride beyond the input
            ([1, 2, 4, 3], (3, 3), conv((1_000_000, 999), Padding::All(1), (1, 1))), // so far that its phases fill no memory
            ([1, 1, 2, 1], (1, 1), conv((9, 2), Padding::All(9), (1, 1))),           // and with outputs in the padding
        ]
    }

    fn random<D: ndarray::Dimension>(shape: impl ndarray::ShapeBuilder<Dim = D>) -> Array<f64, D> {
        let mut rng = stream(0, Purpose::Example, 0, 0);
        Array::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
    }

    #[test]
    fn im2col_takes_the_pixels_of_the_formula() {
        for (dim, kernel, conv) in cases() {
            let x = random(dim);
            let shape = Conv2dShape::new(dim, [1, dim[1], kernel.0, kernel.1], &conv).unwrap();
            let cols = im2col(x.view(), kernel, &conv).unwrap();
            let (oh, ow) = (shape.rows.output, shape.cols.output);
            for ((k, column), &got) in cols.indexed_iter() {
                let (c, ki, kj) = (k / (kernel.0 * kernel.1), k / kernel.1 % kernel.0, k % kernel.1);
                let (n, i, j) = (column / (oh * ow), column / ow % oh, column % ow);
                let want = match (shape.rows.source(i, ki), shape.cols.source(j, kj)) {
                    (Some(y), Some(z)) => x[[n, c, y, z]],
                    _ => 0.0,
                };
                assert!(got == want, "{dim:?} {kernel:?} {conv:?}: cols[{k}, {column}] = {got}, not {want}");
            }
        }
    }

    /// <im2col(x), y> = <x, col2im(y)> for random x and y: the definition of the adjoint.
    #[test]
    fn col2im_is_the_adjoint_of_im2col() {
        for (dim, kernel, conv) in cases() {
            let x = random(dim);
            let cols = im2col(x.view(), kernel, &conv).unwrap();
            let y = random(cols.dim());
            let back = col2im(y.view(), dim, kernel, &conv).unwrap();
            let (left, right) = ((&cols * &y).sum(), (&x * &back).sum());
            assert!(
                (left - right).abs() <= 1e-12 * cols.len() as f64,
                "{dim:?} {kernel:?} {conv:?}: {left} and {right}"
            );
        }
    }

    #[test]
    fn columns_of_another_input_are_refused() {
        let error = col2im(Array2::<f32>::zeros((9, 4)).view(), [1, 1, 5, 5], (3, 3), &Conv2d::default()).unwrap_err();
        assert!(error.to_string().contains("[9, 9]"), "{error}");
    }
}
