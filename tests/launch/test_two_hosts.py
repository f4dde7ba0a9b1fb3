"""A job on two hosts, started on each as a user starts it: it trains, stops as one, names what was lost, and goes on as if nothing were."""

import os
import signal
import subprocess
import time
from itertools import groupby
from pathlib import Path

import pytest
from launching import LAUNCH, has_ended
from two_hosts import PATIENCE_S, Loopback, Namespaces, can_make_namespaces, hosts_of

from polyaccel.config.schema import PREEMPTED
from polyaccel.registry import load_backend

HERE = Path(__file__).parent
ENGINES = [name for name in ("torch", "jax") if load_backend(name).probe().is_usable]
pytestmark = pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
UPDATES, EVERY = 16, 4
GLOBAL_BATCH = ("--micro-batches-per-update", 4)
NAMESPACES = "needs root and network namespaces (apt-get install iproute2)"


@pytest.fixture(scope="module")
def may_have_links():
    return can_make_namespaces()


@pytest.fixture
def hosts(may_have_links):
    with hosts_of(Namespaces() if may_have_links else Loopback()) as found:
        yield found


@pytest.fixture
def linked_hosts(may_have_links):
    if not may_have_links:
        pytest.skip(NAMESPACES)
    with hosts_of(Namespaces()) as found:
        yield found


@pytest.fixture
def neighbours():
    with hosts_of(Loopback()) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses of one process on one device, which nobody disturbs."""
    losses = tmp_path_factory.mktemp("alone") / "losses"
    script = [HERE / "hosts_training.py", losses, losses.with_name("project"), UPDATES, 0, 0]
    job = [*LAUNCH, "--backend", "torch", "--cpu", *GLOBAL_BATCH, *script]
    subprocess.run([str(word) for word in job], check=True, timeout=PATIENCE_S)
    return losses


def reached(losses, update, jobs):
    """Returns when the training has taken this update."""
    deadline = time.monotonic() + PATIENCE_S
    while not losses.exists() or not any(line.startswith(f"{update} ") for line in losses.read_text().splitlines()):
        assert all(job.process.poll() is None for job in jobs), "\n\n".join(job.output for job in jobs)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def went_on(losses, updates, jobs):
    """Returns when the training has taken so many updates more."""
    before = len(losses.read_text().splitlines())
    while len(losses.read_text().splitlines()) < before + updates:
        assert all(job.process.poll() is None for job in jobs), "\n\n".join(job.output for job in jobs)
        time.sleep(0.02)


def taken(losses):
    """Update -> all the losses that were computed for it, in their order."""
    rows = sorted(
        (line.split() for line in losses.read_text().splitlines() if line[0] != "e"), key=lambda row: int(row[0])
    )
    return {
        int(number): [float.fromhex(row[1]) for row in found] for number, found in groupby(rows, lambda row: row[0])
    }


def kill_process(losses, index):
    """SIGKILL for the newest process of this number; returns when."""
    numbers = [line.split() for line in Path(f"{losses}.pids").read_text().splitlines()]
    at = time.monotonic()
    os.kill(int([pid for number, pid in numbers if int(number) == index][-1]), signal.SIGKILL)
    return at


@pytest.mark.parametrize("backend", ENGINES)
def test_a_job_on_two_hosts_outlives_a_killed_process_and_a_signal_and_ends_on_one_host(
    hosts, backend, undisturbed, tmp_path
):
    """On torch it outlives its machine 0 as well. (There two processes on each host are as good, and take twice as long.)"""
    losses, project = tmp_path / "losses", tmp_path / "project"
    processes, devices = 2, 1 if backend == "torch" else 2
    settings = (*GLOBAL_BATCH, "--mesh.fsdp", -1, "--preemption", "save", "--max-restarts", 2, "--grace-s", 40)

    def launch(machines, count, pause_s):
        script = (HERE / "hosts_training.py", losses, project, UPDATES, EVERY, pause_s)
        return hosts.launch(backend, machines, count, *settings, *script, devices=devices)

    jobs = launch(2, processes, 0.2)
    reached(losses, EVERY + 1, jobs)
    last = processes - 1
    killed = kill_process(losses, last)
    words = f"process {last} on machine 1 ({hosts.place.names[1]}) was killed by SIGKILL"
    assert jobs[0].saw(words) - killed < 5
    assert all(job.saw(f"{words}; restart 1 of 2 in 1 s") for job in jobs)
    went_on(losses, 2, jobs)
    if backend == "torch":
        jobs[0].kill()
        assert jobs[1].saw(f"machine 0 ({hosts.place.names[0]}) is lost: its launcher has ended")
        jobs[0] = hosts.again(jobs[0])  # as its scheduler does
        went_on(losses, 2, jobs)
    jobs[1].process.send_signal(signal.SIGTERM)  # one machine is wanted back
    codes = [job.code() for job in jobs]
    assert codes == [PREEMPTED, PREEMPTED], "\n\n".join(job.output for job in jobs)
    assert not any("restart 2" in job.output for job in jobs)
    stopped_at = max(taken(losses))

    (job,) = launch(1, processes // 2, 0)
    assert job.code() == 0, job.output
    assert losses.read_text().endswith("end 0x0p+0\n")
    ours, expected = taken(losses), taken(undisturbed)
    assert list(ours) == list(expected) == list(range(1, UPDATES + 1))
    assert len(ours[EVERY + 1]) >= 2, "computed again after the restart"
    assert all(len(set(found)) == 1 for found in ours.values()), "to the last bit"
    assert all(len(found) == 1 for update, found in ours.items() if update > stopped_at), "the signal cost no update"
    for update, found in ours.items():
        assert found[-1] == pytest.approx(expected[update][0], rel=1e-6)


@pytest.fixture
def waiting(tmp_path):
    """A script whose processes run for a minute in a job of two machines, and for a moment in one of a single machine."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, time\nsize = os.environ.get('WORLD_SIZE', '1')\n"
        "print('ready', os.environ.get('RANK', '0'), 'of', size, 'as', os.getpid(), flush=True)\n"
        "end = time.monotonic() + (60 if size in '24' else 0.1)\n"
        "while time.monotonic() < end: time.sleep(0.05)\n"
    )
    return script


