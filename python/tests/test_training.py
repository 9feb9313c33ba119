"""Training on arrays: that it learns, repeats to the bit, can be watched and ended, and refuses what makes no sense."""

import os
import signal
import threading

import numpy as np
import pytest
from conftest import NOTATION, pictures, train

import gemmnet


def parameters(model, tmp_path):
    path = tmp_path / "parameters.safetensors"
    model.save(path)
    return path.read_bytes()


def test_a_network_learns_to_tell_pictures_apart():
    result = train()
    assert result.kept_val_accuracy >= 0.95
    history = result.history
    assert list(history) == ["loss", "train_accuracy", "val_accuracy", "learning_rate"]
    assert len(history["loss"]) == 24 and [len(history[name]) for name in list(history)[1:]] == [4, 4, 4]
    assert result.kept_val_accuracy == history["val_accuracy"][result.kept_epoch] == max(history["val_accuracy"])
    images, labels = pictures(60, 2)
    assert (result.model.predict(images) == labels).mean() == pytest.approx(result.kept_val_accuracy)


def test_the_same_seed_gives_the_same_bits_at_any_number_of_threads(tmp_path):
    options = {"epochs": 2, "flip": "random", "shift": 1, "optimizer": "momentum", "learning_rate": 1e-3}
    first = train(threads=1, **options)
    expected = parameters(first.model, tmp_path)
    for threads in [2, 5]:
        again = train(threads=threads, **options)
        assert again.history == first.history
        assert parameters(again.model, tmp_path) == expected
    assert parameters(train(threads=1, seed=1, **options).model, tmp_path) != expected


def test_options_arrive():
    """Each of them changes what comes out."""
    base = {"epochs": 1, "progress": False}
    plain = train(**base).history
    for options in [
        {"optimizer": "sgd"}, {"learning_rate": 2e-3}, {"schedule": "cosine"}, {"warmup_epochs": 0.5}, {"l2": 0.1},
        {"clip_norm": 1e-3}, {"ema": 0.9}, {"sampler": "replacement"}, {"flip": "random"}, {"flip": "alternating"},
        {"shift": 2}, {"cutout": 3}, {"normalize": "per-channel"}, {"init": "gaussian:0.01"}, {"seed": 1},
        {"batch_size": 20}, {"epochs": 2},
    ]:  # fmt: skip
        assert train(**{**base, **options}).history != plain, options
    shifted = [train(**base, shift=2, shift_fill=fill).history for fill in ["zeros", "reflect"]]
    assert shifted[0] != shifted[1]
    results = [train(epochs=2, learning_rate=0.3, keep=keep) for keep in ["best", "last"]]
    assert results[1].kept_epoch == 2 and results[0].kept_val_accuracy >= results[1].kept_val_accuracy


def test_floats_train_as_bytes_do():
    (x, y), (x_val, y_val) = pictures(120, 1), pictures(30, 2)
    options = {"epochs": 1, "batch_size": 30, "progress": False, "seed": 3}
    bytes_ = gemmnet.train(NOTATION, x, y, x_val, y_val, **options)
    assert bytes_.model.class_names == ["0", "1", "2"]
    floats = gemmnet.train(
        NOTATION, x.astype(float), y.astype(np.uint8), np.asfortranarray(x_val, np.float32), list(y_val), **options
    )
    np.testing.assert_allclose(floats.history["loss"], bytes_.history["loss"], rtol=1e-4)
    # What it predicts is normalised as what it was trained on.
    np.testing.assert_array_equal(floats.model.predict(x_val.astype(float)), floats.model.predict(x_val))


def test_training_goes_on_with_a_model(model):
    (x, y), (x_val, y_val) = pictures(240, 11), pictures(60, 12)
    options = {"epochs": 0.1, "batch_size": 30, "progress": False, "normalize": "per-channel", "learning_rate": 1e-5}
    more = gemmnet.train(model, x, y, x_val, y_val, **options)
    assert more.kept_val_accuracy >= 0.95
    np.testing.assert_array_equal(more.model.normalize(x_val), model.normalize(x_val))
    before = model.scores(x_val)
    assert (more.model.scores(x_val) != before).any()
    np.testing.assert_array_equal(model.scores(x_val), before)


