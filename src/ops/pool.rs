//! Level 3. Fast pooling: max, average, global average.
//!
//! | path | when | how |
//! | --- | --- | --- |
//! | tiles | windows do not overlap ([`Pool2dShape::tiles`]) | the plane, without what is left over, reshaped to `(H', KH, W', KW)`: whole rows against whole rows; backward writes every pixel once |
//! | general | everything else | a row of windows at once, cell by cell; average and backward window by window, backward clears the plane and adds |
//!
//! The argmax of a window is kept as one byte, the cell's row-major index, so backward needs neither the input nor the
//! output. Ties: the first maximum in row-major order gets the gradient, in every path. A NaN is the maximum of its
//! window, so that a diverged network shows.

mod blocked;

use ndarray::{Array2, Array4, ArrayView2, ArrayView4};

use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::ops::layout::{row_major, slice_mut};
use crate::parallel::{Even, for_each_chunk_mut, for_each_share, piece_range};
use crate::shape::{Axis, Pool2d, Pool2dShape};
use crate::simd::{sum, vectorized};

pub(crate) use blocked::{
    avg_pool_block, avg_pool_block_backward, global_avg_block, max_pool_block, max_pool_block_backward,
    max_pool_block_with_cells,
};

/// Which cell of each window held the maximum: what max pooling's backward pass needs of its forward pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argmax {
    /// The sizes of the pooling.
    pub shape: Pool2dShape,
    /// For each output, in row-major order of `(N, C, H', W')`, the cell within its window: `ki * KW + kj`.
    pub cell: Vec<u8>,
}

/// Whether `v` takes the place of `best` as the maximum.
#[inline(always)]
fn beats<T: Element>(v: T, best: T) -> bool {
    (v > best) | (v.is_nan() & !best.is_nan())
}

/// Max pooling of the whole windows in `x`, rows of `width` pixels: `x[H' KH + rest, W' KW + rest]` to `out[H', W']`.
#[inline(always)]
pub(crate) fn max_pool_tiles<T: Element>(
    window: (usize, usize),
    width: usize,
    x: &[T],
    out: &mut [T],
    cell: &mut [u8],
) {
    let (kh, kw) = window;
    let out_width = width / kw;
    for ((x, out), cell) in
        x.chunks_exact(kh * width).zip(out.chunks_exact_mut(out_width)).zip(cell.chunks_exact_mut(out_width))
    {
        if window == (2, 2) {
            max_pool_row_2x2(x.split_at(width), out, cell);
            continue;
        }
        max_pool_row(kw, x, width, out, cell);
    }
}

/// A row of windows of [`max_pool_tiles`], which are `kw` wide and as high as `x` has rows.
#[inline(always)]
fn max_pool_row<T: Element>(kw: usize, x: &[T], width: usize, out: &mut [T], cell: &mut [u8]) {
    for (j, (out, cell)) in out.iter_mut().zip(cell).enumerate() {
        let (mut best, mut at) = (x[j * kw], 0);
        for (ki, row) in x.chunks_exact(width).enumerate() {
            for (kj, &v) in row[j * kw..][..kw].iter().enumerate() {
                if beats(v, best) {
                    (best, at) = (v, ki * kw + kj);
                }
            }
        }
        (*out, *cell) = (best, at as u8);
    }
}

/// The common window, without branches, so that the compiler vectorises it.
#[inline(always)]
fn max_pool_row_2x2<T: Element>(rows: (&[T], &[T]), out: &mut [T], cell: &mut [u8]) {
    let (top, _) = rows.0.as_chunks::<2>();
    let (bottom, _) = rows.1.as_chunks::<2>();
    for (((&[a, b], &[c, d]), out), cell) in top.iter().zip(bottom).zip(out).zip(cell) {
        let (upper, upper_at) = if beats(b, a) { (b, 1) } else { (a, 0) };
        let (lower, lower_at) = if beats(d, c) { (d, 3) } else { (c, 2) };
        let below = beats(lower, upper);
        *out = if below { lower } else { upper };
        *cell = if below { lower_at } else { upper_at };
    }
}

