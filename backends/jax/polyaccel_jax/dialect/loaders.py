"""Loaders of flax scripts: anything that yields batches, grain's loaders and datasets, and loaders that a bridge cuts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import jax
import numpy as np

from polyaccel import trees
from polyaccel.data import DataSharding, GlobalRows, PreparedLoader, prepared_loader, refuse_prepared
from polyaccel.errors import PrepareError
from polyaccel.protocols import LoaderSpec

Leaves = list[Any]


def prepare(loader: Any, spec: LoaderSpec, engine: Any) -> PreparedLoader:
    """A PreparedLoader of this process's share of every global batch.

    `loader` is a HostLoader of a bridge, a grain loader or dataset, or any iterable of batches (trees of numpy or jax arrays
    with the batch as dim 0). Raises PrepareError for a loader that was prepared before.
    """
    refuse_prepared(loader)
    plan = engine.plan
    sharding = DataSharding(
        num_shards=plan.num_data_shards,
        first_shard=plan.first_data_shard,
        num_local_shards=plan.num_local_data_shards,
        split_batches=spec.split_batches,
        even_batches=spec.even_batches,
    )
    if hasattr(loader, "shard") and hasattr(loader, "loader"):  # a HostLoader
        topology = engine.topology
        host = loader.shard(
            sharding,
            spec=spec,
            exchange=engine.collectives.all_gather_object if topology.num_processes > 1 else None,
            process_index=topology.process_index,
        )
    else:
        host = HostIterable(loader, sharding)
    wants_64bit = spec.lift is not None  # batches of a torch script keep int64

    def place(batch: Any) -> Any:
        with engine.dtypes(wants_64bit):
            return place_batch(batch, engine)

    return prepared_loader(host, place=place, lift=spec.lift, observer=engine.gradient_state)


def place_batch(batch: Any, engine: Any) -> Any:
    """The batch with its arrays on the mesh; leaves that are no arrays stay."""
    leaves, structure = trees.flatten(batch)
    positions = [index for index, leaf in enumerate(leaves) if is_array(leaf)]
    placed = engine.place([to_array(leaves[index]) for index in positions])
    for index, array in zip(positions, placed, strict=True):
        leaves[index] = array
    return structure.unflatten(leaves)


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a batch can be put on a device."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        return False
    return not isinstance(dtype, np.dtype) or dtype.kind in "biufcV"


def to_array(leaf: Any) -> Any:
    """A jax or numpy array of any framework's host array, without a copy where that is possible."""
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    try:
        return np.asarray(leaf)
    except TypeError:  # a dtype that numpy lacks (bfloat16)
        return jax.dlpack.from_dlpack(leaf)


class HostIterable:
    """HostBatches of an iterable that yields batches: every process reads all of it and keeps its own part.

    Without `split_batches` a batch is one data shard's and `num_shards` of them are a global batch; with it a batch is the
    global batch and is cut. The size of the first batch is the size that a short one is completed to.
    """

    def __init__(self, loader: Iterable[Any], sharding: DataSharding) -> None:
        if not hasattr(loader, "__iter__"):
            raise PrepareError(
                f"a {type(loader).__name__} cannot be iterated over",
                "pass an iterable of batches: trees of numpy arrays",
            )
        self.loader = loader
        self.sharding = sharding
        self.batch_size: int | None = None  # known from the first batch on
        self.seed: int | None = None

    @property
    def total_batch_size(self) -> int | None:
        """Samples in a full global batch; None before the first batch was read."""
        return self.sharding.total_batch_size(self.batch_size)

    @property
    def _group(self) -> int:
        return 1 if self.sharding.split_batches else self.sharding.num_shards

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} has no length")
        return -(-len(self.loader) // self._group)

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch to the loader, if it takes one."""
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)

    def read(self, skip: int = 0, seed: int | None = None) -> Iterator[tuple[Any, GlobalRows | None]]:
        """One pass from global batch `skip` on: (this process's part, its GlobalRows or None)."""
        cut = self.sharding
        stream = iter(self.loader)
        first: Leaves | None = None
        number = 0
        while group := list(itertools.islice(stream, self._group)):
            flat = [trees.flatten(batch) for batch in group]
            structure = flat[0][1]
            sizes = [_num_samples(leaves) for leaves, _ in flat]
            if first is None:
                self.batch_size = sizes[0]
                cut.check(self.batch_size)
                first = _joined([leaves for leaves, _ in flat], sizes)
            number += 1
            if number <= skip:
                continue
            total = cut.total_batch_size(self.batch_size) or 0
            is_whole = sum(sizes) == total and len(set(sizes)) == 1
            if is_whole and cut.num_local_shards == cut.num_shards and len(group) == 1:
                yield group[0], None
                continue
            leaves = _joined([one for one, _ in flat], sizes)
            num_real = size = sum(sizes)
            if size < total and cut.even_batches and cut.num_shards > 1:
                leaves, size = _completed(leaves, first, size, total), total
            part = total // cut.num_shards
            rows = cut.rows(
                [max(0, min(part, size - shard * part)) for shard in range(cut.num_shards)], num_real, self.batch_size
            )
            start, stop = cut.first_shard * part, (cut.first_shard + cut.num_local_shards) * part
            if start >= size:
                continue
            yield structure.unflatten([_rows(leaf, size, start, min(stop, size)) for leaf in leaves]), rows


def _num_samples(leaves: Sequence[Any]) -> int:
    for leaf in leaves:
        if is_array(leaf) and len(leaf.shape):
            return int(leaf.shape[0])
    raise PrepareError(
        "a batch of the loader has no array with a dim", "yield trees of arrays whose dim 0 is the batch"
    )


def _joined(batches: list[Leaves], sizes: list[int]) -> Leaves:
    """The leaves of several batches as one: arrays that carry the batch are concatenated, others are those of the first."""
    if len(batches) == 1:
        return batches[0]
    joined = []
    for column in zip(*batches, strict=True):
        carries = all(
            is_array(leaf) and leaf.shape and leaf.shape[0] == size for leaf, size in zip(column, sizes, strict=True)
        )
        joined.append(np.concatenate([np.asarray(leaf) for leaf in column]) if carries else column[0])
    return joined


def _completed(leaves: Leaves, first: Leaves, size: int, total: int) -> Leaves:
    """`leaves` of `size` samples, filled up to `total` by going through the first global batch, as often as needed."""

    def one(leaf: Any, beginning: Any) -> Any:
        if not (is_array(leaf) and leaf.shape and leaf.shape[0] == size):
            return leaf
        rows = np.arange(total - size) % beginning.shape[0]
        return np.concatenate([np.asarray(leaf), np.asarray(beginning)[rows]])

    return [one(leaf, beginning) for leaf, beginning in zip(leaves, first, strict=True)]


def _rows(leaf: Any, size: int, start: int, stop: int) -> Any:
    is_cut = is_array(leaf) and len(leaf.shape) and leaf.shape[0] == size and (start, stop) != (0, size)
    return leaf[start:stop] if is_cut else leaf
