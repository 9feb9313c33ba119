#!/usr/bin/env python3
"""Writes the golden numbers of tests/golden/*.json: what PyTorch computes in f64 for the operations of gemmnet.

    pip install torch numpy
    python scripts/gen_golden.py --out tests/golden

Each file holds one family of operations: a list of cases with a name, parameters and arrays (shape and values in
row-major order). Inputs are rounded to a few decimals, which keeps the files small; results have all their digits. The
numbers are seeded: running the script again, with the same versions on the same processor, changes nothing. Networks of
class Net begin with images and parameters that tests/suite/golden_graph.rs computes as well; their files hold only results.

Layouts are gemmnet's: images NCHW, filters OIHW, affine weights (D, M). Padding is [top, bottom, left, right].
"""

import argparse
import json
import pathlib
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)


class Inputs:
    """A stream of rounded random inputs of its own for each case, so that adding a case changes no other."""

    def __init__(self, name):
        self.rng = np.random.default_rng(list(name.encode()))

    def normal(self, *shape, scale=1.0, decimals=2):
        return torch.from_numpy(np.round(self.rng.normal(size=shape) * scale, decimals) + 0.0)

    def labels(self, count, classes):
        return torch.from_numpy(self.rng.integers(classes, size=count))


def case(name, params, **arrays):
    """A case as it is written; absent arrays are left out."""

    def numbers(array):
        array = array.detach().numpy()
        return {"shape": list(array.shape), "values": [float(value) for value in array.ravel()]}

    arrays = {key: numbers(array) for key, array in arrays.items() if array is not None}
    return {"name": name, "params": params, "arrays": arrays}


def gradients(out, dout, *inputs):
    return torch.autograd.grad((out * dout).sum(), inputs)


def conv2d():
    def one(name, x, w, b=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1, inputs=None):
        inputs = inputs or Inputs("conv2d " + name)
        leaves = [a.requires_grad_() for a in (x, w, b) if a is not None]
        top, bottom, left, right = padding
        padded = F.pad(x, (left, right, top, bottom))
        out = F.conv2d(padded, w, b, stride=stride, dilation=dilation, groups=groups)
        dout = inputs.normal(*out.shape)
        dx, dw, *db = gradients(out, dout, *leaves)
        params = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return case(name, params, x=x, w=w, b=b, out=out, dout=dout, dx=dx, dw=dw, db=db[0] if db else None)

    def random(name, x, w, bias=True, **params):
        inputs = Inputs("conv2d " + name)
        b = inputs.normal(w[0]) if bias else None
        return one(name, inputs.normal(*x), inputs.normal(*w), b, inputs=inputs, **params)

    # The arrays of the CS231n notebook, whose output it prints.
    linspace = lambda low, high, *shape: torch.from_numpy(np.linspace(low, high, int(np.prod(shape))).reshape(shape))
    notebook = one(
        "cs231n notebook",
        linspace(-0.1, 0.5, 2, 3, 4, 4),
        linspace(-0.2, 0.3, 3, 3, 4, 4),
        linspace(-0.1, 0.2, 3),
        stride=(2, 2),
        padding=(1, 1, 1, 1),
    )
    return [
        notebook,
        random("plain 3x3", (2, 3, 5, 5), (2, 3, 3, 3)),
        random("without bias", (2, 2, 5, 5), (3, 2, 3, 3), bias=False),
        random("padding 1", (2, 3, 4, 5), (2, 3, 3, 3), padding=(1, 1, 1, 1)),
        random("stride 2x1", (2, 2, 6, 5), (3, 2, 3, 3), stride=(2, 1), padding=(1, 1, 1, 1)),
        random("stride 2x3, rows and columns left over", (2, 2, 8, 9), (2, 2, 3, 2), stride=(2, 3)),
        random("asymmetric padding", (1, 2, 5, 4), (2, 2, 3, 3), stride=(2, 2), padding=(0, 2, 1, 0)),
        random("padding wider than the filter", (1, 1, 3, 3), (2, 1, 2, 2), padding=(3, 2, 2, 3)),
        random("dilation 2x1", (2, 2, 7, 5), (2, 2, 3, 3), dilation=(2, 1)),
        random(
            "dilation 2x3, stride, padding",
            (1, 2, 8, 9),
            (2, 2, 3, 2),
            stride=(2, 1),
            dilation=(2, 3),
            padding=(2, 1, 0, 2),
        ),
        random("2 groups", (2, 4, 5, 5), (6, 2, 3, 3), groups=2, padding=(1, 1, 1, 1), stride=(2, 2)),
        random("depthwise", (2, 3, 5, 5), (3, 1, 3, 3), groups=3, padding=(1, 1, 1, 1)),
        random("depthwise with multiplier", (1, 3, 5, 4), (6, 1, 2, 3), groups=3, dilation=(2, 1)),
        random("non-square 2x4", (2, 2, 4, 7), (3, 2, 2, 4), padding=(1, 0, 2, 1)),
        random("one channel, one image", (1, 1, 6, 6), (3, 1, 3, 3)),
        random("1x1", (2, 4, 3, 4), (3, 4, 1, 1)),
        random("1x1 stride 2", (2, 3, 5, 4), (2, 3, 1, 1), stride=(2, 2)),
        random("7x7", (1, 2, 8, 8), (2, 2, 7, 7), padding=(3, 3, 3, 3)),
        random("filter as large as the image", (3, 2, 3, 4), (4, 2, 3, 4)),
    ]


