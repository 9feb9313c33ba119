//! Level 3. Fast convolution.
//!
//! A [`ConvPlan`] decides once how a convolution is computed; [`conv2d_forward_into`] and [`conv2d_backward_into`] run it
//! over any number of images. [`conv2d_forward`] and [`conv2d_backward`] do all of it for arrays.
//!
//! # Reading it
//! Forward: here, `plan`, then the algorithm. Backward: here, `backward` (the driver, the same for all), then the
//! algorithm. These are
//!
//! | algorithm | file | with |
//! | --- | --- | --- |
//! | im2col | `tiles`: products of columns and filters | [`im2col`]: the columns |
//! | the same, forward in `f32` | `direct`: products without columns | `direct/padded`: pixels; `direct/product`: the kernel |
//! | Winograd | [`winograd`]: groups of images | `winograd/group`: tiles; `winograd/order`: which take part in which product; `winograd/pixels`: planes as vectors of channels; `winograd/maps`: the maps along an axis; `winograd/transforms`: both axes of a tile; `winograd/products` |
//! | depthwise | [`depthwise`]: plane by plane | [`im2col`]: strides undone |
//!
//! `rows` is where products come out and `dout` comes in, so that blocks can fuse what follows; `slots` adds up the
//! gradients of filters over the images of a batch.
//!
//! # The same bits
//! for an image whatever the batch it is in, and for a gradient whatever the number of threads: see `plan` and `slots`.

pub mod depthwise;
pub mod im2col;
pub mod winograd;

mod backward;
mod direct;
mod plan;
mod rows;
mod slots;
mod tiles;

#[cfg(test)]
mod tests;

use ndarray::{Array1, Array4, ArrayView1, ArrayView4};

use crate::element::Element;
use crate::error::{Result, check_shape};
use crate::ops::layout::{Formats, row_major, slice_mut};
use crate::shape::{Algorithm, Conv2d, Conv2dShape};
use crate::simd::{Write, vectorized};
use crate::workspace::Workspace;

pub(crate) use backward::backward;
pub use plan::{ConvPlan, Filters, Prepared};
pub(crate) use rows::{Outputs, PlaneRows};

/// Gradients of a convolution.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv2dGrads<T> {
    /// Gradient of the images, `(N, C, H, W)`.
    pub dx: Array4<T>,
    /// Gradient of the filters, `(F, C / groups, KH, KW)`.
    pub dw: Array4<T>,
    /// Gradient of the bias, `(F)`.
    pub db: Array1<T>,
}

/// What a convolution was computed from.
#[derive(Clone, Copy, Debug)]
pub struct ConvInput<'a, T> {
    /// Images `N`.
    pub images: usize,
    /// `[N, C, H, W]`
    pub x: &'a [T],
    /// `[F, C / groups, KH, KW]`
    pub w: &'a [T],
}

/// Where the gradients of a convolution go: all of them are set, not added to, and what is `None` costs nothing.
#[derive(Debug)]
pub struct ConvGradsMut<'a, T> {
    /// `[N, C, H, W]`; a third of the work: leave it out for the first layer of a network.
    pub dx: Option<&'a mut [T]>,
    /// `[F, C / groups, KH, KW]`; a third of the work: leave it out for frozen filters.
    pub dw: Option<&'a mut [T]>,
    /// `[F]`
    pub db: Option<&'a mut [T]>,
}

/// `w * x` of `images` images x `[N, C, H, W]`, handed over while it is in the cache: `finish(filter, product, out, cells)`
/// gets rows of one plane of the product, without bias, which it may change, and sets the rows of `out` and `cells` that
/// are made of them. The rows of a call begin at a multiple of the plan's bands.
///
/// Where the plan is for x or an output in blocks of channels, x lies so, and `finish` gets rows of the block that begins with
/// `filter`.
///
/// # Panics
/// If a slice has not the length of its shape, or the plan or the filters are for something else.
pub(crate) fn forward<T: Element>(
    plan: &ConvPlan,
    images: usize,
    x: &[T],
    filters: Filters<'_, T>,
    outputs: Outputs<'_, T>,
    finish: impl Fn(usize, &mut [T], &mut [T], &mut [u8]) + Sync + Send,
    ws: &mut Workspace,
) {
    plan.check_images(images, x);
    outputs.check(plan, images);
    let w = filters.values(plan);
    if images == 0 {
        return;
    }
    match plan.algorithm {
        Algorithm::Winograd => winograd::forward(plan, images, x, filters, outputs, finish, ws),
        Algorithm::Depthwise => depthwise::forward(plan, images, x, w, outputs, finish, ws),
        Algorithm::Im2col if plan.is_direct() => direct::forward(plan, images, x, filters, outputs, finish, ws),
        Algorithm::Auto | Algorithm::Im2col => tiles::forward(plan, images, x, w, outputs, finish, ws),
    }
}

