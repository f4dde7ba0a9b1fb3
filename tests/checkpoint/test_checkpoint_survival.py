"""An acknowledged checkpoint outlives kill -9, a full disk and a power cut; a half-written one is never chosen, and never stays."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from saving import contents, holds, save

from polyaccel.errors import CheckpointError

SCRIPT = Path(__file__).with_name("lone_writers.py")


def script(*arguments):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kill_9_at_25_random_moments_loses_nothing_that_was_acknowledged(tmp_path):
    runs = script("kills", tmp_path, 0, 25)
    assert len(runs) == 25
    for run in runs:
        assert run["newest"] >= run["newest_told"], run
        assert run["last"] >= run["last_told"], run
        assert run["is_right"], run
        assert run["passed_over"] == [], run
        assert run["after_sweep"] == [], run
        assert run["numbered"] <= 4, run
    assert runs[-1]["newest_told"] > 10, "the writers hardly wrote"
    assert sum(any(".saving" in name for name in run["leftovers"]) for run in runs) >= 5, (
        "they were hardly hit in the middle"
    )


@pytest.mark.parametrize("exchange", ["yes", "no"])
def test_death_before_every_single_change_of_the_disk_loses_nothing(tmp_path, exchange):
    """`no`: on file systems that cannot swap two names in one step, the old checkpoint is put aside, and back by the next sweep."""
    found = script("every_moment", tmp_path, exchange)
    assert found["lost"] == []
    numbered = ["checkpoint_0", "checkpoint_1"] if exchange == "yes" else []
    assert found["lines"] == [*numbered, "last 2", "last 3"]
    assert found["deaths"] > (60 if numbered else 30)


# -- a full disk -------------------------------------------------------------------------------------------------------------------


def is_survived(found):
    assert "was not written" in found["said"]
    assert "hint: free some space" in found["said"]
    assert found["intact"]
    assert found["passed_over"] == []
    assert found["listed"] == ["checkpoint_0"]
    assert found["next"]


def test_a_file_that_outgrows_its_limit_is_an_error_and_the_previous_checkpoint_is_intact(tmp_path):
    found = script("full_disk", tmp_path, 1_000_000)
    assert "File too large" in found["said"]
    is_survived(found)


def test_a_full_disk_is_an_error_and_the_previous_checkpoint_is_intact(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        found = script("full_disk", tmp_path, 0)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    assert "No space left on device" in found["said"]
    is_survived(found)


@pytest.mark.parametrize("replace", [False, True])
def test_every_single_call_that_the_disk_refuses_is_an_error_and_costs_nothing_else(tmp_path, monkeypatch, replace):
    """The n-th change of the file system and all later writes fail, for every n; removing files still works, as on a full disk."""
    writing = ("mkdir", "writev", "pwrite", "fsync", "rename")
    left = 0

    def failing(call):
        def wrapper(*arguments, **options):
            nonlocal left
            left -= 1
            if left <= 0 and not (call is os_rename and str(arguments[1]).endswith(".deleted")):
                raise OSError(errno.EIO, "Input/output error")
            return call(*arguments, **options)

        return wrapper

    os_rename = os.rename
    for moment in range(1, 200):
        place = tmp_path / str(moment)
        place.mkdir()
        save(place / "one", contents(1))
        target = place / ("one" if replace else "two")
        left = moment
        with monkeypatch.context() as patch:
            for name in writing:
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                save(target, contents(2), replace=replace)
            except CheckpointError as error:
                said = str(error)
            else:
                break
        assert "Input/output error" in said
        # The last call brings the new name to the disk: without it the new checkpoint is there, and not acknowledged.
        expected = {1, 2} if replace else {1}
        assert any(holds(place / "one", contents(number)) for number in expected)
        assert hidden(place) == set(), said
        assert not (place / "two").exists() or holds(place / "two", contents(2))
        save(target, contents(3), replace=True)
        assert holds(target, contents(3))
    assert holds(target, contents(2))
    assert moment > 10


def hidden(place):
    """What failed attempts have left."""
    return {name for name in os.listdir(place) if name.startswith(".")}


# -- the order of what reaches the disk ----------------------------------------------------------------------------------------------


def check_order(events, parent, target, written):
    """events: ("sync" | "rename" | "exchange" | "told", path, ...) in order, of a save to `target`, which must not exist or be replaced."""
    renames = [
        (index, event)
        for index, event in enumerate(events)
        if event[0] in ("rename", "exchange") and target in event[1:]
    ]
    assert len(renames) == 1
    ((moment, (_, old, new)),) = renames
    assert new == target
    synced = {event[1]: index for index, event in enumerate(events[:moment]) if event[0] == "sync"}
    for name in written:
        assert f"{old}/{name}" in synced, f"{name} is not on the disk when its folder gets its name"
    assert synced[old] > max(synced[f"{old}/{name}"] for name in written), "the folder is synced before a file in it"
    assert synced[f"{old}/manifest.json"] > max(synced[f"{old}/{name}"] for name in written if name != "manifest.json")
    answer = events.index(("told",))
    assert ("sync", parent) in events[moment:answer], (
        "the new name is not on the disk when the checkpoint is acknowledged"
    )


FILES = {"manifest.json", "model.safetensors", "optimizer.safetensors"}


def test_system_calls_sync_files_before_the_name_and_the_name_before_the_answer(tmp_path):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed; the order of the calls in Python is held by the next test")
    log = tmp_path / "calls"
    place = tmp_path / "place"
    place.mkdir()
    command = [
        strace,
        "-f",
        "-y",
        "-qq",
        "-s",
        "200",
        "-e",
        "trace=fsync,fdatasync,rename,renameat,renameat2,write",
        "-o",
        str(log),
    ]
    done = subprocess.run(
        [*command, sys.executable, str(SCRIPT), "traced", str(place), "last"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in done.stderr.lower() and done.returncode:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.stdout.split("\n")[:2] == ["acknowledged 0", "acknowledged 1"], done.stderr
    events = list(calls(log.read_text()))
    first_answer = [event[0] for event in events].index("told") + 1
    check_order(events[:first_answer], str(place), str(place / "last"), FILES)
    check_order(events[first_answer:], str(place), str(place / "last"), FILES)
    assert [event[0] for event in events if str(place / "last") in event[1:] and event[0] != "sync"] == [
        "rename",
        "exchange",
    ]


def calls(log):
    """What strace saw, as events."""
    for line in log.splitlines():
        if synced := re.search(r"f(?:data)?sync\(\d+<([^>]*)>\)\s+= 0", line):
            yield "sync", synced[1]
        elif renamed := re.search(r"rename(?:at2?)?\((.*)\)\s+= 0", line):
            old, new = re.findall(r'"([^"]*)"', renamed[1])
            yield ("exchange" if "RENAME_EXCHANGE" in line else "rename"), old, new
        elif "acknowledged" in line and "write(1" in line:
            yield ("told",)


@pytest.mark.parametrize("exchange", [True, False])
def test_calls_of_python_sync_files_before_the_name_and_the_name_before_they_return(tmp_path, monkeypatch, exchange):
    """Records os.fsync and os.rename, and the exchange that ctypes makes: what Python asks for, which strace confirms where it is."""
    from polyaccel.checkpoint import local

    events = []
    sync, rename, swap = os.fsync, os.rename, local._exchange
    monkeypatch.setattr(os, "fsync", lambda fd: (sync(fd), events.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))))

    def recorded_rename(old, new, **options):
        rename(old, new, **options)
        events.append(("rename", str(old), str(new)))

    def recorded_swap(one, other):
        swapped = exchange and swap(one, other)
        if swapped:
            events.append(("exchange", str(one), str(other)))
        return swapped

    monkeypatch.setattr(os, "rename", recorded_rename)
    monkeypatch.setattr(local, "_exchange", recorded_swap)
    target = tmp_path / "last"
    save(target, contents(0))
    check_order([*events, ("told",)], str(tmp_path), str(target), FILES)
    events.clear()
    save(target, contents(1), replace=True)
    if not exchange:
        aside = next(event for event in events if event[0] == "rename" and event[1] == str(target))
        assert aside[2].endswith(".replaced")
        events.remove(aside)
    check_order([*events, ("told",)], str(tmp_path), str(target), FILES)
