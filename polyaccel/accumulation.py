"""When gradients are exchanged and optimizers step: Accelerate's accumulation rules, one state per Accelerator."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from polyaccel.errors import UnsupportedError
from polyaccel.weighting import MIXED, MIXED_HINT, UNWEIGHTED


class GradientState:
    """Counts micro batches; `sync_gradients` is True on the batch whose step is a real one. As a context, it is around one of them.

    The window closes every `num_steps` batches and, with `sync_with_dataloader`, on the last batch of the innermost running
    loader; the next window then starts fresh. Outside `accumulate` every batch is a real one.

    A window that a loader's end closes early has fewer micro batches than each was divided by. With `scales_tail`, `tail_factor` is
    what its gradients are then to be multiplied by, 1 otherwise. `window_weights` is the engine's sum of the weights that this
    window's backward calls gave, None before the first of them (see `polyaccel.weighting`).
    """

    def __init__(self, num_steps: int, *, sync_with_dataloader: bool = True, scales_tail: bool = False) -> None:
        self.num_steps = num_steps
        self.scales_tail = scales_tail
        self.tail_factor = 1.0
        self.grown = 1.0  # what the gradients of this tail window have been multiplied by already
        self.window_weights: Any = None
        self.exchanges_weights = True  # False: every process updates on its own (LocalSGD)
        self.sync_with_dataloader = sync_with_dataloader
        self.step = 0
        self.sync_gradients = True
        self.weighs = False  # whether any backward was weighted
        self._weighted_step = -1
        self._running: list[weakref.ref[Any]] = []
        # By a loop: the rows of its last batch, and which loop is around it and how far that was.
        self._left: tuple[Any, int | None, int] | None = None

    def advance(self) -> bool:
        """Count one micro batch and decide whether it closes the window."""
        if self.sync_gradients:  # the micro batch before closed its window
            self.window_weights = None
            self.tail_factor = self.grown = 1.0
        if self.sync_with_dataloader and self.end_of_dataloader:
            if self.scales_tail:
                self.tail_factor = self.num_steps / (self.step % self.num_steps + 1)
            self.step = 0
            self.sync_gradients = True
        else:
            self.step += 1
            self.sync_gradients = self.step % self.num_steps == 0
        return self.sync_gradients

    def __enter__(self) -> None:
        self.advance()

    def __exit__(self, *error: object) -> None:
        return None

    def note_unweighted(self) -> None:
        """An unweighted backward begins. Raises UnsupportedError after a weighted one in the same window."""
        if self.window_weights is not None and self.window_weights is not UNWEIGHTED:
            raise UnsupportedError(MIXED, MIXED_HINT)
        self.window_weights = UNWEIGHTED

    def note_weighted(self) -> None:
        """A weighted backward begins. Raises UnsupportedError after an unweighted one in the same window, and for a second one in a
        micro batch that closes no window."""
        if self.window_weights is UNWEIGHTED:
            raise UnsupportedError(MIXED, MIXED_HINT)
        if not self.sync_gradients and self._weighted_step == self.step and self.window_weights is not None:
            raise UnsupportedError(
                "two weighted backward calls in one micro batch of an accumulation window: their weights would be added up",
                "add the losses up before one backward, or train the models in Accelerators of their own",
            )
        self._weighted_step, self.weighs = self.step, True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no batch is a real one."""
        before, self.sync_gradients = self.sync_gradients, False
        try:
            yield
        finally:
            self.sync_gradients = before

    @property
    def in_dataloader(self) -> bool:
        """Whether a prepared loader is running."""
        return self.active_dataloader is not None

    def _set_sync_gradients(self, sync_gradients: bool) -> None:
        # Accelerate's name; transformers' Trainer tells by it which batches are real ones.
        self.sync_gradients = sync_gradients

    def __getstate__(self) -> dict[str, Any]:
        # What runs and what an engine holds stay here: a prepared scheduler can be pickled inside a loop.
        return {**vars(self), "_running": [], "window_weights": None}

    # -- the loaders report here ---------------------------------------------------------------------------------------

    def loader_started(self, loader: Any) -> None:
        """A prepared loader began an epoch; it is the active one until it finishes or an inner one starts."""
        self._running.append(weakref.ref(loader))
        self._left = None

    def loader_finished(self, loader: Any) -> None:
        """A prepared loader's epoch ended, by exhaustion or because its loop was left."""
        self._running = [ref for ref in self._running if ref() is not None and ref() is not loader]
        if not getattr(loader, "is_exhausted", True):
            around = self.active_dataloader
            self._left = (loader.rows, None, 0) if around is None else (loader.rows, id(around), around.num_handed_out)

    @property
    def active_dataloader(self) -> Any:
        """The innermost running loader, or None."""
        return self._running[-1]() if self._running else None

    def outermost_dataloader(self) -> Any:
        """The running loader that started first, or None: the loop over it holds all others."""
        return self._running[0]() if self._running else None

    @property
    def end_of_dataloader(self) -> bool:
        """True while the active loader's last batch is being used."""
        loader = self.active_dataloader
        return loader is not None and loader.end_of_dataloader

    @property
    def batch_rows(self) -> tuple[Any, bool]:
        """The rows of the batch in use (see `PreparedLoader.rows`), and whether that is the last one of a loop that was left."""
        loader = self.active_dataloader
        if self._left is not None:
            rows, *where = self._left
            if where == ([None, 0] if loader is None else [id(loader), loader.num_handed_out]):
                return rows, True
        return (None if loader is None else loader.rows), False

    @property
    def remainder(self) -> int:
        """How many samples of the active loader's last global batch are real; -1 when all are."""
        loader = self.active_dataloader
        return -1 if loader is None else int(loader.remainder)


class SchedulerGate:
    """The scheduler that user code steps: it moves only with real optimizer updates (rules of Accelerate's AcceleratedScheduler).

    One call steps the scheduler `steps_per_update` times: what `scheduler_unit` says (see `schedules`).
    A skipped update (fp16 overflow) does not step it. A scheduler with `total_steps` never passes it.
    """

    _is_accelerate_prepared = True  # Accelerate's mark of what has been through prepare

    def __init__(
        self,
        scheduler: Any,
        optimizers: list[Any],
        state: GradientState,
        *,
        steps_per_update: int,
        follows_optimizer: bool,
        counts_waiting: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.optimizers = optimizers
        self._state = state
        self._steps_per_update = steps_per_update
        self._follows_optimizer = follows_optimizer
        self._counts_waiting = counts_waiting

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Advance the schedule if the optimizers made a real update; arguments (a metric) are passed on."""
        if not self._follows_optimizer:
            self.scheduler.step(*args, **kwargs)
            return
        if not self._state.sync_gradients:
            if self._counts_waiting and hasattr(self.scheduler, "_step_count"):
                self.scheduler._step_count += (
                    1  # torch warns when a scheduler has stepped less often than its optimizer
                )
            return
        for optimizer in self.optimizers:
            if optimizer.step_was_skipped:
                return
        for _ in range(self._steps_per_update):
            total = getattr(self.scheduler, "total_steps", None)
            if total is None or self.scheduler._step_count <= total:
                self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> Any:
        """The learning rates of the last step, one per parameter group."""
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state."""
        return dict(self.scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` gave."""
        self.scheduler.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self.scheduler, name)
