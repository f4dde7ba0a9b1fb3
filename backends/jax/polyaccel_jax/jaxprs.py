"""What every pass over a jaxpr needs: which operations have programs inside, and how an equation is run again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
RECOMPUTED = ("remat2", "checkpoint", "remat")


def bind(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """The results of an equation for these values."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # some releases of jax give a pair
    outs = eqn.primitive.bind(*functions, *inputs, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]
