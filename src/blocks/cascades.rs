//! Level 3. The cascades of the seed over arrays: a product and what usually follows it, in one call.
//!
//! For those who compose a model by hand, as CS231n's `layer_utils.py` is used: each `*_forward` returns the output and a
//! cache, each `*_backward` takes that cache and returns the gradients. They are [`Block`]s underneath, with the block's
//! speed, but each call makes its output and its cache anew, and the cache owns copies of x and w. A training loop that
//! should allocate nothing keeps a [`BlockState`] for each block instead, as a network does.
//!
//! ```
//! use gemmnet::blocks::cascades::{conv_relu_pool_backward, conv_relu_pool_forward};
//! use gemmnet::shape::{Conv2d, Padding, Pool2d};
//! use ndarray::{Array1, Array4};
//!
//! let (x, w, b) = (Array4::<f32>::ones((2, 3, 8, 8)), Array4::ones((4, 3, 3, 3)), Array1::zeros(4));
//! let conv = Conv2d { padding: Padding::Same, ..Conv2d::default() };
//! let (out, cache) = conv_relu_pool_forward(x.view(), w.view(), b.view(), &conv, &Pool2d::square(2))?;
//! assert_eq!(out.dim(), (2, 4, 4, 4));
//! let grads = conv_relu_pool_backward(out.view(), cache)?;
//! assert_eq!(grads.dw.dim(), w.dim());
//! # Ok::<(), gemmnet::Error>(())
//! ```

use ndarray::{Array, Array1, ArrayView, ArrayView1, ArrayView2, ArrayView4, Dimension, Ix1, Ix2, Ix4};

use super::block::{Block, BlockParts, BlockState, Core, Pass, Pool, Weights};
use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::ops::Mode;
use crate::ops::activation::Activation;
use crate::ops::affine::AffineGrads;
use crate::ops::batchnorm::{BatchNorm, Statistics};
use crate::ops::conv::Conv2dGrads;
use crate::ops::dropout::DropoutKey;
use crate::shape::{Conv2d, Pool2d};
use crate::workspace::Workspace;

/// What the backward pass of a cascade needs of its forward pass. `D` is the dimension of x and w: `Ix2` for affine
/// cascades, `Ix4` for convolutions.
#[derive(Debug)]
pub struct Cache<T, D: Dimension> {
    block: Block,
    state: BlockState<T>,
    x: Array<T, D>,
    w: Array<T, D>,
    b: Array1<T>,
    gamma: Array1<T>,
    beta: Array1<T>,
    pass: Pass,
}

/// [`Cache`] of a cascade with batchnorm.
#[derive(Debug)]
pub struct NormCache<T, D: Dimension>(Cache<T, D>);

/// Gradients of a cascade with batchnorm; `D` as for [`Cache`].
#[derive(Clone, Debug, PartialEq)]
pub struct NormGrads<T, D: Dimension> {
    /// Gradient of the input, in its shape.
    pub dx: Array<T, D>,
    /// Gradient of the weights, in their shape.
    pub dw: Array<T, D>,
    /// Gradient of the bias, per channel: 0 but for rounding, since batchnorm takes the bias out again.
    pub db: Array1<T>,
    /// Gradient of batchnorm's scale, per channel.
    pub dgamma: Array1<T>,
    /// Gradient of batchnorm's shift, per channel.
    pub dbeta: Array1<T>,
}

/// What batchnorm takes and updates.
struct Norm<'a, T> {
    gamma: ArrayView1<'a, T>,
    beta: ArrayView1<'a, T>,
    running: &'a mut Statistics<T>,
}

/// Training without dropout, which alone reads the key.
const TRAIN: Pass = Pass::Train(DropoutKey { seed: 0, step: 0, layer: 0 });

fn pass(mode: Mode) -> Pass {
    match mode {
        Mode::Train => TRAIN,
        Mode::Test => Pass::Test,
    }
}

/// The parts of every affine cascade.
fn affine<T>(w: &ArrayView2<'_, T>) -> BlockParts {
    let core = Some(Core::Affine { outputs: w.ncols() });
    BlockParts { core, bias: true, activation: Some(Activation::Relu), ..BlockParts::default() }
}

/// The parts of every convolutional cascade.
fn conv2d<T>(w: &ArrayView4<'_, T>, conv: &Conv2d) -> BlockParts {
    let (filters, _, kh, kw) = w.dim();
    let core = Some(Core::Conv { filters, kernel: (kh, kw), conv: *conv });
    BlockParts { core, bias: true, activation: Some(Activation::Relu), ..BlockParts::default() }
}

