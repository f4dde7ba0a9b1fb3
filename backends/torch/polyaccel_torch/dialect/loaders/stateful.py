"""Loaders and iterables that know where they stand: torchdata's StatefulDataLoader, and whatever else has its two methods."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from polyaccel import wire
from polyaccel.errors import UnsupportedError
from polyaccel_torch.dialect.loaders.parcels import pack, unpack

_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


def is_stateful(value: Any) -> bool:
    """Whether it has torchdata's protocol: `state_dict()` and `load_state_dict(state)`."""
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def stateful_loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader as torchdata's StatefulDataLoader; one that is such a loader stays. Raises UnsupportedError without torchdata."""
    if is_stateful(loader):
        return loader
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise UnsupportedError(
            f"use_stateful_dataloader=True needs torchdata, which cannot be imported: {error}",
            "pip install torchdata, or leave the setting out: checkpoints continue every loader exactly without it",
        ) from error
    options = {name: getattr(loader, name) for name in _OPTIONS if hasattr(loader, name)}
    is_stream = isinstance(loader.dataset, IterableDataset)
    is_in_sequence = type(loader.batch_sampler) is BatchSampler and type(loader.sampler) is SequentialSampler
    if is_stream or is_in_sequence or loader.batch_sampler is None:  # torchdata has a batch sampler of its own
        options |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        options["sampler"] = None if is_stream else loader.sampler
    else:
        options["batch_sampler"] = loader.batch_sampler
    with warnings.catch_warnings():
        # torchdata 0.11 calls what torch 2.13 has deprecated (meta-pytorch/data, StatefulDataLoader.__init__): nothing users can change.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        made: DataLoader[Any] = StatefulDataLoader(loader.dataset, **options)
    return made


def num_read(state: Mapping[str, Any]) -> int:
    """How many of the loader's own batches were read when a StatefulDataLoader gave this state."""
    snapshot = state.get("_snapshot")
    if snapshot is None:
        return int(state.get("_num_yielded", 0))
    return int(snapshot["_snapshot_step"]) + int(state.get("_steps_since_snapshot", 0))


def to_bytes(state: Any) -> bytes:
    """A state as bytes for a checkpoint. Raises UnsupportedError for one that holds more than plain values and arrays."""
    return wire.encode(pack(state))


def from_bytes(data: bytes) -> Any:
    """The state that `to_bytes` got."""
    return unpack(wire.decode(data))
