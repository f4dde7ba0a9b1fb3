"""Scripts that tests run as processes of their own: writers that are killed, run out of disk, or are watched by strace.

`python lone_writers.py NAME FOLDER [ARGUMENTS]` prints one JSON value. Every writer is a fork of a process that has numpy loaded already.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from saving import contents, holds, save, whole

from polyaccel.checkpoint import Contents, local, newest_checkpoint, next_number, sweep
from polyaccel.checkpoint.names import checkpoint_number
from polyaccel.checkpoint.sweep import enforce_limit
from polyaccel.errors import CheckpointError

# Everything through which a writer changes the file system; os.open and os.mkdir too, which leave names behind.
CHANGING = ("open", "mkdir", "writev", "write", "pwrite", "ftruncate", "fsync", "rename", "unlink", "rmdir")


def forked(body: Callable[[int], None]) -> tuple[int, int]:
    """Run `body(pipe)` in a child. Returns its process id and the end to read what it writes to the pipe."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            body(writing)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    return child, reading


def acknowledged(reading: int) -> list[str]:
    with os.fdopen(reading) as pipe:
        return [line for line in pipe.read().split("\n")[:-1] if line]


def save_without_end(folder: Path, pipe: int) -> None:
    """Numbered checkpoints of which three are kept, and one that is replaced; each is told to the pipe when it is complete."""
    number = next_number(folder)
    while True:
        save(folder / f"checkpoint_{number}", contents(number))
        os.write(pipe, f"{number}\n".encode())
        enforce_limit(folder, 3)
        save(folder / "last", contents(number), replace=True)
        os.write(pipe, f"last {number}\n".encode())
        number += 1


