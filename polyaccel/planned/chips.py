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
    num_dims: of the grid that a slice's topology is written in. wraps_at: a dim of such a grid whose size is a multiple of it is a ring;
    wraps_whole: only where all dims are. None: not known, as of a GPU that nobody has looked up.
    """

    name: str
    hbm_bytes: int
    peak_flops: float | None
    hbm_bytes_per_s: float | None
    link_bytes_per_s: float | None
    num_dims: int
    source: str
    wraps_at: int | None = None
    wraps_whole: bool = False


# The pages give the links of a chip in both directions together ("bidirectional ICI bandwidth"): here is one of them. For v4 the page gives
# none: https://arxiv.org/abs/2304.01433 (table 4) says six links of 50 GB/s. Their GB of memory are GiB: XLA:TPU has 15.75 on v5e.
# "All 4x4x4 and larger slices have full 3D torus" (v5p); a pod of 16x16 (v5e, v6e) is a torus, and less of it where a dim is not whole.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * _GIB, 275e12, 1200e9, 300e9, 3, "https://docs.cloud.google.com/tpu/docs/v4", 4, True),
        Chip("v5e", 16 * _GIB, 197e12, 819e9, 200e9, 2, "https://docs.cloud.google.com/tpu/docs/v5e", 16),
        Chip("v5p", 95 * _GIB, 459e12, 2765e9, 600e9, 3, "https://docs.cloud.google.com/tpu/docs/v5p", 4, True),
        Chip("v6e", 32 * _GIB, 918e12, 1638e9, 400e9, 2, "https://docs.cloud.google.com/tpu/docs/v6e", 16),
    )
}
