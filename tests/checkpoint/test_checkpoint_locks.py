"""One run writes into a folder of checkpoints; the next one learns which, and leftovers of the dead are swept, of the living never."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from saving import contents, holds, listing, save

from polyaccel.checkpoint import (
    begin_checkpoint,
    enforce_limit,
    folder_holder,
    lock_folder,
    newest_checkpoint,
    next_number,
    open_checkpoint,
    sweep,
    work_folder,
    write_checkpoint,
)
from polyaccel.errors import CheckpointError

OTHER = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from polyaccel.checkpoint import begin_checkpoint, lock_folder
    from polyaccel.checkpoint.write import work_folder
    folder = sys.argv[2]
    if sys.argv[3] == "folder":
        held = lock_folder(folder, run="blue-fox")
    else:
        attempt = begin_checkpoint(folder + "/checkpoint_7", run="blue-fox")
        open(work_folder(folder + "/checkpoint_7", attempt) + "/model.safetensors", "w").write("half")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    """Starts a run of another process that holds `tmp_path`, or is writing checkpoint_7 into it."""
    started = []

    def start(what):
        command = [sys.executable, "-c", textwrap.dedent(OTHER), str(Path(__file__).parent), str(tmp_path), what]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_and_told_who_writes(tmp_path, other_run):
    process = other_run("folder")
    with pytest.raises(CheckpointError) as caught:
        lock_folder(tmp_path)
    said = str(caught.value)
    assert f"checkpoints in {tmp_path}: they are being written by another run" in said
    assert f"run 'blue-fox', process {process.pid} on host {socket.gethostname()!r}, since 20" in said
    assert "hint: wait until it ends" in said
    holder = folder_holder(tmp_path)
    assert (holder.pid, holder.run) == (process.pid, "blue-fox")
    process.kill()
    process.wait()
    assert folder_holder(tmp_path) is None
    with lock_folder(tmp_path):
        pass
    assert listing(tmp_path) == set()


def test_a_second_writer_of_one_name_is_refused_and_told_who_writes(tmp_path, other_run):
    process = other_run("checkpoint")
    with pytest.raises(
        CheckpointError, match=rf"checkpoint_7 is being written by another run \(run 'blue-fox', process {process.pid}"
    ):
        begin_checkpoint(tmp_path / "checkpoint_7")
    save(tmp_path / "checkpoint_8")  # another name beside it is free


def test_leftovers_of_the_living_stay_and_of_the_dead_are_swept(tmp_path, other_run):
    save(tmp_path / "checkpoint_6", contents(6))
    process = other_run("checkpoint")
    assert sweep(tmp_path) == []
    (leftover,) = (name for name in os.listdir(tmp_path) if name.endswith(".saving"))
    assert newest_checkpoint(tmp_path)[0].shared["step"] == 6
    process.kill()
    process.wait()
    assert set(sweep(tmp_path)) == {leftover, ".checkpoint_7.lock"}
    assert os.listdir(tmp_path) == ["checkpoint_6"]
    assert holds(tmp_path / "checkpoint_6", contents(6))


def test_writing_a_name_again_sweeps_its_own_leftovers_only(tmp_path, other_run):
    process = other_run("checkpoint")
    process.kill()
    process.wait()
    foreign = tmp_path / ".other.0123456789abcdef.saving"
    foreign.mkdir()
    save(tmp_path / "checkpoint_7", contents(7))
    assert set(os.listdir(tmp_path)) == {"checkpoint_7", foreign.name}


def test_what_only_looks_like_a_leftover_is_left_alone(tmp_path):
    names = [
        ".git",
        ".x.saving",
        ".x.0123.saving",
        "checkpoint_1.0123456789abcdef.saving",
        ".cache.lock",
        ".x.0123456789abcdef.tmp",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".y.lock").write_text("somebody's")
    (tmp_path / ".x.0123456789abcdef.saving").symlink_to(tmp_path / ".git")
    assert sweep(tmp_path) == []
    assert set(os.listdir(tmp_path)) == {*names, ".y.lock", ".x.0123456789abcdef.saving"}


def test_a_lock_held_twice_by_one_process_is_given_back_by_the_second_release(tmp_path):
    first, second = lock_folder(tmp_path), lock_folder(tmp_path / ".")
    first.release()
    assert (tmp_path / ".lock").exists()
    second.release()
    second.release()
    assert not (tmp_path / ".lock").exists()


def test_one_process_does_not_write_one_name_twice_at_once(tmp_path):
    attempt = begin_checkpoint(tmp_path / "one")
    with pytest.raises(CheckpointError, match="is still being written by this process"):
        begin_checkpoint(tmp_path / "one", replace=True)
    assert os.path.isdir(work_folder(tmp_path / "one", attempt))
    write_checkpoint(tmp_path / "one", contents(), attempt=attempt, process_index=0, num_processes=1, facts={})
    assert listing(tmp_path) == {"one", "one/manifest.json", "one/model.safetensors", "one/optimizer.safetensors"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_worker_does_not_keep_the_lock_of_its_parent(tmp_path):
    """A data loader's worker may outlive a killed run by seconds; the next run must not wait for it."""
    script = """
        import os, sys, time
        from polyaccel.checkpoint import lock_folder
        held = lock_folder(sys.argv[1])
        if os.fork() == 0:
            os.close(1)
            time.sleep(10)
            os._exit(0)
        print("forked", flush=True)
        os._exit(0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "forked\n"
    lock_folder(tmp_path).release()


def test_a_lock_file_that_its_owner_removes_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    real, removed = fcntl.flock, []

    def removed_before(descriptor, operation):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())  # the owner's release, between our open and our lock
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with lock_folder(tmp_path):
        assert removed
        with open(tmp_path / ".lock") as file, pytest.raises(BlockingIOError):
            real(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_is_said_once_and_written_to(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    save(tmp_path / "checkpoint_0", contents(0))
    assert "its file system has no locks" in caplog.text
    leftover = tmp_path / ".checkpoint_1.0123456789abcdef.saving"
    leftover.mkdir()
    (tmp_path / ".checkpoint_1.lock").write_text("")
    assert sweep(tmp_path) == []  # it may be somebody's
    assert holds(tmp_path / "checkpoint_0", contents(0))


# -- the newest, and the limit -------------------------------------------------------------------------------------------------------


def test_the_newest_is_the_highest_number_that_is_whole_and_the_others_are_named_with_the_reason(tmp_path):
    for number in (2, 9, 10, 11):
        save(tmp_path / f"checkpoint_{number}", contents(number))
    (tmp_path / "checkpoint_10" / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint_11" / "manifest.json").unlink()
    (tmp_path / "checkpoint_12").mkdir()
    (tmp_path / "checkpoint_13").symlink_to(tmp_path / "checkpoint_9")
    (tmp_path / "checkpoint_099").mkdir()
    (tmp_path / "checkpoint_best").mkdir()
    saved, passed_over = newest_checkpoint(tmp_path)
    assert saved.path == str(tmp_path / "checkpoint_9")
    names = [Path(path).name for path, _ in passed_over]
    assert names == ["checkpoint_13", "checkpoint_12", "checkpoint_11", "checkpoint_10"]
    reasons = [why for _, why in passed_over]
    assert reasons[0] == "it is a link"
    assert "it has no manifest.json" in reasons[1]
    assert "it has no manifest.json" in reasons[2]
    assert "model.safetensors has 0 bytes" in reasons[3]
    assert next_number(tmp_path) == 14


def test_where_there_is_no_checkpoint_there_is_no_newest(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])
    assert next_number(tmp_path / "nowhere") == 0


def test_the_limit_keeps_the_newest_whole_ones_and_counts_no_broken_one(tmp_path):
    for number in range(6):
        save(tmp_path / f"checkpoint_{number}", contents(number))
    (tmp_path / "checkpoint_5" / "model.safetensors").unlink()
    (tmp_path / "checkpoint_1" / "model.safetensors").unlink()
    (tmp_path / "checkpoint_9").mkdir()  # nobody's
    (tmp_path / "best").mkdir()
    assert enforce_limit(tmp_path, 2) == ["checkpoint_2", "checkpoint_1", "checkpoint_0"]
    assert sorted(os.listdir(tmp_path)) == ["best", "checkpoint_3", "checkpoint_4", "checkpoint_5", "checkpoint_9"]
    assert holds(tmp_path / "checkpoint_4", contents(4))
    with pytest.raises(CheckpointError, match="total_limit=0 would keep no checkpoint"):
        enforce_limit(tmp_path, 0)


def test_folders_of_other_tools_are_not_deleted_by_the_limit(tmp_path):
    (tmp_path / "checkpoint_0").mkdir()
    (tmp_path / "checkpoint_0" / "pytorch_model.bin").write_text("Accelerate's")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint_1").symlink_to(tmp_path / "elsewhere")
    for number in (2, 3):
        save(tmp_path / f"checkpoint_{number}", contents(number))
    assert enforce_limit(tmp_path, 1) == ["checkpoint_2"]
    assert set(os.listdir(tmp_path)) == {"checkpoint_0", "checkpoint_1", "checkpoint_3", "elsewhere"}


def test_a_replacement_that_was_cut_off_between_its_two_renames_is_named_and_undone(tmp_path):
    save(tmp_path / "last", contents(1))
    os.rename(tmp_path / "last", tmp_path / ".last.0123456789abcdef.replaced")
    with pytest.raises(CheckpointError, match="there is no") as caught:
        open_checkpoint(tmp_path / "last")
    assert ".last.0123456789abcdef.replaced" in str(caught.value)
    sweep(tmp_path)
    assert holds(tmp_path / "last", contents(1))
