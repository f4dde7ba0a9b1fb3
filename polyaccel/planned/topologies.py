"""Names of machines, which need not be here: `v5e:4x4` is sixteen chips, `cpu:8` eight devices of the CPU; `gpu:2` must be here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from polyaccel.errors import ConfigError, nearest
from polyaccel.planned.chips import CHIPS, Chip

CPU = "cpu"
GPU = "gpu"
_SIZES = re.compile(r"[1-9]\d*(x[1-9]\d*)*")


@dataclass(frozen=True, slots=True)
class TopologyName:
    """A platform and the sizes of its grid.

    `chip` is None for the CPU, of which no maker says a peak, and for a GPU, which is asked when it is opened.
    """

    platform: str  # "tpu", "cpu" or "gpu"
    text: str  # as the compiler takes it: "v5e:4x4"
    sizes: tuple[int, ...]
    chip: Chip | None

    @property
    def num_devices(self) -> int:
        """Devices that a program sees: chips of a slice."""
        return math.prod(self.sizes)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Per dim whether its links close to a ring: how devices exchange depends on it, and compilers take a slice for a mesh."""
        if self.chip is None or self.chip.wraps_at is None:
            return (False,) * len(self.sizes)
        found = tuple(size % self.chip.wraps_at == 0 for size in self.sizes)
        return found if all(found) or not self.chip.wraps_whole else (False,) * len(found)


def topology_named(text: str) -> TopologyName:
    """What `--topology` names. Raises ConfigError for unknown chips, and for sizes that are no grid of theirs."""
    kind, colon, grid = text.partition(":")
    if kind not in (CPU, GPU, *CHIPS):
        raise ConfigError(f"--topology {text} names no chip that is known", nearest(kind, [CPU, GPU, *CHIPS]))
    if not colon or not _SIZES.fullmatch(grid):
        example = f"{kind}:8" if kind in (CPU, GPU) else f"{kind}:{'x'.join(['4'] * CHIPS[kind].num_dims)}"
        raise ConfigError(f"--topology {text} has no sizes", f"write it as in {example}")
    sizes = tuple(int(size) for size in grid.split("x"))
    if kind in (CPU, GPU):
        return TopologyName(kind, text, (math.prod(sizes),), None)
    chip = CHIPS[kind]
    if len(sizes) != chip.num_dims:
        raise ConfigError(
            f"--topology {text} has {len(sizes)} sizes, and slices of {kind} are grids of {chip.num_dims}",
            f"write it as in {kind}:{'x'.join(['4'] * chip.num_dims)}",
        )
    return TopologyName("tpu", text, sizes, chip)


def with_devices(topology: TopologyName, num_devices: int) -> TopologyName:
    """The topology of the same chip with that many devices, as near to a cube (a square) as powers of two allow.

    Raises ConfigError where the number is no power of two: slices of other sizes have shapes of their own, to be written out.
    """
    if topology.chip is None:
        return topology_named(f"{topology.platform}:{num_devices}")
    if num_devices < 1 or num_devices & (num_devices - 1):
        raise ConfigError(
            f"--scale {num_devices}: slices of {topology.chip.name} are scaled in powers of two",
            f"plan it by name: --topology {topology.chip.name}:AxB",
        )
    sizes = [1] * topology.chip.num_dims
    left = num_devices
    at = len(sizes) - 1
    while left > 1:
        sizes[at] *= 2
        left //= 2
        at = (at - 1) % len(sizes)
    return topology_named(f"{topology.chip.name}:{'x'.join(map(str, sorted(sizes)))}")
