"""The setting `remat` for torch modules: while PyTorch captures, every block runs under `torch.utils.checkpoint`.

A backward pass repeats the block from its inputs, with the random draws, buffers and attributes of the first time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from polyaccel.errors import UnsupportedError
from polyaccel.sharding.blocks import blocks_of_names

_log = logging.getLogger(__name__)
_aten = torch.ops.aten
_PRODUCTS = frozenset(
    {_aten.mm.default, _aten.addmm.default, _aten.convolution.default}
)  # with weights: not those of attention
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.Tensor, nn.Module, type)


@contextlib.contextmanager
def recomputed_blocks(module: nn.Module, remat: str) -> Iterator[None]:
    """Inside, calls of the module's blocks keep what `remat` says: "none": everything; "full": their inputs; "dots": products too.

    A module without repeated parts is one block.
    """
    if remat == "none" or not torch.is_grad_enabled():
        yield
        return
    blocks = _blocks(module)
    try:
        for block in blocks:
            block.__dict__["forward"] = _recomputed(block, block.forward, keeps_products=remat == "dots")
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _blocks(module: nn.Module) -> list[nn.Module]:
    names = blocks_of_names(name for name, _ in module.named_parameters(remove_duplicate=False))
    blocks = list({id(part): part for part in map(module.get_submodule, names)}.values())
    own = [type(part).__name__ for part in blocks if "forward" in part.__dict__]
    if own:
        raise UnsupportedError(
            f"remat would replace the forward that a {own[0]} has as an attribute of its own", "leave `remat` out"
        )
    if not blocks:
        _log.info("remat: %s has no parts that repeat: it is one block", type(module).__name__)
    return blocks or [module]


def _recomputed(block: nn.Module, forward: Callable[..., Any], *, keeps_products: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        state = _State(block, (args, kwargs))
        kept: list[torch.Tensor] = []

        def contexts() -> tuple[Any, Any]:
            return _First(kept, keeps_products), _Again(state, kept, keeps_products)

        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


class _State:
    """What a block can read and change beside its inputs, as it was before its forward: buffers, attributes, objects among the inputs."""

    def __init__(self, block: nn.Module, inputs: Any) -> None:
        self._block = block
        self._holders: list[Any] = [part.__dict__ for part in block.modules()]
        self._holders += _containers([*inputs[0], *inputs[1].values()])
        self._before = self._contents()
        self._buffers = [(part._buffers, dict(part._buffers)) for part in block.modules() if part._buffers]
        self._copies = [
            {name: None if value is None else value.detach().clone() for name, value in now.items()}
            for _, now in self._buffers
        ]
        self._versions = [parameter._version for parameter in block.parameters()]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside everything is as before the forward; afterwards as it is now, whatever was changed inside."""
        if [parameter._version for parameter in self._block.parameters()] != self._versions:
            raise UnsupportedError(
                f"{type(self._block).__name__} writes to its parameters in forward: to compute it again gives other numbers",
                "leave `remat` out",
            )
        now, buffers_now = self._contents(), [dict(held) for held, _ in self._buffers]
        self._put(self._before)
        for (held, _), copies in zip(self._buffers, self._copies, strict=True):
            held.update(copies)
        try:
            yield
        finally:
            self._put(now)
            for (held, _), values in zip(self._buffers, buffers_now, strict=True):
                held.clear()
                held.update(values)

    def _contents(self) -> list[Any]:
        return [holder.copy() for holder in self._holders]

    def _put(self, contents: Sequence[Any]) -> None:
        for holder, content in zip(self._holders, contents, strict=True):
            if isinstance(holder, list):
                holder[:] = content
            else:
                holder.clear()
                holder.update(content)


def _containers(values: Sequence[Any]) -> list[Any]:
    """Lists, dicts and the attributes of objects that can be reached from values: a cache of keys and values, say."""
    found: dict[int, Any] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, _SIMPLE) or id(value) in found:
            continue
        if isinstance(value, (tuple, frozenset, set)):
            waiting.extend(value)
            continue
        own = value if isinstance(value, (list, dict)) else getattr(value, "__dict__", None)
        if isinstance(own, (list, dict)) and id(own) not in found:
            found[id(own)] = own
            waiting.extend(own.values() if isinstance(own, dict) else own)
    return list(found.values())


class _First(TorchDispatchMode):
    """Around the first run: notes the products that the second will not compute. (Under a tracer, checkpoint takes modes alone.)"""

    def __init__(self, kept: list[torch.Tensor], keeps_products: bool) -> None:
        super().__init__()
        self._kept = kept
        self._keeps_products = keeps_products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._keeps_products and func in _PRODUCTS:
            self._kept.append(result.detach())
        return result


class _Again(TorchDispatchMode):
    """Around the second run: the state of the first, and its products."""

    def __init__(self, state: _State, kept: Sequence[torch.Tensor], keeps_products: bool) -> None:
        super().__init__()
        self._state = contextlib.ExitStack()
        self._restored = state.restored
        self._kept = kept
        self._keeps_products = keeps_products
        self._num_given = 0

    def __enter__(self) -> Any:
        self._num_given = 0
        self._state.enter_context(self._restored())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._state.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._keeps_products or func not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        self._num_given += 1
        return self._kept[self._num_given - 1].detach()
