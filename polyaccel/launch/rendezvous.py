"""How a process finds its peers: one value, read once from what the launcher or scheduler that started it says.

This file and config/resolve.py are the only readers of the environment.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from polyaccel.errors import LaunchError
from polyaccel.launch.schedulers import PLACES, Machines, machines_of

_BESIDE_AN_AGENT = 1  # added to the port of a torchrun agent, which keeps its own one


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Which process this is, of how many, and where process 0 listens. The defaults are a job of one process.

    `port` is where torch's processes meet; `coordinator_port` is free for an engine whose process 0 opens a server of its own.
    `interface` is the network interface by which processes on CPUs reach each other, where somebody has said so (GLOO_SOCKET_IFNAME).
    """

    process_index: int = 0
    num_processes: int = 1
    local_process_index: int = 0
    num_local_processes: int = 1
    address: str | None = None
    port: int | None = None
    is_port_taken: bool = field(default=False, compare=False)
    scheduler: str = field(default="", compare=False)
    interface: str | None = field(default=None, compare=False)

    @property
    def is_distributed(self) -> bool:
        """True when a launcher started this process as part of a job, be it of one process."""
        return self.address is not None

    @property
    def coordinator_port(self) -> int | None:
        """A port on which process 0 may listen itself: `port`, or the next one where torchrun's agent listens on `port`."""
        return self.port if self.port is None or not self.is_port_taken else self.port + _BESIDE_AN_AGENT

    def environment(self) -> dict[str, str]:
        """The variables that give a worker this place: `from_environment` of them is this value."""
        if self.address is None or self.port is None:
            return {}
        return {
            "RANK": str(self.process_index),
            "WORLD_SIZE": str(self.num_processes),
            "LOCAL_RANK": str(self.local_process_index),
            "LOCAL_WORLD_SIZE": str(self.num_local_processes),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def from_environment(environment: Mapping[str, str] | None = None) -> Rendezvous:
    """The place of this process, from its launcher's or scheduler's variables; a job of one when there are none.

    torchrun, `polyaccel launch`, Ray Train, Kubeflow, mpirun, mpiexec, srun, Cloud TPU, SkyPilot and Kubernetes Indexed Jobs
    are known (launch/schedulers.py).

    Raises LaunchError when some variables are set and others missing, or when a value is no number or out of range.
    """
    environment = os.environ if environment is None else environment
    place = next((place for of in PLACES if (place := of(environment)) is not None), None)
    if place is None:
        return Rendezvous()
    if not 0 <= place.process_index < place.num_processes:
        raise LaunchError(
            f"{place.scheduler}: process {place.process_index} (RANK) is outside a job of {place.num_processes} processes"
            " (WORLD_SIZE)",
            "processes count from 0 to their number - 1",
        )
    return Rendezvous(
        process_index=place.process_index,
        num_processes=place.num_processes,
        local_process_index=place.local_process_index,
        num_local_processes=place.num_local_processes,
        address=place.address,
        port=place.port,
        is_port_taken=place.is_port_taken,
        scheduler=place.scheduler,
        interface=environment.get("GLOO_SOCKET_IFNAME") or None,
    )


def machines_from_environment(environment: Mapping[str, str] | None = None) -> Machines | None:
    """The machines on each of which a scheduler started `polyaccel launch`; None for this machine alone."""
    return machines_of(os.environ if environment is None else environment)


def visible_gpus(environment: Mapping[str, str] | None = None) -> tuple[str, ...] | None:
    """The GPUs that processes with this environment may use, as CUDA_VISIBLE_DEVICES names them; None: all of the machine."""
    text = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    # CUDA stops at the first entry that names none, so that "" and "-1" hide all of them.
    end = next((index for index, name in enumerate(names) if name in ("", "-1")), len(names))
    return tuple(names[:end])


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
