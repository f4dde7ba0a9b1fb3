"""The table from ATen operations to jnp functions. A lowering has the operation's own argument names and torch's exact result dtype.

Arguments arrive as ATen gives them, with two changes made once by the replay: tensors are jax arrays, and torch dtypes are
numpy dtypes. Arguments that only say where or how to store (`device`, `layout`, `pin_memory`, `memory_format`, `non_blocking`)
never arrive. Programs are traced with 64-bit types on, so every created array names its dtype. A random operation takes its
`key` first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch._ops import OpOverload


@dataclass(frozen=True, slots=True)
class Lowering:
    """How one ATen overload is computed in jnp; `is_random` ones are called with a PRNG key before their arguments.

    `refuses`, called while a graph is compiled with the call's arguments (PyTorch's fake tensors, which know their strides), says
    why this call has no meaning for arrays, or None: arrays have shapes but no storage.
    """

    function: Callable[..., Any]
    is_random: bool = False
    refuses: Callable[..., str | None] | None = None


LOWERINGS: dict[OpOverload, Lowering] = {}

F = TypeVar("F", bound=Callable[..., Any])


def lowers(
    *overloads: OpOverload, is_random: bool = False, refuses: Callable[..., str | None] | None = None
) -> Callable[[F], F]:
    """Register the decorated function as the lowering of `overloads`; a second registration of one overload is an error."""

    def register(function: F) -> F:
        for overload in overloads:
            if overload in LOWERINGS:
                raise ValueError(f"{overload} already has a lowering: {LOWERINGS[overload].function.__qualname__}")
            LOWERINGS[overload] = Lowering(function, is_random, refuses)
        return function

    return register


LOWERINGS_BY_NAME: dict[str, Lowering] = {}


def lowers_named(*names: str) -> Callable[[F], F]:
    """`lowers` for operations that a library defines when it is imported, by the overload's full name (`library.operation.default`)."""

    def register(function: F) -> F:
        for name in names:
            if name in LOWERINGS_BY_NAME:
                raise ValueError(f"{name} already has a lowering: {LOWERINGS_BY_NAME[name].function.__qualname__}")
            LOWERINGS_BY_NAME[name] = Lowering(function)
        return function

    return register


def lowering_of(target: Any) -> Lowering | None:
    """The lowering of what an fx node calls, if there is one."""
    return LOWERINGS.get(target) or LOWERINGS_BY_NAME.get(str(target))
