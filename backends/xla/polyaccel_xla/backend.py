"""What the xla backend declares and finds out without importing a framework."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from polyaccel.errors import LaunchError
from polyaccel.protocols import Capabilities, Case, Probe, WorkerSlot
from polyaccel.tpus import num_local_chips

if TYPE_CHECKING:
    from polyaccel.config import Config
    from polyaccel.launch.rendezvous import Rendezvous
    from polyaccel_xla.engine import XlaEngine

_CURE = "pip install 'polyaccel[xla]'"


class XlaBackend:
    """PyTorch/XLA: one program over the global batch, partitioned over all devices; one process per host drives all of its devices."""

    name = "xla"
    capabilities = Capabilities(
        dialect="torch",
        mesh_axes=frozenset({"replica", "data", "fsdp", "tensor"}),
        mixed_precision=frozenset({"no", "bf16"}),
        accepts_bridges=False,
        features=frozenset({"backward_value", "profile", "sharding_rules"}),
    )

    def probe(self) -> Probe:
        """Usable when torch_xla and the torch that it was built for are installed; the pair is compiled together."""
        missing = [name for name in ("torch", "torch_xla") if importlib.util.find_spec(name) is None]
        if missing:
            return Probe(is_usable=False, reason=f"{' and '.join(missing)} not installed", cure=_CURE)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "torch_xla")}
        if _minor(versions["torch"]) != _minor(versions["torch_xla"]):
            return Probe(
                is_usable=False,
                version=versions["torch_xla"],
                reason=f"torch_xla {versions['torch_xla']} is built for torch {_minor(versions['torch_xla'])},"
                f" and torch {versions['torch']} is installed",
                cure=f"{_CURE} in an environment of its own",
            )
        has_tpu = num_local_chips() > 0 and importlib.util.find_spec("libtpu") is not None
        return Probe(
            is_usable=True,
            version=versions["torch_xla"],
            is_loaded="torch_xla" in sys.modules,
            device="tpu" if has_tpu else None,
        )

    def worker_slots(
        self, num_processes: int | None, *, use_cpu: bool, gpus: Sequence[str] | None = None
    ) -> tuple[WorkerSlot, ...]:
        """One process, whatever the number of devices. Raises LaunchError for more."""
        if num_processes is not None and num_processes != 1:
            raise LaunchError(
                f"--num-processes {num_processes}: backend 'xla' runs 1 process per host, because SPMD partitions one program"
                " over all devices of the process",
                "leave --num-processes out; for several virtual devices on the CPU set CPU_NUM_DEVICES",
            )
        return (WorkerSlot({"PJRT_DEVICE": "CPU"} if use_cpu else {}),)

    def case(self) -> Case:
        """The smallest training of the torch dialect."""
        from polyaccel_torch.dialect.case import TorchCase

        return TorchCase(self.name)

    def multiply_exactly(self) -> None:
        """Several products in bfloat16 on TPUs."""
        from torch_xla import backends

        backends.set_mat_mul_precision("highest")

    def holds_devices(self) -> str | None:
        """Never asked for: xla runs one process per machine, and that one is not forked."""
        return None

    def seed(self, value: int) -> None:
        """Seed torch's own generators: weights are made and loaders are shuffled on the host."""
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(value)

    def open(self, config: Config, rendezvous: Rendezvous) -> XlaEngine:
        """Import torch_xla, turn SPMD on for this process and find the devices. Raises LaunchError or UnsupportedError."""
        from polyaccel_xla.engine import open_engine

        return open_engine(config, rendezvous)


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])
