//! Level 3. Fast affine layer: `out = x w + b`, with the products cut by hand so that every thread has a share.
//!
//! A product is cut along rows or columns of its result, never along the summed dimension, into pieces whose number depends on
//! sizes alone, each one single-threaded BLAS product; with prepared weights on the number of threads as well, which no bit does.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

use crate::blas::panels::{self, PANEL, Panels, panel_len, set_row};
use crate::blas::{Accum, Mat, MatMut, gemm, gemm_in_terms};
use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::ops::layout::{row_major, slice_mut};
use crate::parallel::{Grid, Runs, Shares, StridedMut, current_threads, for_each_chunk_mut, for_each_share};
use crate::simd::{LANES, add_assign, vectorized};
use crate::workspace::{Buffer, Workspace};

/// Gradients of an affine layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AffineGrads<T> {
    /// Gradient of the input, `(N, D)`.
    pub dx: Array2<T>,
    /// Gradient of the weights, `(D, M)`.
    pub dw: Array2<T>,
    /// Gradient of the bias, `(M)`.
    pub db: Array1<T>,
}

/// Sizes of an affine layer: x `[N, D]`, w `[D, M]`, out `[N, M]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AffineShape {
    /// Samples `N`.
    pub samples: usize,
    /// Inputs `D`.
    pub inputs: usize,
    /// Outputs `M`.
    pub outputs: usize,
}

impl AffineShape {
    /// Panics unless these are the lengths of x, w and out (or dout).
    #[track_caller]
    fn assert_lengths(&self, x: usize, w: usize, out: usize) {
        let AffineShape { samples, inputs, outputs } = *self;
        assert_eq!(
            [Some(x), Some(w), Some(out)],
            [samples.checked_mul(inputs), inputs.checked_mul(outputs), samples.checked_mul(outputs)],
            "lengths of x, w and out for {self:?}"
        );
    }

    /// Rows of w whose gradient, and whose part of the gradient of the input, are one piece of work.
    pub(crate) fn rows<T>(&self) -> usize {
        let AffineShape { samples, inputs, outputs } = *self;
        let even = piece_len::<T>(inputs, samples.saturating_mul(inputs).saturating_mul(outputs));
        let most = (PIECE / outputs.max(1)).max(LEAST_ROWS);
        if even <= most { even } else { 1 << most.ilog2() }
    }

    /// `dw[rows, M] = x^T[rows, N] . dout[N, M]` for the rows of piece `piece`, because `out = x . w`.
    fn weights_gradient<T: Element>(&self, piece: usize, dout: &[T], x: &[T], dw: &mut [T]) {
        let AffineShape { samples, inputs, outputs } = *self;
        let height = dw.len() / outputs;
        let x = Mat::new(&x[piece * self.rows::<T>()..], samples, height, inputs).t();
        let dout = Mat::new(dout, samples, outputs, outputs);
        gemm(Accum::Replace, T::one(), x, dout, MatMut::new(dw, height, outputs, outputs));
    }

    /// `dx[N, columns] = dout[N, M] . w^T[M, columns]`, for the columns of the rows `w`.
    fn input_gradient<T: Element>(&self, dout: &[T], w: &[T], mut dx: StridedMut<'_, T>) {
        let AffineShape { samples, outputs, .. } = *self;
        let w = Mat::new(w, dx.run(), outputs, outputs).t();
        gemm(Accum::Replace, T::one(), Mat::new(dout, samples, outputs, outputs), w, MatMut::of(&mut dx));
    }
}

/// Elements of w in a piece, at most: with as many gradients, and what BLAS copies, they stay in a core's cache.
const PIECE: usize = 1 << 16;

/// Rows in a piece at least: for every piece BLAS copies the gradient of the output.
const LEAST_ROWS: usize = 16;

/// Multiply-adds below which a product is not worth cutting.
const SMALL: usize = 1 << 18;

/// Length of the pieces that `len` rows or columns are cut into: eight of them, of whole cache lines, if the product is
/// large; one otherwise.
fn piece_len<T>(len: usize, multiply_adds: usize) -> usize {
    const PIECES: usize = 8;
    let line = 64 / size_of::<T>();
    if multiply_adds < SMALL { len.max(1) } else { len.div_ceil(PIECES).next_multiple_of(line) }
}

/// Where the gradients of an affine layer go; all set, not added to. What is not asked for is not computed.
#[derive(Debug, Default)]
pub struct AffineGradsMut<'a, T> {
    /// Gradient of the input, `[N, D]`.
    pub dx: Option<&'a mut [T]>,
    /// Gradient of the weights, `[D, M]`.
    pub dw: Option<&'a mut [T]>,
    /// Gradient of the bias, `[M]`.
    pub db: Option<&'a mut [T]>,
}

