//! Level 4. What follows a product within a block: shift and scale per channel, activation, pooling; plane by plane,
//! while the plane is in the cache.

use crate::element::Element;
use crate::error::Result;
use crate::ops::activation::Activation;
use crate::ops::batchnorm::inverse_std;
use crate::ops::pool::{
    avg_pool_plane, avg_pool_plane_backward, max_pool_plane, max_pool_plane_backward, max_pool_tiles,
    max_pool_tiles_backward,
};
use crate::shape::{Pool2d, Pool2dShape};
use crate::simd::{Write, sum};

/// Pooling at the end of a block; sizes for one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pooling {
    Max(Pool2dShape),
    Avg(Pool2dShape),
    /// Over the whole plane.
    Global,
}

/// `z = (y - center) * scale + shift`: a bias, or a normalisation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChannelMap<T> {
    pub(crate) center: T,
    pub(crate) scale: T,
    pub(crate) shift: T,
}

impl<T: Element> ChannelMap<T> {
    /// A bias, which may be 0.
    pub(crate) fn shift(shift: T) -> Self {
        ChannelMap { center: T::zero(), scale: T::one(), shift }
    }

    /// Batchnorm: `z = gamma (y - mean) / sqrt(var + eps) + beta`.
    #[inline(always)]
    pub(crate) fn batchnorm(mean: T, var: T, gamma: T, beta: T, eps: f64) -> Self {
        ChannelMap { center: mean, scale: gamma * inverse_std(var, eps), shift: beta }
    }

    #[inline(always)]
    fn z(self, y: T) -> T {
        (y - self.center) * self.scale + self.shift
    }
}

/// Activation and pooling of planes of `rows x cols` pixels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tail {
    activation: Option<Activation>,
    pool: Option<Pooling>,
    rows: usize,
    cols: usize,
}

/// The cell of a window whose maximum ReLU cut off: the index of no cell, so nothing flows back.
const DEAD: u8 = u8::MAX;

impl Tail {
    pub(crate) fn new(activation: Option<Activation>, pool: Option<Pooling>, rows: usize, cols: usize) -> Self {
        Tail { activation, pool, rows, cols }
    }

    pub(crate) fn max_pool(pool: &Pool2d, [c, h, w]: [usize; 3]) -> Result<Pooling> {
        let shape = Pool2dShape::new([1, c, h, w], pool)?;
        shape.check_max()?;
        Ok(Pooling::Max(shape))
    }

    /// Rows and columns of an output plane.
    pub(crate) fn out_size(&self) -> (usize, usize) {
        match self.pool {
            None => (self.rows, self.cols),
            Some(Pooling::Max(pool) | Pooling::Avg(pool)) => (pool.rows.output, pool.cols.output),
            Some(Pooling::Global) => (1, 1),
        }
    }

    pub(crate) fn activation(&self) -> Option<Activation> {
        self.activation
    }

    pub(super) fn pooling(&self) -> Option<&Pooling> {
        self.pool.as_ref()
    }

    pub(crate) fn has_pool(&self) -> bool {
        self.pool.is_some()
    }

    /// Whether argmax cells are kept for backward.
    pub(crate) fn keeps_cells(&self) -> bool {
        matches!(self.pool, Some(Pooling::Max(_)))
    }

    /// If a plane can be finished in bands of rows: what their height must be a multiple of.
    pub(crate) fn band_rows(&self) -> Option<usize> {
        match self.pool {
            None => Some(1),
            Some(Pooling::Max(pool)) if pool.tiles() => Some(pool.rows.window),
            _ => None,
        }
    }

    /// ReLU and max pooling commute: pooling first leaves a quarter of the activations to do, and the cell of a dead
    /// window says all that backward must know.
    pub(super) fn pools_first(&self) -> bool {
        self.keeps_cells() && self.activation == Some(Activation::Relu)
    }