def kills(folder: Path, first: str, last: str) -> list[dict[str, Any]]:
    """kill -9 at a random moment, once per seed; what was acknowledged, what is found, and what the sweep leaves."""
    told = []
    newest_told = last_told = -1
    for seed in range(int(first), int(last)):
        child, reading = forked(lambda pipe: save_without_end(folder, pipe))
        time.sleep(random.Random(seed).uniform(0.005, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines = acknowledged(reading)
        newest_told = max([newest_told, *(int(line) for line in lines if " " not in line)])
        last_told = max([last_told, *(int(line.split()[1]) for line in lines if " " in line)])
        told.append(
            {"seed": seed, "lines": len(lines), "newest_told": newest_told, "last_told": last_told, **found(folder)}
        )
    return told


def found(folder: Path) -> dict[str, Any]:
    before = sorted(name for name in os.listdir(folder) if name.startswith("."))
    saved, passed_over = newest_checkpoint(folder)
    newest = -1 if saved is None else int(saved.shared["step"])
    is_right = saved is None or (
        holds(saved.path, contents(newest)) and Path(saved.path).name == f"checkpoint_{newest}"
    )
    sweep(folder)
    # The writer of `last` sweeps what is of `last`; here its lock file is all that may stay.
    after = sorted(name for name in os.listdir(folder) if name.startswith(".") and name != ".last.lock")
    last = -1
    if (folder / "last").exists():
        last = next(
            number for number in range(newest + 2, -1, -1) if number == 0 or holds(folder / "last", contents(number))
        )
        is_right = is_right and holds(folder / "last", contents(last))
    return {
        "newest": newest,
        "last": last,
        "is_right": is_right,
        "passed_over": passed_over,
        "leftovers": before,
        "after_sweep": after,
        "numbered": sum(checkpoint_number(name) is not None for name in os.listdir(folder)),
    }


def every_moment(folder: Path, exchange: str) -> dict[str, Any]:
    """Die right before the n-th change of the file system, for every n: a first checkpoint, a second one, a replacement."""
    lost = []
    deaths = 0
    for moment in range(1, 1000):
        place = folder / str(moment)
        place.mkdir()

        def body(pipe: int, place: Path = place, moment: int = moment) -> None:
            if exchange == "no":
                local._exchange = lambda one, other: False
            left = moment

            def counted(call: Callable[..., Any]) -> Callable[..., Any]:
                def wrapper(*arguments: Any, **options: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*arguments, **options)

                return wrapper

            tell = os.write
            os.fsync = lambda descriptor: (
                None
            )  # counted below; only a power cut could tell, and 100 writers would wait for the disk
            for name in CHANGING:
                setattr(os, name, counted(getattr(os, name)))
            for number in (0, 1) if exchange == "yes" else ():
                save(place / f"checkpoint_{number}", contents(number))
                tell(pipe, f"checkpoint_{number}\n".encode())
            for number in (2, 3):
                save(place / "last", contents(number), replace=True)
                tell(pipe, f"last {number}\n".encode())

        child, reading = forked(body)
        _, status = os.waitpid(child, 0)
        lines = acknowledged(reading)
        if os.waitstatus_to_exitcode(status) == 0:
            return {"deaths": deaths, "lost": lost, "lines": lines}
        deaths += 1
        lost += [f"{moment}: {problem}" for problem in problems(place, lines)]
    return {"deaths": deaths, "lost": lost, "lines": []}


def problems(place: Path, lines: list[str]) -> list[str]:
    """What a writer that died after these acknowledgements has lost or left, its place swept by the next one."""
    sweep(place)
    wrong = []
    numbers = [number for number in (0, 1) if f"checkpoint_{number}" in lines]
    saved, passed_over = newest_checkpoint(place)
    if passed_over:
        wrong.append(f"half a checkpoint was seen: {passed_over}")
    if numbers and (saved is None or int(saved.shared["step"]) < numbers[-1]):
        wrong.append(f"checkpoint_{numbers[-1]} is lost")
    if saved is not None and not holds(saved.path, contents(int(saved.shared["step"]))):
        wrong.append(f"{saved.path} holds something else")
    candidates = {"": (2,), "last 2": (2, 3), "last 3": (3,)}[
        next((line for line in reversed(lines) if " " in line), "")
    ]
    if (place / "last").exists() or len(candidates) > 1:
        try:
            if not any(holds(place / "last", contents(number)) for number in candidates):
                wrong.append(f"last is none of {candidates}")
        except CheckpointError as error:
            wrong.append(str(error))
    if hidden := [name for name in os.listdir(place) if name.startswith(".") and not name.endswith(".lock")]:
        wrong.append(f"left: {hidden}")
    return wrong


def full_disk(folder: Path, limit: str) -> dict[str, Any]:
    """A good checkpoint, then one that is larger than what may be written (`limit` bytes a file; 0: what the disk takes)."""
    save(folder / "checkpoint_0", contents(0))
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    large = Contents({"model": [whole("w", np.zeros(2_000_000, np.uint8))]})
    try:
        save(folder / "checkpoint_1", large)
    except CheckpointError as error:
        said = str(error)
    else:
        return {"said": None}
    saved, passed_over = newest_checkpoint(folder)
    assert saved is not None
    intact = holds(saved.path, contents(0))
    listed = sorted(os.listdir(folder))
    save(folder / "checkpoint_2", contents(2))  # there is room again for a small one
    return {
        "said": said,
        "intact": intact,
        "passed_over": passed_over,
        "listed": listed,
        "next": holds(folder / "checkpoint_2", contents(2)),
    }


def traced(folder: Path, target: str) -> None:
    """Two saves to the same name, announced on stdout as the last thing of each; strace sees the rest."""
    for number in range(2):
        save(folder / target, contents(number), replace=True)
        os.write(1, f"acknowledged {number}\n".encode())


if __name__ == "__main__":
    name, folder, *arguments = sys.argv[1:]
    result = {"kills": kills, "every_moment": every_moment, "full_disk": full_disk, "traced": traced}[name](
        Path(folder), *arguments
    )
    if result is not None:
        print(json.dumps(result))
