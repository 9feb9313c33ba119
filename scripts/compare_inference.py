#!/usr/bin/env python3
"""Compares gemmnet with ONNX Runtime, OpenVINO and PyTorch on inference: the same networks, on the CPU, in one sitting.

    scripts/compare_inference.py [--networks vgg resnet18 ...] [--batches 1 8 256] [--threads 1 2] [--rounds 5]
                                 [--sides gemmnet onnxruntime ...] [--max-isa avx2] [--json FILE]
    scripts/compare_inference.py --tail [--networks vgg ...] [--threads 1 2] [--json FILE]

Needs Rust and, in the Python that runs it, what the sides need: pip install torch safetensors onnx onnxscript
onnxruntime openvino. Builds benches/compare.rs, which writes each network (He's initial weights; biases, scales and
running statistics as if trained) and images (standard normal); PyTorch loads the network and exports it to ONNX for
the others. All scores must be ours but for 1e-3 of the largest. Then the sides, a process each, take turns: one
computes while the others wait for input. The table has medians over all rounds, in milliseconds; the ratio is the time
of the fastest other side / ours. --json writes rows of network, batch, threads, side, ms.

Each side runs as its users get it, in f32, made for this batch, with as many threads as the row says. A call takes
images (N, C, H, W) that lie in memory, and ends when the scores lie there:

- gemmnet: a Session; scores go to a buffer that is kept.
- onnxruntime: graph optimisations and spinning threads as by default; input and output are bound to arrays that are
  kept.
- openvino: performance hint LATENCY, inference precision f32; the request keeps its input and output.
- torch-eager, torch-channels-last, torch-compile: eval mode under torch.inference_mode; a call allocates its scores.
  With channels last, the images lie in that order beforehand. torch-compile is torch.compile in its default mode,
  which needs a C++ compiler.

--max-isa avx2 keeps each side from using newer vector instructions: gemmnet with OpenBLAS, PyTorch with oneDNN and MKL,
OpenVINO with oneDNN. MLAS goes by the processor alone (all of ONNX Runtime's products are its, and those of OpenVINO's
affine layers), so the sides see a processor without AVX-512 (lib/hide_avx512.c; needs Linux and a C compiler). Where
the processor cannot pretend, the table says so, and the ratio compares with what was not limited anyway.

--tail measures the latency of single images, of gemmnet only: p50, p99 and the worst of 10,000 (after 100 that do not
count), of one caller, and of four threads that share a session and the threads that it runs on, each with memory of
its own. --json writes rows of network, threads, callers, p50_ms, p99_ms, worst_ms.
"""

import argparse
import array
import importlib.util
import json
import logging
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from lib import networks, turns


class Network(NamedTuple):
    notation: str
    image: list
    batches: list


def residual(filters, stride=""):
    return f"res[conv{filters}{stride}-bn-relu-conv{filters}-bn]-relu"


# ResNet-20 is the preset, ResNet-18 torchvision's.
RESNET_20 = "-".join(["conv16-bn-relu", f"[{residual(16)}]x3", residual(32, "s2p1"), f"[{residual(32)}]x2",
                      residual(64, "s2p1"), f"[{residual(64)}]x2", "gap-affine10"])
RESNET_18 = "-".join(["conv64k7s2p3-bn-relu-pool3s2p1", f"[{residual(64)}]x2",
                      *(f"{residual(f, 's2p1')}-{residual(f)}" for f in (128, 256, 512)), "gap-affine1000"])
NETWORKS = {
    "three-layer": Network(networks.THREE_LAYER, [3, 32, 32], [1, 8, 256]),
    "vgg": Network(networks.VGG, [3, 32, 32], [1, 8, 256]),
    "resnet20": Network(RESNET_20, [3, 32, 32], [1, 8, 256]),
    "resnet18": Network(RESNET_18, [3, 224, 224], [1, 8]),
}
# The sides, and the packages that each needs. Networks come to ONNX through PyTorch.
EXPORT = ["torch", "safetensors", "onnx", "onnxscript"]
SIDES = {
    "gemmnet": [],
    "onnxruntime": [*EXPORT, "onnxruntime"],
    "openvino": [*EXPORT, "openvino"],
    "torch-eager": ["torch", "safetensors"],
    "torch-channels-last": ["torch", "safetensors"],
    "torch-compile": ["torch", "safetensors"],
}
# What --max-isa does not reach where the processor cannot pretend to have no more.
UNLIMITED = {"onnxruntime": "not limited", "openvino": "affine not limited"}
LIMIT = 1e-3  # of the largest score: how far scores may be apart
IMAGES, WARMUPS, CALLERS = 10_000, 100, 4  # of --tail


