"""What else is in the process: other libraries, forks, other processes, the environment."""

import importlib.util
import itertools
import os
import sys

import pytest

HELLO = """
import numpy as np
import gemmnet
from gemmnet.cs231n.fast_layers import conv_forward_fast
rng = np.random.default_rng(0)
x, w, b = rng.standard_normal((8, 3, 20, 20)), rng.standard_normal((32, 3, 3, 3)), rng.standard_normal(32)
out, _ = conv_forward_fast(x, w, b, {"stride": 1, "pad": 1})
windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
expected = np.einsum("nchwij,fcij->nfhw", windows, w, optimize=True) + b[:, None, None]
assert np.allclose(out, expected, rtol=1e-10), abs(out - expected).max()
"""


@pytest.mark.parametrize("order", list(itertools.permutations(["torch", "numpy", "gemmnet"])), ids="-".join)
def test_imports_in_any_order(order, script):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    products = """
import torch
a = torch.ones(300, 300)
assert (a @ a == 300).all() and (np.ones((300, 300)) @ np.ones((300, 300)) == 300).all()
"""
    script("".join(f"import {name}\n" for name in order) + HELLO + products)


@pytest.mark.parametrize("order", [("numpy", "gemmnet"), ("gemmnet", "numpy")], ids="-".join)
def test_imports_beside_numpy_in_any_order(order, script):
    products = "assert (np.ones((300, 300)) @ np.ones((300, 300)) == 300).all()\n"
    script("".join(f"import {name}\n" for name in order) + HELLO + products)


def test_the_environment_is_left_as_it_was(script):
    """Also where OpenBLAS' kernels had to be chosen; who names them is not overruled; who asks for nonsense hears it."""
    environment = """
import ctypes, os
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
before = dict(os.environ)
import gemmnet
assert dict(os.environ) == before
print(getenv(b"OPENBLAS_CORETYPE"))
"""
    if "OPENBLAS_CORETYPE" not in os.environ:
        assert script(environment) == "None\n"
    core = """
import ctypes, warnings
import {first}
with warnings.catch_warnings(record=True) as noted:
    warnings.simplefilter("always")
    import gemmnet
library = ctypes.CDLL("libopenblas.so.0")
library.openblas_get_corename.restype = ctypes.c_char_p
print(library.openblas_get_corename().decode(), [str(note.message) for note in noted])
"""
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        assert script(core.format(first="gemmnet"), OPENBLAS_CORETYPE="Nehalem").startswith("Nehalem ")
        if "OPENBLAS_CORETYPE" not in os.environ:
            # Whatever the processor: there is nothing to complain about.
            assert script(core.format(first="numpy")).endswith(" []\n")
        # Somebody else uses the library already: it is left alone, and if that is slow, the user is told.
        loaded = core.replace("import {first}", 'ctypes.CDLL("libopenblas.so.0")')
        corename, notes = script(loaded).split(" ", 1)
        assert ("OPENBLAS_CORETYPE" in notes) == (corename in {"Prescott", "Nehalem", "Core2", "Barcelona"}), notes
    nonsense = """
try:
    import gemmnet
except ValueError as error:
    assert "GEMMNET_MAX_ISA" in str(error)
else:
    raise SystemExit("imported")
"""
    script(nonsense, GEMMNET_MAX_ISA="mmx")


NETWORK = """
import faulthandler, hashlib, multiprocessing, os, signal, sys, threading, time
import numpy as np
import gemmnet
from conftest import pictures, train

faulthandler.dump_traceback_later(50, exit=True)
model = gemmnet.Model.load(sys.argv[1])
x = model.normalize(pictures(17, 3)[0])
session = model.session(17, threads=2)
expected = session.run(x)

def all_of_it():
    '''Inference on an old and a new session, training, and a layer, each on two threads.'''
    from gemmnet.cs231n.fast_layers import conv_forward_fast
    assert np.array_equal(session.run(x), expected)
    assert np.array_equal(model.session(17, threads=2).run(x), expected)
    conv_forward_fast(np.ones((8, 3, 32, 32)), np.ones((16, 3, 3, 3)), np.ones(16), {"stride": 1, "pad": 1})
    return train(threads=2, epochs=1).history["loss"]
"""


def test_a_fork_computes_as_its_parent_does(script, checkpoint):
    program = NETWORK + """
loss = all_of_it()
for _ in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if all_of_it() == loss else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all_of_it() == loss
# A grandchild, and pools of multiprocessing.
context = multiprocessing.get_context("fork")
with context.Pool(2) as pool:
    results = [pool.apply_async(all_of_it) for _ in range(4)]
    assert [result.get(timeout=30) for result in results] == [loss] * 4
def parent():
    process = context.Process(target=all_of_it)
    process.start()
    process.join(30)
    assert process.exitcode == 0 and all_of_it() == loss
process = context.Process(target=parent)
process.start()
process.join(40)
assert process.exitcode == 0
assert all_of_it() == loss
"""
    script(program, checkpoint, GEMMNET_NUM_THREADS="2")


