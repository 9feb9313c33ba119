"""What several tests need: pictures that can be told apart, and a network trained on them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gemmnet

NOTATION = "conv8-bn-relu-pool-res[conv8-relu-conv8]-relu-affine3"
DIM = (3, 8, 8)


def pictures(count, seed):
    """uint8 pictures (count, 3, 8, 8) and their labels: 0 bright above, 1 bright on the left, 2 bright in the middle."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (count, *DIM), dtype=np.uint8)
    labels = np.arange(count) % 3
    for image, label in zip(images, labels):
        place = [np.s_[:, :3], np.s_[:, :, :3], np.s_[:, 3:6, 3:6]][label]
        image[place] += 100
    return images, labels


def train(threads=1, **options):
    (x, y), (x_val, y_val) = pictures(240, 1), pictures(60, 2)
    options = {"epochs": 3, "batch_size": 30, "class_names": ["above", "left", "middle"], "progress": False, **options}
    return gemmnet.train(NOTATION, x, y, x_val, y_val, threads=threads, **options)


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a terminal: a shell starts what it puts into the background with it ignored, and programs inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The file of a trained network, with all of its training."""
    path = tmp_path_factory.mktemp("networks") / "checkpoint.safetensors"
    train(checkpoint=path)
    return path


@pytest.fixture(scope="session")
def model(checkpoint):
    return gemmnet.Model.load(checkpoint)


@pytest.fixture(scope="session")
def x(model):
    """17 images as the network takes them."""
    return model.normalize(pictures(17, 3)[0])


@pytest.fixture
def script(tmp_path):
    """Runs a program in a fresh Python, which has to end well and soon; returns what it printed."""

    def run(text, *arguments, timeout=60, **variables):
        file = tmp_path / "program.py"
        file.write_text(text)
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, **variables}
        done = subprocess.run(
            [sys.executable, str(file), *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
