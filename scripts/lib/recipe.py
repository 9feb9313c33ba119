"""What the scripts about the record recipe share: the notation of its networks, and gemmnet as a program."""

import json
import re
import subprocess
from pathlib import Path

from lib import networks
from lib.networks import Problem

CHECKOUT = Path(__file__).resolve().parent.parent.parent
CIFAR = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def layers(notation, channels=3, side=32):
    """The layers of a notation of the recipe: it has no residuals, and softmax cross-entropy, summed, at its end."""
    *body, loss = networks.words(notation)
    if not re.fullmatch(r"softmax(sum|[\d.]+sum)", loss):
        raise Problem(f"the loss `{loss}` is not softmax cross-entropy, summed: end the network with softmax0.2sum")
    if "res(" in body:
        raise Problem("the record recipe's networks have no residuals")
    return networks.layers(notation, channels, side)


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
