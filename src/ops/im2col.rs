//! Level 2. im2col and its adjoint col2im: a convolution's windows as the columns of a matrix.
//!
//! For one image, one group and output rows `r0 .. r1`, the tile of columns is
//!
//! ```text
//! cols[(c, ki, kj), (i, j)] = x[c, i * stride - pad + ki * dilation, j * stride - pad + kj * dilation]
//! (C / groups * KH * KW)  x  ((r1 - r0) * W')          zero where the index lies in the padding
//! ```
//!
//! # How a tile is filled by block copies
//! A stride is undone first: `Phases` deals the pixels of a plane out to `stride x stride` planes by their remainder,
//! after which every window steps by one pixel. A row of `cols` is then a *block* of such a plane, moved by a few
//! pixels. Where a phase's rows are as long as the output's (every 'same' convolution, and most others) the block is
//! contiguous: one `memcpy`, then zeros over the few cells that slid across a row's end. With stride 1 the plane is the
//! image itself and nothing is dealt out.

use ndarray::{Array2, Array4, ArrayView2, ArrayView4};

use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::parallel::{Disjoint, for_each_chunk_mut, for_each_piece};
use crate::shape::{Axis, Conv2d, Conv2dShape};
use crate::simd::{add_assign, vectorized};
use crate::workspace::Workspace;

/// Where cell `cell` of a window finds its pixels: output `o` reads element `o + shift` of phase `phase`, if that is
/// between 0 and `len`.
#[derive(Clone, Copy)]
struct Tap {
    phase: usize,
    shift: isize,
    len: usize,
}

fn tap(axis: &Axis, cell: usize) -> Tap {
    let offset = (cell * axis.dilation) as isize - axis.before as isize;
    let phase = offset.rem_euclid(axis.stride as isize) as usize;
    let shift = offset.div_euclid(axis.stride as isize);
    Tap { phase, shift, len: axis.input.saturating_sub(phase).div_ceil(axis.stride) }
}

/// The planes of one image dealt out by phase: `[C][stride_h][stride_w][height][pitch]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Phases {
    rows: Axis,
    cols: Axis,
    /// Rows of a phase plane.
    height: usize,
    /// Elements from one row of a phase plane to the next.
    pitch: usize,
}

impl Phases {
    pub(crate) fn new(shape: &Conv2dShape) -> Self {
        let (rows, cols) = (shape.rows, shape.cols);
        let width = cols.input.div_ceil(cols.stride);
        // Rows are filled up with zeros to the output's width, where that is enough: see "block copies" above.
        let pitch = if Self::is_image(shape) { cols.input } else { width.max(cols.output) };
        Phases { rows, cols, height: rows.input.div_ceil(rows.stride), pitch }
    }

    /// Whether there is one phase only, the image itself.
    pub(crate) fn is_image(shape: &Conv2dShape) -> bool {
        shape.rows.stride == 1 && shape.cols.stride == 1
    }

    fn plane(&self) -> usize {
        self.height * self.pitch
    }

    /// Elements of the phases of one channel.
    pub(crate) fn channel(&self) -> usize {
        self.rows.stride * self.cols.stride * self.plane()
    }

    /// Deals out the channels of `x`, `[C][H][W]`, to `phases`.
    pub(crate) fn split<T: Element>(&self, x: &[T], phases: &mut [T]) {
        let (sh, sw) = (self.rows.stride, self.cols.stride);
        for (x, channel) in
            x.chunks_exact(self.rows.input * self.cols.input).zip(phases.chunks_exact_mut(self.channel()))
        {
            for (index, plane) in channel.chunks_exact_mut(self.plane()).enumerate() {
                let (ph, pw) = (index / sw, index % sw);
                for (i, row) in plane.chunks_exact_mut(self.pitch).enumerate() {
                    let filled =
                        match x.chunks_exact(self.cols.input).nth(i * sh + ph).and_then(|source| source.get(pw..)) {
                            Some(source) if sw == 2 => deal_two(row, source),
                            Some(source) => {
                                row.iter_mut().zip(source.iter().step_by(sw)).map(|(to, &from)| *to = from).count()
                            }
                            None => 0,
                        };
                    row[filled..].fill(T::zero());
                }
            }
        }
    }

    /// Gathers `phases` back into the channels of `x`: the inverse of [`Phases::split`].
    pub(crate) fn merge<T: Element>(&self, phases: &[T], x: &mut [T]) {
        let (sh, sw) = (self.rows.stride, self.cols.stride);
        for (x, channel) in
            x.chunks_exact_mut(self.rows.input * self.cols.input).zip(phases.chunks_exact(self.channel()))
        {
            for (y, row) in x.chunks_exact_mut(self.cols.input).enumerate() {
                for pw in 0..sw.min(row.len()) {
                    let plane = &channel[((y % sh) * sw + pw) * self.plane()..][..self.plane()];
                    let from = &plane[y / sh * self.pitch..][..self.pitch];
                    for (to, &from) in row[pw..].iter_mut().step_by(sw).zip(from) {
                        *to = from;
                    }
                }
            }
        }
    }

