"""Two processes of which one is signalled: both save the same step, leave with 75, and the resumed job ends as one that ran through."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from kill_runs import Trainings, words_of

from polyaccel.checkpoint import newest_checkpoint
from polyaccel.config.schema import PREEMPTED
from polyaccel.launch.rendezvous import Rendezvous, free_port
from polyaccel.registry import load_backend

NUM_BATCHES = 40


class Job:
    """Two processes that train together, again and again."""

    def __init__(self, flavour: str) -> None:
        self._members = [Trainings(flavour) for _ in range(2)]

    def start(self, folder: Path, **options) -> list[int]:
        """Begin a training of two processes; their process ids."""
        port = free_port()
        return [
            member.start(
                folder=str(folder),
                log=f"log-{rank}",
                environment=Rendezvous(rank, 2, rank, 2, "127.0.0.1", port).environment(),
                **{"num_batches": NUM_BATCHES, "save_every": 10**6, "preemption": "save", **options},
            )
            for rank, member in enumerate(self._members)
        ]

    def wait(self) -> list[int]:
        """Their exit codes."""
        return [member.wait() for member in self._members]

    def close(self) -> None:
        for member in self._members:
            member.close()


@pytest.fixture(scope="module", params=["torch", pytest.param("torch-on-jax", marks=pytest.mark.slow)])
def job(request):
    engine = "jax" if "jax" in request.param else "torch"
    if not load_backend(engine).probe().is_usable:
        pytest.skip(f"needs {engine}")
    made = Job(request.param)
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    job.start(folder)
    assert job.wait() == [0, 0]
    return folder


def wait_for_losses(log: Path, count: int, pids) -> None:
    end = time.monotonic() + 120
    while len(words_of(log, "loss")) < count:
        assert time.monotonic() < end, "no progress"
        assert all(Path(f"/proc/{pid}").exists() for pid in pids), "it ended before it was signalled"
        time.sleep(0.001)


@pytest.mark.parametrize(("rank", "number", "losses"), [(1, signal.SIGTERM, 3), (0, signal.SIGUSR1, 12)])
def test_one_of_two_is_signalled_and_both_save_the_same_step(job, whole, tmp_path, rank, number, losses):
    pids = job.start(tmp_path)
    wait_for_losses(tmp_path / "log-0", losses, pids)
    os.kill(pids[rank], number)
    time.sleep(0.02)
    os.kill(pids[rank], number)  # harmless
    assert job.wait() == [PREEMPTED, PREEMPTED]
    last = [words_of(tmp_path / f"log-{one}", "loss")[-1][0] for one in range(2)]
    assert last[0] == last[1]
    newest, passed_over = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert passed_over == []
    assert len(list((tmp_path / "checkpoints").glob("checkpoint_*"))) == 1  # saved once

    job.start(tmp_path)
    assert job.wait() == [0, 0]
    for one in range(2):
        (resumed,) = words_of(tmp_path / f"log-{one}", "resumed")
        assert resumed == [newest.path, str(int(last[0]) + 1)]
        assert words_of(tmp_path / f"log-{one}", "loss") == words_of(whole / f"log-{one}", "loss")
        assert words_of(tmp_path / f"log-{one}", "end") == words_of(whole / f"log-{one}", "end")
