"""`join_uneven_inputs`: a loop in which the processes have different numbers of batches, and `even_batches` changed for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from polyaccel.accumulation import GradientState
from polyaccel.errors import UnsupportedError
from polyaccel.plan import Plan
from polyaccel.prepare import Preparation
from polyaccel.protocols import Engine


class Joining:
    """What the context needs to know of its Accelerator. `can_join`: the engine has the feature "uneven_inputs"."""

    def __init__(
        self, engine: Engine, prepared: Preparation, state: GradientState, plan: Plan, *, can_join: bool
    ) -> None:
        self._engine = engine
        self._prepared = prepared
        self._state = state
        self._plan = plan
        self._can_join = can_join

    @contextmanager
    def uneven_inputs(self, joinables: Iterable[Any], even_batches: bool | None) -> Iterator[None]:
        """Inside, a process that has used up its batches waits until the others have, and takes their exchanges part meanwhile.

        Every process must enter and leave it. Raises UnsupportedError, before anything is changed, where uneven inputs could not end
        well.
        """
        is_even = self._plan.even_batches if even_batches is None else even_batches
        several = self._engine.topology.num_processes > 1
        handles = [self._handle(value) for value in joinables] if several else []
        if several and not is_even:
            self._check()
        with self._overridden(even_batches):
            if not several or is_even:  # the loops are equally long
                yield
                return
            engine: Any = self._engine
            with engine.joined([handle for handle in handles if handle is not None]):
                yield

    def _check(self) -> None:
        if not self._can_join:
            raise UnsupportedError(
                "join_uneven_inputs with even_batches=False: on this engine all processes run one program on equal parts of a batch,"
                " and none can go on without the others",
                "use even_batches=True: all processes then have equally many batches, and gather_for_metrics counts every sample once",
            )
        if self._state.num_steps > 1 and self._state.sync_with_dataloader:
            raise UnsupportedError(
                f"join_uneven_inputs with even_batches=False and gradient_accumulation_steps={self._state.num_steps}: the end of its"
                " data closes a process's window while the others are within theirs",
                "use even_batches=True, or GradientAccumulationPlugin(sync_with_dataloader=False)",
            )

    def _handle(self, value: Any) -> Any:
        entry = self._prepared.entry_of(value)
        if entry is not None:
            return entry.handle
        if callable(getattr(type(value), "join_hook", None)):  # torch's protocol
            return value
        warnings.warn(
            f"join_uneven_inputs is only supported for multi-GPU or multi-process models that prepare returned, and has no effect on"
            f" a {type(value).__name__}",
            UserWarning,
            stacklevel=5,
        )
        return None

    @contextmanager
    def _overridden(self, even_batches: bool | None) -> Iterator[None]:
        """Loaders of indexed data cut with this `even_batches` in passes that begin inside; None changes nothing."""
        if even_batches is None or self._plan.num_data_shards == 1:
            yield
            return
        before: list[tuple[Any, bool]] = []
        for loader in self._prepared.handles("loader"):
            cut = loader.cut
            if cut is None:
                warnings.warn(
                    f"even_batches={even_batches} of join_uneven_inputs is only supported for map-style datasets, and has no effect on"
                    f" a loader over a {type(getattr(loader, 'dataset', loader)).__name__}",
                    UserWarning,
                    stacklevel=5,
                )
            else:
                before.append((cut, cut.even_batches))
                cut.even_batches = even_batches
        try:
            yield
        finally:
            for cut, value in before:
                cut.even_batches = value
