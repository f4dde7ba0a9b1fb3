"""Parameters of which each device keeps a part, gathered where a program uses them, dropped, and gathered again in its backward pass.

A program is traced once with whole parameters, whichever dialect it came from, its backward pass included. Then it is run again
equation by equation: a parameter is gathered for the equation before the one that first needs it, in the dtype in which it is used, and
forgotten when others have taken its place; a loop over stacked layers gathers one layer in each turn. Without this, the compiler sees
one value that is used from the first layer's forward to its backward pass, and keeps all parameters whole for the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from polyaccel.sharding.blocks import blocks_of_names
from polyaccel_jax.jaxprs import CALLS, RECOMPUTED, bind
from polyaccel_jax.late_loops import Loop, is_large, run_loop, scattered_by, uses_of
from polyaccel_jax.round_trips import RoundTrips

_LAYOUTS = frozenset({"transpose", "reshape", "squeeze", "copy", "copy_p", "stop_gradient", "expand_dims"})
Gather = Callable[[str, jax.Array, int], jax.Array]
Key = tuple[str, Any]  # a parameter, and the dtype in which it is gathered


@dataclass(frozen=True, slots=True)
class Whole:
    """What a parameter is, of which each device has a part along the dim `axis`."""

    shape: tuple[int, ...]
    dtype: Any
    axis: int


@dataclass(frozen=True, slots=True)
class _View:
    """A parameter as an equation sees it: gathered in a dtype, and what is then done to it."""

    key: Key
    steps: tuple[Any, ...] = ()  # equations of one input
    turn: tuple[Any, ...] = ()  # such equations that a loop did before, to each layer of a stack


@dataclass(slots=True)
class _Moment:
    """What happens at one equation: parameters that are gathered when it runs, and those that are forgotten after it."""

    gathers: list[tuple[Key, bool]] = field(default_factory=list)  # and whether it waits for an operand of the equation
    forgets: list[Key] = field(default_factory=list)


def run_with_late_gathers(
    function: Callable[..., Any],
    params: Mapping[str, jax.Array],
    whole: Mapping[str, Whole],
    gather: Gather,
    *args: Any,
) -> Any:
    """Traced: `function(params, *args)`, where `params` are parts and `function` takes whole ones.

    `whole`: the parameters of which there is a part. `gather(name, part, dropped)` gives the whole of a part, of any dtype, without
    the first `dropped` dims of the parameter, which loops have taken off. Small ones are gathered once.
    """
    late = {name: value for name, value in whole.items() if is_large(value.shape, value.dtype)}
    params = {
        name: gather(name, value, 0) if name in whole and name not in late else value for name, value in params.items()
    }
    if not late:
        return function(params, *args)
    names = list(params)
    given = [
        jax.ShapeDtypeStruct(late[name].shape, late[name].dtype) if name in late else value
        for name, value in params.items()
    ]
    leaves, structure = jax.tree.flatten(args)

    def flat(given: Sequence[Any], leaves: Sequence[Any]) -> Any:
        return function(dict(zip(names, given, strict=True)), *jax.tree.unflatten(structure, leaves))

    traced, result = jax.make_jaxpr(flat, return_shape=True)(given, leaves)
    program = _flattened(traced)
    views = {
        var: _View((name, var.aval.dtype))
        for name, var in zip(names, program.jaxpr.invars, strict=False)
        if name in late
    }
    schedule = _Schedule.of(program.jaxpr, views, late, gather)
    outs = schedule.run(program, [*params.values(), *leaves], dict(params))
    return jax.tree.unflatten(jax.tree.structure(result), outs)


def _window(sizes: Mapping[str, int]) -> int:
    """Elements of gathered parameters that stay: those of the largest block; without blocks, of the largest parameter."""
    totals = [
        sum(size for name, size in sizes.items() if name.startswith(f"{block}.")) for block in blocks_of_names(sizes)
    ]
    return max(totals or sizes.values(), default=0)


def _flattened(closed: Any) -> Any:
    """A closed jaxpr with its calls inside it."""
    return jax.make_jaxpr(lambda *values: _inlined(closed.jaxpr, closed.consts, values, RoundTrips()))(*closed.in_avals)


def _inlined(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], trips: RoundTrips) -> list[Any]:
    """Run a jaxpr with its calls inside it; what is to be computed again stands behind a barrier, as when jax compiles it."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
        with eqn.ctx.manager:
            if name in CALLS and CALLS[name] in eqn.params:
                inner = eqn.params[CALLS[name]]
                outs = _inlined(inner.jaxpr, inner.consts, inputs, trips)
            elif name in RECOMPUTED:
                if eqn.params["differentiated"]:
                    inputs = _behind_barrier(inputs, eqn.params["prevent_cse"])
                outs = _inlined(eqn.params["jaxpr"], (), inputs, trips)
            else:
                outs = trips.bind(eqn, inputs)
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _behind_barrier(inputs: list[Any], chosen: bool | Sequence[bool]) -> list[Any]:
    are_chosen = [chosen] * len(inputs) if isinstance(chosen, bool) else chosen
    barred = iter(
        lax.optimization_barrier([value for value, is_chosen in zip(inputs, are_chosen, strict=True) if is_chosen])
    )
    return [next(barred) if is_chosen else value for value, is_chosen in zip(inputs, are_chosen, strict=True)]


