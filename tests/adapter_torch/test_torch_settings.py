"""Handlers and plugins of Accelerate's constructor on the torch engine: scaling, autocast, torch.compile, regional compilation."""

import pytest
import torch
from torch import nn
from torch_network import X, Y, accelerator, mean_squared_error, network

from polyaccel import AutocastKwargs, GradScalerKwargs
from polyaccel.errors import ConfigError
from polyaccel.utils import TorchDynamoPlugin, compile_regions, has_compiled_regions


class Blocks(nn.Module):
    """A model that repeats a block."""

    def __init__(self, num_blocks=3):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(num_blocks))
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def test_the_scaler_has_the_settings_of_its_handler():
    handler = GradScalerKwargs(init_scale=16.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=2)
    run = accelerator(mixed_precision="fp16", kwargs_handlers=[handler])
    model = network()
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    scales = []
    for factor in (1.0, 1.0, 1e9, 1.0):  # two good steps, one that overflows
        run.backward(mean_squared_error(model, (X, Y)) * factor)
        scales.append(run._engine._scaler.factor)
        optimizer.step()
        optimizer.zero_grad()
        assert run.optimizer_step_was_skipped == (factor != 1.0)
    assert scales == [16.0, 16.0, 64.0, 16.0]
    assert run.scaler.get_growth_factor() == 4.0
    assert accelerator().scaler is None


def test_without_a_scaler_fp16_skips_no_step():
    run = accelerator(mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(enabled=False)])
    model = network()
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    loss = mean_squared_error(model, (X, Y))
    run.backward(loss)
    expected = torch.autograd.grad(mean_squared_error(model, (X, Y)), model.parameters())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)  # nothing was multiplied
    optimizer.step()
    assert not run.optimizer_step_was_skipped


def test_autocast_can_be_switched_off_for_models_and_for_a_block():
    run = accelerator(mixed_precision="bf16")
    with run.autocast():
        assert torch.mm(X, X.t()).dtype == torch.bfloat16
        with run.autocast(autocast_handler=AutocastKwargs(enabled=False)):
            assert torch.mm(X, X.t()).dtype == torch.float32
        assert torch.mm(X, X.t()).dtype == torch.bfloat16
    seen = []
    model = network()
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run.prepare(model)(X)
    off = accelerator(mixed_precision="bf16", kwargs_handlers=[AutocastKwargs(enabled=False)])
    model = network()
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    off.prepare(model)(X)
    assert seen == [torch.bfloat16, torch.float32]
    with off.autocast():
        assert torch.mm(X, X.t()).dtype == torch.float32
    with off.autocast(AutocastKwargs(enabled=True)):
        assert torch.mm(X, X.t()).dtype == torch.bfloat16


def test_the_cache_of_autocast_is_as_the_handler_says():
    run = accelerator(mixed_precision="bf16", kwargs_handlers=[AutocastKwargs(cache_enabled=False)])
    with run.autocast():
        assert not torch.is_autocast_cache_enabled()
    with run.autocast(AutocastKwargs(cache_enabled=True)):
        assert torch.is_autocast_cache_enabled()
    with accelerator(mixed_precision="bf16").autocast():
        assert torch.is_autocast_cache_enabled()


def test_what_the_plugin_says_reaches_torch_compile(monkeypatch):
    asked = []

    def compile(module, **options):
        asked.append(options)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    accelerator(dynamo_backend="EAGER").prepare(network())
    accelerator(
        dynamo_plugin=TorchDynamoPlugin(backend="inductor", mode="max-autotune", fullgraph=True, dynamic=False)
    ).prepare(network())
    accelerator(dynamo_plugin=TorchDynamoPlugin(backend="inductor", options={"max_autotune": True})).prepare(network())
    accelerator(dynamo_plugin=TorchDynamoPlugin(backend="inductor", disable=True)).prepare(network())
    accelerator(dynamo_backend="no").prepare(network())
    assert asked == [
        {"backend": "eager", "fullgraph": False, "dynamic": None},
        {"backend": "inductor", "mode": "max-autotune", "fullgraph": True, "dynamic": False},
        {"backend": "inductor", "options": {"max_autotune": True}, "fullgraph": False, "dynamic": None},
    ]
    with pytest.raises(ConfigError, match="takes one of the two"):
        accelerator(dynamo_plugin=TorchDynamoPlugin("inductor", mode="max-autotune", options={"max_autotune": True}))
    with pytest.raises(ConfigError, match="did you mean 'inductor'"):
        accelerator(dynamo_backend="induktor")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, while it traces
def test_regional_compilation_compiles_the_repeated_blocks_once_and_changes_no_name():
    torch._dynamo.reset()
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
    run = accelerator(dynamo_plugin=plugin)
    model = Blocks()
    names, expected = list(model.state_dict()), model(X)
    prepared = run.prepare(model)
    assert prepared is model
    assert has_compiled_regions(model)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(model(X), expected)
    # One graph for three blocks, one each for the layers before and after.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert list(model.state_dict()) == names
    loss = mean_squared_error(model, (X, Y))
    run.backward(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_accelerates_function_compiles_regions_of_any_module():
    model = compile_regions(Blocks(), backend="eager")
    assert has_compiled_regions(model)
    plain = nn.Linear(2, 2)
    assert compile_regions(plain, backend="eager") is plain
    assert not has_compiled_regions(plain)  # it repeats nothing: all of it is compiled
    assert plain._compiled_call_impl is not None
