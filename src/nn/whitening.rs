//! Level 5. Whitening: the filters of the layer `whiten2`, which are measured on images and not trained.
//!
//! A patch of `size` x `size` pixels in all `C` channels is a vector `p` of `d = C size^2` numbers. With `mean` over the patches
//! at all places of the images, whatever the layer's stride,
//!
//! ```text
//! S = mean(p p^T) = V diag(l) V^T          filters: the rows of diag(l + eps)^(-1/2) V^T, then their negatives
//! ```
//!
//! so that what they make of the images is uncorrelated and of variance 1, and an activation that cuts one side off loses
//! nothing. `eps` is 5e-4, for images normalised to variance 1 (Page 2019, "How to Train Your ResNet"; Jordan 2024, arXiv
//! 2404.00498). The eigenvectors are LAPACK's, whose signs have no meaning and depend on the library.

use crate::blas::{Accum, Mat, MatMut, gemm};
use crate::blocks::Core;
use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::nn::network::Network;
use crate::nn::steps::Kernel;
use crate::parallel::{for_each_chunk_mut, piece_range};
use crate::simd::{add_assign, vectorized};

/// Against division by the eigenvalues of directions that hardly occur.
#[cfg(feature = "blas")]
const EPSILON: f64 = 5e-4;

/// Images whose patches are summed by one piece, at least.
const PIECE: usize = 64;

impl<T: Element> Network<T> {
    /// Whether it begins with a whitening layer whose filters have not been measured: they are 0, and so are all scores.
    pub fn awaits_whitening(&self) -> bool {
        self.whitening().is_some_and(|(filters, _)| self.params().slice(filters).iter().all(|w| w.is_zero()))
    }

    /// Measures the filters of the whitening layer on images `x` `(N, C, H, W)`, some thousands of them; does nothing if there
    /// is none. The [`Solver`](crate::train::Solver) does that by itself.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not hold whole images, [`Error::Invalid`] if there are none, their numbers are not finite,
    /// or the build is without LAPACK.
    pub fn whiten(&mut self, x: &[T]) -> Result<()> {
        let Some((index, size)) = self.whitening() else { return Ok(()) };
        let input = self.input();
        let image: usize = input.iter().product();
        let images = x.len() / image;
        check_shape("whitening", "x", &[x.len()], &[images * image])?;
        let covariance = (images > 0).then(|| covariance(x, input, size));
        let Some(covariance) = covariance.filter(|sums| sums.iter().all(|sum| sum.is_finite())) else {
            let problem = "there are no finite images to measure";
            return Err(Error::invalid("whitening", problem, "give images of the training split"));
        };
        let filters = filters(covariance, input[0] * size * size)?;
        let weights = self.params_mut().slice_mut(index);
        let (first, second) = weights.split_at_mut(filters.len());
        for ((w, negative), &filter) in first.iter_mut().zip(second).zip(&filters) {
            (*w, *negative) = (T::of(filter), T::of(-filter));
        }
        Ok(())
    }

    /// The place of the whitening layer's filters, and their height and width.
    fn whitening(&self) -> Option<(usize, usize)> {
        self.steps().iter().find_map(|step| match &step.kernel {
            Kernel::Block { block, places, .. } => match block.parts().core {
                Some(Core::Whiten { size, .. }) => Some((places.w?, size)),
                _ => None,
            },
            Kernel::Sum(_) | Kernel::Layer { .. } => None,
        })
    }
}

/// `mean(p p^T)` over all patches, `(d, d)`; sums over images are added up in f64, in an order that depends on their number alone.
fn covariance<T: Element>(x: &[T], input: [usize; 3], size: usize) -> Vec<f64> {
    let [channels, height, width] = input;
    let (image, d) = (channels * height * width, channels * size * size);
    let images = x.len() / image;
    let pieces = images.div_ceil(PIECE);
    let mut sums = vec![0.0; pieces * d * d];
    let places = (height - size + 1) * (width - size + 1);
    for_each_chunk_mut(&mut sums, d * d, |piece, sums| {
        let (mut patches, mut of_image) = (vec![T::zero(); d * places], vec![T::zero(); d * d]);
        for n in piece_range(images, pieces, piece) {
            vectorized!(patches_of(&x[n * image..][..image], input, size, &mut patches));
            let patches = Mat::new(&patches, d, places, places);
            gemm(Accum::Replace, T::one(), patches, patches.t(), MatMut::new(&mut of_image, d, d, d));
            sums.iter_mut().zip(&of_image).for_each(|(sum, &value)| *sum += value.f64());
        }
    });
    let (total, rest) = sums.split_at_mut(d * d);
    rest.chunks_exact(d * d).for_each(|piece| add_assign(total, piece));
    let count = (images * places) as f64;
    total.iter_mut().for_each(|sum| *sum /= count);
    sums.truncate(d * d);
    sums
}

/// The patches of an image at all places, each a column: `(d, places)`.
#[inline(always)]
fn patches_of<T: Element>(x: &[T], [channels, height, width]: [usize; 3], size: usize, patches: &mut [T]) {
    let (rows, cols) = (height - size + 1, width - size + 1);
    for (pixel, patches) in patches.chunks_exact_mut(rows * cols).enumerate() {
        let (channel, i, j) = (pixel / (size * size), pixel / size % size, pixel % size);
        let plane = &x[channel * height * width..][..height * width];
        for (row, to) in plane.chunks_exact(width).skip(i).zip(patches.chunks_exact_mut(cols)) {
            to.copy_from_slice(&row[j..][..cols]);
        }
    }
    debug_assert_eq!(patches.len(), channels * size * size * rows * cols, "all places of all of a patch's pixels");
}

/// The filters that whiten patches of this covariance, `(d, d)`, by rising eigenvalue.
#[cfg(feature = "blas")]
fn filters(covariance: Vec<f64>, d: usize) -> Result<Vec<f64>> {
    use ndarray::Array2;
    use ndarray_linalg::{Eigh, UPLO};

    // LAPACK runs on OpenBLAS too: with the kernels and the one thread that `blas` chooses.
    crate::blas::setup();
    let covariance = Array2::from_shape_vec((d, d), covariance).expect("it is d x d");
    let (values, vectors) = covariance.eigh(UPLO::Upper).map_err(|e| {
        let problem = format!("LAPACK finds no eigenvectors of the patches' covariance: {e}");
        Error::invalid("whitening", problem, "look for images that are not finite")
    })?;
    let filters = vectors.columns().into_iter().zip(&values);
    Ok(filters.flat_map(|(vector, value)| vector.mapv(|v| v / (value + EPSILON).sqrt()).to_vec()).collect())
}

#[cfg(not(feature = "blas"))]
fn filters(_: Vec<f64>, _: usize) -> Result<Vec<f64>> {
    let problem = "it needs LAPACK, which this build is without";
    Err(Error::invalid("whitening", problem, "build with openblas-system, or begin with another layer"))
}
