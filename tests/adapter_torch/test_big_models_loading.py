"""Checkpoints of every layout into models that are empty, real, or spread over devices."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from big_networks import Net, TiedNet, evaluated
from safetensors.torch import save_file
from torch import nn
from torch_network import accelerator

from polyaccel import init_empty_weights, init_on_device, load_checkpoint_and_dispatch, load_checkpoint_in_model
from polyaccel.errors import CheckpointError, ConfigError, PlanError, UnsupportedError
from polyaccel.stored import StoredPiece, StoredWeight
from polyaccel_torch.big_models import load_weights

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved() -> nn.Module:
    return evaluated(Net())


def _empty() -> Net:
    with init_empty_weights():
        return Net()


def _file(folder: Path, model: nn.Module) -> Path:
    path = folder / "model.safetensors"
    save_file(dict(model.state_dict()), path)
    return path


def _sharded(folder: Path, model: nn.Module, suffix: str = "safetensors") -> Path:
    values = dict(model.state_dict())
    parts = {f"part-{i}.{suffix}": {k: v for n, (k, v) in enumerate(values.items()) if n % 2 == i} for i in range(2)}
    for name, part in parts.items():
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def _equal(model: nn.Module, saved: nn.Module) -> bool:
    held = model.state_dict()
    return all(torch.equal(held[name], value) for name, value in saved.state_dict().items())


def test_an_empty_model_has_shapes_ties_and_buffers_and_no_memory() -> None:
    with init_empty_weights():
        model = TiedNet()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.positions, torch.arange(8.0))
    with init_empty_weights(include_buffers=True):
        assert TiedNet().positions.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_an_empty_model_keeps_what_its_parameters_are() -> None:
    class Marked(nn.Parameter):
        pass

    with init_empty_weights():
        module = nn.Module()
        module.frozen = Marked(torch.ones(2), requires_grad=False)
        lazy = nn.LazyLinear(3)
    assert type(module.frozen) is Marked
    assert module.frozen.is_meta
    assert not module.frozen.requires_grad
    assert lazy(torch.ones(2, 4)).shape == (2, 3)


def test_init_on_device_takes_any_device() -> None:
    with init_on_device("meta"):
        assert nn.Linear(2, 2).weight.is_meta
    with init_on_device(torch.device("cpu")):
        assert nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.mark.parametrize("layout", ["file", "folder", "index", "folder of an index", "torch file", "torch index"])
@pytest.mark.parametrize("is_empty", [True, False], ids=["empty", "real"])
def test_every_layout_loads(layout: str, is_empty: bool, saved: nn.Module, tmp_path: Path) -> None:
    where = tmp_path
    if layout in ("file", "folder"):
        where = _file(tmp_path, saved)
    elif layout == "torch file":
        where = tmp_path / "pytorch_model.bin"
        torch.save(saved.state_dict(), where)
    else:
        where = _sharded(tmp_path, saved, "bin" if layout == "torch index" else "safetensors")
    model = _empty() if is_empty else Net()
    load_checkpoint_in_model(model, tmp_path if "folder" in layout else where, strict=True)
    assert _equal(model, saved)


def test_a_checkpoint_of_save_state_loads(tmp_path: Path) -> None:
    owner = accelerator()
    trained = owner.prepare(evaluated(TiedNet()))
    owner.save_state(tmp_path / "here")
    owner.wait_for_checkpoint()
    with init_empty_weights():
        model = TiedNet()
    load_checkpoint_in_model(model, tmp_path / "here", strict=True)
    assert _equal(model, owner.unwrap_model(trained))
    assert model.head.weight is model.embedding.weight


def test_a_weight_in_pieces_is_put_together(saved: nn.Module, tmp_path: Path) -> None:
    whole = saved.linear1.weight.detach()
    save_file({"low": whole[:1].clone(), "high": whole[1:].clone()}, tmp_path / "pieces.safetensors")
    pieces = (
        StoredPiece(tmp_path / "pieces.safetensors", "low", (0, 0), (1, 3)),
        StoredPiece(tmp_path / "pieces.safetensors", "high", (1, 0), (3, 3)),
    )
    options = {"dtype": None, "offload_buffers": False, "keep_in_fp32_modules": None, "strict": False}
    for device_map in (None, {"": "disk"}):
        model = _empty()
        weights = {"linear1.weight": StoredWeight((4, 3), pieces)}
        folder = tmp_path / "offload"
        load_weights(model, weights, "pieces", device_map=device_map, offload_folder=folder, **options)
        if device_map is None:
            assert torch.equal(model.linear1.weight, whole)
        else:
            entry = json.loads((folder / "index.json").read_text())["linear1.weight"]
            assert Path(entry["safetensors_file"]).parent == folder


def test_loading_into_a_real_model_keeps_its_parameters_as_objects(saved: nn.Module, tmp_path: Path) -> None:
    model = Net()
    before = list(model.parameters())
    load_checkpoint_in_model(model, _file(tmp_path, saved))
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))


def test_values_are_the_models_own_and_do_not_follow_the_file(saved: nn.Module, tmp_path: Path) -> None:
    path = _file(tmp_path, saved)
    model = _empty()
    load_checkpoint_in_model(model, path, device_map={"": "cpu"})
    with path.open("r+b") as file:  # in place, as no careful writer would
        file.write(bytes(path.stat().st_size))
    assert _equal(model, saved)


def test_the_models_dtype_is_kept_unless_another_one_is_asked_for(saved: nn.Module, tmp_path: Path) -> None:
    path = _file(tmp_path, saved)
    half = _empty().half()
    load_checkpoint_in_model(half, path)
    assert half.linear1.weight.dtype == torch.float16
    model = _empty()
    load_checkpoint_in_model(model, path, dtype="float16", keep_in_fp32_modules=["linear2"])
    assert model.linear1.weight.dtype == model.batchnorm.running_mean.dtype == torch.float16
    assert model.batchnorm.num_batches_tracked.dtype == torch.int64
    assert model.linear2.weight.dtype == torch.float32
    assert torch.equal(model.linear1.weight, saved.linear1.weight.half())


def test_names_that_differ_are_a_warning_or_an_error(
    saved: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {**saved.state_dict(), "extra": torch.ones(1)}
    del values["linear1.bias"]
    save_file(values, tmp_path / "model.safetensors")
    model = Net()
    kept = model.linear1.bias.detach().clone()
    with pytest.raises(CheckpointError, match=r"lacks linear1\.bias.*has no extra"):
        load_checkpoint_in_model(model, tmp_path, strict=True)
    assert not torch.equal(model.linear1.weight, saved.linear1.weight)
    with caplog.at_level(logging.WARNING):
        load_checkpoint_in_model(model, tmp_path)
    assert "linear1.bias" in caplog.text
    assert "extra" in caplog.text
    assert torch.equal(model.linear1.weight, saved.linear1.weight)
    assert torch.equal(model.linear1.bias, kept)


def test_what_cannot_be_right_is_refused_before_anything_changes(saved: nn.Module, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="no name in common"):
        load_checkpoint_in_model(model, _file(tmp_path, saved))
    save_file({"0.weight": torch.ones(3, 2), "0.bias": torch.ones(2)}, tmp_path / "wide.safetensors")
    before = model[0].bias.detach().clone()
    with pytest.raises(CheckpointError, match=r"0\.weight of shape \[3, 2\], and the model \[2, 2\]"):
        load_checkpoint_in_model(model, tmp_path / "wide.safetensors")
    assert torch.equal(model[0].bias, before)


def test_an_index_cannot_reach_outside_its_folder(saved: nn.Module, tmp_path: Path) -> None:
    _file(tmp_path, saved)
    inner = tmp_path / "inner"
    inner.mkdir()
    index = inner / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"linear1.weight": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="not beside it"):
        load_checkpoint_in_model(Net(), inner)


def test_a_torch_file_is_read_as_data(tmp_path: Path) -> None:
    torch.save({"linear1.weight": Net()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_checkpoint_in_model(Net(), tmp_path)


def test_places_that_hold_no_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no"):
        load_checkpoint_in_model(Net(), tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors"):
        load_checkpoint_in_model(Net(), tmp_path)


def test_what_is_not_served_says_what_is(saved: nn.Module, tmp_path: Path) -> None:
    path = _file(tmp_path, saved)
    for name, value in {"offload_8bit_bnb": True, "full_state_dict": False, "broadcast_from_rank0": True}.items():
        with pytest.raises(UnsupportedError, match=name):
            load_checkpoint_in_model(Net(), path, **{name: value})
    with pytest.raises(ConfigError, match="offload_folder"):
        load_checkpoint_in_model(_empty(), path, device_map={"": "disk"})
    with pytest.raises(ConfigError, match="'autos' is unknown"):
        load_checkpoint_and_dispatch(_empty(), path, device_map="autos")
    model = _empty()
    with pytest.raises(ConfigError, match=r"no device for batchnorm\.weight"):
        load_checkpoint_in_model(model, path, device_map={"linear1": "cpu", "linear2": "cpu"})
    assert model.linear1.weight.is_meta
    with pytest.raises(PlanError, match=r"device_map\['linear1'\] is 97"):
        load_checkpoint_in_model(_empty(), path, device_map={"linear1": 97, "": "cpu"})


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential", None])
def test_a_map_may_be_made_on_the_way(device_map: str | None, saved: nn.Module, tmp_path: Path) -> None:
    memory = {"cpu": 200} if device_map else None
    model = load_checkpoint_and_dispatch(
        _empty(), _file(tmp_path, saved), device_map, memory, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(model.eval()(X), saved(X))
    assert hasattr(model, "hf_device_map") == (device_map is not None)
    if device_map:
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}


def test_tied_weights_load_from_either_of_their_names(tmp_path: Path) -> None:
    saved = evaluated(TiedNet())
    values = {name: value.clone() for name, value in saved.state_dict().items()}
    for left_out in ("head.weight", "embedding.weight"):
        save_file({k: v for k, v in values.items() if k != left_out}, tmp_path / "model.safetensors")
        with init_empty_weights():
            model = TiedNet()
        load_checkpoint_in_model(model, tmp_path, strict=True, device_map={"": "cpu"})
        assert model.head.weight is model.embedding.weight
        assert _equal(model, saved)
