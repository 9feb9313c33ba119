"""The cells of the course's notebooks through the drop-in, with layers of nested loops and numeric gradients of their own."""

from time import time

import numpy as np
import pytest

import gemmnet
from gemmnet.cs231n import conv_layer_utils, fast_layers
from gemmnet.cs231n.conv_layer_utils import *
from gemmnet.cs231n.fast_layers import *


def rel_error(x, y):
    return np.max(np.abs(x - y) / (np.maximum(1e-8, np.abs(x) + np.abs(y))))


def conv_forward_naive(x, w, b, conv_param):
    stride, pad = conv_param["stride"], int(conv_param["pad"])
    (n, _, height, width), (f, _, kh, kw) = x.shape, w.shape
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    out = np.zeros((n, f, 1 + (height + 2 * pad - kh) // stride, 1 + (width + 2 * pad - kw) // stride))
    for i, k, p, q in np.ndindex(*out.shape):
        window = padded[i, :, p * stride : p * stride + kh, q * stride : q * stride + kw]
        out[i, k, p, q] = np.sum(window * w[k]) + b[k]
    return out, (x, w, b, conv_param)


def conv_backward_naive(dout, cache):
    x, w, _, conv_param = cache
    stride, pad = conv_param["stride"], int(conv_param["pad"])
    kh, kw = w.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    dpadded, dw = np.zeros_like(padded), np.zeros_like(w)
    for i, k, p, q in np.ndindex(*dout.shape):
        place = np.s_[i, :, p * stride : p * stride + kh, q * stride : q * stride + kw]
        dpadded[place] += dout[i, k, p, q] * w[k]
        dw[k] += dout[i, k, p, q] * padded[place]
    height, width = x.shape[2:]
    return dpadded[:, :, pad : pad + height, pad : pad + width], dw, dout.sum(axis=(0, 2, 3))


def max_pool_forward_naive(x, pool_param):
    ph, pw, stride = pool_param["pool_height"], pool_param["pool_width"], pool_param["stride"]
    n, c, height, width = x.shape
    out = np.zeros((n, c, 1 + (height - ph) // stride, 1 + (width - pw) // stride))
    for i, k, p, q in np.ndindex(*out.shape):
        out[i, k, p, q] = x[i, k, p * stride : p * stride + ph, q * stride : q * stride + pw].max()
    return out, (x, pool_param)


def max_pool_backward_naive(dout, cache):
    x, pool_param = cache
    ph, pw, stride = pool_param["pool_height"], pool_param["pool_width"], pool_param["stride"]
    dx = np.zeros_like(x)
    for i, k, p, q in np.ndindex(*dout.shape):
        window = x[i, k, p * stride : p * stride + ph, q * stride : q * stride + pw]
        row, column = np.unravel_index(window.argmax(), window.shape)
        dx[i, k, p * stride + row, q * stride + column] += dout[i, k, p, q]
    return dx


def eval_numerical_gradient_array(f, x, df, h=1e-5):
    """The course's: x is changed in its place, one value after the other."""
    grad = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        old = x[index]
        x[index] = old + h
        above = f(x).copy()
        x[index] = old - h
        below = f(x).copy()
        x[index] = old
        grad[index] = np.sum((above - below) * df) / (2 * h)
    return grad


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(231)


def test_star_imports_bring_what_the_course_has():
    assert sorted(fast_layers.__all__) == [
        "conv_backward_fast", "conv_forward_fast", "max_pool_backward_fast", "max_pool_forward_fast",
    ]  # fmt: skip
    assert sorted(conv_layer_utils.__all__) == [
        "conv_relu_backward", "conv_relu_forward", "conv_relu_pool_backward", "conv_relu_pool_forward",
    ]  # fmt: skip


def test_the_cell_about_convolution():
    """As the notebook has it, with fewer images: naive and fast, and their times."""
    x = np.random.randn(10, 3, 31, 31)
    w = np.random.randn(25, 3, 3, 3)
    b = np.random.randn(25)
    dout = np.random.randn(10, 25, 16, 16)
    conv_param = {"stride": 2, "pad": 1}

    t0 = time()
    out_naive, cache_naive = conv_forward_naive(x, w, b, conv_param)
    t1 = time()
    out_fast, cache_fast = conv_forward_fast(x, w, b, conv_param)
    t2 = time()
    print("Testing conv_forward_fast:")
    print("Naive: %fs" % (t1 - t0))
    print("Fast: %fs" % (t2 - t1))
    print("Speedup: %fx" % ((t1 - t0) / (t2 - t1)))
    print("Difference: ", rel_error(out_naive, out_fast))

    t0 = time()
    dx_naive, dw_naive, db_naive = conv_backward_naive(dout, cache_naive)
    t1 = time()
    dx_fast, dw_fast, db_fast = conv_backward_fast(dout, cache_fast)
    t2 = time()
    print("\nTesting conv_backward_fast:")
    print("Naive: %fs" % (t1 - t0))
    print("Fast: %fs" % (t2 - t1))
    print("Speedup: %fx" % ((t1 - t0) / (t2 - t1)))
    for naive, fast in [(out_naive, out_fast), (dx_naive, dx_fast), (dw_naive, dw_fast), (db_naive, db_fast)]:
        assert fast.dtype == np.float64 and fast.flags.writeable and fast.flags.c_contiguous
        np.testing.assert_allclose(fast, naive, rtol=1e-9, atol=1e-11)


def test_the_cell_about_max_pooling():
    x = np.random.randn(10, 3, 32, 32)
    dout = np.random.randn(10, 3, 16, 16)
    pool_param = {"pool_height": 2, "pool_width": 2, "stride": 2}
    t0 = time()
    out_naive, cache_naive = max_pool_forward_naive(x, pool_param)
    t1 = time()
    out_fast, cache_fast = max_pool_forward_fast(x, pool_param)
    t2 = time()
    print("Testing pool_forward_fast:")
    print("Naive: %fs" % (t1 - t0))
    print("fast: %fs" % (t2 - t1))
    print("speedup: %fx" % ((t1 - t0) / (t2 - t1)))
    print("difference: ", rel_error(out_naive, out_fast))
    np.testing.assert_array_equal(out_fast, out_naive)
    np.testing.assert_array_equal(
        max_pool_backward_fast(dout, cache_fast), max_pool_backward_naive(dout, cache_naive)
    )


def test_the_cell_about_conv_relu_pool():
    x = np.random.randn(2, 3, 16, 16)
    w = np.random.randn(3, 3, 3, 3)
    b = np.random.randn(3)
    dout = np.random.randn(2, 3, 8, 8)
    conv_param = {"stride": 1, "pad": 1}
    pool_param = {"pool_height": 2, "pool_width": 2, "stride": 2}
    _, cache = conv_relu_pool_forward(x, w, b, conv_param, pool_param)
    dx, dw, db = conv_relu_pool_backward(dout, cache)
    dx_num = eval_numerical_gradient_array(
        lambda x: conv_relu_pool_forward(x, w, b, conv_param, pool_param)[0], x, dout
    )
    dw_num = eval_numerical_gradient_array(
        lambda w: conv_relu_pool_forward(x, w, b, conv_param, pool_param)[0], w, dout
    )
    db_num = eval_numerical_gradient_array(
        lambda b: conv_relu_pool_forward(x, w, b, conv_param, pool_param)[0], b, dout
    )
    for numeric, gradient in [(dx_num, dx), (dw_num, dw), (db_num, db)]:
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-6)


def test_the_cell_about_conv_relu():
    x = np.random.randn(2, 3, 8, 8)
    w = np.random.randn(3, 3, 3, 3)
    b = np.random.randn(3)
    dout = np.random.randn(2, 3, 8, 8)
    conv_param = {"stride": 1, "pad": 1}
    out, cache = conv_relu_forward(x, w, b, conv_param)
    np.testing.assert_allclose(out, np.maximum(conv_forward_naive(x, w, b, conv_param)[0], 0), rtol=1e-9, atol=1e-11)
    dx, dw, db = conv_relu_backward(dout, cache)
    dx_num = eval_numerical_gradient_array(lambda x: conv_relu_forward(x, w, b, conv_param)[0], x, dout)
    dw_num = eval_numerical_gradient_array(lambda w: conv_relu_forward(x, w, b, conv_param)[0], w, dout)
    db_num = eval_numerical_gradient_array(lambda b: conv_relu_forward(x, w, b, conv_param)[0], b, dout)
    for numeric, gradient in [(dx_num, dx), (dw_num, dw), (db_num, db)]:
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-10), (np.float32, 2e-5)])
@pytest.mark.parametrize(
    "size, filters, conv_param",
    [
        ((4, 3, 9, 7), (5, 3, 3, 3), {"stride": 1, "pad": 1}),
        ((2, 16, 12, 12), (16, 16, 3, 3), {"stride": 1, "pad": 1}),  # Winograd in f32
        ((2, 3, 10, 10), (4, 3, 4, 2), {"stride": 2, "pad": 0}),
        ((1, 1, 5, 5), (1, 1, 5, 5), {"stride": 3, "pad": 2}),
        ((2, 3, 16, 16), (4, 3, 7, 7), {"stride": 1, "pad": (7 - 1) / 2}),  # as cnn.py computes it: 3.0
    ],
)
def test_convolutions_of_other_sizes(size, filters, conv_param, dtype, tolerance):
    x, w, b = np.random.randn(*size), np.random.randn(*filters), np.random.randn(filters[0])
    out_naive, cache_naive = conv_forward_naive(x, w, b, conv_param)
    dout = np.random.randn(*out_naive.shape)
    out, cache = conv_forward_fast(x.astype(dtype), w.astype(dtype), b.astype(dtype), conv_param)
    gradients = conv_backward_fast(dout.astype(dtype), cache)
    for naive, fast in zip([out_naive, *conv_backward_naive(dout, cache_naive)], [out, *gradients]):
        assert fast.dtype == dtype and fast.shape == naive.shape
        np.testing.assert_allclose(fast, naive, rtol=tolerance, atol=tolerance * np.abs(naive).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("window, stride", [((2, 2), 2), ((3, 3), 2), ((2, 3), 1), ((4, 4), 4), ((1, 1), 3)])
def test_pools_of_other_sizes(window, stride, dtype):
    x = np.random.randn(3, 2, 9, 11).astype(dtype)
    pool_param = {"pool_height": window[0], "pool_width": window[1], "stride": stride}
    out_naive, cache_naive = max_pool_forward_naive(x, pool_param)
    dout = np.random.randn(*out_naive.shape).astype(dtype)
    out, cache = max_pool_forward_fast(x, pool_param)
    dx = max_pool_backward_fast(dout, cache)
    assert out.dtype == dx.dtype == dtype
    np.testing.assert_array_equal(out, out_naive.astype(dtype))
    np.testing.assert_allclose(dx, max_pool_backward_naive(dout, cache_naive), rtol=1e-5)


def test_arrays_of_any_kind():
    x, w, b = np.random.randn(4, 3, 8, 8), np.random.randn(2, 3, 3, 3), np.random.randn(2)
    conv_param, pool_param = {"stride": 1, "pad": 1.0}, {"pool_height": 2.0, "pool_width": 2, "stride": np.int64(2)}
    out, cache = conv_relu_pool_forward(x, w, b, conv_param, pool_param)
    dout = np.random.randn(*out.shape)
    expected = [out, *conv_relu_pool_backward(dout, cache)]
    for change in [np.asfortranarray, np.ndarray.tolist, lambda a: np.repeat(a, 2, axis=0)[::2], lambda a: a.astype(">f8")]:
        out, cache = conv_relu_pool_forward(change(x), change(w), change(b), conv_param, pool_param)
        for got, want in zip([out, *conv_relu_pool_backward(change(dout), cache)], expected):
            assert type(got) is np.ndarray and got.dtype == np.float64
            np.testing.assert_array_equal(got, want)
    # Images of f64 and weights of f32, as the course's solver has them; gradients as the forward pass.
    out, cache = conv_forward_fast(x, w.astype(np.float32), b.astype(np.float32), conv_param)
    assert out.dtype == np.float64
    assert {gradient.dtype for gradient in conv_backward_fast(out.astype(np.float32), cache)} == {np.dtype(np.float64)}
    # Whole numbers are fine here, and f16.
    whole = np.arange(48).reshape(1, 3, 4, 4)
    np.testing.assert_array_equal(max_pool_forward_fast(whole, pool_param)[0], whole[:, :, 1::2, 1::2])
    assert max_pool_forward_fast(whole.astype(np.float16), pool_param)[0].dtype == np.float64


def test_results_are_new_arrays():
    x, w, b = -np.ones((1, 1, 4, 4)), np.ones((1, 1, 1, 1)), np.zeros(1)
    out, cache = conv_relu_forward(x, w, b, {"stride": 1, "pad": 0})
    out += 7  # what is done with the output is of no concern to the gradient
    dx, _, _ = conv_relu_backward(np.ones_like(out), cache)
    assert (dx == 0).all() and (x == -1).all()
    first, _ = max_pool_forward_fast(x, {"pool_height": 1, "pool_width": 1, "stride": 1})
    first += 1
    assert (x == -1).all()


def test_mistakes_are_explained():
    x, w, b = np.zeros((2, 3, 8, 8)), np.zeros((4, 3, 3, 3)), np.zeros(4)
    good, pool = {"stride": 1, "pad": 1}, {"pool_height": 2, "pool_width": 2, "stride": 2}
    for conv_param, text in [
        ({"stride": 1, "pad": 1.5}, r"pad: 1.5 is not a whole number of pixels; give 1 or 2 \(.* filters of odd size\)"),
        ({"stride": 1.5, "pad": 1}, "stride: 1.5 is not a whole number of pixels; give 1 or 2"),
        ({"stride": 1, "pad": -1}, "pad: -1 is not a whole number"),
        ({"stride": 1, "pad": float("nan")}, "pad: nan"),
        ({"stride": 1, "pad": "same"}, "pad: 'same' is not a number"),
        ({"stride": 0, "pad": 1}, "stride of the height is 0"),
        ({"stride": 1}, "conv_param: it has no 'pad'"),
    ]:
        with pytest.raises(gemmnet.InvalidError, match=text) as caught:
            conv_forward_fast(x, w, b, conv_param)
        assert isinstance(caught.value, ValueError)
    for arguments, text in [
        ((x[0], w, b), r"conv2d: x has shape \[3, 8, 8\], expected \(N, C, H, W\)"),
        ((x[:, :2], w, b), r"conv2d: w has shape \[4, 3, 3, 3\]"),
        ((x, w, b[:3]), r"conv2d: b has shape \[3\], expected \[4\]"),
        ((x, w, b[None]), r"conv2d: b has shape \[1, 4\]"),
    ]:
        with pytest.raises(gemmnet.ShapeError, match=text):
            conv_forward_fast(*arguments, good)
    with pytest.raises(gemmnet.InvalidError, match="does not fit the padded height"):
        conv_forward_fast(x, np.zeros((4, 3, 11, 11)), b, good)
    with pytest.raises(gemmnet.InvalidError, match="pool_param: it has no 'pool_width'"):
        max_pool_forward_fast(x, {"pool_height": 2, "stride": 2})
    with pytest.raises(gemmnet.InvalidError, match="window of 9 does not fit"):
        max_pool_forward_fast(x, {**pool, "pool_height": 9})
    out, cache = conv_forward_fast(x, w, b, good)
    with pytest.raises(gemmnet.ShapeError, match=r"dout has shape \[2, 4, 8, 7\], expected \[2, 4, 8, 8\]"):
        conv_backward_fast(out[..., :7], cache)
    naive = (x, w, b, good)
    for backward in [conv_backward_fast, max_pool_backward_fast, conv_relu_backward, conv_relu_pool_backward]:
        with pytest.raises(gemmnet.InvalidError, match="cache: it is not one of .*_forward"):
            backward(out, naive)


def test_the_same_bits_at_any_number_of_threads(script):
    program = """
import hashlib, numpy as np
from gemmnet.cs231n.conv_layer_utils import *
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for dtype in (np.float32, np.float64):
    x, w, b = (rng.standard_normal(shape).astype(dtype) for shape in [(9, 16, 15, 15), (16, 16, 3, 3), (16,)])
    params = {"stride": 1, "pad": 1.0}, {"pool_height": 3, "pool_width": 3, "stride": 2}
    out, cache = conv_relu_pool_forward(x, w, b, *params)
    for array in (out, *conv_relu_pool_backward(out, cache)):
        digest.update(array.tobytes())
print(digest.hexdigest())
"""
    first, *others = [script(program, GEMMNET_NUM_THREADS=str(threads)) for threads in (1, 2, 5)]
    assert others == [first, first]
