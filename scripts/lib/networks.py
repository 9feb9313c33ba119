"""Networks in our notation: those that the comparisons share, a notation's layers, and PyTorch's module for one."""

import re
from collections import Counter
from typing import NamedTuple

THREE_LAYER = "conv64-relu-pool-affine500-relu-affine10"
VGG = "-".join(f"conv{f}-bn-relu-conv{f}-bn-relu-pool" for f in (64, 128, 256)) + "-affine10"


class Problem(Exception):
    """What is wrong and how to mend it, in one line."""


class Layer(NamedTuple):
    """A layer of a notation; `channels` and `side` are those of its input, `options` the letters with their numbers."""

    kind: str
    number: float
    options: dict
    channels: int
    side: int


# The kinds of layers that can be read, and the letters of their options. A residual is `res(`, its layers, and `)`.
KINDS = {"whiten": "s", "conv": "kspb", "bn": "ge", "gelu": "", "relu": "", "silu": "", "pool": "sp", "avgpool": "sp",
         "gap": "", "affine": "b", "div": "", "softmax": "", "res(": "", ")": ""}


def words(notation):
    """What a notation joins by `-`, groups repeated; `res[...]` becomes the words `res(` and `)` around its own."""
    group = r"(res\s*)?\[([^\[\]]*)\](?:\s*[x×*]\s*(\d+))?"
    notation = notation.lower()
    while found := re.search(group, notation):
        once = f"res(-{found[2]}-)" if found[1] else found[2]
        notation = notation.replace(found[0], "-".join([once] * int(found[3] or 1)), 1)
    return [word.strip() for word in notation.split("-")]


def layers(notation, channels=3, side=32):
    """The layers of a notation, as README.md explains them, for images with so many channels and pixels a side."""
    for word in words(notation):
        kind, number, rest = re.fullmatch(r"([a-z()]*)([\d.]*)(.*)", word.removesuffix("sum")).groups()
        options = dict(re.findall(r"([a-z])([\d.]+)", rest))
        known = kind in KINDS and set(options) <= set(KINDS[kind])
        if not known or rest != "".join(map("".join, options.items())):
            raise Problem(f"the scripts do not know the layer `{word}`, or not all of its options")
        options = {letter: float(value) for letter, value in options.items()}
        number = float(number or {"pool": 2, "avgpool": 2}.get(kind, 0))
        if kind == "conv" and "p" not in options:
            options["p"] = same_padding(word, side, options.get("k", 3), options.get("s", 1))
        yield Layer(kind, number, options, channels, side)
        windows = {"whiten": number, "conv": options.get("k", 3), "pool": number, "avgpool": number, "gap": side}
        window = windows.get(kind)
        if window:
            stride = options.get("s", window if "pool" in kind else 1)
            side = int((side + 2 * options.get("p", 0) - window) // stride + 1)
        channels = int({"whiten": 2 * channels * number**2, "conv": number, "affine": number}.get(kind, channels))
        side = 1 if kind == "affine" else side


def same_padding(word, side, kernel, stride):
    """Of a convolution that keeps the size, or the size / stride rounded up."""
    both = max(0, (-(-side // stride) - 1) * stride + kernel - side)
    if both % 2:
        raise Problem(f"`{word}` on {side} pixels pads one side more than the other: give a padding, such as p1")
    return both / 2


def torch_network(notation, channels=3, side=32):
    """PyTorch's module for a notation, and those of its layers that have parameters, by our names for them."""
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, inside, shortcut):
            super().__init__()
            self.inside, self.shortcut = inside, shortcut

        def forward(self, x):
            return self.inside(x) + self.shortcut(x)

    named, counts = {}, Counter()
    chains, residuals = [[]], []  # of the network and of the residuals that are open

    def name(kind, module):
        counts[kind] += 1
        named[f"{kind}{counts[kind]}"] = module
        return module

    def shortcut(start, end):
        """Of a residual between these sizes: where they differ, a 1x1 convolution and batchnorm, as option B has it."""
        if (start.channels, start.side) == (end.channels, end.side):
            return nn.Identity()
        conv = name("shortcut", nn.Conv2d(start.channels, end.channels, 1, -(-start.side // end.side), bias=False))
        norm = named[f"shortcut{counts['shortcut']}.bn"] = nn.BatchNorm2d(end.channels)
        return nn.Sequential(conv, norm)

    read = list(layers(notation, channels, side))
    for layer, following in zip(read, [*(layer.kind for layer in read[1:]), ""]):
        kind, size, options = layer.kind, int(layer.number), {key: int(n) for key, n in layer.options.items()}
        bias = following != "bn" and options.get("b", 1) == 1
        if kind == "res(":
            chains.append([])
            residuals.append(layer)
            continue
        if kind == ")":
            module = Residual(nn.Sequential(*chains.pop()), shortcut(residuals.pop(), layer))
        elif kind == "conv":
            numbers = options.get("k", 3), options.get("s", 1), options["p"]
            module = name(kind, nn.Conv2d(layer.channels, size, *numbers, bias=bias))
        elif kind == "affine":
            module = name(kind, nn.Linear(layer.channels * layer.side**2, size, bias=bias))
            if counts[kind] == 1:
                module = nn.Sequential(nn.Flatten(), module)
        elif kind == "bn" and not layer.number:
            module = name(kind, nn.BatchNorm2d(layer.channels))
        elif kind == "relu":
            module = nn.ReLU(inplace=True)
        elif kind == "pool":
            module = nn.MaxPool2d(size, options.get("s", size), options.get("p", 0))
        elif kind == "gap":
            module = nn.AdaptiveAvgPool2d(1)
        else:
            raise Problem(f"PyTorch's side has no module for the layer `{kind}`, or not with these options")
        chains[-1].append(module)
    return nn.Sequential(*chains.pop()), named


def load(named, tensors):
    """Sets the parameters and statistics of modules by our names to those of a saved network."""
    for name, module in named.items():
        own = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
        # A matrix is (D, M) here, and (M, D) there.
        module.load_state_dict({key: tensor.T if tensor.dim() == 2 else tensor for key, tensor in own.items()})
