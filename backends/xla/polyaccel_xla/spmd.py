"""Where values live: the device mesh of a plan, parameters repeated on every device, batches cut along their first dimension.

Under SPMD a tensor is a global value, whatever the number of devices: the partitioner cuts the program, not the script.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch_xla import runtime as xr

from polyaccel import trees
from polyaccel.errors import PrepareError
from polyaccel.mesh import MeshSpec

_BATCH_AXES = ("replica", "data")


class Placement:
    """Puts values on the mesh of all devices. Uploads give device data, never constants of a graph.

    `num_hosts`: with several, a batch is this host's part of the global one.
    """

    def __init__(self, mesh: MeshSpec, num_hosts: int) -> None:
        sizes = tuple(mesh.sizes[axis] for axis in _BATCH_AXES)
        self.num_data_shards = mesh.num_data_shards
        self.num_hosts = num_hosts
        self.mesh = xs.Mesh(np.arange(xr.global_runtime_device_count()), sizes, _BATCH_AXES)
        xs.set_global_mesh(self.mesh)
        self._device = str(torch_xla.device())
        self._specs: dict[int, Any] = {}

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mark a device tensor as repeated on every device, in place.

        Results of a step come back with this mark. Values that start without it would make the first step another graph.
        """
        xs.mark_sharding(tensor, self.mesh, (None,) * tensor.dim())
        return tensor

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """A host tensor, repeated on every device."""
        return self.replicate(self._send([host.detach()], None)[0])

    def upload_scalar(self, host: torch.Tensor) -> torch.Tensor:
        """A 0-d host tensor as an input of the graph."""
        return self._send([host], None)[0]

    def batch(self, tree: Any, *, is_short_allowed: bool = False, full_size: int | None = None) -> Any:
        """Host tensors of a batch on the devices; the transfer of all of them is started by one call.

        Tensors whose first dimension is that of the batch (the first tensor's) are cut over the data shards, the others repeated;
        what is no tensor stays. Raises PrepareError when the batch cannot be cut into equal parts; a short last batch on one
        host may be unequal (`is_short_allowed`), and the partitioner fills up its last shards with rows that do not count.
        """
        leaves, structure = trees.flatten(tree)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"]
        if not where:
            return tree
        rows = next((leaves[i].shape[0] for i in where if leaves[i].dim()), None)
        if rows is not None:
            self._check(rows, is_short_allowed, full_size)
        tensors = [leaves[i].detach() for i in where]
        shardings = [self._sharding(tensor) if tensor.dim() and tensor.shape[0] == rows else None for tensor in tensors]
        for i, placed in zip(where, self._send(tensors, shardings), strict=True):
            leaves[i] = placed
        return structure.unflatten(leaves)

    def module(self, module: torch.nn.Module) -> None:
        """Move parameters and buffers, in place: every Parameter stays the object that optimizers and tied layers hold."""
        device = torch_xla.device()
        tensors = _distinct((*module.parameters(), *module.buffers()))
        if all(tensor.device == device for tensor in tensors):  # prepared before, by another Accelerator
            return
        with _swapping_parameters():
            try:
                module.to(device)
            except RuntimeError as error:
                error.add_note(
                    f"polyaccel: {type(module).__name__} could not be moved to {device} in place; prepare it before a backward"
                    " pass whose graph is still alive, and without weak references to its parameters"
                )
                raise
        for tensor in _distinct((*module.parameters(), *module.buffers())):
            self.replicate(tensor)

    def _send(self, tensors: Sequence[torch.Tensor], shardings: Sequence[Any] | None) -> list[torch.Tensor]:
        # xm.send_cpu_data_to_device is this call behind a walk over containers that takes one spec for all tensors.
        placed: list[torch.Tensor] = torch_xla._XLAC._xla_tensors_from_aten(
            list(tensors), [self._device] * len(tensors), None if shardings is None else list(shardings)
        )
        return placed

    def _sharding(self, tensor: torch.Tensor) -> Any:
        if tensor.dim() not in self._specs:
            spec = (_BATCH_AXES, *([None] * (tensor.dim() - 1)))
            self._specs[tensor.dim()] = xs.ShardingSpec(self.mesh, spec, minibatch=self.num_hosts > 1)
        return self._specs[tensor.dim()].xla_spec(tensor)

    def _check(self, rows: int, is_short_allowed: bool, full_size: int | None) -> None:
        num_local_shards = self.num_data_shards // self.num_hosts
        if rows % num_local_shards == 0:
            return
        if is_short_allowed and self.num_hosts == 1 and (full_size is None or rows < full_size):
            return
        raise PrepareError(
            f"a batch of {rows} samples cannot be cut over {num_local_shards} data shards",
            f"use a global batch size that is a multiple of {num_local_shards}, and even_batches=True or drop_last=True",
        )


@contextmanager
def _swapping_parameters() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _distinct(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
