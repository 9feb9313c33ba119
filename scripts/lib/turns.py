"""Processes that take turns at computing: one is at work while the others wait for input. Ours is benches/compare.rs,
which describes requests and answers; others `serve`."""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
TURN_MS = 300  # how long one side computes before the other has its turn, about
WARM_MS = 30  # how much of a turn is not timed, about: threads wake up, caches fill
PAUSE_S = 0.1  # between turns: threads that wait for more work spin, those of ONNX Runtime for 30 ms and more


def build(checkout=CHECKOUT):
    """The executable of a checkout's bench."""
    command = ["cargo", "bench", "--locked", "--bench", "compare", "--no-run"]
    command.append("--message-format=json-render-diagnostics")
    result = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, text=True)
    if result.returncode != 0:
        sys.exit(f"cannot build in {checkout}: {' '.join(command)}")
    messages = map(json.loads, result.stdout.splitlines())
    return next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "compare")


def processor_has(*flags):
    """Whether Linux says that the processor has one of these, by their names in /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and not set(flags).isdisjoint(cpuinfo.read_text().split())


def limit_to_avx2(folder):
    """Keeps processes that are started from now on from using newer vector instructions. Those that go by the processor
    alone see one without, where it can pretend (see hide_avx512.c, which is compiled into `folder`); returns whether."""
    os.environ.update({
        "GEMMNET_MAX_ISA": "avx2", "OPENBLAS_CORETYPE": "Haswell", "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OV_CPU_MAX_ISA": "AVX2",  # besides oneDNN's, which OpenVINO takes too
        "TORCHINDUCTOR_CACHE_DIR": str(folder),  # what torch.compile has made for other instructions is not used
    })
    if not processor_has("avx512f"):
        return True
    source, library = Path(__file__).with_name("hide_avx512.c"), Path(folder) / "hide_avx512.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-Wl,-z,initfirst", "-o", library, source]
    if shutil.which("cc") is None or subprocess.run(command).returncode != 0:
        sys.exit(f"error: cannot compile {source}, which hides AVX-512: install a C compiler (Debian: gcc)")
    loaded = f"{library}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":")
    # the loader goes on without what it cannot load, and says so
    trial = subprocess.run(["true"], env=os.environ | {"LD_PRELOAD": loaded}, stderr=subprocess.PIPE)
    if trial.returncode != 0 or trial.stderr:
        print("warning: AVX-512 cannot be hidden here: what goes by the processor alone is not limited")
        return False
    os.environ["LD_PRELOAD"] = loaded
    return True


class Side:
    """A process that waits until it is asked."""

    def __init__(self, *command):
        self.command = command = list(map(str, command))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.about = self.answer()["about"]

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
            sys.exit(f"error: a side ended early, {how}; its message, if it had one, is above: {' '.join(self.command)}")
        return json.loads(line)

    def ask(self, case, warmups=0, runs=0):
        with contextlib.suppress(BrokenPipeError):  # answer() says so
            self.process.stdin.write(json.dumps({"case": case, "warmups": warmups, "runs": runs}) + "\n")
        answer = self.answer()
        time.sleep(PAUSE_S)
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def alternate(turns, rounds):
    """The median of each of `turns`, pairs of a side and a case, in milliseconds, and the FLOP of the first."""
    first = [side.ask(case, 2, 1) for side, case in turns]
    # at least 2 calls to warm up and 3 that count
    calls = lambda ms, least: [min(max(int(ms / answer["times_ms"][0]), least), 300) for answer in first]
    warmups, runs = calls(WARM_MS, 2), calls(TURN_MS, 3)
    times = [[] for _ in turns]
    for _ in range(rounds):
        for (side, case), warmup, count, into in zip(turns, warmups, runs, times):
            into += side.ask(case, warmup, count)["times_ms"]
    return [statistics.median(of_side) for of_side in times], first[0].get("flop")


def serve(about, prepare):
    """Answers requests until there are no more. `prepare` makes of a case the function that runs it once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback: who asks says what there is to say
    print(json.dumps({"about": about}), flush=True)
    ready = call = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["case"] != ready:
            call = None  # frees what it holds
            with contextlib.redirect_stdout(sys.stderr):  # stdout has answers only
                ready, call = request["case"], prepare(request["case"])
        times = []
        for _ in range(request["warmups"] + request["runs"]):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        print(json.dumps({"times_ms": times[request["warmups"]:]}), flush=True)
