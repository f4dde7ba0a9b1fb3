"""The loader that user code iterates over on every engine: it knows the last batch before the body runs, and starts transfers ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from polyaccel import generators
from polyaccel.data.read_ahead import read_ahead
from polyaccel.data.sharding import GlobalRows
from polyaccel.errors import CheckpointError, PrepareError, UnsupportedError


class HostBatches(Protocol):
    """What `HostLoader.shard` gives: this process's part of every global batch, in host memory.

    `loader` is the user's own loader; a `PreparedLoader` shows its attributes. `batch_size` is the loader's, `total_batch_size`
    that of a full global batch; None where they are unknown. `seed`: what the order of the current pass was drawn from, None
    where the order has no single seed.

    Some have more, which is used where it is there. Random generators of their own: `read_generators() -> tuple[bytes, ...]` and
    `write_generators(states)`. A source that knows where it stands: `knows_position` True, `hand_out()` called when the next batch
    that was read is in use, `source_state() -> bytes | None` after it, and `resume_source(state, num_batches)`, which lets the next
    `read` go on from there. A class for what user code gets, a PreparedLoader: `prepared_type`. `is_collective` True: `read` talks to
    other processes.
    """

    loader: Any
    batch_size: int | None

    @property
    def total_batch_size(self) -> int | None: ...

    @property
    def seed(self) -> int | None: ...

    def __len__(self) -> int:
        """Batches in a pass. Raises TypeError when that cannot be known."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch to whatever decides the order; called before every pass."""
        ...

    def read(self, skip: int = 0, seed: int | None = None) -> Iterator[tuple[Any, GlobalRows | None]]:
        """One pass from batch `skip` on: (host batch, rows); with `seed`, in the order of the pass that had this seed.

        `rows` says which rows of the global batch are real samples; None where all are and every process holds as many.
        """
        ...


class LoaderObserver(Protocol):
    """Told when a loader is being iterated over; gradient accumulation asks it for the end of the data."""

    def loader_started(self, loader: PreparedLoader) -> None: ...
    def loader_finished(self, loader: PreparedLoader) -> None: ...


@dataclass(frozen=True, slots=True)
class LoaderState:
    """Where a loader stands: `batch` batches of pass `epoch` were handed out; `seed` is that of its order, None without one.

    `start` holds the host's generators, and the loader's own, as they were when the pass began: an order without a seed is drawn
    again from them. `own` holds the loader's own as they are now. `source` is what a source that knows where it stands says of
    itself; it takes the place of skipping `batch` batches.
    """

    seed: int | None
    epoch: int
    batch: int
    batch_size: int | None = field(default=None, compare=False)
    total_batch_size: int | None = field(default=None, compare=False)
    start: Mapping[str, Any] | None = field(default=None, compare=False)
    own: tuple[bytes, ...] = field(default=(), compare=False)
    source: bytes | None = field(default=None, compare=False)


@dataclass(slots=True)
class _Position:
    """What a loader and the loaders made of it by `skipping` share."""

    epoch: int = 0
    batch: int = 0
    resume: LoaderState | None = None  # of the next pass only
    start: Mapping[str, Any] | None = None  # generators at the start of the running pass
    running: object = None  # the latest pass


