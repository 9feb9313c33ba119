"""In the place of the course's `fast_layers`: `from gemmnet.cs231n.fast_layers import *`.

Arrays of float32 give float32; all others are taken as float64, and give that. Gradients have the type of the forward pass.
Every result is a new array. A cache refers to the arrays that it was made of: they have to stay as they are until the backward
pass, as with the course's naive layers.
"""

from __future__ import annotations

import math
from typing import Any, Mapping, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _native
from .._arrays import alike, row_major
from ..errors import InvalidError

__all__ = ["conv_backward_fast", "conv_forward_fast", "max_pool_backward_fast", "max_pool_forward_fast"]

Array = NDArray[Any]


class ConvCache(NamedTuple):
    """What the backward pass of a convolution needs."""

    x: Array
    w: Array
    stride: int
    pad: int


class PoolCache(NamedTuple):
    """What the backward pass of max pooling needs."""

    maxima: _native.Maxima
    dtype: np.dtype[Any]


def whole(param: Mapping[str, Any], what: str, name: str) -> int:
    """A number of pixels, which the course's code computes with `/`: a float that is whole, too."""
    if name not in param:
        raise InvalidError(f"{what}: it has no '{name}'; give one of {param_names(what)} each")
    value = param[name]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InvalidError(f"{name}: {value!r} is not a number; give a number of pixels") from None
    if not (number >= 0 and number.is_integer()):
        below = max(math.floor(number), 0) if math.isfinite(number) else 0
        fix = "(filter_size - 1) / 2 is whole for filters of odd size" if name == "pad" else "round it"
        raise InvalidError(f"{name}: {value} is not a whole number of pixels; give {below} or {below + 1} ({fix})")
    return int(number)


def param_names(what: str) -> str:
    return "'stride', 'pad'" if what == "conv_param" else "'pool_height', 'pool_width', 'stride'"


def conv_forward_fast(x: ArrayLike, w: ArrayLike, b: ArrayLike, conv_param: Mapping[str, Any]) -> tuple[Array, ConvCache]:
    """Convolution of x (N, C, H, W) with w (F, C, HH, WW), plus b (F,): out (N, F, H', W') and a cache.

    `conv_param` has 'stride', pixels between receptive fields, and 'pad', pixels of zeros on each side.
    """
    stride, pad = (whole(conv_param, "conv_param", name) for name in ("stride", "pad"))
    x, w, b = alike(x, w, b)
    return _native.conv_forward(x, w, b, stride, pad), ConvCache(x, w, stride, pad)


def conv_backward_fast(dout: ArrayLike, cache: ConvCache) -> tuple[Array, Array, Array]:
    """Gradients (dx, dw, db) of `conv_forward_fast`, for dout (N, F, H', W')."""
    x, w, stride, pad = own(cache, ConvCache, "conv_forward_fast")
    return _native.conv_backward(like(dout, x.dtype), x, w, stride, pad)


def max_pool_forward_fast(x: ArrayLike, pool_param: Mapping[str, Any]) -> tuple[Array, PoolCache]:
    """Maximum of each window of x (N, C, H, W): out (N, C, H', W') and a cache.

    `pool_param` has 'pool_height', 'pool_width' and 'stride'. Of equal maxima of a window the first one gets the gradient.
    """
    height, width, stride = (whole(pool_param, "pool_param", name) for name in ("pool_height", "pool_width", "stride"))
    (x,) = alike(x)
    out, maxima = _native.max_pool_forward(x, height, width, stride)
    return out, PoolCache(maxima, x.dtype)


def max_pool_backward_fast(dout: ArrayLike, cache: PoolCache) -> Array:
    """Gradient dx of `max_pool_forward_fast`, for dout (N, C, H', W')."""
    maxima, dtype = own(cache, PoolCache, "max_pool_forward_fast")
    return _native.max_pool_backward(like(dout, dtype), maxima)


def like(dout: ArrayLike, dtype: np.dtype[Any]) -> Array:
    """A gradient in the type of the forward pass."""
    return row_major(np.asarray(dout), dtype)


def own(cache: Any, kind: type[Any], maker: str) -> Any:
    """The cache, if it is one of `maker`."""
    if not isinstance(cache, kind):
        raise InvalidError(f"cache: it is not one of {maker}; give what that returned")
    return cache
