"""`remat` on the torch engine in one process: what is kept for a backward pass, and what must not change."""

from __future__ import annotations

import copy

import pytest
import torch
from layers_job import llama
from small_gpt import accelerator, gpt, loss_fn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from polyaccel import Accelerator
from polyaccel.errors import PrepareError


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.dropout(self.norm(self.layer(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def kept_bytes(model, batch):
    """Of the tensors that a forward pass keeps, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_fn(model, batch)
    return sum(size for size, _ in kept.values())


def trained(remat, make, inputs):
    torch.manual_seed(0)
    run = Accelerator(backend="torch", cpu=True, remat=remat)
    model = make()
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    torch.manual_seed(1)
    for x in inputs:
        run.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_parameters_and_running_statistics_are_those_of_a_run_that_keeps_everything(remat):
    inputs = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    kept, again = trained("none", Net, inputs), trained(remat, Net, inputs)
    assert list(kept) == list(again)
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name


def test_full_keeps_little_and_dots_computes_no_product_with_a_weight_again():
    batch = torch.randint(64, (8, 17))
    bytes_kept, operations = {}, {}
    for remat in ("none", "full", "dots"):
        run = accelerator(remat=remat)
        model = run.prepare(gpt(0))
        bytes_kept[remat] = kept_bytes(model, batch)
        loss = loss_fn(model, batch)
        with FlopCounterMode(display=False) as counter:
            run.backward(loss)
        counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
        operations[remat] = counts["aten.mm"] + counts.get("aten.addmm", 0)
    assert bytes_kept["full"] < bytes_kept["none"] / 4
    assert operations["dots"] == operations["none"] < operations["full"]


def test_a_model_of_transformers_does_it_itself_and_lets_go_of_its_cache():
    run = accelerator(remat="full")
    model = run.prepare(llama())
    calls = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.randint(64, (2, 8))
    run.backward(model(input_ids=tokens, labels=tokens).loss)
    assert len(calls) == 2
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_copy_of_the_model_computes_with_its_own_parameters():
    run = accelerator(remat="full")
    model = run.prepare(Net())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x = torch.ones(4, 8)
    other(x).sum().backward()
    assert torch.equal(other.eval()(x), x)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_block_whose_forward_is_its_own_attribute_is_refused_and_unchanged():
    model = Net()
    model.blocks[1].forward = own = lambda x: x
    with pytest.raises(PrepareError, match="a block of Net"):
        accelerator(remat="full").prepare(model)
    assert model.blocks[1].forward is own
    assert "forward" not in model.blocks[0].__dict__
