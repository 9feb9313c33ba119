"""What people have, as the arrays that `_native` takes: row-major, aligned, of the right type."""

from __future__ import annotations

from typing import Any, Mapping

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .errors import InvalidError


def row_major(array: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """An array of this type, row by row and aligned: the same if it is that already."""
    return np.require(array, dtype, ("C_CONTIGUOUS", "ALIGNED"))


def floats(x: ArrayLike, what: str) -> NDArray[np.float32]:
    """Floats as float32. Whole numbers are refused: more often than not they are pixels, which a network does not take."""
    array = np.asarray(x)
    if array.dtype.kind != "f":
        fix = "turn pixels into the network's input with model.normalize, or if it takes these numbers, give them as float32"
        raise InvalidError(f"{what}: it has type {array.dtype}, expected floats; {fix}")
    return row_major(array, np.float32)


def images(x: ArrayLike, what: str) -> NDArray[Any]:
    """Bytes as uint8, floats as float32."""
    array = np.asarray(x)
    if array.dtype == np.uint8:
        return row_major(array, np.uint8)
    if array.dtype.kind != "f":
        fix = 'if its values are 0 to 255, give x.astype("uint8")'
        raise InvalidError(f"{what}: images have type {array.dtype}, expected uint8 or floats; {fix}")
    return row_major(array, np.float32)


def labels(y: ArrayLike, what: str) -> NDArray[np.int64]:
    """Whole numbers as int64."""
    array = np.asarray(y)
    # An empty list has no type of its own.
    if array.dtype.kind not in "iu" and array.size > 0:
        raise InvalidError(f"{what}: labels have type {array.dtype}, expected integers; number the classes from 0")
    if array.dtype == np.uint64 and array.size > 0 and int(array.max()) > np.iinfo(np.int64).max:
        raise InvalidError(f"{what}: {array.max()} is no label; number the classes from 0")
    return row_major(array, np.int64)


def alike(*arrays: ArrayLike) -> list[NDArray[Any]]:
    """All as float32 if all are that, else all as float64."""
    given = [np.asarray(array) for array in arrays]
    dtype = np.float32 if all(array.dtype == np.float32 for array in given) else np.float64
    return [row_major(array, dtype) for array in given]


def tensors(state_dict: Mapping[str, ArrayLike]) -> list[tuple[str, NDArray[np.float32]]]:
    """The tensors of a state_dict as float32, by name; without batchnorm's counts of batches, which are whole numbers."""
    arrays = []
    for name, tensor in state_dict.items():
        # A parameter of PyTorch's that is trained does not become an array by itself.
        array = np.asarray(tensor.detach().cpu().float() if hasattr(tensor, "detach") else tensor)
        if not name.endswith("num_batches_tracked"):
            arrays.append((name, row_major(array, np.float32)))
    return arrays
