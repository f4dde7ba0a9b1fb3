"""What users import: Accelerate's names, defaults and maps, without torch until a call, and a hint where it is not installed."""

from __future__ import annotations

import inspect
import json
import random
import subprocess
import sys
from collections import OrderedDict

import pytest
from torch import nn

import polyaccel
from polyaccel import big_models
from polyaccel.errors import BackendUnavailableError
from polyaccel.protocols import Probe
from polyaccel_torch import big_models as served
from polyaccel_torch.backend import TorchBackend

OWN = ("init_empty_where_torch_is_used", "served")  # no names of Accelerate's
NAMES = [
    name
    for name, value in vars(big_models).items()
    if inspect.isfunction(value)
    and value.__module__ == big_models.__name__
    and not name.startswith("_")
    and name not in OWN
]
UTILITIES = (
    "align_module_device",
    "compute_module_sizes",
    "get_balanced_memory",
    "get_state_dict_offloaded_model",
    "has_offloaded_params",
)
FORWARDED = [name for name in NAMES if hasattr(served, name)]


def _parameters(function: object) -> list[tuple[str, object]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_names_are_loaded_when_they_are_used_and_torch_when_they_are_called() -> None:
    code = (
        "import json, sys\n"
        "from polyaccel import init_empty_weights, infer_auto_device_map, load_checkpoint_and_dispatch, dispatch_model\n"
        "before = 'torch' in sys.modules\n"
        "with init_empty_weights():\n"
        "    pass\n"
        "print(json.dumps([before, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == [False, True]


def test_without_torch_the_call_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(is_usable=False, reason="torch is not installed", cure="pip install 'polyaccel[torch]'")
    monkeypatch.setattr(TorchBackend, "probe", lambda self: probe)
    with pytest.raises(BackendUnavailableError, match=r"hint: pip install 'polyaccel\[torch\]'"):
        polyaccel.init_empty_weights()


@pytest.mark.parametrize("name", FORWARDED)
def test_what_is_forwarded_has_the_parameters_and_defaults_of_what_serves_it(name: str) -> None:
    assert _parameters(getattr(big_models, name)) == _parameters(getattr(served, name))


@pytest.mark.parametrize("name", NAMES)
def test_names_and_defaults_are_those_of_accelerate(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.big_modeling import attach_layerwise_casting_hooks
    from accelerate.hooks import remove_hook_from_submodules
    from accelerate.utils import modeling

    theirs = {
        "attach_layerwise_casting_hooks": attach_layerwise_casting_hooks,
        "remove_hook_from_submodules": remove_hook_from_submodules,
    }
    theirs.update(
        {name: getattr(modeling, name) for name in (*UTILITIES, "infer_auto_device_map", "load_checkpoint_in_model")}
    )
    assert _parameters(getattr(big_models, name)) == _parameters(theirs.get(name) or getattr(accelerate, name))


def _random_model(chance: random.Random, depth: int = 0) -> nn.Module:
    if depth == 3 or chance.random() < 0.4:
        return nn.Linear(chance.randint(1, 9), chance.randint(1, 9))
    children = [(f"m{i}", _random_model(chance, depth + 1)) for i in range(chance.randint(1, 4))]
    return nn.Sequential(OrderedDict(children))


@pytest.mark.parametrize("seed", range(8))
def test_random_models_get_the_maps_that_accelerate_gives(seed: int) -> None:
    modeling = pytest.importorskip("accelerate.utils.modeling")
    chance = random.Random(seed)
    for _ in range(15):
        model = nn.Sequential(OrderedDict((f"b{i}", _random_model(chance)) for i in range(chance.randint(1, 5))))
        total = big_models.compute_module_sizes(model)[""]
        memory = {device: chance.randint(0, total) for device in (0, 1, "cpu")}
        options = {"fallback_allocation": chance.random() < 0.5, "clean_result": chance.random() < 0.5}
        theirs = modeling.infer_auto_device_map(model, dict(memory), **options)
        assert big_models.infer_auto_device_map(model, memory, **options) == theirs
        assert big_models.compute_module_sizes(model, "float16") == modeling.compute_module_sizes(model, "float16")