@dataclass(slots=True)
class _Schedule:
    """When the parameters of one flat jaxpr are gathered and forgotten; loops around it have taken off `dropped` of their dims."""

    views: dict[Any, _View]
    moments: dict[int, _Moment]  # by the number of an equation
    loops: dict[int, Loop]
    gather: Gather
    dropped: int
    passed: dict[int, _View]  # results that nobody asks for: what turns of a loop would stack is in the parameter

    @staticmethod
    def of(
        jaxpr: Any,
        views: dict[Any, _View],
        whole: Mapping[str, Whole],
        gather: Gather,
        *,
        dropped: int = 0,
        num_read: int | None = None,
    ) -> _Schedule:
        """`views`: of the jaxpr's inputs. `num_read`: of the body of a loop, the results that are not stacked."""
        uses: list[tuple[int, Key]] = []
        loops: dict[int, Loop] = {}
        by_variable = uses_of(jaxpr)
        for number, eqn in enumerate(jaxpr.eqns):
            found = [None if isinstance(atom, Literal) else views.get(atom) for atom in eqn.invars]
            if not any(found):
                continue
            if eqn.primitive.name == "optimization_barrier":  # of what is to be computed again: it holds no parameter
                views.update((out, view) for out, view in zip(eqn.outvars, found, strict=True) if view is not None)
                continue
            stacked = _stacked(eqn, found, whole, dropped) if eqn.primitive.name == "scan" else {}
            if stacked:
                scattered = scattered_by(eqn, jaxpr, by_variable)
                loop = loops[number] = _loop(eqn, stacked, whole, gather, dropped + 1, scattered)
                views.update((eqn.outvars[index], seen) for index, seen in loop.passed.items())
                found = [None if index in stacked else view for index, view in enumerate(found)]
            view = _viewed(eqn, found[0]) if len(found) == 1 else None
            if view is not None:
                views[eqn.outvars[0]] = view
            else:
                uses += [(number, key) for key in dict.fromkeys(view.key for view in found if view is not None)]
        results = {
            n: views[atom] for n, atom in enumerate(jaxpr.outvars) if not isinstance(atom, Literal) and atom in views
        }
        passed = {
            n: _View(view.key, turn=view.steps)
            for n, view in results.items()
            if num_read is not None and n >= num_read and not view.turn
        }
        uses += [(len(jaxpr.eqns), key) for key in dict.fromkeys(v.key for n, v in results.items() if n not in passed)]
        used = {name for _, (name, _) in uses}
        sizes = {views[var].key[0]: math.prod(var.aval.shape) for var in jaxpr.invars if var in views}
        sizes = {name: size for name, size in sizes.items() if name in used}
        window = _window(sizes) if num_read is None else sum(sizes.values())  # a turn is a layer
        return _Schedule(views, _moments(uses, sizes, window), loops, gather, dropped, passed)

    def run(self, closed: Any, args: Sequence[Any], parts: Mapping[str, jax.Array]) -> list[Any]:
        """The results of the jaxpr for these arguments, of which those that have views are parts. None: a result not asked for."""
        jaxpr = closed.jaxpr
        values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
        born: dict[Any, int] = {}
        held: dict[Key, jax.Array] = {}
        done = {number for loop in self.loops.values() for chain in loop.scattered.values() for number in chain}

        def read(atom: Any) -> Any:
            if isinstance(atom, Literal):
                return atom.val
            view = self.views.get(atom)
            return values[atom] if view is None else _seen(held[view.key], view)

        def fetch(moment: _Moment, operands: Sequence[Any]) -> None:
            tie = _latest(operands, self.views, born)
            for (name, dtype), waits in moment.gathers:
                part = parts[name]
                part = part if part.dtype == dtype else lax.convert_element_type(part, dtype)
                if waits and tie is not None:
                    part, values[tie] = lax.optimization_barrier((part, values[tie]))
                held[name, dtype] = self.gather(name, part, self.dropped)

        for number, eqn in enumerate(jaxpr.eqns):
            loop = self.loops.get(number)
            if number in done or (loop is None and eqn.outvars and all(var in self.views for var in eqn.outvars)):
                continue
            moment = self.moments.get(number, _Moment())
            with eqn.ctx.manager:
                fetch(moment, eqn.invars)
                if loop is not None:
                    inputs = [
                        parts[loop.operands[index]] if index in loop.operands else read(atom)
                        for index, atom in enumerate(eqn.invars)
                    ]
                    values.update(run_loop(eqn, loop, jaxpr, inputs))
                elif eqn.primitive.name == "optimization_barrier":
                    kept = [(o, i) for o, i in zip(eqn.outvars, eqn.invars, strict=True) if o not in self.views]
                    values.update(
                        zip([o for o, _ in kept], lax.optimization_barrier([read(i) for _, i in kept]), strict=True)
                    )
                else:
                    values.update(zip(eqn.outvars, bind(eqn, [read(atom) for atom in eqn.invars]), strict=True))
            born.update((var, number) for var in eqn.outvars if var in values)
            for key in moment.forgets:
                del held[key]
        fetch(self.moments.get(len(jaxpr.eqns), _Moment()), ())
        return [None if index in self.passed else read(atom) for index, atom in enumerate(jaxpr.outvars)]


