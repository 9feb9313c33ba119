//! Level 4. What follows a product where channels lie in blocks of [`LANES`]: a pixel is a vector of them.
//!
//! Only `f32` lies so. The map is written with vectors, because the compiler would make one of several pixels instead, and gather
//! their channels.

use pulp::{Simd, WithSimd};

use super::tail::{ChannelMap, Pooling, Tail};
use crate::element::Element;
use crate::ops::pool::{
    avg_pool_block, avg_pool_block_backward, global_avg_block, max_pool_block, max_pool_block_backward,
    max_pool_block_with_cells,
};
use crate::simd::{LANES, arch, vectorized};

/// `z = (y - center) * scale + shift` of every pixel; of `z` itself, if there is no `y`.
struct MapBlock<'a> {
    center: &'a [f32],
    scale: &'a [f32],
    shift: &'a [f32],
    y: Option<&'a [f32]>,
    z: &'a mut [f32],
}

impl WithSimd for MapBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let MapBlock { center, scale, shift, y, z } = self;
        let z = z.as_chunks_mut::<LANES>().0;
        for lane in (0..LANES).step_by(S::F32_LANES) {
            let lanes = lane..lane + S::F32_LANES;
            let [center, scale, shift] = [center, scale, shift].map(
                #[inline(always)]
                |values| S::as_simd_f32s(&values[lanes.clone()]).0[0],
            );
            match y {
                None => {
                    for z in &mut *z {
                        let z = &mut S::as_mut_simd_f32s(&mut z[lanes.clone()]).0[0];
                        *z = map(simd, *z, [center, scale, shift]);
                    }
                }
                Some(y) => {
                    for (z, y) in z.iter_mut().zip(y.as_chunks::<LANES>().0) {
                        let y = S::as_simd_f32s(&y[lanes.clone()]).0[0];
                        S::as_mut_simd_f32s(&mut z[lanes.clone()]).0[0] = map(simd, y, [center, scale, shift]);
                    }
                }
            }
        }
    }
}

/// `(y - center) * scale + shift`
#[inline(always)]
fn map<S: Simd>(simd: S, y: S::f32s, [center, scale, shift]: [S::f32s; 3]) -> S::f32s {
    simd.add_f32s(simd.mul_f32s(simd.sub_f32s(y, center), scale), shift)
}

/// What belongs to the channels of a block, from its first on: as many as there are.
pub(super) fn block_of<T>(of_channels: &[T], first: usize) -> &[T] {
    &of_channels[first..of_channels.len().min(first + LANES)]
}

/// [`ChannelMap`] of each plane of a block: of `y`, or of what is in `z`. Where there is no channel, zeros.
fn map_block<T: Element>(maps: &[ChannelMap<T>], y: Option<&[T]>, z: &mut [T]) {
    let mut lanes = [[T::zero(); LANES]; 3];
    for (lane, map) in maps.iter().enumerate() {
        (lanes[0][lane], lanes[1][lane], lanes[2][lane]) = (map.center, map.scale, map.shift);
    }
    let [center, scale, shift] = lanes.each_ref().map(|lanes| bytemuck::cast_slice(lanes));
    let (y, z) = (y.map(bytemuck::cast_slice), bytemuck::cast_slice_mut(z));
    arch().dispatch(MapBlock { center, scale, shift, y, z });
}

impl Tail {
    /// [`Tail::finish`] of the planes of a block, or a band of them: `z` holds `y` and is used up, `maps` are those of its
    /// channels.
    pub(crate) fn finish_block<T: Element>(&self, maps: &[ChannelMap<T>], z: &mut [T], out: &mut [T]) {
        if self.has_pool() {
            self.before_pool_block(maps, None, z);
            return self.pool_block(z, out);
        }
        map_block(maps, None, z);
        vectorized!(self.activate_to(z, out));
    }

    /// The first part of [`Tail::finish_block`]: of `y`, or of what is in `z`.
    pub(crate) fn before_pool_block<T: Element>(&self, maps: &[ChannelMap<T>], y: Option<&[T]>, z: &mut [T]) {
        map_block(maps, y, z);
        vectorized!(self.activate_before_pool(z));
    }

    /// The second part of [`Tail::finish_block`]; a copy where nothing is pooled.
    pub(crate) fn pool_block<T: Element>(&self, z: &[T], out: &mut [T]) {
        vectorized!({
            let (pixels, (to, _)) = (z.as_chunks().0, out.as_chunks_mut());
            match self.pooling() {
                None => to.copy_from_slice(pixels),
                Some(Pooling::Max(pool)) => max_pool_block(pool, pixels, to),
                Some(Pooling::Avg(pool)) => avg_pool_block(pool, pixels, to),
                Some(Pooling::Global) => to[0] = global_avg_block(pixels),
            }
            if self.pools_first() {
                for out in out.iter_mut() {
                    *out = if *out <= T::zero() { T::zero() } else { *out };
                }
            }
        });
    }
    /// [`Tail::pool_block`] of whole planes, which keeps the cells of max pooling.
    pub(super) fn pool_block_with_cells<T: Element>(&self, z: &[T], out: &mut [T], cell: &mut [u8]) {
        let Some(Pooling::Max(pool)) = self.pooling() else { return self.pool_block(z, out) };
        vectorized!({
            max_pool_block_with_cells(pool, z.as_chunks().0, out.as_chunks_mut().0, cell.as_chunks_mut().0);
            self.activate_pooled(out, cell);
        });
    }

    /// Backward of [`Tail::pool_block_with_cells`], but for the slopes: sets `dz` from dout and the cells.
    pub(super) fn pool_block_backward<T: Element>(&self, dout: &[T], cell: &[u8], dz: &mut [T]) {
        vectorized!({
            let (dout, cell, dz) = (dout.as_chunks().0, cell.as_chunks().0, dz.as_chunks_mut().0);
            match self.pooling() {
                None => dz.copy_from_slice(dout),
                Some(Pooling::Max(pool)) => max_pool_block_backward(
                    pool,
                    #[inline(always)]
                    |pixel| dout[pixel],
                    cell,
                    dz,
                ),
                Some(Pooling::Avg(pool)) => avg_pool_block_backward(pool, dout, dz),
                Some(Pooling::Global) => {
                    let count = T::of(dz.len() as f64);
                    dz.fill(dout[0].map(|dout: T| dout / count));
                }
            }
        });
    }

    /// Multiplies `dz` by the slopes of [`Tail::activation_before_pool`] at `y`; `z` is scratch. One after the pool is in the cells.
    pub(super) fn slopes_block<T: Element>(&self, maps: &[ChannelMap<T>], y: &[T], z: &mut [T], dz: &mut [T]) {
        let Some(activation) = self.activation_before_pool() else { return };
        map_block(maps, Some(y), z);
        vectorized!(activation.specialised(
            #[inline(always)]
            |activation| {
                for (dz, &z) in dz.iter_mut().zip(&*z) {
                    *dz *= activation.slope(z);
                }
            },
        ));
    }
}
