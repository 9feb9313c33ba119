"""What docs/python.md shows runs, in the order in which it stands there."""

import re
from pathlib import Path

from conftest import train

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def test_the_code_of_the_page_runs(tmp_path, script):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    train(checkpoint=tmp_path / "model.safetensors")
    script("".join(blocks))
