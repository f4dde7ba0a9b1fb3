"""Training a flax model on the jax engine: the numbers of a loop by hand, in both forms, on one device and on four."""

import jax
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax_engines import (
    Mlp,
    Noisy,
    batches,
    cross_entropy,
    loss_by_function,
    open_engine,
    train,
    train_by_hand,
    weights,
)

from polyaccel.errors import PlanError, PrepareError, UnsupportedError
from polyaccel.protocols import StepSpec

FORMS = ("fused", "function")
PLACES = [(1, "auto"), (4, "sharding"), (4, "pmap")]
# fp32 sums in another order: between programs, and between one device and four
CLOSE = {"rtol": 0, "atol": 1e-6}


def prepared(engine, model, transformation):
    handle = engine.prepare_model(model)
    return handle, engine.prepare_optimizer(transformation, handle)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_devices", "partitioning"), PLACES)
def test_losses_and_weights_are_those_of_a_loop_by_hand(num_devices, partitioning, form):
    by_hand = Mlp(nnx.Rngs(0))
    expected = train_by_hand(by_hand, optax.adamw(1e-2), batches(10))
    engine = open_engine(num_devices, partitioning=partitioning)
    model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.adamw(1e-2))
    np.testing.assert_allclose(train(engine, model, optimizer, batches(10), form=form), expected, **CLOSE)
    np.testing.assert_allclose(engine.unwrap(model).second.kernel[...], by_hand.second.kernel[...], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_devices", "partitioning"), PLACES)
def test_accumulation_and_clipping_are_those_of_a_loop_by_hand(num_devices, partitioning, form):
    expected = train_by_hand(Mlp(nnx.Rngs(0)), optax.sgd(0.5), batches(12), clip=0.3, accumulation=3)
    engine = open_engine(num_devices, partitioning=partitioning)
    model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.sgd(0.5))
    losses = train(engine, model, optimizer, batches(12), form=form, max_grad_norm=0.3, accumulation=3)
    np.testing.assert_allclose(losses, expected, **CLOSE)


def test_four_micro_batches_equal_one_batch():
    whole = batches(1, size=64)[0]
    parts = [{name: value[i : i + 16] for name, value in whole.items()} for i in range(0, 64, 16)]
    results = []
    for data, accumulation in (([whole], 1), (parts, 4)):
        engine = open_engine()
        model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.sgd(0.5))
        train(engine, model, optimizer, data, accumulation=accumulation)
        results.append(weights(model))
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_batch_norm_and_dropout_are_those_of_a_loop_by_hand(form):
    by_hand = Noisy(nnx.Rngs(0))
    expected = train_by_hand(by_hand, optax.sgd(0.1), batches(6))
    engine = open_engine()
    model, optimizer = prepared(engine, Noisy(nnx.Rngs(0)), optax.sgd(0.1))
    np.testing.assert_allclose(train(engine, model, optimizer, batches(6), form=form), expected, **CLOSE)
    ours = engine.unwrap(model)
    np.testing.assert_allclose(ours.norm.var[...], by_hand.norm.var[...], **CLOSE)
    assert int(ours.dropout.rngs.count[...]) == int(by_hand.dropout.rngs.count[...])


def test_a_schedule_inside_the_transformation_advances_with_updates_only():
    schedule = optax.cosine_decay_schedule(0.5, 4)
    expected = train_by_hand(Mlp(nnx.Rngs(0)), optax.sgd(schedule), batches(8), accumulation=2)
    engine = open_engine()
    model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.sgd(schedule))
    np.testing.assert_allclose(train(engine, model, optimizer, batches(8), accumulation=2), expected, **CLOSE)


def test_the_loss_function_may_return_named_values_beside_the_loss():
    def loss_fn(model, batch):
        logits = model(batch["x"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        hits = logits.argmax(-1) == batch["y"]
        return loss, {"accuracy": hits.mean(), "correct": hits.sum(), "logits": logits}

    for num_devices, partitioning in PLACES:
        engine = open_engine(num_devices, partitioning=partitioning)
        model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.sgd(0.0))
        batch = batches(1)[0]
        result = engine.train_step(StepSpec(loss_fn, model, model, optimizer))(batch, True)
        logits = np.asarray(result["logits"])
        hits = logits.argmax(-1) == batch["y"]
        assert logits.shape == (16, 4)
        assert int(result["correct"]) == hits.sum()  # summed over data shards
        assert float(result["accuracy"]) == pytest.approx(hits.mean())  # averaged over data shards
        loss, aux = loss_by_function(engine, loss_fn, model, batch)
        assert float(loss) == pytest.approx(float(result["loss"]))
        assert aux.keys() == {"accuracy", "correct", "logits"}


def test_the_same_seed_gives_the_same_bits():
    def run():
        engine = open_engine(4, seed=7, partitioning="pmap")
        model, optimizer = prepared(engine, Noisy(nnx.Rngs(1)), optax.adam(1e-2))
        return train(engine, model, optimizer, batches(5)), weights(model)

    (first, first_weights), (second, second_weights) = run(), run()
    assert first == second
    assert all((first_weights[name] == second_weights[name]).all() for name in first_weights)


@pytest.mark.parametrize("form", FORMS)
def test_parameters_and_optimizer_state_are_donated(form):
    engine = open_engine()
    model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.adam(1e-2))
    owned = [*model._polyaccel_model.leaves, *optimizer._polyaccel_optimizer.leaves]
    train(engine, model, optimizer, batches(1), form=form)
    assert all(array.is_deleted() for array in owned)


