"""How a process finds its peers: one value, read once from the variables that torchrun and our own launcher set.

This file and config/resolve.py are the only readers of the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from polyaccel.errors import LaunchError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Which process this is, of how many, and where process 0 listens. The defaults are a job of one process."""

    process_index: int = 0
    num_processes: int = 1
    local_process_index: int = 0
    num_local_processes: int = 1
    address: str | None = None
    port: int | None = None

    @property
    def is_distributed(self) -> bool:
        """True when a launcher started this process as part of a job, be it of one process."""
        return self.address is not None

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
    """The place of this process, from torchrun's variables; a job of one when they are absent.

    Raises LaunchError when some are set and others missing, or when a value is no number or out of range.
    """
    environment = os.environ if environment is None else environment
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Rendezvous()
    missing = [name for name in _VARIABLES if name not in environment]
    if missing:
        raise LaunchError(
            f"the environment has RANK or WORLD_SIZE but not {', '.join(missing)}",
            "start the job with `polyaccel launch` or torchrun, or unset RANK and WORLD_SIZE for a single process",
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        try:
            numbers[name] = int(environment[name])
        except ValueError:
            raise LaunchError(f"{name}={environment[name]!r} is not a number", "set it to an integer") from None
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise LaunchError(
            f"RANK={numbers['RANK']} is outside a job of WORLD_SIZE={numbers['WORLD_SIZE']}",
            "ranks count from 0 to WORLD_SIZE-1",
        )
    return Rendezvous(
        process_index=numbers["RANK"],
        num_processes=numbers["WORLD_SIZE"],
        local_process_index=numbers["LOCAL_RANK"],
        num_local_processes=int(environment.get("LOCAL_WORLD_SIZE", numbers["WORLD_SIZE"])),
        address=environment["MASTER_ADDR"],
        port=numbers["MASTER_PORT"],
    )
