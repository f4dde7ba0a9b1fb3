"""Where values live: parameters in the pieces that the rules say or repeated on every device, batches cut along their first dimension.

Under SPMD a tensor is a global value, whatever the number of devices: the partitioner cuts the program, not the script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_xla

from polyaccel import trees
from polyaccel.errors import PrepareError
from polyaccel.mesh import MeshSpec
from polyaccel.sharding.rules import ShardingRule, Spec
from polyaccel_torch.dialect.late_values import LateValues
from polyaccel_xla.constraints import constrain
from polyaccel_xla.mesh import DeviceMesh, Layouts, sharding_of


class Placement:
    """Puts values on the mesh of all devices. Uploads give device data, never constants of a graph.

    `num_hosts`: with several, a batch is this host's part of the global one.
    """

    def __init__(self, mesh: MeshSpec, num_hosts: int, rules: Sequence[ShardingRule] = ()) -> None:
        self.num_data_shards = mesh.num_data_shards
        self.num_hosts = num_hosts
        self.mesh = DeviceMesh(mesh)
        self.mesh.use()
        self.layouts = Layouts(self.mesh, rules)
        self._device = str(torch_xla.device())

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mark a device tensor as repeated on every device, in place.

        Results of a step come back with this mark. Values that start without it would make the first step another graph.
        """
        self.mesh.mark(tensor, (None,) * tensor.dim())
        return tensor

    def upload(self, host: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
        """A host tensor on the devices, where its parameter `like` is if it has that one's shape; else repeated on every device."""
        host = host.detach()
        spec = None if like is None else self.layouts.like(like, host.shape)
        if spec is None or not any(spec):
            return self.replicate(self._send([host], None)[0])
        return self._send([host], [self.mesh.for_upload(host, spec)])[0]

    def upload_scalar(self, host: torch.Tensor) -> torch.Tensor:
        """A 0-d host tensor as an input of the graph."""
        return self._send([host], None)[0]

    def lay(self, tensor: torch.Tensor, like: torch.Tensor) -> None:
        """Let a device tensor lie as its parameter does, in place. Of a traced value, nothing is computed for it."""
        self._lay(tensor, self.layouts.like(like, tensor.shape))

    def lay_gradients(self) -> None:
        """Traced gradients of parameters in pieces come in the same pieces: summed up and cut in one exchange."""
        if not self.mesh.cuts_parameters:
            return
        for parameter, spec in self.layouts.cut_parameters():
            if parameter.grad is not None and not sharding_of(parameter.grad):
                self.mesh.mark(parameter.grad, spec)

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
            self.mesh.num_rows = rows * self.num_hosts
        tensors = [leaves[i].detach() for i in where]
        shardings = [self._rows_cut(tensor) if tensor.dim() and tensor.shape[0] == rows else None for tensor in tensors]
        for i, placed in zip(where, self._send(tensors, shardings), strict=True):
            leaves[i] = placed
        return structure.unflatten(leaves)

    def module(self, module: torch.nn.Module) -> None:
        """Move parameters and buffers, in place: every Parameter stays the object that optimizers and tied layers hold.

        Values of a module that was made on the meta device are computed layer by layer, and kept in pieces only. Raises PlanError or
        PrepareError, before anything is changed, for rules that do not fit and values that cannot be computed.
        """
        device = torch_xla.device()
        specs = self.layouts.decide(module)
        late = LateValues(module, _tensors_by_layer(module))
        was_there = all(tensor.device == device for tensor in _distinct((*module.parameters(), *module.buffers())))
        if not was_there:  # else prepared before, by another Accelerator
            with _swapping_parameters():
                self._fill(module, late, specs)
                try:
                    module.to(device)
                except RuntimeError as error:
                    error.add_note(
                        f"polyaccel: {type(module).__name__} could not be moved to {device} in place; prepare it before a backward"
                        " pass whose graph is still alive, and without weak references to its parameters"
                    )
                    raise
        if not was_there or self.mesh.cuts_parameters:
            for name, parameter in module.named_parameters():
                self._lay(parameter, specs[name])
        if not was_there:
            for buffer in _distinct(tuple(module.buffers())):
                self.replicate(buffer)
        self.layouts.keep(module, specs)
        constrain(module, self.mesh, specs)

    def _fill(self, module: torch.nn.Module, late: Mapping[str, torch.Tensor], specs: Mapping[str, Spec]) -> None:
        for name, tensor in _tensors_by_layer(module).items():
            if tensor.is_meta:
                host = late[name]
                spec = specs.get(name, ())
                cut = self.mesh.for_upload(host, spec) if any(spec) else None
                placed = self._send([host], [cut])[0]
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                value = torch.nn.Parameter(placed, requires_grad=tensor.requires_grad) if is_parameter else placed
                torch.utils.swap_tensors(tensor, value)

    def _lay(self, tensor: torch.Tensor, spec: Spec) -> None:
        said = sharding_of(tensor)
        if not said:
            self.mesh.mark(tensor, spec)
        elif not self.mesh.lies_as(tensor, spec):  # torch_xla changes no mark
            host = tensor.detach().cpu()
            tensor.data = self._send([host], [self.mesh.for_upload(host, spec)])[0]

    def _send(self, tensors: Sequence[torch.Tensor], shardings: Sequence[Any] | None) -> list[torch.Tensor]:
        # xm.send_cpu_data_to_device is this call behind a walk over containers that takes one spec for all tensors.
        placed: list[torch.Tensor] = torch_xla._XLAC._xla_tensors_from_aten(
            list(tensors), [self._device] * len(tensors), None if shardings is None else list(shardings)
        )
        return placed

    def _rows_cut(self, tensor: torch.Tensor) -> Any:
        spec = (self.mesh.rows, *([None] * (tensor.dim() - 1)))
        return self.mesh.for_upload(tensor, spec, is_part=self.num_hosts > 1)

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


def _tensors_by_layer(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each once, by the first of its names; those of one layer follow one another."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for path, layer in module.named_modules():
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            found.setdefault(id(tensor), (f"{path}.{name}" if path else name, tensor))
    return dict(found.values())
