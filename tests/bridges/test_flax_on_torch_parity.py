"""Fifty steps of Flax models on the torch engine and on the jax engine: nnx and linen, optax and torch.optim."""

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax_parity_models import STEPS, NnxCNN, batches, flat_values, loss_of, make_model

from polyaccel import Accelerator, set_seed
from polyaccel_bridges.flax_to_torch import torch_module

# The same float32 mathematics in other programs; Adam divides by the root of tiny second moments, which amplifies rounding.
TOLERANCE = 1e-5

# The default run takes one of each kind; the other combinations are slow ones.
CASES = [
    pytest.param("nnx", "transformer"),
    pytest.param("linen", "cnn"),
    pytest.param("nnx", "mlp", marks=pytest.mark.slow),
    pytest.param("nnx", "cnn", marks=pytest.mark.slow),
    pytest.param("linen", "mlp", marks=pytest.mark.slow),
    pytest.param("linen", "transformer", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def prepared(backend, library, kind, transformation, **arguments):
    accelerator = Accelerator(backend=backend, cpu=True, **arguments)
    model = make_model(library, kind)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param) if library == "nnx" else transformation
    return accelerator, *accelerator.prepare(model, optimizer)


def train(accelerator, model, optimizer, library, data):
    loss_fn = loss_of(library)
    losses = []
    for batch in data:
        with accelerator.accumulate(model):
            losses.append(float(accelerator.backward(loss_fn, model, batch)))
            optimizer.step()
            optimizer.zero_grad()
    return losses


def assert_same_run(one, other):
    (losses, values), (other_losses, other_values) = one, other
    np.testing.assert_allclose(losses, other_losses, rtol=TOLERANCE, atol=TOLERANCE)
    assert values.keys() == other_values.keys()
    for name, value in values.items():
        np.testing.assert_allclose(value, other_values[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


def clipped_adamw():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 5, STEPS)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, eps=1e-6))


@pytest.mark.parametrize(("library", "kind"), CASES)
def test_fifty_steps_of_clipped_adamw_with_a_schedule_are_those_of_the_jax_engine(library, kind):
    runs = {}
    for backend in ("torch", "jax"):
        accelerator, model, optimizer = prepared(backend, library, kind, clipped_adamw())
        losses = train(accelerator, model, optimizer, library, batches(kind))
        runs[backend] = losses, flat_values(accelerator.unwrap_model(model))
    assert min(runs["torch"][0]) < runs["torch"][0][0]
    assert_same_run(runs["torch"], runs["jax"])


@pytest.mark.parametrize(("library", "kind"), CASES)
def test_fifty_steps_of_torchs_adamw_are_those_of_optax_on_the_jax_engine(library, kind):
    accelerator, model, optimizer = prepared(
        "jax", library, kind, optax.adamw(3e-3, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01)
    )
    expected = (
        train(accelerator, model, optimizer, library, batches(kind)),
        flat_values(accelerator.unwrap_model(model)),
    )
    accelerator = Accelerator(backend="torch", cpu=True)
    model = accelerator.prepare(make_model(library, kind))
    adamw = torch.optim.AdamW(
        torch_module(model).parameters(), lr=3e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01
    )
    optimizer = accelerator.prepare(adamw)
    losses = train(accelerator, model, optimizer, library, batches(kind))
    assert_same_run((losses, flat_values(accelerator.unwrap_model(model))), expected)


def test_four_accumulated_micro_batches_are_those_of_the_jax_engine():
    runs = {}
    for backend in ("torch", "jax"):
        accelerator, model, optimizer = prepared(backend, "nnx", "mlp", clipped_adamw(), gradient_accumulation_steps=4)
        step = accelerator.train_step(loss_of("nnx"), model, optimizer, max_grad_norm=0.1)
        losses = [float(step(batch)) for batch in batches("mlp")[:20]]
        runs[backend] = losses, flat_values(accelerator.unwrap_model(model))
    assert_same_run(runs["torch"], runs["jax"])