def test_accumulated_gradients_are_donated_unless_user_code_holds_them():
    engine = open_engine()
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    inner = model._polyaccel_model
    data = batches(3)
    loss_by_function(engine, cross_entropy, model, data[0], scale=0.5)
    unseen = list(inner.gradients.values())
    loss_by_function(engine, cross_entropy, model, data[1], scale=0.5)
    assert all(array.is_deleted() for array in unseen)
    seen = list(inner.grads.values())
    loss_by_function(engine, cross_entropy, model, data[2], scale=0.5)
    assert not any(array.is_deleted() for array in seen)


def test_the_users_module_keeps_its_values_and_gets_new_ones_when_unwrapped():
    module = Mlp(nnx.Rngs(0))
    before = np.array(module.first.kernel[...])
    engine = open_engine()
    model, optimizer = prepared(engine, module, optax.sgd(0.5))
    train(engine, model, optimizer, batches(2))
    np.testing.assert_array_equal(module.first.kernel[...], before)
    assert engine.unwrap(model) is module
    held = module.first.kernel[...]
    assert np.abs(held - before).max() > 1e-3
    train(engine, model, optimizer, batches(2))
    assert not held.is_deleted()  # what the user got survives the next donated step


@pytest.mark.parametrize("form", FORMS)
def test_one_program_per_input_signature(form):
    engine = open_engine()
    model, optimizer = prepared(engine, Noisy(nnx.Rngs(0)), optax.sgd(0.1))
    epoch = [*batches(3), *batches(1, size=5)]  # a smaller last batch
    train(engine, model, optimizer, epoch, form=form)
    after_one_epoch = engine.num_compiles
    assert after_one_epoch == (2 if form == "fused" else 3)  # two batch sizes (and one update)
    train(engine, model, optimizer, epoch * 2, form=form)
    assert engine.num_compiles == after_one_epoch + (2 if form == "fused" else 0)  # train() makes a new fused step


def test_a_fused_step_compiles_once_and_xla_agrees():
    engine = open_engine(4)
    model, optimizer = prepared(engine, Noisy(nnx.Rngs(0)), optax.adam(0.1))
    step = engine.train_step(StepSpec(cross_entropy, model, model, optimizer))
    data = batches(6)
    step(data[0], True)
    with jax.log_compiles(False), _no_compilation():
        for batch in data[1:]:
            step(batch, True)
    assert engine.num_compiles == 1


class _no_compilation:
    """Fails when XLA compiles anything inside."""

    def __enter__(self):
        self.names = []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, name, duration, **kwargs):
        if "backend_compile" in name:
            self.names.append(name)

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._note)
        assert not self.names


def test_a_lambda_written_in_the_loop_does_not_compile_in_every_round():
    engine = open_engine()
    model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.sgd(0.1))
    for batch in batches(4):
        smoothing = 0.1
        loss_by_function(engine, lambda m, b: cross_entropy(m, b) * (1 - smoothing), model, batch)  # noqa: B023
        optimizer.step()
        optimizer.zero_grad()
    assert engine.num_compiles == 2  # backward and update


def test_a_loss_function_that_captures_something_new_in_every_step_is_warned_about(caplog, monkeypatch):
    monkeypatch.setattr("polyaccel_jax.step._MANY_SIGNATURES", 3)
    engine = open_engine()
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    for batch in batches(3):
        loss_by_function(engine, lambda m, batch=batch: cross_entropy(m, batch), model)
    assert "pass what changes as an argument" in caplog.text


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_state_that_starts_as_the_parameters_themselves(form):
    engine = open_engine()
    transformation = optax.contrib.schedule_free_sgd(0.5)  # keeps a second copy of the parameters
    model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), transformation)
    expected = train_by_hand(Mlp(nnx.Rngs(0)), transformation, batches(4))
    np.testing.assert_allclose(train(engine, model, optimizer, batches(4), form=form), expected, **CLOSE)