def _stacked(eqn: Any, found: Sequence[_View | None], whole: Mapping[str, Whole], dropped: int) -> dict[int, _View]:
    """The operands of a scan that are stacked parameters of which each turn can gather its own, and what a turn sees."""
    first = eqn.params["num_consts"] + eqn.params["num_carry"]
    return {
        index: _View(view.key, view.turn)
        for index, view in enumerate(found)
        if index >= first
        and view is not None
        and not view.steps
        and (param := whole[view.key[0]]).axis > dropped
        and is_large(param.shape[dropped + 1 :], param.dtype)
    }


def _loop(
    eqn: Any,
    stacked: Mapping[int, _View],
    whole: Mapping[str, Whole],
    gather: Gather,
    dropped: int,
    scattered: Mapping[int, tuple[int, ...]],
) -> Loop:
    """A scan whose turns gather these operands."""
    body = _flattened(eqn.params["jaxpr"])
    views = {body.jaxpr.invars[index]: view for index, view in stacked.items()}
    num_carry = eqn.params["num_carry"]
    schedule = _Schedule.of(body.jaxpr, views, whole, gather, dropped=dropped, num_read=num_carry)
    names = {index: view.key[0] for index, view in stacked.items()}
    scattered = {index: chain for index, chain in scattered.items() if index not in schedule.passed}

    def turn(values: Sequence[Any]) -> list[Any]:
        return schedule.run(body, values, {name: values[index] for index, name in names.items()})

    return Loop(turn, names, schedule.passed, scattered)


def _moments(uses: Sequence[tuple[int, Key]], sizes: Mapping[str, int], window: int) -> dict[int, _Moment]:
    """Gathers and what is forgotten, for uses in their order: those used last stay, `window` elements of them."""
    moments: dict[int, _Moment] = {}
    held: dict[Key, None] = {}
    known: set[Key] = set()
    before = None  # the equation that used parameters before this one
    for position, (number, key) in enumerate(uses):
        if key not in held:
            moment = moments.setdefault(number if before is None else before, _Moment())
            if key in moment.forgets:  # it is still there
                moment.forgets.remove(key)
            else:
                moment.gathers.append((key, key in known))
            known.add(key)
        held.pop(key, None)
        held[key] = None
        if position + 1 < len(uses) and uses[position + 1][0] == number:
            continue
        while len(held) > 1 and sum(sizes[name] for name, _ in held) > window:
            oldest = next(iter(held))
            if any(used == (number, oldest) for used in uses[max(0, position - len(held)) : position + 1]):
                break
            del held[oldest]
            moments.setdefault(number, _Moment()).forgets.append(oldest)
        before = number
    return moments


def _viewed(eqn: Any, view: _View | None) -> _View | None:
    """What an equation makes of a view, if that is one again."""
    if view is None:
        return None
    name = eqn.primitive.name
    if name in _LAYOUTS and not (name == "reshape" and eqn.params.get("dimensions") is not None):
        return replace(view, steps=(*view.steps, eqn))
    if name != "convert_element_type":
        return None
    new = eqn.outvars[0].aval.dtype
    is_plain = all(step.primitive.name in _LAYOUTS for step in (*view.turn, *view.steps))
    if is_plain and jnp.issubdtype(new, jnp.floating) and new.itemsize < np.dtype(view.key[1]).itemsize:
        return replace(view, key=(view.key[0], new))  # cast in parts: half the bytes are sent
    return replace(view, steps=(*view.steps, eqn))


def _seen(value: jax.Array, view: _View) -> jax.Array:
    for eqn in view.turn:
        value = jax.vmap(lambda layer, eqn=eqn: bind(eqn, [layer])[0])(value)
    for eqn in view.steps:
        (value,) = bind(eqn, [value])
    return value


def _latest(operands: Sequence[Any], views: Mapping[Any, _View], born: Mapping[Any, int]) -> Any:
    """The operand that was computed last, of those that are no parameters; None where there is none."""
    found = [atom for atom in operands if not isinstance(atom, Literal) and atom in born and atom not in views]
    return max(found, key=born.__getitem__, default=None)