    /// Whether backward needs `z` again, and so `y`; otherwise the output (and the cells) tell the slope.
    pub(crate) fn backward_needs_y(&self) -> bool {
        match (self.activation, self.pool) {
            (None, _) => false,
            (Some(activation), None) => !activation.kinks(),
            (Some(_), Some(_)) => !self.pools_first(),
        }
    }

    /// Finishes a plane or a band of one: `z` holds `y` and is used up; `cell` is empty unless cells are kept.
    #[inline(always)]
    pub(crate) fn finish<T: Element>(&self, map: ChannelMap<T>, z: &mut [T], out: &mut [T], cell: &mut [u8]) {
        if self.pool.is_none() {
            return self.map_activate(map, z, out, Write::Cached);
        }
        self.before_pool(map, z);
        self.pool(z, out, cell);
    }

    /// The first part of [`Tail::finish`], of any number of planes.
    #[inline(always)]
    pub(crate) fn before_pool<T: Element>(&self, map: ChannelMap<T>, z: &mut [T]) {
        for z in z.iter_mut() {
            *z = map.z(*z);
        }
        self.activate_before_pool(z);
    }

    /// [`Tail::before_pool`] of `y`, into `z`.
    #[inline(always)]
    pub(crate) fn map_before_pool<T: Element>(&self, map: ChannelMap<T>, y: &[T], z: &mut [T]) {
        for (z, &y) in z.iter_mut().zip(y) {
            *z = map.z(y);
        }
        self.activate_before_pool(z);
    }

    /// The activation, but where it comes after the pool.
    #[inline(always)]
    pub(super) fn activation_before_pool(&self) -> Option<Activation> {
        self.activation.filter(|_| !self.pools_first())
    }

    /// Applies [`Tail::activation_before_pool`].
    #[inline(always)]
    pub(super) fn activate_before_pool<T: Element>(&self, z: &mut [T]) {
        if let Some(activation) = self.activation_before_pool() {
            activate(activation, z);
        }
    }

    /// The second part of [`Tail::finish`]; a copy where nothing is pooled.
    #[inline(always)]
    pub(crate) fn pool<T: Element>(&self, z: &[T], out: &mut [T], cell: &mut [u8]) {
        match &self.pool {
            None => out.copy_from_slice(z),
            Some(Pooling::Max(pool)) if pool.tiles() => {
                max_pool_tiles((pool.rows.window, pool.cols.window), self.cols, z, out, cell);
            }
            Some(Pooling::Max(pool)) => max_pool_plane(pool, z, out, cell),
            Some(Pooling::Avg(pool)) => avg_pool_plane(pool, z, out),
            Some(Pooling::Global) => out[0] = sum(z) / T::of(z.len() as f64),
        }
        self.activate_pooled(out, cell);
    }

    /// The activation, if it comes after the pool.
    #[inline(always)]
    pub(super) fn activate_pooled<T: Element>(&self, out: &mut [T], cell: &mut [u8]) {
        if self.pools_first() {
            for (out, cell) in out.iter_mut().zip(cell) {
                *cell = if *out <= T::zero() { DEAD } else { *cell };
                *out = if *out <= T::zero() { T::zero() } else { *out };
            }
        }
    }

    /// `out = activation(map(y))`, what [`Tail::finish`] does without pooling, written as [`Write`] says and where it allows.
    #[inline(always)]
    pub(crate) fn map_activate<T: Element>(&self, map: ChannelMap<T>, y: &[T], out: &mut [T], write: Write) {
        match self.activation {
            None => write.map(
                out,
                y,
                y,
                #[inline(always)]
                |y, _| map.z(y),
            ),
            Some(activation) => activation.specialised(
                #[inline(always)]
                |activation| {
                    write.map(
                        out,
                        y,
                        y,
                        #[inline(always)]
                        |y, _| activation.apply(map.z(y)),
                    );
                },
            ),
        }
    }