def test_a_callback_sees_all_and_can_end_it(tmp_path):
    seen = []
    result = train(epochs=2, callback=seen.append)
    steps = [event for event in seen if isinstance(event, gemmnet.Step)]
    epochs = [event for event in seen if isinstance(event, gemmnet.Epoch)]
    assert [step.step for step in steps] == list(range(1, 17)) and {step.steps for step in steps} == {16}
    assert [step.loss for step in steps] == result.history["loss"]
    assert [epoch.epoch for epoch in epochs] == [0, 1, 2]
    assert [epoch.val_accuracy for epoch in epochs] == result.history["val_accuracy"]
    assert isinstance(seen[1], gemmnet.Epoch) and seen[0].images_per_second > 0

    path = tmp_path / "ended.safetensors"
    for answer in [bool, np.bool_]:
        ended = train(checkpoint=path, callback=lambda event: answer(isinstance(event, gemmnet.Step) and event.step == 5))
        assert len(ended.history["loss"]) == 5
    images = pictures(9, 1)[0]
    np.testing.assert_array_equal(gemmnet.Model.load(path).scores(images), ended.model.scores(images))


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_callback_raises_arrives(threads, tmp_path):
    class Enough(Exception):
        pass

    calls, path = [], tmp_path / "saved.safetensors"

    def callback(event):
        calls.append(threading.current_thread() is threading.main_thread())
        if len(calls) == 7:
            raise Enough("seven")

    with pytest.raises(Enough, match="seven"):
        train(threads=threads, callback=callback, checkpoint=path)
    assert calls == [True] * 7
    assert gemmnet.Model.load(path).classes == 3
    assert train(threads=threads).kept_val_accuracy > 0.9


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_training_and_saves(threads, tmp_path):
    path = tmp_path / "interrupted.safetensors"
    killer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT))
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        train(threads=threads, epochs=1e6, checkpoint=path)
    killer.join()
    assert gemmnet.Model.load(path).classes == 3


def test_the_progress_bar_counts_iterations(capsys):
    train(epochs=2, progress=True)
    shown = capsys.readouterr().err
    assert "epoch 2/2" in shown and "16/16" in shown and "loss=" in shown and "val_accuracy=" in shown
    train(epochs=2)
    assert capsys.readouterr() == ("", "")


def test_what_makes_no_sense_is_refused(tmp_path):
    (x, y), (x_val, y_val) = pictures(30, 1), pictures(30, 2)
    for options, text in [
        ({"optimizer": "adamm"}, "`adamm` is not one; choose one of sgd, momentum"),
        ({"schedule": "cosin"}, "`cosin` is not one; write constant"),
        ({"init": "hee"}, "`hee` is not one"),
        ({"keep": "first"}, "keep: `first` is not one; choose one of best, last"),
        ({"sampler": "x"}, "sampler"),
        ({"flip": "yes"}, "choose one of none, random, alternating"),
        ({"shift_fill": "x"}, "choose one of zeros, reflect"),
        ({"normalize": "x"}, "choose one of mean-image, per-channel"),
        ({"epochs": 0}, "0 epochs"),
        ({"batch_size": 0}, "a batch of 0 images"),
        ({"learning_rate": -1.0}, "learning rate"),
        ({"class_names": ["a", "b"]}, "has label 2, which is none of 2 classes"),
    ]:
        with pytest.raises(gemmnet.InvalidError, match=text):
            train(**options)

    def on(notation=NOTATION, x=x, y=y, x_val=x_val, y_val=y_val):
        return gemmnet.train(notation, x, y, x_val, y_val, epochs=1, progress=False)

    for arguments, kind, text in [
        ({"notation": "conv8-rely-affine3"}, gemmnet.InvalidError, r"character 7: .*(?s:.)*\n {6}\^"),
        ({"notation": "conv8-relu-affine2"}, gemmnet.InvalidError, "2 scores, the data has 3 classes"),
        ({"y": y + 1}, gemmnet.InvalidError, "the data has 4 classes"),
        ({"y": -y}, gemmnet.InvalidError, "has label -1"),
        ({"y": y.astype(float)}, gemmnet.InvalidError, "labels have type float64"),
        ({"y": y.astype(np.uint64) + 2**63}, gemmnet.InvalidError, "is no label"),
        ({"y": y[:-1]}, gemmnet.ShapeError, r"training split has shape \[30, 3, 8, 8\]"),
        ({"y": y[:, None]}, gemmnet.ShapeError, "y_train has shape"),
        ({"x": x[0]}, gemmnet.ShapeError, r"x_train has shape \[3, 8, 8\], expected \(N, C, H, W\)"),
        ({"x_val": x_val[:, :2]}, gemmnet.ShapeError, "validation split has shape"),
        ({"x_val": x_val / 1.0}, gemmnet.InvalidError, "x_val: images have type float32, those of x_train uint8"),
        ({"x": x.astype(int)}, gemmnet.InvalidError, "x_train: images have type int64"),
        ({"x": x[:0], "y": []}, gemmnet.InvalidError, "0 images"),
        ({"x": np.full(x.shape, np.nan), "x_val": x_val / 1.0}, gemmnet.InvalidError, "NaN"),
    ]:
        with pytest.raises(kind, match=text):
            on(**arguments)
    with pytest.raises(gemmnet.InvalidError, match="0 threads"):
        train(threads=0)
    with pytest.raises(gemmnet.MissingFileError):
        train(checkpoint=tmp_path / "nowhere" / "network.safetensors")
    with pytest.raises(ArithmeticError, match="the loss became"):
        train(optimizer="sgd", learning_rate=1e30, epochs=5)
    with pytest.raises(TypeError):
        gemmnet.train(3, x, y, x_val, y_val)
