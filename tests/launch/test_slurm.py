"""Real Slurm on this machine: two nodes, with a configuration, ports, key and socket of the test's own. Needs Debian's slurm-wlm."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import LAUNCH, launch_command

from polyaccel.registry import load_backend

HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
ADMIN_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
MISSING = [name for name in PROGRAMS if shutil.which(name, path=ADMIN_PATH) is None]
pytestmark = [
    pytest.mark.engine("torch"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt-get install slurm-wlm)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd wants to be root"),
    pytest.mark.skipif(not load_backend("torch").probe().is_usable, reason="needs torch"),
]

CONFIGURATION = """
ClusterName=polyaccel
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait=2
NodeName=n0,n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first},{second} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of a user of the cluster."""
    folder = Path(tmp_path_factory.mktemp("slurm"))
    for name in ("state", "spooln0", "spooln1"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    controller, first, second = free_ports(3)
    host = socket.gethostname().split(".")[0]
    configuration.write_text(
        CONFIGURATION.format(folder=folder, host=host, controller=controller, first=first, second=second)
    )
    environment = {**os.environ, "SLURM_CONF": str(configuration), "PATH": ADMIN_PATH, "MASTER_ADDR": "127.0.0.1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{ADMIN_PATH}"  # jobs find `polyaccel` there
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("pid-file", "log-file", "seed-file")]
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock", *munge]
    daemons = [[*munged], ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n0"], ["slurmd", "-D", "-N", "n1"]]
    running = []
    try:
        for command in daemons:
            running.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            time.sleep(0.5)
        end = time.monotonic() + 180  # a machine that does other things, too
        while time.monotonic() < end:
            idle = subprocess.run(
                ["sinfo", "-h", "-t", "idle", "-o", "%D"], env=environment, capture_output=True, text=True
            )
            if idle.stdout.strip() == "2":
                break
            time.sleep(0.5)
        else:
            pytest.fail(f"Slurm did not start: {(folder / 'slurmctld.log').read_text()[-2000:]}")
        yield environment
        subprocess.run(["scancel", "--user=root"], env=environment, check=False)
        for _ in range(60):  # a step whose daemon is gone would wait for it for ever
            if not subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True).stdout.strip():
                break
            time.sleep(0.5)
    finally:
        for daemon in reversed(running):
            daemon.send_signal(signal.SIGTERM)
        for daemon in running:
            try:
                daemon.wait(60)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def submit(cluster, folder, *arguments):
    command = [*LAUNCH, "--on", "slurm", "--backend", "torch", "--cpu"]
    command += [f"--slurm.output={folder}/out", *map(str, arguments)]
    done = subprocess.run(command, env=cluster, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("job ")[1].split(";")[0]


def state(cluster, job):
    shown = subprocess.run(
        ["scontrol", "show", "job", job], env=cluster, capture_output=True, text=True, check=False
    ).stdout
    return shown.split("JobState=")[1].split()[0] if "JobState=" in shown else "GONE"


def wait_until(question, timeout_s=120, shows=str):
    end = time.monotonic() + timeout_s
    while not question():
        assert time.monotonic() < end, f"it did not happen in time: {shows()}"
        time.sleep(0.2)


def start_now(cluster, job):
    """Slurm holds a job back for two minutes after a requeue; an administrator's word shortens that."""
    # A credential of the very second in which the job was taken from a node is refused there, and the job is over.
    time.sleep(3)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=cluster, check=False)


