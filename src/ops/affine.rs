//! Level 3. Fast affine layer: `out = x w + b`, with the products cut by hand so that every thread has a share.
//!
//! A product is cut along rows or columns of its result, never along the summed dimension, into pieces, each one single-threaded
//! product, of BLAS or our own on panels. Sizes and the processor's kernels decide the pieces, but for those of `out` by our own
//! product: these depend on the number of threads as well, which no bit does.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

use crate::blas::panels::{self, PANEL, Panels, Right, panel_len, set_row};
use crate::blas::{Accum, Mat, MatMut, gemm, gemm_in_terms};
use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::ops::layout::{row_major, slice_mut};
use crate::parallel::{Grid, Runs, Shares, StridedMut, current_threads, for_each_chunk_mut, for_each_share};
use crate::simd::{LANES, add_assign, vectorized};
use crate::workspace::{Buffer, Scratch, Workspace};

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
    pub(crate) fn rows<T: Element>(&self) -> usize {
        let AffineShape { samples, inputs, outputs } = *self;
        let even = piece_len::<T>(inputs, samples.saturating_mul(inputs).saturating_mul(outputs));
        let piece = if panels::pay_copied::<T>(outputs) { PIECE / 2 } else { PIECE };
        let most = (piece / outputs.max(1)).max(LEAST_ROWS);
        if even <= most { even } else { 1 << most.ilog2() }
    }

    /// `dw[rows, M] = x^T[rows, N] . dout[N, M]` for the rows of piece `piece`, because `out = x . w`.
    fn weights_gradient<T: Element>(
        &self,
        piece: usize,
        dout: &Gradient<'_, T>,
        x: &[T],
        dw: &mut [T],
        scratch: &mut [T],
    ) {
        let AffineShape { samples, inputs, outputs } = *self;
        let height = dw.len() / outputs;
        let first = piece * self.rows::<T>();
        let x = Mat::new(x, samples, inputs, inputs).block(0..samples, first..first + height).t();
        let dw = MatMut::new(dw, height, outputs, outputs);
        match dout.panels {
            Some(panels) => panels::multiply(x, Right::Panels(panels), dw, true, scratch),
            None => gemm(Accum::Replace, T::one(), x, Mat::new(dout.rows, samples, outputs, outputs), dw),
        }
    }

    /// `dx[N, columns] = dout[N, M] . w^T[M, columns]`, for the columns of the rows `w`.
    fn input_gradient<T: Element>(
        &self,
        dout: &Gradient<'_, T>,
        w: &[T],
        mut dx: StridedMut<'_, T>,
        scratch: &mut [T],
    ) {
        let AffineShape { samples, outputs, .. } = *self;
        let (columns, dout) = (dx.run(), Mat::new(dout.rows, samples, outputs, outputs));
        let w = Mat::new(w, columns, outputs, outputs).t();
        if !on_panels::<T>(outputs, columns) {
            return gemm(Accum::Replace, T::one(), dout, w, MatMut::of(&mut dx));
        }
        // Rows of dx are `inputs` apart, often a power of two, and sums go through memory again and again until they are whole: in
        // scratch they lie side by side.
        let (product, scratch) = scratch.split_at_mut(columns * samples.min(MOST_ROWS));
        for first in (0..samples).step_by(MOST_ROWS) {
            let here = first..samples.min(first + MOST_ROWS);
            let to = MatMut::new(product, here.len(), columns, columns);
            // The longer rows of dout are, the fewer panels a piece has to read them for: to copy them takes longer.
            panels::multiply(dout.block(here.clone(), 0..outputs), Right::Rows(w), to, false, scratch);
            for (sample, row) in here.zip(product.chunks_exact(columns)) {
                dx.get(sample).copy_from_slice(row);
            }
        }
    }

    /// Elements of scratch that a piece of the gradients takes.
    fn gradient_scratch_len<T: Element>(&self) -> usize {
        let (rows, samples) = (self.rows::<T>(), self.samples.min(MOST_ROWS));
        let dw = if self.panels_len::<T>() > 0 { panels::scratch_len(rows, true) } else { 0 };
        let product = rows * samples + panels::scratch_len(samples, false);
        dw.max(if on_panels::<T>(self.outputs, rows) { product } else { 0 })
    }

    /// Elements of the panels of the output's gradient.
    fn panels_len<T: Element>(&self) -> usize {
        let AffineShape { samples, outputs, .. } = *self;
        if on_panels::<T>(samples, outputs) { outputs.div_ceil(PANEL) * panel_len(samples) } else { 0 }
    }
}

/// Rows of the gradient of x that a piece keeps at a time.
const MOST_ROWS: usize = 512;