def test_forks_while_others_compute(script, checkpoint):
    """A fork in the middle of calls and of training: it waits until no product is under way."""
    program = NETWORK + """
loss = all_of_it()
stop, failed = threading.Event(), []

def again_and_again(work):
    try:
        while not stop.is_set():
            work()
    except BaseException as error:
        failed.append(error)

def run():
    assert np.array_equal(session.run(x), expected)

workers = [threading.Thread(target=again_and_again, args=(work,)) for work in (run, run, all_of_it)]
for worker in workers:
    worker.start()
end, forks = time.monotonic() + 4, 0
while time.monotonic() < end:
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if all_of_it() == loss else 1)
    assert os.waitpid(child, 0)[1] == 0
    forks += 1
stop.set()
for worker in workers:
    worker.join()
assert not failed, failed
assert all_of_it() == loss
# In a callback, training waits.
def callback(event):
    if isinstance(event, gemmnet.Epoch) and event.epoch == 1:
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if all_of_it() == loss else 1)
        assert os.waitpid(child, 0)[1] == 0
assert train(threads=2, epochs=1, callback=callback).history["loss"] == loss
print(forks)
"""
    assert int(script(program, checkpoint, GEMMNET_NUM_THREADS="2")) >= 3


def test_a_fork_waits_for_the_calls_under_way(script):
    """What a call has locked would stay locked in the child, once in many thousand times: so none may be under way."""
    program = """
import os, threading, time
import numpy as np
import gemmnet
images, labels = np.zeros((8, 3, 32, 32), np.uint8), np.arange(8) % 2
network = "[conv64-relu]x4-affine2"
model = gemmnet.train(network, images, labels, images, labels, epochs=1, batch_size=8, progress=False).model
session, x = model.session(256, threads=1), np.ones((256, 3, 32, 32), np.float32)
out = np.empty((256, 2), np.float32)
for _ in range(5):
    out.fill(np.nan)
    caller = threading.Thread(target=session.run, args=(x, out))
    caller.start()
    time.sleep(0.05)
    in_the_middle = np.isnan(out).all()
    child = os.fork()
    done = not np.isnan(out).any()
    if child == 0:
        os._exit(0 if done else 1)
    if in_the_middle:
        print(done and os.waitpid(child, 0)[1] == 0)
    caller.join()
"""
    waited = script(program, GEMMNET_NUM_THREADS="1").split()
    assert waited and set(waited) == {"True"}


def test_callbacks_may_compute(script, checkpoint):
    """Trainings that wait for their callbacks leave the threads alone that these use."""
    program = NETWORK + """
meet, losses = threading.Barrier(2, timeout=30), []

def callback(event):
    meet.wait()
    assert np.array_equal(session.run(x), expected)

def work():
    losses.append(train(threads=2, epochs=1, callback=callback).history["loss"])

workers = [threading.Thread(target=work) for _ in range(2)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert losses[0] == losses[1] == train(threads=1, epochs=1).history["loss"]
"""
    script(program, checkpoint)


def test_processes_of_many_threads_agree(script, checkpoint):
    """Several processes, each with many threads on one session: one set of scores."""
    program = NETWORK + """
def work(_):
    session, digests, lock = model.session(17, threads=2), set(), threading.Lock()
    def call():
        for _ in range(20):
            digest = hashlib.sha256(session.run(x).tobytes()).hexdigest()
            with lock:
                digests.add(digest)
    threads = [threading.Thread(target=call) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return digests

if __name__ == "__main__":
    found = work(0)
    for how in ("fork", "spawn"):
        with multiprocessing.get_context(how).Pool(3) as pool:
            found.update(*pool.map(work, range(3)))
    assert len(found) == 1, found
"""
    script(program, checkpoint)


def test_exceptions_travel_between_processes(tmp_path):
    import pickle

    import gemmnet

    with pytest.raises(gemmnet.MissingFileError) as missing:
        gemmnet.Model.load(tmp_path / "missing")
    with pytest.raises(gemmnet.DataError) as damaged:
        gemmnet.Model.from_bytes(b"")
    for error in [missing.value, damaged.value]:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_a_program(script, checkpoint):
    """As a user sees it: with the signal's default handler, in a program of its own, the bar closed."""
    program = NETWORK + """
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    train(threads=2, epochs=1e6, progress=True)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert script(program, checkpoint) == "interrupted\n"
