"""Regional compilation: the blocks that a model repeats are compiled one by one, so that all but the first find their program made.

https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def compile_regions(module: nn.Module, **options: Any) -> None:
    """Compile, in place, every block of a ModuleList or Sequential whose blocks are of one class, and each part beside them.

    `options` are those of torch.compile. Calls of the blocks are compiled, and nothing else of the module changes: its names, its
    parameters and its hooks are as they were. A module that repeats nothing is compiled as a whole.
    """
    for region in regions(module):
        # As region.compile() does, around a function of ours: the code of torch's own layers is compiled only below other code.
        region._compiled_call_impl = torch.compile(_call_of(region), **options)


def _call_of(module: nn.Module) -> Callable[..., Any]:
    call = module._call_impl
    return lambda *args, **kwargs: call(*args, **kwargs)


def regions(module: nn.Module, *, is_block: bool = False) -> Iterator[nn.Module]:
    """The parts of a module that are compiled on their own; `is_block`: it is one of several that are alike."""
    is_called = not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    if is_called and (is_block or not any(_repeats(part) for part in module.modules())):
        yield module
        return
    for child in module.children():
        yield from regions(child, is_block=_repeats(module))


def has_compiled_regions(module: nn.Module) -> bool:
    """Whether `compile_regions` has compiled parts of this module."""
    return any(part._compiled_call_impl is not None for part in module.modules() if part is not module)


def _repeats(module: nn.Module) -> bool:
    """Whether a module is a list of blocks of one class."""
    blocks = list(module.children())
    return (
        isinstance(module, (nn.ModuleList, nn.Sequential)) and len(blocks) > 1 and len({type(b) for b in blocks}) == 1
    )