def test_the_fused_step_adds_gradients_that_were_there_before_it():
    losses = {}
    for form in ("fused", "calls"):
        accelerator, model, optimizer = prepared("torch", "nnx", "mlp", optax.sgd(0.5))
        loss_fn, data = loss_of("nnx"), batches("mlp")
        step = accelerator.train_step(loss_fn, model, optimizer)
        found = losses[form] = []
        for early, late in zip(data[:10:2], data[1:10:2], strict=True):
            found.append(float(accelerator.backward(loss_fn, model, early)))
            if form == "fused":
                found.append(float(step(late)))
                continue
            found.append(float(accelerator.backward(loss_fn, model, late)))
            optimizer.step()
            optimizer.zero_grad()
    np.testing.assert_allclose(losses["fused"], losses["calls"], rtol=TOLERANCE)


def test_a_torch_schedule_and_parameter_groups_by_flax_names_follow_torch():
    accelerator = Accelerator(backend="torch", cpu=True)
    model = accelerator.prepare(make_model("nnx", "mlp"))
    named = dict(torch_module(model).named_parameters())
    frozen = named["body.kernel"].detach().clone()
    groups = [{"params": [named["head.kernel"], named["head.bias"]], "lr": 0.1}, {"params": [named["body.kernel"]]}]
    sgd = torch.optim.SGD(groups, lr=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5)
    optimizer, schedule = accelerator.prepare(sgd, schedule)
    before = named["head.kernel"].detach().clone()
    moved = []
    for _ in range(2):
        accelerator.backward(loss_of("nnx"), model, batches("mlp")[0])
        moved.append(named["head.kernel"].grad * sgd.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.025)
    torch.testing.assert_close(named["head.kernel"].detach(), before - moved[0] - moved[1])
    assert torch.equal(named["body.kernel"].detach(), frozen)


def test_a_torch_optimizer_beside_an_optax_one_gets_its_gradients():
    accelerator = Accelerator(backend="torch", cpu=True)
    model = make_model("nnx", "mlp")
    model, head = accelerator.prepare(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.PathContains("head")))
    named = dict(torch_module(model).named_parameters())
    body = accelerator.prepare(torch.optim.SGD([named["body.kernel"], named["body.bias"]], lr=0.1))
    before = {name: value.detach().clone() for name, value in named.items()}
    accelerator.backward(loss_of("nnx"), model, batches("mlp")[0])
    for optimizer in (head, body):
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(named[name].detach(), value) for name, value in before.items())


def test_torch_optimizers_for_flax_models_run_under_fp16_with_its_scale():
    losses = {}
    for precision in ("no", "fp16"):
        accelerator = Accelerator(backend="torch", cpu=True, mixed_precision=precision)
        model = accelerator.prepare(make_model("nnx", "mlp"))
        optimizer = accelerator.prepare(torch.optim.SGD(torch_module(model).parameters(), lr=0.05))
        losses[precision] = train(accelerator, model, optimizer, "nnx", batches("mlp")[:10])
    assert losses["fp16"] != losses["no"]
    np.testing.assert_allclose(losses["fp16"], losses["no"], rtol=5e-3)  # float16 keeps 11 bits


def test_dropout_of_nnx_draws_the_masks_that_it_draws_on_one_jax_device():
    set_seed(0)
    accelerator = Accelerator(backend="torch", cpu=True)
    model = NnxCNN(nnx.Rngs(0), dropout=0.5)
    own = nnx.clone(model)
    model = accelerator.prepare(model)
    for batch in batches("cnn")[:3]:
        loss = accelerator.backward(loss_of("nnx"), model, batch)
        np.testing.assert_allclose(loss, jax.jit(loss_of("nnx"))(own, batch), rtol=TOLERANCE)
        own.dropout.rngs()  # jax.jit of a module keeps its own counter: one draw a step
