"""The devices of a topology by name: those of a TPU slice come from its compiler and need not exist, CPU devices are this process's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

from polyaccel.errors import BackendUnavailableError, ConfigError, PlanError

if TYPE_CHECKING:
    import jax

    from polyaccel.planned.topologies import TopologyName

# Arrays of the script itself are on the CPU, libtpu does not look for a TPU machine's metadata, and several plans may run at once.
ENVIRONMENT: Mapping[str, str] = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices_of(topology: TopologyName) -> list[jax.Device]:
    """One device for each chip, in the compiler's order. Before jax has opened its devices, in a process of the plan's own.

    Raises BackendUnavailableError without libtpu, ConfigError for a slice that it does not know, PlanError where jax is open already.
    """
    import jax

    if topology.platform == "cpu":
        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", topology.num_devices)
        except RuntimeError as error:
            if jax.device_count("cpu") < topology.num_devices:
                raise PlanError(
                    f"--topology {topology.text} needs {topology.num_devices} CPU devices, and jax has opened"
                    f" {jax.device_count('cpu')} in this process",
                    "run polyaccel plan in a process of its own",
                ) from error
        return jax.devices("cpu")[: topology.num_devices]
    if importlib.util.find_spec("libtpu") is None:
        raise BackendUnavailableError(
            f"--topology {topology.text} needs the compiler for TPUs, and libtpu is not installed",
            "pip install 'polyaccel[tpu-plan]'",
        )
    from jax.experimental import topologies

    try:
        found = list(topologies.get_topology_desc(topology_name=topology.text, platform="tpu").devices)
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