    /// For cell (ki, kj): the block's plane, its shift as a distance in the plane, its taps.
    fn block(&self, ki: usize, kj: usize) -> (usize, Tap, Tap) {
        let (row, col) = (tap(&self.rows, ki), tap(&self.cols, kj));
        ((row.phase * self.cols.stride + col.phase) * self.plane(), row, col)
    }

    /// Output rows within `tile` whose pixel row exists.
    fn valid_rows(&self, row: Tap, tile: &std::ops::Range<usize>) -> std::ops::Range<usize> {
        let first = (-row.shift).max(tile.start as isize).min(tile.end as isize) as usize;
        let end = (row.len as isize - row.shift).clamp(first as isize, tile.end as isize) as usize;
        first..end
    }

    /// Output columns whose pixel column exists.
    fn valid_cols(&self, col: Tap) -> std::ops::Range<usize> {
        let output = self.cols.output as isize;
        let first = (-col.shift).clamp(0, output);
        first as usize..(col.len as isize - col.shift).clamp(first, output) as usize
    }

    fn contiguous(&self) -> bool {
        self.pitch == self.cols.output
    }

    /// Fills the tile of columns of output rows `tile`, `ld` elements from one row of `cols` to the next.
    pub(crate) fn im2col<T: Element>(&self, phases: &[T], tile: std::ops::Range<usize>, cols: &mut [T], ld: usize) {
        let (kh, kw, width) = (self.rows.window, self.cols.window, self.cols.output);
        for (index, out) in cols.chunks_mut(ld).take(phases.len() / self.channel() * kh * kw).enumerate() {
            let (channel, ki, kj) = (index / (kh * kw), index / kw % kh, index % kw);
            let (offset, row, col) = self.block(ki, kj);
            let plane = &phases[channel * self.channel() + offset..][..self.plane()];
            let out = &mut out[..tile.len() * width];
            let (rows, columns) = (self.valid_rows(row, &tile), self.valid_cols(col));
            if rows.is_empty() || columns.is_empty() {
                out.fill(T::zero());
                continue;
            }
            let (start, end) = ((rows.start - tile.start) * width, (rows.end - tile.start) * width);
            out[..start].fill(T::zero());
            out[end..].fill(T::zero());
            if self.contiguous() {
                let (to, from) = self.overlap(row, col, &rows, start);
                out[to.clone()].copy_from_slice(&plane[from..from + to.len()]);
                self.clear_edges(col, &mut out[start..end]);
            } else {
                for (i, out) in rows.zip(out[start..end].chunks_exact_mut(width)) {
                    let from = (i as isize + row.shift) as usize * self.pitch;
                    let from = (from + columns.start).wrapping_add_signed(col.shift);
                    out[..columns.start].fill(T::zero());
                    out[columns.clone()].copy_from_slice(&plane[from..from + columns.len()]);
                    out[columns.end..].fill(T::zero());
                }
            }
        }
    }

    /// Adds the tile of columns to `phases`: the adjoint of [`Phases::im2col`]. Clears cells of `cols` on the way.
    pub(crate) fn col2im_add<T: Element>(
        &self,
        cols: &mut [T],
        tile: std::ops::Range<usize>,
        phases: &mut [T],
        ld: usize,
    ) {
        let (kh, kw, width) = (self.rows.window, self.cols.window, self.cols.output);
        for (index, from) in cols.chunks_mut(ld).take(phases.len() / self.channel() * kh * kw).enumerate() {
            let (channel, ki, kj) = (index / (kh * kw), index / kw % kh, index % kw);
            let (offset, row, col) = self.block(ki, kj);
            let plane = &mut phases[channel * self.channel() + offset..][..self.plane()];
            let (rows, columns) = (self.valid_rows(row, &tile), self.valid_cols(col));
            if rows.is_empty() || columns.is_empty() {
                continue;
            }
            let (start, end) = ((rows.start - tile.start) * width, (rows.end - tile.start) * width);
            if self.contiguous() {
                // in im2col these cells were cleared after the copy, so here they contribute nothing
                self.clear_edges(col, &mut from[start..end]);
                let (source, to) = self.overlap(row, col, &rows, start);
                add_assign(&mut plane[to..to + source.len()], &from[source]);
            } else {
                for (i, from) in rows.zip(from[start..end].chunks_exact(width)) {
                    let to = (i as isize + row.shift) as usize * self.pitch;
                    let to = (to + columns.start).wrapping_add_signed(col.shift);
                    add_assign(&mut plane[to..to + columns.len()], &from[columns.clone()]);
                }
            }
        }
    }

