"""The examples of docs/shapes.md run, one after the other, and print what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "shapes.md"
CHECKS = """
backwards = [event for event in accelerator.compile_events if event.program == "backward of exact_loss"]
assert len(backwards) == 2, backwards
"""


def test_the_examples_of_the_page_print_what_it_says(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    script = tmp_path / "page.py"
    script.write_text("\n".join([*blocks, CHECKS]))
    environment = {**os.environ, "XLA_FLAGS": "", "POLYACCEL_COMPILATION_CACHE": "off"}  # the reader has one device
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    program, cause, step, num_programs = done.stdout.splitlines()
    printed = re.findall(r"^print\(.*?\)  # (.*)$", PAGE.read_text(), re.MULTILINE)
    assert [program, cause] == printed[:2]
    assert printed[2].startswith(f"{step}: ")
    assert printed[3].startswith(f"{num_programs} programs")
