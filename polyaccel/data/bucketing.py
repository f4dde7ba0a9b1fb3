"""Ragged samples in few shapes: padded to the next bucket, with a mask that keeps every mean exact. No framework is imported.

A compiling engine makes one program per shape. Here there are at most as many shapes as buckets, the last short batch included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polyaccel.errors import PrepareError

if TYPE_CHECKING:
    from polyaccel.data.loader import PreparedLoader
    from polyaccel.data.sharding import GlobalRows

Key = str | int

IGNORED_LABEL = -100  # what torch's cross_entropy and transformers leave out of a mean


def multiples(of: int, largest: int) -> tuple[int, ...]:
    """The multiples of `of` up to the first one that is not below `largest`: `multiples(64, 150)` is (64, 128, 192)."""
    _check_positive("multiples", of, largest)
    return tuple(range(of, largest + of, of))


def powers(smallest: int, largest: int, base: float = 2.0) -> tuple[int, ...]:
    """`smallest`, then each `base` times the one before (rounded up) until one is not below `largest`: few buckets for a wide range."""
    _check_positive("powers", smallest, largest)
    if base <= 1:
        raise PrepareError(f"powers of {base} do not grow", "choose a base above 1, such as 2 or 1.5")
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(max(sizes[-1] + 1, -int(-sizes[-1] * base // 1)))
    return tuple(sizes)


def _check_positive(name: str, first: int, last: int) -> None:
    if first < 1 or last < 1:
        raise PrepareError(f"{name}({first}, {last}) has no positive sizes", "give positive sizes")


class Bucketing:
    """A collate function: stacks samples (dicts, tuples or lone arrays), padded along `dim` to the next size of `sizes`.

    Args:
        sizes: the buckets. Empty: nothing is ragged, and only the batch is completed.
        dim: the ragged dim of a sample, counted without the batch dim.
        ragged: names (of a dict) or positions (of a tuple) that are padded; None: every array that has the dim.
        pad_values: by name or position, what is written where there is no data; 0 where nothing is said, and -100 for "labels".
        batch_size: complete shorter batches (the last one, with drop_last=False) to this many rows. For one data shard this is the
            loader's batch_size, for n of them in one process n times that. Rows that are added repeat the first sample, so that
            nothing that a model computes of them is infinite, with `pad_values` in what has an entry there. The mask leaves them
            out; running statistics of a BatchNorm cannot.
        mask: the name of the mask in a dict of arrays; in a tuple it comes last.
        convert: makes what is given from each numpy array, for example `torch.from_numpy`. Samples that are torch tensors are
            stacked as such and are not converted.

    The mask is boolean, True for data: shape (batch, bucket), or (batch,) where nothing is ragged. An `attention_mask` in the
    samples is padded with 0 as any other array. Raises PrepareError for a sample that is longer than the largest bucket.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (),
        *,
        dim: int = 0,
        ragged: Sequence[Key] | None = None,
        pad_values: Mapping[Key, Any] | None = None,
        batch_size: int | None = None,
        mask: str = "mask",
        convert: Callable[[Any], Any] | None = None,
    ) -> None:
        if any(size < 1 for size in sizes):
            raise PrepareError(f"buckets {list(sizes)} are no sizes", "give positive sizes")
        if dim < 0:
            raise PrepareError(
                f"dim={dim} counts from the end, where samples differ", "count from 0, without the batch dim"
            )
        self.sizes = tuple(sorted(set(sizes)))
        self.dim = dim
        self.ragged = None if ragged is None else frozenset(ragged)
        self.pad_values: dict[Key, Any] = {"labels": IGNORED_LABEL, **(pad_values or {})}
        self.batch_size = batch_size
        self.mask = mask
        self.convert = convert

    def size(self, length: int) -> int:
        """The bucket of a length: the smallest size that holds it."""
        for size in self.sizes:
            if size >= length:
                return size
        raise PrepareError(
            f"a sample is {length} long in dim {self.dim}, and the largest bucket is {self.sizes[-1]}",
            "add a larger bucket, or cut the sample in the dataset",
        )

    def __call__(self, samples: Sequence[Any]) -> Any:
        """The batch of these samples, in their structure, with the mask."""
        if not samples:
            raise PrepareError("a batch of no samples has no shapes", "leave empty batches out")
        rows = [_named(sample) for sample in samples]
        keys = list(rows[0])
        for row in rows:
            if list(row) != keys:
                raise PrepareError(
                    f"samples hold {keys} and {list(row)}", "give every sample of a batch the same entries"
                )
        ragged = [key for key in keys if self._is_ragged(key, rows[0][key])] if self.sizes else []
        lengths = [self._length(row, ragged, number) for number, row in enumerate(rows)]
        bucket = self.size(max(lengths)) if ragged else None
        num_rows = self._num_rows(len(rows))
        batch = {
            key: self._stacked(key, [row[key] for row in rows], bucket if key in ragged else None, num_rows)
            for key in keys
        }
        return self._with_mask(samples[0], batch, lengths, bucket, num_rows)

    def batches(self, samples: Iterable[Any], batch_size: int, *, drop_last: bool = False) -> Iterator[Any]:
        """Batches of any iterable of samples, in its order."""
        held: list[Any] = []
        for sample in samples:
            held.append(sample)
            if len(held) == batch_size:
                yield self(held)
                held = []
        if held and not drop_last:
            yield self(held)

    def _is_ragged(self, key: Key, value: Any) -> bool:
        return key in self.ragged if self.ragged is not None else len(_shape(value)) > self.dim

    def _length(self, row: Mapping[Key, Any], ragged: Sequence[Key], number: int) -> int:
        lengths = {key: _shape(row[key])[self.dim] for key in ragged}
        if len(set(lengths.values())) > 1:
            raise PrepareError(
                f"sample {number} is {lengths} long in dim {self.dim}",
                "name what is padded together: Bucketing(ragged=[...])",
            )
        return next(iter(lengths.values()), 0)

    def _num_rows(self, num_samples: int) -> int:
        if self.batch_size is not None and num_samples > self.batch_size:
            raise PrepareError(
                f"a batch has {num_samples} samples, and Bucketing(batch_size={self.batch_size}) has fewer rows",
                "give it the samples of all data shards of a process: batch_size times their number",
            )
        return self.batch_size or num_samples

    def _stacked(self, key: Key, values: list[Any], bucket: int | None, num_rows: int) -> Any:
        import numpy as np

        fill = self.pad_values.get(key, 0)
        is_tensor = hasattr(values[0], "new_full")  # a torch tensor
        arrays: list[Any] = values if is_tensor else [np.asarray(value) for value in values]
        shape = list(arrays[0].shape)
        if bucket is not None:
            shape[self.dim] = bucket
        size = (num_rows, *shape)
        stacked = arrays[0].new_full(size, fill) if is_tensor else np.full(size, fill, np.result_type(*arrays))
        repeated = 0 if key in self.pad_values else num_rows - len(arrays)
        for number, array in enumerate([*arrays, *[arrays[0]] * repeated]):
            place: list[Any] = [number] + [slice(None)] * len(shape)
            if bucket is not None:
                place[1 + self.dim] = slice(array.shape[self.dim])
            stacked[tuple(place)] = array
        return stacked if is_tensor or self.convert is None else self.convert(stacked)

    def _with_mask(
        self, sample: Any, batch: dict[Key, Any], lengths: list[int], bucket: int | None, num_rows: int
    ) -> Any:
        import numpy as np

        mask: Any = np.zeros((num_rows,) if bucket is None else (num_rows, bucket), bool)
        for number, length in enumerate(lengths):
            mask[number] = True if bucket is None else np.arange(bucket) < length
        if self.convert is not None:
            mask = self.convert(mask)
        else:
            tensor = next((value for value in batch.values() if hasattr(value, "new_tensor")), None)
            mask = mask if tensor is None else tensor.new_tensor(mask.tolist(), dtype=tensor.bool().dtype)
        if isinstance(sample, Mapping):
            if self.mask in batch:
                raise PrepareError(f"the samples already hold {self.mask!r}", "name the mask: Bucketing(mask=...)")
            return {**batch, self.mask: mask}
        return (*batch.values(), mask)