/// Backward of [`max_pool_tiles`]: writes every pixel of `dx`, 0 where no window is. A cell that is no index of the window gets
/// no gradient.
#[inline(always)]
pub(crate) fn max_pool_tiles_backward<T: Element>(
    window: (usize, usize),
    width: usize,
    dout: &[T],
    cell: &[u8],
    dx: &mut [T],
) {
    let (kh, kw) = window;
    let out_width = width / kw;
    let (windows, rest) = dx.split_at_mut(dx.len() / (kh * width) * kh * width);
    rest.fill(T::zero());
    for ((dx, dout), cell) in
        windows.chunks_exact_mut(kh * width).zip(dout.chunks_exact(out_width)).zip(cell.chunks_exact(out_width))
    {
        for (ki, dx) in dx.chunks_exact_mut(width).enumerate() {
            max_pool_row_backward(kw, (ki * kw) as u8, dout, cell, dx);
        }
    }
}

/// One row of pixels of [`max_pool_tiles_backward`], whose windows are `kw` wide; `first` is the index of its first cell.
#[inline(always)]
fn max_pool_row_backward<T: Element>(kw: usize, first: u8, dout: &[T], cell: &[u8], dx: &mut [T]) {
    let route = |dout: T, cell: u8, index: u8| if cell == index { dout } else { T::zero() };
    let (dx, rest) = dx.split_at_mut(dout.len() * kw);
    rest.fill(T::zero());
    if kw == 2 {
        let (pairs, _) = dx.as_chunks_mut::<2>();
        for ((pair, &dout), &cell) in pairs.iter_mut().zip(dout).zip(cell) {
            *pair = [route(dout, cell, first), route(dout, cell, first + 1)];
        }
    } else {
        for ((dx, &dout), &cell) in dx.chunks_exact_mut(kw).zip(dout).zip(cell) {
            for (kj, dx) in dx.iter_mut().enumerate() {
                *dx = route(dout, cell, first + kj as u8);
            }
        }
    }
}

/// Max pooling of one plane `x[H, W]` to `out[H', W']`, any window.
#[inline(always)]
pub(crate) fn max_pool_plane<T: Element>(shape: &Pool2dShape, x: &[T], out: &mut [T], cell: &mut [u8]) {
    if shape.tiles() {
        return max_pool_tiles((shape.rows.window, shape.cols.window), shape.cols.input, x, out, cell);
    }
    let (rows, cols) = (&shape.rows, &shape.cols);
    let outputs = out.chunks_exact_mut(cols.output).zip(cell.chunks_exact_mut(cols.output));
    for (i, (out, cell)) in outputs.enumerate() {
        // The first pixel of a window takes this place, whatever it is.
        out.fill(T::neg_infinity());
        cell.fill(u8::MAX);
        for ki in 0..rows.window {
            let Some(y) = rows.source(i, ki) else { continue };
            for kj in 0..cols.window {
                let inside = cols.inside(kj);
                let Some(first) = cols.source(inside.start, kj).filter(|_| !inside.is_empty()) else { continue };
                let pixels = &x[y * cols.input + first..(y + 1) * cols.input];
                let (out, cell, index) = (&mut out[inside.clone()], &mut cell[inside], (ki * cols.window + kj) as u8);
                match cols.stride {
                    1 => take_larger::<T, 1>(pixels, index, out, cell),
                    2 => take_larger::<T, 2>(pixels, index, out, cell),
                    3 => take_larger::<T, 3>(pixels, index, out, cell),
                    stride => pixels.iter().step_by(stride).zip(out).zip(cell).for_each(
                        #[inline(always)]
                        |((&v, out), cell)| take_if_larger(v, index, out, cell),
                    ),
                }
            }
        }
    }
}

