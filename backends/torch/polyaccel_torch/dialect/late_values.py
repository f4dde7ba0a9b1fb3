"""Values of a module that was made on the meta device: computed part by part when an engine takes them, never all at once.

A part computes them as torch's own sharded training asks for it, by `reset_parameters()`; what a constructor did beyond that is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from polyaccel.errors import PrepareError


class LateValues(Mapping[str, torch.Tensor]):
    """Tensors by name; those without values are computed for the part of the module that holds them, and dropped after it was read.

    Read in the order of the names: a part draws its random numbers once, when its first tensor is read.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self._module = module
        self._tensors = dict(tensors)
        self._owners: dict[int, tuple[str, nn.Module]] = {}
        for path, part in module.named_modules():
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None and tensor.is_meta:
                    self._owners.setdefault(id(tensor), (path, part))
        for name, tensor in self._tensors.items():
            if tensor.is_meta:
                self._check(name, tensor)
        self._made: dict[
            int, torch.Tensor
        ] = {}  # of the part that was made last, by the id of the tensor that it is for
        self._made_for: nn.Module | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if not tensor.is_meta:
            return tensor
        _, part = self._owners[id(tensor)]
        if part is not self._made_for:
            self._made, self._made_for = self._make(part), part
        return self._made.pop(id(tensor))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        path, part = self._owners.get(id(tensor), ("", self._module))
        has_own_way = any(hasattr(type(module), "_init_weights") for module in self._module.modules())
        if id(tensor) in self._owners and hasattr(part, "reset_parameters") and not has_own_way:
            return
        raise self._refused(
            name,
            "the model initialises its parts by _init_weights, which needs them together"
            if has_own_way
            else f"{path or 'the model'} ({type(part).__name__}) has no reset_parameters()",
        )

    def _refused(self, name: str, why: str) -> PrepareError:
        return PrepareError(
            f"{name} of {type(self._module).__name__} is on the meta device and cannot be computed: {why}",
            "initialise the model before prepare (model.to_empty(device='cpu') and load_state_dict or its init functions), or give the"
            " module a reset_parameters() that does all of it",
        )

    def _make(self, part: nn.Module) -> dict[int, torch.Tensor]:
        # A shallow copy with its own slots: the user's tensors keep their identity, by which optimizers know them.
        twin = copy.copy(part)
        own: Any = twin.__dict__
        own["_parameters"], own["_buffers"] = dict(part._parameters), dict(part._buffers)
        made: dict[int, torch.Tensor] = {}
        written: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        for slots in (own["_parameters"], own["_buffers"]):
            for key, tensor in slots.items():
                if tensor is not None and tensor.is_meta:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    slots[key] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
                    made[id(tensor)] = slots[key]
                    written.append((key, tensor, slots[key]))
        initialise: Any = twin
        with torch.no_grad():
            initialise.reset_parameters()
        # torch counts writes, also to tensors without memory.
        for key, tensor, value in written:
            if value._version == 0:
                raise self._refused(key, f"{type(part).__name__}.reset_parameters() does not write it")
            if tensor._version > value._version:
                raise self._refused(key, f"more than {type(part).__name__}.reset_parameters() has initialised it")
        return {key: tensor.detach() for key, tensor in made.items()}