/// The forward pass of every cascade.
fn forward<T: Element, D: Dimension>(
    op: &'static str,
    parts: BlockParts,
    x: ArrayView<'_, T, D>,
    w: ArrayView<'_, T, D>,
    b: ArrayView1<'_, T>,
    norm: Option<Norm<'_, T>>,
    pass: Pass,
) -> Result<(Array<T, D>, Cache<T, D>)> {
    let mut input = [1; 3];
    input[..x.ndim() - 1].copy_from_slice(&x.shape()[1..]);
    let (images, block) = (x.shape()[0], Block::new(parts, input)?);
    let shapes = block.weight_shapes();
    check_shape(op, "w", w.shape(), &shapes.w)?;
    check_shape(op, "b", b.shape(), &shapes.b)?;
    let (mut no_mean, mut no_var) = (Vec::new(), Vec::new());
    let (gamma, beta, mean, var) = match norm {
        Some(Norm { gamma, beta, running: Statistics { mean, var } }) => {
            check_shape(op, "gamma", gamma.shape(), &shapes.gamma)?;
            check_shape(op, "beta", beta.shape(), &shapes.beta)?;
            check_shape(op, "running mean", &[mean.len()], &shapes.gamma)?;
            check_shape(op, "running variance", &[var.len()], &shapes.gamma)?;
            if images == 0 && pass != Pass::Test {
                return Err(Error::invalid(op, "a batch of 0 images has no statistics", "give at least one image"));
            }
            (owned(gamma), owned(beta), mean, var)
        }
        None => (Array1::default(0), Array1::default(0), &mut no_mean, &mut no_var),
    };
    let mut cache = Cache { block, state: BlockState::new(), x: owned(x), w: owned(w), b: owned(b), gamma, beta, pass };
    let Cache { block, state, x, w, b, gamma, beta, .. } = &mut cache;
    block.forward(images, slice(x), weights(w, b, gamma, beta), (mean, var), pass, state, &mut Workspace::new());
    let mut dim = x.raw_dim();
    dim.slice_mut()[1..].copy_from_slice(&block.output()[..x.ndim() - 1]);
    let out = Array::from_shape_vec(dim, state.out(block, images).to_vec()).expect("as many values as the shape has");
    Ok((out, cache))
}

/// The backward pass of every cascade.
fn backward<T: Element, D: Dimension>(
    op: &'static str,
    dout: ArrayView<'_, T, D>,
    cache: Cache<T, D>,
) -> Result<NormGrads<T, D>> {
    let Cache { block, mut state, x, w, b, gamma, beta, pass } = cache;
    if pass == Pass::Test {
        return Err(Error::invalid(op, "the cache is of a forward pass in test mode", "run it in `Mode::Train`"));
    }
    let images = x.shape()[0];
    check_shape(op, "dout", dout.shape(), &[&[images], &block.output()[..x.ndim() - 1]].concat())?;
    let mut grads = NormGrads {
        dx: Array::zeros(x.raw_dim()),
        dw: Array::zeros(w.raw_dim()),
        db: Array1::zeros(b.len()),
        dgamma: Array1::zeros(gamma.len()),
        dbeta: Array1::zeros(beta.len()),
    };
    let NormGrads { dx, dw, db, dgamma, dbeta } = &mut grads;
    let into = Weights { w: slice_mut(dw), b: slice_mut(db), gamma: slice_mut(dgamma), beta: slice_mut(dbeta) };
    let (mut dout, dx, weights) = (owned(dout), Some(slice_mut(dx)), weights(&w, &b, &gamma, &beta));
    block.backward(images, slice(&x), weights, slice_mut(&mut dout), dx, into, &mut state, &mut Workspace::new());
    Ok(grads)
}

fn weights<'a, T, D: Dimension>(
    w: &'a Array<T, D>,
    b: &'a Array<T, Ix1>,
    gamma: &'a Array<T, Ix1>,
    beta: &'a Array<T, Ix1>,
) -> Weights<&'a [T]> {
    Weights { w: slice(w), b: slice(b), gamma: slice(gamma), beta: slice(beta) }
}

/// A copy in standard layout.
fn owned<T: Element, D: Dimension>(values: ArrayView<'_, T, D>) -> Array<T, D> {
    values.as_standard_layout().into_owned()
}

fn slice<T, D: Dimension>(values: &Array<T, D>) -> &[T] {
    values.as_slice().expect("made in standard layout")
}

fn slice_mut<T, D: Dimension>(values: &mut Array<T, D>) -> &mut [T] {
    values.as_slice_mut().expect("made in standard layout")
}

/// `relu(x w + b)`: x `(N, D)`, w `(D, M)`, b `(M)`; result `(N, M)`.
///
/// # Errors
/// [`Error::Shape`] if the shapes do not fit together.
pub fn affine_relu_forward<T: Element>(
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
    b: ArrayView1<'_, T>,
) -> Result<(Array<T, Ix2>, Cache<T, Ix2>)> {
    forward("affine_relu", affine(&w), x, w, b, None, TRAIN)
}

