//! Level 4. Muon's matrix step: momentum made orthogonal by Newton and Schulz' iteration, in products.

use std::ops::Range;

use super::elementwise::{CHUNK, squares};
use crate::blas::{Accum, Mat, MatMut, gemm};
use crate::element::Element;
use crate::parallel::for_each_chunk_mut;
use crate::simd::vectorized;
use crate::workspace::Buffer;

/// Coefficients of `X <- a X + b (X X^T) X + c (X X^T)^2 X` (Jordan 2024): as steep at 0 as can be while singular values
/// from 0 to 1 end near 1.
const POLYNOMIAL: [f64; 3] = [3.4445, -4.7750, 2.0315];

/// Against division by 0.
const EPSILON: f64 = 1e-7;

/// Iterations between two Gram matrices that are made of `X`, at most. From one to the next, a matrix that is made of the last one has 12
/// times its rounding errors where singular values are near 0.
const RUN: usize = 3;

/// Rows of a product that are one piece of work.
const ROWS: usize = 32;

/// A parameter that is seen as a matrix `(rows, cols)`, row-major.
#[derive(Clone, Debug)]
pub(super) struct Matrix {
    /// Its elements.
    pub(super) range: Range<usize>,
    pub(super) group: usize,
    rows: usize,
    cols: usize,
    /// Filters, or columns of an affine layer.
    outputs: usize,
}

/// What the step of a matrix is made with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) learning_rate: f64,
    pub(super) weight_decay: f64,
    pub(super) iterations: usize,
    pub(super) fixed_norm: bool,
}

impl Matrix {
    /// Filters `(F, C, KH, KW)` as `(F, C KH KW)`, affine weights as they are, `(D, M)`.
    pub(super) fn new(range: Range<usize>, group: usize, shape: &[usize]) -> Self {
        let (rows, cols) = (shape[0], shape[1..].iter().product());
        let outputs = if shape.len() == 2 { cols } else { rows };
        Matrix { range, group, rows, cols, outputs }
    }

    fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// The shorter side.
    fn short(&self) -> usize {
        self.rows.min(self.cols)
    }
}

/// Memory for the largest of some matrices.
#[derive(Clone, Debug)]
pub(super) struct Scratch<T: Element> {
    /// The next `X`.
    next: Buffer<T>,
    /// `G`, `P`, `Q` of [`Scratch::orthogonalize`], and a product of two of them.
    squares: [Buffer<T>; 4],
    /// Sums of squares, one per chunk.
    sums: Box<[f64]>,
}

impl<T: Element> Scratch<T> {
    pub(super) fn new(matrices: &[Matrix]) -> Self {
        let largest = |size: fn(&Matrix) -> usize| matrices.iter().map(size).max().unwrap_or(0);
        let square = largest(|m| m.short() * m.short());
        Scratch {
            next: Buffer::zeroed(largest(Matrix::len)),
            squares: std::array::from_fn(|_| Buffer::zeroed(square)),
            sums: vec![0.0; largest(Matrix::len).div_ceil(CHUNK)].into(),
        }
    }

    /// One step of the parameter `w` in the direction `x`, which is used up.
    pub(super) fn step(&mut self, matrix: &Matrix, step: Step, w: &mut [T], x: &mut [T]) {
        let (outputs, inputs) = (matrix.outputs as f64, (matrix.len() / matrix.outputs.max(1)) as f64);
        let mut keep = 1.0 - step.learning_rate * step.weight_decay;
        if step.fixed_norm {
            let norm = self.norm(w);
            // A parameter that is all 0 has no direction.
            keep *= if norm > 0.0 { outputs.sqrt() / norm } else { 1.0 };
        }
        let norm = self.norm(x);
        scale(x, T::of(1.0 / norm.max(EPSILON)));
        let x = self.orthogonalize(matrix, step.iterations, x);
        let (keep, rate) = (T::of(keep), T::of(step.learning_rate * (outputs / inputs).max(1.0).sqrt()));
        for_each_chunk_mut(w, CHUNK, |i, w| {
            let x = &x[i * CHUNK..][..w.len()];
            vectorized!({
                for i in 0..x.len() {
                    w[i] = keep * w[i] - rate * x[i];
                }
            });
        });
    }

