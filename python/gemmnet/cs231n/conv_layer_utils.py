"""In the place of the course's `conv_layer_utils`: `from gemmnet.cs231n.conv_layer_utils import *`.

Types of arrays and caches are as in `gemmnet.cs231n.fast_layers`.
"""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple

from numpy.typing import ArrayLike

from .. import _native
from .fast_layers import (
    Array,
    ConvCache,
    PoolCache,
    conv_backward_fast,
    conv_forward_fast,
    like,
    max_pool_backward_fast,
    max_pool_forward_fast,
    own,
)

__all__ = ["conv_relu_backward", "conv_relu_forward", "conv_relu_pool_backward", "conv_relu_pool_forward"]


class ConvReluCache(NamedTuple):
    """What the backward pass of `conv_relu_forward` needs."""

    conv: ConvCache
    a: Array
    """The convolution's output."""


class ConvReluPoolCache(NamedTuple):
    """What the backward pass of `conv_relu_pool_forward` needs."""

    conv_relu: ConvReluCache
    pool: PoolCache


def conv_relu_forward(
    x: ArrayLike, w: ArrayLike, b: ArrayLike, conv_param: Mapping[str, Any]
) -> tuple[Array, ConvReluCache]:
    """A convolution, as `conv_forward_fast`, and then max(a, 0): out (N, F, H', W') and a cache."""
    a, cache = conv_forward_fast(x, w, b, conv_param)
    return _native.relu_forward(a), ConvReluCache(cache, a)


def conv_relu_backward(dout: ArrayLike, cache: ConvReluCache) -> tuple[Array, Array, Array]:
    """Gradients (dx, dw, db) of `conv_relu_forward`, for dout (N, F, H', W')."""
    conv, a = own(cache, ConvReluCache, "conv_relu_forward")
    return conv_backward_fast(_native.relu_backward(like(dout, a.dtype), a), conv)


def conv_relu_pool_forward(
    x: ArrayLike, w: ArrayLike, b: ArrayLike, conv_param: Mapping[str, Any], pool_param: Mapping[str, Any]
) -> tuple[Array, ConvReluPoolCache]:
    """`conv_relu_forward`, and then max pooling as `max_pool_forward_fast`: out (N, F, H', W') and a cache."""
    s, conv_relu = conv_relu_forward(x, w, b, conv_param)
    out, pool = max_pool_forward_fast(s, pool_param)
    return out, ConvReluPoolCache(conv_relu, pool)


def conv_relu_pool_backward(dout: ArrayLike, cache: ConvReluPoolCache) -> tuple[Array, Array, Array]:
    """Gradients (dx, dw, db) of `conv_relu_pool_forward`, for dout (N, F, H', W')."""
    conv_relu, pool = own(cache, ConvReluPoolCache, "conv_relu_pool_forward")
    return conv_relu_backward(max_pool_backward_fast(dout, pool), conv_relu)
