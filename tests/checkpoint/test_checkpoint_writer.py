"""The background writer: one at a time, failures at the next call, and a script that ends without waiting ends after its checkpoint."""

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from saving import contents, holds, save

from polyaccel.checkpoint import Writer


def test_it_runs_beside_the_caller_one_at_a_time():
    writer, gate, order = Writer(), threading.Event(), []
    writer.submit(lambda: (gate.wait(10), order.append("first")))
    assert writer.is_busy
    assert order == []
    threading.Timer(0.05, gate.set).start()
    writer.submit(lambda: order.append("second"))  # returns only after the first is done
    assert order[0] == "first"
    writer.wait()
    assert order == ["first", "second"]
    assert not writer.is_busy


@pytest.mark.parametrize("how", ["submit", "wait"])
def test_a_failure_is_raised_by_the_next_call_once_and_is_in_the_log(how, caplog):
    writer, ran = Writer(), []

    def fail():
        raise OSError("the disk is full")

    writer.submit(fail)
    with pytest.raises(OSError, match="the disk is full"):
        writer.wait() if how == "wait" else writer.submit(lambda: ran.append(1))
    assert "a checkpoint was not written: the disk is full" in caplog.text
    assert ran == []
    writer.wait()
    writer.submit(lambda: ran.append(1))
    writer.wait()
    assert ran == [1]


def test_a_script_that_ends_without_waiting_ends_after_its_checkpoint(tmp_path):
    script = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from polyaccel.checkpoint import Writer
        from saving import contents, save
        writer = Writer()
        writer.submit(lambda: (time.sleep(0.3), save({str(tmp_path / "one")!r}, contents(5))))
        raise RuntimeError("the script failed")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the script failed" in done.stderr
    assert holds(tmp_path / "one", contents(5))


def test_a_failure_that_nobody_waits_for_is_said_at_the_end(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x").write_text("")
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from polyaccel.checkpoint import Writer
        from saving import save
        Writer().submit(lambda: save({str(tmp_path / "one")!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert "a checkpoint was not written" in done.stderr
    assert "exists already" in done.stderr


def test_training_goes_on_while_it_writes(tmp_path):
    writer, steps = Writer(), 0
    writer.submit(lambda: (time.sleep(0.2), save(tmp_path / "one", contents(1))))
    while writer.is_busy:
        steps += 1
    writer.wait()
    assert steps > 100
    assert holds(tmp_path / "one", contents(1))
