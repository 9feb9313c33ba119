#!/usr/bin/env python3
"""The record recipe for CIFAR-10 (Jordan 2024, arXiv 2404.00498, with the Muon optimizer) in PyTorch on the CPU, f32.

    scripts/torch_recipe.py DATA_DIR [--epochs 8] [--widths 64 256 256] [--batch 2000] [--seed 0] [--threads 2]
    scripts/torch_recipe.py DATA_DIR --net NOTATION ...

DATA_DIR holds the official binary batches. Needs torch and numpy (pip install torch numpy). Prints a JSON object
after every epoch: epoch, seconds (of training so far, the whitening too, without reading files and evaluation), loss
(per image, of the last batch), test_accuracy; and at the end one of seconds, test_accuracy and views_accuracy, with
six views of each test image. Trains on all but the last 2 % of the training images, which are the validation split in
gemmnet, or on the first --train.

The recipe: pixels normalised per channel; a 2x2 convolution of 24 fixed filters that whiten patches (eigenvectors of
their covariance over the root of the eigenvalues, and the negatives; its bias is trained for 3 epochs), GELU, three
groups of conv - pool - bn - gelu - conv - bn - gelu, a 3x3 max pool, a linear head without bias scaled by 1 / width.
Convolutions begin as the identity on their first filters. Batchnorm's scale stays 1. Muon (three Newton-Schulz steps)
for filters, whose norm is reset to sqrt(filters) before each step; SGD with Nesterov momentum for the rest; the loss
is summed over the batch, labels smoothed by 0.2; rates fall to 0 linearly. Images are mirrored at random in epoch 0
and all the other way round in every second epoch after it, and shifted by up to 2 pixels with reflection. --net takes
gemmnet's notation for smaller variants.

--lockstep prints {"about"} when it is ready, and then reads a line before each turn: the epoch to train up to, such
as 2 or 0.5, or nothing for the next one. It ends with the training, or where its input does.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

from lib import recipe

try:
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError as error:
    sys.exit(f"error: {error.name} is missing: {sys.executable} -m pip install torch numpy")

MEAN, STD = ((torch.tensor(values).view(3, 1, 1)) for values in ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]))
WHITENED, WHITENING_EPS = 5000, 5e-4  # images that whitening is measured on; what is added to the eigenvalues
ITERATIONS = 3  # of Newton-Schulz


def records(directory, names):
    raw = np.concatenate([np.fromfile(Path(directory) / name, np.uint8).reshape(-1, 3073) for name in names])
    return torch.from_numpy(raw[:, 1:].reshape(-1, 3, 32, 32).copy()), torch.from_numpy(raw[:, 0].astype(np.int64))


def normalized(images):
    return ((images.float() / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)


class Divide(nn.Module):
    def __init__(self, divisor):
        super().__init__()
        self.divisor = divisor

    def forward(self, x):
        return x / self.divisor


def convolution(layer):
    size, filters = int(layer.options.get("k", 3)), int(layer.number)
    conv = nn.Conv2d(layer.channels, filters, size, int(layer.options.get("s", 1)), int(layer.options["p"]), bias=False)
    nn.init.dirac_(conv.weight.data[: layer.channels])
    return conv


def batchnorm(layer):
    if layer.options.get("g") != 0 or not layer.number:
        raise recipe.Problem("batchnorm has a momentum and a scale that stays 1 here: write it as bn0.6g0")
    norm = nn.BatchNorm2d(layer.channels, momentum=1 - layer.number, eps=layer.options.get("e", 1e-5))
    norm.weight.requires_grad = False
    return norm


def head(layer):
    linear = nn.Linear(layer.channels * layer.side**2, int(layer.number), bias=False)
    linear.weight.data /= linear.weight.data.std()
    return linear


def module(layer, following):
    """What computes a layer, as a list of modules."""
    kind, number = layer.kind, layer.number
    if (kind == "affine" or kind == "conv" and following != "bn") and layer.options.get("b") != 0:
        raise recipe.Problem(f"the recipe has no bias here: write it as {kind}{number:.0f}b0")
    stride, padding = int(layer.options.get("s", number)), int(layer.options.get("p", 0))
    pool = dict(kernel_size=int(number), stride=stride, padding=padding)
    make = {
        "whiten": lambda: [nn.Conv2d(3, int(6 * number**2), int(number), int(layer.options.get("s", 1)))],
        "conv": lambda: [convolution(layer)],
        "bn": lambda: [batchnorm(layer)],
        "gelu": lambda: [nn.GELU()],
        "relu": lambda: [nn.ReLU()],
        "silu": lambda: [nn.SiLU()],
        "pool": lambda: [nn.MaxPool2d(**pool)],
        "avgpool": lambda: [nn.AvgPool2d(**pool)],
        "gap": lambda: [nn.AdaptiveAvgPool2d(1)],
        "affine": lambda: [nn.Flatten(), head(layer)],
        "div": lambda: [Divide(number)],
        "softmax": lambda: [],
    }
    return make[kind]()


def network(notation):
    """The network of a notation, and how much its loss smooths labels."""
    layers = list(recipe.layers(notation))
    kinds = [layer.kind for layer in layers]
    if kinds[0] != "whiten" or kinds.count("whiten") != 1 or kinds.count("affine") != 1:
        raise recipe.Problem("the recipe's networks begin with a whitening layer such as whiten2, and have one affine layer")
    modules = [m for layer, following in zip(layers, kinds[1:] + [""]) for m in module(layer, following)]
    return nn.Sequential(*modules).to(memory_format=torch.channels_last), layers[-1].number


@torch.no_grad()
def whiten(conv, images):
    """Gives the first convolution filters that whiten patches of these images."""
    size = conv.kernel_size[0]
    patches = images.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size**2)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + WHITENING_EPS).sqrt()).T.reshape(-1, 3, size, size)
    conv.weight.copy_(torch.cat([filters, -filters]))
    conv.weight.requires_grad = False


@torch.no_grad()
def muon(p, velocity, rate, momentum):
    velocity.mul_(momentum).add_(p.grad)
    m = p.grad.add(velocity, alpha=momentum).flatten(1)
    rate *= max(1, m.shape[0] / m.shape[1]) ** 0.5  # 1 in the record's network
    p.mul_(len(p) ** 0.5 / p.norm())
    tall = m.shape[0] > m.shape[1]
    m = m.T if tall else m
    m = m / (m.norm() + 1e-7)
    for _ in range(ITERATIONS):
        s = m @ m.T
        m = 3.4445 * m + (-4.7750 * s + 2.0315 * s @ s) @ m
    p.sub_((m.T if tall else m).reshape(p.shape), alpha=rate)


@torch.no_grad()
def accuracy(net, images, labels, views):
    """With one view of each image, or with six: it and two shifts by a pixel, and their mirror images."""
    net.eval()
    both = lambda x: 0.5 * net(x) + 0.5 * net(x.flip(-1))
    right = 0
    for i in range(0, len(images), 1000):
        x = normalized(images[i : i + 1000])
        if views == 1:
            scores = net(x)
        else:
            padded = F.pad(x, (1,) * 4, "reflect")
            scores = 0.5 * both(x) + 0.25 * (both(padded[:, :, :32, :32]) + both(padded[:, :, 2:, 2:]))
        right += (scores.argmax(1) == labels[i : i + 1000]).sum().item()
    net.train()
    return right / len(images)


def augmented(x, mirrored, shift, cutout):
    """Normalised images, mirrored where it says so, shifted at random, and without a square of `cutout` pixels round
    any of theirs."""
    x, count = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x), len(x)
    if shift:
        padded, by = F.pad(x, (shift,) * 4, "reflect"), torch.randint(0, 2 * shift + 1, (count, 2))
        x = torch.stack([padded[j, :, r : r + 32, c : c + 32] for j, (r, c) in enumerate(by.tolist())])
    if cutout:
        distance = torch.arange(32) - torch.randint(0, 32, (2, count, 1)) + cutout // 2  # from its first row and column
        rows, columns = (distance >= 0) & (distance < cutout)
        x = x.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0)
    return x.contiguous(memory_format=torch.channels_last)


class Training:
    """A network in training; `seconds` it took so far."""

    def __init__(self, args, images, labels):
        self.args, self.images, self.labels, self.step = args, images, labels, 0
        self.net, self.smoothing = network(args.net)
        start = time.perf_counter()
        whiten(self.net[0], normalized(images[:WHITENED]))
        self.per_epoch = len(images) // args.batch
        self.steps, self.whiten_steps = (math.ceil(e * self.per_epoch) for e in (args.epochs, args.whiten_epochs))
        of = lambda kind: [m for m in self.net if isinstance(m, kind)]
        self.rates = [args.bias_rate] * (1 + len(of(nn.BatchNorm2d))) + [args.head_rate]
        params = [self.net[0].bias, *(norm.bias for norm in of(nn.BatchNorm2d)), of(nn.Linear)[0].weight]
        decay = args.decay * args.batch
        groups = [dict(params=[p], lr=rate, weight_decay=decay / rate) for p, rate in zip(params, self.rates)]
        self.sgd = torch.optim.SGD(groups, momentum=args.momentum, nesterov=True)
        self.filters = [(c.weight, torch.zeros_like(c.weight)) for c in of(nn.Conv2d)[1:]]
        self.mirrored = torch.rand(len(images)) < 0.5
        self.seconds = time.perf_counter() - start

    @property
    def epoch(self):
        return self.args.epochs if self.step == self.steps else self.step / self.per_epoch

    def up_to(self, epoch):
        """Trains until so many epochs are done in all; the loss per image of the last batch."""
        start, end, loss = time.perf_counter(), min(math.ceil(epoch * self.per_epoch), self.steps), None
        while self.step < end:
            loss = self.iterate()
        loss = None if loss is None else loss.item() / self.args.batch
        self.seconds += time.perf_counter() - start
        return loss

    def iterate(self):
        args, (epoch, batch) = self.args, divmod(self.step, self.per_epoch)
        if batch == 0:
            self.order = torch.randperm(len(self.images))
        index = self.order[batch * args.batch : (batch + 1) * args.batch]
        mirrored = self.mirrored[index] ^ (epoch % 2 == 1)
        x = augmented(normalized(self.images[index]), mirrored, args.shift, args.cutout)
        self.sgd.zero_grad()
        for p, _ in self.filters:
            p.grad = None
        self.net[0].bias.requires_grad = self.step < self.whiten_steps
        loss = F.cross_entropy(self.net(x), self.labels[index], label_smoothing=self.smoothing, reduction="sum")
        loss.backward()
        for i, (group, rate) in enumerate(zip(self.sgd.param_groups, self.rates)):
            group["lr"] = rate * max(0, 1 - self.step / max(self.whiten_steps if i == 0 else self.steps, 1))
        self.sgd.step()
        for p, velocity in self.filters:
            muon(p, velocity, args.muon_rate * (1 - self.step / self.steps), args.muon_momentum)
        self.step += 1
        return loss


def run(args):
    recipe.check_data(args.data)
    images, labels = records(args.data, recipe.CIFAR[:-1])
    keep = args.train or len(images) - len(images) // 50
    images, labels = images[:keep], labels[:keep]
    if len(images) < args.batch:
        raise recipe.Problem(f"{len(images)} training images make no batch of {args.batch}: lower --batch")
    test = records(args.data, recipe.CIFAR[-1:])
    say = lambda **values: print(json.dumps(values), flush=True)
    if args.lockstep:
        network(args.net)  # refuses what it cannot build before anybody waits for it
        say(about=f"PyTorch {torch.__version__}, {args.threads} thread(s)")
    line = sys.stdin.readline() if args.lockstep else "\n"
    torch.manual_seed(args.seed)
    training = Training(args, images, labels)
    while line:
        loss = training.up_to(float(line) if line.strip() else math.floor(training.epoch) + 1)
        plain = accuracy(training.net, *test, 1)
        say(epoch=training.epoch, seconds=training.seconds, loss=loss, test_accuracy=plain)
        if training.step == training.steps:
            return say(seconds=training.seconds, test_accuracy=plain, views_accuracy=accuracy(training.net, *test, 6))
        line = sys.stdin.readline() if args.lockstep else "\n"


def main():
    parser = argparse.ArgumentParser(description="The record recipe for CIFAR-10 in PyTorch on the CPU.")
    option = parser.add_argument
    option("data", metavar="DATA_DIR", help="CIFAR-10's binary batches")
    option("--epochs", type=float, default=8, help="passes over the images, also parts of one (8)")
    option("--batch", type=int, default=2000, help="images in a batch (2000)")
    option("--widths", type=int, nargs="+", default=[64, 256, 256], help="filters of each group (64 256 256)")
    option("--smoothing", type=float, default=0.2, help="of the labels (0.2)")
    option("--net", metavar="NOTATION", help="the whole network in gemmnet's notation, in place of the last two")
    option("--muon-rate", type=float, default=0.24, help="learning rate of filters (0.24)")
    option("--muon-momentum", type=float, default=0.6, help="momentum of filters (0.6)")
    option("--bias-rate", type=float, default=0.053, help="learning rate of biases (0.053)")
    option("--head-rate", type=float, default=0.67, help="learning rate of the head (0.67)")
    option("--momentum", type=float, default=0.85, help="momentum of biases and head (0.85)")
    option("--decay", type=float, default=2e-6, help="L2 times rate of biases and head, per image of a batch (2e-6)")
    option("--whiten-epochs", type=float, default=3, help="the whitening's bias is trained for so many; 0 for never (3)")
    option("--shift", type=int, default=2, help="pixels (2)")
    option("--cutout", type=int, default=0, help="side of the square that is taken out (0)")
    option("--train", type=int, help="images, the first ones (all but the last 2 %%)")
    option("--seed", type=int, default=0)
    option("--threads", type=int, default=2)
    option("--lockstep", action="store_true", help="read a line from stdin before each turn")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        args.net = args.net or recipe.notation(args.widths, "bn0.6g0", args.smoothing)
        run(args)
    except recipe.Problem as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