# The sides: functions that make of a case the one that runs it. A case has a folder where our side has left the network
# and the images, and where the scores go.


def images(case):
    import numpy

    return numpy.fromfile(Path(case["folder"]) / "images.f32", numpy.float32).reshape(case["batch"], *case["image"])


def torch_module(case):
    from safetensors.torch import load_file

    channels, side, _ = case["image"]
    module, named = networks.torch_network(case["network"], channels, side)
    networks.load(named, load_file(Path(case["folder"]) / "network.safetensors"))
    return module.eval()


def export(case):
    """Writes the ONNX file; there is nothing to run."""
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing, which is not needed
    file, x = Path(case["folder"]) / "network.onnx", torch.from_numpy(images(case))
    torch.onnx.export(torch_module(case), (x,), file, dynamo=True, external_data=False, verbose=False)


def with_onnxruntime(case, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    file = Path(case["folder"]) / "network.onnx"
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    scores = onnxruntime.OrtValue.ortvalue_from_shape_and_type(session.get_outputs()[0].shape, "float32")
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(images(case)))
    binding.bind_ortvalue_output(session.get_outputs()[0].name, scores)
    session.run_with_iobinding(binding)
    return lambda: session.run_with_iobinding(binding), scores.numpy()


def with_openvino(case, threads):
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.compile_model(Path(case["folder"]) / "network.onnx", "CPU", config).create_infer_request()
    request.set_input_tensor(openvino.Tensor(images(case)))
    infer = lambda: request.infer(share_outputs=True)
    infer()
    return infer, request.get_output_tensor().data


def with_torch(case, threads, variant):
    import torch

    torch.set_num_threads(threads)
    module, x = torch_module(case), torch.from_numpy(images(case))
    if variant == "channels-last":
        module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if variant == "compile":
        module = torch.compile(module)
    call = torch.inference_mode()(lambda: module(x))
    return call, call().numpy()


def serve(side, threads):
    def prepare(case):
        if side == "export":
            return export(case)
        if side == "onnxruntime":
            call, scores = with_onnxruntime(case, threads)
        elif side == "openvino":
            call, scores = with_openvino(case, threads)
        else:
            call, scores = with_torch(case, threads, side.removeprefix("torch-"))
        scores.tofile(scores_of(case, side))
        return call

    turns.serve(side, prepare)


# The referee.


def scores_of(case, side):
    """The file with its scores."""
    return Path(case["folder"]) / f"{side}.f32"


def check_scores(case, side, what):
    """Stops unless a side has our scores."""
    want, got = (array.array("f", scores_of(case, name).read_bytes()) for name in ("gemmnet", side))
    apart, largest = [abs(ours - other) for ours, other in zip(want, got)], max(map(abs, want))
    if len(want) != len(got):
        sys.exit(f"error: {side} has {len(got)} scores for {what}, gemmnet {len(want)}")
    if not all(distance <= LIMIT * largest for distance in apart):
        sys.exit(f"error: {side} has other scores than gemmnet for {what}: they are up to {max(apart) / largest:.1e} "
                 "of the largest apart")


def case_of(name, batch, folder):
    network = NETWORKS[name]
    return {"op": "inference", "network": network.notation, "image": network.image, "batch": batch,
            "folder": str(folder)}


def start(side, threads):
    return turns.Side(sys.executable, __file__, "--serve", side, "--threads", threads)


def compare(args, bench, folder, show):
    """Measures everything, and yields the rows."""
    cases = [(name, batch) for name in args.networks for batch in args.batches or NETWORKS[name].batches]
    exporter = start("export", max(args.threads)) if {"onnxruntime", "openvino"} & set(args.sides) else None
    for threads in args.threads:
        ours = turns.Side(bench, "--threads", threads)
        sides = {side: ours if side == "gemmnet" else start(side, threads) for side in args.sides}
        for name, batch in cases:
            case = case_of(name, batch, folder / f"{name}-{batch}")
            fresh = not Path(case["folder"]).exists()
            Path(case["folder"]).mkdir(exist_ok=True)
            ours.ask(case)  # first: the others compute what it has left in the folder
            if fresh and exporter:
                exporter.ask(case)
            for side, process in sides.items():
                process.ask(case)
                check_scores(case, side, f"{name}, batch {batch}")
            medians, _ = turns.alternate([(process, case) for process in sides.values()], args.rounds)
            times = dict(zip(sides, medians))
            show(name, batch, threads, times)
            for side, ms in times.items():
                yield {"network": name, "batch": batch, "threads": threads, "side": side, "ms": ms}
        for process in {ours, *sides.values()}:
            process.close()


