"""A job on plain machines: one ssh call each, which runs `polyaccel launch` there with its machine's rank."""

from __future__ import annotations

from polyaccel.config.schema import HostSettings
from polyaccel.errors import LaunchError
from polyaccel.launch.cluster import Job, find_tool, shell_lines
from polyaccel.launch.supervision import StopRequest, Worker, supervise

_PORT = 29400


def commands(job: Job, hosts: HostSettings) -> dict[str, list[str]]:
    """The ssh call of every machine, by its name. Raises LaunchError where none is named."""
    if not hosts.names:
        raise LaunchError("--hosts.names is empty", "name the machines as ssh knows them: --hosts.names node0,node1")
    address = job.settings.main_process_ip or hosts.names[0].rpartition("@")[2]
    port = job.settings.main_process_port or _PORT
    calls = {}
    for rank, name in enumerate(hosts.names):
        place = ["--num-machines", str(len(hosts.names)), "--machine-rank", str(rank)]
        place += ["--main-process-ip", address, "--main-process-port", str(port)]
        workdir = ["cd", hosts.workdir] if hosts.workdir else None
        remote = shell_lines(workdir, hosts.setup, ["exec", *job.launch_command(*place)])
        calls[name] = ["ssh", "-o", "BatchMode=yes", "-tt", name, remote]
    return calls


def run(job: Job, hosts: HostSettings, *, ends_process: bool = False) -> int:
    """Run the job on all machines; the first that fails stops the others. Returns its exit code, or 0. `ends_process`: see `launch`."""
    find_tool("ssh", cure="install an ssh client, or print the commands with --emit")
    workers = [Worker(name, call, None) for name, call in commands(job, hosts).items()]
    with StopRequest(ends_process=ends_process) as stop:
        return supervise(workers, grace_s=job.settings.grace_s, stop=stop)
