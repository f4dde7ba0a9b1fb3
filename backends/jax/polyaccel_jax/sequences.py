"""The mesh axis `sequence`: a program of the whole batch, run equation by equation so that dims that follow the sequence stay cut over it.

Inputs (batch, length, ...) say where sequences are; labels of dims follow them through the program, its backward pass included. Products
and look-ups are constrained: rows of the sequence stay where they are, and attention gathers keys and values. A captured torch program
merges (batch, length) into one dim around its layers, which no contiguous cut of it can follow: here such a dim stays two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax import lax
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from polyaccel_jax.jaxprs import CALLS, RECOMPUTED, bind
from polyaccel_jax.mesh import DATA_AXES, DeviceMesh
from polyaccel_jax.sequence_rules import RULES
from polyaccel_jax.splits import BATCH, KEYS, LENGTH, Labels, Split

_UNSAID = PartitionSpec.UNCONSTRAINED


def labels_of_inputs(
    shapes: Sequence[tuple[int, ...]], axes: Sequence[int | None], is_integer: Sequence[bool]
) -> list[Labels]:
    """Where the inputs of a program have their batch and their sequences.

    The length is dim 1 of the first integer input (batch, length, ...), else of the first other one; every input with the batch first
    and that length second has sequences.
    """
    cut = [len(shape) > 1 and axis == 0 for shape, axis in zip(shapes, axes, strict=True)]
    lengths = [shape[1] for shape, is_cut, whole in zip(shapes, cut, is_integer, strict=True) if is_cut and whole]
    lengths += [shape[1] for shape, is_cut in zip(shapes, cut, strict=True) if is_cut]
    found: list[Labels] = []
    for shape, axis, is_cut in zip(shapes, axes, cut, strict=True):
        has_length = is_cut and shape[1] == lengths[0]
        labels = [BATCH if dim == axis else LENGTH if has_length and dim == 1 else None for dim in range(len(shape))]
        found.append(tuple(labels))
    return found


@dataclass(frozen=True, slots=True)
class Sequences:
    """Runs functions whose inputs are labelled. `merges` counts, by operation, merged dims that had to be made one after all."""

    mesh: DeviceMesh
    merges: dict[str, int] = field(default_factory=dict)

    def run(self, function: Callable[..., Any], labels: Sequence[Labels], *args: Any) -> Any:
        """Traced: `function(*args)`. `labels`: for each leaf of args, in the order of jax.tree.leaves; () where nothing is known."""
        traced, structure = jax.make_jaxpr(function, return_shape=True)(*args)
        given = [
            Split(value, found or (None,) * value.ndim)
            for value, found in zip(jax.tree.leaves(args), labels, strict=True)
        ]
        outs = self._evaluate(traced.jaxpr, traced.consts, given)
        return jax.tree.unflatten(jax.tree.structure(structure), [out.merged_value() for out in outs])

    def constrained(self, out: Split) -> Split:
        """The value, told to lie as its labels say: one dim over `sequence`, which is the first that follows it."""
        labels = list(out.labels)
        following = [dim for dim, label in enumerate(labels) if label == LENGTH]
        following = following or [dim for dim, label in enumerate(labels) if label == KEYS][:1]
        for dim in following:
            labels[dim] = LENGTH if dim == following[0] else KEYS
        batch = next((dim for dim, label in enumerate(labels) if label == BATCH), None)
        labels = [None if label == BATCH and dim != batch else label for dim, label in enumerate(labels)]
        if not any(labels):
            return out
        spec = [self._axes(label, size) for label, size in zip(labels, out.value.shape, strict=True)]
        value = lax.with_sharding_constraint(out.value, NamedSharding(self.mesh.mesh, PartitionSpec(*spec)))
        return Split(value, tuple(labels), out.at)

    def _axes(self, label: str | None, size: int) -> Any:
        if label == LENGTH:
            return "sequence" if size % self.mesh.sizes["sequence"] == 0 else _UNSAID
        if label == BATCH:
            return DATA_AXES if self.mesh.num_shards > 1 and size % self.mesh.num_shards == 0 else _UNSAID
        return None if label == KEYS else _UNSAID

    # -- equation by equation ----------------------------------------------------------------------------------------------

    def _evaluate(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Split]) -> list[Split]:
        values: dict[Any, Split] = dict(zip(jaxpr.constvars, map(Split.plain, consts), strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Split:
            return Split.plain(atom.val) if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            with eqn.ctx.manager:
                outs = self._apply(eqn, inputs) if any(one.is_labelled for one in inputs) else _plainly(eqn, inputs)
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, eqn: Any, inputs: list[Split]) -> list[Split]:
        name = eqn.primitive.name
        if name in CALLS and CALLS[name] in eqn.params:
            inner = eqn.params[CALLS[name]]
            return self._evaluate(inner.jaxpr, inner.consts, inputs)
        if name in RECOMPUTED:
            return self._recomputed(eqn, inputs)
        if name == "scan":
            return self._scan(eqn, inputs)
        if name == "while":
            return self._while(eqn, inputs)
        if name == "cond":
            return self._cond(eqn, inputs)
        rule = RULES.get(name)
        outs = None if rule is None else rule(eqn, inputs)
        if outs is None:
            return self._unknown(eqn, inputs)
        return (
            [self.constrained(out) for out in outs]
            if name in ("dot_general", "gather", "conv_general_dilated")
            else outs
        )

    def _unknown(self, eqn: Any, inputs: list[Split]) -> list[Split]:
        """An operation that says nothing about its dims: it gets whole dims, and nothing is known of what it gives."""
        name = eqn.primitive.name
        if any(one.at is not None for one in inputs):
            self.merges[name] = self.merges.get(name, 0) + 1
        values = [one.merged_value() for one in inputs]
        if name in (
            "custom_partitioning",
            "shard_map",
        ):  # kernels refuse sequences in parts, or would take them for whole ones
            values = [self._gathered(one, value) for one, value in zip(inputs, values, strict=True)]
        return [Split.plain(out) for out in bind(eqn, values)]

    def _gathered(self, one: Split, value: Any) -> Any:
        if not one.is_labelled or one.at is not None:
            return value
        spec = [
            None if label == LENGTH else self._axes(label, size)
            for label, size in zip(one.labels, value.shape, strict=True)
        ]
        return lax.with_sharding_constraint(value, NamedSharding(self.mesh.mesh, PartitionSpec(*spec)))

    # -- operations with programs inside -----------------------------------------------------------------------------------

    def _inside(
        self, jaxpr: Any, consts: Sequence[Any], known: Sequence[Split], avals: Sequence[Any], *, merges: bool
    ) -> tuple[Any, list[Split]]:
        """The jaxpr with constraints, of arguments that are `known`, and what is known of its results."""
        results: list[Split] = []

        def run(*args: Any) -> list[Any]:
            given = [Split(value, one.labels, one.at) for value, one in zip(args, known, strict=True)]
            results[:] = self._evaluate(jaxpr, consts, given)
            if merges:
                results[:] = [out.merged() for out in results]
            return [out.value for out in results]

        return jax.make_jaxpr(run)(*avals), results

    def _recomputed(self, eqn: Any, inputs: list[Split]) -> list[Split]:
        values = [one.value for one in inputs]
        again, outs = self._inside(eqn.params["jaxpr"], (), inputs, values, merges=False)
        if again.consts:
            return self._unknown(eqn, inputs)
        found = eqn.primitive.bind(*values, **{**eqn.params, "jaxpr": again.jaxpr})
        return [Split(value, out.labels, out.at) for value, out in zip(found, outs, strict=True)]

    def _scan(self, eqn: Any, inputs: list[Split]) -> list[Split]:
        """Of what is scanned over, a slice in each turn: it has the labels of the dims behind the first."""
        first = eqn.params["num_consts"] + eqn.params["num_carry"]
        inputs = [one.merged() for one in inputs]
        known = [*inputs[:first], *(Split(one.value, one.labels[1:]) for one in inputs[first:])]
        body = eqn.params["jaxpr"]
        again, outs = self._inside(body.jaxpr, body.consts, known, body.in_avals, merges=True)
        found = eqn.primitive.bind(*(one.value for one in inputs), **{**eqn.params, "jaxpr": again})
        num_carry = eqn.params["num_carry"]
        labels = [out.labels if index < num_carry else (None, *out.labels) for index, out in enumerate(outs)]
        return [Split(value, one) for value, one in zip(found, labels, strict=True)]

    def _while(self, eqn: Any, inputs: list[Split]) -> list[Split]:
        inputs = [one.merged() for one in inputs]
        start, body = eqn.params["cond_nconsts"], eqn.params["body_jaxpr"]
        again, outs = self._inside(body.jaxpr, body.consts, inputs[start:], body.in_avals, merges=True)
        found = eqn.primitive.bind(*(one.value for one in inputs), **{**eqn.params, "body_jaxpr": again})
        return [Split(value, out.labels) for value, out in zip(found, outs, strict=True)]

    def _cond(self, eqn: Any, inputs: list[Split]) -> list[Split]:
        """Branches whose results agree on what stays two dims; else these are merged."""
        which, given = inputs[0], inputs[1:]
        branches = eqn.params["branches"]
        made = [self._inside(one.jaxpr, one.consts, given, [g.value for g in given], merges=False) for one in branches]
        if any([out.shape_of_dims for out in outs] != [out.shape_of_dims for out in made[0][1]] for _, outs in made):
            made = [
                self._inside(one.jaxpr, one.consts, given, [g.value for g in given], merges=True) for one in branches
            ]
        values = [which.value, *(one.value for one in given)]
        found = eqn.primitive.bind(*values, **{**eqn.params, "branches": tuple(again for again, _ in made)})
        # A branch of zeros knows nothing of what its results stand for.
        labels = [
            next((o.labels for o in outs if o.is_labelled), outs[0].labels)
            for outs in zip(*(m[1] for m in made), strict=True)
        ]
        return [Split(value, one, out.at) for value, one, out in zip(found, labels, made[0][1], strict=True)]


def _plainly(eqn: Any, inputs: list[Split]) -> list[Split]:
    return [Split.plain(out) for out in bind(eqn, [one.merged_value() for one in inputs])]
