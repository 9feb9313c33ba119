//! Level 2. Fast affine layer: `out = x w + b`, with the products cut by hand so that every thread has a share.
//!
//! A product is cut along rows or columns of its result, never along the summed dimension, into pieces whose number
//! depends on sizes alone. Each piece is one single-threaded BLAS product.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

use crate::blas::{Accum, Mat, MatMut, gemm};
use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::parallel::{Disjoint, for_each_chunk_mut, for_each_piece};
use crate::simd::{add_assign, vectorized};

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

/// Multiply-adds below which a product is not worth cutting.
const SMALL: usize = 1 << 18;

/// Length of the pieces that `len` rows or columns are cut into: eight of them, of whole cache lines, if the product is
/// large; one otherwise.
fn piece_len<T>(len: usize, multiply_adds: usize) -> usize {
    const PIECES: usize = 8;
    let line = 64 / size_of::<T>();
    if multiply_adds < SMALL { len.max(1) } else { len.div_ceil(PIECES).next_multiple_of(line) }
}

/// `out = x w` into the caller's buffer; the bias is the caller's, who reads `out` anyway.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn affine_product_into<T: Element>(shape: &AffineShape, x: &[T], w: &[T], out: &mut [T]) {
    let AffineShape { samples, inputs, outputs } = *shape;
    assert_eq!(
        (x.len(), w.len(), out.len()),
        (samples * inputs, inputs * outputs, samples * outputs),
        "lengths for {shape:?}"
    );
    if samples == 0 || outputs == 0 {
        return;
    }
    let work = samples * inputs * outputs;
    let out = Disjoint::new(out);
    // BLAS copies the rows of x and the columns of w that a piece reads. So columns are cut in four only, and rows in two
    // where there are many.
    let rows = if samples >= 256 { samples.div_ceil(2) } else { samples };
    let columns = piece_len::<T>(2 * outputs, work).min(outputs);
    let (across, down) = (outputs.div_ceil(columns), samples.div_ceil(rows));
    for_each_piece(across * down, |piece| {
        let (column, row) = (piece % across * columns, piece / across * rows);
        let (width, height) = (columns.min(outputs - column), rows.min(samples - row));
        let x = Mat::new(&x[row * inputs..], height, inputs, inputs);
        let w = Mat::new(&w[column..], inputs, width, outputs);
        let start = row * outputs + column;
        let block = out.pointer(start, (height - 1) * outputs + width);
        // SAFETY: a piece has its own columns of its own rows.
        let out = unsafe { MatMut::from_pointer(block, height, width, outputs) };
        // out[rows, columns] = x[rows, D] . w[D, columns]
        gemm(Accum::Replace, T::one(), x, w, out);
    });
}

/// Gradients of `out = x w + b` for `dout` `[N, M]`, all set, not added to: `dx` `[N, D]` if asked for, `dw` `[D, M]`,
/// `db` `[M]` if there is a bias.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn affine_backward_into<T: Element>(
    shape: &AffineShape,
    dout: &[T],
    x: &[T],
    w: &[T],
    dx: Option<&mut [T]>,
    dw: &mut [T],
    db: Option<&mut [T]>,
) {
    let AffineShape { samples, inputs, outputs } = *shape;
    assert_eq!(
        (x.len(), w.len(), dout.len()),
        (samples * inputs, inputs * outputs, samples * outputs),
        "lengths for {shape:?}"
    );
    assert!(
        dw.len() == w.len()
            && dx.as_ref().is_none_or(|dx| dx.len() == x.len())
            && db.as_ref().is_none_or(|db| db.len() == outputs),
        "gradients have their inputs' shapes"
    );
    let dout_matrix = Mat::new(dout, samples, outputs, outputs);
    let rows = piece_len::<T>(inputs, samples * inputs * outputs);
    for_each_chunk_mut(dw, rows * outputs, |piece, dw| {
        let height = dw.len() / outputs;
        // dw[rows, M] = x^T[rows, N] . dout[N, M]               because out = x . w
        let x = Mat::new(&x[piece * rows..], samples, height, inputs).t();
        gemm(Accum::Replace, T::one(), x, dout_matrix, MatMut::new(dw, height, outputs, outputs));
    });
    if let Some(dx) = dx
        && samples > 0
    {
        let dx = Disjoint::new(dx);
        for_each_piece(inputs.div_ceil(rows), |piece| {
            let (column, width) = (piece * rows, rows.min(inputs - piece * rows));
            let block = dx.pointer(column, (samples - 1) * inputs + width);
            // SAFETY: a piece has its own columns.
            let dx = unsafe { MatMut::from_pointer(block, samples, width, inputs) };
            // dx[N, columns] = dout[N, M] . w^T[M, columns]
            let w = Mat::new(&w[column * outputs..], width, outputs, outputs).t();
            gemm(Accum::Replace, T::one(), dout_matrix, w, dx);
        });
    }
    if let Some(db) = db {
        db.fill(T::zero());
        vectorized!(dout.chunks_exact(outputs.max(1)).for_each(|row| add_assign(db, row)),);
    }
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
    let (x, w) = (x.as_standard_layout(), w.as_standard_layout());
    let mut out = Array2::zeros((shape.samples, shape.outputs));
    let (x, w) = (x.as_slice().expect("standard layout"), w.as_slice().expect("standard layout"));
    affine_product_into(&shape, x, w, out.as_slice_mut().expect("freshly made"));
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
    let (dout, x, w) = (dout.as_standard_layout(), x.as_standard_layout(), w.as_standard_layout());
    let (mut dx, mut dw) = (Array2::zeros(x.dim()), Array2::zeros(w.dim()));
    let mut db = Array1::zeros(shape.outputs);
    affine_backward_into(
        &shape,
        dout.as_slice().expect("standard layout"),
        x.as_slice().expect("standard layout"),
        w.as_slice().expect("standard layout"),
        Some(dx.as_slice_mut().expect("freshly made")),
        dw.as_slice_mut().expect("freshly made"),
        Some(db.as_slice_mut().expect("freshly made")),
    );
    Ok(AffineGrads { dx, dw, db })
}
