"""Tensor parallelism of global programs: every product with a weight that `tensor` cuts says how its result lies.

A program is traced once, whichever dialect it came from, its backward pass included, and run again equation by equation. What is a
parameter or a view of one (transposed, cast, reshaped) carries its spec; a product with it is constrained. Constraints on parameters
alone leave the partitioner free to gather them, or to cut dims that nobody chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from polyaccel_jax.jaxprs import CALLS, RECOMPUTED, bind
from polyaccel_jax.mesh import DATA_AXES, DeviceMesh

Tag = tuple[str | None, ...] | None  # of a value that is (a view of) a parameter: per dim the axis that cuts it
Tags = Sequence[Tag]

_SAME_SHAPE = frozenset(
    {"convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision", "neg", "sharding_constraint"}
)
_BY_SCALAR = frozenset({"mul", "div", "add", "sub"})
_UNSAID = PartitionSpec.UNCONSTRAINED


@dataclass(frozen=True, slots=True)
class Constrainer:
    """Runs functions with constraints on what they compute from parameters. `batch_size`: of the global batch; None: no batch."""

    mesh: DeviceMesh
    batch_size: int | None

    def run(self, function: Callable[..., Any], tags: Any, *args: Any) -> Any:
        """Traced: `function(*args)`. `tags`: a Tag for each leaf of args, in the order of jax.tree.leaves."""
        traced, structure = jax.make_jaxpr(function, return_shape=True)(*args)
        outs, _ = self._evaluate(traced.jaxpr, traced.consts, jax.tree.leaves(args), tags)
        return jax.tree.unflatten(jax.tree.structure(structure), outs)

    def _evaluate(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], tags: Tags
    ) -> tuple[list[Any], list[Tag]]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))
        known: dict[Any, Tag] = {var: tag for var, tag in zip(jaxpr.invars, tags, strict=True) if tag is not None}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        def tag_of(atom: Any) -> Tag:
            return None if isinstance(atom, Literal) else known.get(atom)

        for eqn in jaxpr.eqns:
            inputs, in_tags = [read(atom) for atom in eqn.invars], [tag_of(atom) for atom in eqn.invars]
            with eqn.ctx.manager:
                if any(tag is not None for tag in in_tags):
                    outs, out_tags = self._apply(eqn, inputs, in_tags)
                else:
                    outs, out_tags = bind(eqn, inputs), [None] * len(eqn.outvars)
            for var, out, tag in zip(eqn.outvars, outs, out_tags, strict=True):
                values[var] = out
                if tag is not None:
                    known[var] = tag
        return [read(atom) for atom in jaxpr.outvars], [tag_of(atom) for atom in jaxpr.outvars]

    def _apply(self, eqn: Any, inputs: list[Any], tags: list[Tag]) -> tuple[list[Any], Sequence[Tag]]:
        name = eqn.primitive.name
        if name in CALLS and CALLS[name] in eqn.params:
            inner = eqn.params[CALLS[name]]
            return self._evaluate(inner.jaxpr, inner.consts, inputs, tags)
        if name in RECOMPUTED:
            inner = eqn.params["jaxpr"]
            again = jax.make_jaxpr(lambda *args: self._evaluate(inner, (), args, tags)[0])(*inputs)
            if not again.consts:
                return eqn.primitive.bind(*inputs, **{**eqn.params, "jaxpr": again.jaxpr}), [None] * len(eqn.outvars)
        if name == "scan":
            return self._scan(eqn, inputs, tags), [None] * len(eqn.outvars)
        if name == "while":
            return self._while(eqn, inputs, tags), [None] * len(eqn.outvars)
        if name == "cond":
            return self._cond(eqn, inputs, tags), [None] * len(eqn.outvars)
        outs = bind(eqn, inputs)
        if name == "dot_general":
            spec = self._of_product(eqn, tags, outs[0].shape)
        elif name == "gather":
            spec = self._of_gather(eqn, tags[0], outs[0].shape)
        elif name == "optimization_barrier":
            return outs, tags
        else:
            return outs, [_viewed(eqn, tags, self.mesh.sizes)] if len(outs) == 1 else [None] * len(outs)
        if spec is not None:
            outs = [lax.with_sharding_constraint(outs[0], NamedSharding(self.mesh.mesh, PartitionSpec(*spec)))]
        return outs, [None]

    def _scan(self, eqn: Any, inputs: list[Any], tags: list[Tag]) -> list[Any]:
        """A loop whose body uses weights: those of all turns, or one slice of stacked weights in each turn."""
        num_consts, num_carry, body = eqn.params["num_consts"], eqn.params["num_carry"], eqn.params["jaxpr"]
        inner: list[Tag] = list(tags[:num_consts]) + [None] * num_carry
        inner += [None if tag is None or tag[0] is not None else tag[1:] for tag in tags[num_consts + num_carry :]]
        outs: list[Any] = eqn.primitive.bind(*inputs, **{**eqn.params, "jaxpr": self._inside(body, inner)})
        return outs

    def _while(self, eqn: Any, inputs: list[Any], tags: list[Tag]) -> list[Any]:
        """A loop whose body uses weights from outside; what a turn hands to the next is no weight."""
        start, num_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        inner = [*tags[start : start + num_consts], *[None] * (len(tags) - start - num_consts)]
        again = self._inside(eqn.params["body_jaxpr"], inner)
        outs: list[Any] = eqn.primitive.bind(*inputs, **{**eqn.params, "body_jaxpr": again})
        return outs

    def _cond(self, eqn: Any, inputs: list[Any], tags: list[Tag]) -> list[Any]:
        branches = tuple(self._inside(branch, tags[1:]) for branch in eqn.params["branches"])
        outs: list[Any] = eqn.primitive.bind(*inputs, **{**eqn.params, "branches": branches})
        return outs

    def _inside(self, closed: Any, tags: Tags) -> Any:
        """The jaxpr of a loop or a branch, with constraints."""
        return jax.make_jaxpr(lambda *args: self._evaluate(closed.jaxpr, closed.consts, args, tags)[0])(
            *closed.in_avals
        )

    def _of_product(self, eqn: Any, tags: list[Tag], shape: tuple[int, ...]) -> list[Any] | None:
        """Per dim of a product of an activation with a weight: how the weight cuts it, and the batch over the data axes."""
        left, right = tags
        if left is not None and right is not None:
            return None
        weight_is_left = left is not None
        weight: Any = left if weight_is_left else right
        if "tensor" not in weight:
            return None
        (left_contracted, right_contracted), (left_batch, right_batch) = eqn.params["dimension_numbers"]
        contracted = set(left_contracted if weight_is_left else right_contracted)
        batch = left_batch if weight_is_left else right_batch
        free = [dim for dim in range(len(weight)) if dim not in contracted and dim not in batch]
        from_batch = [weight[dim] for dim in batch]
        from_weight = [weight[dim] for dim in free]
        num_free = len(shape) - len(from_batch) - len(from_weight)
        start = len(from_batch) + (len(from_weight) if weight_is_left else 0)
        from_activation = [self._of_batch(shape[start])] + [_UNSAID] * (num_free - 1) if num_free else []
        parts = (from_weight, from_activation) if weight_is_left else (from_activation, from_weight)
        return [*from_batch, *parts[0], *parts[1]]

    def _of_gather(self, eqn: Any, table: Tag, shape: tuple[int, ...]) -> list[Any] | None:
        """Rows of an embedding: the batch over the data axes, and the row as the table cuts it."""
        if table is None or "tensor" not in table:
            return None
        numbers = eqn.params["dimension_numbers"]
        collapsed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        rows = iter(tag for dim, tag in enumerate(table) if dim not in collapsed)
        spec = [next(rows) if dim in numbers.offset_dims else _UNSAID for dim in range(len(shape))]
        if 0 not in numbers.offset_dims and shape:
            spec[0] = self._of_batch(shape[0])
        return spec

    def _of_batch(self, size: int) -> Any:
        """What cuts a dim that begins with the batch; the batch alone, or the batch with what a view merged into it."""
        if (
            self.batch_size
            and size % self.batch_size == 0
            and size % self.mesh.num_shards == 0
            and self.mesh.num_shards > 1
        ):
            return DATA_AXES
        return _UNSAID


def _viewed(eqn: Any, tags: list[Tag], sizes: Mapping[str, int]) -> Tag:
    """The tag of what is still a weight: another order, dtype or shape of the same numbers."""
    name, params = eqn.primitive.name, eqn.params
    tag = tags[0]
    if name in _BY_SCALAR:
        mine = next(index for index, found in enumerate(tags) if found is not None)
        return tags[mine] if all(atom.aval.shape == () for i, atom in enumerate(eqn.invars) if i != mine) else None
    if tag is None:
        return None
    if name in _SAME_SHAPE:
        return tag
    if name == "transpose":
        return tuple(tag[dim] for dim in params["permutation"])
    if name == "squeeze":
        return tuple(axis for dim, axis in enumerate(tag) if dim not in params["dimensions"])
    if name in ("slice", "dynamic_slice"):  # one of stacked weights
        old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        is_cut_apart = any(axis and old[dim] != new[dim] for dim, axis in enumerate(tag))
        return None if is_cut_apart else tag
    if name == "reshape" and params.get("dimensions") is None:
        return reshaped(tag, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape, sizes)
    return None


def reshaped(tag: tuple[str | None, ...], old: Sequence[int], new: Sequence[int], sizes: Mapping[str, int]) -> Tag:
    """The tag of a reshaped array: an axis stays with a dim that it cut as the outermost of those that were merged or split.

    None where an axis would be lost.
    """
    groups: list[tuple[list[int], list[int]]] = []
    first, second = list(range(len(old))), list(range(len(new)))
    while first or second:
        mine: list[int] = []
        other: list[int] = []
        size, wanted = 1, 1
        while True:
            if first and (size < wanted or not mine):
                mine.append(first.pop(0))
                size *= old[mine[-1]]
            elif second and (wanted < size or not other):
                other.append(second.pop(0))
                wanted *= new[other[-1]]
            else:
                break
        if size != wanted:
            return None
        groups.append((mine, other))
    found: list[str | None] = [None] * len(new)
    for mine, other in groups:
        axes = [dim for dim in mine if tag[dim]]
        if not axes:
            continue
        outermost = next((dim for dim in mine if old[dim] != 1), None)
        target = next((dim for dim in other if new[dim] != 1), None)
        if axes != [outermost] or target is None or new[target] % sizes[str(tag[axes[0]])]:
            return None
        found[target] = tag[axes[0]]
    return tuple(found)
