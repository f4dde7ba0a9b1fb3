"""What `prepare` gives for a torch DataLoader: a PreparedLoader that is a DataLoader too, with Accelerate's attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from torch.utils.data import DataLoader

from polyaccel.data import LoaderState, PreparedLoader
from polyaccel_torch.dialect.loaders import stateful

_POSITION = "polyaccel"  # beside torchdata's own keys


class TorchLoader(PreparedLoader, DataLoader[Any]):  # type: ignore[misc]
    """A prepared torch loader. `dataset`, `batch_size`, `collate_fn`, `num_workers`, `drop_last`, ... are the user's loader's."""

    # Not DataLoader's, which compares names: the loader assigns for every batch.
    __setattr__ = object.__setattr__  # type: ignore[assignment]

    @property
    def batch_sampler(self) -> Any:  # type: ignore[override]
        """What chooses the indices: the user's batch sampler, cut where there are several data shards."""
        return self._host.batch_sampler  # type: ignore[attr-defined]

    @property
    def sampler(self) -> Any:  # type: ignore[override]
        """The sampler inside the batch sampler."""
        found = getattr(self.batch_sampler, "sampler", None)
        return self._host.loader.sampler if found is None else found

    @property
    def iteration(self) -> int:
        """The number of the pass that runs, or of the next one; may be set."""
        return self.epoch

    @iteration.setter
    def iteration(self, value: int) -> None:
        self.set_epoch(value)

    @property
    def total_dataset_length(self) -> int:
        """Samples in the dataset. Raises TypeError for a stream without length."""
        dataset = self._host.loader.dataset
        return int(dataset.total_length) if hasattr(dataset, "total_length") else len(dataset)

    @property
    def base_dataloader(self) -> DataLoader[Any]:
        """The DataLoader that this process iterates over."""
        found: DataLoader[Any] = self._host.source  # type: ignore[attr-defined]
        return found

    @property
    def use_stateful_dataloader(self) -> bool:
        """Whether torchdata's StatefulDataLoader reads."""
        return stateful.is_stateful(self.base_dataloader)

    @property
    def skip_batches(self) -> int:
        """How many global batches every pass leaves out."""
        return self._skip

    @property
    def gradient_state(self) -> Any:
        """The accumulation state that this loader reports to."""
        return getattr(self._observer, "gradient_state", self._observer)

    def end(self) -> None:
        """The loader is not the active one any more; a loop that ends or is left says so itself."""
        if self._observer is not None:
            self._observer.loader_finished(self)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain values: batches handed out so far are done."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave. Raises CheckpointError where no batch begins there."""
        self.load_state(LoaderState(**state))


class ShardedLoader(TorchLoader):
    """Every process reads its own part."""


class DispatchedLoader(TorchLoader):
    """Process 0 reads and sends every process its part."""


def prepared_type(*, is_dispatched: bool, is_stateful: bool) -> type[TorchLoader]:
    """The class of a prepared loader; torchdata is imported only for a stateful one."""
    kind: type[TorchLoader] = DispatchedLoader if is_dispatched else ShardedLoader
    return _stateful(is_dispatched) if is_stateful else kind


@cache
def _stateful(is_dispatched: bool) -> type[TorchLoader]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    kind: Any = DispatchedLoader if is_dispatched else ShardedLoader

    class Stateful(kind, StatefulDataLoader):
        """Its `state_dict` is torchdata's, of the latest batch that was handed out, also after the loop was left; what torchdata
        does not know (the epoch, the seed of its order) stands under one key beside it."""

        __setattr__ = object.__setattr__

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kind.__init__(self, *args, **kwargs)
            self._latest: tuple[Any, LoaderState] | None = None

        def _handed_out(self) -> None:
            super()._handed_out()
            held, position = self._host, self._position
            self._latest = held.latest, LoaderState(held.seed, position.epoch, position.batch, start=position.start)

        def load_state(self, state: LoaderState) -> None:
            if state.batch and self._is_at_end(self.batch_of(state)):
                # Scripts rely on torchdata here: a loader that was saved in its last batch begins its next pass, not an empty rest.
                state = LoaderState(None, state.epoch + 1, 0, own=state.own)
            super().load_state(state)
            self._latest = None

        def state_dict(self) -> dict[str, Any]:
            resume = self._position.resume
            if resume is not None:
                known, state = {} if resume.source is None else stateful.from_bytes(resume.source), resume
            elif self._latest is not None:
                known, state = self._latest
                known = {**known, "_iterator_finished": self.end_of_dataloader}
            else:
                known, state = {}, LoaderState(None, self.epoch, 0)
            if self._host.has_random_order or state.epoch or state.batch != stateful.num_read(known):
                known[_POSITION] = {
                    "seed": state.seed,
                    "epoch": state.epoch,
                    "batch": state.batch,
                    "start": None if state.start is None else list(state.start["own"]),
                    "own": list(self._own_generators()),
                }
            return known

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            known = {name: value for name, value in state.items() if name != _POSITION}
            found = state.get(_POSITION, {})
            epoch, own = found.get("epoch", 0), tuple(found.get("own", ()))
            if known.get("_iterator_finished"):
                self.load_state(LoaderState(None, epoch + 1, 0, own=own))
                return
            start = None if found.get("start") is None else {"host": {}, "own": tuple(found["start"])}
            source = stateful.to_bytes(known) if known else None
            batch = found.get("batch", stateful.num_read(known))
            self.load_state(LoaderState(found.get("seed"), epoch, batch, start=start, own=own, source=source))

    Stateful.__name__ = Stateful.__qualname__ = f"Stateful{kind.__name__}"
    return Stateful