def test_numbers_are_traced_and_flags_are_static():
    def loss_fn(model, batch, weight, is_squared):
        loss = cross_entropy(model, batch) * weight
        return loss * loss if is_squared else loss

    engine = open_engine()
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    batch = batches(1)[0]
    one = float(loss_by_function(engine, loss_fn, model, batch, 1.0, False))
    model._polyaccel_model.zero_grad()
    assert float(loss_by_function(engine, loss_fn, model, batch, 0.5, False)) == pytest.approx(one / 2)
    assert engine.num_compiles == 1
    model._polyaccel_model.zero_grad()
    assert float(loss_by_function(engine, loss_fn, model, batch, 1.0, True)) == pytest.approx(one * one)
    assert engine.num_compiles == 2


def test_gradient_values_are_clamped():
    engine = open_engine()
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    loss_by_function(engine, cross_entropy, model, batches(1)[0])
    before = {name: np.array(value) for name, value in model._polyaccel_model.grads.items()}
    engine.clip_grad_value(model, 0.01)
    for name, value in model._polyaccel_model.grads.items():
        np.testing.assert_array_equal(value, np.clip(before[name], -0.01, 0.01))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_the_norm_before_clipping_is_returned(norm_type):
    engine = open_engine()
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    loss_by_function(engine, cross_entropy, model, batches(1)[0])
    flat = np.concatenate([np.array(value).ravel() for value in model._polyaccel_model.grads.values()])
    assert float(engine.clip_grad_norm(model, 0.1, norm_type)) == pytest.approx(
        np.linalg.norm(flat, norm_type), rel=1e-5
    )
    clipped = np.concatenate([np.array(value).ravel() for value in model._polyaccel_model.grads.values()])
    assert np.linalg.norm(clipped, norm_type) == pytest.approx(0.1, rel=1e-4)


# -- what cannot be ---------------------------------------------------------------------------------------------------------


def test_a_loss_value_is_refused_and_the_error_names_the_other_forms():
    engine = open_engine()
    with pytest.raises(UnsupportedError, match="cannot be differentiated afterwards") as caught:
        engine.backward(jax.numpy.float32(1.0), scale=1.0)
    assert "backward(loss_fn, model, batch)" in caught.value.hint
    assert "train_step" in caught.value.hint


@pytest.mark.parametrize("partitioning", ["pmap", "sharding"])
def test_a_batch_that_does_not_divide_over_the_shards_is_refused_before_anything_changes(partitioning):
    engine = open_engine(4, partitioning=partitioning)
    model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.sgd(0.5))
    before = weights(model)
    with pytest.raises(PlanError, match="10 samples cannot be cut over 4 data shards") as caught:
        train(engine, model, optimizer, batches(1, size=10))
    assert "drop_last=True" in caught.value.hint
    assert all((weights(model)[name] == before[name]).all() for name in before)
    train(engine, model, optimizer, batches(1, size=8))


def test_an_optimizer_of_another_model_is_refused():
    engine = open_engine()
    _, first_optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.sgd(0.5))
    second = engine.prepare_model(Mlp(nnx.Rngs(1)))
    with pytest.raises(PrepareError, match="the optimizer trains model_0"):
        engine.train_step(StepSpec(cross_entropy, second, second, first_optimizer))
    with pytest.raises(PrepareError, match="does not say which model"):
        engine.prepare_optimizer(optax.sgd(0.5), None)


def test_a_model_that_the_loss_function_reaches_without_taking_it_is_refused():
    engine = open_engine()
    model, other = engine.prepare_model(Mlp(nnx.Rngs(0))), engine.prepare_model(Mlp(nnx.Rngs(1)))
    with pytest.raises(PrepareError, match="without taking it as an argument"):
        loss_by_function(engine, lambda m, b: cross_entropy(other, b), model, batches(1)[0])
    with pytest.raises(PrepareError, match="without a prepared model"):
        loss_by_function(engine, lambda b: cross_entropy(model, b), batches(1)[0])
    with pytest.raises(PrepareError, match="not prepared"):
        loss_by_function(engine, cross_entropy, Mlp(nnx.Rngs(0)), batches(1)[0])


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, b: m(b["x"]), "array of shape"),
        (lambda m, b: 1.0, "float as the loss"),
        (lambda m, b: (cross_entropy(m, b), 1, 2), "tuple of 3"),
        (lambda m, b: b["y"].sum(), "int32 array"),
    ],
)
def test_a_loss_that_is_no_floating_scalar_is_refused(loss_fn, message):
    engine = open_engine()
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    with pytest.raises(UnsupportedError, match=message):
        loss_by_function(engine, loss_fn, model, batches(1)[0])
