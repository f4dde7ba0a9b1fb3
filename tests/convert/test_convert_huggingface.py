"""Hugging Face's layout: transformers loads our weights, we read its, and an index cannot point outside its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trained_runs import bits
from transformers import GPT2Config, GPT2LMHeadModel

from polyaccel import Accelerator
from polyaccel.checkpoint.convert import convert
from polyaccel.checkpoint.formats import huggingface
from polyaccel.errors import CheckpointError


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def same(one: Any, other: Any) -> bool:
    """Whether two models hold the same values."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def saved(tmp_path: Path, backend: str = "torch") -> tuple[GPT2LMHeadModel, Path]:
    accelerator = Accelerator(backend=backend, cpu=True, split_batches=True)
    model = gpt2()
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    if backend == "torch":  # elsewhere a step is compiled, and the weights are read in the same way without one
        tokens = torch.arange(32).reshape(4, 8)
        accelerator.backward(prepared(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
    accelerator.save_state(tmp_path / "ours", blocking=True)
    return accelerator.unwrap_model(prepared), tmp_path / "ours"


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_transformers_loads_the_weights_of_a_run(tmp_path: Path, backend: str) -> None:
    model, folder = saved(tmp_path, backend)
    done = convert(folder, tmp_path / "converted", "huggingface")
    assert done.left_behind == ("optimizer", "plain values")
    model.config.save_pretrained(tmp_path / "converted")
    loaded, said = GPT2LMHeadModel.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same(loaded, model)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_transformers_loads_what_save_model_wrote(tmp_path: Path, backend: str) -> None:
    accelerator = Accelerator(backend=backend, cpu=True)
    model = accelerator.prepare(gpt2())
    accelerator.save_model(model, tmp_path, max_shard_size="8KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert "lm_head.weight" not in index["weight_map"]  # tied: once
    own = accelerator.unwrap_model(model)
    own.config.save_pretrained(tmp_path)
    assert same(GPT2LMHeadModel.from_pretrained(tmp_path), own)
    accelerator.save(accelerator.get_state_dict(model), tmp_path / "copy.safetensors")
    assert set(load_file(tmp_path / "copy.safetensors")) == set(own.state_dict())


def test_save_model_takes_models_of_flax(tmp_path: Path) -> None:
    from flax import nnx
    from safetensors import safe_open

    accelerator = Accelerator(backend="jax", cpu=True)
    model = accelerator.prepare(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    accelerator.save_model(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "flax"}
        np.testing.assert_array_equal(file.get_tensor("kernel"), accelerator.get_state_dict(model)["kernel"])


@pytest.mark.parametrize("size", ["10GB", "8KB"])
def test_there_and_back_is_exact(tmp_path: Path, size: str) -> None:
    gpt2().bfloat16().save_pretrained(tmp_path / "theirs", max_shard_size=size)
    convert(tmp_path / "theirs", tmp_path / "ours", "polyaccel")
    convert(tmp_path / "ours", tmp_path / "back", "huggingface")
    before = {n: t for file in (tmp_path / "theirs").glob("*.safetensors") for n, t in load_file(file).items()}
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)


def test_large_weights_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "_MAX_FILE", "8KB")
    model, folder = saved(tmp_path)
    convert(folder, tmp_path / "converted", "huggingface", only=["model"])
    model.config.save_pretrained(tmp_path / "converted")
    assert same(GPT2LMHeadModel.from_pretrained(tmp_path / "converted"), model)
    convert(tmp_path / "converted", tmp_path / "back", "polyaccel")
    assert bits(tmp_path / "back")["model"] == bits(folder)["model"]


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "", "a\0b", 7])
def test_an_index_that_points_outside_is_refused(tmp_path: Path, file: Any) -> None:
    gpt2().save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    text["weight_map"]["transformer.wte.weight"] = file
    index.write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="which is no file of the folder"):
        convert(tmp_path / "theirs", tmp_path / "converted", "polyaccel")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no safetensors file"):
        convert(tmp_path / "theirs", tmp_path / "converted", "polyaccel")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