/// Gradients of [`affine_relu_forward`] for dout `(N, M)`.
///
/// # Errors
/// [`Error::Shape`] if `dout` does not have the output's shape.
pub fn affine_relu_backward<T: Element>(dout: ArrayView2<'_, T>, cache: Cache<T, Ix2>) -> Result<AffineGrads<T>> {
    let NormGrads { dx, dw, db, .. } = backward("affine_relu backward", dout, cache)?;
    Ok(AffineGrads { dx, dw, db })
}

/// `relu(batchnorm(x w + b))`: shapes as in [`affine_relu_forward`], gamma and beta `(M)`. Training updates `running`,
/// test mode reads it, both as [`crate::ops::batchnorm::batchnorm_forward`] does.
///
/// # Errors
/// [`Error::Shape`] if the shapes do not fit together; [`Error::Invalid`] for an empty batch in training, or constants of
/// batchnorm that make no sense.
pub fn affine_bn_relu_forward<T: Element>(
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
    b: ArrayView1<'_, T>,
    gamma: ArrayView1<'_, T>,
    beta: ArrayView1<'_, T>,
    running: &mut Statistics<T>,
    mode: Mode,
    norm: &BatchNorm,
) -> Result<(Array<T, Ix2>, NormCache<T, Ix2>)> {
    let parts = BlockParts { norm: Some(*norm), ..affine(&w) };
    let norm = Some(Norm { gamma, beta, running });
    let (out, cache) = forward("affine_bn_relu", parts, x, w, b, norm, pass(mode))?;
    Ok((out, NormCache(cache)))
}

/// Gradients of [`affine_bn_relu_forward`] in training mode for dout `(N, M)`.
///
/// # Errors
/// [`Error::Shape`] if `dout` does not have the output's shape; [`Error::Invalid`] after test mode.
pub fn affine_bn_relu_backward<T: Element>(
    dout: ArrayView2<'_, T>,
    cache: NormCache<T, Ix2>,
) -> Result<NormGrads<T, Ix2>> {
    backward("affine_bn_relu backward", dout, cache.0)
}

/// `dropout(relu(batchnorm(x w + b)))`: as [`affine_bn_relu_forward`], then each value is dropped with probability `p` by
/// the mask of `key`. In test mode there is no dropout.
///
/// # Errors
/// Those of [`affine_bn_relu_forward`], and [`Error::Invalid`] unless `0 <= p < 1`.
pub fn affine_bn_relu_dropout_forward<T: Element>(
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
    b: ArrayView1<'_, T>,
    gamma: ArrayView1<'_, T>,
    beta: ArrayView1<'_, T>,
    running: &mut Statistics<T>,
    mode: Mode,
    norm: &BatchNorm,
    p: f64,
    key: DropoutKey,
) -> Result<(Array<T, Ix2>, NormCache<T, Ix2>)> {
    let parts = BlockParts { norm: Some(*norm), dropout: Some(p), ..affine(&w) };
    let norm = Some(Norm { gamma, beta, running });
    let pass = if mode == Mode::Train { Pass::Train(key) } else { Pass::Test };
    let (out, cache) = forward("affine_bn_relu_dropout", parts, x, w, b, norm, pass)?;
    Ok((out, NormCache(cache)))
}

/// Gradients of [`affine_bn_relu_dropout_forward`] in training mode for dout `(N, M)`.
///
/// # Errors
/// Those of [`affine_bn_relu_backward`].
pub fn affine_bn_relu_dropout_backward<T: Element>(
    dout: ArrayView2<'_, T>,
    cache: NormCache<T, Ix2>,
) -> Result<NormGrads<T, Ix2>> {
    backward("affine_bn_relu_dropout backward", dout, cache.0)
}

/// `relu(conv2d(x, w) + b)`: x `(N, C, H, W)`, w `(F, C / groups, KH, KW)`, b `(F)`; result `(N, F, H', W')`.
///
/// # Errors
/// Those of [`crate::ops::conv::conv2d_forward`].
pub fn conv_relu_forward<T: Element>(
    x: ArrayView4<'_, T>,
    w: ArrayView4<'_, T>,
    b: ArrayView1<'_, T>,
    conv: &Conv2d,
) -> Result<(Array<T, Ix4>, Cache<T, Ix4>)> {
    forward("conv_relu", conv2d(&w, conv), x, w, b, None, TRAIN)
}

/// Gradients of [`conv_relu_forward`] for dout `(N, F, H', W')`.
///
/// # Errors
/// [`Error::Shape`] if `dout` does not have the output's shape.
pub fn conv_relu_backward<T: Element>(dout: ArrayView4<'_, T>, cache: Cache<T, Ix4>) -> Result<Conv2dGrads<T>> {
    let NormGrads { dx, dw, db, .. } = backward("conv_relu backward", dout, cache)?;
    Ok(Conv2dGrads { dx, dw, db })
}