/// The gradient of the output, `[N, M]`, and its panels, which all pieces share, where our own product takes them.
#[derive(Debug)]
struct Gradient<'a, T> {
    rows: &'a [T],
    panels: Option<Panels<'a, T>>,
}

impl<'a, T: Element> Gradient<'a, T> {
    /// `dout` of that shape, in panels too if `dw` is to be made of it, and scratch for each piece of the gradients, with `more`
    /// elements for the caller.
    fn new(shape: &AffineShape, dout: &'a [T], dw: bool, more: usize, ws: &'a mut Workspace) -> (Self, Scratch<'a, T>) {
        let panels_len = if dw { shape.panels_len::<T>() } else { 0 };
        let (data, scratch) = ws.lend(panels_len, more + shape.gradient_scratch_len::<T>());
        let panels = (panels_len > 0).then(|| in_panels((shape.samples, shape.outputs), dout, data));
        (Gradient { rows: dout, panels }, scratch)
    }
}

/// Puts a matrix, row after row, into panels. They are also what is next after them.
fn in_panels<'a, T: Element>((rows, cols): (usize, usize), matrix: &[T], data: &'a mut [T]) -> Panels<'a, T> {
    let mut panels = StridedMut::rows(&mut *data, panel_len(rows));
    matrix.chunks_exact(cols.max(1)).enumerate().for_each(|(row, values)| set_row(&mut panels, row, values));
    Panels { next: data, ..Panels::new(data, rows) }
}

/// Whether our own product on panels makes sums of so many terms, each for so many columns, of matrices that change.
fn on_panels<T: Element>(terms: usize, cols: usize) -> bool {
    panels::pay_copied::<T>(terms) && cols >= LANES
}

/// Elements of w in a piece, at most: with as many gradients, and what a product copies, they stay in a core's cache. For every piece
/// BLAS copies the gradient of the output, so small ones cost; our own product does not, and takes half.
const PIECE: usize = 1 << 16;

