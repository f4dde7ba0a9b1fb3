"""How many bytes each module needs, and how many each device has."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyaccel.errors import ConfigError
from polyaccel_torch.big_models.tensors import resolve_dtype

Device = Any  # an index, "cpu", "mps" or "disk"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)([Bb])\s*", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def compute_module_sizes(
    model: nn.Module,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    buffers_only: bool = False,
) -> dict[str, int]:
    """Bytes of every module and tensor by name, "" for the whole; a tied parameter counts under its first name."""
    wanted = resolve_dtype(dtype)
    special = {name: resolve_dtype(value) for name, value in (special_dtypes or {}).items()}
    sizes: dict[str, int] = defaultdict(int)
    named: list[tuple[str, torch.Tensor]] = [] if buffers_only else list(model.named_parameters())
    named += list(model.named_buffers())
    for name, tensor in named:
        # Loading converts floating point alone.
        stored = special.get(name) or (wanted if tensor.is_floating_point() else None) or tensor.dtype
        size = tensor.numel() * stored.itemsize
        parts = name.split(".")
        for length in range(len(parts) + 1):
            sizes[".".join(parts[:length])] += size
    return sizes


def parse_bytes(size: int | float | str) -> int:
    """Bytes: a number, "10GB" (powers of 1000), "10GiB" (powers of 1024), "10Gb" (bits). Raises ConfigError for anything else."""
    if isinstance(size, int | float) and not isinstance(size, bool) and size >= 0:
        return int(size)
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise ConfigError(f"{size!r} is no amount of memory", "write a number of bytes, or '10GB', '500MB', '1GiB'")
    amount = float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].upper()]
    return int(amount / 8 if found[4] == "b" and not found[3] else amount)


def get_max_memory(max_memory: Mapping[Device, int | str] | None = None) -> dict[Device, int]:
    """What each device may take, accelerators first: what is free here, or what was given. Raises ConfigError for an unknown device."""
    if max_memory is None:
        return _free_memory()
    unknown = [key for key in max_memory if not _is_index(key) and key not in ("mps", "cpu", "disk")]
    if unknown:
        raise ConfigError(
            f"max_memory has {unknown[0]!r}, which is no device", "use indices (0, 1, ...), 'mps', 'cpu' and 'disk'"
        )
    order = [*sorted(key for key in max_memory if _is_index(key)), "mps", "cpu", "disk"]
    return {key: parse_bytes(max_memory[key]) for key in order if key in max_memory}


def class_names(names: str | Iterable[str] | None) -> frozenset[str]:
    """Class names that were given alone or in any collection."""
    return frozenset([names] if isinstance(names, str) else names or ())


def _is_index(key: Any) -> bool:
    return isinstance(key, int) and not isinstance(key, bool)


def _free_memory() -> dict[Device, int]:
    here = torch.accelerator.current_accelerator() if torch.accelerator.device_count() else None
    if here is not None and here.type == "mps":
        return {"mps": _free_ram()}  # it computes in the host's memory
    free: dict[Device, int] = {}
    if here is not None and here.type == "cuda":
        free = {index: torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())}
    return {**free, "cpu": _free_ram()}


def _free_ram() -> int:
    facts = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", facts.read_text(encoding="ascii")) if facts.exists() else None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
