"""A profile of a block of steps: it decides when the engine records, names the steps, and keeps the files."""

from __future__ import annotations

import gzip
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from polyaccel.config.profile import Phase, ProfileKwargs
from polyaccel.errors import ConfigError, UnsupportedError
from polyaccel.looking.spans import averages_of
from polyaccel.protocols import Tracer

_RECORDING = ("record", "record and save")


class Profile(AbstractContextManager["Profile"]):
    """What `with accelerator.profile() as prof` gives. Call `step` after every step where there is a schedule.

    Every step is a span `ProfilerStep#<n>` of the trace (`ProfilerStep <n>` where XLA writes it). What the engine's own profiler can
    do (`events` on torch) can be asked here too, after a trace was recorded. `files`: what has been saved so far.
    """

    def __init__(
        self,
        tracer: Tracer,
        settings: ProfileKwargs,
        *,
        folder: Path,
        process_index: int,
        synchronize: Callable[[], None],
        on_saved: Callable[[list[Path]], None] = lambda files: None,
    ) -> None:
        self.files: list[Path] = []
        self.folder = folder
        self.step_num = 0
        self._tracer = tracer
        self._settings = settings
        self._process_index = process_index
        self._synchronize = synchronize
        self._on_saved = on_saved
        self._phase: Phase = "idle"
        self._num_traces = 0
        self._last: Path | None = None
        self._span = ExitStack()

    def step(self) -> None:
        """End one step and begin the next."""
        self._span.close()
        self.step_num += 1
        self._enter(self._settings.phase(self.step_num))
        self._name_step()

    def span(self, name: str) -> AbstractContextManager[Any]:
        """A context whose time is a span of that name in the trace."""
        return self._tracer.span(name, None)

    def export_chrome_trace(self, path: str, use_python_export: bool = False) -> None:
        """Copy the last trace, as Chrome's JSON (Perfetto and chrome://tracing open it). Raises ConfigError where there is none yet.

        `use_python_export` is how torch would write the file. It stands there already, so both values copy it.
        """
        if self._last is None:
            raise ConfigError(
                "there is no trace to export yet",
                "call it in on_trace_ready, or after the block of accelerator.profile",
            )
        if self._last.suffix != ".gz":
            shutil.copyfile(self._last, path)
            return
        with gzip.open(self._last, "rb") as packed, Path(path).open("wb") as plain:
            shutil.copyfileobj(packed, plain)

    def key_averages(self, **options: Any) -> Any:
        """Calls and times of every operation, and `.table(sort_by=, row_limit=)` of them: the own table of the engine's profiler
        (torch), which takes `options`, or the sums of the last trace. Raises ConfigError where there is no trace yet.
        """
        native = self._tracer.native
        if native is not None:
            return native.key_averages(**options)
        if options:
            raise ConfigError(
                f"key_averages has no {', '.join(sorted(options))} on this engine", "call it without arguments"
            )
        if self._last is None:
            raise ConfigError(
                "there is no trace to sum up yet",
                "call it in on_trace_ready, or after the block of accelerator.profile",
            )
        return averages_of(self._last)

    def __enter__(self) -> Profile:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._enter(self._settings.phase(0))
        self._name_step()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._span.close()
        if self._phase in _RECORDING:
            self._save()
        elif self._phase == "warm up":
            self._tracer.discard()
        self._phase = "idle"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        native = self._tracer.native
        if native is None:
            raise AttributeError(
                f"a profile of this engine has no {name!r}: what it recorded stands in its files, see `files`"
            )
        return getattr(native, name)

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        before, self._phase = self._phase, phase
        if before == "record and save":
            self._save()
        if phase == "warm up" and before != "warm up":
            self._tracer.warm_up()
        elif phase in _RECORDING and before != "record":
            self._synchronize()  # what was handed to the device before belongs to no step of this trace
            if before != "warm up":
                self._tracer.warm_up()
            self._tracer.start(self.folder, f"process_{self._process_index}.{self._num_traces}")

    def _name_step(self) -> None:
        if self._phase != "idle":
            self._span.enter_context(self._tracer.span("ProfilerStep", self.step_num))

    def _save(self) -> None:
        self._synchronize()
        files = self._tracer.stop()
        self._num_traces += 1
        self._last = next((file for file in files if ".json" in file.name), None)
        self.files += files
        # The name by which scripts of Accelerate find the last trace.
        if self._settings.output_trace_dir is not None and self._last is not None:
            named = self.folder / f"profile_{self._process_index}.json"
            self.export_chrome_trace(str(named))
            self.files = [file for file in self.files if file != named] + [named]
        self._on_saved(files)
        if self._settings.on_trace_ready is not None:
            self._settings.on_trace_ready(self)


def profiling(
    engine: Any,
    features: frozenset[str],
    backend: str,
    settings: ProfileKwargs,
    *,
    project_dir: Path,
    run_folder: Path | None,
    share: Callable[[Any], Any],
    on_saved: Callable[..., None],
) -> Profile:
    """The profile of an engine. Raises UnsupportedError where it records none, or not what `settings` ask for.

    Every process must call it: the folder is that of process 0.
    """
    if "profile" not in features:
        raise UnsupportedError(
            f"backend {backend!r} records no profile", "profile the same script on backend 'torch' or 'jax'"
        )
    folder = settings.output_trace_dir
    if folder is None:
        folder = share(str(run_folder / "profile" if run_folder else project_dir / "profile" / _now()))
    tracer: Tracer = engine.tracer(settings)
    return Profile(
        tracer,
        settings,
        folder=Path(folder),
        process_index=engine.topology.process_index,
        synchronize=engine.synchronize,
        on_saved=lambda files: on_saved("profile", files=[str(file) for file in files]),
    )


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
