"""What a script computes, recorded for `polyaccel compare`: every loss and gradient norm, the parameters before and after, times.

Nothing here runs unless the setting `record` names a folder. Values on a device are fetched many steps later, so that a step does not
wait for them; the device is waited for after 1, 2, 4, 8, ... updates alone, to know when they were done.

    <record>/values-<process>.jsonl        {"step", "loss"} or {"step", "grad_norm"}, in order; step: updates before it
    <record>/facts-<process>.json          backend, devices, times, compilations, peak memory; written at the end
    <record>/{start,end}-<process>.safetensors   parameters and buffers; the metadata say where each piece belongs
"""

from __future__ import annotations

import atexit
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from polyaccel.errors import ConfigError
from polyaccel.tracking.files import encode
from polyaccel.tracking.values import Late, settle, start, take

_HELD = 256  # values on their way; the older half of them is fetched when there are as many


class Observer:
    """Records one process of a run, and ends the script after `num_steps` updates (0: where it ends by itself).

    An update is a backward that closes an accumulation window. `handles(role)` gives what was prepared so far; `closes_window` whether
    the current backward closes its window; `device_memory` gives (the most bytes in use on a device so far, its size), or None where
    that is the host's. Raises ConfigError where the folder has a recording already.
    """

    def __init__(
        self,
        folder: str,
        num_steps: int,
        engine: Any,
        *,
        facts: dict[str, Any],
        handles: Callable[[Any], Iterable[Any]],
        closes_window: Callable[[], bool],
        compile_events: Callable[[], Sequence[Any] | None],
        device_memory: Callable[[], tuple[int, int | None] | None] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.num_steps = num_steps
        self.num_updates = 0
        self._engine = engine
        self._facts = facts
        self._handles = handles
        self._closes_window = closes_window
        self._compile_events = compile_events
        self._device_memory = device_memory
        self._suffix = f"-{engine.topology.process_index}"
        self._held: list[tuple[int, str, Any]] = []
        self._waiting: list[Late] = []
        self._marks: list[tuple[int, float]] = []  # (updates, seconds) when the device had done that many
        self._seen: list[Any] = []
        self._is_finished = False
        self._values = self.folder / f"values{self._suffix}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._values.touch(exist_ok=False)
        except FileExistsError:
            raise ConfigError(f"record={folder!r} has a recording already", "name a new folder, or delete it") from None
        except OSError as error:
            raise ConfigError(
                f"record={folder!r} cannot be written: {error.strerror}", "name a folder that can be written"
            ) from error
        atexit.register(self._at_exit)

    # -- called by the facade --------------------------------------------------------------------------------------------------

    def prepared(self) -> None:
        """After a prepare: keep the parameters that new models start from, and look at every batch of the loaders."""
        for loader in self._handles("loader"):
            if self.before_step not in loader.before_batch:
                loader.before_batch.append(self.before_step)
        new = [model for model in self._handles("model") if not any(model is seen for seen in self._seen)]
        if new:
            self._seen += new
            self._save("start", self._seen)

    def before_step(self, loader: Any = None) -> None:
        """Note the time, or end the script where the updates asked for are done.

        Called when the loop asks for a batch, which is when a step is over, and again before a backward, for scripts whose loader is not
        prepared: their buffers at the end have seen one forward more.
        """
        if self.num_updates == self.num_steps and self.num_steps:
            self._end()
        count = self.num_updates
        if count & (count - 1) == 0 and count and (not self._marks or self._marks[-1][0] != count):
            self._mark()

    def after_backward(self, result: Any) -> None:
        """Take the loss: a value, or (loss, auxiliary values)."""
        self._take("loss", result[0] if isinstance(result, tuple) else result)
        self.num_updates += self._closes_window()

    def clipped(self, norm: Any) -> None:
        """Take the norm that gradients had before they were clipped; the step of its backward."""
        self._take("grad_norm", norm, step=self.num_updates - 1)

    def updated(self, norm: Any) -> None:
        """Take the norm of the gradients of a fused step's update, which is under way."""
        self._take("grad_norm", norm)

    def around(self, lift: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`lift` of a fused step's result, with the loss taken; the update of the last step is done when it is called."""

        def lifted(result: Any) -> Any:
            value = lift(result)
            self.after_backward(value["loss"] if isinstance(value, dict) else value)
            self.before_step()
            return value

        return lifted

    def finish(self) -> None:
        """Write what is left. Idempotent; every process writes its own part and waits for none."""
        if self._is_finished:
            return
        self._is_finished = True
        atexit.unregister(self._at_exit)
        start(self._waiting)
        self._write(len(self._held))
        self._save("end", self._handles("model"))
        events = self._compile_events()
        used = self._device_memory() if self._device_memory is not None else None
        facts = {
            **self._facts,
            "num_updates": self.num_updates,
            "step_s": self._step_s(events or ()),
            "compile_s": None if events is None else sum(event.capture_s + event.compile_s for event in events),
            "num_programs": None if events is None else len(events),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
            "peak_device_memory_bytes": None if used is None else used[0],
        }
        (self.folder / f"facts{self._suffix}.json").write_text(json.dumps(facts, indent=1), "utf-8")

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        self._mark()
        self.finish()
        raise SystemExit(0)

    def _at_exit(self) -> None:
        if getattr(sys, "last_value", None) is None:  # a script that failed has nothing to be compared
            self.finish()

    def _take(self, name: str, value: Any, *, step: int | None = None) -> None:
        start(self._waiting)
        self._waiting.clear()
        taken = take({name: value}, self._waiting)
        self._held.append((self.num_updates if step is None else step, name, taken[name]))
        if len(self._held) >= _HELD:
            self._write(_HELD // 2)

    def _write(self, count: int) -> None:
        with self._values.open("ab") as file:
            for step, name, value in self._held[:count]:
                file.write(encode({"step": step, name: _mean(settle(value))}) + b"\n")
        del self._held[:count]

    def _mark(self) -> None:
        self._engine.synchronize()
        self._marks.append((self.num_updates, time.perf_counter()))

    def _step_s(self, events: Sequence[Any]) -> float | None:
        """Seconds per update between the last two marks, without what was compiled between them."""
        if len(self._marks) < 2:
            return None
        (first, since), (last, until) = self._marks[-2:]
        compiled = sum(event.capture_s + event.compile_s for event in events if first <= event.step < last)
        return max(until - since - compiled, 0.0) / (last - first)

    def _save(self, name: str, models: Iterable[Any]) -> None:
        import numpy as np
        from safetensors.numpy import save_file

        arrays: dict[str, Any] = {}
        places: dict[str, Any] = {}
        for index, model in enumerate(models):
            for shard in self._engine.read_state(model):
                data = np.asarray(shard.data)
                # Half precisions are widened: numpy itself has no bfloat16.
                data = data if data.dtype.kind in "iub" or data.dtype == np.float64 else data.astype(np.float32)
                key = str(len(arrays))
                arrays[key] = np.ascontiguousarray(data).reshape(data.shape)
                places[key] = [f"{index}.{shard.name}", list(shard.global_shape), list(shard.offset)]
        save_file(arrays, self.folder / f"{name}{self._suffix}.safetensors", {"places": json.dumps(places)})


_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def _mean(value: Any) -> float:
    """One number of a loss: of one value per local data shard their mean, as every engine averages them."""
    return sum(map(_mean, value)) / len(value) if isinstance(value, list) and value else float(value)
