#!/usr/bin/env python3
"""Writes the golden numbers of tests/golden/*.json: what PyTorch computes in f64 for the operations of gemmnet.

    pip install torch numpy
    python scripts/gen_golden.py --out tests/golden

Each file holds one family of operations: a list of cases with a name, parameters and arrays (shape and values in
row-major order). Inputs are rounded to a few decimals, which keeps the files small; results have all their digits. The
numbers are seeded: running the script again, with the same versions, changes nothing.

Layouts are gemmnet's: images NCHW, filters OIHW, affine weights (D, M). Padding is [top, bottom, left, right].
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

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
