"""Values that all processes must have alike: parameters are those of process 0, and rows that two processes share are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from zlib import crc32

import jax
import numpy as np

from polyaccel.errors import PrepareError
from polyaccel_jax.dialect.host_arrays import with_keys, words

_SEED = "build the model from the same seed on every process: set_seed(0) before it"


def agreed(collectives: Any, model: str, values: Iterable[Any]) -> Iterator[Any]:
    """The values, one by one; those of process 0 where a process has made other ones. Every process must take all of them.

    Raises PrepareError, naming `model`, where shapes differ, or the copies of what was created on the devices already.
    """
    for value in values:
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            if _differing(collectives, [value]):
                raise PrepareError(f"the processes created {model} with different values", _SEED)
            yield value
            continue
        host = np.asarray(words(value) if isinstance(value, jax.Array) else value)
        mine = [list(host.shape), host.dtype.name, _sum_of(host)]
        everyone = collectives.all_gather_object(mine)
        if any(other[:2] != everyone[0][:2] for other in everyone):
            described = sorted({f"{dtype} of shape {tuple(shape)}" for shape, dtype, _ in everyone})
            raise PrepareError(
                f"an array of {model} is {' and '.join(described)} on different processes",
                "build the same model on all",
            )
        if any(other != everyone[0] for other in everyone):
            sent = np.asarray(collectives.broadcast(host, 0)).astype(host.dtype)
            value = with_keys(sent, value) if isinstance(value, jax.Array) else sent
        yield value


def require_same_rows(collectives: Any, inputs: Sequence[Any], sharing: int) -> None:
    """Raises PrepareError where the `sharing` neighbours of a data shard were given different rows. Every process must call it."""
    if any(isinstance(array, jax.core.Tracer) for array in inputs):
        return
    if differing := _differing(collectives, inputs, sharing):
        first, second = differing
        raise PrepareError(
            f"processes {first} and {second} hold devices of one data shard, and were given different rows for it",
            "let a prepared loader read the batches, or give both the same: process_index // plan.num_processes_per_shard says which"
            " shard a process feeds; random augmentation needs the same seed on both",
        )


def require_same_values(collectives: Any, called: str, inputs: Sequence[Any]) -> None:
    """Raises PrepareError, naming what is `called`, where processes gave different values for one of these inputs without a batch dim.

    Every process must call it, for inputs of the same number and shapes.
    """
    for array in inputs:
        if differing := _differing(collectives, [array]):
            first, second = differing
            raise PrepareError(
                f"processes {first} and {second} gave {called} different values for {array.dtype.name} of shape {array.shape}, and its"
                " program spans all processes: an input without a batch dim has one value in it",
                "give all processes the same value, give it one entry per sample as part of the batch, or use a mesh without tensor and"
                ' sequence and partitioning="pmap", where each process may have its own',
            )


def _differing(collectives: Any, arrays: Sequence[jax.Array], sharing: int | None = None) -> tuple[int, int] | None:
    """Two processes (of each `sharing` neighbours) that hold different values of one piece; None where all copies are alike."""
    mine = [
        [number, [index.start or 0 for index in shard.index], _sum_of(np.asarray(shard.data))]
        for number, array in enumerate(map(words, arrays))
        for shard in array.addressable_shards
    ]
    first: dict[Any, tuple[int, int]] = {}
    for process, pieces in enumerate(collectives.all_gather_object(mine)):
        for number, start, checksum in pieces:
            known = first.setdefault((process // sharing if sharing else 0, number, *start), (process, checksum))
            if known[1] != checksum:
                return known[0], process
    return None


def _sum_of(host: Any) -> int:
    return crc32(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
