"""What one `polyaccel plan` compiles: topologies, meshes of their devices, and values of the script's own arguments."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from polyaccel.errors import ConfigError, nearest
from polyaccel.planned.topologies import TopologyName, with_devices

_AXES = ("replica", "data", "fsdp", "tensor", "sequence")
# Of two meshes, the one that cuts layers and batches less exchanges less.
_CUTTING = ("sequence", "tensor", "fsdp")


@dataclass(frozen=True, slots=True)
class Case:
    """One step to compile."""

    topology: TopologyName
    mesh: dict[str, int] | None  # None: as configured
    arguments: tuple[str, ...] = ()  # that are tried

    @property
    def variant(self) -> str:
        """What is tried, in words: `fsdp=8 --batch-size 4`."""
        axes = [] if self.mesh is None else [f"{name}={size}" for name, size in self.mesh.items() if size != 1]
        return " ".join([*axes, *self.arguments])


def scaled(topology: TopologyName, scale: str | None) -> list[TopologyName]:
    """The topologies of `--scale 16,64,256`; without it the one that is named."""
    if scale is None:
        return [topology]
    try:
        numbers = [int(text) for text in scale.split(",")]
    except ValueError as error:
        raise ConfigError(f"--scale {scale} is no list of numbers", "write --scale 16,64,256") from error
    return [with_devices(topology, number) for number in numbers]


def arguments_of(tried: str | None) -> list[tuple[str, ...]]:
    """What `--try NAME=A,B` gives the script, one after the other."""
    if tried is None:
        return [()]
    name, equals, values = tried.partition("=")
    if not equals or not name or not values:
        raise ConfigError(f"--try {tried} is no NAME=A,B", "write it as in --try batch-size=1,2,4")
    flag = name if name.startswith("-") else f"--{name}"
    return [(flag, value) for value in values.split(",")]


def axes_of(searched: str, known: Collection[str]) -> tuple[str, ...]:
    """The axes of `--search-axes`. Raises ConfigError for one that is none, or that the engine does not have."""
    names = tuple(dict.fromkeys(searched.split(",")))
    for name in names:
        if name not in _AXES:
            raise ConfigError(f"--search-axes {searched}: {name!r} is no axis of a mesh", nearest(name, _AXES))
        if name not in known:
            raise ConfigError(
                f"--search-axes {searched}: the engine that plans does not shard over {name!r}",
                f"its axes are {', '.join(axis for axis in _AXES if axis in known)}",
            )
    return names


def meshes(mesh: Mapping[str, int], axes: Sequence[str], num_devices: int) -> list[dict[str, int]]:
    """Every way of sharing the devices between these axes; the others stay. Those come first that cut least."""
    others = {name: size for name, size in mesh.items() if name not in axes}
    left, rest = divmod(num_devices, math.prod(max(size, 1) for size in others.values()))
    if rest or not left:
        raise ConfigError(f"the mesh {others} does not divide {num_devices} devices", "choose sizes that divide it")
    fixed = {name: size for name, size in others.items() if size > 0}
    found = [{**fixed, **dict(zip(axes, sizes, strict=True))} for sizes in _products(left, len(axes))]
    return sorted(found, key=_cuts)


def _cuts(mesh: Mapping[str, int]) -> tuple[int, ...]:
    sizes = [mesh.get(axis, 1) for axis in _CUTTING]
    return (math.prod(sizes), *sizes)


def _products(number: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    """All tuples of that many factors whose product is the number."""
    if num_factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _products(number // first, num_factors - 1):
                yield (first, *rest)