/// `out = x w` into the caller's buffer; the bias is the caller's, who reads `out` anyway.
///
/// A row of `out` has the same bits whatever the other rows of `x` are, and however many: see [`gemm_in_terms`].
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn affine_product_into<T: Element>(shape: &AffineShape, x: &[T], w: &[T], out: &mut [T]) {
    let AffineShape { samples, inputs, outputs } = *shape;
    shape.assert_lengths(x.len(), w.len(), out.len());
    if samples == 0 || outputs == 0 {
        return;
    }
    let work = samples.saturating_mul(inputs).saturating_mul(outputs);
    // BLAS copies the rows of x and the columns of w that a piece reads. So columns are cut in four only, and rows in two
    // where there are many.
    let height = if samples >= MANY_SAMPLES { samples.div_ceil(ROW_PIECES) } else { samples };
    let width = piece_len::<T>(2 * outputs, work).min(outputs);
    let out = Grid::new(out, (samples, outputs), (height, width));
    let across = out.across();
    for_each_share(out, |piece, mut out| {
        let (row, column) = (piece / across * height, piece % across * width);
        let x = Mat::new(&x[row * inputs..], out.count(), inputs, inputs);
        let w = Mat::new(&w[column..], inputs, out.run(), outputs);
        // out[rows, columns] = x[rows, D] . w[D, columns]
        gemm_in_terms(Accum::Replace, T::one(), x, w, MatMut::of(&mut out));
    });
}

/// The matrix w of an affine layer in the panels that our own product takes: for calls that use it again and again, which
/// then read it once, in the order in which it lies.
#[derive(Debug)]
pub struct Prepared<T> {
    inputs: usize,
    outputs: usize,
    panels: Buffer<T>,
}

impl<T: Element> Prepared<T> {
    /// w `[D, M]`; `None` where [`affine_product_into`] is faster.
    ///
    /// # Panics
    /// If `w` has not the length of its shape.
    pub fn new(inputs: usize, outputs: usize, w: &[T]) -> Option<Self> {
        assert_eq!(Some(w.len()), inputs.checked_mul(outputs), "w is {inputs} x {outputs}");
        if !panels::pay::<T>(inputs) {
            return None;
        }
        let mut data = Buffer::zeroed(outputs.div_ceil(PANEL) * panel_len(inputs));
        let mut rows = StridedMut::rows(&mut data, panel_len(inputs));
        w.chunks_exact(outputs).enumerate().for_each(|(row, values)| set_row(&mut rows, row, values));
        Some(Prepared { inputs, outputs, panels: data })
    }

    /// `out = x w`, as [`affine_product_into`]: a row of `out` has the same bits whatever the others are.
    ///
    /// # Panics
    /// If a slice has not the length of its shape.
    pub fn product_into(&self, samples: usize, x: &[T], out: &mut [T], ws: &mut Workspace) {
        let Prepared { inputs, outputs, panels: data } = self;
        let (inputs, outputs, panel) = (*inputs, *outputs, panel_len(*inputs));
        AffineShape { samples, inputs, outputs }.assert_lengths(x.len(), inputs * outputs, out.len());
        let (height, width) = prepared_part(samples, outputs);
        let (_, scratch) = ws.lend(0, scratch_len(samples, outputs));
        let out = Grid::new(out, (samples, outputs), (height, width));
        let across = out.across();
        for_each_share(out, |piece, mut out| {
            let (row, index) = (piece / across * height, piece % across);
            let (rows, cols) = (out.count(), out.run());
            let x = Mat::new(&x[row * inputs..], rows, inputs, inputs);
            let w = Panels { data: &data[index * width / PANEL * panel..], rows: inputs, panel, next: &[] };
            scratch.with(|scratch: &mut [T]| {
                // few rows are not copied: the caches have room for them as they lie
                let (product, copy) = scratch.split_at_mut(height * width);
                // out[rows, columns] = x[rows, D] . w[D, columns], in whole vectors
                panels::multiply(x, w, MatMut::new(product, rows, cols.next_multiple_of(LANES), width), copy);
                for (i, product) in product.chunks_exact(width).take(rows).enumerate() {
                    out.get(i).copy_from_slice(&product[..cols]);
                }
            });
        });
    }
}

/// Rows and columns of a piece of [`Prepared::product_into`], whole panels of them. Every panel reads all of x, which some panels
/// together find in the cache.
fn prepared_part(samples: usize, outputs: usize) -> (usize, usize) {
    let height = samples.div_ceil(if samples >= MANY_SAMPLES { ROW_PIECES } else { 1 });
    let pieces = if samples > FEW_SAMPLES { 2 * current_threads() } else { outputs };
    (height, outputs.div_ceil(pieces).next_multiple_of(PANEL))
}