    /// The root of the sum of squares, added up in a fixed order.
    fn norm(&mut self, values: &[T]) -> f64 {
        let sums = &mut self.sums[..values.len().div_ceil(CHUNK)];
        for_each_chunk_mut(sums, 1, |i, sum| {
            let chunk = i * CHUNK..values.len().min((i + 1) * CHUNK);
            sum[0] = squares(&values[chunk]);
        });
        sums.iter().sum::<f64>().sqrt()
    }

    /// Brings the singular values of `x`, which are 1 at most, near 1. The result is in `x` or in this scratch.
    ///
    /// An iteration multiplies `X` by `P = a I + b G + c G G`, where `G = X X^T`, or `X^T X` where that is smaller. `P` is symmetric
    /// and commutes with `G`, so that the next `G` is `P G P`: several iterations take two products with `X`, one for the first `G`
    /// and one with all of their `P`, and otherwise small squares.
    fn orthogonalize<'a>(&'a mut self, matrix: &Matrix, iterations: usize, x: &'a mut [T]) -> &'a [T] {
        let &Matrix { rows, cols, .. } = matrix;
        let n = matrix.short();
        let [gram, polynomial, all, product] = self.squares.each_mut().map(|square| &mut square[..n * n]);
        let (mut polynomial, mut all, mut product) = (polynomial, all, product);
        let (mut x, mut next) = (x, &mut self.next[..rows * cols]);
        // Where X is little longer than wide, products with it are as cheap as squares, and there are fewer of them.
        let most = if 2 * rows.max(cols) < 3 * n { 1 } else { RUN };
        for done in (0..iterations).step_by(most) {
            let run = most.min(iterations - done);
            let whole = Mat::new(x, rows, cols, cols);
            product_rows(gram, n, T::one(), |i, height| {
                if rows <= cols {
                    (Mat::new(&x[i * cols..], height, cols, cols), whole.t())
                } else {
                    (Mat::new(&x[i..], rows, height, cols).t(), whole)
                }
            });
            for i in 0..run {
                set_polynomial(polynomial, gram, n);
                if i + 1 < run {
                    multiply_squares(product, T::one(), gram, polynomial, n);
                    multiply_squares(gram, T::one(), product, polynomial, n);
                }
                if i == 0 {
                    std::mem::swap(&mut all, &mut polynomial);
                } else {
                    multiply_squares(product, T::one(), polynomial, all, n);
                    std::mem::swap(&mut all, &mut product);
                }
            }
            let p = Mat::new(all, n, n, n);
            product_rows(next, cols, T::one(), |i, height| {
                if rows <= cols {
                    (Mat::new(&all[i * n..], height, n, n), whole)
                } else {
                    (Mat::new(&x[i * cols..], height, cols, cols), p)
                }
            });
            std::mem::swap(&mut x, &mut next);
        }
        x
    }
}

/// `P = a I + b G + c G G` of a matrix `G` `(n, n)`.
fn set_polynomial<T: Element>(polynomial: &mut [T], gram: &[T], n: usize) {
    let [a, b, c] = POLYNOMIAL.map(T::of);
    multiply_squares(polynomial, c, gram, gram, n);
    for_each_chunk_mut(polynomial, ROWS * n, |piece, rows| {
        let gram = &gram[piece * ROWS * n..][..rows.len()];
        vectorized!({
            for i in 0..gram.len() {
                rows[i] += b * gram[i];
            }
        });
        for (i, row) in rows.chunks_exact_mut(n).enumerate() {
            row[piece * ROWS + i] += a;
        }
    });
}

/// `out <- alpha A B` of matrices `(n, n)`.
fn multiply_squares<T: Element>(out: &mut [T], alpha: T, a: &[T], b: &[T], n: usize) {
    let b = Mat::new(b, n, n, n);
    product_rows(out, n, alpha, |i, height| (Mat::new(&a[i * n..], height, n, n), b));
}

/// `out <- alpha A B` for `out` with rows of `cols`, in pieces of [`ROWS`] rows. `factors(i, height)` are the rows of `A`
/// from `i` on, so many of them, and `B`.
fn product_rows<'a, T: Element>(
    out: &mut [T],
    cols: usize,
    alpha: T,
    factors: impl Fn(usize, usize) -> (Mat<'a, T>, Mat<'a, T>) + Sync + Send,
) {
    for_each_chunk_mut(out, ROWS * cols, |piece, out| {
        let height = out.len() / cols;
        let (a, b) = factors(piece * ROWS, height);
        gemm(Accum::Replace, alpha, a, b, MatMut::new(out, height, cols, cols));
    });
}

