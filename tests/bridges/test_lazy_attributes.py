"""What forward does to its own module while it is captured leaves no trace: containers and hooks are as before."""

from __future__ import annotations

import torch
from bridge_scripts import assert_same_on_jax
from torch import nn

from polyaccel import Accelerator
from polyaccel_bridges.containers import ContainerContents

torch.set_num_threads(1)


class Recording(nn.Module):
    """Installs a hook in its first forward, as transformers does, and adds what the hook saw."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        if not getattr(self, "has_hooks", False):
            self.layer.register_forward_hook(lambda module, args, output: self.seen.append(output))
            self.has_hooks = True
        self.seen = []
        self.layer(x)
        return self.head(torch.stack(self.seen).sum(0))


def test_hooks_that_the_first_forward_installs_are_installed_once():
    def script(acc):
        model = Recording()
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        losses = []
        for size in (8, 8, 6, 5):  # every size is captured anew
            x = torch.randn(size, 4)
            with torch.no_grad():
                losses.append(model(x).mean())
            loss = model(x).square().mean()
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses, dict(model.state_dict())

    assert_same_on_jax(script)


def test_containers_are_put_back_with_their_order_and_identity():
    module = nn.Linear(2, 2)
    module.kept, module.nested, module.names = [1, 2], {"b": [3], "a": {4}}, ({"x": 1},)
    kept, nested, names = module.kept, module.nested, module.names
    contents = ContainerContents([module])
    module.kept.append(5)
    module.nested["b"].clear()
    module.nested["a"].add(6)
    module.nested["c"] = 7
    module.names[0]["x"] = 8
    contents.restore()
    assert module.kept is kept
    assert kept == [1, 2]
    assert module.nested is nested
    assert list(nested.items()) == [("b", [3]), ("a", {4})]
    assert names == ({"x": 1},)


class Keeping(nn.Module):
    """Keeps its activations in a list, for whoever looks."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.kept = []

    def forward(self, x):
        self.kept.append(self.layer(x))
        return self.kept[-1].sum()


def test_a_list_that_forward_fills_is_told_of_once(caplog):
    accelerator = Accelerator(backend="jax", cpu=True)
    model = accelerator.prepare(Keeping())
    with caplog.at_level("WARNING"):
        for size in (8, 8, 4):
            accelerator.backward(model(torch.randn(size, 4)))
    said = [record.getMessage() for record in caplog.records if "Keeping.kept" in record.getMessage()]
    assert len(said) == 1
    assert "Return them from forward instead" in said[0]
    assert accelerator.unwrap_model(model).kept == []
