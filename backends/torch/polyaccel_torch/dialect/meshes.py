"""torch's DeviceMesh by names and sizes, for scripts that build on it themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh


def named_mesh(
    device_type: str, sizes: tuple[int, ...], names: tuple[str, ...], joint: Mapping[str, Sequence[str]]
) -> DeviceMesh:
    """A mesh over all processes, outermost dimension first, with dimensions by a name that stand for several of them together.

    Needs a process group of as many processes; every process must call it.
    """
    mesh = device_mesh.init_device_mesh(device_type, sizes, mesh_dim_names=names)
    for name, parts in joint.items():
        mesh[parts]._flatten(name)  # type: ignore[index]
    return mesh
