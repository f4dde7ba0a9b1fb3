"""Loops over stacked layers: what a turn gathers of their parameters, and gradients that it scatters instead of stacking whole ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import layout as memory
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from polyaccel_jax.jaxprs import bind

# Of a whole array: up to this it is exchanged once, since it takes next to nothing and each exchange has its latency.
_SMALL_BYTES = 2**15
Uses = Mapping[Any, Sequence[int]]  # of a variable: the equations that have it as an operand; -1: the results


@dataclass(frozen=True, slots=True)
class Loop:
    """A scan whose turns gather."""

    turn: Callable[[Sequence[Any]], list[Any]]  # its body, of parts of parameters
    operands: Mapping[int, str]  # that are stacked parts: the names of their parameters
    passed: Mapping[int, Any]  # results that are such operands again: nobody stacks them
    scattered: Mapping[int, tuple[int, ...]]  # results, and the equations behind the loop that happen in its turns


def is_large(shape: Sequence[int], dtype: Any) -> bool:
    """Whether a whole array of this shape is worth an exchange of its own, and a second one instead of being kept."""
    return math.prod(shape) * np.dtype(dtype).itemsize > _SMALL_BYTES


def uses_of(jaxpr: Any) -> Uses:
    """Where the variables of a jaxpr are used."""
    uses: dict[Any, list[int]] = {}
    for number, atoms in [*((n, eqn.invars) for n, eqn in enumerate(jaxpr.eqns)), (-1, jaxpr.outvars)]:
        for atom in atoms:
            if not isinstance(atom, Literal):
                uses.setdefault(atom, []).append(number)
    return uses


def scattered_by(eqn: Any, jaxpr: Any, uses: Uses) -> dict[int, tuple[int, ...]]:
    """Of the results that a scan stacks, those that are gradients to be scattered: the casts and the scattering behind the loop."""
    found: dict[int, tuple[int, ...]] = {}
    for index, var in list(enumerate(eqn.outvars))[eqn.params["num_carry"] :]:
        if not is_large(var.aval.shape[1:], var.aval.dtype):
            continue
        chain: list[int] = []
        while len(uses.get(var, ())) == 1 and uses[var][0] >= 0:
            chain.append(uses[var][0])
            following = jaxpr.eqns[chain[-1]]
            name = following.primitive.name
            if _scatters_slices(following):
                found[index] = tuple(chain)
            elif name not in ("convert_element_type", "layout_constraint"):
                break
            if index in found:
                break
            var = following.outvars[0]
    return found


def _scatters_slices(eqn: Any) -> bool:
    """Whether an equation leaves a part of an array, and the same of a slice along dim 0 leaves the slice of that part."""
    params = eqn.params
    if eqn.primitive.name == "reduce_scatter":
        return params["scatter_dimension"] > 0 and params["tiled"] and params["axis_index_groups"] is None
    if eqn.primitive.name == "sharding_constraint":
        sharding = params["sharding"]
        return isinstance(sharding, NamedSharding) and len(sharding.spec) > 1 and sharding.spec[0] is None
    return False


def _of_slice(eqn: Any, value: jax.Array) -> jax.Array:
    """What an equation of a chain does to a stack, done to one of its slices."""
    name, params = eqn.primitive.name, eqn.params
    if name == "reduce_scatter":
        axis = params["scatter_dimension"] - 1
        part: jax.Array = lax.psum_scatter(value, params["axis_name"], scatter_dimension=axis, tiled=True)
        return part
    if name == "sharding_constraint":
        sharding = params["sharding"]
        return lax.with_sharding_constraint(value, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])))
    if name == "layout_constraint":
        order = tuple(dim - 1 for dim in params["layout"].major_to_minor if dim)
        return memory.with_layout_constraint(value, memory.Layout(major_to_minor=order))
    (result,) = bind(eqn, [value])
    return result


def run_loop(eqn: Any, loop: Loop, jaxpr: Any, inputs: Sequence[Any]) -> dict[Any, Any]:
    """The scan with these operands: the variables of the jaxpr that it gives values to."""
    params = eqn.params
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, xs = inputs[:num_consts], inputs[num_consts + num_carry :]
    stop, avals = num_consts + num_carry, params["jaxpr"].in_avals
    init = [  # a literal has the dtype that the jaxpr says
        jnp.asarray(inputs[index], avals[index].dtype) if isinstance(eqn.invars[index], Literal) else inputs[index]
        for index in range(num_consts, stop)
    ]

    def turn(carry: Sequence[Any], xs: Sequence[Any]) -> tuple[list[Any], dict[int, Any]]:
        outs = loop.turn([*consts, *carry, *xs])
        kept = {index: outs[index] for index in range(num_carry, len(outs)) if index not in loop.passed}
        for index, chain in loop.scattered.items():
            for number in chain:
                kept[index] = _of_slice(jaxpr.eqns[number], kept[index])
        return outs[:num_carry], kept

    carry, stacked = lax.scan(
        turn, init, list(xs), length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    given = dict(zip(eqn.outvars[:num_carry], carry, strict=True))
    for index, value in stacked.items():
        chain = loop.scattered.get(index)
        given[eqn.outvars[index] if chain is None else jaxpr.eqns[chain[-1]].outvars[0]] = value
    return given
