"""Flax scripts on the torch engine: the numbers of the jax engine, in memory that torch owns."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax_examples import BATCHES, CNN, MLP, STEPS, bound_linen, linen_loss_fn, loss_fn, train, values

from polyaccel import Accelerator, set_seed
from polyaccel.errors import CheckpointError, PrepareError, UnsupportedError

HERE = Path(__file__).parent
# Both engines run the same jitted mathematics in float32; on jax's four devices sums are taken in another order.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def prepared(backend, model, transformation, wrt=nnx.Param, **arguments):
    """(accelerator, model, optimizer)."""
    accelerator = Accelerator(backend=backend, cpu=True, **arguments)
    optimizer = nnx.Optimizer(model, transformation, wrt=wrt) if isinstance(model, nnx.Module) else transformation
    return accelerator, *accelerator.prepare(model, optimizer)


def module_of(accelerator, model):
    """The nn.Module that the torch engine holds."""
    return accelerator._prepared.handle_of(model, "model", argument="model")


# -- the same numbers as on jax ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_twenty_steps_of_a_cnn_with_batch_norm_are_those_of_the_jax_engine(accumulation):
    results = {}
    for backend in ("torch", "jax"):
        accelerator, model, optimizer = prepared(
            backend, CNN(), optax.sgd(0.05, momentum=0.9), gradient_accumulation_steps=accumulation
        )
        losses = train(accelerator, model, optimizer, max_norm=0.5)
        model.eval()
        outputs = np.asarray(model(BATCHES[0]["image"]))
        results[backend] = losses, outputs, values(accelerator.unwrap_model(model))
    torch_losses, torch_outputs, torch_values = results["torch"]
    jax_losses, jax_outputs, jax_values = results["jax"]
    assert torch_losses[-1] < torch_losses[0]
    np.testing.assert_allclose(torch_losses, jax_losses, rtol=TOLERANCE)
    np.testing.assert_allclose(torch_outputs, jax_outputs, rtol=1e-4, atol=TOLERANCE)
    assert torch_values.keys() == jax_values.keys()
    for name, value in torch_values.items():
        np.testing.assert_allclose(value, jax_values[name], rtol=1e-4, atol=TOLERANCE, err_msg=name)


def test_a_linen_model_and_a_plain_optax_transformation_train_as_on_jax():
    results = {}
    for backend in ("torch", "jax"):
        schedule = optax.warmup_cosine_decay_schedule(0.0, 0.05, 5, STEPS)
        accelerator, model, optimizer = prepared(backend, bound_linen(), optax.sgd(schedule, momentum=0.9))
        losses = train(accelerator, model, optimizer, loss_fn=linen_loss_fn)
        results[backend] = losses, accelerator.unwrap_model(model).variables
    np.testing.assert_allclose(results["torch"][0], results["jax"][0], rtol=TOLERANCE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=TOLERANCE), results["torch"][1], results["jax"][1]
    )


def test_the_fused_step_gives_the_numbers_of_the_separate_calls():
    accelerator, model, optimizer = prepared("torch", CNN(), optax.adam(1e-3))
    separate = train(accelerator, model, optimizer, max_norm=0.5)
    accelerator, model, optimizer = prepared("torch", CNN(), optax.adam(1e-3))
    step = accelerator.train_step(loss_fn, model, optimizer, max_grad_norm=0.5)
    # One program in place of three: XLA takes the same sums in another order.
    np.testing.assert_allclose([float(step(batch)) for batch in BATCHES], separate, rtol=TOLERANCE)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 5e-3)])
def test_half_precision_stays_near_float32(precision, tolerance):
    exact = train(*prepared("torch", CNN(), optax.sgd(0.05)))
    accelerator, model, optimizer = prepared("torch", CNN(), optax.sgd(0.05), mixed_precision=precision)
    losses = train(accelerator, model, optimizer)
    assert not accelerator.optimizer_step_was_skipped
    assert losses != exact
    # bfloat16 keeps 8 bits of mantissa, float16 11; the loss itself is computed in float32.
    np.testing.assert_allclose(losses, exact, rtol=tolerance)
    assert all(parameter.dtype == torch.float32 for parameter in module_of(accelerator, model).parameters())


def test_a_gradient_beyond_float16_skips_the_step_and_halves_the_scale():
    accelerator, model, optimizer = prepared("torch", MLP(), optax.sgd(0.05), mixed_precision="fp16")
    before = values(accelerator.unwrap_model(model))

    def steep(model, batch):
        return loss_fn(model, batch) * 300

    num_skipped = 0
    for _ in range(12):
        accelerator.backward(steep, model, BATCHES[0])
        optimizer.step()
        optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            break
        num_skipped += 1
        after = values(accelerator.unwrap_model(model))
        assert all((after[name] == before[name]).all() for name in before)
    assert 0 < num_skipped < 12  # 2**15 * 300 overflows, a few halvings later it does not


# -- what torch holds --------------------------------------------------------------------------------------------------


def test_the_state_dict_has_the_models_own_names():
    accelerator, model, _ = prepared("torch", CNN(), optax.sgd(0.1))
    module = module_of(accelerator, model)
    assert set(dict(module.named_parameters())) == {
        "conv.kernel",
        "conv.bias",
        "norm.scale",
        "norm.bias",
        "head.kernel",
        "head.bias",
    }
    assert set(module.state_dict()) - set(dict(module.named_parameters())) == {"norm.mean", "norm.var"}


def test_names_that_every_torch_module_has_are_no_obstacle():
    class Odd(nnx.Module):
        def __init__(self):
            self.half, self.type = nnx.Param(jnp.ones(2)), MLP()

        def __call__(self, images):
            return self.type(images) * self.half[...].sum()

    accelerator, model, optimizer = prepared("torch", Odd(), optax.sgd(0.1))
    train(accelerator, model, optimizer, BATCHES[:1])
    assert "type.body.kernel" in module_of(accelerator, model).state_dict()
    assert not np.array_equal(values(accelerator.unwrap_model(model))["half"], np.ones(2))


def test_batches_losses_and_norms_are_jax_arrays_in_user_code():
    accelerator, model, optimizer = prepared("torch", CNN(), optax.sgd(0.1))
    rows = [{"image": image, "label": int(label)} for image, label in zip(BATCHES[0]["image"], BATCHES[0]["label"])]
    for loader in (
        accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=4)),
        accelerator.prepare_data_loader(BATCHES[:2]),
    ):
        for batch in loader:
            assert isinstance(batch["image"], jax.Array)
            assert batch["label"].dtype == jnp.int32
            loss = accelerator.backward(loss_fn, model, batch)
            assert isinstance(loss, jax.Array)
            assert isinstance(accelerator.clip_grad_norm_(model, 1.0), jax.Array)
            optimizer.step()
            optimizer.zero_grad()
    assert isinstance(accelerator.device, jax.Device)
    assert isinstance(model(batch["image"]), jax.Array)


def test_torch_writes_reach_the_next_program_and_the_users_module():
    accelerator, model, _ = prepared("torch", MLP(), optax.sgd(0.1))
    module = module_of(accelerator, model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(model(BATCHES[0]["image"]), np.zeros((8, 3)))
    assert not values(accelerator.unwrap_model(model))["head.kernel"].any()


def test_what_user_code_sets_in_the_module_counts_from_the_next_step_on():
    accelerator, model, _ = prepared("torch", MLP(), optax.sgd(0.1))
    module = module_of(accelerator, model)
    model.head.kernel[...] = jnp.zeros((16, 3))
    model.head.bias[...] = jnp.arange(3.0)
    np.testing.assert_array_equal(model(BATCHES[0]["image"])[0], [0, 1, 2])
    assert not module.get_parameter("head.kernel").any()


def test_values_that_user_code_took_do_not_change_under_it():
    accelerator, model, optimizer = prepared("torch", CNN(), optax.sgd(0.1, momentum=0.9))
    kernel, state = model.head.kernel[...], optimizer.opt_state
    batch = jax.tree.map(jnp.asarray, BATCHES[0])
    copies = jax.tree.map(np.array, (kernel, state, batch))
    train(accelerator, model, optimizer, [batch] * 3, max_norm=1e-3)
    jax.tree.map(np.testing.assert_array_equal, (kernel, state, batch), copies)


def test_a_gradient_that_is_an_array_of_the_batch_is_not_clipped_in_place():
    class Dot(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(64))

    def dot(model, x):
        return jnp.vdot(model.weight[...], x)  # its gradient is x itself

    accelerator, model, _ = prepared("torch", Dot(), optax.sgd(1.0))
    x = jnp.full(64, 3.0)
    accelerator.backward(dot, model, x)
    assert float(accelerator.clip_grad_norm_(model, 1e-3)) == pytest.approx(24)
    np.testing.assert_array_equal(x, np.full(64, 3.0))


def test_an_update_that_keeps_old_parameters_in_its_state_gets_copies():
    remembering = optax.GradientTransformation(
        init=lambda params: params, update=lambda updates, state, params: (updates, params)
    )
    accelerator, model, optimizer = prepared("torch", MLP(), optax.chain(optax.sgd(0.1), remembering))
    for batch in BATCHES[:3]:
        before = values(accelerator.unwrap_model(model))
        train(accelerator, model, optimizer, [batch])
        (remembered,) = [state for state in optimizer.opt_state if jax.tree.leaves(state)]
        np.testing.assert_array_equal(remembered["head"]["kernel"], before["head.kernel"])


def test_free_memory_frees_the_model_and_its_programs():
    accelerator, model, optimizer = prepared("torch", MLP(), optax.sgd(0.1))
    train(accelerator, model, optimizer, BATCHES[:1])
    held = weakref.ref(model._polyaccel_model)
    accelerator.free_memory()
    del model, optimizer
    gc.collect()
    assert held() is None


# -- random numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_rerun_with_the_same_seed_is_equal_to_the_last_bit_and_every_step_drops_other_neurons(kind):
    def run(seed):
        set_seed(seed)
        model = CNN(dropout=0.5, seed=seed) if kind == "nnx" else bound_linen(dropout=0.5)
        accelerator, model, optimizer = prepared("torch", model, optax.sgd(0.0))
        return train(
            accelerator, model, optimizer, [BATCHES[0]] * 4, loss_fn=loss_fn if kind == "nnx" else linen_loss_fn
        )

    first, again, other = run(0), run(0), run(1)
    assert first == again
    assert first != other
    assert len(set(first)) == 4  # the learning rate is zero: only dropout differs


def test_evaluation_uses_running_statistics_and_drops_nothing():
    accelerator, model, _ = prepared("torch", CNN(dropout=0.5), optax.sgd(0.1))
    model(BATCHES[0]["image"])  # in training mode a forward pass updates the statistics, as flax does
    model.eval()
    mean = values(accelerator.unwrap_model(model))["norm.mean"]
    assert mean.any()
    np.testing.assert_array_equal(model(BATCHES[0]["image"]), model(BATCHES[0]["image"]))
    np.testing.assert_array_equal(values(accelerator.unwrap_model(model))["norm.mean"], mean)


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_only_parameters_that_the_filter_selects_are_trained():
    model = MLP()
    before = values(model)
    accelerator, model, optimizer = prepared("torch", model, optax.adam(0.1), wrt=nnx.PathContains("head"))
    accelerator.backward(loss_fn, model, BATCHES[0])
    assert module_of(accelerator, model).get_parameter("body.kernel").grad is None
    optimizer.step()
    after = values(accelerator.unwrap_model(model))
    assert {name for name in before if (before[name] != after[name]).any()} == {"head.kernel", "head.bias"}


def test_two_models_of_one_loss_are_updated_by_their_own_optimizers():
    accelerator, first, first_optimizer = prepared("torch", MLP(0), optax.sgd(0.1))
    second = MLP(1)
    second, second_optimizer = accelerator.prepare(second, nnx.Optimizer(second, optax.sgd(0.1), wrt=nnx.Param))

    def distance(one, other, batch):
        return ((one(batch["image"]) - other(batch["image"])) ** 2).mean()

    losses = []
    for _ in range(10):
        losses.append(float(accelerator.backward(distance, first, second, BATCHES[0])))
        for optimizer in (first_optimizer, second_optimizer):
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert not np.array_equal(first.head.kernel[...], second.head.kernel[...])


def test_optimizer_state_crosses_to_another_run_by_parameter_name():
    def handle(accelerator, value, role):
        return accelerator._prepared.handle_of(value, role, argument=role)

    transformation = optax.adam(0.01, mu_dtype=jnp.bfloat16)
    accelerator, model, optimizer = prepared("torch", MLP(), transformation)
    train(accelerator, model, optimizer, BATCHES[:5])
    engine = accelerator._engine
    model_state = list(engine.read_state(handle(accelerator, model, "model")))
    optimizer_state = list(engine.read_state(handle(accelerator, optimizer, "optimizer")))
    assert "head.kernel.0/mu" in {shard.name for shard in optimizer_state}
    expected = train(accelerator, model, optimizer, BATCHES[5:])

    accelerator, model, optimizer = prepared("torch", MLP(seed=9), transformation)
    engine = accelerator._engine
    engine.write_state(handle(accelerator, model, "model"), model_state)
    engine.write_state(handle(accelerator, optimizer, "optimizer"), optimizer_state)
    assert train(accelerator, model, optimizer, BATCHES[5:]) == expected

    accelerator, _, other = prepared("torch", MLP(), optax.sgd(0.1))
    with pytest.raises(CheckpointError, match="0/mu"):
        accelerator._engine.write_state(handle(accelerator, other, "optimizer"), optimizer_state)


def test_the_optax_state_can_be_read_and_set():
    accelerator, model, optimizer = prepared("torch", MLP(), optax.adam(0.01))
    fresh = optimizer.opt_state
    first = train(accelerator, model, optimizer, BATCHES[:1])
    assert int(optimizer.opt_state[0].count) == 1
    optimizer.opt_state = fresh
    assert int(optimizer.opt_state[0].count) == 0
    train(accelerator, model, optimizer, BATCHES[:1])
    assert int(fresh[0].count) == 0
    assert first


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_a_loss_value_cannot_be_differentiated():
    accelerator, model, _ = prepared("torch", MLP(), optax.sgd(0.1))
    with pytest.raises(UnsupportedError, match=r"cannot be differentiated afterwards\nhint: pass the function"):
        accelerator.backward(loss_fn(model, BATCHES[0]))


def test_an_optimizer_needs_to_know_its_model():
    accelerator = Accelerator(backend="torch", cpu=True)
    with pytest.raises(PrepareError, match=r"which model it trains\nhint: prepare it in one call with its model"):
        accelerator.prepare(MLP(0), MLP(1), optax.sgd(0.1))


def test_variables_that_are_no_parameters_are_trained_on_jax_only():
    with pytest.raises(UnsupportedError, match=r"norm\.mean, norm\.var"):
        prepared("torch", CNN(), optax.sgd(0.1), wrt=(nnx.Param, nnx.BatchStat))


def test_torch_compile_is_not_for_flax_models():
    with pytest.raises(UnsupportedError, match=r"compile=True is torch\.compile, and MLP is a flax model"):
        prepared("torch", MLP(), optax.sgd(0.1), compile=True)


def test_gradients_of_something_else_cannot_be_clipped():
    accelerator, model, _ = prepared("torch", MLP(), optax.sgd(0.1))
    with pytest.raises(PrepareError, match="gradients of a State cannot be clipped"):
        accelerator.clip_grad_norm_(nnx.state(accelerator.unwrap_model(model)), 1.0)


def test_a_value_of_another_shape_is_refused_by_name():
    _, model, _ = prepared("torch", MLP(), optax.sgd(0.1))
    model.head.bias.set_value(jnp.zeros(7))
    with pytest.raises(PrepareError, match=r"head\.bias has shape \(3,\), and the new value has shape \(7,\)"):
        model(BATCHES[0]["image"])


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    results = {}
    environment = {**os.environ, "POLYACCEL_COMPILATION_CACHE": str(tmp_path / "cache")}
    for count in (1, 2):
        file = tmp_path / f"{count}.npz"
        command = ["-m", "polyaccel.cli.main", "launch", "--backend", "torch", "--cpu", "--num-processes", str(count)]
        done = subprocess.run(
            [sys.executable, *command, str(HERE / "flax_processes.py"), str(file)],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        results[count] = dict(np.load(file))
    assert any((tmp_path / "cache").iterdir())  # the next start compiles nothing
    one, two = results[1], results[2]
    dropped = {name: (one.pop(name), two.pop(name)) for name in list(one) if name.startswith("dropped.")}
    assert one.keys() == two.keys()
    for name, value in one.items():
        # A mean over eight samples, or the mean of two means over four: another order of float32 sums, then Adam.
        np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=TOLERANCE, err_msg=name)
    assert (one["half.body.kernel"] == one["taught.body.kernel"]).all()  # not trained
    assert (one["half.head.kernel"] != one["taught.head.kernel"]).any()
    assert set(dropped) == {"dropped.nnx", "dropped.linen"}
    for alone, together in dropped.values():
        assert alone.shape == (1,)
        assert together[0] != together[1]
