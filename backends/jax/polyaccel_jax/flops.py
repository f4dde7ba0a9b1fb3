"""Counts the floating point operations of programs: two per product in matrix products, convolutions and attention, nothing else.

That is the convention of MFU (Chowdhery et al. 2022, appendix B) and of torch.utils.flop_counter. It is counted from the jaxpr, which
says how often a scan runs and over how many shards a program is mapped; XLA's own cost analysis counts the body of a loop once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jax.extend import core

_ATTENTION = {  # cudnn's kernels, by the number of matrix products that they make: scores and values, and with their gradients
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_fwd": 2,
    "dot_product_attention_bwd_wrapper": 5,
    "dot_product_attention_bwd": 5,
}
# Code of somebody's own: what it multiplies is not to be seen.
_OPAQUE = frozenset({"pallas_call", "ffi_call", "pure_callback", "io_callback", "xla_call_module", "call_tf"})


class UncountableError(Exception):
    """A program does something whose operations are not known."""


def flops_of(jaxpr: Any) -> float:
    """Floating point operations of a jaxpr, over all shards. Raises UncountableError."""
    return float(sum(_of_equation(equation) for equation in _open(jaxpr).eqns))


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _of_equation(equation: Any) -> float:
    name, parameters = equation.primitive.name, equation.params
    count = _COUNTED.get(name)
    if count is not None:
        return count(equation)
    if name in _ATTENTION:
        return _attention(equation, _ATTENTION[name])
    if name in _OPAQUE:
        raise UncountableError(name)
    inside = list(_jaxprs(parameters))
    if not inside:
        return 0.0
    counts = [flops_of(jaxpr) for jaxpr in inside]
    if name == "scan":
        return counts[0] * parameters["length"]
    if name == "while":
        if any(counts):
            raise UncountableError("while")  # how often is known only when it has run
        return 0.0
    if name == "cond":
        if len(set(counts)) > 1:
            raise UncountableError("cond")
        return counts[0]
    if name == "shard_map":
        return sum(counts) * _num_shards(parameters)
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return counts[0]  # what is called; its derivative is a rule, not a call
    return sum(counts)


def _jaxprs(parameters: Mapping[str, Any]) -> Iterable[Any]:
    for value in parameters.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, (core.Jaxpr, core.ClosedJaxpr)):
                yield one


def _num_shards(parameters: Mapping[str, Any]) -> int:
    sizes = dict(parameters["mesh"].shape)
    manual = parameters.get("manual_axes") or sizes
    return math.prod(sizes[axis] for axis in manual)


def _dot(equation: Any) -> float:
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[dim] for dim in contracted)


def _ragged_dot(equation: Any) -> float:
    # Every row of the left side meets one of the groups: (rows, in) x (groups, in, out), however the rows are shared out.
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    if len(left) == 2 and len(right) in (2, 3):  # two for the gradient of the groups: (rows, in) x (rows, out)
        return 2.0 * math.prod(left) * right[-1]
    raise UncountableError(equation.primitive.name)


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    _, in_channels, *spatial = (kernel[dim] for dim in equation.params["dimension_numbers"].rhs_spec)
    per_element = in_channels * math.prod(spatial)
    # The gradient of a strided convolution is one over an input with zeros between its rows: products with them are none.
    holes = math.prod(equation.params["lhs_dilation"])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_element / holes


def _attention(equation: Any, num_products: int) -> float:
    query, key = (variable.aval.shape for variable in equation.invars[:2])  # (batch, length, heads, head)
    if len(query) != 4 or len(key) != 4:
        raise UncountableError(equation.primitive.name)
    return 2.0 * num_products * math.prod(query) * key[1]


_COUNTED: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}


class FlopMeter:
    """Adds up the operations of the programs that an engine starts. One trace of each program is read, when it first runs."""

    def __init__(self) -> None:
        self.total: float | None = 0.0  # None for ever after a program that cannot be counted
        self._known: dict[Any, float | None] = {}

    def ran(self, function: Any, args: tuple[Any, ...]) -> None:
        """Note one call of a jitted function. What changes its program from call to call are the arrays in lists, its inputs."""
        shapes = [(array.shape, array.dtype) for argument in args if type(argument) is list for array in argument]
        key = (function, *shapes)
        if key in self._known:
            flops = self._known[key]
        else:
            flops = self._known[key] = _counted(function, args)
        self.total = None if flops is None or self.total is None else self.total + flops


def _counted(function: Any, args: tuple[Any, ...]) -> float | None:
    try:
        return flops_of(function.trace(*args).jaxpr)
    except UncountableError:
        return None
