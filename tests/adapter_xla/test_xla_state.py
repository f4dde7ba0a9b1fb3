"""Values in and out: names without wrappers, exact round trips, objects that stay the user's own."""

import copy
import pickle

import numpy as np
import pytest
import torch
from adapter_xla.cases import CNN, GPT, MLP, adamw, classification_loss, images, vectors

from polyaccel import Accelerator
from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard


def trained(make=MLP, data=vectors, **arguments):
    torch.manual_seed(0)
    accelerator = Accelerator(backend="xla", split_batches=True, **arguments)
    model = make()
    optimizer = adamw(model.parameters())
    loader = torch.utils.data.DataLoader(data(32), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        accelerator.backward(classification_loss(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    return accelerator, model, optimizer, loader


def test_prepare_moves_the_users_own_module_in_place():
    accelerator = Accelerator(backend="xla")
    model = GPT()
    parameters = list(model.parameters())
    optimizer = adamw(model.parameters())
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert prepared is model
    assert accelerator.unwrap_model(prepared) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.head.weight is model.token.weight
    assert all(parameter.device == accelerator.device for parameter in parameters)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], parameters, strict=True))


def test_recurrent_layers_with_their_weak_references_are_moved_too():
    accelerator = Accelerator(backend="xla")
    lstm = torch.nn.LSTM(4, 4, batch_first=True)
    x = torch.randn(4, 3, 4)
    expected = lstm(x)[0].detach()
    prepared = accelerator.prepare(lstm)
    torch.testing.assert_close(prepared(x.to(accelerator.device))[0].detach().cpu(), expected, rtol=1e-5, atol=1e-6)


def test_state_is_read_by_the_modules_own_names_and_tied_parameters_once():
    accelerator = Accelerator(backend="xla", mixed_precision="bf16")
    model = accelerator.prepare(GPT())
    shards = {shard.name: shard for shard in accelerator._engine.read_state(model)}
    assert "token.weight" in shards
    assert "head.weight" not in shards
    assert set(shards) == {name for name, _ in GPT().named_parameters()}
    assert all(isinstance(shard.data, np.ndarray) and shard.dtype == "float32" for shard in shards.values())


@pytest.mark.parametrize(("make", "data"), [(MLP, vectors), (CNN, images)])
def test_model_and_optimizer_continue_exactly_from_their_shards(make, data):
    accelerator, model, optimizer, loader = trained(make, data)
    engine = accelerator._engine
    saved = list(engine.read_state(model)), list(engine.read_state(optimizer))
    rates = optimizer.state_dict()["param_groups"]

    def finish(model, optimizer):
        losses = []
        for batch in loader:
            loss = classification_loss(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    expected = finish(model, optimizer)
    fresh = make()
    fresh, fresh_optimizer = accelerator.prepare(fresh, adamw(fresh.parameters()))
    engine.write_state(fresh, saved[0])
    engine.write_state(fresh_optimizer, saved[1])
    assert fresh_optimizer.state_dict()["param_groups"] == rates
    assert finish(fresh, fresh_optimizer) == expected  # bit for bit


def test_optimizer_state_is_named_by_parameter():
    accelerator, _, optimizer, _ = trained()
    shards = {shard.name: shard for shard in accelerator._engine.read_state(optimizer)}
    assert shards["0.weight.exp_avg"].global_shape == (16, 8)
    assert shards["0.weight.step"].data == 2
    assert {name.rpartition(".")[2] for name in shards} == {"step", "exp_avg", "exp_avg_sq"}


def test_shards_cut_in_pieces_are_put_together():
    accelerator = Accelerator(backend="xla")
    model = accelerator.prepare(torch.nn.Linear(2, 4))
    weight = np.arange(8, dtype=np.float32).reshape(4, 2)
    pieces = [Shard("weight", (4, 2), (start, 0), "float32", weight[start : start + 2]) for start in (2, 0)]
    bias = Shard("bias", (4,), (0,), "float32", np.zeros(4, np.float32))
    accelerator._engine.write_state(model, [*pieces, bias])
    np.testing.assert_array_equal(model.weight.detach().cpu().numpy(), weight)


def test_bfloat16_values_make_the_round_trip_by_their_bits():
    accelerator = Accelerator(backend="xla")
    model = accelerator.prepare(torch.nn.Linear(2, 4).bfloat16())
    before = model.weight.detach().cpu().clone()
    shards = list(accelerator._engine.read_state(model))
    assert shards[0].dtype == "bfloat16"
    with torch.no_grad():
        model.weight.zero_()
    accelerator._engine.write_state(model, shards)
    assert torch.equal(model.weight.detach().cpu(), before)


@pytest.mark.parametrize(
    ("shards", "named"),
    [
        ([Shard("bias", (4,), (0,), "float32", np.zeros(4, np.float32))], "missing: weight"),
        ([Shard("wait", (4, 2), (0, 0), "float32", np.zeros((4, 2), np.float32))], "unknown: wait"),
        (
            [
                Shard("weight", (2, 4), (0, 0), "float32", np.zeros((2, 4), np.float32)),
                Shard("bias", (4,), (0,), "float32", np.zeros(4, np.float32)),
            ],
            r"\(2, 4\).*\(4, 2\)",
        ),
        ([Shard("weight", (4, 2), (0, 0), "float32", np.zeros((2, 2), np.float32))], "weight: 4 of 8 elements"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(shards, named):
    accelerator = Accelerator(backend="xla")
    model = accelerator.prepare(torch.nn.Linear(2, 4))
    before = model.weight.detach().cpu().clone()
    with pytest.raises(CheckpointError, match=named):
        accelerator._engine.write_state(model, shards)
    assert torch.equal(model.weight.detach().cpu(), before)


def test_an_optimizer_that_has_stepped_before_prepare_keeps_its_state():
    torch.manual_seed(0)
    model = MLP()
    optimizer = adamw(model.parameters())
    reference = copy.deepcopy(model)
    reference_optimizer = adamw(reference.parameters())
    x, y = vectors(16)[:]
    for module, stepping in ((model, optimizer), (reference, reference_optimizer)):
        classification_loss(module, (x, y)).backward()
        stepping.step()
        stepping.zero_grad()
    accelerator = Accelerator(backend="xla")
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(classification_loss(model, (x.to(accelerator.device), y.to(accelerator.device))))
    optimizer.step()
    classification_loss(reference, (x, y)).backward()
    reference_optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_module_can_be_copied_pickled_and_prepared_again(precision):
    _accelerator, model, _, loader = trained(CNN, images, mixed_precision=precision)
    model.eval()
    x = next(iter(loader))[0]
    with torch.no_grad():
        expected = model(x).cpu()
        assert torch.equal(copy.deepcopy(model)(x).cpu(), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x).cpu(), expected)
    again = Accelerator(backend="xla", mixed_precision=precision)
    assert again.prepare(model) is model
    with torch.no_grad():
        assert torch.equal(model(x).cpu(), expected)
    assert len(model._forward_hooks) == len(copy.deepcopy(model)._forward_hooks) <= 2


def test_state_dicts_load_into_plain_torch():
    accelerator, model, optimizer, _ = trained()
    plain = MLP()
    plain.load_state_dict(accelerator.unwrap_model(model).state_dict())
    plain_optimizer = adamw(plain.parameters())
    plain_optimizer.load_state_dict(optimizer.state_dict())
    state = plain_optimizer.state[next(plain.parameters())]
    assert state["exp_avg"].device.type == "cpu"
    assert state["step"] == 2
