"""The specs of all parameters of a model on a mesh: the script's rules, the model's own plan, common names, then the largest dim."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from polyaccel.errors import PlanError
from polyaccel.sharding.rules import ShardingRule, Spec, first_match
from polyaccel.sharding.styles import AUTOMATIC, PLAN_STYLES, Style, axes_of_style, input_first, is_bias, style_of

log = logging.getLogger("polyaccel.sharding")

_SHOWN = 8  # names in a log line


@dataclass(frozen=True, slots=True)
class ModelHints:
    """What a model itself says about its parameters, as data that its dialect read.

    axes: per parameter the mesh axes of its dims (Flax partitioning metadata).
    plan: per layer or parameter, as a glob, the name of a style of transformers' `_tp_plan`.
    input_first: weights stored as (in, out); None: by their names and shapes.
    heads: layer -> how many heads its output has, where `tensor` may cut between heads alone: keys and values that several heads share.
    """

    axes: Mapping[str, Spec] = field(default_factory=dict)
    plan: Mapping[str, str] = field(default_factory=dict)
    input_first: Collection[str] | None = None
    heads: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardingPlan:
    """Per parameter how it is cut, and what an automatic rule could not do.

    specs: one entry per dim of each parameter, the size of its axis divides that dim.
    unmatched: matrices that nothing cuts over `tensor`: no rule, no plan, no known name, or a style of the plan that has no counterpart.
    indivisible: parameter -> why a rule that nobody wrote for it did not cut it.
    uneven: the spec that such a parameter would have had, for engines whose products with it can be cut into unequal pieces.
    """

    specs: Mapping[str, Spec]
    unmatched: tuple[str, ...] = ()
    indivisible: Mapping[str, str] = field(default_factory=dict)
    uneven: Mapping[str, Spec] = field(default_factory=dict)

    def say(self, model: str, sizes: Mapping[str, int]) -> None:
        """Log what is whole although an axis could have cut it."""
        if self.unmatched:
            log.warning(
                "%s: no sharding rule says how mesh.tensor=%d cuts %s: whole on each of these devices."
                " Add a ShardingRule(pattern, axes), with axes=None where that is meant.",
                model,
                sizes.get("tensor", 1),
                _listed(self.unmatched),
            )
        for name, why in self.indivisible.items():
            log.warning("%s: %s is kept whole over mesh.tensor: %s", model, name, why)


def plan_shardings(
    shapes: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    rules: Sequence[ShardingRule] = (),
    hints: ModelHints | None = None,
) -> ShardingPlan:
    """Specs for parameters of these shapes on a mesh of these axis sizes.

    Of `rules` (the script's) the first that matches counts; then what the model says of itself, by parameter and by layer; then the
    names of common transformer layers. What is not cut over `fsdp` by then is cut along its largest free dim that divides (the first of
    equal ones), unless a rule says `axes=None`. Axes of size 1 cut nothing.

    Raises PlanError for a rule or metadata that names more dims than the parameter has, or a dim that does not divide.
    """
    hints = hints or ModelHints()
    plain = {name: tuple(shape) for name, shape in shapes.items()}
    transposed = input_first(plain) if hints.input_first is None else hints.input_first
    own_styles = [(pattern, PLAN_STYLES[style]) for pattern, style in hints.plan.items() if style in PLAN_STYLES]
    foreign = [(pattern, style) for pattern, style in hints.plan.items() if style not in PLAN_STYLES]
    specs: dict[str, Spec] = {}
    unmatched: list[str] = []
    indivisible: dict[str, str] = {}
    uneven: dict[str, Spec] = {}
    for name, shape in plain.items():
        rule = first_match(rules, name)
        if rule is not None and rule.axes is None:
            specs[name] = (None,) * len(shape)
            continue
        if rule is not None:
            assert rule.axes is not None
            spec = _strict(name, shape, rule.axes, sizes, f"sharding rule {str(rule)!r}")
        elif name in hints.axes:
            spec = _strict(name, shape, hints.axes[name], sizes, f"the model's metadata {hints.axes[name]}")
        else:
            spec = (None,) * len(shape)
            if sizes.get("tensor", 1) > 1:
                found = None if _is_foreign(name, foreign) else _by_style(name, shape, own_styles, transposed)
                if found is None:
                    if len(shape) > 1 and not is_bias(name):
                        unmatched.append(name)
                elif (num_heads := hints.heads.get(name.rpartition(".")[0], 0)) % sizes["tensor"]:
                    indivisible[name] = f"its {num_heads} heads do not divide by mesh.tensor={sizes['tensor']}"
                else:
                    spec, why = _lenient(shape, found, sizes)
                    if why:
                        indivisible[name], uneven[name] = why, found
        specs[name] = with_fsdp(shape, spec, sizes.get("fsdp", 1))
    return ShardingPlan(specs, tuple(unmatched), indivisible, uneven)


def unused_rules(rules: Sequence[ShardingRule], names: Collection[str]) -> tuple[ShardingRule, ...]:
    """The rules that match none of these parameters, which are those of all models of a script."""
    return tuple(rule for rule in rules if not any(rule.matches(name) for name in names))


def say_unused_rules(rules: Sequence[ShardingRule], names: Collection[str]) -> None:
    """Log the rules that say nothing about any of these parameters. Called when all models are there: at the first step."""
    for rule in unused_rules(rules, names):
        log.warning(
            "sharding rule %r matches no parameter. There are %s", str(rule), _listed(tuple(names)) if names else "none"
        )


def with_fsdp(shape: Sequence[int], spec: Spec, size: int) -> Spec:
    """The spec, with the largest dim that is free and divides cut over `fsdp`; as it is where none does, or one is cut already."""
    if size == 1 or "fsdp" in spec:
        return spec
    free = [dim for dim, length in enumerate(shape) if spec[dim] is None and length and length % size == 0]
    if not free:
        return spec
    chosen = max(free, key=lambda dim: shape[dim])
    return tuple("fsdp" if dim == chosen else axis for dim, axis in enumerate(spec))


def local_shape(shape: Sequence[int], spec: Spec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """What one device keeps of a parameter."""
    return tuple(length // sizes[axis] if axis else length for length, axis in zip(shape, spec, strict=True))


def num_shards(spec: Spec, sizes: Mapping[str, int]) -> int:
    """Into how many different pieces a parameter is cut."""
    return math.prod(sizes[axis] for axis in spec if axis)


def _by_style(
    name: str, shape: tuple[int, ...], own: Sequence[tuple[str, Style]], transposed: Collection[str]
) -> Spec | None:
    for styles in (own, AUTOMATIC):
        style = style_of(name, styles)
        if style is not None:
            return axes_of_style(style, name, shape, input_first=transposed)
    return None


def _is_foreign(name: str, foreign: Sequence[tuple[str, str]]) -> bool:
    return style_of(name, [(pattern, "whole") for pattern, _ in foreign]) is not None


def _strict(name: str, shape: tuple[int, ...], axes: Spec, sizes: Mapping[str, int], source: str) -> Spec:
    if len(axes) > len(shape):
        raise PlanError(
            f"{source} names {len(axes)} dims, and parameter {name} has shape {shape}",
            "give one axis or None per dim, and a pattern of its own to parameters with another number of dims",
        )
    spec = tuple(axis if axis and sizes.get(axis, 1) > 1 else None for axis in axes)
    spec += (None,) * (len(shape) - len(spec))
    for dim, (length, axis) in enumerate(zip(shape, spec, strict=True)):
        if axis and length % sizes[axis]:
            raise PlanError(
                f"{source} cuts dim {dim} of parameter {name}, whose shape is {shape}, over mesh.{axis}={sizes[axis]}, which does not"
                f" divide {length}",
                f"cut another dim, pad that one to a multiple of {sizes[axis]}, or change mesh.{axis}",
            )
    return spec


def _lenient(shape: tuple[int, ...], axes: Spec, sizes: Mapping[str, int]) -> tuple[Spec, str | None]:
    for dim, (length, axis) in enumerate(zip(shape, axes, strict=True)):
        if axis and (length == 0 or length % sizes[axis]):
            why = f"dim {dim} of its shape {shape} does not divide by mesh.{axis}={sizes[axis]}"
            return (None,) * len(shape), why
    return axes, None


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
