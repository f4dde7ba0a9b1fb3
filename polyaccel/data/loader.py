"""The loader that user code iterates over on every engine: it knows the last batch before the body runs, and starts transfers ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from polyaccel.errors import PrepareError


class HostBatches(Protocol):
    """What `HostLoader.shard` gives: this process's part of every global batch, in host memory.

    `loader` is the user's own loader; a `PreparedLoader` shows its attributes. `batch_size` is the loader's, `total_batch_size`
    that of a full global batch; None where they are unknown. `seed`: what the order of the current pass was drawn from, None
    where the order has no single seed.
    """

    loader: Any
    batch_size: int | None
    total_batch_size: int | None

    @property
    def seed(self) -> int | None: ...

    def __len__(self) -> int:
        """Batches in a pass. Raises TypeError when that cannot be known."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch to whatever decides the order; called before every pass."""
        ...

    def read(self, skip: int = 0, seed: int | None = None) -> Iterator[tuple[Any, int]]:
        """One pass from batch `skip` on: (host batch, remainder); with `seed`, in the order of the pass that had this seed.

        `remainder` is the number of real samples of the global batch if it was completed with repeated samples or is short,
        else -1; real samples come first in shard order.
        """
        ...


class LoaderObserver(Protocol):
    """Told when a loader is being iterated over; gradient accumulation asks it for the end of the data."""

    def loader_started(self, loader: PreparedLoader) -> None: ...
    def loader_finished(self, loader: PreparedLoader) -> None: ...


@dataclass(frozen=True, slots=True)
class LoaderState:
    """Where a loader stands: `batch` batches of pass `epoch` were handed out; `seed` is that of its order, None without one."""

    seed: int | None
    epoch: int
    batch: int


class PreparedLoader:
    """Iterates over this process's share of every global batch, placed on the engine's devices.

    `place(host_batch)` starts the transfer of a batch and is called up to `prefetch` batches ahead of the body of the loop;
    `lift(host_batch, placed_batch)` is called when the batch is handed out and makes what user code sees. While the body of the
    last batch runs, `end_of_dataloader` is True. `remainder` is the number of real samples in the current global batch if it was
    completed with repeated samples or is short, else -1. `dataset`, `sampler`, `collate_fn` and whatever else the user's own
    loader has can be read here too.
    """

    def __init__(
        self,
        host: HostBatches,
        *,
        place: Callable[[Any], Any] | None = None,
        lift: Callable[[Any, Any], Any] | None = None,
        observer: LoaderObserver | None = None,
        prefetch: int = 2,
        skip: int = 0,
    ) -> None:
        if prefetch < 1:
            raise ValueError(f"prefetch={prefetch}: at least one batch must be read ahead to know the last one")
        self.end_of_dataloader = False
        self.remainder = -1
        self._host = host
        self._place = place
        self._lift = lift
        self.before_batch: list[Callable[[], None]] = []  # called whenever the loop asks for a batch
        self._observer = observer
        self._prefetch = prefetch
        self._skip = skip  # of every pass
        self._resume: LoaderState | None = None  # of the next pass only
        self._epoch = 0
        self._batch = 0

    @property
    def total_batch_size(self) -> int | None:
        """Samples in a full global batch, None if unknown."""
        return self._host.total_batch_size

    @property
    def state(self) -> LoaderState:
        """The position, with all batches handed out so far counted as done."""
        return LoaderState(seed=self._host.seed, epoch=self._epoch, batch=self._batch)

    def load_state(self, state: LoaderState) -> None:
        """Continue at this position: the next pass is pass `epoch`, in the order of `seed`, and begins with batch number `batch`."""
        self._epoch, self._batch, self._resume = state.epoch, state.batch, state

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next pass; it reaches batch sampler, sampler and dataset. Full passes count it up themselves."""
        self._epoch = epoch
        self._host.set_epoch(epoch)

    def skipping(self, num_batches: int) -> PreparedLoader:
        """A loader over the same data whose passes leave out the first `num_batches` global batches."""
        loader = PreparedLoader(
            self._host,
            place=self._place,
            lift=self._lift,
            observer=self._observer,
            prefetch=self._prefetch,
            skip=self._skip + num_batches,
        )
        loader._epoch, loader.before_batch = self._epoch, self.before_batch
        return loader

    def __len__(self) -> int:
        return max(len(self._host) - self._skip, 0)

    def __getattr__(self, name: str) -> Any:
        # Only reached for what is not an attribute of this class: the rest is the user's loader as it was.
        if name.startswith("__") or name == "_host":
            raise AttributeError(name)
        return getattr(self._host.loader, name)

    def __repr__(self) -> str:
        return f"PreparedLoader({self._host.loader!r}, total_batch_size={self.total_batch_size})"

    def __iter__(self) -> Iterator[Any]:
        resume, self._resume = self._resume, None
        start, seed = (self._skip, None) if resume is None else (resume.batch, resume.seed)
        self._batch = start
        self.end_of_dataloader, self.remainder = False, -1
        place, lift, ahead = self._place, self._lift, self._prefetch
        ready: deque[tuple[Any, Any, int]] = deque()
        self._host.set_epoch(self._epoch)
        source = self._host.read(start, seed)
        if self._observer is not None:
            self._observer.loader_started(self)
        try:
            is_exhausted = False
            while True:
                for call in self.before_batch:
                    call()
                while not is_exhausted and len(ready) <= ahead:
                    item = next(source, None)
                    if item is None:
                        is_exhausted = True
                    else:
                        host, remainder = item
                        ready.append((host, host if place is None else place(host), remainder))
                if not ready:
                    break
                host, placed, self.remainder = ready.popleft()
                self.end_of_dataloader = is_exhausted and not ready
                self._batch += 1
                yield placed if lift is None else lift(host, placed)
                host = placed = None  # the consumer owns the batch: do not keep its memory while the next one is made
            self._epoch += 1
            self._batch = 0
        finally:  # also when the body breaks, raises or the generator is dropped
            if self._observer is not None:
                self._observer.loader_finished(self)


def refuse_prepared(loader: Any) -> None:
    """Raises PrepareError for a loader that prepare has returned: cutting it again would lose samples."""
    if isinstance(loader, PreparedLoader):
        raise PrepareError(
            f"this loader was prepared already: {loader!r}",
            "pass the loader that you built, once, and use what prepare returned",
        )
