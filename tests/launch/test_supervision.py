"""What happens to the processes of a job: their output, a failure, a signal, a restart."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import LAUNCH, has_ended

from polyaccel.launch.supervision import Worker, supervise
from polyaccel.registry import load_backend

ON_TORCH = (*LAUNCH, "--backend", "torch", "--cpu")


def python(name, code):
    return Worker(name, [sys.executable, "-u", "-c", code], None)


def launch(*arguments):
    return subprocess.run([*ON_TORCH, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def test_every_line_has_the_name_of_its_process(capfd):
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    assert supervise([python("0", code), python("1", code)], grace_s=5) == 0
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == ["[0] out", "[1] out"]
    assert sorted(captured.err.splitlines()) == ["[0] err", "[1] err"]


def test_long_lines_of_two_processes_never_mix(capfd):
    code = "for _ in range(200): print({!r} * 3000)"
    assert supervise([python("a", code.format("x")), python("b", code.format("y"))], grace_s=5) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 400
    assert set(lines) == {"[a] " + "x" * 3000, "[b] " + "y" * 3000}


def test_a_single_process_keeps_the_terminal(capfd):
    assert supervise([python("0", "print('plain')")], grace_s=5) == 0
    assert capfd.readouterr().out == "plain\n"


def test_the_traceback_of_the_first_that_failed_comes_last(capfd):
    waits = "import time; time.sleep(60)"
    fails = "import sys\nprint('before', file=sys.stderr)\nraise ValueError('the cause')"
    started = time.monotonic()
    assert supervise([python("0", waits), python("1", fails)], grace_s=5) == 1
    assert time.monotonic() - started < 30
    err = capfd.readouterr().err
    last = err[err.index("polyaccel launch: process 1 of 2 failed with exit code 1") :]
    assert "Traceback (most recent call last)" in last
    assert last.rstrip().endswith("ValueError: the cause")
    assert "[1]" not in last  # as Python printed it


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    ready = tmp_path / "ready"
    stubborn = (
        f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(60)"
    )
    fails = f"import os, sys, time\nwhile not os.path.exists({str(ready)!r}): time.sleep(.01)\nsys.exit(9)"
    started = time.monotonic()
    assert supervise([python("0", stubborn), python("1", fails)], grace_s=1) == 9
    assert 1 <= time.monotonic() - started < 30


def test_a_killed_process_is_told_as_a_shell_tells_it():
    assert supervise([python("0", "import os; os.kill(os.getpid(), 9)"), python("1", "pass")], grace_s=1) == 137


def test_what_a_killed_process_started_ends_with_it(tmp_path):
    """A data loader's worker would otherwise hold the machine's memory, or its GPU."""
    pid = tmp_path / "pid"
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    parent = (
        f"import subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(pid)!r}, 'w').write(str(p.pid))\ntime.sleep(60)"
    )
    fails = (
        f"import os, sys, time\nwhile not (os.path.exists({str(pid)!r}) and open({str(pid)!r}).read()): time.sleep(.01)\n"
        "sys.exit(3)"
    )
    assert supervise([python("0", parent), python("1", fails)], grace_s=1) == 3
    deadline = time.monotonic() + 10
    while not has_ended(pid.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("count", [1, 2])
def test_the_processes_of_a_launcher_that_is_killed_are_killed_with_what_they_started(tmp_path, count):
    script = tmp_path / "stubborn.py"
    script.write_text(
        "import os, signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"with open({str(tmp_path / 'pids')!r}, 'a') as file: file.write(f'{{os.getpid()}} {{child.pid}} ')\ntime.sleep(60)\n"
    )
    command = [*ON_TORCH, "--num-processes", str(count), str(script)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 60
        pids = []
        while len(pids) < 2 * count:
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
            pids = (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []
        job.kill()
        words = job.stderr.read()  # nobody holds it any more
    assert "polyaccel launch: the launcher was killed: so are its processes (" in words
    assert all(pid in words for pid in pids[::2])
    deadline = time.monotonic() + 5
    while not all(map(has_ended, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def failing_twice(tmp_path):
    """A script whose process 0 fails in the first two attempts, and the file to which every attempt adds its port."""
    script, attempts = tmp_path / "fails_twice.py", tmp_path / "attempts"
    script.write_text(
        "import os, sys, time\n"
        f"attempts = {str(attempts)!r}\n"
        "if os.environ['RANK'] == '0':\n"
        "    with open(attempts, 'a') as file: print(os.environ['MASTER_PORT'], file=file)\n"
        "    if len(open(attempts).readlines()) < 3: raise SystemExit(5)\n"
        "elif len(open(attempts).readlines()) < 3 if os.path.exists(attempts) else True: time.sleep(2)\n"
    )
    return script, attempts


def engines_installed():
    return [name for name in ("torch", "jax", "xla") if load_backend(name).probe().is_usable]


@pytest.mark.parametrize("backend", engines_installed())
def test_a_job_is_started_again_as_often_as_asked(tmp_path, backend):
    """xla has one process per machine."""
    script, attempts = failing_twice(tmp_path)
    count = [] if backend == "xla" else ["--num_processes", 2]
    if backend == "xla":
        script.write_text("import os; os.environ.update(RANK='0', MASTER_PORT='1')\n" + script.read_text())
    done = launch("--backend", backend, *count, "--max-restarts", 1, script)
    assert done.returncode == 5, done.stderr
    assert len(attempts.read_text().split()) == 2
    attempts.unlink()
    done = launch("--backend", backend, *count, "--max_restarts", 2, script)
    assert done.returncode == 0, done.stderr
    ports = attempts.read_text().split()
    assert len(ports) == 3
    if backend != "xla":
        assert len(set(ports)) == 3, "a new coordinator cannot listen where the last one may still"
    assert "restart 1 of 2 in 1 s (exit code 5)" in done.stderr


@pytest.mark.skipif("torch" not in engines_installed(), reason="needs torch")
def test_a_job_that_fails_again_tells_the_exit_code_and_the_traceback_of_the_process_that_failed(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import os, time\nif os.environ['RANK'] == '1': raise ValueError('the cause')\ntime.sleep(60)\n")
    done = launch("--num_processes", 2, "--max_restarts", 1, script)
    assert done.returncode == 1
    last = done.stderr[done.stderr.rindex("process 1 of 2 failed with exit code 1") :]
    assert last.rstrip().endswith("ValueError: the cause")


@pytest.mark.parametrize("restarts", [0, 3])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_job_and_it_is_not_restarted(tmp_path, number, restarts):
    """The processes get SIGTERM where the launcher's terminal has gone."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "for n in (signal.SIGTERM, signal.SIGINT): signal.signal(n, lambda number, frame: sys.exit(40 + number))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    command = [*ON_TORCH, "--num-processes", "2", "--max-restarts", str(restarts), str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert {job.stdout.readline(), job.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
        job.send_signal(number)
        assert job.wait(30) == 40 + (signal.SIGTERM if number == signal.SIGHUP else number)
        assert "restart" not in job.stderr.read()