/// Pixels 0, `S`, 2 `S`, ... take the place of the maxima that they beat: cell `index` of all windows of a row at once, so
/// that the compiler vectorises it.
#[inline(always)]
fn take_larger<T: Element, const S: usize>(pixels: &[T], index: u8, out: &mut [T], cell: &mut [u8]) {
    let (pixels, rest) = pixels.as_chunks::<S>();
    for ((pixels, out), cell) in pixels.iter().zip(&mut *out).zip(&mut *cell) {
        take_if_larger(pixels[0], index, out, cell);
    }
    if let (Some(&v), Some(out), Some(cell)) = (rest.first(), out.get_mut(pixels.len()), cell.get_mut(pixels.len())) {
        take_if_larger(v, index, out, cell);
    }
}

#[inline(always)]
fn take_if_larger<T: Element>(v: T, index: u8, out: &mut T, cell: &mut u8) {
    let takes = (*cell == u8::MAX) | beats(v, *out);
    *out = if takes { v } else { *out };
    *cell = if takes { index } else { *cell };
}

/// Backward of [`max_pool_plane`]: sets `dx[H, W]`.
#[inline(always)]
pub(crate) fn max_pool_plane_backward<T: Element>(shape: &Pool2dShape, dout: &[T], cell: &[u8], dx: &mut [T]) {
    if shape.tiles() {
        return max_pool_tiles_backward((shape.rows.window, shape.cols.window), shape.cols.input, dout, cell, dx);
    }
    dx.fill(T::zero());
    for_each_window(
        shape,
        #[inline(always)]
        |o, window| {
            let (ki, kj) = (usize::from(cell[o]) / shape.cols.window, usize::from(cell[o]) % shape.cols.window);
            if window.rows.contains(&ki) && window.cols.contains(&kj) {
                dx[(window.origin + (ki * shape.cols.input + kj) as isize) as usize] += dout[o];
            }
        },
    );
}

/// What a cell of a window counts in its average.
#[inline(always)]
fn share_of_cell<T: Element>(shape: &Pool2dShape) -> T {
    T::one() / T::of((shape.rows.window * shape.cols.window) as f64)
}

/// Average pooling of one plane; padding counts as zeros.
#[inline(always)]
pub(crate) fn avg_pool_plane<T: Element>(shape: &Pool2dShape, x: &[T], out: &mut [T]) {
    let scale = share_of_cell::<T>(shape);
    for_each_window(
        shape,
        #[inline(always)]
        |o, window| {
            let mut sum = T::zero();
            window.for_each_pixel(
                #[inline(always)]
                |_, pixel| sum += x[pixel],
            );
            out[o] = sum * scale;
        },
    );
}

/// Backward of [`avg_pool_plane`]: sets `dx[H, W]`.
#[inline(always)]
pub(crate) fn avg_pool_plane_backward<T: Element>(shape: &Pool2dShape, dout: &[T], dx: &mut [T]) {
    let scale = share_of_cell::<T>(shape);
    dx.fill(T::zero());
    for_each_window(
        shape,
        #[inline(always)]
        |o, window| {
            window.for_each_pixel(
                #[inline(always)]
                |_, pixel| dx[pixel] += dout[o] * scale,
            );
        },
    );
}

/// The cells of one window that lie inside the plane.
struct Window {
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    /// Cells in a row of the window, pixels in a row of the plane.
    pitch: (usize, usize),
    /// Index of the pixel under cell 0 (which may lie outside).
    origin: isize,
}

impl Window {
    /// Calls `work(cell index, pixel index)` in row-major order.
    #[inline(always)]
    fn for_each_pixel(self, mut work: impl FnMut(usize, usize)) {
        let (cells, pixels) = self.pitch;
        for ki in self.rows {
            let row = self.origin + (ki * pixels) as isize;
            for kj in self.cols.clone() {
                work(ki * cells + kj, (row + kj as isize) as usize);
            }
        }
    }
}

