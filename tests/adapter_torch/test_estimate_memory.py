"""`polyaccel estimate-memory`: what it says of a model, beside what the model really takes when it is trained."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyaccel.cli.main import main
from polyaccel_torch.estimate import saved_bytes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.mix = nn.TransformerEncoderLayer(8, 2, dim_feedforward=32, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11)
        self.fixed = nn.Parameter(torch.zeros(3, 5), requires_grad=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.mix(self.words(tokens)).mean(1)))


class Peeking(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum().item() > 0 else x


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    module = types.ModuleType("models_to_estimate")
    vars(module).update(Net=Net, Peeking=Peeking)
    monkeypatch.setitem(sys.modules, "models_to_estimate", module)

    def ask(*arguments: str) -> Any:
        assert main(["estimate-memory", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("text", "kind", "settings"),
    [
        ("adamw", torch.optim.AdamW, {}),
        ("sgd", torch.optim.SGD, {}),
        ("sgd:momentum=0.9", torch.optim.SGD, {"momentum": 0.9}),
        ("adafactor", torch.optim.Adafactor, {}),
        ("rmsprop:centered=true", torch.optim.RMSprop, {"centered": True}),
    ],
)
def test_parameters_gradients_and_optimizer_are_what_a_trained_model_holds(
    report: Any, text: str, kind: Any, settings: Any
) -> None:
    found = report("models_to_estimate:Net", "--optimizer", text)["precisions"]["float32"]
    model = Net()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.1, **settings)
    model(torch.ones(2, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    training = found["training"]
    assert training["parameters"] == _bytes(model.parameters())
    assert training["buffers"] == _bytes(model.buffers())
    assert training["gradients"] == _bytes(p.grad for p in model.parameters() if p.grad is not None)
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert training["optimizer"] == _bytes(value for value in state if isinstance(value, torch.Tensor))
    assert found["weights"] == _bytes(model.state_dict().values()) - _bytes([model.head.weight])  # tied: once
    assert not training["is_complete"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps_of_a_real_forward(report: Any, precision: str) -> None:
    found = report("models_to_estimate:Net", "--input", "B,S:int64", "--batch-size", "4", "--sequence-length", "6")
    training = found["precisions"][precision]["training"]
    tokens = torch.ones(4, 6, dtype=torch.int64)
    assert training["activations"] == saved_bytes(Net(), (tokens,), {}, getattr(torch, precision))
    assert training["batch"] == 4 * 6 * 8
    parts = ("parameters", "buffers", "gradients", "optimizer", "activations", "batch")
    assert training["total"] == sum(training[part] for part in parts)
    assert training["is_complete"]


def test_what_a_forward_keeps_grows_with_the_batch_and_counts_shared_memory_once() -> None:
    layer = nn.Linear(4, 4)
    x = torch.ones(2, 4)
    assert saved_bytes(layer, (x,), {}, torch.float32) == 0  # the inputs and the weight, which are counted elsewhere
    twice = nn.Sequential(layer, nn.Sigmoid(), nn.Linear(4, 4))
    assert saved_bytes(twice, (x,), {}, torch.float32) == 2 * 4 * 4  # the sigmoid's output, which two operations keep
    assert saved_bytes(twice, (torch.ones(6, 4),), {}, torch.float32) == 6 * 4 * 4


def test_matrices_of_layers_shrink_with_the_precision_and_embeddings_do_not(report: Any) -> None:
    found = report("models_to_estimate:Net")["precisions"]
    model = Net()
    floating = sum(p.numel() for p in model.parameters()) + 2 * 8
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n != "words.weight")
    assert found["float16"]["weights"] == 2 * floating + 8
    assert found["int8"]["weights"] == 2 * (floating - matrices) + matrices + 8
    assert found["int4"]["weights"] == 2 * (floating - matrices) + matrices // 2 + 8
    assert found["int8"]["training"] is None


def test_a_transformers_configuration_is_enough(report: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=64)
    config.architectures = ["GPT2LMHeadModel"]
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    found = report(str(tmp_path), "--batch-size", "2", "--sequence-length", "16")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config.to_dict(), "dtype": "float32"})).train()
    tokens = torch.ones(2, 16, dtype=torch.int64)
    training = found["precisions"]["float32"]["training"]
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert training["parameters"] == _bytes(model.parameters())
    call = {"input_ids": tokens, "labels": tokens}
    assert training["activations"] == saved_bytes(model, (), call, torch.float32)
    layer = found["precisions"]["float32"]["largest_layer"]
    assert layer == {"name": "transformer.h.0", "bytes": _bytes(model.transformer.h[0].parameters())}


def test_what_cannot_be_counted_is_said_and_never_guessed(report: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = report("models_to_estimate:Peeking", "--input", "B,4")
    assert found["precisions"]["float32"]["training"]["activations"] is None
    assert any("Peeking cannot run on shapes alone" in note for note in found["notes"])
    assert main(["estimate-memory", "models_to_estimate:Peeking"]) == 0
    assert "+ ?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "is no folder with a config.json"),
        (["models_to_estimate:Gone"], "has no callable 'Gone'"),
        (["models_to_estimate:Net", "--optimizer", "adamww"], "did you mean 'adamw'"),
        (["models_to_estimate:Net", "--optimizer", "adam8bit"], "none of torch.optim"),
        (["models_to_estimate:Net", "--optimizer", "sgd:nesterov=true"], "Nesterov"),
        (["models_to_estimate:Net", "--optimizer", "sgd:momentum"], "is no KEY=VALUE"),
        (["models_to_estimate:Net", "--input", "B,S:int64"], "no --sequence-length"),
        (["models_to_estimate:Net", "--input", "B,x"], "a size is no number"),
        (["models_to_estimate:Net", "--input", "B:int7"], "is no dtype"),
        (["models_to_estimate:Net", "--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_what_cannot_be_understood_is_named(
    report: Any, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate-memory", *arguments]) == 1
    assert reason in capsys.readouterr().err
