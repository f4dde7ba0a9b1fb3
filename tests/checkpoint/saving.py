"""What the tests of checkpoints save and compare: small arrays of several dtypes, plain values, and processes that are threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyaccel.checkpoint import Contents, Saved, begin_checkpoint, open_checkpoint, write_checkpoint
from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard


def whole(name: str, array: np.ndarray, dtype: str | None = None) -> Shard:
    """The array as one piece; `dtype` says what its bits are where numpy has no such dtype."""
    return Shard(name, array.shape, (0,) * array.ndim, dtype or array.dtype.name, array)


def cut(name: str, array: np.ndarray, box: Sequence[slice]) -> Shard:
    """One piece of an array."""
    return Shard(name, array.shape, tuple(part.start for part in box), array.dtype.name, array[tuple(box)])


def contents(seed: int = 0) -> Contents:
    """A model and an optimizer of 1.5 KB, and values of every kind. Another seed gives other numbers in the same shapes."""
    rng = np.random.default_rng(seed)
    model = [
        whole("layer.weight", rng.standard_normal((4, 3)).astype(np.float32)),
        whole("layer.bias", rng.integers(0, 2**16, 5, dtype=np.uint16), "bfloat16"),
        whole("mask", rng.integers(0, 2, (2, 2)).astype(bool)),
        whole("seen", np.array(seed, np.int64)),
        whole("nothing", np.zeros((0, 7), np.float16)),
    ]
    optimizer = [whole("layer.weight.exp_avg", rng.standard_normal((4, 3)).astype(np.float32))]
    return Contents(
        {"model": model, "optimizer": optimizer, "custom_0": []},
        {"step": seed, "scheduler_0": {"last_lr": [0.1 * seed], "best": float("inf")}},
        {"python": (3, tuple(range(seed, seed + 5)), None)},
    )


def save(
    folder: str | Path, what: Contents | None = None, *, replace: bool = False, facts: Mapping[str, Any] = {}
) -> str:
    """Save as the only process of a job."""
    attempt = begin_checkpoint(folder, replace=replace)
    return write_checkpoint(
        folder,
        what or contents(),
        attempt=attempt,
        process_index=0,
        num_processes=1,
        facts=facts,
        replace=replace,
    )


def save_together(folder: str | Path, shares: Sequence[Contents], **options: Any) -> list[BaseException | str]:
    """Save as a job of several processes, each a thread: what each returned or raised."""
    attempt = begin_checkpoint(folder)
    results: list[BaseException | str] = [""] * len(shares)

    def process(index: int) -> None:
        try:
            results[index] = write_checkpoint(
                folder,
                shares[index],
                attempt=attempt,
                process_index=index,
                num_processes=len(shares),
                facts={},
                **options,
            )
        except (CheckpointError, OSError) as error:
            results[index] = error

    threads = [threading.Thread(target=process, args=(index,)) for index in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def bits(saved: Saved) -> dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """Every array of a checkpoint, put together from its pieces: dtype, shape, bytes."""
    found: dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]] = {}
    for group in saved.groups:
        arrays: dict[str, np.ndarray] = {}
        for shard in saved.shards(group):
            target = arrays.setdefault(shard.name, np.zeros(shard.global_shape, shard.data.dtype))
            target[tuple(slice(start, start + size) for start, size in zip(shard.offset, shard.data.shape))] = (
                shard.data
            )
        dtypes = saved.arrays(group)
        found[group] = {name: (dtypes[name][0], array.shape, array.tobytes()) for name, array in arrays.items()}
    return found


def given(what: Contents) -> dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """The same of what was saved in whole arrays."""
    return {
        group: {shard.name: (shard.dtype, shard.global_shape, np.asarray(shard.data).tobytes()) for shard in shards}
        for group, shards in what.groups.items()
    }


def holds(folder: str | Path, what: Contents) -> bool:
    """Whether a verified checkpoint holds exactly this."""
    saved = open_checkpoint(folder)
    return (bits(saved), saved.shared, saved.own(0)) == (given(what), what.shared, what.own)


def listing(folder: str | Path) -> set[str]:
    """All names below a folder."""
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}
