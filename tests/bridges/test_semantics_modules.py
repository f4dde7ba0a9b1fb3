"""Models as Python objects: modes, attributes, buffers, what they return, copies, wrappers, and what is refused by name."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from bridge_scripts import assert_same_on_jax, on_jax, plain
from semantics import assert_trains_as_torch, sgd
from torch import nn

from polyaccel.errors import PrepareError, UnsupportedError

torch.set_num_threads(1)


def rows(num: int = 3, size: int = 8, width: int = 4) -> list[torch.Tensor]:
    return [torch.randn(size, width) for _ in range(num)]


# -- modes and attributes --------------------------------------------------------------------------------------------------------


def test_a_mode_that_is_switched_between_forward_and_backward_counts_for_the_forward():
    def script(acc):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        model, optimizer = acc.prepare(model, sgd(model))
        for x in rows():
            out = model(x)
            model.eval()
            acc.backward(out.pow(3).mean())
            model.train()
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    assert_same_on_jax(script)


class Configured(nn.Module):
    """Looks at a configuration object, a dict and a list of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.config = type("Config", (), {})()
        self.config.scale = 1.0
        self.options = {"shift": 0.0}
        self.powers = [1]

    def forward(self, x):
        return (self.layer(x) * self.config.scale + self.options["shift"]) ** self.powers[0]


def test_what_a_model_looks_up_counts_with_its_present_value():
    def change(model, step):
        if step == 1:
            model.config.scale = 3.0
        elif step == 2:
            model.options["shift"] = 1.0
        elif step == 3:
            model.powers[0] = 2

    assert_trains_as_torch(Configured, lambda: rows(4), before_step=change)


class Counts(nn.Module):
    """Counts its calls, and on request looks at the count."""

    def __init__(self, warm_up=0, factor=1.0):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.calls, self.seen, self.scale = 0, 0, 1.0
        self.warm_up, self.factor = warm_up, factor

    def forward(self, x):
        self.calls += 1
        self.seen += len(x)
        out = self.layer(x)
        if self.warm_up and self.calls <= self.warm_up:
            out = out * (self.calls / self.warm_up)
        if self.factor != 1.0:
            self.scale *= self.factor
            out = out * self.scale
        return out


@pytest.mark.parametrize("options", [{}, {"warm_up": 2}, {"factor": 0.5}], ids=["counter", "schedule", "decay"])
@pytest.mark.parametrize("form", ["loop", "function"])
def test_attributes_that_forward_changes_have_torchs_values(options, form):
    def script(acc):
        model = Counts(**options)
        model, optimizer = acc.prepare(model, sgd(model))
        seen = []
        for x in rows(4):
            if form == "loop":
                loss = model(x).pow(2).mean() + model(x * 2).mean()
                acc.backward(loss)
            else:
                loss = acc.backward(lambda m, x: m(x).pow(2).mean() + m(x * 2).mean(), model, x)
            optimizer.step()
            optimizer.zero_grad()
            seen += [loss.item(), model.calls, model.seen, model.scale]
        with torch.no_grad():
            seen.append(model(x))
        return seen, model.calls, model.seen

    assert_same_on_jax(script)


