"""The setting `remat` for flax modules: while a loss function is traced, every block of its models runs under `jax.checkpoint`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

_log = logging.getLogger("polyaccel.jax")
Policy = Callable[..., Any] | None


def policy_of(remat: str) -> Policy:
    """What jax.checkpoint keeps: "full": nothing; "dots": products with weights."""
    return _keeps_products if remat == "dots" else None


def _keeps_products(primitive: Any, *args: Any, **params: Any) -> bool:
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable  # those of attention have batch dims
    return primitive.name == "conv_general_dilated" or bool(products(primitive, *args, **params))


@contextlib.contextmanager
def recomputed_nnx(module: nnx.Module, blocks: Collection[str], policy: Policy) -> Iterator[None]:
    """Inside, calls of the parts at these dotted paths keep what `policy` says; without paths, calls of the module itself.

    nnx has no hook around calls: the blocks' classes have another `__call__` meanwhile, which is their own for other instances.
    """
    found = [part for part in (_part(module, path) for path in blocks) if callable(part)]
    parts: Mapping[int, Any] = {id(part): part for part in found or [module]}
    running: set[int] = set()
    called: set[int] = set()
    classes = {type(part): "__call__" in vars(type(part)) for part in parts.values()}
    originals = {kind: kind.__call__ for kind in classes}

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in parts or id(self) in running:
                return original(self, *args, **kwargs)
            called.add(id(self))
            given, rebuilt = _taken_apart(args, kwargs)

            def body(block: Any, given: list[Any]) -> Any:
                args, kwargs = rebuilt(given)
                return original(block, *args, **kwargs)

            running.add(id(self))
            try:
                return nnx.remat(body, policy=policy)(self, given)
            finally:
                running.discard(id(self))

        return call

    try:
        for kind, original in originals.items():
            kind.__call__ = wrapped(original)
        yield
    finally:
        for kind, is_own in classes.items():
            if is_own:
                kind.__call__ = originals[kind]
            else:
                del kind.__call__
    if not called:
        warn_uncalled(module)


def warn_uncalled(module: Any) -> None:
    """Say that `remat` had nothing to do for a model."""
    _log.warning(
        "remat: the loss function calls neither %s nor any of its repeated parts as a whole: nothing is computed again",
        type(module).__name__,
    )


def _part(module: Any, path: str) -> Any:
    for key in path.split("."):
        module = module[int(key)] if key.isdigit() and not hasattr(module, key) else getattr(module, key)
    return module


class LinenBlocks:
    """An interceptor of linen's method calls, for `linen.intercept_methods`: calls of the modules at these dotted paths keep what
    `policy` says; without paths, calls of the outermost module."""

    def __init__(self, blocks: Collection[str], policy: Policy) -> None:
        self._paths = {tuple(block.split(".")) for block in blocks} or {()}
        self._policy = policy
        self._running: set[tuple[str, ...]] = set()
        self.is_called = False

    def __call__(
        self,
        following: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        """`following(*args, **kwargs)`, computed again in a backward pass where this is a block."""
        path = tuple(context.module.path)
        if context.method_name != "__call__" or path not in self._paths or path in self._running:
            return following(*args, **kwargs)
        self.is_called = True
        given, rebuilt = _taken_apart(args, kwargs)

        def body(block: Any, *given: Any) -> Any:
            args, kwargs = rebuilt(given)
            return block(*args, **kwargs)

        self._running.add(path)
        try:
            return linen.remat(body, policy=self._policy)(context.module, *given)
        finally:
            self._running.discard(path)


def _taken_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Callable[..., Any]]:
    """The arrays and modules among arguments, and what puts others in their places; flags and the like stay what they are."""
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=nnx.graph.is_graph_node)
    is_given = [isinstance(leaf, jax.Array | np.ndarray) or nnx.graph.is_graph_node(leaf) for leaf in leaves]

    def rebuilt(given: Collection[Any]) -> Any:
        following = iter(given)
        every = [next(following) if given else leaf for leaf, given in zip(leaves, is_given, strict=True)]
        return jax.tree.unflatten(treedef, every)

    return [leaf for leaf, given in zip(leaves, is_given, strict=True) if given], rebuilt