/// Calls `work(output index, window)` for every window of a plane.
#[inline(always)]
fn for_each_window(shape: &Pool2dShape, work: impl FnMut(usize, Window)) {
    for_each_window_of(shape, shape.rows.output, work);
}

/// The same for the first `count` rows of windows.
#[inline(always)]
fn for_each_window_of(shape: &Pool2dShape, count: usize, mut work: impl FnMut(usize, Window)) {
    let inside = |axis: &Axis, o: usize| {
        let first = axis.before.saturating_sub(o * axis.stride);
        first..axis.window.min(axis.input + axis.before - o * axis.stride).max(first)
    };
    let (rows, cols) = (&shape.rows, &shape.cols);
    for i in 0..count {
        let y = (i * rows.stride) as isize - rows.before as isize;
        for j in 0..cols.output {
            let origin = y * cols.input as isize + (j * cols.stride) as isize - cols.before as isize;
            let pitch = (cols.window, cols.input);
            work(i * cols.output + j, Window { rows: inside(rows, i), cols: inside(cols, j), pitch, origin });
        }
    }
}

/// Planes that one piece of work takes: enough that a piece outweighs its start. Depends on sizes alone.
pub(crate) fn planes_per_piece(plane: usize) -> usize {
    const ELEMENTS: usize = 32 << 10;
    (ELEMENTS / plane.max(1)).max(1)
}

/// Checks slices against the sizes of a pooling: `planes` inputs and as many outputs.
#[track_caller]
fn assert_lengths(shape: &Pool2dShape, input: usize, outputs: &[usize]) {
    let planes = shape.images * shape.channels;
    let (want, want_outputs) = (planes * shape.in_plane(), planes * shape.out_plane());
    assert!(
        input == want && outputs.iter().all(|&len| len == want_outputs),
        "{input} elements of input and {outputs:?} of output for {shape:?}"
    );
}

/// Max pooling into the caller's buffers: x `[N, C, H, W]`, out `[N, C, H', W']`, and per output the cell of its window
/// that held the maximum, row-major, for backward.
///
/// # Errors
/// [`crate::Error::Invalid`] for a window of more than 255 cells.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn max_pool2d_forward_into<T: Element>(shape: &Pool2dShape, x: &[T], out: &mut [T], cell: &mut [u8]) -> Result<()> {
    shape.check_max()?;
    assert_lengths(shape, x.len(), &[out.len(), cell.len()]);
    let (plane, out_plane, planes) = (shape.in_plane(), shape.out_plane(), shape.images * shape.channels);
    let pieces = planes.div_ceil(planes_per_piece(plane));
    let shares = (Even::new(out, planes, pieces), Even::new(cell, planes, pieces));
    for_each_share(shares, |piece, (out, cell)| {
        let range = piece_range(planes, pieces, piece);
        let x = x[range.start * plane..range.end * plane].chunks_exact(plane);
        vectorized!({
            for ((x, out), cell) in x.zip(out.chunks_exact_mut(out_plane)).zip(cell.chunks_exact_mut(out_plane)) {
                max_pool_plane(shape, x, out, cell);
            }
        });
    });
    Ok(())
}

/// Backward of [`max_pool2d_forward_into`]: sets `dx` `[N, C, H, W]` from `dout` `[N, C, H', W']` and the cells.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn max_pool2d_backward_into<T: Element>(shape: &Pool2dShape, dout: &[T], cell: &[u8], dx: &mut [T]) {
    assert_lengths(shape, dx.len(), &[dout.len(), cell.len()]);
    let (plane, out_plane) = (shape.in_plane(), shape.out_plane());
    let together = planes_per_piece(plane);
    for_each_chunk_mut(dx, together * plane, |piece, dx| {
        let start = piece * together * out_plane;
        let (dout, cell) = (dout[start..].chunks_exact(out_plane), cell[start..].chunks_exact(out_plane));
        vectorized!({
            for ((dx, dout), cell) in dx.chunks_exact_mut(plane).zip(dout).zip(cell) {
                max_pool_plane_backward(shape, dout, cell, dx);
            }
        });
    });
}

