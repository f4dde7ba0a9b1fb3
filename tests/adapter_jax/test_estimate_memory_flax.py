"""`polyaccel estimate-memory` of flax modules: sizes are those of real arrays, and nothing is allocated for them."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

from polyaccel.cli.main import main


class Linen(linen.Module):
    width: int = 64

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Dense(5)(linen.relu(linen.Dense(self.width)(x)))


class Huge(Linen):
    width: int = 2**28


class Nnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(16, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.second = nnx.Linear(64, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(self.drop(self.norm(nnx.relu(self.first(x)))))


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    module = types.ModuleType("flax_to_estimate")
    vars(module).update(Linen=Linen, Nnx=Nnx, Huge=Huge)
    monkeypatch.setitem(sys.modules, "flax_to_estimate", module)

    def ask(*arguments: str) -> Any:
        assert main(["estimate-memory", *arguments, "--precision", "float32", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_linen_parameters_gradients_and_optimizer_are_those_of_real_arrays(report: Any) -> None:
    found = report("flax_to_estimate:Linen", "--input", "B,16", "--batch-size", "8", "--optimizer", "adafactor")
    params = Linen().init(jax.random.key(0), jnp.ones((8, 16)))["params"]
    training = found["precisions"]["float32"]["training"]
    assert training["parameters"] == training["gradients"] == _bytes(params)
    assert training["optimizer"] == _bytes(optax.adafactor(0.1).init(params))
    assert training["batch"] == 8 * 16 * 4
    layer = found["precisions"]["float32"]["largest_layer"]
    assert layer == {"name": "Dense_1", "bytes": _bytes(params["Dense_1"])}


def test_nnx_statistics_are_buffers_and_random_keys_are_not(report: Any) -> None:
    found = report("flax_to_estimate:Nnx", "--input", "B,16")["precisions"]["float32"]
    model = Nnx()
    assert found["training"]["parameters"] == _bytes(nnx.state(model, nnx.Param))
    assert (
        found["training"]["buffers"] == _bytes(nnx.state(model, nnx.BatchStat)) + 4
    )  # the count of draws of the dropout
    assert found["training"]["optimizer"] == _bytes(optax.adamw(0.1).init(nnx.state(model, nnx.Param)))
    assert found["largest_layer"]["name"] == "first"


def test_what_is_compiled_needs_at_least_the_activations_between_the_layers(report: Any) -> None:
    few, many = (
        report("flax_to_estimate:Linen", "--input", "B,16", "--batch-size", size)["precisions"]["float32"]["training"]
        for size in ("64", "4096")
    )
    assert many["activations"] >= 4096 * 64 * 4
    assert few["activations"] < many["activations"]


def test_a_model_larger_than_any_memory_is_only_shapes(report: Any) -> None:
    found = report("flax_to_estimate:Huge", "--input", "B,65536")
    assert found["parameters"] > 2**44
