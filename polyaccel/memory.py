"""When a device runs out of memory: smaller batches until it fits, and letting go of what is no longer used."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Callable
from typing import Any

from polyaccel.errors import ConfigError, NoBatchSizeError

# What torch, cuBLAS, cuDNN, torch's CPU allocator and XLA say when memory is gone.
_SIGNS = (
    "out of memory",
    "cublas_status_not_supported",
    "cublas_status_alloc_failed",
    "cudnn error: cudnn_status_not_supported",
    "defaultcpuallocator: can't allocate memory",
    "resource_exhausted",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the host, has no memory left."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def clear_device_cache(garbage_collection: bool = True) -> None:
    """Give memory that torch keeps for later back to the device; XLA keeps none. Collects garbage first unless told not to."""
    if garbage_collection:
        gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def release_memory(*objects: Any) -> list[None]:
    """Collect garbage and empty the device's cache; returns one None per argument, to overwrite the script's names with."""
    clear_device_cache()
    return [None for _ in objects]


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Any:
    """Decorator: call `function(batch_size, ...)` with ever smaller batch sizes until it does not run out of memory.

    Args:
        function: takes the batch size first; call it without one.
        starting_batch_size: tried first.
        reduce_batch_size_fn: gives the next size to try, None: nine tenths of the last one, rounded down.

    Raises NoBatchSizeError (a RuntimeError) where no size above 0 fits, and TypeError where the caller passes a batch size. Every
    process must come to the same size: where only one runs out of memory, the others cannot know. Same name and meaning as
    `accelerate.utils.find_executable_batch_size`.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    if isinstance(starting_batch_size, bool) or not isinstance(starting_batch_size, int):
        raise ConfigError(
            f"starting_batch_size={starting_batch_size!r} is no batch size", "use an integer, such as 128"
        )
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def fitted(*args: Any, **kwargs: Any) -> Any:
        if len(names) < len(args) + 1:
            given = ", ".join(f"{name}={value!r}" for name, value in zip(names[1:], args[1:], strict=False))
            raise TypeError(
                f"{function.__name__} gets its batch size from find_executable_batch_size, and was called with one:"
                f" call it as {function.__name__}({given})"
            )
        size = starting_batch_size
        clear_device_cache()
        while size > 0:
            try:
                return function(size, *args, **kwargs)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            clear_device_cache()  # after the except block: the exception held the frames, and with them the arrays
            size = int(size * 0.9) if reduce_batch_size_fn is None else reduce_batch_size_fn()
        raise NoBatchSizeError(
            f"{function.__name__} ran out of memory with every batch size from {starting_batch_size} down",
            "make the model, the sequences or the optimizer state smaller, or shard them over more devices",
        )

    return fitted
