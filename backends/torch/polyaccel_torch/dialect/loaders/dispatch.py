"""Process 0 reads a loader for all processes and sends each its part: for data that only one of them can read, or that is random."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from polyaccel.data import DataSharding, GlobalRows, PreparedLoader
from polyaccel.errors import PrepareError
from polyaccel_torch.dialect.loaders.order import Exchange
from polyaccel_torch.dialect.loaders.parcels import pack, unpack
from polyaccel_torch.dialect.loaders.stateful import to_bytes
from polyaccel_torch.dialect.loaders.streams import Parts

if TYPE_CHECKING:
    from polyaccel_torch.dialect.loaders.host import TorchHostBatches


class DispatchedBatches:
    """The host batches of one process, as process 0 sends them; see `polyaccel.data.HostBatches`. Every process must iterate.

    `source` reads the batches of all processes; only process 0's is iterated over. The samples and their places are those that
    every process would read for itself, and each process's batch is collated by itself, so they may differ in shape. An error of the
    reading is raised on every process.
    """

    is_collective = True  # `read` talks to the other processes: it belongs on the thread of the script

    def __init__(self, source: TorchHostBatches, sharding: DataSharding, exchange: Exchange, *, is_main: bool) -> None:
        self.loader = source.loader
        self.batch_size = source.batch_size
        self.total_batch_size = source.total_batch_size
        self.prepared_type: type[PreparedLoader] = source.prepared_type
        self._source = source
        self._sharding = sharding
        self._exchange = exchange
        self._is_main = is_main
        self._states: deque[Any] = deque()
        self.latest: Any = None

    @property
    def seed(self) -> int | None:
        """The seed of the current pass's order on process 0."""
        return self._source.seed

    @property
    def has_random_order(self) -> bool:
        """Whether a generator known here decides the order."""
        return self._source.has_random_order

    @property
    def source(self) -> Any:
        """The DataLoader that process 0 iterates over."""
        return self._source.source

    @property
    def batch_sampler(self) -> Any:
        """What chooses the indices on process 0."""
        return self._source.batch_sampler

    def __len__(self) -> int:
        return len(self._source)

    def set_epoch(self, epoch: int) -> None:
        """Reaches batch sampler, sampler and dataset, where they have `set_epoch`."""
        self._source.set_epoch(epoch)

    def read_generators(self) -> tuple[bytes, ...]:
        """The states of the generators that the user gave to the loader, its sampler or its dataset."""
        return self._source.read_generators()

    def write_generators(self, states: tuple[bytes, ...]) -> None:
        """Continue from states that `read_generators` gave."""
        self._source.write_generators(states)

    @property
    def knows_position(self) -> bool:
        """Whether the source says itself where it stands."""
        return self._source.knows_position

    def hand_out(self) -> None:
        """The next batch that was read is in use now."""
        self.latest = unpack(self._states.popleft())

    def source_state(self) -> bytes | None:
        """The source's own state on process 0 after the latest batch that was handed out."""
        return None if self.latest is None else to_bytes(self.latest)

    def resume_source(self, state: bytes, num_batches: int) -> None:
        """Let the next pass go on from a state that `source_state` gave."""
        self._source.resume_source(state, num_batches)

    def read(self, skip: int = 0, seed: int | None = None) -> Iterator[tuple[Any, GlobalRows | None]]:
        """One pass from batch `skip` on; see `HostBatches.read`."""
        self._states.clear()
        self.latest = None
        # Process 0's sampler draws its order when its first batch is asked for: then, not now.
        items = self._source.read(skip, seed) if self._is_main else iter(())
        return self._received(items)

    def _received(self, items: Iterator[tuple[Any, GlobalRows | None]]) -> Iterator[tuple[Any, GlobalRows | None]]:
        place = self._sharding.first_shard // self._sharding.num_local_shards
        while True:
            failure: Exception | None = None
            message: Any = None
            if self._is_main:
                try:
                    message = self._next_message(items)
                except Exception as error:  # noqa: BLE001 - the others wait for this batch: they are told first
                    failure, message = error, {"error": f"{type(error).__name__}: {error}"}
            message = self._exchange(message)[0]
            if message is None:
                return
            if failure is not None:
                raise failure
            if "error" in message:
                raise PrepareError(
                    f"process 0, which reads the data for all processes, failed: {message['error']}",
                    "see the error of process 0",
                )
            parts = message["parts"]
            if place < len(parts):
                if self.knows_position:
                    self._states.append(message["state"])
                rows = message["rows"]
                yield unpack(parts[place]), rows and GlobalRows(*rows)

    def _next_message(self, items: Iterator[tuple[Any, GlobalRows | None]]) -> Any:
        item = next(items, None)
        if item is None:
            return None
        batches, rows = item
        # A dataset of whole batches that are cut gives the parts of one batch in place of several batches.
        parts = batches[0] if isinstance(batches[0], Parts) else batches
        if self.knows_position:
            self._source.hand_out()
        return {
            "parts": [pack(part) for part in parts],
            "rows": rows and (rows.held, rows.num_real, rows.full),
            "state": pack(self._source.latest),
        }
