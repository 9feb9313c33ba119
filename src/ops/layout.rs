//! Level 3. How arrays and images lie in memory: arrays of any layout as row-major slices, which is what the kernels take, and
//! images within networks.

use std::borrow::Cow;

use ndarray::{Array, ArrayView, Dimension};

use crate::simd::LANES;

/// How the channels of images lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum MemoryFormat {
    /// `[N, C, H, W]`: plane after plane.
    #[default]
    Planar,
    /// `[N, ceil(C / 16), H, W, 16]`: a pixel of a block of [`LANES`] channels is a vector. Where the last block has fewer, the rest of
    /// its vectors is of no use to anybody, and finite.
    Blocked,
}

impl MemoryFormat {
    /// Planes that lie side by side.
    pub(crate) fn side_by_side(self) -> usize {
        match self {
            MemoryFormat::Planar => 1,
            MemoryFormat::Blocked => LANES,
        }
    }

    /// Planes that lie there for so many channels.
    pub(crate) fn planes(self, channels: usize) -> usize {
        channels.next_multiple_of(self.side_by_side())
    }

    /// Elements of images `[C, H, W]`.
    pub(crate) fn image_len(self, [channels, rows, cols]: [usize; 3]) -> usize {
        self.planes(channels) * rows * cols
    }
}

/// The formats of what goes into an operation and of what comes out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Formats {
    pub(crate) input: MemoryFormat,
    pub(crate) output: MemoryFormat,
}

/// The values in row-major order: where they lie, if they lie so, else a copy.
pub(crate) fn row_major<T: Copy, D: Dimension>(array: ArrayView<'_, T, D>) -> Cow<'_, [T]> {
    match array.to_slice() {
        Some(values) => Cow::Borrowed(values),
        None => Cow::Owned(array.iter().copied().collect()),
    }
}

/// The values of an array that was made in row-major order, as `Array::zeros` makes it.
///
/// # Panics
/// If it was not.
#[track_caller]
pub(crate) fn slice_mut<T, D: Dimension>(array: &mut Array<T, D>) -> &mut [T] {
    array.as_slice_mut().expect("the array was made in row-major order")
}

#[cfg(test)]
mod tests {
    use ndarray::{Array3, s};

    use super::*;

    #[test]
    fn values_are_copied_only_where_they_must_be() {
        let array = Array3::from_shape_fn((2, 3, 4), |(i, j, k)| 100 * i + 10 * j + k);
        for view in [array.view(), array.slice(s![1.., .., ..])] {
            let values = row_major(view);
            assert!(matches!(values, Cow::Borrowed(_)) && values.iter().eq(view.iter()), "{view}");
        }
        for view in [array.t(), array.slice(s![.., ..;-1, ..]), array.slice(s![.., .., ..;2])] {
            let values = row_major(view);
            assert!(matches!(values, Cow::Owned(_)) && values.iter().eq(view.iter()), "{view}");
        }
        let mut zeros = Array3::<u8>::zeros((2, 3, 4));
        slice_mut(&mut zeros)[23] = 7;
        assert_eq!(zeros[[1, 2, 3]], 7);
    }
}
