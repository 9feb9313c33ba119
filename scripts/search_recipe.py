#!/usr/bin/env python3
"""Searches for the fastest training that reaches an accuracy: variants of the record recipe, on gemmnet.

    scripts/search_recipe.py DATA_DIR --target 0.65 --budget MINUTES [--on validation] [--seeds 3] [--table FILE]

DATA_DIR holds CIFAR-10's binary batches, or other images of ten classes in that format. A candidate is drawn by
choosing each of the values in SPACE: a fifth of them at random, the others as neighbours of the best so far. It is trained
with one seed; of those that reach the target with all their seeds so far, the cheapest are trained with more, up to
--seeds (successive halving: what is behind half of those with as many seeds waits). A draw is left out that is
predicted to take longer than the best by far; time is nearly proportional to epochs x multiply-adds, and the table
says how. --on validation keeps the test images for the end: the table of the best at the end shows the accuracy that
was searched on, the mean and the least of the seeds.

Each training is a line of --table. Started again, with the same options, the search goes on from there; Ctrl-C ends
it and loses the training that runs. Data of another kind, or another machine, need another table. Needs Rust.
"""

import argparse
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

from lib import recipe

SPACE = {
    "width1": [0, 16, 24, 32, 48, 64],
    "width2": [16, 24, 32, 48, 64, 96, 128, 192, 256],
    "width3": [32, 48, 64, 96, 128, 192, 256],
    "whiten": ["whiten2", "whiten3", "whiten2s2", "whiten3s2", "whiten4s2"],
    "pool": ["pool", "avgpool"],
    "batch": [100, 150, 200, 250, 375, 500, 1000, 2000],
    "epochs": [0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8],
    "muon_rate": [0.06, 0.085, 0.12, 0.17, 0.24, 0.34, 0.48],
    "muon_momentum": [0.4, 0.5, 0.6, 0.7, 0.8],
    "bias_rate": [0.013, 0.027, 0.053, 0.1, 0.2],
    "head_rate": [0.17, 0.34, 0.67, 1.3, 2.6],
    "momentum": [0.7, 0.8, 0.85, 0.9],
    "smoothing": [0, 0.05, 0.1, 0.2, 0.3],
    "whiten_bias": ["frozen", "linear:3"],
    "shift": [0, 1, 2, 3, 4],
    "cutout": [0, 4, 8, 12],
}
FIRST = {"width1": 0, "width2": 64, "width3": 128, "whiten": "whiten3s2", "pool": "pool", "batch": 250, "epochs": 1,
         "muon_rate": 0.24, "muon_momentum": 0.6, "bias_rate": 0.053, "head_rate": 0.67, "momentum": 0.85,
         "smoothing": 0.2, "whiten_bias": "frozen", "shift": 0, "cutout": 0}
DECAY = 2e-6  # L2 strength times rate of biases and head, per image of a batch
BY_FAR = 1.3  # times the best's time; what is predicted to take longer is left out
SHARE = 0.2  # of the budget that one training may take while nothing reaches the target


def widths(candidate):
    """Of its groups; a first width of 0 is no group."""
    return [width for width in (candidate["width1"], candidate["width2"], candidate["width3"]) if width]


def arguments(candidate, norm):
    """The options of `gemmnet train` for a candidate."""
    c, decay = candidate, DECAY * candidate["batch"]
    net = recipe.notation(widths(c), norm, c["smoothing"], c["whiten"], c["pool"])
    sgd = lambda rate: f"nesterov,lr={rate},l2={decay / rate:.4g},momentum={c['momentum']}"
    whitening = "frozen" if c["whiten_bias"] == "frozen" else f"{sgd(c['bias_rate'])},schedule={c['whiten_bias']}"
    muon = f"muon,lr={c['muon_rate']},momentum={c['muon_momentum']},iterations=3,fixed_norm=true"
    groups = [("whiten1.bias", whitening), ("bias", sgd(c["bias_rate"])), ("affine1.weight", sgd(c["head_rate"]))]
    words = ["--net", net, "--init", "dirac", "--epochs", c["epochs"], "--batch-size", c["batch"], "--schedule", "linear"]
    for select, how in [*groups, ("weight", muon)]:
        words += ["--group", f"{select}={how}"]
    words += ["--flip=alternating", "--shift", c["shift"], "--normalize", "per-channel"]
    words += ["--shift-fill", "reflect"] * (c["shift"] > 0) + ["--cutout", c["cutout"]] * (c["cutout"] > 0)
    return list(map(str, words))


