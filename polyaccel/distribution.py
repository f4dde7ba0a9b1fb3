"""How a job is spread over processes and devices, in the one word that Accelerate has for it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyaccel.plan import Plan
    from polyaccel.topology import Topology

_HOSTS = ("cpu", "numpy")


class DistributedType(str, enum.Enum):  # noqa: UP042 - str() of a StrEnum would be "NO", where Accelerate's is "DistributedType.NO"
    """How a job is spread over processes and devices.

    polyaccel's jobs are NO, MULTI_CPU, MULTI_GPU, MULTI_NPU, MULTI_XPU, FSDP or XLA; the others are here to be compared with.
    """

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_NPU = "MULTI_NPU"
    MULTI_MLU = "MULTI_MLU"
    MULTI_SDAA = "MULTI_SDAA"
    MULTI_MUSA = "MULTI_MUSA"
    MULTI_XPU = "MULTI_XPU"
    MULTI_HPU = "MULTI_HPU"
    MULTI_NEURON = "MULTI_NEURON"
    DEEPSPEED = "DEEPSPEED"
    FSDP = "FSDP"
    XLA = "XLA"
    MEGATRON_LM = "MEGATRON_LM"


_OTHERS = {"npu": DistributedType.MULTI_NPU, "xpu": DistributedType.MULTI_XPU}


def distributed_type_of(backend: str, topology: Topology, plan: Plan) -> DistributedType:
    """Accelerate's name for how a job is spread.

    XLA for the engine xla and on TPUs; NO for one process of torch or jax, however many devices it drives; FSDP where several
    processes share the parameters of a model; else by the kind of device.
    """
    kind = topology.device_kind.lower()
    if backend == "xla" or kind.startswith("tpu"):
        return DistributedType.XLA
    if topology.num_processes == 1:
        return DistributedType.NO
    if plan.mesh.fsdp > 1:
        return DistributedType.FSDP
    return DistributedType.MULTI_CPU if kind in _HOSTS else _OTHERS.get(kind, DistributedType.MULTI_GPU)
