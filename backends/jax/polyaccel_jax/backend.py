"""The jax backend before jax is imported: what it can do, whether it can be used here, how many processes it wants."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

from polyaccel.config import Config
from polyaccel.errors import BackendUnavailableError, LaunchError
from polyaccel.protocols import Capabilities, Case, Engine, Probe, WorkerSlot

if TYPE_CHECKING:
    from polyaccel.launch.rendezvous import Rendezvous

_INSTALL = "pip install 'polyaccel[jax]'"


class JaxBackend:
    """Runs flax scripts natively, and torch scripts through a bridge, on every device that jax has."""

    name = "jax"
    capabilities = Capabilities(
        dialect="flax",
        mesh_axes=frozenset({"replica", "data", "fsdp", "tensor", "sequence"}),
        mixed_precision=frozenset({"no", "bf16", "fp16"}),
        accepts_bridges=True,
        features=frozenset(
            {
                "create_model",
                "multi_process",
                "compile_events",
                "device_stats",
                "fence",
                "flops",
                "profile",
                "sharding_rules",
                "remat",
            }
        ),
        kinds={("polyaccel_jax", "Batches"): ("flax", "loader")},  # the loader of the shipped case
    )

    def probe(self) -> Probe:
        """Whether jax, flax and optax are installed. Never raises, imports none of them."""
        is_loaded = "jax" in sys.modules
        for package in ("jax", "jaxlib", "flax", "optax"):
            try:
                found = importlib.util.find_spec(package) is not None
            except (ImportError, ValueError):
                found = False
            if not found:
                return Probe(False, reason=f"{package} is not installed", cure=_INSTALL, is_loaded=is_loaded)
        try:
            return Probe(True, version=version("jax"), is_loaded=is_loaded)
        except PackageNotFoundError:
            return Probe(False, reason="jax has no package metadata", cure=_INSTALL, is_loaded=is_loaded)

    def worker_slots(
        self, num_processes: int | None, *, use_cpu: bool, gpus: Sequence[str] | None = None
    ) -> tuple[WorkerSlot, ...]:
        """One process drives all devices of a machine. More processes share them in equal parts.

        Raises LaunchError where the devices cannot be shared: GPUs whose number does not divide, or that are not there.
        """
        if num_processes is None or num_processes == 1:
            return (WorkerSlot(),)
        num_here = 0 if use_cpu else _count_gpus()
        names = [str(index) for index in range(num_here)] if gpus is None else list(gpus)
        if num_here == 0 or not names:
            return (WorkerSlot(),) * num_processes
        missing = [name for name in names if name.isdigit() and int(name) >= num_here]
        if missing:
            raise LaunchError(
                f"GPU {missing[0]} is asked for, and this machine has {num_here}, from 0",
                "correct --gpu-ids or CUDA_VISIBLE_DEVICES",
            )
        if len(names) % num_processes:
            raise LaunchError(
                f"{num_processes} processes cannot share {len(names)} GPUs in equal parts",
                "start one process (it drives all GPUs), or a number that divides them",
            )
        each = len(names) // num_processes
        parts = [names[start : start + each] for start in range(0, len(names), each)]
        return tuple(WorkerSlot({"CUDA_VISIBLE_DEVICES": ",".join(part)}) for part in parts)

    def case(self) -> Case:
        """The smallest training of the flax dialect."""
        from polyaccel_jax.dialect.case import FlaxCase

        return FlaxCase(self.name)

    def multiply_exactly(self) -> None:
        """No TF32; several products in bfloat16 on TPUs."""
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")

    def holds_devices(self) -> str | None:
        """A jax that has opened its devices runs threads, which a fork does not copy."""
        if "jax" not in sys.modules:
            return None
        from jax._src.xla_bridge import backends_are_initialized  # the public API has no question that opens nothing

        return "jax has opened its devices here already" if backends_are_initialized() else None

    def estimator(self) -> ModuleType:
        """What `polyaccel estimate-memory` asks. Imports jax and flax."""
        from polyaccel_jax import estimate

        return estimate

    def planner(self) -> ModuleType:
        """What `polyaccel plan` asks. Imports no jax before a script opens its engine."""
        from polyaccel_jax.planning import scripts

        return scripts

    def seed(self, value: int) -> None:
        """Nothing: jax has no global generator. Live engines have their own stream."""

    def open(self, config: Config, rendezvous: Rendezvous) -> Engine:
        """Import jax and join the job. Every process of the job must call it."""
        probe = self.probe()
        if not probe.is_usable:
            raise BackendUnavailableError(f"backend 'jax' cannot be used here: {probe.reason}", probe.cure)
        from polyaccel_jax.planning import scripts

        session = scripts.active()
        if session is not None:
            return session.open(config, rendezvous)
        from polyaccel_jax.engine import JaxEngine

        return JaxEngine(config, rendezvous)


def _count_gpus() -> int:
    """GPUs that nvidia-smi lists: counting through jax would take hold of them before the workers can."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    listing = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
