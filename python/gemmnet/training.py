"""Training on NumPy arrays."""

from __future__ import annotations

import os
from typing import Any, Callable, NamedTuple, Optional, Sequence, Union

import numpy as np
from numpy.typing import ArrayLike

from . import _native
from ._arrays import images, labels
from .errors import InvalidError


class Step(NamedTuple):
    """An iteration is done."""

    epoch: int
    """The epoch it belongs to, from 1."""
    epochs: float
    """Epochs in all."""
    step: int
    """The iteration, from 1."""
    steps: int
    """Iterations in all."""
    loss: float
    """Loss, regularisation included, of the parameters before the iteration."""
    learning_rate: float
    """Learning rate of the iteration."""
    images_per_second: float
    """Training images per second so far, without the time for measuring accuracy."""


class Epoch(NamedTuple):
    """Accuracy has been measured: after the first iteration (epoch 0) and after every epoch."""

    epoch: int
    """The finished epoch, the last of which may be a part of one."""
    epochs: float
    """Epochs in all."""
    train_accuracy: float
    """Share of training images classified correctly, 0 to 1, among a sample of 1,000."""
    val_accuracy: float
    """Share of validation images classified correctly, 0 to 1."""
    kept: bool
    """Whether the network is kept, in the place of the one before."""


class Result(NamedTuple):
    """What training leaves."""

    model: _native.Model
    """The network that was kept, with what turns images into its input and the names of the classes."""
    history: dict[str, list[float]]
    """`loss` of every iteration; `train_accuracy`, `val_accuracy` and `learning_rate` after the first iteration (index 0)
    and after every epoch (its number)."""
    kept_epoch: int
    """The epoch after which the network was what was kept."""
    kept_val_accuracy: float
    """Its accuracy on the validation images, 0 to 1."""


Callback = Callable[[Union[Step, Epoch]], Optional[bool]]


class _Bar:
    """A progress bar of iterations."""

    def __init__(self) -> None:
        # Where nobody looks, it need not be loaded.
        from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]

        self.bar = tqdm(unit="step", dynamic_ncols=True)
        self.val_accuracy: float | None = None

    def show(self, event: Step | Epoch) -> None:
        if isinstance(event, Epoch):
            self.val_accuracy = event.val_accuracy
            return
        if self.bar.total is None:
            self.bar.reset(total=event.steps)
        figures = {"loss": f"{event.loss:.4f}"}
        if self.val_accuracy is not None:
            figures["val_accuracy"] = f"{self.val_accuracy:.3f}"
        self.bar.set_description(f"epoch {event.epoch}/{event.epochs:g}", refresh=False)
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update()


def train(
    network: str | _native.Model,
    x_train: ArrayLike,
    y_train: ArrayLike,
    x_val: ArrayLike,
    y_val: ArrayLike,
    *,
    class_names: Sequence[str] | None = None,
    epochs: float = 10.0,
    batch_size: int = 100,
    optimizer: str = "adam",
    learning_rate: float = 1e-3,
    schedule: str = "constant",
    warmup_epochs: float = 0.0,
    l2: float = 0.0,
    clip_norm: float | None = None,
    ema: float | None = None,
    keep: str = "best",
    sampler: str = "shuffle",
    flip: str = "none",
    shift: int = 0,
    shift_fill: str = "zeros",
    cutout: int = 0,
    normalize: str = "mean-image",
    init: str = "he",
    seed: int = 0,
    threads: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
) -> Result:
    """Trains a network on images (N, C, H, W), uint8 or floats, and their labels (N), integers from 0.

    `network` is the notation of a new one, such as `"[conv32-relu-pool]x2-affine10"`, or a `Model` to go on with; that
    keeps what it normalises images with. The result has the same bits for the same arguments at any number of `threads`.

    The options are those of `gemmnet train`, and are written as there:

    class_names: names of the classes, by label; by default their numbers.
    epochs: passes over the training images; the last may be a part of one.
    batch_size: images in a batch.
    optimizer: sgd, momentum, nesterov, adagrad, rmsprop, adam or adamw.
    learning_rate, schedule, warmup_epochs: the rate that the schedule multiplies (constant, exp:FACTOR, step:EPOCHS:FACTOR,
        linear[:EPOCHS], cosine[:FINAL] or onecycle[:PEAK_AT:START:FINAL]), and epochs of linear warm-up before it.
    l2: the loss has this / 2 times the sum of squared weights added.
    clip_norm: gradients are scaled down whose norm, over all parameters, is above this.
    ema: measure and keep a moving average of the weights with this decay, such as 0.999.
    keep: which network is kept, of those after each epoch: best on the validation images, or last.
    sampler: shuffle for an order drawn anew in every epoch, replacement for batches drawn independently.
    flip, shift, shift_fill, cutout: random changes to training images: mirrored (none, random or alternating), moved by up
        to so many pixels with zeros or reflect in what becomes free, and a square of this side blanked.
    normalize: mean-image subtracts the mean of the training images, per-channel each channel's mean, and divides by its
        standard deviation.
    init: initial weights of a new network: gaussian:STD, he, xavier, orthogonal or dirac.
    seed: of all that is random.
    threads: by default one for each core, or as many as GEMMNET_NUM_THREADS says.
    progress: shows a progress bar.
    checkpoint: a file to save to after every epoch; one that exists is replaced.
    callback: is called with every `Step` and `Epoch`, and ends training by returning True. Training waits for it.

    Ctrl-C ends training after the iteration, saves the checkpoint and raises KeyboardInterrupt; so does what the callback
    raises.
    """
    splits: dict[str, Any] = {
        "x_train": images(x_train, "x_train"),
        "y_train": labels(y_train, "y_train"),
        "x_val": images(x_val, "x_val"),
        "y_val": labels(y_val, "y_val"),
    }
    kinds = splits["x_train"].dtype, splits["x_val"].dtype
    if kinds[0] != kinds[1]:
        raise InvalidError(f"x_val: images have type {kinds[1]}, those of x_train {kinds[0]}; give both as one of them")
    options: dict[str, Any] = {
        "class_names": None if class_names is None else [str(name) for name in class_names],
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_epochs": warmup_epochs,
        "l2": l2,
        "clip_norm": clip_norm,
        "ema": ema,
        "keep": keep,
        "sampler": sampler,
        "flip": flip,
        "shift": shift,
        "shift_fill": shift_fill,
        "cutout": cutout,
        "normalize": normalize,
        "init": init,
        "seed": seed,
        "threads": threads,
        "checkpoint": checkpoint,
    }
    bar = _Bar() if progress else None

    def observe(event: Step | Epoch) -> bool:
        if bar is not None:
            bar.show(event)
        answer = callback(event) if callback is not None else None
        return isinstance(answer, (bool, np.bool_)) and bool(answer)

    watched = observe if progress or callback is not None else None
    try:
        return Result(*_native.train(network, splits, options, watched, callback is not None))
    finally:
        if bar is not None:
            bar.bar.close()
