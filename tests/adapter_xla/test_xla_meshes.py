"""Meshes with fsdp and tensor on four virtual devices: the numbers of one torch process, and the pieces that the rules say.

A mesh costs one compilation of a GPT; everything that is asked of it is asked of that one.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch_xla.distributed.spmd as xs
from adapter_xla.cases import compiles
from torch import nn

from polyaccel import Accelerator, ShardingRule
from polyaccel.sharding.plan import num_shards, plan_shardings

sys.path.insert(0, str(Path(__file__).parents[1] / "adapter_torch"))
from small_gpt import Gpt, gpt, loader, loss_fn

MESHES = {
    "fsdp 4": {"data": 1, "fsdp": 4},
    "fsdp 2 x tensor 2": {"data": 1, "fsdp": 2, "tensor": 2},
    "data 2 x fsdp 2": {"data": 2, "fsdp": 2},
    "data 2 x tensor 2": {"data": 2, "tensor": 2},
    "tensor 4": {"data": 1, "tensor": 4},
}
RULE = ShardingRule("tokens.weight", ("tensor", None))


def small(seed=0) -> Gpt:
    model = gpt(seed)
    model.blocks = model.blocks[:1]  # half the graph to compile
    return model


def on_one_device():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for batch in (batch for _ in range(2) for batch in loader()):
        loss = loss_fn(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def expected():
    return on_one_device()


def local_bytes(tensors):
    """Bytes on the first device."""
    return sum(xs.wrap_if_sharded(tensor).local_shards[0].data.nbytes for tensor in tensors)


def predicted_bytes(model, sizes):
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    specs = plan_shardings(shapes, {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1, **sizes}, [RULE]).specs
    sizes = {"fsdp": 1, "tensor": 1, **sizes}
    return sum(p.nbytes // num_shards(specs[name], sizes) for name, p in model.named_parameters())


def started(mesh, seed=0, **settings):
    accelerator = Accelerator(backend="xla", split_batches=True, mesh=mesh, sharding_rules=[RULE], **settings)
    model = small(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    return accelerator, *accelerator.prepare(model, optimizer, loader())


def train(accelerator, model, optimizer, batches):
    """(losses, graphs compiled) per batch of one pass."""
    losses, counts = [], []
    for batch in batches:
        before = compiles()
        loss = accelerator.backward(loss_fn, model, batch)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        counts.append(compiles() - before)
    return losses, counts


@pytest.mark.parametrize("name", MESHES)
def test_a_gpt_on_every_mesh_trains_as_on_one_device_in_the_predicted_bytes_and_one_graph(name, expected, tmp_path):
    mesh = MESHES[name]
    accelerator, model, optimizer, batches = started(mesh)
    bytes_here = predicted_bytes(model, mesh)
    assert local_bytes(model.parameters()) == bytes_here
    assert bytes_here < sum(parameter.nbytes for parameter in model.parameters())
    losses, counts = train(accelerator, model, optimizer, batches)
    assert counts == [1] + [0] * 9
    accelerator.save_state(tmp_path, blocking=True)
    with torch.no_grad():  # what training would go on with, if nothing were loaded
        model.head.weight.mul_(3.0)
    accelerator.load_state(tmp_path)
    more, counts = train(accelerator, model, optimizer, batches)
    assert counts == [0] * 10  # loaded values lie as trained ones
    reference, weights = expected
    # float32 in another order of additions, over 20 steps.
    assert max(abs(a - b) for a, b in zip(losses + more, reference, strict=True)) < 1e-5
    accelerator._engine.synchronize()
    state = [value for slots in optimizer.state.values() for value in slots.values() if value.dim()]
    assert local_bytes(model.parameters()) == bytes_here
    assert local_bytes(state) == 2 * bytes_here
    found = accelerator.get_state_dict(model)
    assert list(found) == list(weights)
    # Adam turns the rounding of gradients that are zero (the bias of keys) into steps of its full size: 1e-3 each.
    for key, value in found.items():
        torch.testing.assert_close(value.cpu(), weights[key], rtol=0, atol=2e-2 if "k_proj.bias" in key else 2e-4)
