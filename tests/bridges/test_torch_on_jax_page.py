"""The examples of docs/torch_on_jax.md run from top to bottom, as one script."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "torch_on_jax.md"


def test_the_examples_of_the_page_run(tmp_path):
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    seen = runpy.run_path(str(script))
    assert seen["accelerator"].backend == "jax"
