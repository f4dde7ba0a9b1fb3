"""The mesh of a plan as torch's DeviceMesh, and which of its processes holds, and which alone saves, a piece of a tensor."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor, Partial, Replicate

from polyaccel.errors import PrepareError

if TYPE_CHECKING:
    from polyaccel.plan import Plan


def is_sharded(plan: Plan) -> bool:
    """Whether a process keeps or computes less than the whole of a model. Otherwise processes repeat it: data parallelism alone."""
    return plan.mesh.fsdp > 1 or plan.mesh.tensor > 1 or plan.mesh.sequence > 1


class ShardedMesh:
    """All processes of a job, one device each, along `replicas` (replica x data, which repeat), `fsdp`, `tensor` and `sequence`.

    Outermost first. Every process must make it, and makes the process groups of its axes with it, in which exchanges wait for `timeout`.
    """

    def __init__(self, plan: Plan, device: torch.device, timeout: timedelta) -> None:
        sizes = plan.mesh
        self.device = device
        self.sizes = {
            "replicas": sizes.replica * sizes.data,
            "fsdp": sizes.fsdp,
            "tensor": sizes.tensor,
            "sequence": sizes.sequence,
        }
        self.devices: DeviceMesh = init_device_mesh(
            device.type, tuple(self.sizes.values()), mesh_dim_names=tuple(self.sizes)
        )
        for axis in self.sizes:  # torch makes them with a timeout of its own
            _set_pg_timeout(timeout, self.group(axis))
        self.coordinate: dict[str, int] = dict(zip(self.sizes, self._own_coordinate(), strict=True))

    def _own_coordinate(self) -> list[int]:
        found = self.devices.get_coordinate()
        assert found is not None  # the mesh spans all processes
        return list(found)

    @property
    def data(self) -> DeviceMesh | None:
        """What `fully_shard` takes: (replicas, fsdp), or fsdp alone where nothing is repeated; None where the batch is not split."""
        if self.sizes["replicas"] > 1:
            return self.devices["replicas", "fsdp"]
        return self.devices["fsdp"] if self.sizes["fsdp"] > 1 else None

    @property
    def tensor(self) -> DeviceMesh | None:
        """What layers are split over, with `sequence` as its inner axis where that is there too; None where no layer is split."""
        if self.sizes["tensor"] == 1:
            return None
        return self.devices["tensor"] if self.sequence is None else self.sequence

    @property
    def sequence(self) -> DeviceMesh | None:
        """What sequences are cut over along its last axis, (tensor, sequence) where layers are split; None where they are not cut."""
        if self.sizes["sequence"] == 1:
            return None
        return self.devices["tensor", "sequence"] if self.sizes["tensor"] > 1 else self.devices["sequence"]

    def group(self, axis: str) -> Any:
        """The processes that differ from this one along `axis` alone."""
        return self.devices.get_group(axis)

    @property
    def data_shard(self) -> tuple[int, int]:
        """Which part of the batch is this process's, and of how many."""
        number = self.sizes["replicas"] * self.sizes["fsdp"]
        return self.coordinate["replicas"] * self.sizes["fsdp"] + self.coordinate["fsdp"], number

    def owns(self, tensor: torch.Tensor, *, each_data_shard: bool = False) -> bool:
        """Whether this process is the one that saves its piece of a tensor: the first of those that hold the same.

        `each_data_shard`: every data shard has a tensor of its own.
        """
        cut = {*axes_of(tensor), *(("replicas", "fsdp") if each_data_shard else ())}
        return all(position == 0 for axis, position in self.coordinate.items() if axis not in cut)


def axes_of(tensor: torch.Tensor) -> tuple[str, ...]:
    """The mesh axes that a tensor is cut along; none for one that every process has whole.

    Raises PrepareError for a tensor that the processes have yet to add up.
    """
    if not isinstance(tensor, DTensor):
        return ()
    names = tensor.device_mesh.mesh_dim_names or ()
    found = []
    for name, placement in zip(names, tensor.placements, strict=True):
        if isinstance(placement, Partial):
            raise PrepareError(
                f"a tensor of shape {tuple(tensor.shape)} lies in summands along {name!r}",
                "redistribute it before it is read",
            )
        if not isinstance(placement, Replicate):
            found.append(name)
    return tuple(found)


def with_layout_of(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's piece as a tensor that lies as `like` does; the piece itself where that is whole."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This process's piece, in the same memory; the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def settle(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter, laid out as that is from now on: backward may leave summands of it, or have cut it in another way."""
    grad: Any = parameter.grad
    placements = getattr(parameter, "placements", None)
    if placements is not None and grad.placements != placements:
        grad = parameter.grad = grad.redistribute(placements=placements)
    return grad
