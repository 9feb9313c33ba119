//! Level 3. Arrays of any layout as row-major slices, which is what the kernels take.

use std::borrow::Cow;

use ndarray::{Array, ArrayView, Dimension};

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
