"""The mesh of a plan as torch_xla's, and how values lie on it: per parameter a spec that the rules of names decided, batches by rows."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch_xla import runtime as xr

from polyaccel.mesh import MeshSpec
from polyaccel.sharding.plan import plan_shardings
from polyaccel.sharding.rules import ShardingRule, Spec
from polyaccel_torch.dialect.sharding_hints import hints_of

_BATCH_AXES = ("replica", "data", "fsdp")
_AXES = (*_BATCH_AXES, "tensor")

Part = str | tuple[str, ...] | None  # of one dim: the axes that cut it


class DeviceMesh:
    """The axes that are longer than 1, outermost first, over all devices of the job."""

    def __init__(self, mesh: MeshSpec) -> None:
        self._spec = mesh
        self.sizes = mesh.sizes
        lengths = {axis: self.sizes[axis] for axis in _AXES if self.sizes[axis] > 1} or {"data": 1}
        self._mesh = xs.Mesh(np.arange(xr.global_runtime_device_count()), tuple(lengths.values()), tuple(lengths))
        batch = tuple(axis for axis in _BATCH_AXES if axis in lengths)
        self.rows: Part = batch if len(batch) > 1 else next(iter(batch), None)  # what cuts dim 0 of a batch
        self.cuts_parameters = any(self.sizes[axis] > 1 for axis in ("fsdp", "tensor"))
        self.num_rows: int | None = None  # of the batch that was placed last
        self._num_shards = mesh.num_data_shards
        self._names: dict[Sequence[Part], str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return DeviceMesh, (self._spec,)  # hooks of a module have it, and modules are copied and pickled

    def use(self) -> None:
        """Make it the mesh that torch_xla's own functions find."""
        xs.set_global_mesh(self._mesh)

    def is_of_batch(self, shape: Sequence[int]) -> bool:
        """Whether a value of this shape has the batch, or the batch and more, along its first dim, which can be cut equally."""
        return bool(shape and self.num_rows and shape[0] % self.num_rows == 0 and shape[0] % self._num_shards == 0)

    def constrain(self, copy: torch.Tensor, spec: Sequence[Part]) -> None:
        """Say how a copy has to lie where it is used; what it was copied from stays where it is."""
        torch_xla._XLAC._xla_annotate_custom_sharding(copy, self._mesh.get_op_sharding(tuple(spec)))

    def mark(self, tensor: torch.Tensor, spec: Sequence[Part]) -> None:
        """Lay a device tensor out by a spec, in place; of a traced value: say how it has to lie when it is computed.

        Raises RuntimeError where it lies cut in another way: see `lies_as`.
        """
        xs.mark_sharding(tensor, self._mesh, tuple(spec))

    def for_upload(self, host: torch.Tensor, spec: Sequence[Part], *, is_part: bool = False) -> Any:
        """What torch_xla's upload takes. `is_part`: `host` is this host's rows of the global tensor."""
        # Not spmd.ShardingSpec: that cuts a vector over all devices where the spec names only some of the axes.
        arguments = self._mesh._get_op_sharding_args(tuple(spec))
        return torch_xla._XLAC.XlaShardingSpec(host, *arguments, is_part)

    def lies_as(self, tensor: torch.Tensor, spec: Sequence[Part]) -> bool:
        """Whether a device tensor is marked with this very spec."""
        key = tuple(spec)
        if key not in self._names:
            probe = torch.zeros([1] * len(key)).to(torch_xla.device())
            self.mark(probe, key)
            self._names[key] = sharding_of(probe)
        return sharding_of(tensor) == self._names[key]


class Layouts:
    """The specs of the parameters of every model that was prepared on a mesh. What it forgets lies as the partitioner likes."""

    def __init__(self, mesh: DeviceMesh, rules: Sequence[ShardingRule]) -> None:
        self._mesh = mesh
        self._rules = rules
        # By the identity of parameters, and without weak references to them: torch swaps no tensor that has one.
        self._models: weakref.WeakKeyDictionary[torch.nn.Module, Mapping[int, tuple[torch.Size, Spec]]] = (
            weakref.WeakKeyDictionary()
        )

    def decide(self, module: torch.nn.Module) -> Mapping[str, Spec]:
        """The spec of every parameter of a module, by name; what no rule cuts is said in the log.

        Raises PlanError for a rule that does not fit a parameter.
        """
        parameters = dict(module.named_parameters())
        if not self._mesh.cuts_parameters:
            return {name: (None,) * parameter.dim() for name, parameter in parameters.items()}
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        plan = plan_shardings(shapes, self._mesh.sizes, self._rules, hints_of(module))
        plan.say(type(module).__name__, self._mesh.sizes)
        return plan.specs

    def keep(self, module: torch.nn.Module, specs: Mapping[str, Spec]) -> None:
        """Remember how a module's parameters lie."""
        named = module.named_parameters()
        self._models[module] = {id(p): (p.shape, specs[name]) for name, p in named if any(specs[name])}

    def like(self, parameter: torch.Tensor, shape: Sequence[int]) -> Spec:
        """How a value of this shape lies that belongs to a parameter: as the parameter, if it has its shape, else whole."""
        for known in self._models.values():
            found = known.get(id(parameter))
            if found is not None and tuple(found[0]) == tuple(shape):
                return found[1]
        return (None,) * len(shape)

    def cut_parameters(self) -> Iterator[tuple[torch.nn.Parameter, Spec]]:
        """The parameters that lie in pieces."""
        for module, known in list(self._models.items()):
            if known:
                for parameter in module.parameters():
                    if id(parameter) in known:
                        yield parameter, known[id(parameter)][1]


def sharding_of(tensor: torch.Tensor) -> str:
    """torch_xla's words for how a device tensor lies; empty where nothing has been said."""
    said: str = torch_xla._XLAC._get_xla_sharding_spec(tensor)
    return said