def test_the_launcher_of_every_node_joins_its_processes_to_one_job(cluster, tmp_path):
    job = submit(cluster, tmp_path, "--num_machines", 2, "--num_processes", 2, HERE / "launched_collectives.py")
    wait_until(lambda: state(cluster, job) not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"))
    output = (tmp_path / "out").read_text()
    assert state(cluster, job) == "COMPLETED", output
    assert output.count("all collectives agree") == 2, output  # once per machine


def test_a_script_under_srun_needs_no_launcher(cluster, tmp_path):
    done = subprocess.run(
        ["srun", "-N2", "--ntasks-per-node=1", sys.executable, str(HERE / "launched_collectives.py")],
        env={**cluster, "POLYACCEL_BACKEND": "torch", "POLYACCEL_CPU": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all collectives agree") == 2


def test_a_job_that_saves_and_leaves_when_it_is_signalled_is_queued_again(cluster, tmp_path):
    script = tmp_path / "continues.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "saved = here / 'saved'\n"
        "if saved.exists(): (here / 'finished').touch(); sys.exit(0)\n"
        "def leave(number, frame): saved.touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "(here / 'started').touch()\ntime.sleep(120)\n"
    )
    job = submit(cluster, tmp_path, script)
    wait_until((tmp_path / "started").exists)
    subprocess.run(["scancel", "--signal=TERM", job], env=cluster, check=True)  # what a preemption sends
    wait_until((tmp_path / "saved").exists)
    wait_until(
        lambda: state(cluster, job) in ("PENDING", "RUNNING", "COMPLETED"),
        shows=lambda: state(cluster, job) + (tmp_path / "out").read_text(),
    )
    start_now(cluster, job)
    wait_until((tmp_path / "finished").exists, timeout_s=200)


@pytest.mark.slow
def test_a_node_that_leaves_later_than_another_is_waited_for_and_the_job_is_queued_again(cluster, tmp_path):
    """srun kills a step at its first bad exit, and 75 would be one."""
    script = tmp_path / "leaves.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "node = os.environ['SLURM_NODEID']\n"
        "def leave(number, frame):\n"
        "    time.sleep(8 * int(node)); (here / f'saved{node}').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "(here / f'started{node}').touch()\ntime.sleep(120)\n"
    )
    job = submit(cluster, tmp_path, "--num_machines", 2, "--num_processes", 2, script)
    wait_until(lambda: (tmp_path / "started0").exists() and (tmp_path / "started1").exists())
    subprocess.run(["scancel", "--signal=TERM", job], env=cluster, check=True)
    wait_until((tmp_path / "saved0").exists)
    wait_until(
        lambda: state(cluster, job) not in ("RUNNING", "COMPLETING"),
        shows=lambda: state(cluster, job) + (tmp_path / "out").read_text(),
    )
    assert state(cluster, job) == "PENDING", (tmp_path / "out").read_text()
    assert (tmp_path / "saved1").exists()
    subprocess.run(["scancel", job], env=cluster, check=True)


def test_a_preempted_training_goes_on_where_it_was_and_its_losses_are_those_of_one_that_ran_through(cluster, tmp_path):
    """Two nodes, one process each, with loader workers; Slurm signals all of these processes at once."""
    script, whole, losses = HERE / "preempted_training.py", tmp_path / "whole", tmp_path / "losses"
    done = subprocess.run(
        launch_command("torch", 2, script, whole, tmp_path / "other"),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    slowly = {**cluster, "PAUSE_S": "0.1"}
    job = submit(slowly, tmp_path, "--num_machines", 2, "--num_processes", 2, script, losses, tmp_path / "project")
    wait_until(lambda: losses.exists() and len(losses.read_text().splitlines()) >= 5)
    subprocess.run(["scancel", "--signal=TERM", job], env=cluster, check=True)
    wait_until((tmp_path / "project" / "checkpoints" / "checkpoint_0").exists)

    def is_queued_again():
        return state(cluster, job) == "PENDING"

    wait_until(is_queued_again, shows=lambda: state(cluster, job) + (tmp_path / "out").read_text())
    before = losses.read_text().splitlines()
    assert len(before) < len(whole.read_text().splitlines())
    start_now(cluster, job)
    wait_until(
        lambda: losses.read_text().endswith("end\n"), timeout_s=200, shows=lambda: (tmp_path / "out").read_text()
    )
    assert losses.read_text() == whole.read_text()  # every bit of every loss, and none twice
