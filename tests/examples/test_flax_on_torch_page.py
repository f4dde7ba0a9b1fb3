"""The examples of docs/flax_on_torch.md run, one after the other, as a reader would run them."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "flax_on_torch.md"
CHECKS = """
assert float(loss) == float(loss) and loss.dtype == jnp.float32
assert {float(state["step"]) for state in adamw.state.values()} == {3.0}
assert set(named) == {"body.kernel", "body.bias", "norm.scale", "norm.bias", "head.kernel", "head.bias"}
assert adamw.param_groups[1]["weight_decay"] == 0.0
"""


def test_the_examples_of_the_page_train(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    script = tmp_path / "page.py"
    script.write_text("\n".join([*blocks, CHECKS]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
