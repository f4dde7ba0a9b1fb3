"""`accelerate.inference`: pipelines over devices, which polyaccel does not build."""

from __future__ import annotations

from typing import Any, NoReturn

from polyaccel.errors import UnsupportedError

__all__ = ["prepare_pippy"]


def prepare_pippy(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises UnsupportedError: spread the model with a device_map instead, or use torch's own pipelining."""
    raise UnsupportedError(
        "prepare_pippy: polyaccel builds no pipelines",
        "spread a model over devices with dispatch_model(model, infer_auto_device_map(model)), or use torch.distributed.pipelining",
    )