/// Average pooling into the caller's buffer: x `[N, C, H, W]`, out `[N, C, H', W']`.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn avg_pool2d_forward_into<T: Element>(shape: &Pool2dShape, x: &[T], out: &mut [T]) {
    assert_lengths(shape, x.len(), &[out.len()]);
    let (plane, out_plane, together) = (shape.in_plane(), shape.out_plane(), planes_per_piece(shape.in_plane()));
    for_each_chunk_mut(out, together * out_plane, |piece, out| {
        let x = x[piece * together * plane..].chunks_exact(plane);
        vectorized!({
            for (x, out) in x.zip(out.chunks_exact_mut(out_plane)) {
                avg_pool_plane(shape, x, out);
            }
        });
    });
}

/// Backward of [`avg_pool2d_forward_into`]: sets `dx` `[N, C, H, W]` from `dout` `[N, C, H', W']`.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn avg_pool2d_backward_into<T: Element>(shape: &Pool2dShape, dout: &[T], dx: &mut [T]) {
    assert_lengths(shape, dx.len(), &[dout.len()]);
    let (plane, out_plane, together) = (shape.in_plane(), shape.out_plane(), planes_per_piece(shape.in_plane()));
    for_each_chunk_mut(dx, together * plane, |piece, dx| {
        let dout = dout[piece * together * out_plane..].chunks_exact(out_plane);
        vectorized!({
            for (dx, dout) in dx.chunks_exact_mut(plane).zip(dout) {
                avg_pool_plane_backward(shape, dout, dx);
            }
        });
    });
}

/// Global average pooling into the caller's buffer: x `shape` = `[N, C, H, W]`, out `[N, C]`.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn global_avg_pool_forward_into<T: Element>(shape: [usize; 4], x: &[T], out: &mut [T]) {
    let plane = assert_global(shape, x.len(), out.len());
    let together = planes_per_piece(plane);
    for_each_chunk_mut(out, together, |piece, out| {
        for (i, out) in out.iter_mut().enumerate() {
            *out = global_avg_plane(&x[(piece * together + i) * plane..][..plane]);
        }
    });
}

/// Backward of [`global_avg_pool_forward_into`]: sets `dx` `shape` = `[N, C, H, W]` from `dout` `[N, C]`.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn global_avg_pool_backward_into<T: Element>(shape: [usize; 4], dout: &[T], dx: &mut [T]) {
    let plane = assert_global(shape, dx.len(), dout.len());
    let scale = T::one() / T::of(plane as f64);
    let together = planes_per_piece(plane);
    for_each_chunk_mut(dx, together * plane, |piece, dx| {
        for (dx, &dout) in dx.chunks_exact_mut(plane).zip(&dout[piece * together..]) {
            dx.fill(dout * scale);
        }
    });
}

/// Pixels of a plane of `[N, C, H, W]`, with `input` elements in all and `output` planes.
#[track_caller]
fn assert_global([images, channels, h, w]: [usize; 4], input: usize, output: usize) -> usize {
    assert!(
        output == images * channels && input == output * h * w,
        "{input} elements of input and {output} of output for {:?}",
        [images, channels, h, w]
    );
    h * w
}

/// Maximum of each window of x `(N, C, H, W)`: `(N, C, H', W')`, and where it was. The twin of
/// [`crate::naive::max_pool2d_forward`].
///
/// # Errors
/// As [`Pool2dShape::new`], and [`crate::Error::Invalid`] for a window of more than 255 cells.
pub fn max_pool2d_forward<T: Element>(x: ArrayView4<'_, T>, pool: &Pool2d) -> Result<(Array4<T>, Argmax)> {
    let shape = Pool2dShape::new(x.dim().into(), pool)?;
    let mut out = Array4::zeros(shape.out());
    let mut cell = vec![0; out.len()];
    max_pool2d_forward_into(&shape, &row_major(x), slice_mut(&mut out), &mut cell)?;
    Ok((out, Argmax { shape, cell }))
}