POOLS = [
    ("2x2", (2, 3, 4, 6), (2, 2), (2, 2), (0, 0, 0, 0)),
    ("2x2, a row and a column left over", (2, 2, 5, 7), (2, 2), (2, 2), (0, 0, 0, 0)),
    ("3x3 stride 2 padding 1", (2, 2, 7, 6), (3, 3), (2, 2), (1, 1, 1, 1)),
    ("3x2 stride 1x2", (1, 2, 5, 6), (3, 2), (1, 2), (0, 0, 0, 0)),
    ("asymmetric padding", (1, 2, 5, 5), (3, 3), (2, 2), (2, 0, 0, 1)),
    ("gaps between windows", (1, 1, 7, 8), (2, 2), (3, 3), (0, 0, 0, 0)),
    ("overlapping, one image and channel", (1, 1, 6, 6), (4, 4), (1, 1), (0, 0, 0, 0)),
    ("whole image", (2, 3, 4, 3), (4, 3), (4, 3), (0, 0, 0, 0)),
]


def pool(kind, name, x_shape, window, stride, padding):
    inputs = Inputs(f"{kind} {name}")
    x = inputs.normal(*x_shape).requires_grad_()
    top, bottom, left, right = padding
    if kind == "max_pool2d":
        out = F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-torch.inf), window, stride)
    else:
        out = F.avg_pool2d(F.pad(x, (left, right, top, bottom)), window, stride)
    dout = inputs.normal(*out.shape)
    (dx,) = gradients(out, dout, x)
    params = {"window": window, "stride": stride, "padding": padding}
    return case(name, params, x=x, out=out, dout=dout, dx=dx)


def max_pool2d():
    # Windows full of equal values: the gradient goes to the first.
    x = torch.tensor([[[[1.0, 1, 2, 0], [1, 1, 0, 2], [0, 3, 5, 5], [3, 0, 5, 4]]]], requires_grad=True)
    dout = torch.tensor([[[[1.0, 10], [100, 1000]]]])
    out = F.max_pool2d(x, 2)
    ties = case(
        "ties",
        {"window": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0)},
        x=x,
        out=out,
        dout=dout,
        dx=gradients(out, dout, x)[0],
    )
    return [pool("max_pool2d", *row) for row in POOLS] + [ties]


def avg_pool2d():
    return [pool("avg_pool2d", *row) for row in POOLS]


def global_avg_pool():
    inputs = Inputs("global_avg_pool")
    x = inputs.normal(2, 3, 4, 5).requires_grad_()
    out = x.mean((2, 3))
    dout = inputs.normal(2, 3)
    return [case("2x3x4x5", {}, x=x, out=out, dout=dout, dx=gradients(out, dout, x)[0])]


def batchnorm():
    """Running statistics follow gemmnet's rule, the seed's: running = 0.9 running + 0.1 batch with the biased variance.
    PyTorch's momentum 0.1 is the same rule, but with the unbiased variance; the conversion is asserted here."""
    momentum = 0.9

    def one(name, shape, scale=1.0, shift=0.0, eps=1e-5):
        inputs = Inputs("batchnorm " + name)
        features = shape[1]
        axes = [axis for axis in range(len(shape)) if axis != 1]
        count = int(np.prod(shape)) // features
        gamma, beta = inputs.normal(features).requires_grad_(), inputs.normal(features).requires_grad_()
        mean, var = torch.zeros(features), torch.ones(features)
        torch_mean, torch_var = torch.zeros(features), torch.ones(features)
        batches = [inputs.normal(*shape, scale=scale) + shift for _ in range(3)]
        for batch in batches:
            F.batch_norm(batch, torch_mean, torch_var, training=True, momentum=0.1)
            mean = momentum * mean + (1 - momentum) * batch.mean(axes)
            var = momentum * var + (1 - momentum) * batch.var(axes, correction=0)
        assert torch.allclose(mean, torch_mean, rtol=1e-12)
        # Unbiased variance = biased * count / (count - 1); both start at 1, which decays like 0.9^3.
        start = momentum**3
        assert torch.allclose((var - start) * count / (count - 1), torch_var - start, rtol=1e-9)
        x = batches[-1].requires_grad_()
        out = F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps)
        dout = inputs.normal(*shape)
        dx, dgamma, dbeta = gradients(out, dout, x, gamma, beta)
        eval_out = F.batch_norm(x, mean, var, gamma, beta, training=False, eps=eps)
        return case(
            name,
            {"eps": eps, "momentum": momentum},
            # The three batches of the running statistics; the last one is also the input of everything else.
            batches=torch.stack(batches),
            x=x,
            gamma=gamma,
            beta=beta,
            out=out,
            dout=dout,
            dx=dx,
            dgamma=dgamma,
            dbeta=dbeta,
            running_mean=mean,
            running_var=var,
            eval_out=eval_out,
        )

    return [
        one("plain", (6, 5)),
        # Two samples are normalised to +-1 but for eps, which must be large to leave a gradient that can be compared.
        one("two samples, large eps", (2, 3), eps=0.5),
        one("spatial", (2, 3, 4, 5), scale=5.0, shift=12.0),
        one("spatial, one image", (1, 2, 3, 2)),
    ]