class PreparedLoader:
    """Iterates over this process's share of every global batch, placed on the engine's devices.

    `place(host_batch)` starts the transfer of a batch and is called `prefetch` batches ahead of the body of the loop (0: when the
    batch is handed out); with `in_background` a thread reads the host batches (see `read_ahead`). `lift(host_batch,
    placed_batch)` is called when the batch is handed out and makes what user code sees. While the body of the last batch runs,
    `end_of_dataloader` is True. `rows` says which rows of the current global batch are real, None where all are; `remainder` is
    their number, else -1. `is_one_program`: the processes run one program, so that a global batch of which they hold different
    numbers of rows is an UnsupportedError. `dataset`, `sampler`, `collate_fn` and whatever else the user's own loader has can be
    read here too.
    """

    _is_accelerate_prepared = True  # Accelerate's mark of what has been through prepare

    def __init__(
        self,
        host: HostBatches,
        *,
        place: Callable[[Any], Any] | None = None,
        lift: Callable[[Any, Any], Any] | None = None,
        observer: LoaderObserver | None = None,
        prefetch: int = 2,
        in_background: bool = False,
        is_one_program: bool = False,
        skip: int = 0,
    ) -> None:
        if prefetch < 0:
            raise ValueError(f"prefetch={prefetch} is no number of batches")
        if in_background and getattr(host, "is_collective", False):
            raise UnsupportedError(
                "read_in_background=True, and process 0 reads this loader for all: processes can only talk on the script's thread",
                "set dispatch_batches=False, so that every process reads, or leave read_in_background out",
            )
        self.end_of_dataloader = self.is_exhausted = False
        self.rows: GlobalRows | None = None
        self._host = host
        self._place = place
        self._lift = lift
        self.before_batch: list[Callable[[PreparedLoader], None]] = []  # called whenever a loop asks for a batch
        self._observer = observer
        self._prefetch = prefetch
        self._in_background = in_background
        self._is_one_program = is_one_program
        self._skip = skip  # of every pass
        self._position = _Position()
        self._knows_position = getattr(host, "knows_position", False)

    @property
    def remainder(self) -> int:
        """Real samples in the current global batch if it was completed with repeated samples or is short, else -1."""
        return -1 if self.rows is None else self.rows.num_real

    @property
    def cut(self) -> Any:
        """What completes its last global batch where its `even_batches`, which can be set, is True; None where that is fixed."""
        for part in (getattr(self._host, "batch_sampler", None), self._host):
            if hasattr(part, "even_batches"):
                return part
        return None

    @property
    def total_batch_size(self) -> int | None:
        """Samples in a full global batch, None if unknown."""
        return self._host.total_batch_size

    @property
    def num_handed_out(self) -> int:
        """How many batches of the running pass were handed out, those that it skipped included."""
        return self._position.batch

    @property
    def epoch(self) -> int:
        """The number of the pass that runs, or of the next one: where a training loop goes on after `load_state`."""
        return self._position.epoch

    @property
    def state(self) -> LoaderState:
        """The position, with all batches handed out so far counted as done."""
        position = self._position
        if position.resume is not None:
            return replace(
                position.resume,
                batch_size=self._host.batch_size,
                total_batch_size=self.total_batch_size,
                own=self._own_generators(),
            )
        return LoaderState(
            seed=self._host.seed if position.batch else None,
            epoch=position.epoch,
            batch=position.batch,
            batch_size=self._host.batch_size,
            total_batch_size=self.total_batch_size,
            start=position.start if position.batch else None,
            own=self._own_generators(),
            source=self._host.source_state() if self._knows_position and position.batch else None,  # type: ignore[attr-defined]
        )

    def load_state(self, state: LoaderState) -> None:
        """Continue at this position: the next pass is pass `epoch`, in the order of `seed`, and begins with batch number `batch`.

        With another global batch size the position is that of the same sample. Raises CheckpointError where no batch begins there.
        """
        batch = self.batch_of(state)
        position = self._position
        position.epoch, position.batch, position.start = state.epoch, batch, None
        is_cut_alike = state.batch_size in (None, self._host.batch_size) and batch == state.batch
        source = state.source if is_cut_alike else None
        position.resume = (
            LoaderState(state.seed, state.epoch, batch, start=state.start, source=source) if batch else None
        )
        write = getattr(self._host, "write_generators", None)
        if write is not None and state.own:
            write(state.own)

    def check_state(self, state: LoaderState) -> None:
        """Raises CheckpointError where `load_state` would. Changes nothing."""
        self.batch_of(state)
        if len(state.own) != len(self._own_generators()):
            raise CheckpointError(
                f"a loader was saved with {len(state.own)} random generators of its own and has {len(self._own_generators())}",
                "build the loader and its sampler with the generators that they were saved with",
            )

    def batch_of(self, state: LoaderState) -> int:
        """The number of this loader's batch that begins where a saved position is. Raises CheckpointError where none does."""
        if self._host.batch_size is None and state.batch_size is not None:
            self._host.batch_size = state.batch_size  # a loader that learns it from its first batch
        before, now = state.total_batch_size, self.total_batch_size
        if before is None or now is None or before == now:
            return state.batch
        if state.batch * before % now:
            raise CheckpointError(
                f"the loader stood at sample {state.batch * before}, after {state.batch} global batches of {before}, and global batches"
                f" of {now} do not begin there",
                f"continue with a global batch size that divides {state.batch * before} (batch_size times the data shards), or with"
                " split_batches=True and the same batch_size",
            )
        return state.batch * before // now

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next pass; it reaches batch sampler, sampler and dataset. Full passes count it up themselves.

        A position to continue at is dropped where it is in another pass.
        """
        position = self._position
        if position.resume is not None and position.resume.epoch != epoch:
            position.resume, position.batch = None, 0
        position.epoch = epoch
        self._host.set_epoch(epoch)

    def skipping(self, num_batches: int) -> PreparedLoader:
        """A loader over the same data whose passes leave out the first `num_batches` global batches; passes of both count as one's.

        Before a pass that `load_state` continues, `num_batches` counts from that pass's start and takes the place of the saved
        position: what was skipped already is not skipped twice. A saved position at the very end of a pass, with `num_batches`
        0, means the next pass.
        """
        loader = type(self)(
            self._host,
            place=self._place,
            lift=self._lift,
            observer=self._observer,
            prefetch=self._prefetch,
            in_background=self._in_background,
            is_one_program=self._is_one_program,
            skip=self._skip + num_batches,
        )
        position, resume = self._position, self._position.resume
        if resume is not None:
            if not num_batches and self._is_at_end(resume.batch):
                position.resume, position.epoch, position.batch = None, resume.epoch + 1, 0
            else:
                position.batch = loader._skip
                source = resume.source if loader._skip == resume.batch else None
                position.resume = LoaderState(
                    resume.seed, resume.epoch, loader._skip, start=resume.start, source=source
                )
        loader._position, loader.before_batch = position, self.before_batch
        return loader

    def _is_at_end(self, batch: int) -> bool:
        try:
            return batch >= len(self._host)
        except TypeError:
            return False

    def _handed_out(self) -> None:
        self._host.hand_out()  # type: ignore[attr-defined]

    def _own_generators(self) -> tuple[bytes, ...]:
        read = getattr(self._host, "read_generators", None)
        return () if read is None else read()

    def _generators(self) -> Mapping[str, Any]:
        return {"host": generators.read(), "own": self._own_generators()}

    def _write_generators(self, state: Mapping[str, Any]) -> None:
        generators.write(state["host"])
        if state["own"]:
            self._host.write_generators(tuple(state["own"]))  # type: ignore[attr-defined]

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
        position, running = self._position, object()
        self.end_of_dataloader, self.rows, self.is_exhausted = False, None, False
        place, lift = self._place, self._lift
        ahead = max(1, self._prefetch)  # one host batch more than is handed out, to know the last one
        places_late = place is not None and not self._prefetch
        ready: deque[tuple[Any, Any, GlobalRows | None]] = deque()
        source: Iterator[tuple[Any, GlobalRows | None]] | None = None
        present: Mapping[str, Any] | None = None
        if self._observer is not None:
            self._observer.loader_started(self)
        try:
            is_exhausted = False
            while True:
                for call in self.before_batch:  # may save: nothing of this pass has begun then
                    call(self)
                if source is None:
                    source, present = self._begin()
                    position.running = running
                while not is_exhausted and len(ready) <= ahead:
                    item = next(source, None)
                    if item is None:
                        is_exhausted = True
                    else:
                        host, rows = item
                        if rows is not None and self._is_one_program:
                            _refuse_uneven(rows)
                        ready.append((host, host if place is None or places_late else place(host), rows))
                if present is not None:
                    self._write_generators(present)
                    present = None
                if not ready:
                    break
                host, placed, self.rows = ready.popleft()
                self.end_of_dataloader = is_exhausted and not ready
                if places_late and place is not None:
                    placed = place(host)
                position.batch += 1
                if self._knows_position:
                    self._handed_out()
                yield placed if lift is None else lift(host, placed)
                host = placed = None  # the consumer owns the batch: do not keep its memory while the next one is made
            position.epoch += 1
            self.rows, self.is_exhausted = None, True
        finally:  # also when the body breaks, raises or the generator is dropped
            if self._in_background and source is not None:
                source.close()  # type: ignore[attr-defined]  # a generator; its thread ends with it
            if position.running is running:
                position.batch, position.start = 0, None  # a pass that was left begins again
            if self._observer is not None:
                self._observer.loader_finished(self)

    def _begin(self) -> tuple[Iterator[tuple[Any, GlobalRows | None]], Mapping[str, Any] | None]:
        """The host batches of the next pass. A pass that is continued draws its order as it did before; the generators' present
        states, to be written back before its first batch is used, come second."""
        position = self._position
        resume, position.resume = position.resume, None
        start, seed = (self._skip, None) if resume is None else (resume.batch, resume.seed)
        present, to_restore = self._generators(), None
        position.batch, position.start = start, present
        if resume is not None and resume.start is not None:
            self._write_generators(resume.start)
            position.start, to_restore = resume.start, present
        self._host.set_epoch(position.epoch)
        if resume is not None and resume.source is not None and self._knows_position:
            self._host.resume_source(resume.source, start)  # type: ignore[attr-defined]
        source = self._host.read(start, seed)
        return read_ahead(source, self._prefetch, self._generators) if self._in_background else source, to_restore


def _refuse_uneven(rows: GlobalRows) -> None:
    if len(set(rows.held)) > 1:
        raise UnsupportedError(
            f"a global batch of {rows.num_real} samples gives the processes {', '.join(map(str, rows.held))} of them, and on this"
            " engine all processes run one program on equal parts",
            "use even_batches=True (gather_for_metrics still counts every sample once), or drop_last=True in the loader",
        )


def prepared_loader(host: HostBatches, **options: Any) -> PreparedLoader:
    """The PreparedLoader of these batches, of the class that they ask for; `options` are its arguments."""
    kind: type[PreparedLoader] = getattr(host, "prepared_type", PreparedLoader)
    return kind(host, **options)


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> PreparedLoader:
    """A prepared loader without the first `num_batches` batches of its passes (see `PreparedLoader.skipping`).

    Accelerate's name. Raises PrepareError for a loader that is not prepared.
    """
    if not isinstance(dataloader, PreparedLoader):
        raise PrepareError(
            f"skip_first_batches got a {type(dataloader).__name__} that is not prepared",
            "pass the loader that accelerator.prepare returned",
        )
    return dataloader.skipping(num_batches)


def refuse_prepared(loader: Any) -> None:
    """Raises PrepareError for a loader that prepare has returned: cutting it again would lose samples."""
    if isinstance(loader, PreparedLoader):
        raise PrepareError(
            f"this loader was prepared already: {loader!r}",
            "pass the loader that you built, once, and use what prepare returned",
        )
