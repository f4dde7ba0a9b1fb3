"""Accelerate's examples: how each is called, run with polyaccel on an engine or with Accelerate itself, and their numbers side by side.

A run records every loss and the parameters before and after (the setting `record`); the reference is Accelerate with the same script,
recorded in the same files by `REFERENCE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Command = Callable[..., "tuple[int | None, str]"]

_WIKITEXT = "--dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-v1 --model_name_or_path HuggingFaceTB/SmolLM-360M"

# What each example is called with; several lists are several runs, one after the other. {out} is a folder of the run's own.
EXAMPLES: dict[str, list[str]] = {
    "nlp_example": [""],
    "complete_nlp_example": [
        "--with_tracking --checkpointing_steps epoch --output_dir {out} --project_dir {out}/logs",
        "--resume_from_checkpoint {out}/epoch_0",
    ],
    "by_feature/automatic_gradient_accumulation": [""],
    "by_feature/checkpointing": [
        "--checkpointing_steps 1 --output_dir {out}",
        "--resume_from_checkpoint {out}/step_2",
        "--resume_from_checkpoint {out}/step_3 --use_stateful_dataloader",
    ],
    "by_feature/cross_validation": ["--num_folds 2"],
    "by_feature/ddp_comm_hook": ["--ddp_comm_hook fp16"],
    "by_feature/early_stopping": [""],
    "by_feature/gradient_accumulation": ["--gradient_accumulation_steps 2"],
    "by_feature/gradient_accumulation_for_autoregressive_models": ["--gradient_accumulation_steps 2"],
    "by_feature/local_sgd": ["--gradient_accumulation_steps 2 --local_sgd_steps 2"],
    "by_feature/memory": [""],
    "by_feature/multi_process_metrics": [""],
    "by_feature/profiler": ["--record_shapes --profile_memory --output_trace_dir {out}"],
    "by_feature/schedule_free": [""],
    "by_feature/tracking": ["--with_tracking --project_dir {out}"],
    # Without a DeepSpeed plugin it trains plainly, as with Accelerate.
    "by_feature/deepspeed_with_config_support": [
        f"{_WIKITEXT} --block_size 16 --num_train_epochs 1 --seed 1 --output_dir {{out}}"
    ],
    "by_feature/megatron_lm_gpt_pretraining": [
        f"{_WIKITEXT} --block_size 16 --num_train_epochs 1 --output_dir {{out}}"
    ],
    "by_feature/fsdp_with_peak_mem_tracking": ["--model_name_or_path bert-base-cased --output_dir {out}"],
}
# What an example of theirs cannot do on a CPU, with Accelerate itself either: (text, what stands for it in both copies).
MENDED = {
    "by_feature/fsdp_with_peak_mem_tracking": (
        "class TorchTracemalloc:\n",
        "class TorchTracemalloc:\n    begin = end = peak = 0  # which it sets on an accelerator alone\n",
    )
}
NO_CPU_FLAG = ("by_feature/deepspeed_with_config_support", "by_feature/megatron_lm_gpt_pretraining")

REFERENCE = '''"""Runs a script with Accelerate, and records what `POLYACCEL_RECORD` records."""
import atexit, json, os, pathlib, runpy, sys
import accelerate, numpy as np
from safetensors.numpy import save_file

folder, rank = pathlib.Path(os.environ["POLYACCEL_RECORD"]), os.environ.get("RANK", "0")
folder.mkdir(parents=True, exist_ok=True)
losses, models = [], []
backward, prepare_model = accelerate.Accelerator.backward, accelerate.Accelerator.prepare_model

def recorded(self, loss, **kwargs):
    losses.append(float(loss.detach()))
    return backward(self, loss, **kwargs)

def kept(self, model, *args, **kwargs):
    models.append(model)
    save("start")
    return prepare_model(self, model, *args, **kwargs)

def save(when):
    found = {f"{i}.{name}": p for i, model in enumerate(models) for name, p in model.named_parameters()}
    arrays = {str(i): np.ascontiguousarray(p.detach().cpu().float().numpy()) for i, p in enumerate(found.values())}
    places = {str(i): [name, list(p.shape), [0] * p.ndim] for i, (name, p) in enumerate(found.items())}
    if rank == "0":
        save_file(arrays, folder / f"{when}-0.safetensors", {"places": json.dumps(places)})

def end():
    save("end")
    lines = [json.dumps({"step": i, "loss": loss}) for i, loss in enumerate(losses)]
    (folder / f"values-{rank}.jsonl").write_text("\\n".join(lines) + "\\n")

accelerate.Accelerator.backward, accelerate.Accelerator.prepare_model = recorded, kept
atexit.register(end)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
'''


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one example: its exit code (None: not finished in time), the metrics that it printed and its recording."""

    code: int | None
    last_line: str
    printed: list[str]
    recording: Path

    @property
    def report(self) -> dict[str, Any]:
        """What is written as JSON."""
        found: dict[str, Any] = {"exit code": self.code, "printed": self.printed}
        if self.code:
            found["last line"] = self.last_line
        losses = _losses(self.recording)
        return {**found, "losses": len(losses), "last loss": losses[-1] if losses else None}


def run_example(name: str, index: int, processes: int, launch: Command, folder: Path) -> Outcome:
    """Run one command of an example. `launch(arguments, record)` gives (exit code, output)."""
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    record = folder / f"record-{index}"
    arguments = EXAMPLES[name][index].format(out=out).split()
    code, output = launch([*([] if name in NO_CPU_FLAG else ["--cpu"]), *arguments], record)
    (folder / f"run-{index}.log").write_text(output)
    printed = [line for line in output.splitlines() if re.search(r"^(\[0\] )?(epoch \d+:|Average test)", line)]
    return Outcome(code, _last_line(output), printed, record)


def difference(reference: Path, other: Path) -> dict[str, Any]:
    """The greatest relative difference of a loss, and of what training added to the parameters, of two recordings."""
    first, second = _losses(reference), _losses(other)
    if not first or not second:
        return {"compared": "nothing: a run recorded no loss"}
    found: dict[str, Any] = {"losses": max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=False))}
    if len(first) != len(second):
        found["number of losses"] = [len(first), len(second)]
    update = _update_difference(reference, other)
    return found if update is None else {**found, "update": update}


def _losses(recording: Path) -> list[float]:
    from polyaccel.tracking.comparison import Recording

    return [value for _, value in Recording("", recording).losses] if recording.is_dir() else []


def _update_difference(reference: Path, other: Path) -> float | None:
    """||(a_end - a_start) - (b_end - b_start)|| / ||a_end - a_start|| over the parameters that both name."""
    import numpy as np

    from polyaccel.tracking.comparison import Recording

    starts, ends = ([Recording("", one).parameters(when) for one in (reference, other)] for when in ("start", "end"))
    gap = norm = 0.0
    for name in starts[0].keys() & starts[1].keys() & ends[0].keys() & ends[1].keys():
        mine, theirs = (
            np.subtract(end[name], start[name], dtype=np.float64) for start, end in zip(starts, ends, strict=True)
        )
        gap, norm = gap + float(np.sum((mine - theirs) ** 2)), norm + float(np.sum(mine**2))
    return float(np.sqrt(gap / norm)) if norm else None


def _last_line(output: str) -> str:
    lines = [line for line in output.strip().splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"^(\[.*\] *)?[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [""])[-1][:300]
