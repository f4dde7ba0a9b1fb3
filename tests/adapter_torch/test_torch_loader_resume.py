"""An interrupted epoch continues exactly, and so does the next one: every kind of loader, saved in epoch 0 and in epoch 1."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import loader_resumes
import pytest
from launching import launch_command
from loader_resumes import CASES, answer, name


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_rest_of_the_epoch_and_the_next_one_are_those_of_the_run_that_went_on(case, tmp_path):
    for saved_in, (due, came) in answer(case, tmp_path, backend="torch").items():
        assert came == due, saved_in
        assert due[0], "something was left of the epoch"


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("resumes")
    command = launch_command("torch", 2, loader_resumes.__file__, folder, json.dumps({"backend": "torch"}))
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((Path(folder) / f"{process}.json").read_text()) for process in range(2)]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_two_processes_continue_together(case, two_processes):
    read = [answers[name(case)] for answers in two_processes]
    for saved_in in ("epoch 0", "epoch 1"):
        for due, came in (answers[saved_in] for answers in read):
            assert came == due, saved_in
        first, second = (answers[saved_in][0][1] for answers in read)
        whole = [sample for pair in zip(first, second, strict=True) for batch in pair for sample in batch]
        size = loader_resumes.SIZE - 2 * (case["data"] == "knowing iterable")
        assert len(set(whole[:size])) == size, "together they read every sample once"
