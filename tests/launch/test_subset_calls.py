"""A collective that some processes do not come to ends with an error that says where everybody is, and a slow process is no error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=["torch", "jax"])
def said(request, tmp_path_factory):
    """What each job of subset_calls.py failed with, by its name."""
    pytest.importorskip("torch")
    pytest.importorskip(request.param)
    done = subprocess.run(
        [sys.executable, HERE / "subset_calls.py", str(tmp_path_factory.mktemp("subsets"))],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "POLYACCEL_BACKEND": request.param, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "output": done.stdout}


def error(text):
    """The last error of a traceback."""
    return text.rpartition("CollectiveError: ")[2]


def test_processes_at_different_calls_are_both_told_where_the_other_is(said):
    assert said["different_calls"] == "nothing"  # each process has compared its own errors


def test_a_call_of_one_process_while_the_other_trains_on_names_both_places(said):
    text = error(said["on_the_main_process_only"])
    assert text.startswith("gather at ")
    assert "was called by process 0 only: process 1 has gone on to" in text
    assert text.count("subset_calls.py:") == 2
    assert "outside of `if accelerator.is_main_process`" in text


def test_a_call_that_waits_for_a_process_that_has_left_or_ended_says_so(said):
    assert "save_state at" in error(said["saved_before_the_other_left"])
    assert "waits for process 1, which has left the job" in error(said["saved_before_the_other_left"])
    assert "wait_for_everyone at" in error(said["the_other_has_ended"])
    assert "waits for process 1, which has ended" in error(said["the_other_has_ended"])


def test_waiting_in_vain_is_noticed_long_before_the_deadline(said):
    for job in ("on_the_main_process_only", "saved_before_the_other_left", "the_other_has_ended"):
        assert said[f"{job} took"] < 60  # of 1800 s


def test_a_slow_process_is_waited_for_until_the_deadline_which_says_where_it_is(said):
    assert "waited 1.2 s" in said["output"]
    assert "waited 4 s" not in said["output"]
    text = error(said["slow_and_too_slow"])
    assert "has waited 2 s (timeout_s) for process 1: process 1 is at" in text
    assert "raise timeout_s" in text