def multiply_adds(net):
    """Of one image, forward."""
    total = 0
    for layer in recipe.layers(net):
        if layer.kind == "conv":
            total += (layer.side / layer.options.get("s", 1)) ** 2 * 9 * layer.channels * layer.number
        elif layer.kind == "whiten":
            places = (layer.side - layer.number) // layer.options.get("s", 1) + 1
            total += places**2 * 6 * layer.number**2 * 3 * layer.number**2
    return total


def work(candidate):
    net = recipe.notation(widths(candidate), "bn0.9", 0, candidate["whiten"], candidate["pool"])
    return candidate["epochs"] * multiply_adds(net)


class Result:
    """What the table says of a candidate."""

    def __init__(self, trials, on):
        self.candidate, self.failed = trials[0]["candidate"], any("error" in trial for trial in trials)
        done = [trial for trial in trials if "error" not in trial]
        self.seeds, self.accuracies = len(done), [trial[f"{on}_accuracy"] for trial in done]
        self.seconds = statistics.median(trial["seconds"] for trial in done) if done else 0

    def reaches(self, target):
        return not self.failed and min(self.accuracies) >= target

    def rank(self, target):
        """Small for what is good: those that reach the target by time, behind them the others by accuracy."""
        if self.reaches(target):
            return 0, self.seconds
        return 1, 1 - min(self.accuracies)