def affine():
    def one(name, n, d, m):
        inputs = Inputs("affine " + name)
        x, w, b = (inputs.normal(*shape).requires_grad_() for shape in [(n, d), (d, m), (m,)])
        out = x @ w + b
        dout = inputs.normal(n, m)
        dx, dw, db = gradients(out, dout, x, w, b)
        return case(name, {}, x=x, w=w, b=b, out=out, dout=dout, dx=dx, dw=dw, db=db)

    return [one("4x7x3", 4, 7, 3), one("one sample", 1, 5, 6), one("one output", 5, 3, 1), one("one input", 3, 1, 4)]


def activation():
    inputs = Inputs("activation")
    x = torch.cat([inputs.normal(24, scale=2.0), torch.tensor([-30.0, -8, -1e-3, 0, 1e-3, 8, 30])]).requires_grad_()
    dout = inputs.normal(*x.shape)
    table = [
        ("relu", {}, F.relu),
        ("leaky_relu", {"slope": 0.01}, lambda x: F.leaky_relu(x, 0.01)),
        ("leaky_relu 0.3", {"slope": 0.3}, lambda x: F.leaky_relu(x, 0.3)),
        ("silu", {}, F.silu),
        ("gelu", {}, lambda x: F.gelu(x, approximate="tanh")),
    ]
    cases = []
    for name, params, f in table:
        out = f(x)
        cases.append(case(name, params, x=x, out=out, dout=dout, dx=gradients(out, dout, x)[0]))
    return cases


def loss():
    def one(name, kind, scores, labels, smoothing=0.0):
        scores = scores.requires_grad_()
        if kind == "softmax":
            value = F.cross_entropy(scores, labels, label_smoothing=smoothing)
        else:
            # PyTorch divides by the number of classes as well as by that of samples; gemmnet, as the seed, does not.
            value = F.multi_margin_loss(scores, labels, margin=1.0) * scores.shape[1]
        (dscores,) = torch.autograd.grad(value, scores)
        params = {"kind": kind, "smoothing": smoothing, "labels": labels.tolist()}
        return case(name, params, scores=scores, loss=value, dscores=dscores)

    def random(name, kind, samples, classes, scale=1.0, smoothing=0.0):
        inputs = Inputs("loss " + name)
        return one(name, kind, inputs.normal(samples, classes, scale=scale), inputs.labels(samples, classes), smoothing)

    return [
        random("softmax", "softmax", 5, 4),
        random("softmax, smoothing 0.1", "softmax", 5, 4, smoothing=0.1),
        random("softmax, smoothing 1", "softmax", 3, 4, smoothing=1.0),
        random("softmax, large scores", "softmax", 4, 6, scale=300.0),
        random("softmax, one sample", "softmax", 1, 10),
        random("svm", "svm", 5, 4),
        random("svm, large scores", "svm", 6, 10, scale=20.0),
        random("svm, two classes", "svm", 3, 2),
    ]


