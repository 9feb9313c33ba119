#!/usr/bin/env python3
"""Compares gemmnet with PyTorch, or with another checkout of itself, on the CPU, side by side in one sitting.

    scripts/compare_torch.py [--threads 2] [--rounds 5] [--only SUBSTRING] [--max-isa avx2] [--json FILE]
    scripts/compare_torch.py --against DIR ...

Needs Rust and, in the Python that runs it, PyTorch (pip install torch). Builds benches/compare.rs, starts it and
PyTorch as two processes, and lets them take turns on every case: one computes while the other waits for input. Ours
checks its results before it is timed. The table has medians over all rounds; the ratio is PyTorch's median / ours, and
`target` the ratio that this project promises. Shares are of the fastest matrix product of our BLAS on all threads;
GFLOP/s count a convolution's multiplications by its definition, so algorithms that need fewer (Winograd) can exceed
100 %.

Each side runs as its users get it. PyTorch: eager, f32 (f64 where the case says so), contiguous (N, C, H, W) tensors,
results allocated by every call, fused Adam; inference in eval mode under torch.inference_mode, without torch.compile.
Ours: results into buffers that are kept.

PyTorch runs networks in further ways too, each in a process of its own: with network and images in channels_last
order, and, where Linux says that the processor multiplies bf16 numbers, that under bf16 autocast. The ratio and its
target are against plain PyTorch, `best` is the ratio against the faster of the two in f32. --json writes rows of case,
direction, ours_ms, torch_ms, ratio, target, channels_last_ms, bf16_ms, best_ratio; the last three are null where there
is nothing to say.

--max-isa avx2 keeps both sides from using newer vector instructions, and leaves bf16 out. They are told, and see a processor
without AVX-512 where it can pretend (lib/hide_avx512.c; needs Linux and a C compiler): older checkouts cannot be told.

--against DIR puts the checkout of gemmnet in DIR, a `git worktree` of an older commit for instance, in PyTorch's place,
which is then not needed. Both are built, each in its own target directory, and take the same turns on the same cases.
The ratio is the other's median / ours, above 1 where this checkout is faster, and there are no targets: the last lines
are the geometric mean and the smallest of the ratios. --json writes rows of case, direction, ours_ms, other_ms, ratio.
How far from 1 the ratios of equal programs come, `--against .` shows.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from lib.networks import THREE_LAYER, VGG, torch_network
from lib.turns import CHECKOUT, Side, alternate, build, limit_to_avx2, processor_has, serve


def conv(dtype, x, w, stride=1):
    return {"op": "conv", "dtype": dtype, "x": x, "w": w, "stride": stride}


def pool(dtype, x):
    return {"op": "pool", "dtype": dtype, "x": x}


def batchnorm(x):
    return {"op": "batchnorm", "x": x}


def step(network, batch, **more):
    return {"op": "step", "network": network, "batch": batch, **more}


VGG_STEP = "step, VGG-like 64-64-128-128-256-256 with batchnorm, batch 128"

# Name, what is computed, and for each direction the ratio that we promise. Networks are for (3, 32, 32) images.
CASES = [
    ("seed conv f64", conv("f64", [100, 3, 31, 31], [25, 3, 3, 3], 2), {"forward": 2.5, "backward": 2.5}),
    ("seed conv f32", conv("f32", [100, 3, 31, 31], [25, 3, 3, 3], 2), {"forward": 1.3, "backward": 3.0}),
    ("seed pool f64", pool("f64", [100, 3, 32, 32]), {"forward": 5.0, "backward": 1.1}),
    ("seed pool f32", pool("f32", [100, 3, 32, 32]), {"forward": 6.0, "backward": 1.0}),
    ("3x3, N=500, 3→64 @32", conv("f32", [500, 3, 32, 32], [64, 3, 3, 3]), {"forward": 5.0, "backward": 4.0}),
    ("3x3, N=100, 64→64 @32", conv("f32", [100, 64, 32, 32], [64, 64, 3, 3]), {"forward": 1.7, "backward": 1.7}),
    ("3x3, N=100, 64→128 @16", conv("f32", [100, 64, 16, 16], [128, 64, 3, 3]), {"forward": 1.8, "backward": 1.6}),
    ("3x3, N=100, 128→128 @16", conv("f32", [100, 128, 16, 16], [128, 128, 3, 3]), {"forward": 1.8, "backward": 1.6}),
    ("3x3, N=100, 128→256 @8", conv("f32", [100, 128, 8, 8], [256, 128, 3, 3]), {"forward": 1.4, "backward": 1.3}),
    ("3x3, N=100, 256→256 @8", conv("f32", [100, 256, 8, 8], [256, 256, 3, 3]), {"forward": 1.4, "backward": 1.3}),
    ("spatial batchnorm (100,64,32,32)", batchnorm([100, 64, 32, 32]), {"forward": 1.5, "backward": 1.3}),
    ("2x2 max pool (100,64,32,32)", pool("f32", [100, 64, 32, 32]), {"forward": 6.0, "backward": 1.0}),
    ("step, three-layer net, batch 50", step(THREE_LAYER, 50), {"step": 2.2}),
    ("step, three-layer net, batch 500", step(THREE_LAYER, 500), {"step": 3.0}),
    (VGG_STEP, step(VGG, 128), {"step": 1.8}),
    ("VGG-like, latency of batch 1", {"op": "inference", "network": VGG, "batch": 1}, {"inference": None}),
    ("VGG-like, throughput of batch 256", {"op": "inference", "network": VGG, "batch": 256}, {"inference": None}),
]


# PyTorch's side: a process that answers the same requests as benches/compare.rs.


def torch_call(case, variant):
    """A function that runs the case once. Networks run in a variant: `plain`, `channels_last` or `bf16`."""
    import torch
    from torch.nn import functional as F

    aten, op, forward = torch.ops.aten, case["op"], case["direction"] == "forward"
    dtype = torch.float64 if case.get("dtype") == "f64" else torch.float32
    if op in ("step", "inference"):
        (net, _), batch = torch_network(case["network"]), case["batch"]
        x, y = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
        if variant != "plain":
            net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=variant == "bf16")
        if op == "inference":
            return torch.inference_mode()(autocast(lambda net=net.eval(): net(x)))
        adam = torch.optim.Adam(net.parameters(), 1e-3, fused=True)

        def train():
            with autocast:
                loss = F.cross_entropy(net(x), y)
            adam.zero_grad()
            loss.backward()
            adam.step()

        return train
    x = torch.randn(case["x"], dtype=dtype)
    if op == "conv":
        w, b = torch.randn(case["w"], dtype=dtype), torch.randn(case["w"][0], dtype=dtype)
        stride = case["stride"]
        dout = torch.randn_like(F.conv2d(x, w, b, stride, 1))
        if forward:
            return lambda: F.conv2d(x, w, b, stride, 1)
        sizes = ([len(b)], [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1)
        return lambda: aten.convolution_backward(dout, x, w, *sizes, [True] * 3)
    if op == "pool":
        out, index = F.max_pool2d(x, 2, 2, return_indices=True)
        dout, sizes = torch.randn_like(out), ([2, 2], [2, 2], [0, 0], [1, 1], False)
        if forward:
            return lambda: F.max_pool2d(x, 2, 2, return_indices=True)
        return lambda: aten.max_pool2d_with_indices_backward(dout, x, *sizes, index)
    gamma, beta, mean, var = (torch.randn(x.shape[1]).abs() for _ in range(4))
    normalize = lambda: aten.native_batch_norm(x, gamma, beta, mean, var, True, 0.1, 1e-5)
    _, save_mean, save_inverse = normalize()
    dout, saved = torch.randn_like(x), (mean, var, save_mean, save_inverse, True, 1e-5)
    return normalize if forward else lambda: aten.native_batch_norm_backward(dout, x, gamma, *saved, [True] * 3)


def serve_torch(variant, threads):
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    serve(f"PyTorch {torch.__version__}, {threads} thread(s)", lambda case: torch_call(case, variant))


# The referee.


def variants(max_isa):
    """In which ways PyTorch runs networks, besides plainly."""
    has_bf16 = not max_isa and processor_has("avx512_bf16", "amx_bf16")
    return ["channels_last", "bf16"] if has_bf16 else ["channels_last"]


def commands(against):
    """What starts our side, and the other: the checkout in `against`, or PyTorch."""
    if not against:
        if importlib.util.find_spec("torch") is None:
            sys.exit(f"PyTorch is missing: {sys.executable} -m pip install torch")
        return [build(CHECKOUT)], [sys.executable, __file__, "--serve-torch", "plain"]
    if not (against / "Cargo.toml").is_file():
        sys.exit(f"--against: there is no checkout of gemmnet in {against}")
    ours, other = build(CHECKOUT), build(against)
    if ours == other and not against.samefile(CHECKOUT):
        sys.exit("both checkouts were built into one target directory, over each other; unset CARGO_TARGET_DIR")
    return [ours], [other]


def summary(rows, against):
    """The last lines."""
    if against:
        if not rows:
            return "no case was compared"
        least = min(rows, key=lambda row: row["ratio"])
        mean = statistics.geometric_mean(row["ratio"] for row in rows)
        return (f"geometric mean of {len(rows)} ratios: {mean:.3f}\n"
                f"smallest ratio: {least['ratio']:.3f} ({least['case']}, {least['direction']})")
    promised = [row for row in rows if row["target"]]
    return f"{sum(row['ratio'] >= row['target'] for row in promised)} of {len(promised)} targets reached"


def main():
    parser = argparse.ArgumentParser(description="Compares gemmnet with PyTorch, or with another checkout of itself.")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, in PyTorch's place")
    parser.add_argument("--threads", type=int, default=2, help="of each side (2)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side on each case (5)")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases with this in their name or direction")
    parser.add_argument("--max-isa", choices=["avx2"], help="vector instructions that may be used (all)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--serve-torch", metavar="VARIANT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_torch:
        return serve_torch(args.serve_torch, args.threads)
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds start at 1")

    programs = commands(args.against)
    with tempfile.TemporaryDirectory() as folder:
        if args.max_isa:
            limit_to_avx2(folder)
        compare(args, programs)


def compare(args, programs):
    """Measures everything, prints the table and writes the rows."""
    sides = [Side(*program, "--threads", args.threads) for program in programs]
    print(" against ".join(side.about for side in sides) + (f" in {args.against.resolve()}" if args.against else ""))
    further = {} if args.against else {variant: Side(*programs[1][:-1], variant, "--threads", args.threads)
                                       for variant in variants(args.max_isa)}
    if (load := os.getloadavg()[0]) > 1:
        skew = "of little worth" if args.against else "flattering: busy cores slow PyTorch down more than us"
        print(f"warning: the load is {load:.1f}, and these ratios are {skew}")
    peak = {}
    for dtype in ("f32", "f64"):
        gemm = {"op": "gemm", "dtype": dtype, "size": 2048}
        (ms,), flop = alternate([(sides[0], gemm)], args.rounds)
        peak[dtype] = flop / ms / 1e6
        print(f"gemm peak {dtype}: {peak[dtype]:.0f} GFLOP/s")

    opponent = "other" if args.against else "torch"
    torch_too = "" if args.against else " {:>6} | {:6} | " + "{:>16} | " * len(further) + "{:>6} |"
    line = ("| {:62} | {:9} | {:>8} | {:>8} | {:>6} |" + torch_too + " {:>7} | {:>6} |").format
    heads_too = [] if args.against else ["target", "", *(f"{variant} ms" for variant in further), "best"]
    heads = ["case", "direction", "ours ms", f"{opponent} ms", "ratio", *heads_too, "GFLOP/s", "share"]
    print("\n" + line(*heads))
    print(line(*["---"] * len(heads)), flush=True)
    rows = []

    def report(name, direction, case, medians, target, flop):
        ours, other, *others = medians
        ratio, rate = other / ours, flop and flop / ours / 1e6
        row = {"case": name, "direction": direction, "ours_ms": ours, f"{opponent}_ms": other, "ratio": ratio}
        cells = []
        if not args.against:
            ms = dict(zip(further, others))
            best = min(other, ms["channels_last"]) / ours if ms else None
            row |= {"target": target, "channels_last_ms": ms.get("channels_last"), "bf16_ms": ms.get("bf16"),
                    "best_ratio": best}
            cells = [f"{target:.1f}" if target else "", "missed" if target and ratio < target else "",
                     *(f"{ms[variant]:.3f}" if ms else "" for variant in further), f"{best:.2f}" if best else ""]
        rows.append(row)
        speed = (f"{rate:.0f}", f"{rate / peak[case.get('dtype', 'f32')]:.0%}") if flop else ("", "")
        print(line(name, direction, f"{ours:.3f}", f"{other:.3f}", f"{ratio:.2f}", *cells, *speed), flush=True)

    for name, case, targets in CASES:
        for direction, target in targets.items():
            if args.only in f"{name} {direction}":
                case = {**case, "direction": direction}
                asked = [*sides, *(further.values() if "network" in case else [])]
                medians, flop = alternate([(side, case) for side in asked], args.rounds)
                report(name, direction, case, medians, target, flop)

    if args.threads > 1 and args.only in "thread scaling":
        case = {**step(VGG, 128), "direction": "step"}
        single = [Side(*program, "--threads", 1) for program in programs]
        medians, flop = alternate([(side, case) for side in single + sides], args.rounds)
        report(f"{VGG_STEP}, 1 thread", "step", case, medians[:2], None, flop)
        ours, other = (medians[i] / medians[i + 2] for i in (0, 1))
        them = "the other checkout" if args.against else "PyTorch"
        print(f"\nthread scaling, 1 to {args.threads} threads: gemmnet {ours:.2f} times faster, {them} {other:.2f}")
    if args.only in "denormals":
        ordinary, tiny = (step(THREE_LAYER, 50, weight_scale=scale) for scale in (1.0, 1e-39))
        (ours, slowed), _ = alternate([(sides[0], ordinary), (sides[0], tiny)], args.rounds)
        print(f"\ndenormals, three-layer step: weights around 1e-40 {slowed:.1f} ms, ordinary ones {ours:.1f} ms, "
              f"ratio {slowed / ours:.2f}")

    print("\n" + summary(rows, args.against))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
