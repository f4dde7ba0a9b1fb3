"""Models whose weights are away between forwards: the same outputs, and what cannot be the same is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from big_networks import Direct, Net, TiedNet, evaluated, three_nets
from safetensors.torch import save_file
from torch import nn

from polyaccel import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from polyaccel.big_models import remove_hook_from_submodules
from polyaccel.errors import CheckpointError, ConfigError, PlanError, PrepareError

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
TOKENS = torch.arange(8).reshape(1, 8) % 11


def _are_away(*modules: nn.Module) -> bool:
    return all(parameter.is_meta for module in modules for parameter in module.parameters())


def test_cpu_offload_gives_the_same_outputs_and_leaves_nothing_behind() -> None:
    model = evaluated(Net())
    expected = model(X)
    assert cpu_offload(model) is model
    assert _are_away(model)
    assert not model.batchnorm.running_mean.is_meta
    assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected)
    assert _are_away(model)


def test_cpu_offload_of_buffers_and_with_values_of_the_callers() -> None:
    model, other = evaluated(Net()), evaluated(Net(), seed=1)
    cpu_offload(model, offload_buffers=True, state_dict=other.state_dict())
    assert model.batchnorm.running_mean.is_meta
    assert torch.equal(model(X), other(X))


def test_disk_offload_writes_safetensors_and_reads_them_for_a_model_without_values(tmp_path: Path) -> None:
    model = evaluated(Net())
    expected = model(X)
    disk_offload(model, tmp_path, offload_buffers=True)
    assert _are_away(model)
    assert torch.equal(model(X), expected)
    assert not list(tmp_path.glob("*.dat"))
    with init_empty_weights(include_buffers=True):
        empty = Net().eval()
    disk_offload(empty, tmp_path, offload_buffers=True)
    assert torch.equal(empty(X), expected)


def test_disk_offload_takes_the_values_of_the_model_and_not_old_ones_of_the_folder(tmp_path: Path) -> None:
    """Accelerate takes whatever a former model has left in the folder."""
    old, new = evaluated(Net()), evaluated(Net(), seed=1)
    was = old(X)
    expected = new(X)
    disk_offload(old, tmp_path)
    disk_offload(new, tmp_path)
    assert torch.equal(new(X), expected)
    assert not torch.equal(was, expected)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    disk_offload(nn.Sequential(nn.Linear(3, 4)), tmp_path)
    with init_empty_weights():
        wide, other = nn.Sequential(nn.Linear(5, 4)), nn.ModuleDict({"a": nn.Linear(3, 4)})
    with pytest.raises(CheckpointError, match=r"shape \[4, 3\], and 0\.weight has \[4, 5\]"):
        disk_offload(wide, tmp_path)
    with pytest.raises(PrepareError, match=r"a\.weight has no values"):
        disk_offload(other, tmp_path)


@pytest.mark.parametrize("keys", ["keyword", "positional"])
def test_a_model_on_cpu_and_disk_computes_as_before(keys: str, tmp_path: Path) -> None:
    model = evaluated(Net())
    expected = model(X, scale=torch.tensor(2.0))
    dispatch_model(model, {"linear1": "disk", "batchnorm": "cpu", "linear2": "disk"}, offload_dir=tmp_path)
    assert _are_away(model.linear1, model.linear2)
    assert not _are_away(model.batchnorm)
    assert model.hf_device_map == {"linear1": "disk", "batchnorm": "cpu", "linear2": "disk"}
    given = model(x=X, scale=torch.tensor(2.0)) if keys == "keyword" else model(X, scale=torch.tensor(2.0))
    assert torch.equal(given, expected)


def test_weights_that_are_safetensors_already_are_not_copied(tmp_path: Path) -> None:
    saved = evaluated(three_nets())
    save_file(dict(saved.state_dict()), tmp_path / "model.safetensors")
    with init_empty_weights():
        model = three_nets().eval()
    where = {"layer1": "cpu", "layer2": "disk", "layer3": "disk"}
    load_checkpoint_and_dispatch(model, tmp_path, where, offload_folder=tmp_path / "offload")
    assert [file.name for file in (tmp_path / "offload").iterdir()] == ["index.json"]
    entry = json.loads((tmp_path / "offload" / "index.json").read_text())["layer2.linear1.weight"]
    assert entry["safetensors_file"] == str(tmp_path / "model.safetensors")
    assert _are_away(model.layer2.linear1)
    assert not _are_away(model.layer1)
    running = model.layer3.batchnorm.running_mean
    assert torch.equal(running, saved.layer3.batchnorm.running_mean)  # Accelerate leaves it at its initial value
    pair = nn.Sequential(model.layer1.linear1, model.layer2.batchnorm)
    assert torch.equal(pair(X), nn.Sequential(saved.layer1.linear1, saved.layer2.batchnorm)(X))


def test_a_checkpoint_of_torch_files_is_rewritten_for_the_disk(tmp_path: Path) -> None:
    saved = evaluated(Net())
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    with init_empty_weights():
        model = Net().eval()
    load_checkpoint_and_dispatch(model, tmp_path, {"": "disk"}, offload_folder=tmp_path / "offload", dtype="float64")
    assert model.linear1.weight.dtype == torch.float64
    assert torch.equal(model(X.double()), copy.deepcopy(saved).double()(X.double()))


def test_tied_weights_stay_tied_wherever_they_are(tmp_path: Path) -> None:
    for where in ("cpu", "disk"):
        model = evaluated(TiedNet())
        expected = model(TOKENS)
        device_map = {"embedding": where, "block": "cpu", "head": where}
        dispatch_model(model, device_map, offload_dir=tmp_path / where, force_hooks=True)
        assert model.head.weight is model.embedding.weight
        outputs = model(TOKENS)
        assert torch.equal(outputs["logits"], expected["logits"])
        assert outputs.keys() == expected.keys()
    assert len(list((tmp_path / "disk").glob("*.safetensors"))) == 1


def test_weights_used_without_calling_their_module_come_in_with_its_parent(tmp_path: Path) -> None:
    model = evaluated(nn.Sequential(Direct()))
    x = torch.ones(2, 4)
    expected = model(x)
    plain = dispatch_model(copy.deepcopy(model), {"": "disk"}, offload_dir=tmp_path)
    with pytest.raises((RuntimeError, NotImplementedError)):
        plain(x).sum().item()
    dispatch_model(model, {"": "disk"}, offload_dir=tmp_path, preload_module_classes=["Direct"])
    assert torch.equal(model(x), expected)
    assert _are_away(model)


def test_a_second_device_gets_inputs_and_weights_and_outputs_come_back() -> None:
    """The meta device stands in for an accelerator: what arrives there has no values, and says where it is."""
    seen: dict[str, torch.device] = {}
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for index, linear in enumerate(model):
        linear.register_forward_hook(
            lambda m, a, out, i=index: seen.update({str(i): m.weight.device, f"{i}x": a[0].device})
        )
    dispatch_model(model, {"0": "cpu", "1": "meta"})
    assert model(torch.empty(2, 3, device="meta")).is_meta
    assert seen == dict.fromkeys(["0", "0x", "1", "1x"], torch.device("meta"))


def test_keys_that_are_skipped_are_not_moved() -> None:
    seen: dict[str, torch.device] = {}

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, *, moved: torch.Tensor, cache: torch.Tensor) -> None:
            seen.update(moved=moved.device, cache=cache.device)

    model = dispatch_model(nn.Sequential(Named())[0], {"": "cpu"}, "meta", force_hooks=True, skip_keys="cache")
    model(moved=torch.ones(1), cache=torch.ones(1))
    assert seen == {"moved": torch.device("meta"), "cache": torch.device("cpu")}


def test_a_gradient_of_a_weight_that_is_dropped_is_refused_and_of_an_input_is_not(tmp_path: Path) -> None:
    model = evaluated(Net())
    reference = X.clone().requires_grad_()
    model(reference).sum().backward()
    disk_offload(model, tmp_path)
    with pytest.raises(PrepareError, match=r"gradient of linear2\.\w+, which is offloaded"):
        model(X).sum().backward()
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(gradient, reference.grad)
    remove_hook_from_submodules(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    cpu_offload(model)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert torch.equal(x.grad, reference.grad)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_statistics_that_training_writes_are_kept(where: str, tmp_path: Path) -> None:
    """Accelerate drops them with the weights, and the next forward starts from the old ones."""
    expected = evaluated(Net()).train()
    model = evaluated(Net()).train()
    if where == "cpu":
        cpu_offload(model, offload_buffers=True)
    else:
        disk_offload(model, tmp_path, offload_buffers=True)
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        expected(X), model(X), expected(X + 1), model(X + 1)
        assert torch.equal(model.eval()(X), expected.eval()(X))
    remove_hook_from_submodules(model)
    assert torch.equal(model.batchnorm.running_mean, expected.batchnorm.running_mean)
    assert model.batchnorm.num_batches_tracked == 2
    remove_hook_from_submodules(twin)
    assert twin.batchnorm.num_batches_tracked == evaluated(Net()).batchnorm.num_batches_tracked


def test_weights_leave_after_an_exception_and_the_next_call_works() -> None:
    model = evaluated(Net())
    expected = model(X)
    cpu_offload(model)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(2, 7))
    assert _are_away(model)
    assert torch.equal(model(X), expected)


def test_hooks_can_be_removed_and_the_model_is_as_before(tmp_path: Path) -> None:
    model = evaluated(TiedNet())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    disk_offload(model, tmp_path, offload_buffers=True)
    with pytest.raises(PrepareError, match="offloaded already"):
        cpu_offload(model)
    remove_hook_from_submodules(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.requires_grad
    model(TOKENS)["logits"].sum().backward()
    assert model.head.weight.grad is not None


def test_a_copy_of_an_offloaded_model_works_by_itself(tmp_path: Path) -> None:
    model = evaluated(Net())
    expected = model(X)
    disk_offload(model, tmp_path)
    twin = copy.deepcopy(model)
    remove_hook_from_submodules(model)
    assert _are_away(twin)
    assert torch.equal(twin(X), expected)
    assert torch.equal(model(X), expected)


def test_half_of_an_offloaded_model_computes_in_half(tmp_path: Path) -> None:
    model = disk_offload(evaluated(Net()), tmp_path).bfloat16()
    assert model(X.bfloat16()).dtype == torch.bfloat16


def test_one_device_needs_no_hooks_unless_they_are_asked_for() -> None:
    model = evaluated(Net())
    expected = model(X)
    assert dispatch_model(model, {"": "cpu"}) is model
    assert not model._forward_pre_hooks
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert model._forward_pre_hooks
    assert torch.equal(model(X), expected)


def test_an_index_of_the_callers_is_read(tmp_path: Path) -> None:
    saved = evaluated(Net())
    save_file({f"old.{k}": v for k, v in saved.state_dict().items()}, tmp_path / "a.safetensors")
    index = {
        name: {"safetensors_file": str(tmp_path / "a.safetensors"), "weight_name": f"old.{name}", "dtype": "float32"}
        for name in saved.state_dict()
    }
    with init_empty_weights(include_buffers=True):
        model, other = Net().eval(), Net()
    dispatch_model(model, {"": "disk"}, offload_index=index, offload_buffers=True)
    assert torch.equal(model(X), saved(X))
    with pytest.raises(CheckpointError, match=r"linear1\.weight no safetensors_file"):
        dispatch_model(other, {"": "disk"}, offload_index={"linear1.weight": {"dtype": "float32", "shape": [4, 3]}})


def test_a_file_that_is_gone_is_named_when_it_is_needed(tmp_path: Path) -> None:
    model = disk_offload(nn.Sequential(nn.Linear(3, 4)), tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"does not give '0\.weight'"):
        model(X)


def test_maps_that_cannot_be_followed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no device for batchnorm\.weight"):
        dispatch_model(Net(), {"linear1": "cpu", "linear2": "disk"}, offload_dir=tmp_path)
    with pytest.raises(ConfigError, match="no folder is given"):
        dispatch_model(Net(), {"": "disk"})
    with pytest.raises(PlanError, match="is 97"):
        dispatch_model(Net(), {"": 97})
    with pytest.warns(UserWarning, match="do not match any submodules or tensors: layer9"):
        dispatch_model(Net(), {"": "cpu", "layer9": "cpu"})
    with init_empty_weights():
        empty = Net()
    for device_map in ({"": "cpu"}, {"linear1": "cpu", "": "disk"}):
        with pytest.raises(PrepareError, match="has no values"):
            dispatch_model(empty, device_map, offload_dir=tmp_path)
    assert not any(part._forward_pre_hooks for part in empty.modules())


def test_a_model_that_cannot_be_dispatched_keeps_its_values(tmp_path: Path) -> None:
    model = evaluated(Net())
    model.linear2.to("meta")
    expected = model.linear1.weight.detach().clone()
    with pytest.raises(PrepareError, match=r"linear2\.weight has no values"):
        disk_offload(model, tmp_path)
    assert torch.equal(model.linear1.weight, expected)
    assert not model.linear1._forward_pre_hooks


def test_a_module_that_hangs_in_two_places_is_offloaded_once(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    expected = model(X)
    for offloaded in (cpu_offload(copy.deepcopy(model)), disk_offload(copy.deepcopy(model), tmp_path)):
        assert torch.equal(offloaded(X), expected)
        assert len(offloaded[0]._forward_pre_hooks) == 1


def test_whole_models_take_turns() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    expected = second(first(X))
    first, first_hook = cpu_offload_with_hook(first, "cpu")
    second, second_hook = cpu_offload_with_hook(second, "cpu", prev_module_hook=first_hook)
    sent_back: list[str] = []
    first.to = lambda *a: sent_back.append(str(a[0]))
    assert torch.equal(second(first(X)), expected)
    assert sent_back == ["cpu", "cpu"]  # in for its forward, and away when the second one started
    second_hook.remove()
    second(X)
    assert len(sent_back) == 2