def test_a_host_that_is_cut_off_is_noticed_in_time_and_the_job_goes_on_without_it(linked_hosts, waiting):
    settings = (
        *GLOBAL_BATCH,
        "--heartbeat-timeout-s",
        2,
        "--max-restarts",
        1,
        "--min-machines",
        1,
        "--join-timeout-s",
        3,
    )
    first, second = linked_hosts.launch("torch", 2, 2, "--grace-s", 1, *settings, waiting)
    first.saw("ready 0 of 2")
    second.saw("ready 1 of 2")
    cut = time.monotonic()
    linked_hosts.place.cut()
    words = f"machine 1 ({linked_hosts.place.names[1]}) with process 1 is lost: no sign of life for 2 s (heartbeat_timeout_s)"
    assert first.saw(words) - cut < 4
    assert second.saw(f"machine 0 ({linked_hosts.place.names[0]}) is lost: no sign of life for 2 s") - cut < 4
    assert second.code() == 1, "only machine 0 leads: two halves of a job never both train"
    assert "machine 1 did not reach machine 0 at" in second.output
    assert first.code() == 0, first.output
    assert "restart 1 of 1" in first.output


def test_a_launcher_that_is_killed_takes_its_processes_with_it_and_may_come_back(neighbours, waiting):
    settings = ("--max-restarts", 1, "--grace-s", 1)
    first, second = neighbours.launch("torch", 2, 4, *settings, waiting)
    first.saw("ready 0 of 4")
    left = [second.pid_of(f"ready {index} of 4 as ") for index in (2, 3)]
    killed = time.monotonic()
    second.kill()
    assert first.saw("with processes 2, 3 is lost: its launcher has ended") - killed < 2
    while not all(map(has_ended, left)):
        assert time.monotonic() - killed < 5
        time.sleep(0.02)
    again = neighbours.again(second)
    again.saw("ready 3 of 4")
    first.saw("ready 0 of 4", times=2)
    first.process.send_signal(signal.SIGTERM)  # one signal ends the job everywhere
    assert [job.code() for job in (first, again)] == [143, 143]


def test_machine_0_may_come_back_as_any_other_and_without_it_the_job_ends(neighbours, waiting):
    first, second = neighbours.launch("torch", 2, 2, "--max-restarts", 1, "--grace-s", 1, waiting)
    first.saw("ready 0 of 2")
    second.saw("ready 1 of 2")
    killed = time.monotonic()
    first.kill()
    lost = f"machine 0 ({neighbours.place.names[0]}) is lost: its launcher has ended"
    assert second.saw(lost) - killed < 2
    second.saw("waiting up to 600 s for it (restart 1 of 1)")
    again = neighbours.again(first)
    again.saw("ready 0 of 2")
    second.saw("ready 1 of 2", times=2)
    again.kill()
    second.saw(lost, times=2)
    assert second.code() == 1
    assert "hint: launch it again on all machines" in second.output


@pytest.mark.skipif("jax" not in ENGINES, reason="the other machine's engine is jax: the main environment runs it")
def test_machines_that_were_started_differently_are_refused(neighbours, waiting):
    first, second = neighbours.launch("torch", 2, 2, waiting, differently=("--backend", "jax"))
    assert second.code() == 1
    assert "machine 0 refuses machine 1: backend is 'jax' there and 'torch' on machine 0" in second.output
    assert first.process.poll() is None, "the right one may still come"


def test_fewer_machines_need_to_know_the_global_batch(neighbours, waiting):
    first, _ = neighbours.launch("torch", 2, 2, "--min-machines", 1, waiting)
    assert first.code() == 1
    assert "--min-machines 1 of 2 without --micro-batches-per-update" in first.output
