"""`polyaccel.hooks`, `polyaccel.utils.modeling` and `polyaccel.utils.offload`: objects around a forward, and single tensors of a model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from big_networks import Net, TiedNet, evaluated
from torch import nn

from polyaccel import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from polyaccel.big_modeling import attach_layerwise_casting_hooks
from polyaccel.errors import CheckpointError, ConfigError, PrepareError, UnsupportedError
from polyaccel.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from polyaccel.utils import (
    BnbQuantizationConfig,
    OffloadedWeightsLoader,
    align_module_device,
    find_tied_parameters,
    get_state_dict_offloaded_model,
    has_offloaded_params,
    id_tensor_storage,
    load_and_quantize_model,
    offload_state_dict,
    retie_parameters,
    set_module_tensor_to_device,
)
from polyaccel.utils.modeling import clean_device_map, get_state_dict_from_offload, named_module_tensors
from polyaccel.utils.offload import load_offloaded_weight, offload_weight

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Adds(ModelHook):
    def __init__(self, before: float = 0.0, after: float = 0.0) -> None:
        self.before, self.after = before, after
        self.failures = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return (args[0] + self.before, *args[1:]), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output + self.after

    def forward_failed(self, module: nn.Module) -> None:
        self.failures += 1


def test_importing_the_names_imports_no_framework() -> None:
    code = (
        "import json, sys, polyaccel.hooks, polyaccel.big_modeling, polyaccel.utils.modeling, polyaccel.utils.offload, polyaccel.utils\n"
        "before = 'torch' in sys.modules\n"
        "from polyaccel.hooks import ModelHook\n"
        "print(json.dumps([before, 'torch' in sys.modules, hasattr(polyaccel.hooks, 'Gone'), hasattr(polyaccel.utils, 'Gone')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == [False, True, False, False]


def test_a_hook_runs_around_the_forward_and_another_takes_its_place() -> None:
    model = evaluated(Net())
    plain, shifted = model(X), model(X + 1)
    add_hook_to_module(model, Adds(after=1.0))
    assert torch.equal(model(X), plain + 1)
    assert torch.equal(model.forward(X), plain + 1)
    add_hook_to_module(model, Adds(after=2.0))
    assert torch.equal(model(X), plain + 2)
    add_hook_to_module(model, Adds(before=1.0), append=True)
    assert isinstance(model._hf_hook, SequentialHook)
    assert torch.equal(model(X), shifted + 2)
    remove_hook_from_module(model)
    assert "forward" not in vars(model)
    assert torch.equal(model(X), plain)


def test_a_copy_of_a_hooked_model_calls_itself() -> None:
    model = add_hook_to_module(evaluated(Net()), Adds(after=1.0))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.linear2.bias.add_(10.0)
    assert torch.allclose(twin(X), model(X) + 10)


def test_a_forward_of_the_instances_own_is_put_back() -> None:
    model = nn.Linear(3, 3)
    model.forward = lambda x: x * 2  # type: ignore[method-assign]
    own = model.forward
    add_hook_to_module(model, Adds(after=1.0))
    assert torch.equal(model(X), X * 2 + 1)
    assert remove_hook_from_module(model).forward is own


def test_what_a_forward_raises_reaches_the_caller_and_weights_leave() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    first = Adds()
    add_hook_to_module(model[0], SequentialHook(first, AlignDevicesHook("cpu", offload=True)))
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.ones(2, 7))
    assert first.failures == 1
    assert model[0].weight.is_meta
    assert model(X).shape == (2, 3)


def test_offloaded_weights_come_for_the_forward_and_are_back_after_removal() -> None:
    plain, model = evaluated(Net()), evaluated(Net())
    model.load_state_dict(plain.state_dict())
    attach_align_device_hook(model, execution_device="cpu", offload=True, offload_buffers=True)
    assert all(tensor.is_meta for _, tensor in (*model.named_parameters(), *model.named_buffers()))
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))
    assert all(tensor.is_meta for tensor in model.parameters())
    remove_hook_from_submodules(model)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert not any(vars(part).get("_hf_hook") for part in model.modules())


def test_statistics_of_an_offloaded_module_that_trains_are_kept() -> None:
    plain, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    add_hook_to_module(model, AlignDevicesHook("cpu", offload=True, offload_buffers=True))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(X), plain(X))
    remove_hook_from_module(model)
    assert torch.equal(model.running_mean, plain.running_mean)


def test_a_gradient_of_an_offloaded_weight_is_refused_and_not_lost() -> None:
    layer = add_hook_to_module(nn.Linear(3, 3), AlignDevicesHook("cpu", offload=True))
    with pytest.raises(PrepareError, match="gradient of"):
        layer(X).sum().backward()


def test_tied_weights_share_what_is_on_the_device_while_it_is_there() -> None:
    inner, outer = nn.Linear(3, 3, bias=False), nn.Module()
    outer.weight = inner.weight
    outer.inner = inner
    seen: list[bool] = []
    values = {"weight": inner.weight.detach(), "inner.weight": inner.weight.detach()}
    tied: dict[int, Any] = {inner.weight.data_ptr(): {}}
    outer.forward = lambda x: (seen.append(bool(tied[pointer])), outer.inner(x) @ outer.weight)[1]
    pointer = next(iter(tied))
    attach_align_device_hook(outer, "cpu", offload=True, weights_map=values, tied_params_map=tied)
    with torch.no_grad():
        outer(X)
    assert seen == [True]
    assert tied[pointer] == {}


def test_blocks_compute_where_the_map_says_and_outputs_come_back() -> None:
    plain, model = evaluated(Net()), evaluated(Net())
    model.load_state_dict(plain.state_dict())
    devices = dict.fromkeys(("linear1", "batchnorm", "linear2"), "cpu")
    attach_align_device_hook_on_blocks(model, devices, {"linear1": True, "batchnorm": False, "linear2": True})
    assert model.linear1.weight.is_meta
    assert not model.batchnorm.weight.is_meta
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))


def test_narrow_storage_is_widened_for_the_forward_alone() -> None:
    model = evaluated(Net())
    attach_layerwise_casting_hooks(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern="linear2")
    assert model.linear1.weight.dtype == torch.float8_e4m3fn
    assert model.linear2.weight.dtype == model.batchnorm.weight.dtype == torch.float32
    with torch.no_grad():
        assert model(X).dtype == torch.float32
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 7))
    assert model.linear1.weight.dtype == torch.float8_e4m3fn


def test_a_whole_model_comes_at_its_forward() -> None:
    model, hook = cpu_offload_with_hook(evaluated(Net()), "cpu")
    assert model(X).shape == (2, 5)
    hook.offload()
    hook.remove()
    assert "forward" not in vars(model)


@pytest.mark.parametrize("offload", ["cpu", "disk", "dispatch", "hooks"])
def test_the_state_dict_of_an_offloaded_model_has_its_values(tmp_path: Path, offload: str) -> None:
    model = evaluated(TiedNet())
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    module = next(part for part in model.modules() if isinstance(part, nn.Linear))
    if offload == "cpu":
        cpu_offload(model)
    elif offload == "disk":
        disk_offload(model, tmp_path)
    elif offload == "dispatch":
        dispatch_model(model, {"": "disk"}, offload_dir=tmp_path)
    else:
        attach_align_device_hook(model, "cpu", offload=True)
    assert has_offloaded_params(module)
    found = get_state_dict_offloaded_model(model)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    before = dict.fromkeys(["x.weight"], module.weight)
    assert torch.equal(get_state_dict_from_offload(module, "x.weight", before)["x.weight"], module_value(module))


def module_value(module: nn.Module) -> torch.Tensor:
    with align_module_device(module, "cpu"):
        return module.weight.detach().clone()


def test_what_is_written_to_an_offloaded_module_inside_the_context_stays() -> None:
    model = cpu_offload(evaluated(Net()))
    with align_module_device(model.linear1), torch.no_grad():
        model.linear1.bias.fill_(3.0)
    assert model.linear1.bias.is_meta
    assert torch.equal(get_state_dict_offloaded_model(model)["linear1.bias"], torch.full((4,), 3.0))
    here = nn.Linear(2, 2)
    bias = here.bias
    with align_module_device(here, "meta"):
        assert here.bias.is_meta
    assert here.bias is bias


def test_single_tensors_move_take_values_and_keep_their_class() -> None:
    model = Net()
    model.linear1.weight.requires_grad_(False)
    set_module_tensor_to_device(model, "linear1.weight", "meta")
    with pytest.raises(ConfigError, match="has no values"):
        set_module_tensor_to_device(model, "linear1.weight", "cpu")
    set_module_tensor_to_device(model, "linear1.weight", "cpu", value=torch.ones(4, 3), dtype="bfloat16")
    assert model.linear1.weight.dtype == torch.bfloat16
    assert not model.linear1.weight.requires_grad
    with pytest.raises(ConfigError, match=r"has shape \[4, 3\], and the value \[2, 2\]"):
        set_module_tensor_to_device(model, "linear1.weight", "cpu", value=torch.zeros(2, 2))
    with pytest.raises(ConfigError, match=r"has no .*gone"):
        set_module_tensor_to_device(model, "linear1.gone", "cpu")
    with pytest.raises(UnsupportedError, match="bitsandbytes"):
        set_module_tensor_to_device(model, "linear1.weight", "cpu", fp16_statistics=torch.ones(1))
    retie_parameters(model, [["linear1.bias", "batchnorm.bias"]])
    assert find_tied_parameters(model) == [["linear1.bias", "batchnorm.bias"]]
    assert id_tensor_storage(model.linear1.bias) == id_tensor_storage(model.batchnorm.bias.view(2, 2))
    names = [name for name, _ in named_module_tensors(model.batchnorm)]
    assert names == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def test_a_device_map_is_cleaned_inside_a_module() -> None:
    assert clean_device_map({"a.x": 0, "a.y": 0, "b.x": 1, "b.y": 1}, "a") == {"a": 0, "b.x": 1, "b.y": 1}
    assert clean_device_map({"a": 0, "b": 0}) == {"": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_offload_files_keep_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    for shape in ((2, 3), (), (0, 4)):
        value = torch.ones(shape).to(dtype)
        index = offload_weight(value, "w", tmp_path, {})
        assert index == {"w": {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}}
        found = load_offloaded_weight(tmp_path / "w.dat", index["w"])
        assert found.dtype == dtype
        assert torch.equal(found.float(), value.float())


def test_a_folder_of_accelerates_offload_files_serves_a_model(tmp_path: Path) -> None:
    saved, model = evaluated(Net()), evaluated(Net())
    offload_state_dict(tmp_path, saved.state_dict())
    weights = OffloadedWeightsLoader(state_dict={"linear1.bias": torch.zeros(4)}, save_folder=tmp_path)
    assert torch.equal(weights["linear1.bias"], torch.zeros(4))
    assert torch.equal(weights["linear2.weight"], saved.linear2.weight)
    model.to("meta")
    disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=True)
    with torch.no_grad():
        assert torch.equal(model(X), saved(X))
    (tmp_path / "linear1.weight.dat").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="has 5 bytes"):
        model(X)
    with pytest.raises(ConfigError, match="no weights are given"):
        OffloadedWeightsLoader()


def test_accelerate_reads_the_files_that_we_write_and_we_read_its(tmp_path: Path) -> None:
    theirs = pytest.importorskip("accelerate.utils.offload")
    state = {"a": torch.randn(2, 3), "b": torch.randn(4).to(torch.bfloat16), "c": torch.tensor(3)}
    offload_state_dict(tmp_path / "ours", state)
    theirs.offload_state_dict(tmp_path / "theirs", state)
    for name, value in state.items():
        assert torch.equal(theirs.OffloadedWeightsLoader(save_folder=tmp_path / "ours")[name], value)
        assert torch.equal(OffloadedWeightsLoader(save_folder=tmp_path / "theirs")[name], value)


def test_quantization_says_what_quantizes() -> None:
    with pytest.raises(UnsupportedError, match="from_pretrained"):
        BnbQuantizationConfig(load_in_8bit=True)
    with pytest.raises(UnsupportedError, match="from_pretrained"):
        load_and_quantize_model(Net(), None)
