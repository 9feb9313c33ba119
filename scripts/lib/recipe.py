"""What the scripts about the record recipe share: the notation of its networks, and gemmnet as a program."""

import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parent.parent.parent
CIFAR = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


class Problem(Exception):
    """What is wrong and how to mend it, in one line."""


class Layer(NamedTuple):
    """A layer of a notation; `channels` and `side` are those of its input, `options` the letters with their numbers."""

    kind: str
    number: float
    options: dict
    channels: int
    side: int


# The kinds of layers that the recipe's networks are made of, and the letters of their options.
KINDS = {"whiten": "s", "conv": "kspb", "bn": "ge", "gelu": "", "relu": "", "silu": "", "pool": "sp", "avgpool": "sp",
         "gap": "", "affine": "b", "div": "", "softmax": ""}


def layers(notation, channels=3, side=32):
    """The layers of a notation, as README.md explains them, without residuals."""
    repeated = r"(?<!res)\[([^\[\]]*)\](?:\s*[x×*]\s*(\d+))?"
    while group := re.search(repeated, notation):
        notation = notation.replace(group[0], "-".join([group[1]] * int(group[2] or 1)), 1)
    words = [word.strip().lower() for word in notation.split("-")]
    if not re.fullmatch(r"softmax(sum|[\d.]+sum)", words[-1]):
        raise Problem(f"the loss `{words[-1]}` is not softmax cross-entropy, summed: end the network with softmax0.2sum")
    words[-1] = words[-1].removesuffix("sum")
    for word in words:
        kind, number, rest = re.fullmatch(r"([a-z]*)([\d.]*)(.*)", word).groups()
        options = dict(re.findall(r"([a-z])([\d.]+)", rest))
        known = kind in KINDS and set(options) <= set(KINDS[kind])
        if not known or rest != "".join(map("".join, options.items())):
            raise Problem(f"the layer `{word}` is none of the record recipe's, or has options that are not")
        options = {letter: float(value) for letter, value in options.items()}
        number = float(number or {"pool": 2, "avgpool": 2}.get(kind, 0))
        if kind == "conv" and "p" not in options:
            options["p"] = same_padding(word, side, options.get("k", 3), options.get("s", 1))
        yield Layer(kind, number, options, channels, side)
        window = {"whiten": number, "conv": options.get("k", 3), "pool": number, "avgpool": number, "gap": side}.get(kind)
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


def notation(widths, norm, smoothing=0.2, whiten="whiten2", pool="pool", classes=10):
    """The record recipe's network with groups of these widths. `norm` and `whiten` are the words for its batchnorm and its
    whitening layer."""
    first = next(layers(f"{whiten}-softmaxsum"))
    side = int((first.side - first.number) // first.options.get("s", 1)) + 1
    words = [whiten, "gelu"]
    for width in widths:
        words += [f"conv{width}b0", pool, norm, "gelu", f"conv{width}b0", norm, "gelu"]
        side //= 2
    return "-".join([*words, f"pool{side}", f"affine{classes}b0", f"div{widths[-1]}", f"softmax{smoothing:g}sum"])


def check_data(directory):
    missing = [name for name in CIFAR if not (Path(directory) / name).is_file()]
    if missing:
        raise Problem(f"no {missing[0]} in {directory}: give the directory of CIFAR-10's binary batches")


def build():
    """The program of this checkout."""
    command = ["cargo", "build", "--release", "--locked", "--bin", "gemmnet", "--message-format=json-render-diagnostics"]
    try:
        result = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise Problem("cargo is missing: run scripts/train once, which installs it, or give --gemmnet PROGRAM") from None
    if result.returncode != 0:
        raise Problem("gemmnet cannot be built; see above, or give --gemmnet PROGRAM")
    return next(m["executable"] for m in map(json.loads, result.stdout.splitlines()) if m.get("executable"))


class Gemmnet:
    """The program; a call with a subcommand and its options returns the JSON object that it ends with."""

    def __init__(self, program):
        self.program = str(program or build())

    def __call__(self, *arguments):
        command = [self.program, *map(str, arguments), "--json"]
        try:
            result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except OSError as error:
            fix = "give --gemmnet PROGRAM, or leave it out"
            raise Problem(f"{self.program} does not run ({error.strerror}): {fix}") from None
        if result.returncode != 0:
            said = [line for line in result.stderr.splitlines() if line.strip()] or [f"exit code {result.returncode}"]
            error = next((line for line in said if line.startswith("error")), said[-1])
            raise Problem(f"gemmnet {arguments[0]} failed: {error.removeprefix('error: ')}")
        try:
            return json.loads(result.stdout.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            raise Problem(f"gemmnet {arguments[0]} ended without a JSON object: build it anew") from None

    def presets(self):
        """The options of `train` that say what each preset does, by its name."""
        return {preset["name"]: preset["arguments"] for preset in self("train", "--list-presets")["presets"]}
