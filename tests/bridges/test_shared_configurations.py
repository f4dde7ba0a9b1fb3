"""A configuration that forward fills in: captured once where forward does the same afterwards, never mixed up where it does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import assert_same_on_jax, on_jax
from torch import nn

torch.set_num_threads(1)


class Configured(nn.Module):
    def __init__(self, **config) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.config = SimpleNamespace(**config)
        self.kind: str | None = None

    def forward(self, x):
        if self.config.problem_type is None:
            self.config.problem_type = "regression" if x.dtype == torch.float64 else "classification"
        if self.kind is None:
            self.kind = self.config.problem_type
        out = self.first(x)
        return out if self.config.problem_type == "regression" else out.softmax(-1)


class OtherNumber(Configured):
    def forward(self, x):
        scale = self.config.scale
        self.config.scale = 3.0
        return self.first(x) * scale


class OtherLayer(Configured):
    def forward(self, x):
        layer = self.first if self.config.problem_type is None else self.second
        self.config.problem_type = "seen"
        return layer(x)


class OtherOutput(Configured):
    def forward(self, x):
        answer = self.config.answer
        self.config.answer = "later"
        return {"answer": answer, "out": self.first(x)}


class Counting(Configured):
    def forward(self, x):
        self.config.calls += 1
        return self.first(x)


def num_programs(acc) -> int:
    return sum("forward of" in event.program for event in acc.compile_events)


def test_what_forward_fills_in_for_itself_makes_no_second_program():
    acc = on_jax()
    model = acc.prepare(Configured(problem_type=None))
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(2, 4))
    assert (model.config.problem_type, model.kind) == ("classification", "classification")
    assert num_programs(acc) == 1
    model.config.problem_type = "regression"  # and the guard still notices a change
    with torch.no_grad():
        assert model(torch.ones(2, 4)).sum().item() == pytest.approx(
            model.first(torch.ones(2, 4)).sum().item(), abs=1e-5
        )
    assert num_programs(acc) == 2


@pytest.mark.parametrize(
    ("make", "config", "programs"),
    [
        (OtherNumber, {"scale": 1.0}, 2),
        (OtherLayer, {"problem_type": None}, 2),
        (Counting, {"calls": 0}, 1),
    ],
)
def test_what_decides_something_is_captured_for_each_of_its_values(make, config, programs):
    def script(acc):
        model = acc.prepare(make(**config))
        x = torch.randn(2, 4)
        with torch.no_grad():
            seen = [model(x).clone() for _ in range(4)]
        if hasattr(acc, "compile_events"):
            assert num_programs(acc) == programs
        return seen, {name: repr(value) for name, value in vars(model.config).items()}

    assert_same_on_jax(script)


def test_a_plain_output_that_changes_is_not_mixed_up():
    model = on_jax().prepare(OtherOutput(answer="first"))
    with torch.no_grad():
        assert [model(torch.ones(2, 4))["answer"] for _ in range(3)] == ["first", "later", "later"]


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_classifier_of_transformers_without_problem_type_is_captured_once(num_labels):
    transformers = pytest.importorskip("transformers")

    def script(acc):
        config = transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        ids = torch.randint(0, 32, (4, 6))
        labels = torch.rand(4) if num_labels == 1 else torch.randint(0, 3, (4,))
        losses = []
        for _ in range(3):
            out = model(input_ids=ids, labels=labels)
            acc.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(out.loss.detach())
        if hasattr(acc, "compile_events"):
            assert sum("backward of" in event.program for event in acc.compile_events) == 1
            assert model.config.problem_type == ("regression" if num_labels == 1 else "single_label_classification")
        return losses

    assert_same_on_jax(script, atol=1e-5)


def test_two_models_that_share_a_configuration_each_see_its_value():
    def script(acc):
        one = Configured(problem_type=None)
        two = Configured(problem_type=None)
        two.config = one.config
        one, two = acc.prepare(one, two)
        x = torch.randn(3, 4)
        loss = F.mse_loss(one(x), torch.zeros(3, 3)) + two(x).pow(2).sum()
        acc.backward(loss)
        return loss.detach(), one.first.weight.grad, two.first.weight.grad

    assert_same_on_jax(script)
