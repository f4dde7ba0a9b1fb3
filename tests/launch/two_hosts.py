"""Two hosts on one machine: network namespaces where this user may make them, else two addresses of the loopback interface."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from launching import LAUNCH

PATIENCE_S = 240


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


def can_make_namespaces():
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        return False
    name = f"polyaccel-probe-{os.getpid()}"
    made = ip("netns", "add", name).returncode == 0
    ip("netns", "del", name)
    return made


class Started:
    """`polyaccel launch` on a host: its output with the time of each line, and its exit code."""

    def __init__(self, command, env):
        self.environment = env
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=env
        )
        self.lines = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line))

    @property
    def output(self):
        return "".join(line for _, line in self.lines)

    def saw(self, text, times=1):
        """The time of the first line with this text, once it is there; with `times`, of the so many-th."""
        return self._line(text, times)[0]

    def pid_of(self, text):
        """The number that follows this text, once it is there."""
        return int(self._line(text, 1)[1].partition(text)[2])

    def _line(self, text, times):
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = [(at, line) for at, line in list(self.lines) if text in line]
            if len(found) >= times:
                return found[times - 1]
            assert self._thread.is_alive(), self.output
            time.sleep(0.01)
        raise AssertionError(f"no {text!r} in: {self.output}")

    def code(self):
        code = self.process.wait(PATIENCE_S)
        self._thread.join(5)
        return code

    def kill(self):
        """The launcher, and nothing that it started."""
        self.process.kill()

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._thread.join(5)
        if not self._thread.is_alive():
            self.process.stdout.close()


class Loopback:
    """Two hosts that share everything but the address of the first."""

    address = "127.0.0.2"
    names = (os.uname().nodename,) * 2
    has_links = False

    def inside(self, rank, command):
        return command


class Namespaces:
    """Two hosts with a network, an address and a name of their own. As on many machines, a host's own name is 127.0.1.1 on itself."""

    has_links = True

    def __init__(self):
        number = os.getpid()
        self.names = (f"pa{number}", f"pb{number}")
        self.address = "10.231.77.1"
        self.links = (f"va{number}", f"vb{number}")

    def make(self):
        for name in self.names:
            assert ip("netns", "add", name).returncode == 0
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text(
                f"127.0.0.1 localhost\n127.0.1.1 {name}\n10.231.77.1 first\n10.231.77.2 second\n"
            )
            ip("-n", name, "link", "set", "lo", "up")
        first, second = zip(self.names, self.links, strict=True)
        made = ip(
            "link", "add", first[1], "netns", first[0], "type", "veth", "peer", "name", second[1], "netns", second[0]
        )
        assert made.returncode == 0, made.stderr
        for number, (name, link) in enumerate((first, second), 1):
            ip("-n", name, "addr", "add", f"10.231.77.{number}/24", "dev", link)
            assert ip("-n", name, "link", "set", link, "up").returncode == 0

    def remove(self):
        for name in self.names:
            ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def inside(self, rank, command):
        name = self.names[rank]
        return [
            "ip",
            "netns",
            "exec",
            name,
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {name}; exec "$@"',
            "-",
            *command,
        ]

    def cut(self):
        """The network between the two is gone; no connection is told."""
        assert ip("-n", self.names[1], "link", "set", self.links[1], "down").returncode == 0


class Hosts:
    """Starts `polyaccel launch` on the hosts of a place, with this engine."""

    def __init__(self, place):
        self.place = place
        self.started = []

    def launch(self, backend, machines, num_processes, *arguments, devices=1, differently=()):
        """One launcher per machine, as a user starts them; returns them in the order of the machines. `differently`: flags of the last."""
        port = _port()
        launch = [*LAUNCH, "--backend", backend, "--cpu", "--num-machines", machines, "--num-processes", num_processes]
        launch += ["--main-process-ip", self.place.address, "--main-process-port", port]
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        jobs = []
        for rank in range(machines):
            flags = differently if rank == machines - 1 else ()
            command = [*map(str, launch), "--machine-rank", str(rank), *flags, *map(str, arguments)]
            jobs.append(Started(self.place.inside(rank, command), env=environment))
        self.started += jobs
        return jobs

    def again(self, job):
        """The same command as once before."""
        self.started.append(Started(job.process.args, env=job.environment))
        return self.started[-1]


@contextmanager
def hosts_of(place):
    try:
        if place.has_links:
            place.make()
        hosts = Hosts(place)
        try:
            yield hosts
        finally:
            for job in hosts.started:
                job.end()
    finally:
        if place.has_links:
            place.remove()


def _port():
    """A port below those that outgoing connections get, with free ones after it."""
    for port in range(20000 + os.getpid() % 8000, 30000, 17):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.2", port)) != 0:
                return port
    raise AssertionError("no free port")
