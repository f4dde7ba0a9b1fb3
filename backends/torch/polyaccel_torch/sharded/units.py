"""Modules that FSDP2 has to gather by themselves: it averages gradients of one dtype at a time, and a block may train several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn

from polyaccel.errors import UnsupportedError

Trained = Callable[[nn.Parameter], bool]  # whether FSDP2 averages the gradient of a parameter


def units_of(model: nn.Module, blocks: dict[str, nn.Module], is_averaged: Trained) -> dict[str, list[nn.Module]]:
    """Per block, and for the model itself under "", the modules in it whose trained parameters have another dtype; inner ones first.

    Raises UnsupportedError for dtypes that no module keeps apart.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    users = Counter(id(p) for part in model.modules() for p in part._parameters.values() if p is not None)

    def direct(part: nn.Module) -> list[nn.Parameter]:
        return [p for p in part._parameters.values() if p is not None and p.requires_grad and is_averaged(p)]

    def dtype_of(part: nn.Module, among: list[nn.Parameter]) -> torch.dtype | None:
        """Of a module's own parameters, else of most of what is in it."""
        own = {parameter.dtype: parameter for parameter in direct(part)}
        if len(own) > 1:
            one, other, *_ = own.values()
            raise _apart(model, f"{_said(names, one)} and {_said(names, other)} belong to one {type(part).__name__}")
        sizes: Counter[torch.dtype] = Counter()
        for parameter in among:
            sizes[parameter.dtype] += parameter.numel()
        return next(iter(own), None) or (max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None)

    def within(part: nn.Module, elsewhere: set[nn.Module]) -> Iterator[nn.Module]:
        inside = list(_inside(part, elsewhere))
        dtype = dtype_of(part, [parameter for other in inside for parameter in direct(other)])
        taken: set[nn.Module] = set()
        for other in inside[1:]:
            if other in taken or all(parameter.dtype == dtype for parameter in direct(other)):
                continue
            for parameter in direct(other):
                if type(other).forward is nn.Module.forward:
                    raise _apart(
                        model, f"{_said(names, parameter)} belongs to a {type(other).__name__}, which is not called"
                    )
                if users[id(parameter)] > 1:
                    raise _apart(model, f"several modules share {_said(names, parameter)}")
            yield from within(other, elsewhere)
            yield other
            taken.update(other.modules())

    cut = set(blocks.values())
    found = {path: list(within(block, set())) for path, block in blocks.items()}
    return {**found, "": list(within(model, cut))}


def _inside(part: nn.Module, elsewhere: set[nn.Module]) -> Iterator[nn.Module]:
    """A module and what is in it, outermost first, but for what lies in other blocks."""
    yield part
    for child in part.children():
        if child not in elsewhere:
            yield from _inside(child, elsewhere)


def _said(names: dict[int, str], parameter: nn.Parameter) -> str:
    return f"{names[id(parameter)]} ({str(parameter.dtype).removeprefix('torch.')})"


def _apart(model: nn.Module, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(model).__name__} trains parameters of several dtypes, and FSDP2 averages those of one dtype at a time: {why}",
        "give all of them one dtype (model.float()), or those of another dtype a module of their own that is called",
    )
