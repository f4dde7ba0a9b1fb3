"""An acknowledged checkpoint outlives SIGKILL at any moment, and the resumed training is the one that nobody killed, bit for bit."""

import pytest
from kill_runs import kill_run
from killed_training import FLAVOURS

from polyaccel.registry import load_backend


@pytest.mark.slow
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_training_that_is_killed_again_and_again_ends_as_one_that_ran_through(flavour, tmp_path):
    engine, _ = FLAVOURS[flavour]
    if not load_backend(engine).probe().is_usable:
        pytest.skip(f"needs {engine}")
    report = kill_run(flavour, tmp_path, kills=3, seed=1, num_batches=200, save_every=5)
    assert report.is_good, report
    assert report.kills == 3
    assert report.acknowledged > 0
