"""What is done with parameters in pieces: windows, averages, copies, other meshes, values that are made late or loaded by hand."""

import copy
import pickle

import pytest
import torch
import torch_xla.distributed.spmd as xs
from adapter_xla.cases import MLP, adamw, classification_loss, compiles, torch_losses, vectors, xla_losses
from torch import nn
from torch.utils.data import DataLoader

from polyaccel import Accelerator, ShardingRule
from polyaccel.errors import PlanError, PrepareError, UnsupportedError

RULES = [
    ShardingRule("0.weight", ("tensor", None)),
    ShardingRule("0.bias", ("tensor",)),
    ShardingRule("2.weight", (None, "tensor")),
]
BOTH, FSDP, REPLICATED = (
    {"data": 1, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 4},
    {"replica": 2, "data": 1, "fsdp": 2},
)
WHOLE = {"0.weight": 128, "0.bias": 16, "2.weight": 48, "2.bias": 3}
PIECES = {  # elements on one device
    "both": {"0.weight": 32, "0.bias": 8, "2.weight": 24, "2.bias": 3},
    "fsdp": {"0.weight": 32, "0.bias": 4, "2.weight": 12, "2.bias": 3},
    "replicated": {"0.weight": 64, "0.bias": 8, "2.weight": 24, "2.bias": 3},
}


def on_one(tensor):
    """How many elements the first device has."""
    return xs.wrap_if_sharded(tensor).local_shards[0].data.numel()


def held(module):
    return {name: on_one(parameter) for name, parameter in module.named_parameters()}


def started(mesh, optimizer=adamw, model=None, **settings):
    torch.manual_seed(0)
    accelerator = Accelerator(backend="xla", split_batches=True, mesh=mesh, sharding_rules=RULES, **settings)
    model = MLP() if model is None else model
    loader = DataLoader(vectors(64), batch_size=16)
    return accelerator, *accelerator.prepare(model, optimizer(model.parameters()), loader)


def train(accelerator, model, optimizer, batches):
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            losses.append(accelerator.backward(classification_loss, model, batch).item())
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("form", ["value", "train_step"])
def test_accumulation_clipping_and_a_schedule_on_pieces_are_torchs(form):
    from adapter_xla.cases import warmup_cosine

    torch.manual_seed(0)
    model = MLP()
    settings = {"epochs": 4, "batch": 16, "accumulate": 2, "max_norm": 0.5, "scheduler": warmup_cosine}
    expected, _ = torch_losses(model, vectors(64), classification_loss, **settings)
    losses, trained, accelerator = xla_losses(
        model, vectors(64), classification_loss, form=form, mesh=BOTH, sharding_rules=RULES, **settings
    )
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5
    accelerator.wait_for_everyone()
    assert held(trained) == PIECES["both"]


def test_a_window_saved_half_way_goes_on_on_another_mesh(tmp_path):
    uninterrupted = started(BOTH, gradient_accumulation_steps=4)
    expected = train(*uninterrupted) + train(*uninterrupted)
    accelerator, model, optimizer, loader = started(BOTH, gradient_accumulation_steps=4)
    batches = iter(loader)
    losses = train(accelerator, model, optimizer, [next(batches), next(batches)])
    accelerator._engine.synchronize()
    gradients = {name: on_one(parameter.grad) for name, parameter in model.named_parameters()}
    assert gradients == PIECES["both"]
    accelerator.save_state(tmp_path, blocking=True)
    accelerator, model, optimizer, loader = started(FSDP, gradient_accumulation_steps=4, model=MLP(16))
    accelerator.load_state(tmp_path)
    assert held(model) == PIECES["fsdp"]
    losses += train(accelerator, model, optimizer, loader) + train(accelerator, model, optimizer, loader)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5


