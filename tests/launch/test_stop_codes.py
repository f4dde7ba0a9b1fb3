"""What `polyaccel launch` tells after SIGTERM: the code with which the processes left, also on a machine that is busy."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import LAUNCH

from polyaccel.registry import load_backend
from polyaccel.signals import Recipient

ENGINES = [name for name in ("torch", "jax") if load_backend(name).probe().is_usable]
# One process, and several that may be restarted.
KINDS = [("torch", 1, 0), ("torch", 2, 1)] + [("jax", 2, 0)] * ("jax" in ENGINES)
QUEUE_AGAIN = 75

# Leaves as a script does that saved its state; what Python does after its handlers are down takes another half of a second.
LEAVES = """
import os, pathlib, signal, sys, time
class Slow:
    def __del__(self, sleep=time.sleep): sleep(0.5)
slow = Slow()
def leave(number, frame): sys.exit(75)
signal.signal(signal.SIGTERM, leave)
(pathlib.Path(sys.argv[1]) / os.environ.get("RANK", "0")).write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture(scope="module")
def _busy():
    """Three processes that never rest, on every two cores."""
    count = 3 * max(1, (os.cpu_count() or 2) // 2)
    running = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    yield
    for process in running:
        process.kill()
        process.wait()


def launch(kind, *arguments):
    backend, count, restarts = kind
    command = [*LAUNCH, "--backend", backend, "--cpu"]
    command += ["--num-processes", str(count), "--max-restarts", str(restarts), "--grace-s", "30"]
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def started(folder, job, count):
    """The process ids of the workers, once all of them have installed their handlers."""
    deadline = time.monotonic() + 60
    while True:
        texts = [file.read_text() for file in sorted(folder.glob("[0-9]*"))]
        if len(texts) == count and all(texts):
            return [int(text) for text in texts]
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def outcome(job):
    output, _ = job.communicate(timeout=90)
    return job.returncode, output


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("_busy")
def test_a_signal_to_every_process_of_the_job_leaves_their_exit_code(tmp_path, kind):
    """Slurm signals all of a step's processes, systemd all of a unit's: the launcher's turn comes when the script is leaving."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    for delay_s in (0.0, 0.2) if kind[2] == 0 else (0.2,):
        folder = tmp_path / str(delay_s)
        folder.mkdir()
        job = launch(kind, script, folder)
        workers = started(folder, job, kind[1])
        time.sleep(0.3)  # the launcher looks every 0.05 s; a script that was just started has nothing to save
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        time.sleep(delay_s)
        job.send_signal(signal.SIGTERM)
        code, output = outcome(job)
        assert code == QUEUE_AGAIN, output


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("_busy")
def test_signals_that_come_again_and_again_change_nothing(tmp_path, kind):
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    job = launch(kind, script, tmp_path)
    started(tmp_path, job, kind[1])
    time.sleep(0.3)
    while job.poll() is None:
        job.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    code, output = outcome(job)
    assert code == QUEUE_AGAIN, output


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1] == 2], ids=str)
def test_a_process_that_still_saves_is_not_disturbed_by_one_that_has_left(tmp_path, kind):
    script = tmp_path / "saves.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "here, rank, count = pathlib.Path(sys.argv[1]), os.environ['RANK'], 0\n"
        "def leave(number, frame):\n"
        "    global count\n"
        "    count += 1\n"
        "    if rank == '1':\n"
        "        end = time.monotonic() + 2\n"
        "        while time.monotonic() < end: time.sleep(0.01)\n"
        "        (here / 'saved').write_text(str(count))\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "(here / rank).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    job = launch(kind, script, tmp_path)
    started(tmp_path, job, 2)
    job.send_signal(signal.SIGTERM)
    code, output = outcome(job)
    assert (tmp_path / "saved").read_text() == "1", output
    assert code == QUEUE_AGAIN, output


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
@pytest.mark.usefixtures("_busy")
def test_a_signal_during_start_up_ends_everything_with_143(tmp_path, kind):
    """Before the script has said what it wants to do on a signal, the signal ends it, and no process stays behind."""
    script = tmp_path / "starts.py"
    script.write_text(
        f"import os, time\nopen(os.path.join({str(tmp_path)!r}, str(os.getpid())), 'w')\ntime.sleep(60)\n"
    )
    for delay_s in (0.05, 0.2, 0.4) if kind[2] == 0 else (0.3, 4.0):
        job = launch(kind, script)
        time.sleep(delay_s)
        job.send_signal(signal.SIGTERM)
        code, output = outcome(job)
        assert code in (-signal.SIGTERM, 128 + signal.SIGTERM), output
    deadline = time.monotonic() + 5
    while left := [file.name for file in tmp_path.glob("[0-9]*") if Path(f"/proc/{file.name}/cmdline").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_handler_that_a_script_has_taken_away_again_only_puts_the_signal_off(tmp_path):
    """A process that handled a signal and does not any more is thought to be leaving. It is ended when it does not leave."""
    code = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\nprint('handled', flush=True)\nsys.stdin.readline()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\nprint('not handled', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        recipient = Recipient(process.pid, patience_s=0.5)
        assert process.stdout.readline() == "handled\n"
        recipient.observe()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "not handled\n"
        recipient.send(signal.SIGTERM)
        recipient.send_due()
        assert recipient.was_sent(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        time.sleep(0.3)
        recipient.send_due()
        assert process.wait(10) == -signal.SIGTERM
