"""`accelerate.hooks`: objects around a module's forward. They are the torch adapter's, which is imported when one is asked for."""

from __future__ import annotations

from typing import Any

from polyaccel.big_models import served

__all__ = [  # noqa: F822 - served by __getattr__
    "AlignDevicesHook",
    "CpuOffload",
    "LayerwiseCastingHook",
    "ModelHook",
    "SequentialHook",
    "UserCpuOffloadHook",
    "add_hook_to_module",
    "attach_align_device_hook",
    "attach_align_device_hook_on_blocks",
    "attach_execution_device_hook",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return served(name)