/// `max_pool2d(relu(conv2d(x, w) + b))`: shapes as in [`conv_relu_forward`], the result pooled.
///
/// # Errors
/// Those of [`conv_relu_forward`], and of [`crate::ops::pool::max_pool2d_forward`].
pub fn conv_relu_pool_forward<T: Element>(
    x: ArrayView4<'_, T>,
    w: ArrayView4<'_, T>,
    b: ArrayView1<'_, T>,
    conv: &Conv2d,
    pool: &Pool2d,
) -> Result<(Array<T, Ix4>, Cache<T, Ix4>)> {
    let parts = BlockParts { pool: Some(Pool::Max(*pool)), ..conv2d(&w, conv) };
    forward("conv_relu_pool", parts, x, w, b, None, TRAIN)
}

/// Gradients of [`conv_relu_pool_forward`] for dout in the output's shape.
///
/// # Errors
/// [`Error::Shape`] if `dout` does not have the output's shape.
pub fn conv_relu_pool_backward<T: Element>(dout: ArrayView4<'_, T>, cache: Cache<T, Ix4>) -> Result<Conv2dGrads<T>> {
    let NormGrads { dx, dw, db, .. } = backward("conv_relu_pool backward", dout, cache)?;
    Ok(Conv2dGrads { dx, dw, db })
}

/// `relu(batchnorm(conv2d(x, w) + b))`: shapes as in [`conv_relu_forward`], gamma and beta `(F)`. Training updates
/// `running`, test mode reads it, both as [`crate::ops::batchnorm::spatial_batchnorm_forward`] does.
///
/// # Errors
/// Those of [`conv_relu_forward`], and [`Error::Invalid`] for an empty batch in training, or constants of batchnorm that
/// make no sense.
pub fn conv_bn_relu_forward<T: Element>(
    x: ArrayView4<'_, T>,
    w: ArrayView4<'_, T>,
    b: ArrayView1<'_, T>,
    gamma: ArrayView1<'_, T>,
    beta: ArrayView1<'_, T>,
    conv: &Conv2d,
    running: &mut Statistics<T>,
    mode: Mode,
    norm: &BatchNorm,
) -> Result<(Array<T, Ix4>, NormCache<T, Ix4>)> {
    let parts = BlockParts { norm: Some(*norm), ..conv2d(&w, conv) };
    let norm = Some(Norm { gamma, beta, running });
    let (out, cache) = forward("conv_bn_relu", parts, x, w, b, norm, pass(mode))?;
    Ok((out, NormCache(cache)))
}

/// Gradients of [`conv_bn_relu_forward`] in training mode for dout `(N, F, H', W')`.
///
/// # Errors
/// [`Error::Shape`] if `dout` does not have the output's shape; [`Error::Invalid`] after test mode.
pub fn conv_bn_relu_backward<T: Element>(
    dout: ArrayView4<'_, T>,
    cache: NormCache<T, Ix4>,
) -> Result<NormGrads<T, Ix4>> {
    backward("conv_bn_relu backward", dout, cache.0)
}

/// `max_pool2d(relu(batchnorm(conv2d(x, w) + b)))`: as [`conv_bn_relu_forward`], the result pooled.
///
/// # Errors
/// Those of [`conv_bn_relu_forward`], and of [`crate::ops::pool::max_pool2d_forward`].
pub fn conv_bn_relu_pool_forward<T: Element>(
    x: ArrayView4<'_, T>,
    w: ArrayView4<'_, T>,
    b: ArrayView1<'_, T>,
    gamma: ArrayView1<'_, T>,
    beta: ArrayView1<'_, T>,
    conv: &Conv2d,
    running: &mut Statistics<T>,
    mode: Mode,
    norm: &BatchNorm,
    pool: &Pool2d,
) -> Result<(Array<T, Ix4>, NormCache<T, Ix4>)> {
    let parts = BlockParts { norm: Some(*norm), pool: Some(Pool::Max(*pool)), ..conv2d(&w, conv) };
    let norm = Some(Norm { gamma, beta, running });
    let (out, cache) = forward("conv_bn_relu_pool", parts, x, w, b, norm, pass(mode))?;
    Ok((out, NormCache(cache)))
}

/// Gradients of [`conv_bn_relu_pool_forward`] in training mode for dout in the output's shape.
///
/// # Errors
/// Those of [`conv_bn_relu_backward`].
pub fn conv_bn_relu_pool_backward<T: Element>(
    dout: ArrayView4<'_, T>,
    cache: NormCache<T, Ix4>,
) -> Result<NormGrads<T, Ix4>> {
    backward("conv_bn_relu_pool backward", dout, cache.0)
}