/// `out = w * x + b` into the caller's buffer. Shapes: x `[N, C, H, W]`, w `[F, C / G, KH, KW]`, b `[F]`,
/// out `[N, F, H', W']`, all row-major. Allocates nothing once `ws` has grown.
///
/// An output that stays in the caches is multiplied in its place; one that does not is written past them.
///
/// # Panics
/// If a slice has not the length of its shape, or the plan or the filters are for something else.
pub fn conv2d_forward_into<T: Element>(
    plan: &ConvPlan,
    images: usize,
    x: &[T],
    filters: Filters<'_, T>,
    b: Option<&[T]>,
    out: &mut [T],
    ws: &mut Workspace,
) {
    assert!(b.is_none_or(|b| b.len() == plan.shape.filters), "b has one element per filter");
    assert!(b.is_none() || plan.formats == Formats::default(), "a bias is added plane by plane");
    let write = Write::of::<T>(out.len());
    if plan.algorithm == Algorithm::Im2col && write == Write::Cached && tiles::has_place(plan, images) {
        plan.check_images(images, x);
        Outputs::plain(plan, out).check(plan, images);
        let add_bias = |filter: usize, out: &mut [T]| {
            // Read once: within the loop the compiler fears that it changes with the output.
            let Some(bias) = b.map(|b| b[filter]) else { return };
            vectorized!(out.iter_mut().for_each(
                #[inline(always)]
                |out| *out += bias
            ));
        };
        return tiles::forward_in_place(plan, x, filters.values(plan), out, add_bias, ws);
    }
    let add_bias = |filter: usize, product: &mut [T], out: &mut [T], _: &mut [u8]| {
        let b = b.map_or(T::zero(), |b| b[filter]);
        vectorized!(write.map(
            out,
            product,
            product,
            #[inline(always)]
            |product, _| product + b
        ));
    };
    forward(plan, images, x, filters, Outputs::plain(plan, out), add_bias, ws);
}

/// Gradients of [`conv2d_forward_into`] for `dout` `[N, F, H', W']`.
///
/// # Panics
/// If a slice has not the length of its shape, or the plan is for another type of element.
pub fn conv2d_backward_into<T: Element>(
    plan: &ConvPlan,
    dout: &[T],
    input: ConvInput<'_, T>,
    grads: ConvGradsMut<'_, T>,
    ws: &mut Workspace,
) {
    let planes = input.images * plan.formats.output.planes(plan.shape.filters);
    assert_eq!(
        dout.len(),
        planes * plan.shape.out_plane(),
        "dout has the length of {:?}",
        plan.shape.with_images(input.images).out()
    );
    let source = |at: PlaneRows, rows: &mut [T]| {
        rows.copy_from_slice(&dout[at.index(plan)..][..rows.len()]);
    };
    backward(plan, input, source, grads, ws);
}

/// `out[n, f, i, j] = b[f] + sum over c, ki, kj of w[f, c, ki, kj] x[n, c, i s - p + ki d, j s - p + kj d]`
///
/// x `(N, C, H, W)`, w `(F, C / groups, KH, KW)`, b `(F)`; result `(N, F, H', W')`. The twin of
/// [`crate::naive::conv2d_forward`].
///
/// # Errors
/// As [`Conv2dShape::new`] and [`ConvPlan::new`], and [`crate::Error::Shape`] if `b` does not have one element per filter.
pub fn conv2d_forward<T: Element>(
    x: ArrayView4<'_, T>,
    w: ArrayView4<'_, T>,
    b: Option<ArrayView1<'_, T>>,
    conv: &Conv2d,
) -> Result<Array4<T>> {
    let shape = Conv2dShape::new(x.dim().into(), w.dim().into(), conv)?;
    let plan = ConvPlan::new::<T>(&shape)?;
    if let Some(b) = &b {
        check_shape("conv2d", "b", b.shape(), &[shape.filters])?;
    }
    let (x, w, b) = (row_major(x), row_major(w), b.map(row_major));
    let mut out = Array4::zeros(shape.out());
    let (filters, ws) = (Filters::Plain(&w), &mut Workspace::new());
    conv2d_forward_into(&plan, shape.images, &x, filters, b.as_deref(), slice_mut(&mut out), ws);
    Ok(out)
}

/// Gradients of [`conv2d_forward`] with respect to x, w and b, for `dout` `(N, F, H', W')`. The twin of
/// [`crate::naive::conv2d_backward`].
///
/// # Errors
/// As [`conv2d_forward`], and [`crate::Error::Shape`] if `dout` does not have the output's shape.
pub fn conv2d_backward<T: Element>(
    dout: ArrayView4<'_, T>,
    x: ArrayView4<'_, T>,
    w: ArrayView4<'_, T>,
    conv: &Conv2d,
) -> Result<Conv2dGrads<T>> {
    let shape = Conv2dShape::new(x.dim().into(), w.dim().into(), conv)?;
    let plan = ConvPlan::new::<T>(&shape)?;
    check_shape("conv2d backward", "dout", dout.shape(), &shape.out())?;
    let (dout, x, w) = (row_major(dout), row_major(x), row_major(w));
    let (mut dx, mut dw, mut db) = (Array4::zeros(shape.x()), Array4::zeros(shape.w()), Array1::zeros(shape.filters));
    let input = ConvInput { images: shape.images, x: &x, w: &w };
    let grads =
        ConvGradsMut { dx: Some(slice_mut(&mut dx)), dw: Some(slice_mut(&mut dw)), db: Some(slice_mut(&mut db)) };
    conv2d_backward_into(&plan, &dout, input, grads, &mut Workspace::new());
    Ok(Conv2dGrads { dx, dw, db })
}