def table(args, beyond):
    """A function that prints a line of the table, whose head says which sides go `beyond` the limit, if any do."""
    heads = [f"{side} ({UNLIMITED[side]})" if beyond and side in UNLIMITED else side for side in args.sides]
    line = ("| {:11} | {:>5} | {:>7} " + "".join(f"| {{:>{len(head)}}} " for head in heads) + "| {:>5} |").format
    print("\n" + line("network", "batch", "threads", *heads, "ratio"))
    print(line(*["---"] * (4 + len(heads))), flush=True)

    def show(name, batch, threads, times):
        others = [ms for side, ms in times.items() if side != "gemmnet"]
        ratio = f"{min(others) / times['gemmnet']:.2f}" if others and "gemmnet" in times else ""
        print(line(name, batch, threads, *(f"{ms:.3f}" for ms in times.values()), ratio), flush=True)

    return show


def tail(args, bench):
    """Measures the latency of single images, prints the table and yields the rows."""
    line = "| {:11} | {:>7} | {:>7} | {:>8} | {:>8} | {:>8} |".format
    print("\n" + line("network", "threads", "callers", "p50 ms", "p99 ms", "worst ms"))
    print(line(*["---"] * 6), flush=True)
    for name in args.networks:
        network = NETWORKS[name]
        alone = {"op": "inference", "network": network.notation, "batch": 1, "image": network.image}
        shared = {"op": "shared", "network": network.notation, "image": network.image, "callers": CALLERS}
        for threads in args.threads:
            side = turns.Side(bench, "--threads", threads)
            for callers, case in ((1, alone), (CALLERS, shared)):
                times = sorted(side.ask(case, WARMUPS, IMAGES)["times_ms"])
                p50, p99, worst = statistics.median(times), times[len(times) * 99 // 100], times[-1]
                print(line(name, threads, callers, f"{p50:.3f}", f"{p99:.3f}", f"{worst:.3f}"), flush=True)
                yield {"network": name, "threads": threads, "callers": callers,
                       "p50_ms": p50, "p99_ms": p99, "worst_ms": worst}
            side.close()


def check(sides):
    """Stops if a side lacks a package."""
    needed = dict.fromkeys(name for side in sides for name in SIDES[side])
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        lacking = ", ".join(side for side in sides if set(SIDES[side]) & set(missing))
        sys.exit(f"error: {missing[0]} is missing: {sys.executable} -m pip install {' '.join(missing)} (needed by "
                 f"{lacking}, which --sides can leave out)")


def run(args):
    bench = turns.build()
    if (load := os.getloadavg()[0]) > 1:
        print(f"warning: the load is {load:.1f}; times of a busy machine are of little worth")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        beyond = args.max_isa and not turns.limit_to_avx2(folder)
        measured = tail(args, bench) if args.tail else compare(args, bench, Path(folder), table(args, beyond))
        for row in measured:
            rows.append(row)
            if args.json:
                Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


def main():
    cores = len(os.sched_getaffinity(0))
    description = "Compares gemmnet with ONNX Runtime, OpenVINO and PyTorch on inference."
    parser = argparse.ArgumentParser(description=description)
    option = parser.add_argument
    option("--networks", nargs="+", choices=NETWORKS, help="(all; with --tail vgg)")
    option("--batches", type=int, nargs="+", help="(1 8 256; of resnet18 1 8)")
    option("--threads", type=int, nargs="+", default=sorted({1, cores}), help=f"of each side (1 and all: {cores})")
    option("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="(all)")
    option("--rounds", type=int, default=5, help="turns of each side on each network and batch (5)")
    option("--max-isa", choices=["avx2"], help="vector instructions that may be used (all)")
    option("--tail", action="store_true", help="the latency of single images, of gemmnet only")
    option("--json", metavar="FILE", help="write the rows there")
    option("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min([*args.threads, *(args.batches or []), args.rounds]) < 1:
        parser.error("--threads, --batches and --rounds start at 1")
    if args.serve:
        return serve(args.serve, *args.threads)
    args.networks = args.networks or (["vgg"] if args.tail else list(NETWORKS))
    if not args.tail:
        check(args.sides)
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("interrupted; --json has what was measured")


if __name__ == "__main__":
    main()