def test_a_counter_costs_no_compile_and_a_schedule_one_per_value():
    def compiles(**options):
        acc = on_jax()
        model = Counts(**options)
        model, optimizer = acc.prepare(model, sgd(model))
        counts = []
        for x in rows(4):
            acc.backward(model(x).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
            counts.append(acc._engine.num_compiles)
        return counts

    assert len(set(compiles())) == 1
    assert len(set(compiles(factor=0.9))) == 4


def test_a_counter_that_evaluation_looks_at_counts_there():
    class Looks(Counts):
        def forward(self, x):
            return super().forward(x) if self.training else self.layer(x) * self.calls

    def script(acc):
        model = Looks()
        model, optimizer = acc.prepare(model, sgd(model))
        seen = []
        for x in rows(3):
            model.train()
            acc.backward(model(x).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                seen.append(model(x))
        return seen

    assert_same_on_jax(script)


@pytest.mark.parametrize("form", ["loop", "function", "no_grad"])
def test_a_tensor_that_forward_keeps_in_an_attribute_is_refused_where_it_is_used(form):
    class Keeps(nn.Module):
        def __init__(self, reads):
            super().__init__()
            self.layer, self.hidden, self.reads = nn.Linear(4, 4), None, reads

        def forward(self, x):
            out = self.layer(x)
            if self.reads and self.hidden is not None:
                out = out + self.hidden
            self.hidden = out.detach()
            return out

    def loss_fn(model, x):
        return model(x).mean() + model.module.hidden.sum()  # inside the function it is there

    def step(acc, model, x):
        if form == "function":
            acc.backward(loss_fn, model, x)
        else:
            with torch.set_grad_enabled(form == "loop"):
                model(x)

    acc, x = on_jax(), torch.ones(2, 4)
    model = acc.prepare(Keeps(reads=False))
    step(acc, model, x)
    step(acc, model, x)
    with pytest.raises(PrepareError, match="keeps a tensor in its attribute hidden"):
        model.hidden + 1
    with pytest.raises(PrepareError, match="keeps a tensor in its attribute hidden"):
        torch.relu(model.hidden)
    stateful = acc.prepare(Keeps(reads=True))
    step(acc, stateful, x)
    with pytest.raises(PrepareError, match="keeps a tensor in its attribute hidden"):
        step(acc, stateful, x)


class CachesTables(nn.Module):
    """Makes a mask and angles once, and again where a sequence is longer, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.layer, self.mask, self.length, self.tables = nn.Linear(4, 4), None, 0, None

    def forward(self, x):
        if len(x) > self.length:
            self.length = len(x)
            self.mask = torch.ones(self.length, self.length).tril()
            angles = torch.outer(torch.arange(self.length).to(x.dtype), torch.ones(4))
            self.tables = (angles.cos(), angles.sin())
        if self.mask is None:
            raise RuntimeError("the mask was forgotten")
        out = self.mask[: len(x), : len(x)] @ self.layer(x)
        return out * self.tables[0][: len(x)] + self.tables[1][: len(x)]


def test_what_forward_caches_from_sizes_alone_is_made_anew_in_every_capture():
    def ragged():
        return [torch.randn(size, 4) for size in (3, 5, 2, 5)]

    assert_trains_as_torch(CachesTables, ragged, forms=("loop", "function"))


# -- what a model returns ----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.kind = kind

    def forward(self, x, options=None):
        h = self.layer(x)
        if options is not None:
            h = h * options["scale"]
        if self.kind == "dict":
            return {"h": h, "nested": {"list": [h * 2, None], "name": "x", "size": x.shape[0]}, "flag": True}
        if self.kind == "dataclass":
            return Output(h, extra={"mean": h.mean(), "step": 3})
        if self.kind == "named":
            return Pair(h, None)
        return h, (h.detach(), [h.sum(), 1.5]), None


def of_returns(model, x):
    kind = model.kind
    out = model(x, {"scale": 2.0})
    if kind == "dict":
        assert out["nested"]["name"] == "x"
        assert out["nested"]["list"][1] is None
        assert (out["nested"]["size"], out["flag"]) == (8, True)
        h = out["h"] + out["nested"]["list"][0]
    elif kind == "dataclass":
        assert type(out) is Output
        assert out.loss is None
        assert out.extra["step"] == 3
        h = out.logits + out.extra["mean"]
    elif kind == "named":
        assert type(out) is Pair
        assert out.second is None
        h = out.first
    else:
        assert isinstance(out, tuple)
        assert out[1][1][1] == 1.5
        h = out[0] * out[1][0] + out[1][1][0]
    return h.pow(2).mean()


@pytest.mark.parametrize("kind", ["dict", "dataclass", "named", "tuple"])
def test_what_a_model_returns_keeps_its_structure(kind):
    assert_trains_as_torch(lambda: Returns(kind), rows, of_returns, forms=("loop", "function"))


# -- parameters and buffers --------------------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Buffers that forward writes in place, assigns anew, and keeps out of the state dict; a parameter used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = self.layer
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("large", torch.tensor([2**40, 2**31 + 5]))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("nothing", None)

    def forward(self, x):
        h = self.again(torch.tanh(self.layer(x)))
        self.count += 1
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        self.last = h.detach()[0]
        self.large = self.large + 2**33
        self.flag.fill_(True)
        return h * self.mean + self.last + (self.count % 2) * self.flag


def test_buffers_that_forward_writes_are_kept():
    assert_trains_as_torch(Remembers, rows, forms=("loop", "function", "fused"))


class EmbedsBags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 4, mode="mean", padding_idx=0)
        self.words = nn.Embedding(10, 4, padding_idx=1, max_norm=None)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        flat, starts = ids.flatten(), torch.arange(0, ids.numel(), ids.shape[1])
        return self.head(self.bag(ids) + self.bag(flat, starts) + self.words(ids).sum(1))


def test_embedding_bags_and_tied_weights_train():
    assert_trains_as_torch(EmbedsBags, lambda: [torch.randint(0, 10, (4, 3)) for _ in range(3)])


@pytest.mark.parametrize("form", ["loop", "fused"])
def test_a_layer_is_frozen_and_later_unfrozen(form):
    def all_parameters(model):
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    def change(model, step):
        model[0].requires_grad_(step >= 2)

    assert_trains_as_torch(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)),
        lambda: rows(4),
        forms=(form,),
        optimizer=all_parameters,
        before_step=change,
        atol=1e-5,
    )


# -- copies and wrappers -----------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As nn.DataParallel and its like: the model under `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel], ids=["own", "DataParallel"])
def test_a_wrapped_model_trains_under_its_own_names(wrap):
    def make():
        return wrap(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))

    assert_trains_as_torch(make, rows, forms=("loop",))


def test_a_lazy_model_trains_after_a_first_batch_and_is_refused_before():
    def made():
        model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Tanh())
        model(torch.ones(2, 4))
        return model

    assert_trains_as_torch(made, rows, forms=("loop",))
    with pytest.raises(PrepareError, match="lazy"):
        on_jax().prepare(nn.LazyLinear(4))


def test_copies_and_state_dicts_move_both_ways():
    def script(acc):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        model, optimizer = acc.prepare(model, sgd(model))
        best, found = None, []
        for step, x in enumerate(rows(3)):
            acc.backward(model(x).pow(3).mean())
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                best = copy.deepcopy(model.state_dict())
                twin = copy.deepcopy(acc.unwrap_model(model))
        found.append(plain(dict(model.state_dict())))
        model.load_state_dict(best)
        found.append(plain(dict(model.state_dict())))
        found.append(dict(twin.state_dict()))
        model.load_state_dict(twin.state_dict())
        model.eval()
        return found, model(torch.ones(2, 4)), twin.eval()(torch.ones(2, 4))

    assert_same_on_jax(script)


# -- numbers -------------------------------------------------------------------------------------------------------------------------


def test_a_double_model_is_computed_in_double():
    def make():
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()

    def doubles():
        return [torch.randn(8, 4, dtype=torch.float64) for _ in range(3)]

    # 1e-12 is out of reach for anything that passes through float32.
    assert_trains_as_torch(make, doubles, forms=("loop", "function", "fused"), atol=1e-12, rtol=1e-12)


def test_complex_parameters_train_or_are_refused_by_name():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 2, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(torch.complex64) @ self.weight).abs()

    model = Complex()
    with pytest.raises(UnsupportedError, match="'weight', is complex"):
        on_jax().prepare(model, sgd(model))
    model, x = Complex(), torch.randn(3, 4)
    expected = model(x).detach()
    acc = on_jax()
    prepared = acc.prepare(model)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x).clone(), expected)


class Meters(torch.Tensor):
    """A tensor class of the user's own, with its own __torch_function__."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_tensor_class_of_the_users_own_may_be_an_input():
    def script(acc):
        model = nn.Linear(4, 2)
        model, optimizer = acc.prepare(model, sgd(model))
        losses = []
        for x in rows():
            loss = model(x.as_subclass(Meters)).pow(2).mean()
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, dict(model.state_dict())

    assert_same_on_jax(script)
