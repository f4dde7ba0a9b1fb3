"""What a plan says of a GPT-2 in torch, held against a step that is written in jax by hand."""

from __future__ import annotations

import json
from pathlib import Path

import handwritten_gpt2
import jax
import pytest

from polyaccel.cli.main import main

SIZE = handwritten_gpt2.Size(layers=2, width=128, heads=2, vocab=2048, length=256, batch=2)


def test_operations_memory_and_exchanges_are_those_of_a_step_written_by_hand(capsys):
    script = Path(__file__).with_name("planned_gpt2.py")
    names = ("layers", "width", "heads", "vocab", "length", "batch")
    sizes = [word for name in names for word in (f"--{name}", str(getattr(SIZE, name)))]
    assert main(["plan", str(script), "--topology", "cpu:4", "--mesh.fsdp", "4", "--json", "--", *sizes]) == 0
    plan = json.loads(capsys.readouterr().out)
    program = handwritten_gpt2.compiled(jax.devices()[:4], SIZE)
    by_hand = handwritten_gpt2.figures(program)
    assert plan["flops"] == pytest.approx(by_hand["flops"], rel=0.03)
    assert plan["peak_bytes"] == pytest.approx(by_hand["peak"], rel=0.03)
    kinds = {one["kind"]: one["bytes"] for one in plan["collectives"]}
    weights = 4 * plan["num_parameters"]
    table = 4 * SIZE.vocab * SIZE.width  # gathered in float32 for its rows, and as the head in bfloat16
    assert kinds == {"all-gather": weights + table, "reduce-scatter": weights, "all-reduce": 4}  # the loss