    /// For contiguous blocks: the range of a row of `cols`, and where it starts in the plane. What would begin before
    /// the plane or end after it lies on a row's edge, which is cleared anyway.
    fn overlap(
        &self,
        row: Tap,
        col: Tap,
        rows: &std::ops::Range<usize>,
        start: usize,
    ) -> (std::ops::Range<usize>, usize) {
        let from = (rows.start as isize + row.shift) * self.pitch as isize + col.shift;
        let skip = (-from).max(0);
        let len = (rows.len() * self.pitch) as isize;
        let end = len.min(self.plane() as isize - from);
        (start + skip as usize..start + end as usize, (from + skip) as usize)
    }

    /// Zeros the cells of each row that a shifted contiguous copy took from the neighbouring row.
    fn clear_edges<T: Element>(&self, col: Tap, block: &mut [T]) {
        let width = self.cols.output;
        let edge = if col.shift < 0 { 0..(-col.shift) as usize } else { width - col.shift as usize..width };
        if !edge.is_empty() {
            for row in block.chunks_exact_mut(width) {
                row[edge.clone()].fill(T::zero());
            }
        }
    }
}

/// Every second element of `source` into `row`; returns how many. A loop over pairs is what the compiler vectorises.
#[inline(always)]
fn deal_two<T: Element>(row: &mut [T], source: &[T]) -> usize {
    let count = source.len().div_ceil(2).min(row.len());
    let pairs = source.chunks_exact(2);
    if let [last] = pairs.remainder() {
        row[count - 1] = *last;
    }
    for (to, pair) in row.iter_mut().zip(pairs) {
        *to = pair[0];
    }
    count
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
    let (phases, plane, total) = (Phases::new(&shape), shape.out_plane(), shape.images * shape.out_plane());
    let x = x.as_standard_layout();
    let x = x.as_slice().expect("standard layout");
    let mut cols = Array2::zeros((shape.column(), total));
    let out = Disjoint::new(cols.as_slice_mut().expect("freshly made"));
    let (ws, image) = (Workspace::new(), shape.channels * shape.in_plane());
    for_each_piece(shape.images, |n| {
        let x = &x[n * image..][..image];
        ws.scratch(shape.channels * phases.channel() + shape.column() * plane, |scratch: &mut [T]| {
            let (split, tile) = scratch.split_at_mut(shape.channels * phases.channel());
            let source = if Phases::is_image(&shape) {
                x
            } else {
                vectorized(
                    #[inline(always)]
                    || phases.split(x, split),
                );
                split
            };
            vectorized(
                #[inline(always)]
                || phases.im2col(source, 0..shape.rows.output, tile, plane),
            );
            for (k, row) in tile.chunks_exact(plane).enumerate() {
                // SAFETY: image n owns columns n * plane .. (n + 1) * plane of every row.
                unsafe { out.slice(k * total + n * plane, plane) }.copy_from_slice(row);
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
    let (phases, plane, total) = (Phases::new(&shape), shape.out_plane(), shape.images * shape.out_plane());
    check_shape("col2im", "cols", cols.shape(), &[shape.column(), total])?;
    let cols = cols.as_standard_layout();
    let cols = cols.as_slice().expect("standard layout");
    let mut dx = Array4::zeros(x);
    let ws = Workspace::new();
    for_each_chunk_mut(dx.as_slice_mut().expect("freshly made"), shape.channels * shape.in_plane(), |n, dx| {
        ws.scratch(shape.channels * phases.channel() + shape.column() * plane, |scratch: &mut [T]| {
            let (split, tile) = scratch.split_at_mut(shape.channels * phases.channel());
            for (k, row) in tile.chunks_exact_mut(plane).enumerate() {
                row.copy_from_slice(&cols[k * total + n * plane..][..plane]);
            }
            split.fill(T::zero());
            vectorized(
                #[inline(always)]
                || phases.col2im_add(tile, 0..shape.rows.output, split, plane),
            );
            vectorized(
                #[inline(always)]
                || phases.merge(split, dx),
            );
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
            ([2, 3, 31, 31], (3, 3), conv((2, 2), Padding::All(1), (1, 1))), // the seed's bench
            ([1, 2, 8, 8], (2, 2), conv((2, 2), Padding::Valid, (1, 1))), // phases as long as the output
            ([1, 2, 7, 9], (3, 2), conv((2, 3), sides(1, 2, 0, 3), (1, 1))), // everything asymmetric
            ([2, 1, 9, 8], (3, 3), conv((1, 1), Padding::Same, (2, 3))), // dilation
            ([1, 1, 4, 4], (3, 3), conv((3, 3), Padding::All(2), (2, 1))), // stride and dilation
            ([1, 2, 1, 6], (1, 3), conv((1, 1), sides(0, 0, 2, 2), (1, 1))), // one row; wider out than in
            ([1, 1, 2, 2], (5, 5), conv((1, 1), Padding::All(4), (1, 1))), // windows mostly in the padding
            ([1, 1, 3, 1], (3, 1), conv((5, 4), Padding::All(1), (1, 1))), // stride beyond the input
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
