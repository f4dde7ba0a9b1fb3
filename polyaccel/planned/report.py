"""What a compiler said of one training step, per device, and what follows from it for a chip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from polyaccel.planned.chips import Chip

# A program that is faster than its operations allow is not estimated but miscounted: compilers answer with negative times, too.
_FASTEST = 0.5


@dataclass(frozen=True, slots=True)
class Collective:
    """Exchanges of one kind between `group_size` devices.

    count: how many run in a step. bytes: of the whole array on one side of each, added up (what is gathered, what is reduced).
    sent_bytes: what one device sends, where the exchange goes round a ring.
    """

    kind: str
    group_size: int
    count: int
    bytes: int
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class ProgramPlan:
    """One compiled program of the step, per device. The bytes are the compiler's own; arguments it overwrites count once.

    resident_bytes: what lies on the device while it runs and is none of its arguments (the optimizer state during a backward).
    flops, accessed_bytes: as the compiler counts them, the body of a loop once. matrix_flops: those of matrix products and
    convolutions, loops counted as often as they run; None where that is not known.
    compiler_s: the compiler's estimate of its time as it came, None where it gives none.
    runs: how often it runs in the step; all other numbers are those of one run.
    """

    name: str
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int
    resident_bytes: int
    flops: float
    accessed_bytes: float
    matrix_flops: float | None
    compiler_s: float | None
    compile_s: float
    collectives: tuple[Collective, ...] = ()
    runs: int = 1

    @property
    def peak_bytes(self) -> int:
        """The most that is held while it runs."""
        return self.resident_bytes + self.argument_bytes + self.output_bytes + self.temporary_bytes + self.code_bytes


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step on a mesh of a topology.

    Where it does not fit, `refusal` is the compiler's reason, and programs end before the refused one.
    parameter_bytes, buffer_bytes, optimizer_bytes: of one device. `remarks`: where the plan differs from a run. `arguments`: of the
    script, where several were tried.
    """

    topology: str
    num_devices: int
    mesh: Mapping[str, int]
    num_parameters: int
    parameter_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    programs: tuple[ProgramPlan, ...]
    refusal: str | None = None
    remarks: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int | None:
        """The largest of its programs; None where one did not fit."""
        if self.refusal is not None:
            return None
        return max((program.peak_bytes for program in self.programs), default=0)

    @property
    def temporary_bytes(self) -> int:
        """Activations and other temporaries of the program that has most of them."""
        return max((program.temporary_bytes for program in self.programs), default=0)

    @property
    def flops(self) -> float:
        """As the compiler counts them."""
        return sum(program.flops * program.runs for program in self.programs)

    @property
    def accessed_bytes(self) -> float:
        """Read and written in the device's memory."""
        return sum(program.accessed_bytes * program.runs for program in self.programs)

    @property
    def matrix_flops(self) -> float | None:
        """Of the whole step; None where one program's are not known."""
        known = [p.matrix_flops * p.runs for p in self.programs if p.matrix_flops is not None]
        return math.fsum(known) if len(known) == len(self.programs) else None

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Of all programs, by kind and size of group."""
        return merged([one for program in self.programs for one in program.collectives * program.runs])


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long a step takes. `source`: "compiler", or "roofline" where the compiler's answer is none or impossible."""

    seconds: float
    source: str
    mfu: float | None
    bounds: Mapping[str, float] = field(default_factory=dict)  # seconds that each part would take alone


def merged(collectives: Sequence[Collective]) -> tuple[Collective, ...]:
    """Exchanges of the same kind and group as one entry, most bytes first."""
    found: dict[tuple[str, int], Collective] = {}
    for one in collectives:
        key = (one.kind, one.group_size)
        old = found.get(key)
        found[key] = (
            one
            if old is None
            else Collective(
                one.kind, one.group_size, old.count + one.count, old.bytes + one.bytes, old.sent_bytes + one.sent_bytes
            )
        )
    return tuple(sorted(found.values(), key=lambda one: (-one.bytes, one.kind, one.group_size)))


def estimate(plan: StepPlan, chip: Chip | None) -> Estimate | None:
    """The time of a step on this chip; None without a chip, where nothing is known of its speed, and where the step does not fit.

    The roofline is the longest of: operations at the peak, memory at its bandwidth, exchanges at that of the links. It is a bound from
    below: parts overlap at best.
    """
    if chip is None or plan.refusal is not None or not plan.programs:
        return None
    work = plan.matrix_flops if plan.matrix_flops is not None else plan.flops
    parts = {
        "operations": (max(plan.flops, work), chip.peak_flops),
        "memory": (plan.accessed_bytes, chip.hbm_bytes_per_s),
        "exchanges": (sum(one.sent_bytes for one in plan.collectives), chip.link_bytes_per_s),
    }
    bounds = {name: amount / speed for name, (amount, speed) in parts.items() if speed is not None}
    said = [program.compiler_s * program.runs for program in plan.programs if program.compiler_s is not None]
    seconds, source = max(bounds.values(), default=0.0), "roofline"
    if len(said) == len(plan.programs):
        total = math.fsum(said)
        is_sane = min(said) > 0 and math.isfinite(total) and total >= _FASTEST * bounds.get("operations", 0.0)
        if is_sane:
            seconds, source = total, "compiler"
    if not seconds:
        return None
    mfu = None
    if chip.peak_flops is not None and plan.matrix_flops is not None:
        mfu = plan.matrix_flops / (seconds * chip.peak_flops)
    return Estimate(seconds, source, mfu, bounds)


def fits(plan: StepPlan, chip: Chip | None) -> bool | None:
    """Whether the step runs on the chip; None where the chip's memory is not known."""
    if plan.refusal is not None:
        return False
    if chip is None or plan.peak_bytes is None:
        return None
    return plan.peak_bytes <= chip.hbm_bytes


def as_json(plan: StepPlan, chip: Chip | None) -> dict[str, Any]:
    """Everything as numbers in bytes, operations and seconds, for JSON."""
    found = estimate(plan, chip)
    return {
        **asdict(plan),
        "mesh": dict(plan.mesh),
        "peak_bytes": plan.peak_bytes,
        "temporary_bytes": plan.temporary_bytes,
        "flops": plan.flops,
        "accessed_bytes": plan.accessed_bytes,
        "matrix_flops": plan.matrix_flops,
        "collectives": [asdict(one) for one in plan.collectives],
        "chip": None if chip is None else asdict(chip),
        "fits": fits(plan, chip),
        "estimate": None if found is None else asdict(found),
    }


def chip_of(tree: Mapping[str, Any]) -> Chip | None:
    """The chip in what `as_json` gave."""
    return None if tree["chip"] is None else Chip(**tree["chip"])


def step_plan_of(tree: Mapping[str, Any]) -> StepPlan:
    """The plan in what `as_json` gave."""
    names = (
        "topology",
        "num_devices",
        "num_parameters",
        "parameter_bytes",
        "buffer_bytes",
        "optimizer_bytes",
        "refusal",
    )
    programs = tuple(
        ProgramPlan(**{**program, "collectives": tuple(Collective(**one) for one in program["collectives"])})
        for program in tree["programs"]
    )
    return StepPlan(
        **{name: tree[name] for name in names},
        mesh=dict(tree["mesh"]),
        programs=programs,
        remarks=tuple(tree["remarks"]),
        arguments=tuple(tree["arguments"]),
    )
