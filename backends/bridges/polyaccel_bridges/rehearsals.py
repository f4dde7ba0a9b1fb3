"""What a forward did when it ran on fake tensors, in a form in which two such runs can be compared."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

from polyaccel import trees

_BY_VALUE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type(...), slice)


@final
class Trace:
    """Every operation of a run with its operands, in order: two runs with equal `steps` computed the same.

    A tensor is named by where it comes from: parameters and buffers by their names, tensors from outside by themselves, everything
    else by the step that gave it.
    """

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self._names: dict[int, Any] = {}
        self._kept: list[Any] = []  # an id is a name as long as nobody else can have it

    def name_state(self, module: nn.Module) -> None:
        """Name what fills the slots of a module now."""
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self._names.setdefault(id(tensor), name)
            self._kept.append(tensor)

    def note(self, func: Any, values: Any) -> None:
        """An operation and its operands, or (`func` None) what the last one gave."""
        leaves, structure = pytree.tree_flatten(values)
        self.steps.append((func, structure, [self._described(leaf) for leaf in leaves]))

    def note_outputs(self, value: Any) -> None:
        """What a model gave; objects that cannot leave a program are told apart by their class alone."""
        for leaf in trees.flatten(value)[0]:
            is_known = isinstance(leaf, (torch.Tensor, *_BY_VALUE))
            self.steps.append(self._described(leaf) if is_known else type(leaf))

    def _described(self, leaf: Any) -> Any:
        kind = type(leaf)
        if isinstance(leaf, torch.Tensor):
            name = self._names.get(id(leaf))
            if name is None:
                is_inside = isinstance(leaf, FakeTensor | FunctionalTensor)
                name = self._names[id(leaf)] = len(self._kept) if is_inside else ("outside", id(leaf))
                self._kept.append(leaf)
            return name, leaf.shape, leaf.dtype
        if kind in _BY_VALUE:
            return kind, repr(leaf)
        self._kept.append(leaf)
        return kind, id(leaf)