def optimizer():
    """Parameters after each of five steps with given gradients: `after` is (5, 3, 4)."""
    table = [
        ("sgd", {"lr": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
        ("momentum", {"lr": 0.1, "momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (
            "nesterov",
            {"lr": 0.1, "momentum": 0.9},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        ),
        ("adagrad", {"lr": 0.1, "eps": 1e-8}, lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8)),
        (
            "rmsprop",
            {"lr": 0.01, "decay": 0.99, "eps": 1e-8},
            lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99, eps=1e-8),
        ),
        (
            "adam",
            {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
            lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.999), eps=1e-8),
        ),
        (
            "adamw",
            {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
        ),
    ]
    inputs = Inputs("optimizer")
    start, grads = inputs.normal(3, 4), inputs.normal(5, 3, 4)
    # A value whose gradient is always 0 must not move, except by weight decay.
    grads[:, 0, 0] = 0.0
    cases = []
    for name, params, build in table:
        p = start.clone().requires_grad_()
        opt = build([p])
        steps = []
        for grad in grads:
            p.grad = grad.clone()
            opt.step()
            steps.append(p.detach().clone())
        cases.append(case(name, params, start=start, grads=grads, after=torch.stack(steps)))
    return cases


def network():
    """Ten losses of conv4k3-[bn]-relu-pool-affine12-relu-affine5 with softmax, trained on one batch by Adam.

    `losses` are the data losses plus l2/2 times the sum of squared weights (w1, w2, w3: neither biases nor batchnorm),
    each before its step. The convolution keeps the image's size, and has no bias where batchnorm follows."""
    l2, lr, eps = 0.01, 0.01, 1e-5

    def one(name, batchnorm):
        inputs = Inputs("network " + name)
        x, labels = inputs.normal(6, 3, 8, 8), inputs.labels(6, 5)
        p = {"w1": inputs.normal(4, 3, 3, 3, scale=0.3, decimals=3)}
        if batchnorm:
            p["gamma1"] = 1 + inputs.normal(4, scale=0.2)
            p["beta1"] = inputs.normal(4, scale=0.2)
        else:
            p["b1"] = inputs.normal(4, scale=0.1)
        p["w2"] = inputs.normal(64, 12, scale=0.2, decimals=3)
        p["b2"] = inputs.normal(12, scale=0.1)
        p["w3"] = inputs.normal(12, 5, scale=0.3, decimals=3)
        p["b3"] = inputs.normal(5, scale=0.1)
        initial = {key: value.clone() for key, value in p.items()}
        for value in p.values():
            value.requires_grad_()
        opt = torch.optim.Adam(p.values(), lr=lr, betas=(0.9, 0.999), eps=1e-8)
        losses, first_scores, first_grads = [], None, {}
        for step in range(10):
            h = F.conv2d(x, p["w1"], p.get("b1"), padding=1)
            if batchnorm:
                h = F.batch_norm(h, None, None, p["gamma1"], p["beta1"], training=True, eps=eps)
            h = F.max_pool2d(F.relu(h), 2).flatten(1)
            h = F.relu(h @ p["w2"] + p["b2"])
            scores = h @ p["w3"] + p["b3"]
            penalty = 0.5 * l2 * sum((p[key] ** 2).sum() for key in ("w1", "w2", "w3"))
            value = F.cross_entropy(scores, labels) + penalty
            losses.append(value.detach())
            opt.zero_grad()
            value.backward()
            if step == 0:
                # With the penalty's part. The gradient of w2 would be most of the file; its column sums stand for it.
                first_scores = scores
                first_grads = {f"d{key}": value.grad.clone() for key, value in p.items() if key != "w2"}
                first_grads["dw2_column_sums"] = p["w2"].grad.sum(0)
            opt.step()
        params = {
            "notation": f"conv4k3{'-bn' if batchnorm else ''}-relu-pool-affine12-relu-affine5",
            "labels": labels.tolist(),
            "l2": l2,
            "lr": lr,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "batchnorm_eps": eps,
        }
        return case(name, params, x=x, **initial, scores=first_scores, **first_grads, losses=torch.stack(losses))

    return [one("three layers", False), one("three layers with batchnorm", True)]


def numbers(name, *shape):
    """From -1 to 1, multiples of 2^-10: the upper bits of a linear congruential generator (Knuth's of MMIX) that begins
    with the FNV-1a hash of the name. Rust computes the same."""
    state, values = 0xCBF29CE484222325, []
    for byte in name.encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    for _ in range(int(np.prod(shape))):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append(((state >> 53) - 1024) / 1024)
    return torch.tensor(values).reshape(shape)


class Net:
    """A network from gemmnet's notation, as far as it is used here; its parameters have gemmnet's names and layouts.

    Layers of a kind are counted in order of appearance: conv1.weight, bn1.weight, bn1.bias, ..., affine1.weight (D, M),
    affine1.bias. Convolutions are 3x3 with stride `s` and padding `p`, which is 'same' if not given: as many rows of
    output as strides fit into the image, and the odd row of padding below. One right before batchnorm has no bias.
    `res[...]` adds its input; where that has another shape, it goes through a 1x1 convolution and batchnorm of their own
    (He et al. 2016, option B): shortcut1.weight, shortcut1.bn.weight, shortcut1.bn.bias.

    Weights are `numbers(name)` times the largest power of two whose square is at most 6 / fan-in; batchnorm's scales
    1 + numbers(name) / 4; biases numbers(name) / 4. Running statistics begin at 0 and 1; the variance is biased."""

    def __init__(self, notation, shape):
        self.params, self.running, self.count, self.shape = {}, {}, {}, shape
        words = iter(re.findall(r"res\[|\[|\](?:x\d+)?|[^-\[\]]+", notation))
        self.forward = self.sequence(self.tree(words)[0])

    def tree(self, words):
        """Layers as text, residual branches as lists, up to the end or a bracket; and how often they are repeated."""
        layers = []
        for word in words:
            if word.startswith("]"):
                return layers, int(word[2:] or 1)
            elif word.endswith("["):
                inside, times = self.tree(words)
                layers += [inside] if word == "res[" else inside * times
            else:
                layers.append(word)
        return layers, 1

    def sequence(self, tree):
        layers = [self.layer(word, tree[i + 1 : i + 3]) for i, word in enumerate(tree)]

        def forward(x, training):
            for layer in layers:
                x = layer(x, training)
            return x

        return forward

    def name(self, kind):
        self.count[kind] = self.count.get(kind, 0) + 1
        return f"{kind}{self.count[kind]}"

    def weight(self, name, *shape, fan_in):
        scale = 1.0
        while scale * scale * fan_in > 6:
            scale /= 2
        return self.param(name, scale * numbers(name, *shape))

    def bias(self, name, size):
        return self.param(name, numbers(name, size) / 4)

    def param(self, name, value):
        self.params[name] = value.requires_grad_()
        return name

    def layer(self, word, following):
        channels, rows, cols = self.shape
        if isinstance(word, list):
            return self.residual(word)
        kind, size, stride, padding = re.fullmatch(r"([a-z]+)(\d*)(?:s(\d))?(?:p(\d))?", word).groups()
        if kind == "conv":
            padding = padding and [int(padding)] * 4
            return self.conv(self.name(kind), int(size), 3, int(stride or 1), padding, bias=following[:1] != ["bn"])
        if kind == "bn":
            return self.batchnorm(self.name(kind))
        if kind == "affine":
            name, fan_in, self.shape = self.name(kind), channels * rows * cols, (int(size), 1, 1)
            w, b = self.weight(f"{name}.weight", fan_in, int(size), fan_in=fan_in), self.bias(f"{name}.bias", int(size))
            return lambda x, _: x.flatten(1) @ self.params[w] + self.params[b]
        if kind == "pool":
            self.shape = channels, rows // 2, cols // 2
            return lambda x, _: F.max_pool2d(x, 2)
        if kind == "gap":
            self.shape = channels, 1, 1
            return lambda x, _: x.mean((2, 3))
        assert kind == "relu", word
        return self.relu

    @staticmethod
    def relu(x, _):
        # Other roundings must not take a value to the other side of the corner.
        assert x.abs().min() > 1e-9
        return F.relu(x)

    def conv(self, name, filters, side, stride, padding=None, bias=False):
        channels, rows, cols = self.shape
        w = self.weight(f"{name}.weight", filters, channels, side, side, fan_in=channels * side * side)
        b = self.bias(f"{name}.bias", filters) if bias else None
        if padding is None:
            total = [max(-(-size // stride) * stride - stride + side - size, 0) for size in (cols, rows)]
            padding = [part for size in total for part in (size // 2, size - size // 2)]
        left, right, top, bottom = padding
        self.shape = filters, (rows + top + bottom - side) // stride + 1, (cols + left + right - side) // stride + 1
        return lambda x, _: F.conv2d(F.pad(x, padding), self.params[w], self.params.get(b), stride=stride)

    def batchnorm(self, name, eps=1e-5, momentum=0.9):
        channels = self.shape[0]
        gamma = self.param(f"{name}.weight", 1 + numbers(f"{name}.weight", channels) / 4)
        beta = self.bias(f"{name}.bias", channels)
        mean, var = f"{name}.running_mean", f"{name}.running_var"
        self.running |= {mean: torch.zeros(channels), var: torch.ones(channels)}

        def forward(x, training):
            scale = self.params[gamma], self.params[beta]
            if not training:
                return F.batch_norm(x, self.running[mean], self.running[var], *scale, training=False, eps=eps)
            for name, batch in (mean, x.mean((0, 2, 3))), (var, x.var((0, 2, 3), correction=0)):
                self.running[name] = momentum * self.running[name] + (1 - momentum) * batch.detach()
            return F.batch_norm(x, None, None, *scale, training=True, eps=eps)

        return forward

    def residual(self, tree):
        before = self.shape
        branch = self.sequence(tree)
        if self.shape == before:
            return lambda x, training: x + branch(x, training)
        after, self.shape = self.shape, before
        name = self.name("shortcut")
        conv = self.conv(name, after[0], 1, before[1] // after[1])
        norm = self.batchnorm(f"{name}.bn")
        assert self.shape == after
        return lambda x, training: norm(conv(x, training), training) + branch(x, training)

    def loss(self, x, labels):
        """Scores of training mode and their loss, whose gradients go to the parameters."""
        scores = self.forward(x, True)
        value = F.cross_entropy(scores, labels)
        for param in self.params.values():
            param.grad = None
        value.backward()
        return scores.detach(), value.detach()


def batch(shape, classes, count, step):
    """Images and labels of a step."""
    labels = torch.tensor([(7 * i + 3 * step + 1) % classes for i in range(count)])
    return numbers(f"images {step}", count, *shape), labels


def summary(name, array):
    """What stands for a large array: its sum, its norm, its product with `numbers("probe " + name)`, and 8 of its
    values, evenly spaced from the first to the last."""
    array = array.detach().ravel()
    probe, last = numbers(f"probe {name}", len(array)), len(array) - 1
    return torch.stack([array.sum(), array.norm(), probe @ array, *(array[i * last // 7] for i in range(8))])


def resnet20():
    """Three steps of SGD with momentum on ResNet-20 for CIFAR-10 (He et al. 2016, shortcuts of option B), each on a
    batch of its own.

    `scores` and `gradient NAME` are those of the first step, `losses` those of all; `after NAME` parameters and running
    statistics after the last, `test_scores` what they then make of the first batch in test mode."""
    block = lambda filters: f"res[conv{filters}-bn-relu-conv{filters}-bn]-relu"
    stage = lambda filters: f"res[conv{filters}s2p1-bn-relu-conv{filters}-bn]-relu-[{block(filters)}]x2"
    notation = f"conv16-bn-relu-[{block(16)}]x3-{stage(32)}-{stage(64)}-gap-affine10"
    shape, images, lr, momentum = (3, 32, 32), 8, 0.1, 0.9
    net = Net(notation, shape)
    assert sum(param.numel() for param in net.params.values()) == 272_474
    opt = torch.optim.SGD(net.params.values(), lr=lr, momentum=momentum)
    losses, arrays = [], {}
    for step in range(3):
        scores, value = net.loss(*batch(shape, 10, images, step))
        losses.append(value)
        if step == 0:
            arrays = {f"gradient {name}": summary(name, param.grad) for name, param in net.params.items()}
            arrays["scores"] = scores
        opt.step()
    arrays |= {f"after {name}": summary(name, value) for name, value in {**net.params, **net.running}.items()}
    test_scores = net.forward(batch(shape, 10, images, 0)[0], False)
    params = {"notation": notation, "input": shape, "images": images, "lr": lr, "momentum": momentum}
    return [case("ResNet-20", params, losses=torch.stack(losses), test_scores=test_scores, **arrays)]


def residual():
    """Scores, loss and gradients of small networks with residual blocks, and with a pool before batchnorm."""

    def one(name, notation, shape=(2, 6, 8), images=3):
        net = Net(notation, shape)
        scores, value = net.loss(*batch(shape, 4, images, 0))
        # Batchnorm behind a pool cancels the bias before it: what is left of its gradient is rounding.
        told = {name: param.grad for name, param in net.params.items() if param.grad.abs().max() > 1e-12}
        grads = {f"gradient {name}": grad for name, grad in told.items()}
        params = {"notation": notation, "input": shape, "images": images}
        return case(name, params, scores=scores, losses=value.reshape(1), **grads, **net.running)

    return [
        one("identity", "conv3-bn-relu-res[conv3-bn-relu-conv3-bn]-relu-gap-affine4"),
        one("projection with stride 2", "conv3-bn-relu-res[conv4s2p1-bn-relu-conv4-bn]-relu-gap-affine4"),
        one("stride 2 with 'same' padding", "res[conv3s2-bn-relu-conv3-bn]-relu-gap-affine4"),
        one("projection of channels alone", "res[conv4-bn]-relu-gap-affine4"),
        one("two, without batchnorm", "conv3-[res[conv3-relu-conv3]]x2-relu-gap-affine4"),
        one("the branch begins with batchnorm", "conv3-res[bn-relu-conv3-bn-relu-conv3]-relu-gap-affine4"),
        one("one within the other", "conv3-relu-res[conv3-bn-relu-res[conv3-bn]-relu-conv3-bn]-relu-gap-affine4"),
        one("pool before batchnorm", "conv3-pool-bn-relu-conv4-pool-bn-relu-affine4"),
        one("pool before batchnorm, then a branch", "conv3-pool-bn-relu-res[conv3-bn-relu-conv3-bn]-relu-gap-affine4"),
    ]


def groups():
    """Five steps with momentum for convolutions' filters and Adam for the rest, but for batchnorm's scale, which stays
    as it is. `after NAME` is (5, ...): the parameter after each step."""
    notation, shape, images = "conv3-bn-relu-pool-affine5", (2, 6, 6), 6
    net = Net(notation, shape)
    filters_lr, lr, momentum, beta1, beta2, eps = 0.05, 1e-3, 0.9, 0.9, 0.999, 1e-8
    rest = [param for name, param in net.params.items() if name not in ("conv1.weight", "bn1.weight")]
    opts = [
        torch.optim.SGD([net.params["conv1.weight"]], lr=filters_lr, momentum=momentum),
        torch.optim.Adam(rest, lr=lr, betas=(beta1, beta2), eps=eps),
    ]
    losses, after = [], {name: [] for name in net.params}
    for step in range(5):
        losses.append(net.loss(*batch(shape, 5, images, step))[1])
        for opt in opts:
            opt.step()
        for name, param in net.params.items():
            after[name].append(param.detach().clone())
    after = {f"after {name}": torch.stack(steps) for name, steps in after.items()}
    params = {"notation": notation, "input": shape, "images": images, "filters_lr": filters_lr, "lr": lr}
    params |= {"momentum": momentum, "beta1": beta1, "beta2": beta2, "eps": eps}
    return [case("momentum, Adam, frozen", params, losses=torch.stack(losses), **after)]


def clip_ema():
    """Four steps of SGD on gradients clipped to a norm, and the moving average of the parameters.

    `norms` are before clipping. The average begins with the parameters after the first step (PyTorch's first update is
    a copy); `average NAME` is (4, ...), after each step, and `after NAME` the parameter after the last."""
    notation, shape, images = "conv3-bn-relu-pool-affine4", (2, 6, 6), 6
    lr, limit, decay = 0.2, 1.7, 0.75
    net = Net(notation, shape)
    module = torch.nn.ParameterList(torch.nn.Parameter(param) for param in net.params.values())
    net.params = dict(zip(net.params, module))
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
    opt = torch.optim.SGD(module, lr=lr)
    losses, norms, averages = [], [], {name: [] for name in net.params}
    for step in range(4):
        losses.append(net.loss(*batch(shape, 4, images, step))[1])
        norms.append(torch.nn.utils.clip_grad_norm_(module, limit))
        opt.step()
        averaged.update_parameters(module)
        for name, average in zip(net.params, averaged.module):
            averages[name].append(average.detach().clone())
    assert min(norms) < 0.95 * limit and max(norms) > 1.05 * limit, f"{norms}: some are to be clipped, some not"
    arrays = {f"average {name}": torch.stack(steps) for name, steps in averages.items()}
    arrays |= {f"after {name}": param for name, param in net.params.items()}
    params = {"notation": notation, "input": shape, "images": images, "lr": lr, "limit": limit, "decay": decay}
    return [case("clipping, average", params, losses=torch.stack(losses), norms=torch.stack(norms), **arrays)]


def whitening():
    """Filters that whiten patches of 2x2 and 3x3 (the recipe's, Jordan 2024), by rising eigenvalue; their signs have no
    meaning. The images are sums of few patterns, so that some directions hardly occur."""

    def one(name, shape, size):
        inputs = Inputs("whitening " + name)
        x = inputs.normal(*shape) + inputs.normal(shape[0], 1, *shape[2:])
        p = x.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5)
        p = p.reshape(-1, shape[1] * size * size)
        values, vectors = torch.linalg.eigh(p.T @ p / len(p))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(-1, shape[1], size, size)
        return case(name, {"size": size}, x=x, filters=filters)

    return [one("2x2 of three channels", (5, 3, 6, 7), 2), one("3x3 of one channel", (70, 1, 4, 5), 3)]


def muon():
    """Five steps of the recipe's Muon (Jordan 2024), whose rate falls, for filters with more inputs than outputs and with
    fewer: before each step the filters are scaled to the norm sqrt(filters)."""
    momentum, rate, steps = 0.6, 0.24, 5

    def one(name, shape):
        inputs = Inputs("muon " + name)
        start = w = inputs.normal(*shape)
        velocity, grads, after = torch.zeros_like(w), inputs.normal(steps, *shape), []
        for step, grad in enumerate(grads):
            velocity = momentum * velocity + grad
            x = (grad + momentum * velocity).flatten(1)
            w = w * (len(w) ** 0.5 / w.norm())
            tall = x.shape[0] > x.shape[1]
            x = x.T if tall else x
            x = x / x.norm().clamp(min=1e-7)  # as torch.optim.Muon; the recipe adds 1e-7
            for _ in range(3):
                s = x @ x.T
                x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
            # Jordan's later rule lets filters with fewer inputs than outputs make larger steps.
            scale = max(1, w.shape[0] / w[0].numel()) ** 0.5
            w = w - rate * (1 - step / steps) * scale * (x.T if tall else x).reshape(w.shape)
            after.append(w)
        return case(name, {"momentum": momentum, "rate": rate}, start=start, grads=grads, after=torch.stack(after))

    return [one("wide", (6, 3, 3, 3)), one("tall", (24, 1, 3, 3)), one("1x1", (5, 7, 1, 1))]


def augment():
    """An image of bytes mirrored or not, then moved by -2 to 2 pixels down and right, row by row of these places, with
    reflection; and what a linear scorer makes of the recipe's six views of some (Jordan 2024), and of fewer."""
    inputs = Inputs("augment shifts")
    # A width of 4 would make some of them equal: mirrored by its border it looks like the mirrored image.
    x = inputs.labels((1, 2, 5, 6), 256).double()

    def crops(image):
        padded = F.pad(image, (2,) * 4, "reflect")[0]
        moves = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
        return torch.stack([padded[:, 2 - down : 7 - down, 2 - right : 8 - right] for down, right in moves])

    shifts = case("shifts by up to 2", {}, x=x, plain=crops(x), mirrored=crops(x.flip(-1)))

    inputs = Inputs("augment views")
    x, w = inputs.labels((12, 2, 5, 4), 256).double(), inputs.normal(40, 3)
    # Without this the sums of the columns, and so the classes, hardly depend on the image.
    w = w - w.mean(0)
    net = lambda images: images.flatten(1) @ w
    both = lambda images: 0.5 * net(images) + 0.5 * net(images.flip(-1))
    padded = F.pad(x, (1,) * 4, "reflect")
    six = 0.5 * both(x) + 0.25 * (both(padded[:, :, :5, :4]) + both(padded[:, :, 2:, 2:]))
    scores = {"one": net(x), "two": both(x), "six": six}
    best = {f"best of {key}": scores[key].argmax(1).tolist() for key in scores}
    assert len({tuple(classes) for classes in best.values()}) == 3, "the number of views makes a difference"
    return [shifts, case("six views", best, x=x, w=w, **scores)]


class BasicBlock(torch.nn.Module):
    """A residual block with torchvision's names."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = torch.nn.Sequential(shortcut, torch.nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(torch.nn.Module):
    """torchvision's ResNet in small."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(4)
        self.layer1 = torch.nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
        self.layer2 = torch.nn.Sequential(BasicBlock(4, 6, 2), BasicBlock(6, 6, 1))
        self.fc = torch.nn.Linear(6, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def imports():
    """State dicts of modules, and the scores that these compute of images in test mode."""

    def one(name, notation, module, *shape):
        inputs = Inputs("imports " + name)
        with torch.no_grad():
            for key, value in module.named_parameters():
                norm = value.dim() == 1 and key.endswith("weight")
                scale = 0.2 if value.dim() == 1 else value[0].numel() ** -0.5
                value.copy_(norm + inputs.normal(*value.shape, scale=scale, decimals=3))
            for key, value in module.named_buffers():
                if value.dim():
                    value.copy_(inputs.normal(*value.shape, scale=0.3).abs() + (0.5 if key.endswith("var") else 0.0))
            x = inputs.normal(*shape)
            scores = module.eval()(x)
        tensors = {f"tensor {key}": value for key, value in module.state_dict().items() if value.dim()}
        return case(name, {"notation": notation}, x=x, scores=scores, **tensors)

    block = "res[conv{0}-bn-relu-conv{0}-bn]-relu".format
    resnet = f"conv4k7s2p3-bn-relu-pool3s2p1-[{block(4)}]x2-res[conv6s2p1-bn-relu-conv6-bn]-relu-{block(6)}-gap-affine5"
    nn = torch.nn
    convs = [layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())]
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4)]
    chain = nn.Sequential(*convs, nn.Conv2d(3, 3, 1), nn.ReLU(), *head)  # numbers of one digit and of two
    notation = "[conv3-bn-relu]x3-conv3k1-relu-pool-affine7-bn-relu-affine4"
    return [one("torchvision's names", resnet, ResNet(), 3, 3, 20, 20), one("a sequence", notation, chain, 3, 3, 6, 6)]


FAMILIES = [
    conv2d,
    max_pool2d,
    avg_pool2d,
    global_avg_pool,
    batchnorm,
    affine,
    activation,
    loss,
    optimizer,
    network,
    resnet20,
    residual,
    groups,
    clip_ema,
    whitening,
    muon,
    augment,
    imports,
]


def main():
    parser = argparse.ArgumentParser(description="Write the golden numbers of the tests from PyTorch.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tests/golden"), help="folder to write to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    generator = f"scripts/gen_golden.py with torch {torch.__version__}, numpy {np.__version__}"
    for family in FAMILIES:
        # One case per line: a change of one case is a change of one line.
        cases = ",\n".join(json.dumps(case, separators=(",", ":"), allow_nan=False) for case in family())
        path = args.out / f"{family.__name__}.json"
        path.write_text(f'{{"generator":{json.dumps(generator)},"cases":[\n{cases}\n]}}\n')
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
