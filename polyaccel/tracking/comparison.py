"""Two recordings of one script held against each other: where their numbers part, and what each engine costs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from polyaccel.errors import TrackerError
from polyaccel.tracking.values import from_json

_PEAKS = ("peak_memory_bytes", "peak_device_memory_bytes")
Numbers = list[tuple[int, float]]  # (updates before, value), in the order of the calls


@dataclass(frozen=True)
class Recording:
    """What `Observer` wrote for one engine, of all its processes together."""

    name: str
    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Those of process 0, with the highest peak memories of all. Raises TrackerError where the run did not end well."""
        found = [json.loads(file.read_text("utf-8")) for file in sorted(self.folder.glob("facts-*.json"))]
        if not found:
            raise TrackerError(f"{str(self.folder)!r} has no complete recording", "see what the script printed")
        peaks = {name: [one[name] for one in found if one[name] is not None] for name in _PEAKS}
        return {**found[0], **{name: max(values, default=None) for name, values in peaks.items()}}

    @cached_property
    def losses(self) -> Numbers:
        """Every loss, as its mean over the processes."""
        return self._numbers("loss")

    @cached_property
    def grad_norms(self) -> Numbers:
        """Every norm that clip_grad_norm_ returned, and of every update of train_step; empty for a script that has neither."""
        return self._numbers("grad_norm")

    def parameters(self, when: str) -> dict[str, Any]:
        """Whole arrays by "<model>.<name>", at the "start" or the "end"."""
        import numpy as np
        from safetensors import safe_open

        whole: dict[str, Any] = {}
        for file in sorted(self.folder.glob(f"{when}-*.safetensors")):
            with safe_open(file, "np") as pieces:
                for key, (name, shape, offset) in json.loads(pieces.metadata()["places"]).items():
                    data = pieces.get_tensor(key)
                    target = whole.setdefault(name, np.zeros(shape, data.dtype))
                    target[tuple(slice(at, at + size) for at, size in zip(offset, data.shape, strict=True))] = data
        return whole

    def _numbers(self, name: str) -> Numbers:
        columns = [
            [(line["step"], from_json(line[name])) for line in _lines(file) if name in line]
            for file in sorted(self.folder.glob("values-*.jsonl"))
        ]
        return [(rows[0][0], sum(value for _, value in rows) / len(rows)) for rows in zip(*columns, strict=False)]


@dataclass(frozen=True, slots=True)
class Parting:
    """The greatest relative difference of two lists of numbers, and the first one above the tolerance."""

    greatest: float
    first_step: int | None
    first_values: tuple[float, float] | None
    is_shorter: bool  # one list ended earlier


