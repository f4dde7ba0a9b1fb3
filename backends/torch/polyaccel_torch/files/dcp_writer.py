"""Writes a tree as a distributed checkpoint: DCP plans with tensors that have a shape and no values, and asks for values one by one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from polyaccel.stored import Spool, StoredArray
from polyaccel_torch.files.host_arrays import dtype_of, load
from polyaccel_torch.files.torch_file import to_torch


class _OneAtATime(DefaultSavePlanner):
    """Gives the writer the values of the stored array that stands behind an item of the plan.

    The writer keeps what it was given to the end, so that a file has to stand behind it.
    """

    def __init__(self, arrays: Mapping[int, StoredArray], spool: Spool) -> None:
        super().__init__()
        self._arrays = arrays
        self._spool = spool

    def resolve_data(self, write_item: WriteItem) -> Any:
        placeholder = self.lookup_object(write_item.index)
        if write_item.type == WriteItemType.BYTE_IO:
            return self.transform_object(write_item, placeholder)
        array = self._arrays[id(placeholder)]
        mapped = StoredArray(array.dtype, array.shape, lambda: self._spool.keep(array.read()))
        return load(mapped, write_item.index.fqn)


def save(path: Path, tree: Any) -> None:
    """Write the tree to the folder `path`. Raises CheckpointError for what torch has no type for."""
    arrays: dict[int, StoredArray] = {}
    placeholders: list[torch.Tensor] = []  # kept, so that no two share an id

    def plan(value: Any, where: str) -> Any:
        if isinstance(value, StoredArray):
            tensor = torch.empty(value.shape, dtype=dtype_of(value.dtype, where), device="meta")
            arrays[id(tensor)] = value
            placeholders.append(tensor)
            return tensor
        if isinstance(value, Mapping):
            return {key: plan(item, f"{where}.{key}") for key, item in value.items()}
        if isinstance(value, list) and any(isinstance(item, (StoredArray, Mapping, list)) for item in value):
            return [plan(item, f"{where}[{position}]") for position, item in enumerate(value)]
        return to_torch(value, where)

    writer = dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True, thread_count=1, overwrite=False)
    with Spool(path.parent) as spool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # that is what no_dist asks for
        dcp.save(plan(tree, path.name), storage_writer=writer, planner=_OneAtATime(arrays, spool), no_dist=True)
