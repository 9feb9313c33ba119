"""What the pages of the documentation show runs, in the order in which it stands there."""

import re
from pathlib import Path

import gemmnet
import pytest
from conftest import train

DOCS = Path(__file__).resolve().parents[2] / "docs"


def code(page):
    """All of its code in Python."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    return "".join(blocks)


def test_from_python(tmp_path, script):
    train(checkpoint=tmp_path / "model.safetensors")
    script(code("python.md"))


def test_to_onnx_runtime(tmp_path, script):
    pytest.importorskip("onnxruntime")
    gemmnet.Model("conv4-bn-relu-pool-affine10", (3, 32, 32)).save_onnx(tmp_path / "network.onnx")
    assert "of []" in script(code("onnx.md"))


def test_from_pytorch(script):
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    script(code("pytorch.md"))