/// Elements of scratch that a piece of [`Prepared::product_into`] takes: its product, and of more than [`FEW_SAMPLES`] a copy of
/// some of x.
pub(crate) fn scratch_len(samples: usize, outputs: usize) -> usize {
    let (height, width) = prepared_part(samples, outputs);
    height * width + if samples > FEW_SAMPLES { panels::copy_len(height) } else { 0 }
}

/// Samples from which on their rows are dealt out as well as the columns of w, and to how many pieces.
const MANY_SAMPLES: usize = 256;
const ROW_PIECES: usize = 2;

/// Samples up to which to read w is what takes the time of a product.
const FEW_SAMPLES: usize = 16;

/// Gradients of `out = x w + b` for `dout` `[N, M]`: those that `grads` has room for.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn affine_backward_into<T: Element>(
    shape: &AffineShape,
    dout: &[T],
    x: &[T],
    w: &[T],
    grads: AffineGradsMut<'_, T>,
) {
    let AffineShape { samples, inputs, outputs } = *shape;
    shape.assert_lengths(x.len(), w.len(), dout.len());
    let AffineGradsMut { dx, dw, db } = grads;
    let has_len = |slice: &Option<&mut [T]>, len| slice.as_ref().is_none_or(|slice| slice.len() == len);
    assert!(
        has_len(&dx, x.len()) && has_len(&dw, w.len()) && has_len(&db, outputs),
        "gradients have the lengths of what they are of"
    );
    let rows = shape.rows::<T>();
    if let Some(dw) = dw {
        for_each_chunk_mut(dw, rows * outputs, |piece, dw| shape.weights_gradient(piece, dout, x, dw));
    }
    if let Some(dx) = dx {
        for_each_share(Grid::new(dx, (samples, inputs), (samples, rows)), |piece, dx| {
            shape.input_gradient(dout, &w[piece * rows * outputs..], dx);
        });
    }
    if let Some(db) = db {
        db.fill(T::zero());
        vectorized!(dout.chunks_exact(outputs.max(1)).for_each(|row| add_assign(db, row)));
    }
}

/// The gradients of x and w that [`affine_backward_into`] makes, to the bit; those of w are used up where they are made,
/// while they are in the cache: `update(w, dw, share)` gets [`AffineShape::rows`] rows of the weights, after their last use,
/// the gradient of these, and the share of `kept` that goes with them. `weights` are shared out by as many rows.
///
/// # Panics
/// If a slice has not the length of its shape, or there is not one share for each piece.
pub(crate) fn affine_backward_updating<T: Element, K: Shares>(
    shape: &AffineShape,
    (dout, x): (&[T], &[T]),
    dx: Option<&mut [T]>,
    weights: Runs<'_, T>,
    kept: K,
    ws: &mut Workspace,
    update: impl Fn(&mut [T], &[T], K::Share) + Sync + Send,
) {
    let AffineShape { samples, inputs, outputs } = *shape;
    shape.assert_lengths(x.len(), inputs * outputs, dout.len());
    let rows = shape.rows::<T>();
    assert_eq!(weights.count(), inputs.div_ceil(rows), "shares of {rows} rows");
    let (_, scratch) = ws.lend(0, rows * outputs);
    let finish = |piece: usize, w: &mut [T], kept| {
        scratch.with(|dw: &mut [T]| {
            let dw = &mut dw[..w.len()];
            shape.weights_gradient(piece, dout, x, dw);
            update(w, dw, kept);
        });
    };
    let Some(dx) = dx else {
        return for_each_share((weights, kept), |piece, (w, kept)| finish(piece, w, kept));
    };
    let dx = Grid::new(dx, (samples, inputs), (samples, rows));
    for_each_share((dx, weights, kept), |piece, (dx, w, kept)| {
        shape.input_gradient(dout, w, dx);
        finish(piece, w, kept);
    });
}

/// `out = x w + b`: x `(N, D)`, w `(D, M)`, b `(M)`; result `(N, M)`. The twin of [`crate::naive::affine_forward`].
/// The weights are transposed against PyTorch's `Linear`.
///
/// # Errors
/// [`crate::Error::Shape`] if the shapes do not fit together.
pub fn affine_forward<T: Element>(
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
    b: Option<ArrayView1<'_, T>>,
) -> Result<Array2<T>> {
    let shape = AffineShape { samples: x.nrows(), inputs: x.ncols(), outputs: w.ncols() };
    check_shape("affine", "w", w.shape(), &[shape.inputs, shape.outputs])?;
    if let Some(b) = &b {
        check_shape("affine", "b", b.shape(), &[shape.outputs])?;
    }
    let mut out = Array2::zeros((shape.samples, shape.outputs));
    affine_product_into(&shape, &row_major(x), &row_major(w), slice_mut(&mut out));
    if let Some(b) = b {
        out += &b;
    }
    Ok(out)
}