def test_n_cpu_processes_really_are_n(tmp_path):
    script = tmp_path / "who.py"
    script.write_text("import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.getpid())\n")
    done = launch("--num_processes", 3, "--num_cpu_threads_per_process", 1, script)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines()]
    assert {(rank, size) for rank, size, _ in lines} == {("0", "3"), ("1", "3"), ("2", "3")}
    assert len({pid for _, _, pid in lines}) == 3


def test_a_dry_run_prints_the_processes_and_starts_none(tmp_path):
    script = tmp_path / "never.py"
    script.write_text("open('started', 'w')\n")
    done = launch("--num_processes", 2, "--mixed_precision", "bf16", "--dry-run", script)
    first, second = done.stdout.splitlines()
    assert "RANK=0" in first.split()
    assert "RANK=1" in second.split()
    assert "POLYACCEL_MIXED_PRECISION=bf16" in first.split()
    assert not (tmp_path / "started").exists()
    assert not Path("started").exists()


def test_two_machines_need_an_address_and_equal_parts(tmp_path, monkeypatch):
    script = tmp_path / "s.py"
    script.write_text("")
    assert "without --main-process-ip" in launch("--num_machines", 2, script).stderr
    placed = ["--num_machines", 2, "--main_process_ip", "h"]
    assert "cannot be spread over 2 machines" in launch(*placed, "--num_processes", 3, script).stderr
    assert "--machine-rank 2 is outside" in launch(*placed, "--machine_rank", 2, script).stderr
    assert "--min-machines 2 is more than --num-machines 1" in launch("--min-machines", 2, script).stderr
    done = launch(*placed, "--machine_rank", 1, "--num_processes", 4, "--main_process_port", 777, "--dry-run", script)
    first, second = (dict(w.split("=", 1) for w in line.split() if "=" in w) for line in done.stdout.splitlines())
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"], first["LOCAL_WORLD_SIZE"]) == ("2", "3", "4", "2")
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == ("h", "778"), "the launchers meet at 777"


@pytest.mark.skipif("jax" not in engines_installed(), reason="the xla environment has no jax; the main one runs it")
@pytest.mark.parametrize(
    ("variable", "flags", "parts"),
    [
        (None, (), ["0,1", "2,3"]),
        ("2,3", (), ["2", "3"]),
        ("0", ("--gpu_ids", "1,3"), ["1", "3"]),
        ("-1", (), [None, None]),
    ],
)
def test_processes_of_jax_share_the_visible_gpus(tmp_path, variable, flags, parts):
    script, listing = tmp_path / "s.py", tmp_path / "nvidia-smi"
    script.write_text("")
    listing.write_text("#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i: fake; done\n")
    listing.chmod(0o700)
    environment = {name: text for name, text in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    environment |= {"CUDA_VISIBLE_DEVICES": variable} if variable else {}
    done = subprocess.run(
        [*LAUNCH, "--backend", "jax", "--num-processes", "2", *flags, "--dry-run", str(script)],
        capture_output=True, text=True, timeout=60, env=environment, check=True,
    )  # fmt: skip
    lines = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in done.stdout.splitlines()]
    assert [line.get("CUDA_VISIBLE_DEVICES") for line in lines] == parts


@pytest.mark.parametrize(("count", "given", "threads"), [(2, None, "half"), (2, "7", None), (1, None, None)])
def test_processes_share_the_cores_unless_somebody_has_said_otherwise(tmp_path, count, given, threads):
    script = tmp_path / "s.py"
    script.write_text("")
    environment = {name: text for name, text in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": given} if given else {}
    done = subprocess.run(
        [*ON_TORCH, "--num-processes", str(count), "--dry-run", str(script)],
        capture_output=True, text=True, timeout=60, env=environment, check=True,
    )  # fmt: skip
    share = str(max(1, len(os.sched_getaffinity(0)) // count))
    for line in done.stdout.splitlines():
        found = dict(word.split("=", 1) for word in line.split() if "=" in word)
        assert found.get("OMP_NUM_THREADS") == (share if threads == "half" else None)  # None: as in this environment


def test_accelerates_switches_name_an_engine(tmp_path):
    script = tmp_path / "s.py"
    script.write_text("")
    done = subprocess.run(
        [*LAUNCH, "--multi_gpu", "--backend", "jax", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
    )
    assert done.returncode == 1
    assert "--multi_gpu means --backend torch, and --backend jax is given" in done.stderr
