"""What flax modules say of how their parameters are cut: the names that `with_partitioning` gives dims, as hints of the core."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from flax.core import spmd

from polyaccel.sharding.logical import axes_of_names
from polyaccel.sharding.plan import ModelHints
from polyaccel.sharding.rules import Spec

_log = logging.getLogger("polyaccel.sharding")


def hints_of_variables(variables: Mapping[str, Any]) -> ModelHints:
    """Of nnx variables by name: their metadata `out_sharding`, and `sharding_rules` beside it."""
    said: dict[str, tuple[Any, Iterable[tuple[str, Any]]]] = {}
    for name, variable in variables.items():
        metadata = variable.get_metadata()
        if metadata.get("out_sharding"):
            said[name] = tuple(metadata["out_sharding"]), tuple(metadata.get("sharding_rules") or ())
    return _hints(said)


def hints_of_boxes(boxes: Mapping[str, Any]) -> ModelHints:
    """Of linen's boxed values by name: `Partitioned.names`, and the `rules` of a LogicallyPartitioned."""
    said = {
        name: (tuple(box.names), tuple(getattr(box, "rules", None) or ()))
        for name, box in boxes.items()
        if getattr(box, "names", None)
    }
    return _hints(said)


def _hints(said: Mapping[str, tuple[Any, Iterable[tuple[str, Any]]]]) -> ModelHints:
    around = tuple(spmd.get_logical_axis_rules() or ())
    axes: dict[str, Spec] = {}
    for name, (names, rules) in said.items():
        spec, unknown = axes_of_names(names, (*rules, *around))
        if unknown:
            _log.warning(
                "%s: its partitioning metadata names %s, for which neither the mesh nor a logical rule has an axis: not cut by it",
                name,
                ", ".join(unknown),
            )
        if any(spec):
            axes[name] = spec
    return ModelHints(axes=axes)
