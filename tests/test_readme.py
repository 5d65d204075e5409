"""The README's Python runs, at a size that is quick."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_code_runs(block):
    code = "import torch\n" + BLOCKS[block].replace("256, 256", "32, 32")
    names = {}
    exec(code.replace("img_resolution=256", "img_resolution=32, channel_base=512"), names)
    assert names["y" if block == 0 else "image"].isfinite().all()


def test_there_are_examples():
    assert len(BLOCKS) == 3
