"""The devices of a topology by name: those of a TPU slice come from its compiler and need not exist, CPU devices are this process's own."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from polyaccel.errors import BackendUnavailableError, ConfigError, PlanError

if TYPE_CHECKING:
    import jax

    from polyaccel.planned.topologies import TopologyName


def environment(topology: TopologyName) -> dict[str, str]:
    """What the process of a plan starts with.

    Arrays of the script itself are on the CPU, libtpu does not look for a TPU machine's metadata, and several plans may run at once.
    """
    variables = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if topology.platform == "cpu":
        variables["JAX_NUM_CPU_DEVICES"] = str(topology.num_devices)
    return variables


def devices_of(topology: TopologyName) -> list[jax.Device]:
    """One device for each chip, in the compiler's order, in a process with the variables of `environment`.

    Raises BackendUnavailableError without libtpu, ConfigError for a slice that it does not know, PlanError for too few CPU devices.
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