/// Gradients of [`affine_forward`] with respect to x, w and b, for dout `(N, M)`. The twin of
/// [`crate::naive::affine_backward`].
///
/// # Errors
/// [`crate::Error::Shape`] if the shapes do not fit together.
pub fn affine_backward<T: Element>(
    dout: ArrayView2<'_, T>,
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
) -> Result<AffineGrads<T>> {
    let shape = AffineShape { samples: x.nrows(), inputs: x.ncols(), outputs: w.ncols() };
    check_shape("affine backward", "w", w.shape(), &[shape.inputs, shape.outputs])?;
    check_shape("affine backward", "dout", dout.shape(), &[shape.samples, shape.outputs])?;
    let (mut dx, mut dw) = (Array2::zeros(x.dim()), Array2::zeros(w.dim()));
    let mut db = Array1::zeros(shape.outputs);
    let grads =
        AffineGradsMut { dx: Some(slice_mut(&mut dx)), dw: Some(slice_mut(&mut dw)), db: Some(slice_mut(&mut db)) };
    affine_backward_into(&shape, &row_major(dout), &row_major(x), &row_major(w), grads);
    Ok(AffineGrads { dx, dw, db })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::Kind;
    use crate::parallel::with_threads;
    use crate::random::{Purpose, stream};
    use rand::RngExt;

    fn values<T: Element>(len: usize, seed: u64) -> Vec<T> {
        let mut random = stream(seed, Purpose::Example, 0, 0);
        (0..len).map(|_| T::of(random.random_range(-1.0..1.0))).collect()
    }

    /// A sample's output has the same bits alone and in any batch, wherever in it; with OpenBLAS' AVX2 kernels but for rounding,
    /// unless the weights were prepared, which give the same but for rounding.
    #[test]
    fn the_output_of_a_sample_does_not_depend_on_the_others() {
        const MOST: usize = 600;
        fn assert_near<T: Element>(got: &[T], want: &[T], alike: bool, what: &str) {
            for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
                let near = (got.f64() - want.f64()).abs() <= 1e-4 * (1.0 + want.f64().abs());
                assert!(got == want || (near && !alike), "{what}, element {i}: {got:e} and not {want:e}");
            }
        }
        fn check<T: Element>(inputs: usize, outputs: usize) {
            let alike = crate::blas::setup().rows_alike;
            let (x, w) = (values::<T>(MOST * inputs, 1), values::<T>(inputs * outputs, 2));
            let prepared = Prepared::new(inputs, outputs, &w);
            let product = |first: usize, samples: usize, prepared: Option<&Prepared<T>>| {
                let mut out = vec![T::nan(); samples * outputs];
                let x = &x[first * inputs..][..samples * inputs];
                match prepared {
                    Some(prepared) => prepared.product_into(samples, x, &mut out, &mut Workspace::new()),
                    None => affine_product_into(&AffineShape { samples, inputs, outputs }, x, &w, &mut out),
                }
                out
            };
            let want = product(0, MOST, None);
            let want_prepared = prepared.as_ref().map(|prepared| product(0, MOST, Some(prepared)));
            let name = format!("{} {inputs} -> {outputs}", T::NAME);
            for (first, samples) in
                [(0, 1), (7, 1), (598, 1), (3, 2), (0, 3), (100, 50), (11, 100), (5, 256), (0, 257), (80, 511)]
            {
                let here = first * outputs..(first + samples) * outputs;
                let what = format!("{name}, {samples} samples from {first}");
                assert_near(&product(first, samples, None), &want[here.clone()], alike, &what);
                if let Some(of_all) = &want_prepared {
                    let got = product(first, samples, prepared.as_ref());
                    assert_near(&got, &of_all[here.clone()], true, &format!("{what}, prepared"));
                    assert_near(&got, &want[here], false, &format!("{what}, prepared and not"));
                    for threads in [1, 9] {
                        let other = with_threads(threads, || product(first, samples, prepared.as_ref())).unwrap();
                        assert_near(&other, &got, true, &format!("{what}, prepared, {threads} threads"));
                    }
                }
            }
            assert!(prepared.is_some() || T::KIND == Kind::F64 || inputs <= 32, "{name} is prepared");
        }
        for (inputs, outputs) in [
            (1, 1),
            (5, 3),
            (3, 10),
            (33, 10),
            (64, 64),
            (256, 100),
            (257, 10),
            (500, 10),
            (700, 1),
            (1024, 65),
            (2048, 500),
            (3072, 10),
            (8192, 17),
        ] {
            check::<f32>(inputs, outputs);
            check::<f64>(inputs, outputs);
        }
    }
}
