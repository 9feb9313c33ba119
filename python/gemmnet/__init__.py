"""A CNN engine for CPUs: trained networks, training on NumPy arrays, and the fast layers of CS231n's notebooks.

    model = gemmnet.Model.load("model.safetensors")
    classes = model.predict(images)                      # any number of images (N, C, H, W), uint8

`Model.session` is for calls that come one by one, from as many threads as you like; `train` trains; `gemmnet.cs231n` has
the layers. What goes wrong is a `gemmnet.Error`, and of the kind of Python's own errors that fits.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings


def _openblas_is_loaded() -> bool:
    """Whether somebody already uses the OpenBLAS that `_native` is about to load: it has one name in all of a process. The
    one that NumPy brings along has another. Not to know counts as yes."""
    if sys.platform != "linux":
        return True
    try:
        ctypes.CDLL("libopenblas.so.0", mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


# Where it is older than the processor, OpenBLAS picks kernels that are several times slower than need be, unless a variable
# tells it otherwise when it is loaded. Whoever set that knows better. Else its choice is corrected right after loading, as
# long as nobody else can be in the middle of a product.
_first = not _openblas_is_loaded()

from . import _native, errors  # noqa: E402
from ._native import Model, Session  # noqa: E402
from .errors import (  # noqa: E402
    DataError,
    DivergedError,
    Error,
    FileError,
    InvalidError,
    MissingFileError,
    PanicError,
    ShapeError,
)
from .training import Epoch, Result, Step, train  # noqa: E402

_note = _native.set_up(_first)
if _note is not None:
    warnings.warn(_note, RuntimeWarning, stacklevel=2)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_native.before_fork,
        after_in_parent=_native.after_fork_in_parent,
        after_in_child=_native.after_fork_in_child,
    )

__all__ = [
    "DataError",
    "DivergedError",
    "Epoch",
    "Error",
    "FileError",
    "InvalidError",
    "MissingFileError",
    "Model",
    "PanicError",
    "Result",
    "Session",
    "ShapeError",
    "Step",
    "errors",
    "train",
]
