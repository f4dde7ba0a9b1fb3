"""What travels between formats: named groups of arrays that are not in memory, and plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyaccel.checkpoint.contents import Contents
from polyaccel.checkpoint.formats.mapped import read_tensors
from polyaccel.checkpoint.read import Saved
from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard
from polyaccel.stored import Spool, StoredArray

Arrays = dict[str, StoredArray]


@dataclass(slots=True)
class Bundle:
    """A checkpoint in no particular format: groups and values as `Contents` has them, arrays whole.

    `own` has one entry per process. `left_behind` says what was there and has no place in the other format, `parameters` are the names
    that an optimizer's arrays may begin with.
    """

    groups: dict[str, Arrays] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    own: list[dict[str, Any]] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    parameters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Choices:
    """What a user may say about a conversion.

    Args:
        skip: files of the source that are left out.
        parameter_names: by group, the names of an optimizer's parameters in the order in which it was given them.
        places: by group, the path of its subtree in a source that is one tree (DCP, Orbax).
    """

    skip: frozenset[str] = frozenset()
    parameter_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def of_saved(saved: Saved) -> Bundle:
    """A local checkpoint of ours; an array of one piece is mapped, others are put together when they are read."""
    groups = {group: dict(_arrays(saved, group)) for group in saved.groups}
    own = [dict(saved.own(index)) for index in range(saved.num_processes)]
    return Bundle(groups, dict(saved.shared), own, list(saved.manifest.added))


def _arrays(saved: Saved, group: str) -> Iterator[tuple[str, StoredArray]]:
    mapped: dict[str, Arrays] = {}
    for name, array in saved.manifest.groups[group].items():
        if len(array.pieces) == 1:
            piece = array.pieces[0]
            if piece.file not in mapped:
                mapped[piece.file] = read_tensors(Path(saved.path) / piece.file)
            yield name, StoredArray(array.dtype, array.shape, mapped[piece.file][piece.key].read)
        else:
            yield name, StoredArray(array.dtype, array.shape, lambda name=name: _whole(saved, group, name))  # type: ignore[misc]


def _whole(saved: Saved, group: str, name: str) -> Any:
    whole = None
    for shard in saved.shards(group, [name]):
        if whole is None:
            import numpy as np

            whole = np.empty(shard.global_shape, shard.data.dtype)
        whole[tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.data.shape, strict=True))] = shard.data
    return whole


def to_contents(bundle: Bundle, spool: Spool) -> Contents:
    """What our writer takes; arrays that no file backs go through the spool, so that memory holds one of them."""
    groups = {
        group: [
            Shard(name, array.shape, (0,) * len(array.shape), array.dtype, spool.keep(array.read()))
            for name, array in arrays.items()
        ]
        for group, arrays in bundle.groups.items()
    }
    return Contents(groups, bundle.shared, bundle.own[0] if bundle.own else {})


def numbered(groups: Mapping[str, Any], stem: str) -> dict[str, Any]:
    """The entries called `stem`, `stem_1`, `stem_2`, ..., in this order."""
    found = {name: value for name, value in groups.items() if position(name, stem) is not None}
    return dict(sorted(found.items(), key=lambda item: position(item[0], stem) or 0))


def position(name: str, stem: str) -> int | None:
    """Which one `stem` (0), `stem_1` (1), ... is; None for another name."""
    rest = name.removeprefix(f"{stem}_")
    return 0 if name == stem else int(rest) if rest != name and rest.isdecimal() else None


def models_of(bundle: Bundle) -> dict[str, Arrays]:
    """The groups of models, `model` first, in order."""
    return numbered(bundle.groups, "model")


def the_model(bundle: Bundle, path: Path, target: str) -> Arrays:
    """The one model of a bundle. Raises CheckpointError for none, or for several."""
    models = models_of(bundle)
    if len(models) != 1:
        raise CheckpointError(
            f"{path} holds {len(models) or 'no'} models{': ' + ', '.join(models) if models else ''}, and {target} has place for one",
            "choose one with --only" if models else "convert a checkpoint with a model",
        )
    return next(iter(models.values()))
