"""`polyaccel plan` with the real compiler for TPUs: no TPU is needed. scripts/test installs it; by hand it is `--libtpu=FOLDER`."""

from __future__ import annotations

import importlib.util
import json
import os

import pytest

from polyaccel.cli.main import main


@pytest.fixture(autouse=True)
def libtpu(request, monkeypatch):
    """On the path of the process that plans alone."""
    folder = request.config.getoption("--libtpu")
    if folder is None and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the compiler for TPUs: scripts/test installs it where there is one")
    if folder is not None:
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("XLA_FLAGS", "")  # how tests compile for the CPU is nothing to this compiler


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


TIED = """
import jax.numpy as jnp, numpy as np, optax
from flax import nnx
from polyaccel import Accelerator

accelerator = Accelerator(partitioning="pmap", mixed_precision="bf16")
model = accelerator.create_model(lambda: nnx.Embed(50257, 768, rngs=nnx.Rngs(0)))
model, optimizer = accelerator.prepare(model, optax.adamw(1e-3))

def loss_fn(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model.attend(model(batch)), batch).mean()

accelerator.train_step(loss_fn, model, optimizer)(np.zeros((8, 128), np.int32))
"""

LAYERS = """
import jax.numpy as jnp, numpy as np, optax
from flax import nnx
from polyaccel import Accelerator

WIDTH = 4096
accelerator = Accelerator(partitioning="pmap", mixed_precision="bf16")
make = lambda: nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)) for _ in range(8)])

class Deep(nnx.Module):
    def __init__(self):
        self.layers = make()

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return x

model, optimizer = accelerator.prepare(accelerator.create_model(Deep), optax.sgd(1e-3))
accelerator.train_step(lambda model, x: (model(x) ** 2).mean(), model, optimizer)(np.zeros((64, WIDTH), np.float32))
"""

STACKED = """
import sys
import jax.numpy as jnp, numpy as np, optax
from flax import nnx
from polyaccel import Accelerator

WIDTH, NUM_LAYERS = 4096, 16
accelerator = Accelerator(partitioning=sys.argv[1], mixed_precision="bf16")

class Stacked(nnx.Module):
    def __init__(self):
        make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs))
        self.layers = nnx.split_rngs(splits=NUM_LAYERS)(make)(nnx.Rngs(0))

    def __call__(self, x):
        run = nnx.scan(lambda layer, x: nnx.tanh(layer(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return run(self.layers, x.astype(jnp.bfloat16))

model, optimizer = accelerator.prepare(accelerator.create_model(Stacked), optax.sgd(1e-3))
accelerator.train_step(lambda model, x: (model(x) ** 2).mean(), model, optimizer)(np.zeros((64, WIDTH), np.float32))
"""


def plan(tmp_path, capsys, *arguments, topology="v5e:2x4", source=SCRIPT):
    script = tmp_path / "train.py"
    script.write_text(source, "utf-8")
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
    assert kinds["all-gather"]["bytes"] > 0
    # Forward 2, backward 3 products of (128, 1024) x (1024, 1024) on each chip.
    assert report["matrix_flops"] == pytest.approx(5 * 2 * 128 * 1024 * 1024)
    assert report["flops"] == pytest.approx(report["matrix_flops"], rel=0.15)
    assert 0 < report["estimate"]["mfu"] < 1


def test_the_gradient_of_a_tied_table_whose_parts_are_96_columns_is_scattered(tmp_path, capsys):
    code, report = plan(tmp_path, capsys, source=TIED)
    assert code == 0
    kinds = {one["kind"]: one for one in report["collectives"]}
    assert kinds["reduce-scatter"]["bytes"] == 4 * 50257 * 768
    assert kinds["all-reduce"]["bytes"] < 1000  # the loss


def test_gathered_parameters_do_not_stay(tmp_path, capsys):
    code, report = plan(tmp_path, capsys, source=LAYERS)
    assert code == 0
    # In bfloat16 they are 268 MB, and the gradient of one layer is 67 MB before it is scattered.
    assert report["temporary_bytes"] < 0.9 * 2 * report["num_parameters"]


@pytest.mark.parametrize("partitioning", ["pmap", "sharding"])
def test_stacked_layers_are_whole_one_at_a_time(tmp_path, capsys, partitioning):
    code, report = plan(tmp_path, capsys, partitioning, source=STACKED)
    assert code == 0
    # In bfloat16 they are 537 MB; the gradient of one layer is 67 MB before it is scattered, and its parts of all layers are 134 MB.
    assert report["temporary_bytes"] < 0.6 * 2 * report["num_parameters"]
    assert report["matrix_flops"] == pytest.approx(3 * 16 * 2 * 8 * 4096**2)


def test_a_step_that_is_too_large_does_not_fit(tmp_path, capsys):
    code, report = plan(tmp_path, capsys, "--width", "65536")
    assert code == 3
    assert report["fits"] is False
    assert "hbm" in report["refusal"].lower()


def test_a_search_names_the_nearest_mesh_that_fits(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace('partitioning="pmap", ', ""), "utf-8")
    search = ["--search", "--search-axes", "data,fsdp,tensor", "--first", "--topology", "v5e:2x2"]
    assert main(["plan", str(script), *search, "--", "--width", "27648"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["v5e:2x2", "data=4", "no"]  # 18 GB of parameters and moments on each
    assert lines[-1] == "the nearest that fits: v5e:2x2 data=2 fsdp=2"
