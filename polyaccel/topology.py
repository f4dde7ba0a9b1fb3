"""Where one process stands in the job, as its engine found it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """The processes and devices of a job, seen from one process.

    `num_processes` counts operating-system processes (torch: one per device; xla and jax: one per host), `num_devices` all
    devices of the job, `num_local_devices` those that this process drives.
    """

    process_index: int
    num_processes: int
    local_process_index: int
    num_local_devices: int
    num_devices: int
    device_kind: str

    @property
    def is_main_process(self) -> bool:
        """True on process 0 of the job."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """True on the first process of each host."""
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        """True on the process with the highest index."""
        return self.process_index == self.num_processes - 1