    /// `out = activation(z)`.
    #[inline(always)]
    pub(super) fn activate_to<T: Element>(&self, z: &[T], out: &mut [T]) {
        match self.activation {
            None => out.copy_from_slice(z),
            Some(activation) => activation.specialised(
                #[inline(always)]
                |activation| {
                    for (out, &z) in out.iter_mut().zip(z) {
                        *out = activation.apply(z);
                    }
                },
            ),
        }
    }

    /// [`Tail::map_activate`] of one value, where every value has a map of its own.
    #[inline(always)]
    pub(crate) fn map_activate_one<T: Element>(&self, map: ChannelMap<T>, y: T) -> T {
        self.activation.map_or(map.z(y), |activation| activation.apply(map.z(y)))
    }

    /// Slope of the activation where `y` became `out`.
    #[inline(always)]
    pub(crate) fn slope_of<T: Element>(&self, map: ChannelMap<T>, y: T, out: T) -> T {
        match self.activation {
            None => T::one(),
            // out and z have the same sign, unless dropout cleared out, and then the gradient as well
            Some(activation) if activation.kinks() => activation.slope(out),
            Some(activation) => activation.slope(map.z(y)),
        }
    }

    /// Backward of [`Tail::finish`] over a plane or band: sets `dz` from `dout`, `out`, `cell`, and, where
    /// [`Tail::backward_needs_y`], from `y`, which may be empty otherwise. Without a pool, `y` says as much as `out`, which then
    /// need not come from memory.
    #[inline(always)]
    pub(crate) fn backward<T: Element>(
        &self,
        map: ChannelMap<T>,
        dout: &[T],
        out: &[T],
        cell: &[u8],
        y: &[T],
        dz: &mut [T],
    ) {
        match self.activation {
            Some(activation) if self.pool.is_none() && !y.is_empty() => activation.specialised(
                #[inline(always)]
                |activation| {
                    for ((dz, &dout), &y) in dz.iter_mut().zip(dout).zip(y) {
                        *dz = dout * activation.slope(map.z(y));
                    }
                },
            ),
            _ => {
                self.backward_to_slopes(dout, out, cell, dz);
                self.backward_slopes(map, y, dz);
            }
        }
    }

    /// The first part of [`Tail::backward`]: pooling, and slopes that the output tells.
    #[inline(always)]
    pub(crate) fn backward_to_slopes<T: Element>(&self, dout: &[T], out: &[T], cell: &[u8], dz: &mut [T]) {
        match &self.pool {
            None => match self.activation {
                Some(activation) if activation.kinks() => activation.specialised(
                    #[inline(always)]
                    |activation| {
                        // out and z have the same sign
                        for ((dz, &dout), &out) in dz.iter_mut().zip(dout).zip(out) {
                            *dz = dout * activation.slope(out);
                        }
                    },
                ),
                _ => dz.copy_from_slice(dout),
            },
            Some(Pooling::Max(pool)) if pool.tiles() => {
                max_pool_tiles_backward((pool.rows.window, pool.cols.window), self.cols, dout, cell, dz);
            }
            Some(Pooling::Max(pool)) => max_pool_plane_backward(pool, dout, cell, dz),
            Some(Pooling::Avg(pool)) => avg_pool_plane_backward(pool, dout, dz),
            Some(Pooling::Global) => dz.fill(dout[0] / T::of(dz.len() as f64)),
        }
    }

    /// The second part of [`Tail::backward`], of any number of planes: the other slopes.
    #[inline(always)]
    pub(crate) fn backward_slopes<T: Element>(&self, map: ChannelMap<T>, y: &[T], dz: &mut [T]) {
        if let Some(activation) = self.activation
            && self.backward_needs_y()
        {
            activation.specialised(
                #[inline(always)]
                |activation| {
                    for (dz, &y) in dz.iter_mut().zip(y) {
                        *dz *= activation.slope(map.z(y));
                    }
                },
            );
        }
    }
}

#[inline(always)]
fn activate<T: Element>(activation: Activation, z: &mut [T]) {
    activation.specialised(
        #[inline(always)]
        |activation| {
            for z in z.iter_mut() {
                *z = activation.apply(*z);
            }
        },
    );
}