def _named(sample: Any) -> Mapping[Key, Any]:
    if isinstance(sample, Mapping):
        return sample
    return dict(enumerate(sample if isinstance(sample, tuple) else (sample,)))


def _shape(value: Any) -> tuple[int, ...]:
    import numpy as np

    return tuple(np.shape(value))


# -- the mean ----------------------------------------------------------------------------------------------------------------


def masked_mean(losses: Any, mask: Any, per_sample: Any = None) -> Any:
    """The mean of `losses` over what `mask` says is data: `(losses * mask).sum() / mask.sum()`, for arrays of any framework.

    `losses` and `mask` have the same shape, samples first. That is exact where the loss sees all data of an update: one micro
    batch, on one data shard or in a program over the global batch. The mean of several such means is not the mean of all
    elements: a shard with three words would weigh as much as one with three hundred. Pass the `per_sample` that `counted`
    gives, and the mean over shards and micro batches, which every engine takes, is the mean over all their elements.
    """
    return (losses * mask).sum() / (mask.sum() if per_sample is None else per_sample * mask.shape[0])


def counted(loader: PreparedLoader, accelerator: Any, mask: Key = "mask") -> Iterator[tuple[Any, float]]:
    """`(batch, per_sample)` of a prepared loader: how many elements `mask` holds per sample, on average over one update.

    The batches of an update share their elements, so `gradient_accumulation_steps` of them are held at a time. Every process of
    the job must iterate, and all data shards must have as many samples (even_batches, or `Bucketing(batch_size=...)`). With
    `masked_mean(losses, mask, per_sample)` as the loss, gradients are those of the mean over all elements of the update: on
    every engine, in each form of a step, on any number of shards, in a window that the end of the data cuts short too.
    """
    batches = iter(loader)
    while True:
        window: list[tuple[Any, bool, GlobalRows | None]] = []
        while len(window) < accelerator.gradient_accumulation_steps:
            batch = next(batches, None)
            if batch is None:
                break
            window.append((batch, loader.end_of_dataloader, loader.rows))
            if loader.end_of_dataloader:
                break
        if not window:
            return
        total, num_parts = float(sum(float(batch[mask].sum()) for batch, _, _ in window)), 1
        # The mask of a global array is that of all processes already.
        if accelerator.num_processes > 1 and getattr(window[0][0][mask], "is_fully_addressable", True):
            total, num_parts = float(sum(accelerator.gather_object([total]))), accelerator.num_processes
        # What the accelerator divides this window by.
        steps = len(window) if accelerator.gradient_state.scales_tail else accelerator.gradient_accumulation_steps
        for batch, is_last, rows in window:
            # Accumulation asks the loader whether this is the end of the data: it is that for the last batch of the window alone.
            loader.end_of_dataloader, loader.rows = is_last, rows
            num_samples = batch[mask].shape[0] * num_parts
            yield batch, total / (steps * num_samples)
