#!/usr/bin/env python3
"""Compares gemmnet with PyTorch on whole trainings: presets by the record recipe, the same on both, in one sitting.

    scripts/compare_recipe.py DATA_DIR [--presets sprint sprint-75 ...] [--seeds 0 1 2] [--threads 2] [--json FILE]
                              [--max-isa avx2] [--plot FILE.svg]
    scripts/compare_recipe.py DATA_DIR --epochs-limit 1 ...

DATA_DIR holds CIFAR-10's binary batches. Needs Rust and, in the Python that runs it, PyTorch and NumPy (pip install
torch numpy), and for --plot Matplotlib. Reads from `gemmnet train --list-presets` what a preset does, says the same
to torch_recipe.py, and refuses a preset that cannot be said there. The sides take turns, an epoch each: gemmnet
saves, ends and is started again for its next turn; PyTorch waits. A row of the table is one turn; the last table has
the medians over the seeds of whole trainings, and the ratio is PyTorch's time / ours.

Each side runs as its users get it: PyTorch eager, f32, channels last, without torch.compile, random numbers of its
own. Seconds are of training: without reading files, evaluation and starting the program. Both train on all but the
last 2 % of the training images. Accuracies are of all test images, plain and with six views of each, of the last network
of both.

--max-isa avx2 keeps both sides from using newer vector instructions, as in compare_torch.py.

--epochs-limit E trains only the first E epochs of each, with the rates of the whole: for speed alone; views are not
measured. --json writes rows of preset, side, seed, seconds, test_accuracy, views_accuracy, and epochs, a list of
epoch, seconds (so far) and test_accuracy. --plot draws these, means over the seeds.
"""

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib import recipe
from lib.turns import limit_to_avx2

SIDES = ["gemmnet", "torch"]
PAUSE_S = 0.05  # between turns: threads that wait for more work spin for some milliseconds


# What a preset is in the options of torch_recipe.py.


class Options(argparse.ArgumentParser):
    def error(self, message):
        raise recipe.Problem(message)


