"""Progress bars and profiles."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from polyaccel.config.profile import ProfileKwargs
from polyaccel.facade.parts import Parts
from polyaccel.looking import Profile, Progress, instruments, profiling
from polyaccel.tracking.values import fetch


class Looking(Parts):
    """What a training does, seen while it runs."""

    def progress(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        description: str = "",
        total: int | None = None,
        batch_size: int | None = None,
        flops_per_step: float | None = None,
        main_process_only: bool = True,
    ) -> Progress:
        """A progress bar: `for batch in accelerator.progress(loader)`, or a context whose `update()` is called after every step.

        It shows steps and samples per second, the time left, the share of the time that waited for data, memory, MFU where the
        floating point operations are known, and the numbers that `log` was given last, or those of its own `show(loss=loss)`.

        Args:
            iterable: a prepared loader, or anything else; None: the loop calls `update`.
            description: in front of the bar.
            total: number of steps, where `len(iterable)` does not tell.
            batch_size: samples of a step over all devices; a prepared loader knows it.
            flops_per_step: floating point operations of a step over all devices, where the engine does not count them.
            main_process_only: False: every process shows a bar.

        In a pipe it writes a line every half a minute and one at the end, to standard error. Waits for no device.
        """
        is_shown = self._engine.topology.is_main_process or not main_process_only
        reads = instruments(
            self._engine,
            self._features,
            is_shown=is_shown,
            metrics=lambda: self.tracking.latest,
            fetch=fetch,
            note=lambda facts: self.tracking.event("progress", **facts),
        )
        return Progress(
            iterable,
            reads,
            description=description,
            total=total,
            batch_size=batch_size,
            flops_per_step=flops_per_step,
        )

    def profile(self, profile_handler: ProfileKwargs | None = None) -> Profile:
        """A context that records what host and devices do, into files for TensorBoard, Perfetto and chrome://tracing.

        `profile_handler` says what and when; without one, that of `Accelerator(kwargs_handlers=[ProfileKwargs(...)])`, else all of
        the block is one trace. With a schedule, call `step()` of the profile after every step. The files stand in `profile/` of the
        run's folder, one trace per process. Every process must call it. Raises UnsupportedError where the engine cannot record it.
        """
        several = self._engine.topology.num_processes > 1
        return profiling(
            self._engine,
            self._features,
            self.backend,
            profile_handler or self._profile_handler,
            project_dir=Path(self.project_configuration.project_dir or "."),
            run_folder=self.tracking.folder,
            share=lambda value: self._gathering.broadcast_object_list([value])[0] if several else value,
            on_saved=self.tracking.event,
        )
