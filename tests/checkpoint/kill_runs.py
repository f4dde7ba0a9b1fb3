"""Kills a training with SIGKILL at random moments, lets it go on from its newest checkpoint, and holds it against one that ran through.

`python tests/checkpoint/kill_runs.py torch --kills 25 --seed 0` prints what happened; test_kill_runs.py does the same with three kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from polyaccel.checkpoint import newest_checkpoint

SCRIPT = Path(__file__).with_name("killed_training.py")


@dataclass
class Report:
    """What a kill run has seen, by the time it is compared."""

    kills: int = 0
    in_a_save: int = 0  # kills that left a half-written checkpoint behind
    acknowledged: int = 0
    passed_over: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    changed_losses: list[int] = field(default_factory=list)
    missing_losses: list[int] = field(default_factory=list)
    is_state_equal: bool = False
    leftovers: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """True when no acknowledged checkpoint was lost and the training ended as if nothing had happened."""
        bad = self.lost or self.changed_losses or self.missing_losses or self.leftovers or self.passed_over
        return self.is_state_equal and not bad


class Trainings:
    """A process that trains in forks of itself."""

    def __init__(self, flavour: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), flavour],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def start(self, **arguments) -> int:
        """Begin a training; its process id."""
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return int(self._read().removeprefix("started "))

    def wait(self) -> int:
        """The exit status of the training: negative for a signal."""
        return int(self._read().removeprefix("ended "))

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.stdout.close()

    def _read(self) -> str:
        line = self._process.stdout.readline()
        assert line, "the process that trains has ended"
        return line.rstrip("\n")


def kill_run(flavour: str, folder: Path, *, kills: int, seed: int, num_batches: int, save_every: int) -> Report:
    """Train once without and once with kills, in folders below `folder`."""
    draw = random.Random(seed)
    report = Report()
    start = time.monotonic()
    arguments = {"num_batches": num_batches, "save_every": save_every}
    trainings = Trainings(flavour)
    try:
        trainings.start(folder=str(folder / "whole"), **arguments)
        assert trainings.wait() == 0, "the training that nobody kills failed"
        killed = folder / "killed"
        while report.kills < kills:
            child = trainings.start(folder=str(killed), **arguments)
            if _live_a_while(child, killed / "log", draw):
                os.kill(child, signal.SIGKILL)
            status = trainings.wait()
            if status == 0:
                break  # it ended before enough kills: `num_batches` is too small, and the caller sees the number
            assert status == -signal.SIGKILL, f"a resumed training failed with status {status}"
            report.kills += 1
            _look_at(killed, report)
        if not words_of(killed / "log", "end"):
            trainings.start(folder=str(killed), **arguments)
            assert trainings.wait() == 0, "the last resume failed"
    finally:
        trainings.close()
    _compare(folder / "whole" / "log", killed / "log", report)
    report.leftovers = [path.name for path in (killed / "checkpoints").iterdir() if path.name.endswith(".saving")]
    report.seconds = time.monotonic() - start
    return report


def _live_a_while(child: int, log: Path, draw: random.Random) -> bool:
    """Wait for a random moment of a life: now and then while it starts or loads, else some steps and saves later, and then somewhere
    within a step or save. False when it ended before."""
    if draw.random() < 0.15:
        time.sleep(draw.random() * 0.5)
        return True
    before, after = _num_lines(log), draw.randrange(1, 60)
    while _num_lines(log) < before + after:
        if not Path(f"/proc/{child}").exists():
            return False
        time.sleep(0.001)
    time.sleep(draw.random() * 0.02)
    return True


def _num_lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _look_at(folder: Path, report: Report) -> None:
    """After a kill: the newest whole checkpoint is at least the last acknowledged one."""
    lines = [line.split() for line in (folder / "log").read_text().splitlines()] if (folder / "log").exists() else []
    acknowledged = [int(words[1].rsplit("_", 1)[1]) for words in lines if words[0] == "acknowledged"]
    report.acknowledged = len(acknowledged)
    place = folder / "checkpoints"
    names = os.listdir(place) if place.exists() else []
    report.in_a_save += any(name.endswith(".saving") for name in names)
    newest, passed_over = newest_checkpoint(place) if place.exists() else (None, [])
    report.passed_over += [f"{path}: {why}" for path, why in passed_over]
    if acknowledged and (newest is None or int(newest.path.rsplit("_", 1)[1]) < max(acknowledged)):
        report.lost.append(f"acknowledged {max(acknowledged)}, newest {newest and newest.path}")


def words_of(log: Path, kind: str) -> list[list[str]]:
    if not log.exists():
        return []
    return [words[1:] for line in log.read_text().splitlines() if (words := line.split())[0] == kind]


def _compare(whole: Path, killed: Path, report: Report) -> None:
    expected = dict(map(tuple, words_of(whole, "loss")))
    seen: set[str] = set()
    for number, bits in words_of(killed, "loss"):  # a step that was repeated after a resume is compared each time
        seen.add(number)
        if expected[number] != bits:
            report.changed_losses.append(int(number))
    report.missing_losses = sorted(int(number) for number in expected.keys() - seen)
    report.is_state_equal = words_of(whole, "end") == words_of(killed, "end") != []


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("flavour")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--save-every", type=int, default=10)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-runs-"))
    report = kill_run(
        options.flavour,
        folder,
        kills=options.kills,
        seed=options.seed,
        num_batches=options.batches,
        save_every=options.save_every,
    )
    for name, value in vars(report).items():
        print(f"{name}: {value}")
    if report.is_good:
        shutil.rmtree(folder)
    else:
        print(f"kept: {folder}")
    return 0 if report.is_good and report.kills == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