def read(arguments):
    """The options of `gemmnet train` that torch_recipe.py can have a like of."""
    parser = Options(add_help=False, allow_abbrev=False)
    for name in ("net", "init", "optimizer", "sampler", "flip", "normalize", "keep"):
        parser.add_argument(f"--{name}")
    for name in ("learning-rate", "l2", "epochs", "warmup-epochs"):
        parser.add_argument(f"--{name}", type=float, default=0)
    for name in ("batch-size", "shift", "cutout"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--group", action="append", default=[])
    parser.add_argument("--schedule"), parser.add_argument("--shift-fill")
    return parser.parse_args(shlex.split(arguments))


def require(what, value, *wanted):
    if value not in wanted:
        raise recipe.Problem(f"{what} is {value}, and torch_recipe.py knows {wanted[0]} only")


def group_of(names, kind, options):
    """The rule of the group that these parameters are in, and its numbers."""
    found = set()
    for name in names:
        selects = (text.split("=", 1) for text in options.group)
        matches = (how for select, how in selects if select == kind or fnmatch.fnmatchcase(name, select))
        found.add(next(matches, None))
    if len(found) != 1 or None in found:
        raise recipe.Problem(f"the parameters {names[0]} to {names[-1]} have to be in one --group")
    rule, *numbers = found.pop().split(",")
    return rule, {"schedule": options.schedule, "l2": "0", **dict(number.split("=", 1) for number in numbers)}


def trained_by(rule, names, kind, options, knows):
    """The numbers of these parameters' group, which is to have this rule and none but the numbers that `knows` lists."""
    found, numbers = group_of(names, kind, options)
    require(f"the rule of {names[0]}", found, rule)
    if unknown := set(numbers) - {"lr", "l2", "schedule", "momentum", *knows}:
        raise recipe.Problem(f"the rule of {names[0]} has {min(unknown)}, which torch_recipe.py does not")
    if not {"lr", "momentum"} <= set(numbers):
        raise recipe.Problem(f"the group of {names[0]} leaves out its lr or momentum: write them")
    return numbers


def whiten_epochs(options):
    """For how many epochs the whitening's bias is trained, and the numbers of its group, if it has any."""
    if group_of(["whiten1.bias"], "bias", options)[0] == "frozen":
        return 0, []
    numbers = trained_by("nesterov", ["whiten1.bias"], "bias", options, ())
    name, _, epochs = str(numbers["schedule"]).partition(":")
    require("the schedule of whiten1.bias", name, "linear")
    return float(epochs or options.epochs), [numbers]


def translate(arguments):
    """The options of torch_recipe.py that train what these of `gemmnet train` do."""
    options = read(arguments)
    for what, value, *wanted in (
        ("--init", options.init, "dirac"),
        ("--sampler", options.sampler, "shuffle", None),
        ("--flip", options.flip, "alternating"),
        ("--normalize", options.normalize, "per-channel"),
        ("--warmup-epochs", options.warmup_epochs, 0),
        ("--keep", options.keep, "last"),
        ("--shift-fill", options.shift_fill, "reflect", *([None, "zero", "zeros"] if options.shift == 0 else [])),
    ):
        require(what, value, *wanted)
    kinds = [layer.kind for layer in recipe.layers(options.net)]
    named = lambda kind, what: [f"{kind}{i + 1}.{what}" for i in range(kinds.count(kind))]
    if not named("bn", "bias") or not named("conv", "weight"):
        raise recipe.Problem("the network has no convolution or no batchnorm, and the record recipe both")
    epochs, whitening = whiten_epochs(options)
    biases = trained_by("nesterov", named("bn", "bias"), "bias", options, ())
    head = trained_by("nesterov", named("affine", "weight") or ["affine1.weight"], "weight", options, ())
    filters = trained_by("muon", named("conv", "weight"), "weight", options, ("iterations", "fixed_norm", "weight_decay"))
    for numbers in (biases, head, filters):
        require("a schedule", numbers["schedule"], "linear")
    for name, value in (("iterations", "3"), ("fixed_norm", "true"), ("weight_decay", "0"), ("l2", "0")):
        require(f"muon's {name}", filters.get(name, "0"), value)
    for numbers in [head, *whitening]:
        require("the momentum of biases and head", numbers["momentum"], biases["momentum"])
    for numbers in whitening:
        require("the rate of whiten1.bias", numbers["lr"], biases["lr"])
    decays = [float(numbers["l2"]) * float(numbers["lr"]) / options.batch_size for numbers in (biases, head, *whitening)]
    if not all(math.isclose(decay, decays[0], rel_tol=0.02) for decay in decays):
        raise recipe.Problem("l2 times lr of biases and head differ: torch_recipe.py has one --decay")
    return ["--net", options.net, "--epochs", options.epochs, "--batch", options.batch_size, "--shift", options.shift,
            "--cutout", options.cutout, "--whiten-epochs", epochs, "--bias-rate", biases["lr"], "--head-rate", head["lr"],
            "--momentum", biases["momentum"], "--decay", decays[0], "--muon-rate", filters["lr"],
            "--muon-momentum", filters["momentum"]]


# The sides: each trains up to an epoch when it is told to.


class Ours:
    def __init__(self, gemmnet, preset, seed, args, folder):
        self.gemmnet, self.seconds, self.common = gemmnet, 0, ["--threads", args.threads, "--data-dir", args.data]
        self.run = Path(folder) / f"{preset}-{seed}"
        self.start = ["--preset", preset, "--seed", seed, "--run", self.run]

    def up_to(self, epoch):
        answer = self.gemmnet("train", *self.start, "--stop-after", epoch, "--quiet", *self.common)
        self.start = ["--resume", self.run]
        self.seconds += answer["train_seconds"]
        return {"epoch": epoch, "seconds": self.seconds, "test_accuracy": answer["test_accuracy"]}

    def views_accuracy(self):
        where = ["--checkpoint", self.run, "--split", "test-full", "--views", 6]
        return self.gemmnet("eval", *where, *self.common)["accuracy"]

    def close(self):
        pass


class Torch:
    def __init__(self, options, seed, args):
        command = [sys.executable, Path(__file__).with_name("torch_recipe.py"), args.data, *options, "--lockstep"]
        command = [*map(str, command), "--seed", str(seed), "--threads", str(args.threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.about = self.answer()["about"]

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise recipe.Problem("torch_recipe.py ended early; its message is above")
        return json.loads(line)

    def up_to(self, epoch):
        with contextlib.suppress(BrokenPipeError):  # answer() says so
            self.process.stdin.write(f"{epoch}\n")
        answer = self.answer()
        time.sleep(PAUSE_S)
        return {"epoch": epoch, "seconds": answer["seconds"], "test_accuracy": answer["test_accuracy"]}

    def views_accuracy(self):
        return self.answer()["views_accuracy"]

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


# The referee.


def turns(epochs, limit):
    """The epochs at which turns end."""
    end = min(epochs, limit or epochs)
    return [*range(1, math.ceil(end)), int(end) if end == int(end) else end]


def train(sides, preset, seed, ends, whole, show):
    """Trains both sides in turns; a row for each."""
    history = {name: [] for name in sides}
    views = dict.fromkeys(sides)
    for end in ends:
        for name, side in sides.items():
            history[name].append(side.up_to(end))
            if whole and end == ends[-1]:
                views[name] = side.views_accuracy()
        took = {name: h[-1]["seconds"] - (h[-2]["seconds"] if len(h) > 1 else 0) for name, h in history.items()}
        show(preset, seed, f"{end:g}", took, {name: h[-1]["test_accuracy"] for name, h in history.items()})
    last = {name: h[-1] for name, h in history.items()}
    return [{"preset": preset, "side": name, "seed": seed, "seconds": last[name]["seconds"],
             "test_accuracy": last[name]["test_accuracy"], "views_accuracy": views[name], "epochs": history[name]}
            for name in sides]


def table(*first):
    """A function that prints a line of a table: its first cells, then seconds and what else, by the sides."""
    line = ("| {:10} " * len(first) + "| {:>9} | {:>9} | {:>6} | {:>10} | {:>10} |").format
    print("\n" + line(*first, "ours s", "torch s", "ratio", "ours acc.", "torch acc."), flush=True)
    print(line(*["---"] * (len(first) + 5)))

    def show(*cells):
        *cells, seconds, accuracies = cells
        both = len(seconds) == len(SIDES)
        times = [f"{seconds[side]:.2f}" if side in seconds else "" for side in SIDES]
        rates = ["" if accuracies.get(side) is None else f"{accuracies[side]:.4f}" for side in SIDES]
        ratio = f"{seconds['torch'] / seconds['gemmnet']:.2f}" if both else ""
        print(line(*map(str, cells), *times, ratio, *rates), flush=True)

    return show


def summary(rows):
    """The last table: for each preset the median time, and the mean accuracies."""
    show = table("preset", "accuracy")
    for preset in dict.fromkeys(row["preset"] for row in rows):
        of_side = lambda side: [row for row in rows if (row["preset"], row["side"]) == (preset, side)]
        of = lambda key: {side: [row[key] for row in of_side(side)] for side in SIDES}
        seconds = {side: statistics.median(values) for side, values in of("seconds").items() if values}
        for what, key in (("plain", "test_accuracy"), ("six views", "views_accuracy")):
            known = {side: values for side, values in of(key).items() if values and None not in values}
            if known:
                show(preset, what, seconds, {side: statistics.mean(values) for side, values in known.items()})


def plot(rows, file):
    """Test accuracy over seconds of training, means over the seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "gemmnet", "font.size": 11})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for i, preset in enumerate(dict.fromkeys(row["preset"] for row in rows)):
        for side, style in zip(SIDES, ("o-", "s--")):
            runs = [row["epochs"] for row in rows if (row["preset"], row["side"]) == (preset, side)]
            if runs:
                mean = lambda key: [statistics.mean(point[key] for point in points) for points in zip(*runs)]
                filled = f"C{i}" if side == "gemmnet" else "white"
                label = f"{preset}, {'gemmnet' if side == 'gemmnet' else 'PyTorch'}"
                axes.plot(mean("seconds"), mean("test_accuracy"), style, color=f"C{i}", mfc=filled, ms=6, label=label)
    axes.set(xscale="log", xlabel="seconds of training", ylabel="test accuracy")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, format="svg", metadata={"Date": None})


def check(args):
    """What a run of hours would otherwise end with."""
    recipe.check_data(args.data)
    needed = ["torch", "numpy"] * ("torch" in args.sides) + ["matplotlib"] * bool(args.plot)
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise recipe.Problem(f"{missing[0]} is missing: {sys.executable} -m pip install {' '.join(missing)}")


def known_presets(gemmnet, args):
    """What gemmnet and torch_recipe.py are told for each preset: its epochs and the latter's options."""
    listed, known = gemmnet.presets(), {}
    for name in args.presets:
        if name not in listed:
            raise recipe.Problem(f"there is no preset {name}: choose from {', '.join(listed)}")
        try:
            known[name] = read(listed[name]).epochs, translate(listed[name]) if "torch" in args.sides else []
        except recipe.Problem as problem:
            raise recipe.Problem(f"the preset {name} cannot be compared: {problem}") from None
    return known


def run(args):
    check(args)
    gemmnet, rows = recipe.Gemmnet(args.gemmnet), []
    presets = known_presets(gemmnet, args)
    if (load := os.getloadavg()[0]) > 1:
        print(f"warning: the load is {load:.1f}; times of a busy machine are of little worth")
    with tempfile.TemporaryDirectory() as folder:
        if args.max_isa:
            limit_to_avx2(folder)
        show = table("preset", "seed", "epoch")
        for preset, (epochs, options) in presets.items():
            ends = turns(epochs, args.epochs_limit)
            for seed in args.seeds:
                sides = {}
                if "gemmnet" in args.sides:
                    sides["gemmnet"] = Ours(gemmnet, preset, seed, args, folder)
                if "torch" in args.sides:
                    sides["torch"] = Torch(options, seed, args)
                try:
                    rows += train(sides, preset, seed, ends, ends[-1] == epochs, show)
                finally:
                    for side in sides.values():
                        side.close()
                if args.json:
                    Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    summary(rows)
    if args.plot:
        plot(rows, args.plot)


def main():
    parser = argparse.ArgumentParser(description="Compares gemmnet with PyTorch on whole trainings by the record recipe.")
    option = parser.add_argument
    option("data", metavar="DATA_DIR", help="CIFAR-10's binary batches")
    option("--presets", nargs="+", metavar="NAME", default=["sprint", "sprint-75", "sprint-85", "record"],
           help="of gemmnet (sprint sprint-75 sprint-85 record)")
    option("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of each preset (0 1 2)")
    option("--threads", type=int, default=2, help="of each side (2)")
    option("--max-isa", choices=["avx2"], help="vector instructions that may be used (all)")
    option("--epochs-limit", type=float, metavar="E", help="only the first E epochs, for speed alone")
    option("--sides", nargs="+", choices=SIDES, default=SIDES, help="(both)")
    option("--json", metavar="FILE", help="write the rows there")
    option("--plot", metavar="FILE.svg", help="draw accuracy over time there")
    option("--gemmnet", metavar="PROGRAM", help="(target/release/gemmnet, which is built)")
    args = parser.parse_args()
    if args.threads < 1 or args.epochs_limit is not None and args.epochs_limit <= 0:
        parser.error("--threads starts at 1, and --epochs-limit is above 0")
    try:
        run(args)
    except recipe.Problem as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("interrupted; --json has the trainings that ended")


if __name__ == "__main__":
    main()
