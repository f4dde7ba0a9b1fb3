"""What devices can do at most, for the share of it that a training uses, and how much memory is in use."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

_NVIDIA = "NVIDIA data sheet"
_GOOGLE = "Cloud TPU documentation, system architecture"


class Peak(NamedTuple):
    """Dense 16-bit matrix products of one device, in floating point operations per second, and who says so."""

    flops: float
    source: str


# The first pattern that is found in the name counts, so a form with a limit of its own stands before its family. NVIDIA's sheets give
# numbers with 2:4 sparsity from Ampere on: half of them is here. A device of jax is a chip on the TPUs listed.
PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"\bB200\b", Peak(2250e12, f"{_NVIDIA}, HGX B200: 36 PFLOPS sparse of 8 GPUs")),
    (r"\bH200 NVL\b", Peak(835e12, f"{_NVIDIA}, H200 NVL: 1671 TFLOPS sparse")),
    (r"\bH200\b", Peak(989e12, f"{_NVIDIA}, H200 SXM: 1979 TFLOPS sparse")),
    (r"\bH100 NVL\b", Peak(835e12, f"{_NVIDIA}, H100 NVL: 1671 TFLOPS sparse")),
    (r"\bH100 PCIe\b", Peak(756e12, f"{_NVIDIA}, H100 PCIe: 1513 TFLOPS sparse")),
    (r"\bH100\b", Peak(989e12, f"{_NVIDIA}, H100 SXM: 1979 TFLOPS sparse")),
    (r"\bA100\b", Peak(312e12, f"{_NVIDIA}, A100: 624 TFLOPS sparse")),
    (r"\bL40S\b", Peak(362e12, f"{_NVIDIA}, L40S: 733 TFLOPS sparse")),
    (r"\bL4\b", Peak(121e12, f"{_NVIDIA}, L4: 242 TFLOPS sparse")),
    (r"\bT4\b", Peak(65e12, f"{_NVIDIA}, T4")),
    (r"\bTPU v6 lite\b", Peak(918e12, f"{_GOOGLE}, v6e")),
    (r"\bTPU v5 lite\b", Peak(197e12, f"{_GOOGLE}, v5e")),
    (r"\bTPU v5p?$", Peak(459e12, f"{_GOOGLE}, v5p")),
    (r"\bTPU v4$", Peak(275e12, f"{_GOOGLE}, v4")),
)


def peak_of(name: str) -> Peak | None:
    """The peak of a device by the name that its driver gives; None for one that is not in the table, and for a part of a GPU (MIG)."""
    if "MIG" in name:
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, name)), None)


def process_memory() -> int | None:
    """Resident bytes of this process now; where the kernel does not tell, the most that they were."""
    try:
        return int(_STATM.read_text("ascii").split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


_STATM = Path("/proc/self/statm")
