"""Orbax: flax programs restore our runs into their own trees, and we continue theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from trained_runs import bits

from polyaccel import Accelerator
from polyaccel.checkpoint import open_checkpoint
from polyaccel.checkpoint.convert import convert
from polyaccel.errors import CheckpointError

BATCH = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)


class Net(nnx.Module):
    """Layers in a list, of which one is bfloat16."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs, param_dtype=jnp.bfloat16)])

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.layers[1](jnp.tanh(self.layers[0](inputs)))


def loss_fn(model: Any, batch: Any) -> Any:
    return (model(batch).astype(jnp.float32) ** 2).mean()


def trained(seed: int = 0, steps: int = 3) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(backend="jax", cpu=True)
    model, optimizer = accelerator.prepare(Net(nnx.Rngs(seed)), optax.adamw(0.05))
    for _ in range(steps):
        step(accelerator, model, optimizer)
    return accelerator, model, optimizer


def step(accelerator: Accelerator, model: Any, optimizer: Any) -> float:
    loss = accelerator.backward(loss_fn, model, jnp.asarray(BATCH))
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def ours(tmp_path: Path) -> tuple[Accelerator, Any, Any, Path]:
    accelerator, model, optimizer = trained()
    accelerator.save_state(tmp_path / "ours", blocking=True)
    return accelerator, model, optimizer, tmp_path / "ours"


def test_flax_restores_a_run_of_ours_into_its_own_trees(tmp_path: Path) -> None:
    accelerator, model, optimizer, folder = ours(tmp_path)
    convert(folder, tmp_path / "converted", "orbax")

    params = nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(1)), nnx.Param))
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeRestore({"model": params}, partial_restore=True)
        restored = checkpointer.restore((tmp_path / "converted").absolute(), args=args)
        state = checkpointer.restore((tmp_path / "converted").absolute())["optimizer"]
    live = nnx.to_pure_dict(nnx.state(accelerator.unwrap_model(model), nnx.Param))
    assert jax.tree.structure(restored["model"]) == jax.tree.structure(live)
    assert equal(restored["model"], live)
    # optax's states are named tuples, some of them empty: the same leaves in the same order.
    moments = jax.tree.unflatten(jax.tree.structure(optax.adamw(0.05).init(params)), jax.tree.leaves(state))
    assert int(moments[0].count) == 3
    assert equal(moments, optimizer.opt_state)


def test_standard_checkpointer_reads_all_of_it(tmp_path: Path) -> None:
    _, _, _, folder = ours(tmp_path)
    convert(folder, tmp_path / "converted", "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((tmp_path / "converted").absolute())
    assert tree["model"]["layers"]["1"]["kernel"].dtype == jnp.bfloat16
    assert set(tree["optimizer"]["0"]) == {"count", "mu", "nu"}


def test_there_and_back_is_exact(tmp_path: Path) -> None:
    _, _, _, folder = ours(tmp_path)
    convert(folder, tmp_path / "there", "orbax")
    done = convert(tmp_path / "there", tmp_path / "back", "polyaccel")
    assert done.left_behind == ()
    assert bits(tmp_path / "back") == bits(folder)
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "back")
    assert (after.shared, after.own(0)) == (before.shared, before.own(0))


@pytest.mark.parametrize("form", ["pure", "state"])
def test_a_run_continues_from_a_checkpoint_of_theirs(tmp_path: Path, form: str) -> None:
    net = Net(nnx.Rngs(4))
    optimizer = nnx.Optimizer(net, optax.adamw(0.05), wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(net, nnx.grad(loss_fn)(net, jnp.asarray(BATCH)))
    weights, moments = nnx.state(net, nnx.Param), nnx.state(optimizer.opt_state)
    if form == "pure":
        weights, moments = nnx.to_pure_dict(weights), nnx.to_pure_dict(moments)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "theirs").absolute(), {"params": weights, "opt_state": moments, "step": 2})
    done = convert(tmp_path / "theirs", tmp_path / "converted", "polyaccel")
    assert done.left_behind == ("step",)

    accelerator, model, prepared = trained(seed=9, steps=1)
    accelerator.load_state(tmp_path / "converted")
    live = nnx.to_pure_dict(nnx.state(accelerator.unwrap_model(model), nnx.Param))
    assert equal(live, nnx.to_pure_dict(nnx.state(net, nnx.Param)))
    step(accelerator, model, prepared)
    optimizer.update(net, nnx.grad(loss_fn)(net, jnp.asarray(BATCH)))
    live = nnx.to_pure_dict(nnx.state(accelerator.unwrap_model(model), nnx.Param))
    expected = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    for one, other in zip(jax.tree.leaves(live), jax.tree.leaves(expected), strict=True):
        # Four shards average their gradients in another order than one batch does.
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-5 if one.dtype == jnp.float32 else 1e-2
        )


def test_a_manager_s_step_is_read_where_it_has_one_item(tmp_path: Path) -> None:
    tree = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "name": "net"}
    with ocp.CheckpointManager((tmp_path / "theirs").absolute()) as manager:
        manager.save(7, args=ocp.args.PyTreeSave(tree))
    convert(tmp_path / "theirs" / "7", tmp_path / "converted", "polyaccel")
    assert bits(tmp_path / "converted") == {"model": {"kernel": ("float32", (2, 3), tree["kernel"].tobytes())}}


def test_a_missing_array_is_noticed(tmp_path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "theirs").absolute(), {"params": {"kernel": np.ones((300, 300), np.float32)}})
    for file in (tmp_path / "theirs").rglob("d/*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(tmp_path / "theirs", tmp_path / "converted", "polyaccel")
    assert not (tmp_path / "converted").exists()


def equal(one: Any, other: Any) -> bool:
    """Whether two trees of arrays hold the same bits in the same order."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
