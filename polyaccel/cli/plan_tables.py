"""A step's plan in words and columns: one page for one plan, one line each for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyaccel.cli.amounts import bytes_text
from polyaccel.planned.chips import Chip
from polyaccel.planned.report import StepPlan, estimate, fits

_WORDS = {True: "fits", False: "does not fit", None: "memory of the device is not known"}


def page(plan: StepPlan, chip: Chip | None) -> str:
    """Everything about one plan; of each device, where nothing else is said."""
    lines = [
        f"{plan.topology}, {plan.num_devices} devices, {mesh_text(plan.mesh)}: {plan.num_parameters:,} parameters",
        "each device",
        *_columns(_amounts(plan, chip)),
    ]
    if plan.refusal is not None:
        reason = next((line for line in plan.refusal.splitlines() if line.strip()), "no reason")
        lines += ["does not fit; the compiler says:", f"  {reason.strip()}"]
    if fits(plan, chip) is False:
        lines.append("hint: --search --first names the nearest mesh that fits, --scale N,M --first the nearest slice")
    if plan.collectives:
        exchanges = [
            (
                f"  {one.kind}",
                f"{one.count} x among {one.group_size}",
                bytes_text(one.bytes),
                f"{bytes_text(one.sent_bytes)} sent",
            )
            for one in plan.collectives
        ]
        lines += ["exchanges of a step", *_columns(exchanges)]
    if plan.programs:
        programs = [
            (
                f"  {program.name}",
                f"{program.runs} x" if program.runs > 1 else "",
                f"peak {bytes_text(program.peak_bytes)}",
                f"{amount(program.flops)}FLOP",
                f"compiled in {program.compile_s:.1f} s",
            )
            for program in plan.programs
        ]
        lines += ["programs", *_columns(programs)]
    return "\n".join([*lines, *(f"note: {remark}" for remark in plan.remarks)])


def comparison(plans: Sequence[tuple[Chip | None, StepPlan]], failed: Sequence[tuple[str, str]] = ()) -> str:
    """One line for each plan; `failed`: what could not be planned, and why."""
    rows: list[tuple[str, ...]] = [("topology", "mesh", "fits", "peak", "FLOP", "sent", "step", "MFU")]
    for chip, plan in plans:
        found = estimate(plan, chip)
        does_fit = fits(plan, chip)
        peak = plan.peak_bytes
        rows.append(
            (
                plan.topology,
                _variant(plan),
                {True: "yes", False: "no", None: "?"}[does_fit],
                "-" if peak is None else bytes_text(peak),
                "-" if peak is None else amount(plan.flops),
                "-" if peak is None else bytes_text(sum(one.sent_bytes for one in plan.collectives)),
                "-" if found is None else f"{duration(found.seconds)} ({found.source})",
                "-" if found is None or found.mfu is None else f"{found.mfu:.0%}",
            )
        )
    remarks = dict.fromkeys(remark for _, plan in plans for remark in plan.remarks)
    lines = [*_columns(rows), *(f"note: {remark}" for remark in remarks)]
    lines += [f"not planned: {name}: {_last_line(why)}" for name, why in failed]
    answers = [fits(plan, chip) for chip, plan in plans]
    if False in answers:
        first = next((plan for (_, plan), answer in zip(plans, answers, strict=True) if answer), None)
        lines.append(
            "none of them fits" if first is None else f"the nearest that fits: {first.topology} {_variant(first)}"
        )
    return "\n".join(lines)


def _last_line(text: str) -> str:
    """Of what a process said at its end, the line that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("hint:")]
    return lines[-1] if lines else "no reason"


def mesh_text(mesh: Mapping[str, int]) -> str:
    """The axes that are larger than one: `data=2 fsdp=8`."""
    return " ".join(f"{name}={size}" for name, size in mesh.items() if size != 1) or "one device"


def _variant(plan: StepPlan) -> str:
    return " ".join((mesh_text(plan.mesh), *plan.arguments))


def amount(number: float) -> str:
    """In powers of 1000: "1.2 T"."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} P"


def duration(seconds: float) -> str:
    """ "12.3 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _amounts(plan: StepPlan, chip: Chip | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("  parameters", bytes_text(plan.parameter_bytes)),
        ("  optimizer state", bytes_text(plan.optimizer_bytes)),
    ]
    if plan.buffer_bytes:
        rows.append(("  buffers", bytes_text(plan.buffer_bytes)))
    if plan.peak_bytes is not None:
        # XLA:TPU counts what lies in HBM; a small step's temporaries stay beside the matrix units from birth to last use.
        elsewhere = (f"all in the fast memory of {chip.name}",) if chip is not None and not plan.temporary_bytes else ()
        rows.append(("  activations and other temporaries", bytes_text(plan.temporary_bytes), *elsewhere))
        of_chip = (
            ""
            if chip is None
            else f"{plan.peak_bytes / chip.hbm_bytes:.0%} of {bytes_text(chip.hbm_bytes)} on {chip.name}: "
        )
        rows.append(("  peak", bytes_text(plan.peak_bytes), of_chip + _WORDS[fits(plan, chip)]))
        rows.append(("  operations", f"{amount(plan.flops)}FLOP", *_matrix_words(plan)))
        rows.append(("  memory traffic", f"{amount(plan.accessed_bytes)}B"))
    found = estimate(plan, chip)
    if found is not None:
        words = {
            "compiler": "the compiler's estimate",
            "roofline": "not less than this: the compiler gives no usable time",
        }
        rows.append(("  step time", duration(found.seconds), words[found.source]))
        rows += [("", f"  {duration(seconds)}", f"{name} alone") for name, seconds in found.bounds.items()]
        if found.mfu is not None:
            rows.append(("  MFU", f"{found.mfu:.1%}", "at that time" if found.source == "compiler" else "at most"))
    return rows


def _matrix_words(plan: StepPlan) -> tuple[str, ...]:
    return () if plan.matrix_flops is None else (f"{amount(plan.matrix_flops)}FLOP in matrix products",)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Left-aligned columns; rows may be short."""
    num = max(map(len, rows))
    filled = [(*row, *[""] * (num - len(row))) for row in rows]
    widths = [max(len(row[at]) for row in filled) for at in range(num)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in filled]
