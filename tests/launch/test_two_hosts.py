"""Two network namespaces as two hosts, each with an address and a name of its own. Needs root and Debian's iproute2."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import LAUNCH

from polyaccel.registry import load_backend

HERE = Path(__file__).parent
HOSTS = {"polyaccel-a": "10.231.77.1", "polyaccel-b": "10.231.77.2"}
ENGINES = [name for name in ("torch", "jax") if load_backend(name).probe().is_usable]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


def can_make_namespaces():
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        return False
    made = ip("netns", "add", "polyaccel-probe").returncode == 0
    ip("netns", "del", "polyaccel-probe")
    return made


pytestmark = [
    pytest.mark.skipif(
        not can_make_namespaces(), reason="needs root and network namespaces (apt-get install iproute2)"
    ),
    pytest.mark.skipif("torch" not in ENGINES, reason="needs torch"),
]


@pytest.fixture
def hosts():
    first, second = HOSTS
    names = "".join(f"{address} {name}\n" for name, address in HOSTS.items())
    try:
        for name in HOSTS:
            assert ip("netns", "add", name).returncode == 0
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "veth-pa", "netns", first, "type", "veth", "peer", "name", "veth-pb", "netns", second)
        for name, link in ((first, "veth-pa"), (second, "veth-pb")):
            ip("-n", name, "addr", "add", f"{HOSTS[name]}/24", "dev", link)
            assert ip("-n", name, "link", "set", link, "up").returncode == 0
        yield HOSTS
    finally:
        for name in HOSTS:
            ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def start(host, *arguments):
    """`polyaccel launch` on a host."""
    launch = [*LAUNCH, "--cpu", *map(str, arguments)]
    inside = ["unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "-", *launch]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}  # per jax process
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *inside],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("backend", ENGINES)
def test_two_hosts_form_one_job(hosts, backend):
    placed = [
        "--backend",
        backend,
        "--num_machines",
        2,
        "--num_processes",
        2,
        "--main_process_ip",
        hosts["polyaccel-a"],
    ]
    placed += ["--main_process_port", 29511]
    script = HERE / "launched_collectives.py"
    jobs = [start(host, *placed, "--machine_rank", rank, script) for rank, host in enumerate(hosts)]
    outputs = [job.communicate(timeout=240)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert all("all collectives agree" in output for output in outputs), outputs
