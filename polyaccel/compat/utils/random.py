"""`accelerate.utils.random`: one seed for every generator, and generators that all processes continue alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from polyaccel import generators
from polyaccel.compat.enums import RNGType
from polyaccel.compat.state import PartialState
from polyaccel.compat.utils.operations import broadcast_object_list
from polyaccel.errors import ConfigError, nearest
from polyaccel.seeding import set_seed

__all__ = ["set_seed", "synchronize_rng_state", "synchronize_rng_states"]

_OF_THE_HOST = {RNGType.TORCH: "torch", RNGType.NUMPY: "numpy", RNGType.PYTHON: "python"}


def synchronize_rng_state(rng_type: RNGType | str | None = None, generator: Any = None) -> None:
    """Let a generator of every process continue from the state that it has on process 0. Every process must call it.

    Args:
        rng_type: "torch", "numpy", "python", "cuda", or "generator".
        generator: the torch.Generator of "generator".

    Raises ConfigError for another type, and where "generator" comes without one or "cuda" without a GPU.
    """
    known = [kind.value for kind in RNGType]
    if rng_type is None or rng_type not in known:
        raise ConfigError(f"rng_type={rng_type!r} cannot be synchronized", nearest(str(rng_type), known))
    kind = RNGType(rng_type)
    PartialState()
    if kind in _OF_THE_HOST:
        name = _OF_THE_HOST[kind]
        state = _of_process_0(generators.read().get(name))
        if state is not None:
            generators.write({name: state})
        return
    if kind == RNGType.GENERATOR:
        if generator is None:
            raise ConfigError(
                "rng_type='generator' needs a generator", "pass generator=..., such as the sampler's torch.Generator"
            )
        _share(generator.get_state, generator.set_state)
        return
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_available():
        raise ConfigError("rng_type='cuda' needs a GPU that torch can use", "leave 'cuda' out of rng_types")
    _share(cuda.get_rng_state, cuda.set_rng_state)


def synchronize_rng_states(rng_types: Iterable[RNGType | str], generator: Any = None) -> None:
    """`synchronize_rng_state` for each of the types."""
    for rng_type in rng_types:
        synchronize_rng_state(rng_type, generator=generator)


def _share(read: Any, write: Any) -> None:
    torch = sys.modules["torch"]
    state = _of_process_0(read().numpy().tobytes())
    write(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _of_process_0(state: Any) -> Any:
    return broadcast_object_list([state])[0]