/// Gives every element of dout `(N, C, H', W')` to the pixel that was the maximum of its window. The twin of
/// [`crate::naive::max_pool2d_backward`].
///
/// # Errors
/// [`crate::Error::Shape`] if `dout` or the cells do not have the output's shape.
pub fn max_pool2d_backward<T: Element>(dout: ArrayView4<'_, T>, argmax: &Argmax) -> Result<Array4<T>> {
    let shape = &argmax.shape;
    check_shape("max_pool2d backward", "dout", dout.shape(), &shape.out())?;
    check_shape("max_pool2d backward", "argmax", &[argmax.cell.len()], &[dout.len()])?;
    let mut dx = Array4::zeros(shape.x());
    max_pool2d_backward_into(shape, &row_major(dout), &argmax.cell, slice_mut(&mut dx));
    Ok(dx)
}

/// Mean of each window of x `(N, C, H, W)`, padding counted as zeros: `(N, C, H', W')`. The twin of
/// [`crate::naive::avg_pool2d_forward`].
///
/// # Errors
/// As [`Pool2dShape::new`].
pub fn avg_pool2d_forward<T: Element>(x: ArrayView4<'_, T>, pool: &Pool2d) -> Result<Array4<T>> {
    let shape = Pool2dShape::new(x.dim().into(), pool)?;
    let mut out = Array4::zeros(shape.out());
    avg_pool2d_forward_into(&shape, &row_major(x), slice_mut(&mut out));
    Ok(out)
}

/// Spreads every element of dout `(N, C, H', W')` evenly over its window of an input of shape `x`. The twin of
/// [`crate::naive::avg_pool2d_backward`].
///
/// # Errors
/// As [`Pool2dShape::new`], and [`crate::Error::Shape`] if `dout` does not have the output's shape.
pub fn avg_pool2d_backward<T: Element>(dout: ArrayView4<'_, T>, x: [usize; 4], pool: &Pool2d) -> Result<Array4<T>> {
    let shape = Pool2dShape::new(x, pool)?;
    check_shape("avg_pool2d backward", "dout", dout.shape(), &shape.out())?;
    let mut dx = Array4::zeros(x);
    avg_pool2d_backward_into(&shape, &row_major(dout), slice_mut(&mut dx));
    Ok(dx)
}

/// Mean of every channel of x `(N, C, H, W)`: `(N, C)`; NaN if there are no pixels. The twin of
/// [`crate::naive::global_avg_pool_forward`].
pub fn global_avg_pool_forward<T: Element>(x: ArrayView4<'_, T>) -> Array2<T> {
    let mut out = Array2::zeros((x.dim().0, x.dim().1));
    global_avg_pool_forward_into(x.dim().into(), &row_major(x), slice_mut(&mut out));
    out
}

/// Mean of one plane.
pub(crate) fn global_avg_plane<T: Element>(x: &[T]) -> T {
    vectorized!(sum(x)) / T::of(x.len() as f64)
}

/// Spreads every element of dout `(N, C)` evenly over its channel of an input of shape `x`. The twin of
/// [`crate::naive::global_avg_pool_backward`].
///
/// # Errors
/// [`crate::Error::Shape`] if `dout` is not `(N, C)`.
pub fn global_avg_pool_backward<T: Element>(dout: ArrayView2<'_, T>, x: [usize; 4]) -> Result<Array4<T>> {
    check_shape("global_avg_pool backward", "dout", dout.shape(), &x[..2])?;
    let mut dx = Array4::zeros(x);
    global_avg_pool_backward_into(x, &row_major(dout), slice_mut(&mut dx));
    Ok(dx)
}