/// Rows in a piece at least: for every piece the gradient of the output is read anew.
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
/// A row of `out` has the same bits whatever the other rows of `x` are, and however many: our own product promises that, and for
/// BLAS' see [`gemm_in_terms`].
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn affine_product_into<T: Element>(shape: &AffineShape, x: &[T], w: &[T], out: &mut [T], ws: &mut Workspace) {
    let AffineShape { samples, inputs, outputs } = *shape;
    shape.assert_lengths(x.len(), w.len(), out.len());
    if samples == 0 || outputs == 0 {
        return;
    }
    if on_panels::<T>(inputs, outputs) {
        return product_on_panels(shape, x, Right::Rows(Mat::new(w, inputs, outputs, outputs)), out, ws);
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

/// `out = x w` by our own product: an element of `out` is one chain of multiply-adds, whatever stands beside it.
fn product_on_panels<T: Element>(shape: &AffineShape, x: &[T], w: Right<'_, T>, out: &mut [T], ws: &mut Workspace) {
    let AffineShape { samples, inputs, outputs } = *shape;
    let (height, width) = part(samples, outputs);
    let (_, scratch) = ws.lend(0, scratch_len(samples));
    let out = Grid::new(out, (samples, outputs), (height, width));
    let across = out.across();
    for_each_share(out, |piece, mut out| {
        let (row, column) = (piece / across * height, piece % across * width);
        let x = Mat::new(&x[row * inputs..], out.count(), inputs, inputs);
        let w = w.columns(column..column + out.run());
        // out[rows, columns] = x[rows, D] . w[D, columns]; few rows are not copied: the caches have room for them as they lie
        scratch.with(|scratch| panels::multiply(x, w, MatMut::of(&mut out), samples > FEW_SAMPLES, scratch));
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
        in_panels((inputs, outputs), w, &mut data);
        Some(Prepared { inputs, outputs, panels: data })
    }

    /// `out = x w`, as [`affine_product_into`]: a row of `out` has the same bits whatever the others are.
    ///
    /// # Panics
    /// If a slice has not the length of its shape.
    pub fn product_into(&self, samples: usize, x: &[T], out: &mut [T], ws: &mut Workspace) {
        let Prepared { inputs, outputs, ref panels } = *self;
        let shape = AffineShape { samples, inputs, outputs };
        shape.assert_lengths(x.len(), inputs * outputs, out.len());
        if samples == 0 || outputs == 0 {
            return;
        }
        product_on_panels(&shape, x, Right::Panels(Panels::new(panels, inputs)), out, ws);
    }
}

/// Rows and columns of a piece of a product on panels, whole panels of them. Few samples are not copied, and each of their panels is
/// a piece. Where every piece copies its rows of x, there are at most as many pieces as threads; one more where the samples are dealt
/// out and the number of threads is odd.
fn part(samples: usize, outputs: usize) -> (usize, usize) {
    let down = if samples >= MANY_SAMPLES { ROW_PIECES } else { 1 };
    let across = if samples > FEW_SAMPLES { current_threads().div_ceil(down) } else { outputs };
    (samples.div_ceil(down), outputs.div_ceil(across).next_multiple_of(PANEL))
}

/// Elements of scratch that a piece of [`product_on_panels`] takes for so many samples, or fewer.
fn scratch_len(samples: usize) -> usize {
    panels::scratch_len(samples.min(MANY_SAMPLES - 1).max(samples.div_ceil(ROW_PIECES)), true)
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
    ws: &mut Workspace,
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
    let (gradient, scratch) = Gradient::new(shape, dout, dw.is_some(), 0, ws);
    if let Some(dw) = dw {
        for_each_chunk_mut(dw, rows * outputs, |piece, dw| {
            scratch.with(|scratch| shape.weights_gradient(piece, &gradient, x, dw, scratch));
        });
    }
    if let Some(dx) = dx {
        for_each_share(Grid::new(dx, (samples, inputs), (samples, rows)), |piece, dx| {
            scratch.with(|scratch| shape.input_gradient(&gradient, &w[piece * rows * outputs..], dx, scratch));
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
    let (gradient, scratch) = Gradient::new(shape, dout, true, rows * outputs, ws);
    let finish = |piece: usize, w: &mut [T], kept, scratch: &mut [T]| {
        let (dw, scratch) = scratch.split_at_mut(rows * outputs);
        let dw = &mut dw[..w.len()];
        shape.weights_gradient(piece, &gradient, x, dw, scratch);
        update(w, dw, kept);
    };
    let Some(dx) = dx else {
        return for_each_share((weights, kept), |piece, (w, kept)| {
            scratch.with(|scratch| finish(piece, w, kept, scratch));
        });
    };
    let dx = Grid::new(dx, (samples, inputs), (samples, rows));
    for_each_share((dx, weights, kept), |piece, (dx, w, kept)| {
        scratch.with(|scratch| {
            shape.input_gradient(&gradient, w, dx, scratch);
            finish(piece, w, kept, scratch);
        });
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
    affine_product_into(&shape, &row_major(x), &row_major(w), slice_mut(&mut out), &mut Workspace::new());
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
    affine_backward_into(&shape, &row_major(dout), &row_major(x), &row_major(w), grads, &mut Workspace::new());
    Ok(AffineGrads { dx, dw, db })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::Kind;
    use crate::parallel::{Chunks, with_threads};
    use crate::random::{Purpose, stream};
    use rand::RngExt;

    fn values<T: Element>(len: usize, seed: u64) -> Vec<T> {
        let mut random = stream(seed, Purpose::Example, 0, 0);
        (0..len).map(|_| T::of(random.random_range(-1.0..1.0))).collect()
    }

    fn assert_near<T: Element>(got: &[T], want: &[T], alike: bool, what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
            let near = (got.f64() - want.f64()).abs() <= 1e-4 * (1.0 + want.f64().abs());
            assert!(got == want || (near && !alike), "{what}, element {i}: {got:e} and not {want:e}");
        }
    }

    /// Checks that a sample's output has the same bits alone and in any batch, wherever in it, with prepared weights and without,
    /// which give the same but for rounding where one of them is OpenBLAS' product. With its AVX2 kernels that has the same bits
    /// but for rounding.
    fn check_samples<T: Element>(inputs: usize, outputs: usize) {
        const MOST: usize = 600;
        let own = on_panels::<T>(inputs, outputs);
        let alike = own || crate::blas::setup().rows_alike;
        let (x, w) = (values::<T>(MOST * inputs, 1), values::<T>(inputs * outputs, 2));
        let prepared = Prepared::new(inputs, outputs, &w);
        let product = |first: usize, samples: usize, prepared: Option<&Prepared<T>>| {
            let (mut out, ws) = (vec![T::nan(); samples * outputs], &mut Workspace::new());
            let x = &x[first * inputs..][..samples * inputs];
            match prepared {
                Some(prepared) => prepared.product_into(samples, x, &mut out, ws),
                None => affine_product_into(&AffineShape { samples, inputs, outputs }, x, &w, &mut out, ws),
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
                assert_near(&got, &want[here], own, &format!("{what}, prepared and not"));
                for threads in [1, 9] {
                    let other = with_threads(threads, || product(first, samples, prepared.as_ref())).unwrap();
                    assert_near(&other, &got, true, &format!("{what}, prepared, {threads} threads"));
                }
            }
        }
        assert!(prepared.is_some() || T::KIND == Kind::F64 || inputs <= 32, "{name} is prepared");
    }

    #[test]
    fn prepared_weights_of_nothing_make_nothing() {
        let (x, ws) = (values::<f32>(3 * 40, 1), &mut Workspace::new());
        let none = Prepared::<f32>::new(40, 0, &[]).expect("sums of 40 terms are our own product");
        none.product_into(3, &x, &mut [], ws);
        let some = Prepared::new(40, 3, &x).expect("sums of 40 terms are our own product");
        some.product_into(0, &[], &mut [], ws);
    }

    #[test]
    fn the_output_of_a_sample_does_not_depend_on_the_others() {
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
            check_samples::<f32>(inputs, outputs);
            check_samples::<f64>(inputs, outputs);
        }
    }

    /// Products and gradients in `f32` are those of the naive twin in `f64`, with the same bits at any number of threads, and where
    /// weights are updated while their gradient is made.
    fn check_gradients(samples: usize, inputs: usize, outputs: usize) {
        let what = format!("{samples} samples, {inputs} -> {outputs}");
        let shape = AffineShape { samples, inputs, outputs };
        let matrix = |rows: usize, cols: usize, seed| {
            Array2::from_shape_vec((rows, cols), values::<f32>(rows * cols, seed)).unwrap()
        };
        let (x, w, dout) = (matrix(samples, inputs, 1), matrix(inputs, outputs, 2), matrix(samples, outputs, 3));
        let wide = |matrix: &Array2<f32>| matrix.mapv(f64::from);
        let want = crate::naive::affine_backward(wide(&dout).view(), wide(&x).view(), wide(&w).view()).unwrap();
        let want_out = wide(&x).dot(&wide(&w));
        let assert_close = |got: &Array2<f32>, want: &Array2<f64>, part: &str| {
            let error = (&wide(got) - want).iter().map(|d| d * d).sum::<f64>().sqrt();
            let size = want.iter().map(|v| v * v).sum::<f64>().sqrt();
            assert!(error <= 1e-6 * size, "{what}: {part} is off by {error:e} of {size:e}");
        };
        let out = affine_forward(x.view(), w.view(), None).unwrap();
        let grads = affine_backward(dout.view(), x.view(), w.view()).unwrap();
        assert_close(&out, &want_out, "out");
        assert_close(&grads.dx, &want.dx, "dx");
        assert_close(&grads.dw, &want.dw, "dw");
        for threads in [1, 3] {
            let (again, again_grads) = with_threads(threads, || {
                let grads = affine_backward(dout.view(), x.view(), w.view()).unwrap();
                (affine_forward(x.view(), w.view(), None).unwrap(), grads)
            })
            .unwrap();
            assert!(again == out && again_grads == grads, "{what}: the bits of {threads} threads");
        }
        let (piece, len) = (shape.rows::<f32>() * outputs, inputs * outputs);
        let ranges: Vec<_> = (0..len).step_by(piece).map(|start| start..len.min(start + piece)).collect();
        let operands = (dout.as_slice().unwrap(), x.as_slice().unwrap());
        // Whatever was left in the workspace, here NaN, is not read.
        for asked in [true, false] {
            let mut ws = Workspace::new();
            let left = (samples + 64) * (inputs + 64) + (outputs + 64) * (inputs + samples + 64);
            let (shared, scratch) = ws.lend(left, left);
            shared.fill(f32::NAN);
            scratch.with(|scratch| scratch.fill(f32::NAN));
            let (mut dx, mut dw, mut used) = (vec![f32::NAN; x.len()], vec![f32::NAN; len], w.clone());
            let weights = Runs::new(slice_mut(&mut used), &ranges, 1);
            let made = Chunks::new(&mut dw, piece);
            let update = |w: &mut [f32], dw: &[f32], made: &mut [f32]| {
                made.copy_from_slice(dw);
                w.fill(f32::NAN);
            };
            let dx_of = asked.then_some(&mut dx[..]);
            // on the one thread whose scratch has been filled
            with_threads(1, || {
                affine_backward_updating(&shape, operands, dx_of, weights, made, &mut ws, update);
            })
            .unwrap();
            assert!(dw == grads.dw.as_slice().unwrap(), "{what}: dw updated at once");
            assert!(!asked || dx == grads.dx.as_slice().unwrap(), "{what}: dx of weights updated at once");
        }
    }

    #[test]
    fn products_and_gradients_are_those_of_the_naive_twin() {
        for (samples, inputs, outputs) in [
            (1, 40, 20),
            (33, 100, 16),
            (50, 700, 500),
            (64, 2048, 100),
            (70, 129, 45),
            (530, 300, 50),
            (1030, 40, 33),
            (40, 5, 64),
        ] {
            check_gradients(samples, inputs, outputs);
        }
    }
}
