"""The devices of a topology by name: those of a TPU slice come from its compiler and need not exist, others are this machine's own."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from polyaccel.errors import BackendUnavailableError, ConfigError, PlanError

if TYPE_CHECKING:
    import jax

    from polyaccel.planned.chips import Chip
    from polyaccel.planned.topologies import TopologyName

_LIBTPU_DIMS = 3


def environment(topology: TopologyName) -> dict[str, str]:
    """What the process of a plan starts with.

    Arrays of the script itself are on the CPU, libtpu does not look for a TPU machine's metadata, and several plans may run at once.
    """
    if topology.platform == "gpu":
        # Its compiler tries kernels on the device; what nobody runs needs no memory beside that.
        return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    variables = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if topology.platform == "cpu":
        variables["JAX_NUM_CPU_DEVICES"] = str(topology.num_devices)
    return variables


def num_gpus() -> int:
    """GPUs of this machine, counted without opening them."""
    from polyaccel_jax import backend

    return backend._count_gpus()


def devices_of(topology: TopologyName) -> list[jax.Device]:
    """One device for each chip, in the compiler's order, in a process with the variables of `environment`.

    Raises BackendUnavailableError without libtpu, ConfigError for a slice that it does not know, PlanError for
    too few CPU devices or GPUs.
    """
    import jax

    if topology.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < topology.num_devices:
            raise PlanError(
                f"--topology {topology.text} needs {topology.num_devices} CPU devices, and jax has opened {len(found)} in this process",
                "start it with JAX_NUM_CPU_DEVICES, as polyaccel plan does",
            )
        return found[: topology.num_devices]
    if topology.platform == "gpu":
        return _gpus(topology)[: topology.num_devices]
    if importlib.util.find_spec("libtpu") is None:
        raise BackendUnavailableError(
            f"--topology {topology.text} needs the compiler for TPUs, and libtpu is not installed",
            "pip install 'polyaccel[tpu-plan]'",
        )
    from jax.experimental import topologies

    try:
        # Of a torus that it takes for a mesh, XLA:TPU makes all-reduces of all gathers and scatters over the whole slice.
        wrap = tuple([int(is_ring) for is_ring in topology.wraps] + [0] * (_LIBTPU_DIMS - len(topology.wraps)))
        found = list(topologies.get_topology_desc(topology_name=topology.text, platform="tpu", wrap=wrap).devices)
    except RuntimeError as error:
        raise ConfigError(
            f"--topology {topology.text} is unknown to the installed libtpu: {str(error).splitlines()[0]}",
            "choose the sizes of a slice that exists, such as v5e:4x4 or v5p:4x4x8",
        ) from error
    if len(found) != topology.num_devices:
        raise ConfigError(
            f"--topology {topology.text} has {topology.num_devices} chips, and libtpu makes {len(found)} devices of it",
            "choose a generation whose chips are one device each",
        )
    return found


def chip_of(topology: TopologyName) -> Chip | None:
    """The chip of a slice as its maker describes it; of a GPU its name, and what this process may take of its memory."""
    from polyaccel.planned.chips import Chip

    if topology.platform != "gpu":
        return topology.chip
    device = _gpus(topology)[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return Chip(
        name=device.device_kind,
        hbm_bytes=int(stats["bytes_limit"]),
        peak_flops=None,
        hbm_bytes_per_s=None,
        link_bytes_per_s=None,
        num_dims=1,
        source="this machine",
    )


def _gpus(topology: TopologyName) -> list[jax.Device]:
    import jax

    try:
        found = jax.devices("gpu")
    except RuntimeError as error:
        raise PlanError(
            f"--topology {topology.text} needs a jax that knows GPUs: {str(error).splitlines()[0]}",
            "pip install 'jax[cuda12]' on a machine with GPUs",
        ) from error
    if len(found) < topology.num_devices:
        raise PlanError(
            f"--topology {topology.text} needs {topology.num_devices} GPUs, and jax finds {len(found)}",
            f"plan for those: --topology gpu:{len(found)}",
        )
    return found
