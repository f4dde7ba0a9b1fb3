"""`accelerate.utils.offload`: weights on disk, by name. They are the torch adapter's, which is imported when one is asked for."""

from __future__ import annotations

from typing import Any

from polyaccel.big_models import served

__all__ = [  # noqa: F822 - served by __getattr__
    "OffloadedWeightsLoader",
    "PrefixedDataset",
    "extract_submodules_state_dict",
    "load_offloaded_weight",
    "offload_state_dict",
    "offload_weight",
    "save_offload_index",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return served(name)
