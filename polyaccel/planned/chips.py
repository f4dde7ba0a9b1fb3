"""What the makers of chips say of them: memory, peak, bandwidths. Data with its sources; nothing here is measured by us."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Chip:
    """One device as a compiler sees it.

    hbm_bytes: memory for programs and data; compilers keep a part of it for themselves. peak_flops: dense bf16 operations in a second.
    hbm_bytes_per_s, link_bytes_per_s: to its own memory, and to its neighbours, one direction of all links together.
    num_dims: of the grid that a slice's topology is written in.
    """

    name: str
    hbm_bytes: int
    peak_flops: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    num_dims: int
    source: str


# Links: one direction. The pages call it "interchip interconnect BW" in Gbps (2400, 1600, 4800, 3200); newer ones give both directions.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * _GIB, 275e12, 1228e9, 300e9, 3, "https://cloud.google.com/tpu/docs/v4"),
        Chip("v5e", 16 * _GIB, 197e12, 819e9, 200e9, 2, "https://cloud.google.com/tpu/docs/v5e"),
        Chip("v5p", 95 * _GIB, 459e12, 2765e9, 600e9, 3, "https://cloud.google.com/tpu/docs/v5p"),
        Chip("v6e", 32 * _GIB, 918e12, 1640e9, 400e9, 2, "https://cloud.google.com/tpu/docs/v6e"),
    )
}
