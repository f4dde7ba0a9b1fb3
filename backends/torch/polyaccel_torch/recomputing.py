"""The setting `remat`: a backward pass computes the inside of every block again instead of keeping it, by torch.utils.checkpoint."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from polyaccel.errors import PrepareError
from polyaccel.sharding.blocks import blocks_of_names

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default)


def recompute_blocks(module: nn.Module, remat: str) -> Callable[[], None]:
    """A function, after which a forward of the module keeps what `remat` says of its blocks: "full": inputs; "dots": products too.

    A model of transformers does it itself, which lets go of its cache of keys and values meanwhile; a module without repeated parts is
    one block. Names, classes and states stay. Raises PrepareError for a block whose forward is not its class's.
    """
    if remat == "none":
        return lambda: None
    for of_transformers in ("activation_checkpointing", "gradient_checkpointing"):  # the second is its older name
        enable = getattr(module, f"{of_transformers}_enable", None)
        if callable(enable) and getattr(module, "supports_gradient_checkpointing", False):
            options = {"use_reentrant": False, "context_fn": _contexts_of(remat)}
            return functools.partial(enable, **{f"{of_transformers}_kwargs": options})
    names = blocks_of_names(name for name, _ in module.named_parameters(remove_duplicate=False))
    blocks = list({id(part): part for part in map(module.get_submodule, names)}.values()) or [module]
    own = [block.__dict__["forward"] for block in blocks if "forward" in block.__dict__]
    if not all(isinstance(forward, _Recomputed) for forward in own):
        raise PrepareError(
            f"remat={remat!r} would replace the forward that a block of {type(module).__name__} has as an attribute of its own",
            "leave remat out",
        )

    def replace() -> None:
        for block in blocks:
            if "forward" not in block.__dict__:  # else it was prepared before
                block.__dict__["forward"] = _Recomputed(block.forward, remat)

    return replace


class _Recomputed:
    """A block's forward. An attribute of the block, under its hooks: whoever gathers its parameters does so around both runs."""

    def __init__(self, forward: Any, remat: str) -> None:
        self._forward = forward
        self._remat = remat
        self.__signature__ = inspect.signature(forward)  # who asks which arguments a model takes finds them

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        contexts = _contexts_of(self._remat, self._forward.__self__)
        return checkpoint(self._forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    def __deepcopy__(self, memo: Any) -> _Recomputed:
        return _Recomputed(copy.deepcopy(self._forward, memo), self._remat)


def _contexts_of(remat: str, block: nn.Module | None = None) -> Callable[[], Contexts]:
    return functools.partial(_contexts, remat, block)


def _contexts(remat: str, block: nn.Module | None) -> Contexts:
    """Around the first run and around the second; products are kept between them with "dots"."""
    first: AbstractContextManager[Any] = nullcontext()
    second: AbstractContextManager[Any] = nullcontext()
    if remat == "dots":
        first, second = create_selective_checkpoint_contexts(list(_PRODUCTS))
    if block is not None and any(True for _ in block.buffers()):
        before = [(part, dict(part._buffers)) for part in block.modules() if part._buffers]
        copies = [{key: value if value is None else value.clone() for key, value in held.items()} for _, held in before]
        second = _as_before(second, [(part, copy) for (part, _), copy in zip(before, copies, strict=True)])
    return first, second


@contextmanager
def _as_before(inner: AbstractContextManager[Any], before: list[tuple[nn.Module, dict[str, Any]]]) -> Iterator[None]:
    """Inside, buffers are as the first run found them: running statistics move once."""
    now = [(part, dict(part._buffers)) for part, _ in before]
    for part, values in before:
        part._buffers.update(values)
    try:
        with inner:
            yield
    finally:
        for part, values in now:
            part._buffers.update(values)
