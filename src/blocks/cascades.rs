//! Level 4. CS231n's cascades over arrays: a product and what usually follows it, in one call.
//!
//! Each is a [`Block`] with the parts that its name lists. `*_forward` returns the output and a cache, `*_backward` takes
//! the cache and returns the gradients. Both make their arrays anew, and the cache owns copies of x and w: a training loop
//! that should allocate nothing keeps a [`BlockState`] for each block instead, as a network does.
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

use ndarray::{Array, Array1, ArrayView, ArrayView1, ArrayView2, ArrayView4, Dimension, Ix2, Ix4};

use super::{Block, BlockGrads, BlockInput, BlockParts, BlockState, Core, Pass, Pool, Weights};
use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::ops::activation::Activation;
use crate::ops::affine::AffineGrads;
use crate::ops::conv::Conv2dGrads;
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
    out: Array<T, D>,
}

impl<T: Element, D: Dimension> Cache<T, D> {
    fn input(&self) -> BlockInput<'_, T> {
        let slice = "cached arrays are in standard layout";
        let [w, b] = [self.w.as_slice(), self.b.as_slice()].map(|array| array.expect(slice));
        let weights = Weights { w, b, gamma: &[][..], beta: &[][..] };
        let x = self.x.as_slice().expect(slice);
        BlockInput { images: self.x.shape()[0], x, weights, prepared: None, running: (&[], &[]) }
    }
}

fn forward<T: Element, D: Dimension>(
    op: &'static str,
    parts: BlockParts,
    x: ArrayView<'_, T, D>,
    w: ArrayView<'_, T, D>,
    b: ArrayView1<'_, T>,
) -> Result<(Array<T, D>, Cache<T, D>)> {
    let parts = BlockParts { bias: true, activation: Some(Activation::Relu), ..parts };
    let mut input = [1; 3];
    input[..x.ndim() - 1].copy_from_slice(&x.shape()[1..]);
    let block = Block::new::<T>(parts, input)?;
    let shapes = block.weight_shapes();
    check_shape(op, "w", w.shape(), &shapes.w)?;
    check_shape(op, "b", b.shape(), &shapes.b)?;
    let mut dim = x.raw_dim();
    dim.slice_mut()[1..].copy_from_slice(&block.output()[..x.ndim() - 1]);
    let standard = |array: ArrayView<'_, T, D>| array.as_standard_layout().into_owned();
    let (x, w, b, mut out) = (standard(x), standard(w), b.as_standard_layout().into_owned(), Array::zeros(dim));
    let mut state = BlockState::new();
    let cache = Cache { block, state: BlockState::new(), x, w, b, out: out.clone() };
    let slice = out.as_slice_mut().expect("freshly made");
    cache.block.forward(&cache.input(), Pass::TRAIN, slice, &mut state, &mut Workspace::new());
    Ok((out.clone(), Cache { state, out, ..cache }))
}

/// Gradients of x, w and b.
type Grads<T, D> = (Array<T, D>, Array<T, D>, Array1<T>);

fn backward<T: Element, D: Dimension>(
    op: &'static str,
    dout: ArrayView<'_, T, D>,
    mut cache: Cache<T, D>,
) -> Result<Grads<T, D>> {
    check_shape(op, "dout", dout.shape(), cache.out.shape())?;
    let mut state = std::mem::take(&mut cache.state);
    let mut dout = dout.as_standard_layout().into_owned();
    let (mut dx, mut dw) = (Array::zeros(cache.x.raw_dim()), Array::zeros(cache.w.raw_dim()));
    let mut db = Array1::zeros(cache.b.len());
    let [dout, x] = [&mut dout, &mut dx].map(|array| array.as_slice_mut().expect("freshly made"));
    let [w, b] = [dw.as_slice_mut(), db.as_slice_mut()].map(|slice| slice.expect("freshly made"));
    let weights = Weights { w, b, gamma: &mut [][..], beta: &mut [][..] };
    let grads = BlockGrads { dout, dx: Some(x), weights };
    let out = cache.out.as_slice().expect("freshly made");
    cache.block.backward(&cache.input(), out, grads, &mut state, &mut Workspace::new());
    Ok((dx, dw, db))
}