@dataclass(frozen=True, slots=True)
class ParameterDifference:
    """How far two sets of arrays are apart: ||a - b|| / ||a|| over all of them, and the array with the greatest difference.

    `reason` says why they could not be compared; the numbers are then None.
    """

    relative: float | None
    worst_name: str | None = None
    worst_difference: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One engine against the reference."""

    reference: Recording
    other: Recording
    tolerance: float
    parameter_tolerance: float
    loss: Parting
    grad_norm: Parting | None
    start: ParameterDifference
    end: ParameterDifference

    @property
    def objections(self) -> list[str]:
        """What speaks against switching, most telling first; empty where nothing does."""
        found = []
        shards = [one.facts["num_data_shards"] for one in (self.reference, self.other)]
        if shards[0] != shards[1]:
            found.append(
                f"their batches are not the same: {shards[0]} and {shards[1]} data shards; give both as many devices"
                " (JAX_NUM_CPU_DEVICES, CUDA_VISIBLE_DEVICES, --num-processes)"
            )
        if self.start.relative is not None and not self.start.relative <= 1e-6:
            found.append("the two runs started from different parameters: call set_seed before the model is made")
        if not self.other.losses or not self.reference.losses:
            found.append("no loss was recorded: the script calls neither backward nor train_step")
        for what, parting in (("losses", self.loss), ("gradient norms", self.grad_norm)):
            if parting is not None and parting.first_values is not None:
                first, second = parting.first_values
                found.append(f"{what} part at step {parting.first_step}: {first:.6g} and {second:.6g}")
            elif parting is not None and parting.is_shorter:
                found.append(f"one run recorded fewer {what} than the other")
        if self.end.relative is not None and not self.end.relative <= self.parameter_tolerance:
            found.append(f"the parameters at the end differ by {self.end.relative:.2%}")
        return found

    @property
    def verdict(self) -> str:
        """Is it safe to switch? One line."""
        names = f"from {self.reference.name} to {self.other.name}"
        if self.objections:
            return f"NOT shown to be safe to switch {names}: {'; '.join(self.objections)}"
        checked = [f"{len(self.other.losses)} losses" + (", gradient norms" if self.grad_norm else "")]
        checked += ["parameters"] if self.end.relative is not None else []
        return (
            f"safe to switch {names}, as far as {self.other.facts['num_updates']} steps show:"
            f" {', '.join(checked)} agree within {self.tolerance:g}"
            + (f" (parameters {self.parameter_tolerance:g})" if self.end.relative is not None else "")
        )


def compare(reference: Recording, other: Recording, *, tolerance: float, parameter_tolerance: float) -> Comparison:
    """Hold a recording against the reference. Raises TrackerError where one of them is not complete."""
    _ = reference.facts, other.facts
    norms = (reference.grad_norms, other.grad_norms)
    return Comparison(
        reference,
        other,
        tolerance,
        parameter_tolerance,
        _parting(reference.losses, other.losses, tolerance),
        _parting(*norms, tolerance) if any(norms) else None,
        _difference(reference.parameters("start"), other.parameters("start")),
        _difference(reference.parameters("end"), other.parameters("end")),
    )


def _parting(first: Numbers, second: Numbers, tolerance: float) -> Parting:
    greatest, at, values = 0.0, None, None
    for (step, a), (_, b) in zip(first, second, strict=False):
        difference = _relative(a, b)
        greatest = max(greatest, difference)
        if difference > tolerance and at is None:
            at, values = step, (a, b)
    return Parting(greatest, at, values, len(first) != len(second))


def _relative(a: float, b: float) -> float:
    """|a - b| against the greater of the two; numbers that are equally not finite agree, others not at all."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> ParameterDifference:
    import numpy as np

    if not first or not second:
        return ParameterDifference(None, reason="no model was prepared")
    if first.keys() != second.keys():
        one = sorted(first.keys() ^ second.keys())[0]
        return ParameterDifference(None, reason=f"the engines name them differently: {one!r} is in one of the two")
    total = norm = 0.0
    worst_name, worst = None, -1.0
    for name, mine in first.items():
        theirs = second[name]
        if mine.shape != theirs.shape:
            return ParameterDifference(
                None, reason=f"{name!r} is {mine.shape} in one run and {theirs.shape} in the other"
            )
        gap = np.subtract(mine, theirs, dtype=np.float64)
        total += float(np.sum(gap**2))
        norm += float(np.sum(np.square(mine, dtype=np.float64)))
        greatest = float(np.max(np.abs(gap), initial=0.0))
        if not greatest <= worst:  # NaN is the worst of all
            worst_name, worst = name, greatest
    return ParameterDifference(math.sqrt(total) / (math.sqrt(norm) or 1.0), worst_name, worst)


def rows(recordings: Sequence[Recording], comparisons: Sequence[Comparison]) -> Iterator[list[str]]:
    """What is reported of the engines, a line for each quantity: its name, the reference, the others. "-": the script has none."""
    beside: list[Comparison | None] = [None, *comparisons]

    def line(name: str, cell: Any) -> list[str]:
        return [name, *(cell(one, against) for one, against in zip(recordings, beside, strict=True))]

    yield line("devices", lambda r, c: f"{r.facts['num_devices']} x {r.facts['device_kind']}")
    yield line("data shards", lambda r, c: str(r.facts["num_data_shards"]))
    yield line("steps", lambda r, c: str(r.facts["num_updates"]))
    yield line("last loss", lambda r, c: f"{r.losses[-1][1]:.6g}" if r.losses else "-")
    yield line("greatest difference of a loss", lambda r, c: _share(c and c.loss.greatest))
    yield line("first diverging step", lambda r, c: "" if c is None else _step(c.loss))
    yield line("last gradient norm", lambda r, c: f"{r.grad_norms[-1][1]:.6g}" if r.grad_norms else "-")
    yield line(
        "greatest difference of a gradient norm",
        lambda r, c: "" if c is None else _share(c.grad_norm.greatest) if c.grad_norm else "-",
    )
    yield line("parameters at the start differ by", lambda r, c: _parameters(c and c.start))
    yield line("parameters at the end differ by", lambda r, c: _parameters(c and c.end))
    yield line("most different at the end", lambda r, c: _worst(c and c.end))
    yield line("step time", lambda r, c: _time(r.facts["step_s"]))
    yield line("compile time", lambda r, c: _compile(r.facts))
    yield line("peak memory of a process (host)", lambda r, c: _bytes(r.facts["peak_memory_bytes"]))
    yield line("peak memory of a device", lambda r, c: _bytes(r.facts["peak_device_memory_bytes"]))


def _share(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _step(parting: Parting) -> str:
    return "none" if parting.first_step is None else str(parting.first_step)


def _parameters(found: ParameterDifference | None) -> str:
    return "" if found is None else "-" if found.relative is None else _share(found.relative)


def _worst(found: ParameterDifference | None) -> str:
    if found is None:
        return ""
    if found.reason is not None:
        return found.reason
    return f"{found.worst_name} (by up to {_share(found.worst_difference)})"


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f} MiB"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.2f} ms"


def _compile(facts: Mapping[str, Any]) -> str:
    seconds = facts["compile_s"]
    return "-" if seconds is None else f"{seconds:.2f} s, {facts['num_programs']} programs"


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
