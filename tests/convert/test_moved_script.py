"""A script of Accelerate's runs after its import is renamed, and gives Accelerate's numbers, on every engine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import with_devices

SCRIPT = Path(__file__).with_name("accelerate_script.py")
# Other kernels round in another order; the losses are near 0.5, and a dozen updates of AdamW follow each other.
TOLERANCE = 2e-5
UNBROKEN = 12  # batches of the two epochs before load_state


def numbers(script, tmp_path, **variables):
    environment = {**os.environ, **with_devices(1), **variables}
    (tmp_path / "project").mkdir()
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "project")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def of_accelerate(tmp_path_factory):
    return numbers(SCRIPT, tmp_path_factory.mktemp("accelerate"))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_script_of_accelerate_gives_its_numbers_after_its_import_is_renamed(tmp_path, of_accelerate, backend):
    renamed = tmp_path / "script.py"
    renamed.write_text(re.sub(r"\baccelerate\b", "polyaccel", SCRIPT.read_text()))
    found = numbers(renamed, tmp_path, POLYACCEL_BACKEND=backend)
    for name, length in {"loss": UNBROKEN, "norm": UNBROKEN // 2, "lr": UNBROKEN}.items():
        assert found[name][:length] == pytest.approx(of_accelerate[name][:length], rel=TOLERANCE), name
    assert found["order"][:UNBROKEN] == of_accelerate["order"][:UNBROKEN]
    for name in ("accuracy", "updates", "split", "sum", "sent", "state"):
        assert found[name] == of_accelerate[name], name
    assert found["history"] == [{"lr": 0.05}, [3, {"loss": found["loss"][5]}]]
    # After load_state, Accelerate goes through the rest of the epoch in another order; here it is the rest that was not seen.
    assert found["loaded"] == found["saved"]
    assert found["loss"][UNBROKEN:] == found["loss"][UNBROKEN - 2 : UNBROKEN]