fn conv2d<T>(w: &ArrayView4<'_, T>, conv: &Conv2d) -> BlockParts {
    let (filters, _, kh, kw) = w.dim();
    BlockParts { core: Some(Core::Conv { filters, kernel: (kh, kw), conv: *conv }), ..BlockParts::default() }
}

/// Affine, ReLU: x `(N, D)`, w `(D, M)`, b `(M)`; result `(N, M)`.
///
/// # Errors
/// [`crate::Error::Shape`] if the shapes do not fit together.
pub fn affine_relu_forward<T: Element>(
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
    b: ArrayView1<'_, T>,
) -> Result<(Array<T, Ix2>, Cache<T, Ix2>)> {
    let parts = BlockParts { core: Some(Core::Affine { outputs: w.ncols() }), ..BlockParts::default() };
    forward("affine_relu", parts, x, w, b)
}

/// Gradients of [`affine_relu_forward`] for dout `(N, M)`.
///
/// # Errors
/// [`crate::Error::Shape`] if `dout` does not have the output's shape.
pub fn affine_relu_backward<T: Element>(dout: ArrayView2<'_, T>, cache: Cache<T, Ix2>) -> Result<AffineGrads<T>> {
    let (dx, dw, db) = backward("affine_relu backward", dout, cache)?;
    Ok(AffineGrads { dx, dw, db })
}

/// Convolution, ReLU: x `(N, C, H, W)`, w `(F, C / groups, KH, KW)`, b `(F)`; result `(N, F, H', W')`.
///
/// # Errors
/// [`crate::Error::Shape`] or [`crate::Error::Invalid`] if the shapes do not fit together.
pub fn conv_relu_forward<T: Element>(
    x: ArrayView4<'_, T>,
    w: ArrayView4<'_, T>,
    b: ArrayView1<'_, T>,
    conv: &Conv2d,
) -> Result<(Array<T, Ix4>, Cache<T, Ix4>)> {
    forward("conv_relu", conv2d(&w, conv), x, w, b)
}

/// Gradients of [`conv_relu_forward`] for dout `(N, F, H', W')`.
///
/// # Errors
/// [`crate::Error::Shape`] if `dout` does not have the output's shape.
pub fn conv_relu_backward<T: Element>(dout: ArrayView4<'_, T>, cache: Cache<T, Ix4>) -> Result<Conv2dGrads<T>> {
    let (dx, dw, db) = backward("conv_relu backward", dout, cache)?;
    Ok(Conv2dGrads { dx, dw, db })
}

/// Convolution, ReLU, max pooling: x `(N, C, H, W)`, w `(F, C / groups, KH, KW)`, b `(F)`; result `(N, F, H'', W'')`.
///
/// # Errors
/// [`crate::Error::Shape`] or [`crate::Error::Invalid`] if the shapes do not fit together.
pub fn conv_relu_pool_forward<T: Element>(
    x: ArrayView4<'_, T>,
    w: ArrayView4<'_, T>,
    b: ArrayView1<'_, T>,
    conv: &Conv2d,
    pool: &Pool2d,
) -> Result<(Array<T, Ix4>, Cache<T, Ix4>)> {
    forward("conv_relu_pool", BlockParts { pool: Some(Pool::Max(*pool)), ..conv2d(&w, conv) }, x, w, b)
}

/// Gradients of [`conv_relu_pool_forward`] for dout `(N, F, H'', W'')`.
///
/// # Errors
/// [`crate::Error::Shape`] if `dout` does not have the output's shape.
pub fn conv_relu_pool_backward<T: Element>(dout: ArrayView4<'_, T>, cache: Cache<T, Ix4>) -> Result<Conv2dGrads<T>> {
    let (dx, dw, db) = backward("conv_relu_pool backward", dout, cache)?;
    Ok(Conv2dGrads { dx, dw, db })
}
