//! Level 3. Planes as vectors of channels, and back, where these do not lie one row after the other.

use crate::element::Element;
use crate::simd::{Aligned, LANES, Lanes, lanes_to_planes, planes_to_lanes};

/// Pixels of short rows that are dealt out together.
const TOGETHER: usize = 64;

/// Rows of `cols` pixels to deal out together: one, if that is a run that the transposition can take by itself.
fn rows_together(cols: usize) -> usize {
    if cols >= LANES / 2 { 1 } else { TOGETHER / cols }
}

/// [`planes_to_lanes`] of planes of `size`, to rows that do not lie one after the other.
pub(super) fn planes_to_rows<'a, T: Element>(
    planes: &[T],
    pitch: usize,
    channels: usize,
    size: (usize, usize),
    mut rows: impl Iterator<Item = &'a mut [Lanes<T>]>,
) {
    let (together, cols) = (rows_together(size.1), size.1);
    if together == 1 {
        return rows.enumerate().for_each(|(y, row)| planes_to_lanes(&planes[y * cols..], pitch, channels, row));
    }
    let Aligned(lanes) = &mut Aligned([[T::zero(); LANES]; TOGETHER]);
    for y in (0..size.0).step_by(together) {
        let lanes = &mut lanes[..together.min(size.0 - y) * cols];
        planes_to_lanes(&planes[y * cols..], pitch, channels, lanes);
        lanes.chunks_exact(cols).zip(&mut rows).for_each(|(lanes, row)| row.copy_from_slice(lanes));
    }
}

/// The inverse of [`planes_to_rows`].
pub(super) fn rows_to_planes<'a, T: Element>(
    mut rows: impl Iterator<Item = &'a mut [Lanes<T>]>,
    size: (usize, usize),
    channels: usize,
    planes: &mut [T],
    pitch: usize,
) {
    let (together, cols) = (rows_together(size.1), size.1);
    if together == 1 {
        return rows.enumerate().for_each(|(y, row)| lanes_to_planes(row, channels, &mut planes[y * cols..], pitch));
    }
    let Aligned(lanes) = &mut Aligned([[T::zero(); LANES]; TOGETHER]);
    for y in (0..size.0).step_by(together) {
        let lanes = &mut lanes[..together.min(size.0 - y) * cols];
        lanes.chunks_exact_mut(cols).zip(&mut rows).for_each(|(lanes, row)| lanes.copy_from_slice(row));
        lanes_to_planes(lanes, channels, &mut planes[y * cols..], pitch);
    }
}