class Search:
    def __init__(self, args):
        recipe.check_data(args.data)
        self.args, self.gemmnet, self.table = args, recipe.Gemmnet(args.gemmnet), Path(args.table)
        self.trials = self.read()
        presets = self.gemmnet.presets()
        if "record" not in presets:
            raise recipe.Problem("gemmnet has no preset `record`: build it anew")
        # The word for the recipe's batchnorm, such as bn0.6g0, has its home there.
        self.norm = next(word for word in presets["record"].split("-") if word.startswith("bn"))

    def read(self):
        """The trials in the table, of as many threads."""
        lines = self.table.read_text().splitlines() if self.table.exists() else []
        try:
            trials = [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            raise recipe.Problem(f"{self.table} has lines that are not JSON: remove them or give another --table") from None
        return [trial for trial in trials if trial["threads"] == self.args.threads]

    def results(self):
        """Of each candidate, the best first; without those that failed."""
        of = {}
        for trial in self.trials:
            of.setdefault(json.dumps(trial["candidate"]), []).append(trial)
        results = [Result(trials, self.args.on) for trials in of.values()]
        return sorted((r for r in results if not r.failed), key=lambda r: r.rank(self.args.target))

    def promoted(self, results):
        """The candidate to be trained with one more seed, if there is one: the cheapest that is in the better half of
        those with as many seeds, and not behind the best of all seeds."""
        good = [r for r in results if r.reaches(self.args.target)]
        finished = min((r.seconds for r in good if r.seeds >= self.args.seeds), default=float("inf"))
        for r in good:
            rung = sorted(other.seconds for other in good if other.seeds >= r.seeds)
            if r.seeds < self.args.seeds and r.seconds <= min(rung[(len(rung) - 1) // 2], finished):
                return r
        return None

    def limit(self, results):
        """The work that a new candidate may be, by the time that is left and the best's time."""
        if not results:
            return float("inf")
        per_work = statistics.median(r.seconds / work(r.candidate) for r in results)
        best = results[0]
        most = BY_FAR * best.seconds if best.reaches(self.args.target) else SHARE * 60 * self.args.budget
        return min(most, self.left()) / per_work

    def left(self):
        return self.end - time.monotonic()

    def drawn(self, results):
        """A candidate that has not been tried, or none if there seems to be none."""
        if not self.trials:
            return FIRST
        rng, limit = random.Random(f"{self.args.seed} {len(self.trials)}"), self.limit(results)
        tried = [trial["candidate"] for trial in self.trials]
        near = rng.random() < 0.8 and results
        for _ in range(10_000):
            if near:
                candidate = dict(rng.choice(results[:5]).candidate)
                for name in rng.sample(list(SPACE), rng.randint(1, 3)):
                    values = SPACE[name]
                    place = values.index(candidate[name]) + rng.choice([-1, 1])
                    candidate[name] = values[min(max(place, 0), len(values) - 1)]
            else:
                candidate = {name: rng.choice(values) for name, values in SPACE.items()}
            if candidate not in tried and work(candidate) <= limit:
                return candidate
        return None

    def trial(self, candidate, seed, folder):
        """Trains a candidate and keeps a line about it."""
        args, trial = self.args, {"candidate": candidate, "seed": seed, "threads": self.args.threads}
        common = ["--seed", seed, "--threads", args.threads, "--data-dir", args.data, "--quiet",
                  "--checkpoint", folder / "trial.safetensors"]
        try:
            answer = self.gemmnet("train", *arguments(candidate, self.norm), *common)
            trial |= {"seconds": answer["train_seconds"], "validation_accuracy": max(answer["val_accuracy"]),
                      "test_accuracy": answer["test_accuracy"]}
            said = f"{trial['seconds']:8.2f} s  {args.on} {trial[f'{args.on}_accuracy']:.4f}"
        except recipe.Problem as problem:
            if not self.trials:
                raise  # the first is known to be good: something else is wrong
            trial["error"] = said = str(problem)
        with self.table.open("a") as table:
            table.write(json.dumps(trial) + "\n")
        self.trials.append(trial)
        changed = " ".join(f"{name}={value}" for name, value in candidate.items() if value != FIRST[name])
        print(f"{len(self.trials):5}  seed {seed}  {said}  {changed or 'the first'}", flush=True)

    def run(self):
        self.end = time.monotonic() + 60 * self.args.budget
        with tempfile.TemporaryDirectory() as folder:
            while self.left() > 0:
                results = self.results()
                again = self.promoted(results)
                candidate, seed = (again.candidate, again.seeds) if again else (self.drawn(results), 0)
                if candidate is None:
                    return print("nothing is left to try: what was drawn is tried, or predicted to take too long")
                self.trial(candidate, seed, Path(folder))

    def show(self, count):
        """The best, and how to repeat them."""
        args, results = self.args, self.results()
        reached = [r for r in results if r.reaches(args.target)]
        print(f"\n{len(reached)} of {len(results)} candidates reach {args.target} in {args.on} with each of their seeds\n")
        shown = (sorted(reached, key=lambda r: (-r.seeds, r.seconds)) or results)[:count]
        line = "| {:>4} | {:>5} | {:>9} | {:>8} | {:>8} |".format
        print(line("rank", "seeds", "seconds", "mean", "least"))
        print(line(*["---"] * 5))
        for rank, r in enumerate(shown, 1):
            mean = statistics.mean(r.accuracies)
            print(line(rank, r.seeds, f"{r.seconds:.2f}", f"{mean:.4f}", f"{min(r.accuracies):.4f}"))
        for rank, r in enumerate(shown, 1):
            print(f"\n{rank}: gemmnet train {shlex.join(arguments(r.candidate, self.norm))} --threads {args.threads}")


def main():
    parser = argparse.ArgumentParser(description="Searches for the fastest training that reaches an accuracy.")
    option = parser.add_argument
    option("data", metavar="DATA_DIR", help="CIFAR-10's binary batches, or others in their format")
    option("--target", type=float, required=True, metavar="ACCURACY", help="such as 0.65")
    option("--budget", type=float, required=True, metavar="MINUTES", help="for how long to search")
    option("--on", choices=["validation", "test"], default="validation", help="(validation)")
    option("--seeds", type=int, default=3, help="with how many the best have to reach the target (3)")
    option("--table", metavar="FILE.jsonl", default="search.jsonl", help="(search.jsonl)")
    option("--seed", type=int, default=0, help="of the draws (0)")
    option("--threads", type=int, default=2, help="(2)")
    option("--show", type=int, default=5, metavar="N", help="how many of the best (5)")
    option("--gemmnet", metavar="PROGRAM", help="(target/release/gemmnet, which is built)")
    args = parser.parse_args()
    if min(args.seeds, args.threads) < 1 or not 0 < args.target < 1 or args.budget <= 0:
        parser.error("--seeds and --threads start at 1, --target is between 0 and 1, and --budget above 0")
    try:
        search = Search(args)
        try:
            search.run()
        except KeyboardInterrupt:
            print("interrupted")
        search.show(args.show)
    except recipe.Problem as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
