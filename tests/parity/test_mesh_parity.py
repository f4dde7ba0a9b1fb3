"""A GPT launched as a user launches it, on meshes of four devices: twenty losses of one device, and the bytes that the plan says.

The few meshes here are a user's view of what the adapters' own tests hold in one process; mesh_parity.py runs all of them.
"""

from __future__ import annotations

import functools
import importlib.util
import json

import pytest
from mesh_parity import AXES, declared_axes, largest_difference, meshes_of, named, trained, with_row
from mesh_training import train

from polyaccel import Accelerator

IS_XLA = importlib.util.find_spec("torch_xla") is not None
HERE = [(engine, {"fsdp": 2, "tensor": 2}) for engine in (("xla",) if IS_XLA else ("torch", "jax"))]


@functools.cache
def losses_of_one_process() -> list[float]:
    return train(Accelerator(backend="torch", cpu=True, split_batches=True), "function", 20)[0]


@pytest.mark.parametrize(("engine", "mesh"), HERE, ids=[f"{engine}-{named(mesh)}" for engine, mesh in HERE])
def test_twenty_losses_and_the_bytes_of_a_device_are_as_foreseen(engine, mesh):
    found = trained(engine, mesh)
    # float32 sums in another order, amplified by twenty AdamW steps
    assert largest_difference(found["losses"], losses_of_one_process()) <= 1e-5
    assert found["parameters"] == found["predicted"]
    assert found["state"] == 2 * found["predicted"]  # AdamW's two averages lie as the parameters do
    parts = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    assert (
        found["predicted"] <= found["whole"] / parts * 1.15
    )  # norms, positions and row biases are not cut by every axis


@pytest.mark.skipif(IS_XLA, reason="torch and jax are in the main environment")
def test_the_table_has_every_mesh_that_an_engine_declares():
    meshes = [named(mesh) for mesh in meshes_of(declared_axes("torch"))]
    assert {"data 4", "fsdp 4", "tensor 4", "data 2 x fsdp 2", "data 2 x tensor 2", "fsdp 2 x tensor 2"} <= {*meshes}
    assert len(meshes_of(frozenset(AXES))) == 10


def test_a_row_takes_the_place_of_its_own_alone_in_a_table_that_another_run_writes_to(tmp_path):
    table = tmp_path / "rows.json"
    mine = {"engine": "jax", "mesh": {"data": 4}, "form": "flax"}
    assert with_row(table, mine) == [mine]
    others = [{**mine, "engine": "torch"}, {**mine, "mesh": {"fsdp": 4}}, {**mine, "form": "loss"}]
    table.write_text(json.dumps({"rows": [{**mine, "error": "older"}, *others]}))
    assert with_row(table, mine) == [*others, mine]