def test_an_average_of_parameters_lies_as_they_do_and_gives_way_to_them():
    accelerator, model, optimizer, loader = started(FSDP)
    before = {name: value.cpu() for name, value in model.state_dict().items()}
    average = accelerator._engine.parameter_average(model)
    train(accelerator, model, optimizer, loader)
    average.update(0.25)
    after = {name: value.cpu() for name, value in model.state_dict().items()}
    found = average.read()
    for name, value in after.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), 0.75 * before[name] + 0.25 * value)
    accelerator._engine.synchronize()
    assert [on_one(value) for value in average._averages] == list(PIECES["fsdp"].values())
    with average.applied():
        torch.testing.assert_close(model[0].bias.detach().cpu(), torch.from_numpy(found["0.bias"]))
        accelerator._engine.synchronize()
        assert held(model) == PIECES["fsdp"]
    torch.testing.assert_close(model[0].bias.detach().cpu(), after["0.bias"])


def test_momentum_made_of_a_gradient_lies_as_its_parameter_and_compiles_once_more():
    accelerator, model, optimizer, loader = started(FSDP, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    counts = []
    for batch in loader:
        before = compiles()
        accelerator.backward(classification_loss, model, batch)
        optimizer.step()
        optimizer.zero_grad()
        counts.append(compiles() - before)
    assert counts == [1, 1, 0, 0]
    accelerator._engine.synchronize()
    momenta = {name: on_one(optimizer.state[p]["momentum_buffer"]) for name, p in model.named_parameters()}
    assert momenta == PIECES["fsdp"]


def test_values_of_a_model_without_any_are_made_layer_by_layer_and_kept_in_pieces():
    with torch.device("meta"):
        model = MLP()
    parameters = list(model.parameters())
    _, model, optimizer, _ = started(BOTH, model=model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert held(model) == PIECES["both"]
    torch.manual_seed(0)
    for made, plain in zip(model.parameters(), MLP().parameters(), strict=True):
        assert torch.equal(made.detach().cpu(), plain.detach())
    assert len(optimizer.param_groups[0]["params"]) == 4

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.empty(4, device="meta"))

    with pytest.raises(PrepareError, match=r"scale of Own is on the meta device"):
        started(BOTH, model=Own())


def test_a_model_of_another_mesh_is_laid_out_anew_and_one_with_values_of_the_user_stays_in_pieces():
    _, model, _, _ = started(BOTH)
    values = {name: value.cpu() for name, value in model.state_dict().items()}
    accelerator = Accelerator(backend="xla", mesh=REPLICATED)
    assert accelerator.prepare(model) is model
    assert held(model) == PIECES["replicated"]
    assert all(torch.equal(value.cpu(), values[name]) for name, value in model.state_dict().items())
    assert len(model[0]._forward_pre_hooks) == 1  # those of the first mesh are gone
    model.load_state_dict({name: value + 1 for name, value in values.items()})
    accelerator._engine.synchronize()
    assert held(model) == PIECES["replicated"]
    assert torch.equal(model[0].bias.detach().cpu(), values["0.bias"] + 1)


def test_a_model_in_pieces_can_be_copied_pickled_and_raises_what_it_raises():
    accelerator, model, _, loader = started(BOTH)
    x = next(iter(loader))[0]
    with torch.no_grad():
        expected = model(x).cpu()
        torch.testing.assert_close(copy.deepcopy(model)(x).cpu(), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x).cpu(), expected)
        with pytest.raises(RuntimeError):
            model(torch.ones(16, 9, device=accelerator.device)).cpu()
        assert isinstance(model[0].weight, nn.Parameter)  # the hooks gave it back
        torch.testing.assert_close(model(x).cpu(), expected)


def test_the_sequence_axis_and_rules_that_do_not_fit_are_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"mesh\.sequence=2.*backend 'xla'"):
        Accelerator(backend="xla", mesh={"data": 2, "sequence": 2})
    accelerator = Accelerator(backend="xla", mesh=FSDP, sharding_rules=[ShardingRule("2.bias", ("fsdp",))])
    model = MLP()
    with pytest.raises(PlanError, match=r"parameter 2\.bias, whose shape is \(3,\), over mesh\.fsdp=4"):
        accelerator.prepare(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
