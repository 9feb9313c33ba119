"""Models and sessions: what they say, what they take, and that scores are the same however one asks."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import DIM, NOTATION, pictures

import gemmnet

ROOT = Path(__file__).resolve().parents[2]


def test_a_model_says_what_it_is(model, checkpoint):
    assert model.input_shape == DIM
    assert model.classes == 3
    assert model.class_names == ["above", "left", "middle"]
    assert model.notation == NOTATION + "-softmax"
    assert model.notation in repr(model) and "3x8x8" in repr(model)
    again = gemmnet.Model.from_bytes(checkpoint.read_bytes())
    images = pictures(9, 5)[0]
    np.testing.assert_array_equal(again.scores(images), model.scores(images))
    np.testing.assert_array_equal(gemmnet.Model.load(str(checkpoint)).scores(images), model.scores(images))


def test_pixels_are_normalized_as_in_training(model):
    train, images = pictures(240, 1)[0], pictures(5, 4)[0]
    expected = (images - train.mean(axis=0, dtype=np.float64)).astype(np.float32)
    x = model.normalize(images)
    assert x.dtype == np.float32 and x.shape == images.shape and x.flags.writeable
    np.testing.assert_allclose(x, expected, atol=1e-4)
    np.testing.assert_array_equal(model.normalize(images[2]), x[2])
    np.testing.assert_array_equal(model.normalize(images[::2]), x[::2])
    np.testing.assert_array_equal(model.normalize(images.astype(np.float64)), x)


def test_it_knows_the_pictures(model):
    images, labels = pictures(300, 6)
    classes = model.predict(images)
    assert classes.dtype == np.int64 and classes.shape == (300,)
    assert (classes == labels).mean() > 0.95
    scores = model.scores(images)
    assert scores.dtype == np.float32 and scores.shape == (300, 3)
    np.testing.assert_array_equal(scores.argmax(axis=1), classes)
    # 300 is no multiple of 128, and another order of images is another place in the batch.
    np.testing.assert_allclose(model.scores(images[::-1], batch=128), scores[::-1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.session(17).run(model.normalize(images[:17])), scores[:17], rtol=1e-4, atol=1e-4)
    assert model.predict(images[:0]).shape == (0,)


def test_an_image_that_is_no_number_has_no_class(model):
    images = pictures(3, 6)[0].astype(np.float32)
    images[1] = np.nan
    with pytest.raises(gemmnet.InvalidError, match="image 1 "):
        model.predict(images)


def test_run_takes_what_numpy_takes(model, x):
    session = model.session(17, threads=1)
    assert session.batch == 17 and "17 images of 3x8x8 on 1 thread" in repr(session)
    scores = session.run(x)
    assert scores.dtype == np.float32 and scores.shape == (17, 3)
    swapped = x.astype(x.dtype.newbyteorder())
    fortran = np.asfortranarray(x)
    misaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert not misaligned.flags.aligned and not fortran.flags.c_contiguous
    for same in [x.astype(np.float64), x.tolist(), swapped, fortran, misaligned, np.repeat(x, 2, axis=3)[..., ::2]]:
        np.testing.assert_array_equal(session.run(same), scores)
    read_only = x.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(session.run(read_only), scores)
    assert session.run(x[:0]).shape == (0, 3)
    np.testing.assert_allclose(session.run(x[5:9]), scores[5:9], rtol=1e-5, atol=1e-5)


def test_scores_go_where_out_says(model, x):
    session = model.session(17, threads=1)
    scores = session.run(x)
    out = np.full((17, 3), np.nan, np.float32)
    assert session.run(x, out=out) is out
    np.testing.assert_array_equal(out, scores)
    whole = np.full((40, 3), np.nan, np.float32)
    session.run(x, whole[20:37])
    np.testing.assert_array_equal(whole[20:37], scores)
    assert np.isnan(whole[:20]).all() and np.isnan(whole[37:]).all()


def test_a_wrong_out_is_refused(model, x):
    session, read_only = model.session(17, threads=1), np.zeros((17, 3), np.float32)
    read_only.flags.writeable = False
    memory = np.zeros(x.size, np.float32)
    for out, text in [
        (np.zeros((16, 3), np.float32), r"out has shape \[16, 3\], expected \[17, 3\]"),
        (np.zeros(51, np.float32), r"out has shape \[51\]"),
        (np.zeros((17, 3)), "not an array of float32"),
        ([[0.0] * 3] * 17, "not an array of float32"),
        (np.zeros((17, 6), np.float32)[:, ::2], "rows do not follow"),
        (np.zeros((3, 17), np.float32).T, "rows do not follow"),
        (read_only, "read-only"),
    ]:
        with pytest.raises(gemmnet.Error, match=text) as caught:
            session.run(x, out=out)
        assert isinstance(caught.value, ValueError)
    with pytest.raises(gemmnet.InvalidError, match="shares its memory with x"):
        session.run(memory.reshape(x.shape), out=memory[:51].reshape(17, 3))


def test_wrong_inputs_are_refused(model, x):
    session = model.session(4)
    with pytest.raises(gemmnet.InvalidError, match="5 images, more than the 4"):
        session.run(x[:5])
    for wrong in [x[0], x[:2, :2], x[:2].reshape(2, 3, 64), np.zeros(()), np.zeros((2, 3, 8, 9))]:
        with pytest.raises(gemmnet.ShapeError, match=r"x has shape .*, expected \(.*, 3, 8, 8\)"):
            session.run(wrong)
        with pytest.raises(gemmnet.ShapeError, match="images has shape"):
            model.scores(wrong)
    # The mistake to expect: pixels, not what the network takes.
    for pixels in [pictures(2, 1)[0], pictures(2, 1)[0].astype(int), np.zeros((2, *DIM), bool), [[[[1]]]]]:
        with pytest.raises(gemmnet.InvalidError, match="model.normalize"):
            session.run(pixels)
    for images in [np.zeros((2, *DIM), np.int64), np.zeros((2, *DIM), complex), np.full((2, *DIM), "a")]:
        with pytest.raises(gemmnet.InvalidError, match="expected uint8 or floats"):
            model.predict(images)
    for make in [lambda: model.session(0), lambda: model.predict(pictures(2, 1)[0], batch=0)]:
        with pytest.raises(gemmnet.InvalidError, match="a batch of 0 images"):
            make()
    with pytest.raises(gemmnet.InvalidError, match="0 threads cannot work"):
        model.session(1, threads=0)
    for _ in range(2):
        with pytest.raises(gemmnet.PanicError, match="use a smaller batch"):
            model.session(1 << 40)
    assert session.run(x[:4]).shape == (4, 3)


def test_files(model, checkpoint, tmp_path, x):
    model.save(tmp_path / "model.safetensors")
    loaded = gemmnet.Model.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded.session(17).run(x), model.session(17).run(x))
    np.testing.assert_array_equal(loaded.normalize(pictures(17, 3)[0]), x)
    assert loaded.class_names == model.class_names and loaded.notation == model.notation

    gemmnet.Model(model.notation, model.input_shape).save(tmp_path / "alone.safetensors")
    alone = gemmnet.Model.load(tmp_path / "alone.safetensors")
    assert alone.class_names == []
    for without in [alone.normalize, alone.predict]:
        with pytest.raises(gemmnet.InvalidError, match="network alone.*load a checkpoint"):
            without(pictures(2, 1)[0])

    missing = tmp_path / "missing.safetensors"
    with pytest.raises(FileNotFoundError, match="cannot read .*missing.safetensors") as caught:
        gemmnet.Model.load(missing)
    assert isinstance(caught.value, gemmnet.Error) and isinstance(caught.value, gemmnet.FileError)
    assert caught.value.errno == 2 and Path(caught.value.filename) == missing
    with pytest.raises(gemmnet.MissingFileError):
        model.save(tmp_path / "no folder" / "network.safetensors")
    with pytest.raises(OSError) as caught:
        gemmnet.Model.load(tmp_path)
    assert isinstance(caught.value, gemmnet.Error) and not isinstance(caught.value, FileNotFoundError)

    whole = checkpoint.read_bytes()
    for length in [0, 7, 100, len(whole) // 2, len(whole) - 1]:
        damaged = tmp_path / "damaged.safetensors"
        damaged.write_bytes(whole[:length])
        for read in [lambda: gemmnet.Model.load(damaged), lambda: gemmnet.Model.from_bytes(whole[:length])]:
            with pytest.raises(gemmnet.DataError) as caught:
                read()
            assert isinstance(caught.value, ValueError)


def test_files_are_those_of_the_library(checkpoint, tmp_path):
    """The program in Rust reads what Python saved, and Python what the program saved."""
    header = checkpoint.read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert {"conv1.weight", "bn1.running_mean", "normalizer.mean", "history.loss"} <= metadata.keys()
    with pytest.raises(gemmnet.DataError, match="holds a network of f64 numbers"):
        gemmnet.Model.load(ROOT / "tests" / "fixtures" / "format_1.safetensors")

    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    programs = [target / profile / "gemmnet" for profile in ("debug", "release")]
    program = next((program for program in programs if program.exists()), None)
    if program is None:
        pytest.skip("gemmnet's program is not built")

    def run(*arguments):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def predicted(file):
        report = json.loads(run("predict", "--checkpoint", file, "records.bin", "--json").splitlines()[-1])
        return [found["classes"][0]["label"] for found in report["predictions"]]

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8), rng.integers(0, 3, 20)
    records = [bytes([label]) + image.tobytes() for image, label in zip(images, labels)]
    (tmp_path / "records.bin").write_bytes(b"".join(records))
    result = gemmnet.train(
        "conv4-relu-pool8-affine3", images, labels, images, labels,
        epochs=1, batch_size=10, progress=False, checkpoint=tmp_path / "python.safetensors",
    )  # fmt: skip
    assert predicted("python.safetensors") == result.model.predict(images).tolist()

    run("data", "pictures", "pictures")
    net = ["--net", "conv4-bn-relu-pool8-affine10", "--epochs", "0.01", "--train-limit", "1000"]
    run("train", *net, "--data-dir", "pictures", "--run", "rust", "--quiet")
    model = gemmnet.Model.load(tmp_path / "rust" / "model.safetensors")
    assert model.class_names[0] and len(model.class_names) == 10
    assert predicted("rust") == model.predict(images).tolist()


def test_scores_are_the_same_at_any_number_of_threads(model, x):
    expected = model.session(17, threads=1).run(x)
    for threads in [2, 5, None]:
        np.testing.assert_array_equal(model.session(17, threads=threads).run(x), expected)
    images = pictures(70, 8)[0]
    np.testing.assert_array_equal(model.scores(images, 32, threads=1), model.scores(images, 32, threads=3))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_is_shared_by_threads(model, x, threads):
    session = model.session(17, threads=threads)
    expected, wrong, begin = session.run(x), [], threading.Barrier(8)

    def work(number):
        out = np.empty((17, 3), np.float32)
        begin.wait()
        for i in range(40):
            images = slice((number + i) % 5, 17)
            got = session.run(x[images], out[images] if i % 2 else None)
            if not np.array_equal(got, expected[images]):
                wrong.append((number, i))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # Batches of another size may be cut differently; to the bit only where OpenBLAS adds rows up alike.
    assert not wrong or np.allclose(session.run(x[1:]), expected[1:], rtol=1e-5)
    assert not wrong or not _rows_alike(), wrong[:5]


def _rows_alike():
    with open("/proc/cpuinfo") as file:
        return "avx512f" in file.read()


def test_the_gil_is_released():
    """While one thread is in a single long call, another one gets on: in steps far shorter than the call."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 3, 32, 32), dtype=np.uint8), np.arange(64) % 2
    model = gemmnet.train(
        "conv32-relu-conv32-relu-affine2", images, labels, images, labels, epochs=0.1, batch_size=8, progress=False
    ).model
    session, x = model.session(64, threads=1), model.normalize(images)
    spans, stop = [], threading.Event()

    def call():
        while not stop.is_set():
            begin = time.perf_counter()
            session.run(x)
            spans.append((begin, time.perf_counter()))

    caller = threading.Thread(target=call)
    caller.start()
    ticks, end = [], time.perf_counter() + 1.5
    while time.perf_counter() < end:
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    stop.set()
    caller.join()
    inside = max(sum(begin + 0.001 < tick < end - 0.001 for tick in ticks) for begin, end in spans)
    assert inside >= 2, f"{inside} ticks at most within one of {len(spans)} calls, {len(ticks)} in all"
