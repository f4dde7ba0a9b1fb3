"""`polyaccel plan` with the real compiler for TPUs, where libtpu is installed: no TPU is needed."""

from __future__ import annotations

import importlib.util
import json

import pytest

from polyaccel.cli.main import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs polyaccel[tpu-plan]"),
]

SCRIPT = """
import argparse
import jax.numpy as jnp, numpy as np, optax
from flax import nnx
from polyaccel import Accelerator

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=1024)
args = parser.parse_args()
accelerator = Accelerator(partitioning="pmap", mixed_precision="bf16")
make = lambda: nnx.Sequential(
    nnx.Linear(args.width, args.width, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(args.width, args.width, rngs=nnx.Rngs(1))
)
model, optimizer = accelerator.prepare(accelerator.create_model(make), optax.adamw(1e-3))
step = accelerator.train_step(lambda model, batch: (model(batch["x"]) ** 2).mean(), model, optimizer)
step({"x": np.ones((1024, args.width), np.float32)})
"""


def plan(tmp_path, capsys, *arguments, topology="v5e:2x4"):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, "utf-8")
    code = main(["plan", str(script), "--topology", topology, "--mesh.fsdp", "-1", "--json", "--", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_a_step_is_compiled_for_eight_chips(tmp_path, capsys):
    code, report = plan(tmp_path, capsys)
    assert code == 0
    weights = 2 * (1024 * 1024 + 1024)
    assert report["num_parameters"] == weights
    assert report["parameter_bytes"] == weights * 4 // 8
    assert report["fits"] is True
    kinds = {one["kind"]: one for one in report["collectives"]}
    # In float32: parameters are gathered whole and cast where they are used.
    assert kinds["all-gather"]["bytes"] > 0
    # Forward 2, backward 3 products of (128, 1024) x (1024, 1024) on each chip.
    assert report["matrix_flops"] == pytest.approx(5 * 2 * 128 * 1024 * 1024)
    assert report["flops"] == pytest.approx(report["matrix_flops"], rel=0.15)
    assert 0 < report["estimate"]["mfu"] < 1


def test_a_step_that_is_too_large_does_not_fit(tmp_path, capsys):
    code, report = plan(tmp_path, capsys, "--width", "65536")
    assert code == 3
    assert report["fits"] is False
    assert "hbm" in report["refusal"].lower()