fn scale<T: Element>(x: &mut [T], factor: T) {
    for_each_chunk_mut(x, CHUNK, |_, x| {
        vectorized!({
            for x in x {
                *x *= factor;
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, ArrayView2};
    use rand::RngExt;

    use super::*;
    use crate::optim::{Group, LearningRate, Optimizer, Progress, Select, UpdateRule};
    use crate::params::{Layout, ParamKind, Params};
    use crate::random::{Purpose, stream};

    fn uniform<T: Element>(len: usize, index: u64) -> Vec<T> {
        let mut rng = stream(1, Purpose::Example, 1, index);
        (0..len).map(|_| T::of(f64::from(rng.random_range(-1.0_f32..1.0)))).collect()
    }

    fn product(a: ArrayView2<f64>, b: ArrayView2<f64>) -> Array2<f64> {
        Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| (0..a.ncols()).map(|k| a[[i, k]] * b[[k, j]]).sum())
    }

    fn norm(a: &Array2<f64>) -> f64 {
        a.iter().map(|a| a * a).sum::<f64>().sqrt()
    }

    /// The formula of [`UpdateRule::Muon`] as it stands, in nested loops.
    struct Plain {
        w: Array2<f64>,
        v: Array2<f64>,
        outputs: usize,
    }

    impl Plain {
        fn step(&mut self, group: &Group, lr: f64, g: &Array2<f64>) {
            let UpdateRule::Muon { momentum, iterations, weight_decay, fixed_norm } = group.rule else { panic!() };
            let g = g + group.l2 * &self.w;
            self.v = momentum * &self.v + &g;
            let mut x = &g + momentum * &self.v;
            if fixed_norm {
                self.w *= (self.outputs as f64).sqrt() / norm(&self.w);
            }
            x /= norm(&x).max(1e-7);
            for _ in 0..iterations {
                let gram = product(x.view(), x.t());
                let once = product(gram.view(), x.view());
                let twice = product(gram.view(), once.view());
                x = 3.4445 * x - 4.7750 * once + 2.0315 * twice;
            }
            let scale = (self.outputs as f64 / (self.w.len() / self.outputs) as f64).max(1.0).sqrt();
            self.w = (1.0 - lr * weight_decay) * &self.w - lr * scale * x;
        }
    }

    fn follows_the_formula<T: Element>(shape: &[usize], rule: UpdateRule, l2: f64, tolerance: f64) {
        let lr = 0.1;
        let group = Group { l2, ..Group::new(Select::ALL, rule, LearningRate::constant(lr).unwrap()) };
        let mut layout = Layout::default();
        layout.push("before".into(), &[3, 2], ParamKind::Weight);
        layout.push("matrix".into(), shape, ParamKind::Weight);
        let mut params = Params::<T>::zeros(layout);
        let len = params.slice(1).len();
        let (rows, cols) = (shape[0], len / shape[0]);
        let matrix = |values: &[T]| Array2::from_shape_fn((rows, cols), |(i, j)| values[i * cols + j].f64());
        params.slice_mut(1).copy_from_slice(&uniform(len, 0));
        let outputs = if shape.len() == 2 { cols } else { rows };
        let mut plain = Plain { w: matrix(params.slice(1)), v: Array2::zeros((rows, cols)), outputs };
        let mut optimizer = Optimizer::new(vec![group.clone()], &params).unwrap();
        for t in 1..=5 {
            let mut grads = params.zeros_like();
            grads.slice_mut(1).copy_from_slice(&uniform(len, t));
            let loss = 0.5 * l2 * norm(&plain.w).powi(2);
            plain.step(&group, lr, &matrix(grads.slice(1)));
            let got = optimizer.step(&mut params, &grads, Progress::default()).regularization;
            assert!((got - loss).abs() <= tolerance * loss, "{shape:?}: loss {got}, not {loss}");
            for (values, expected) in [(params.slice(1), &plain.w), (optimizer.state().nth(1).unwrap().2, &plain.v)] {
                let off = norm(&(matrix(values) - expected)) / norm(expected);
                assert!(off <= tolerance, "{shape:?} in {}, {group:?}, step {t}: off by {off:e}", T::NAME);
            }
        }
    }

    /// Wide, tall, square, of one row or column; sides that are no multiples of a piece, and larger than one.
    #[test]
    fn every_shape_follows_the_formula() {
        let default = UpdateRule::ALL.into_iter().find(|rule| rule.is_matrix()).unwrap();
        let other = UpdateRule::Muon { momentum: 0.6, iterations: 3, weight_decay: 0.2, fixed_norm: true };
        for shape in [&[40, 3, 5, 3][..], &[67, 4, 3, 1], &[70, 33], &[33, 70], &[32, 32], &[1, 9], &[9, 1], &[5, 1, 1]]
        {
            for (rule, l2) in [(default, 0.0), (other, 0.1)] {
                follows_the_formula::<f64>(shape, rule, l2, 1e-12);
                follows_the_formula::<f32>(shape, rule, l2, 1e-5);
            }
        }
    }

    /// What PyTorch 2's own optimizer computes, made to calculate in f64:
    /// ```python
    /// import torch.optim._muon as source
    /// code = open(source.__file__).read().replace("bfloat16", "float64").replace("from .optimizer", "from torch.optim.optimizer")
    /// exec(code.replace("__all__", "names"), muon := {"__name__": "muon"})
    /// w = torch.nn.Parameter(torch.linspace(-0.4, 0.6, 6, dtype=torch.float64).reshape(3, 2))
    /// optimizer = muon["Muon"]([w], lr=0.1, weight_decay=0.1)
    /// for t in range(3):
    ///     w.grad = torch.cos(torch.arange(6, dtype=torch.float64) + t).reshape(3, 2)
    ///     optimizer.step()
    /// print(w.flatten().tolist())
    /// ```
    /// Its filters are `(outputs, inputs)`, as ours with four axes; our matrices are the other way round.
    #[test]
    fn it_agrees_with_pytorch() {
        let expected = [
            -0.578_510_665_864_168_2,
            -0.128_515_659_588_733,
            0.174_381_653_214_680_24,
            0.347_818_253_172_347_7,
            0.433_373_919_189_868_2,
            0.388_663_071_828_624_14,
        ];
        let rule = UpdateRule::Muon { momentum: 0.95, iterations: 5, weight_decay: 0.1, fixed_norm: false };
        for (shape, transposed) in [(&[3, 2, 1, 1][..], false), (&[2, 3], true)] {
            // Element `i` of PyTorch's matrix (3, 2).
            let place = |i: usize| if transposed { i % 2 * 3 + i / 2 } else { i };
            let mut layout = Layout::default();
            layout.push("w".into(), shape, ParamKind::Weight);
            let mut w = Params::<f64>::zeros(layout);
            (0..6).for_each(|i| w.slice_mut(0)[place(i)] = -0.4 + 0.2 * i as f64);
            let rate = LearningRate::constant(0.1).unwrap();
            let mut optimizer = Optimizer::new(vec![Group::new(Select::ALL, rule, rate)], &w).unwrap();
            for t in 0..3 {
                let mut grads = w.zeros_like();
                (0..6).for_each(|i| grads.slice_mut(0)[place(i)] = f64::from(i as u32 + t).cos());
                optimizer.step(&mut w, &grads, Progress::default());
            }
            for (i, expected) in expected.into_iter().enumerate() {
                let got = w.slice(0)[place(i)];
                assert!((got - expected).abs() <= 1e-14, "{shape:?}, {i}: {got}, not {expected}");
            }
        }
    }

    /// All singular values end near 1: from 0.68 to 1.14, as the author of the coefficients found.
    #[test]
    fn five_iterations_make_rows_or_columns_orthogonal() {
        for (rows, cols) in [(20, 90), (90, 20), (3, 1000)] {
            let matrix = Matrix::new(0..rows * cols, 0, &[rows, cols]);
            let mut scratch = Scratch::<f64>::new(std::slice::from_ref(&matrix));
            let mut x = uniform(rows * cols, 7);
            let norm = scratch.norm(&x);
            scale(&mut x, 1.0 / norm);
            let x = scratch.orthogonalize(&matrix, 5, &mut x);
            let x = ArrayView2::from_shape((rows, cols), x).unwrap();
            // Tall, so that no direction is lost.
            let x = if rows < cols { x.t() } else { x };
            for direction in 0..50 {
                let u = Array2::from_shape_vec((x.ncols(), 1), uniform(x.ncols(), 100 + direction)).unwrap();
                let stretched = self::norm(&product(x, u.view())) / self::norm(&u);
                assert!((0.67..1.15).contains(&stretched), "{rows} x {cols}: {stretched}");
            }
        }
    }
}
