"""The declaration of the torch backend: what is known before torch is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from polyaccel.errors import LaunchError
from polyaccel.protocols import Capabilities, Case, Probe, WorkerSlot
from polyaccel_torch import tpu

if TYPE_CHECKING:
    from polyaccel.config import Config
    from polyaccel.launch.rendezvous import Rendezvous
    from polyaccel_torch.engine import TorchEngine


class TorchBackend:
    """PyTorch on CPU, CUDA, TPUs (torch_tpu) and (one process) MPS; data parallel over processes, or with parameters in pieces on them."""

    name = "torch"
    capabilities = Capabilities(
        dialect="torch",
        mesh_axes=frozenset({"replica", "data", "fsdp", "tensor", "sequence"}),
        mixed_precision=frozenset({"no", "bf16", "fp16"}),
        accepts_bridges=True,
        features=frozenset(
            {
                "backward_value",
                "gradient_sync",
                "compile",
                "multi_process",
                "host_placement",
                "device_stats",
                "fence",
                "profile",
                "ddp",
                "grad_scaler",
                "uneven_inputs",
                "autocast_cache",
                "process_group",
                "sharding_rules",
                "remat",
                "offload",
                "create_model",
            }
        ),
    )

    def probe(self) -> Probe:
        """Whether torch is installed."""
        if importlib.util.find_spec("torch") is None:
            return Probe(is_usable=False, reason="torch is not installed", cure="pip install 'polyaccel[torch]'")
        try:
            version: str | None = importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:
            version = None  # built from source, without metadata
        return Probe(
            is_usable=True,
            version=version,
            is_loaded="torch" in sys.modules,
            device="tpu" if tpu.is_installed() else None,
        )

    def worker_slots(
        self, num_processes: int | None, *, use_cpu: bool, gpus: Sequence[str] | None = None
    ) -> tuple[WorkerSlot, ...]:
        """One process per GPU or TPU device; on CPU as many as asked for, one by default. LOCAL_RANK chooses the device.

        Raises LaunchError for more processes than GPUs, and for a part of a machine's TPU devices.
        """
        num_gpus = 0 if use_cpu else _num_gpus()
        if gpus is not None:
            num_gpus = min(num_gpus, len(gpus))  # --gpu-ids is for the processes, and not in force here
        if num_gpus and num_processes is not None and num_processes > num_gpus:
            raise LaunchError(
                f"--num-processes {num_processes} needs as many GPUs, and this machine shows {num_gpus}",
                f"use --num-processes {num_gpus}, or --cpu",
            )
        num_tpus = 0 if use_cpu or num_gpus else tpu.num_devices()
        if num_tpus and num_processes not in (None, 1, num_tpus):
            raise LaunchError(
                f"--num-processes {num_processes} on this machine, which has {num_tpus} TPU devices: torch_tpu starts one process for"
                " each of them, or one alone",
                f"use --num-processes {num_tpus}, or --cpu",
            )
        count = num_processes or num_gpus or num_tpus or 1
        return (WorkerSlot(tpu.launch_environment() if num_tpus and count > 1 else {}),) * count

    def case(self) -> Case:
        """The smallest training of the torch dialect."""
        from polyaccel_torch.dialect.case import TorchCase

        return TorchCase(self.name)

    def multiply_exactly(self) -> None:
        """No TF32; on TPUs, torch_tpu takes several products in bfloat16."""
        import torch

        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False

    def holds_devices(self) -> str | None:
        """CUDA, once it was used, and a process group do not survive a fork."""
        if "torch" not in sys.modules:
            return None
        import torch

        if torch.cuda.is_initialized():
            return "CUDA is in use here already"
        if tpu.is_in_use():
            return "the TPU is in use here already"
        is_joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        return "torch.distributed is initialized here already" if is_joined else None

    def big_models(self) -> ModuleType:
        """What `polyaccel.big_models` forwards to. Imports torch."""
        from polyaccel_torch import big_models

        return big_models

    def own_loaders(self) -> ModuleType:
        """What `polyaccel.compat.data_loader` forwards to. Imports torch."""
        from polyaccel_torch import own_loaders

        return own_loaders

    def estimator(self) -> ModuleType:
        """What `polyaccel estimate-memory` asks. Imports torch."""
        from polyaccel_torch import estimate

        return estimate

    def seed(self, value: int) -> None:
        """Seed torch's generators of all devices, if torch is loaded."""
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(value)

    def open(self, config: Config, rendezvous: Rendezvous) -> TorchEngine:
        """Import torch and join the job. Every process of the job must call it. Raises PlanError or LaunchError."""
        from polyaccel_torch.engine import TorchEngine

        return TorchEngine(config, rendezvous)


def _num_gpus() -> int:
    import torch  # asks the driver for a number and touches no GPU

    return torch.cuda.device_count()
