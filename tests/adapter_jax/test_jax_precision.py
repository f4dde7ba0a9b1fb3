"""bf16 and fp16 on the jax engine: float32 parameters and gradients, a narrow forward pass, and steps that are skipped."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_engines import Mlp, Noisy, batches, cross_entropy, loss_by_function, open_engine, train, train_by_hand, weights

from polyaccel.precision import LossScaling


def prepared(engine, model, transformation):
    handle = engine.prepare_model(model)
    return handle, engine.prepare_optimizer(transformation, handle)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("form", ["fused", "function"])
def test_a_narrow_forward_pass_learns_like_float32(precision, form):
    expected = train_by_hand(Noisy(nnx.Rngs(0)), optax.adam(1e-2), batches(1) * 10)
    engine = open_engine(mixed_precision=precision)
    model, optimizer = prepared(engine, Noisy(nnx.Rngs(0)), optax.adam(1e-2))
    losses = train(engine, model, optimizer, batches(1) * 10, form=form)
    # bfloat16 has 8 bits of precision, float16 11: a few per cent of a loss that falls by half
    np.testing.assert_allclose(losses, expected, rtol=0.05)
    assert losses != expected


@pytest.mark.parametrize(("precision", "dtype"), [("no", jnp.float32), ("bf16", jnp.bfloat16), ("fp16", jnp.float16)])
def test_the_forward_pass_computes_in_the_narrow_dtype_and_all_else_is_float32(precision, dtype):
    seen = []

    class Spy(Noisy):
        def __call__(self, x):
            seen.append((x.dtype, self.first.kernel[...].dtype, self.norm.mean[...].dtype, super().__call__(x).dtype))
            return super().__call__(x)

    def loss_fn(model, batch):
        logits = model(batch["x"])
        assert (batch["x"].dtype, logits.dtype) == (jnp.float32, jnp.float32)  # labels and the loss are never narrow
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), logits

    engine = open_engine(mixed_precision=precision)
    model, optimizer = prepared(engine, Spy(nnx.Rngs(0)), optax.adam(1e-2))
    loss, logits = loss_by_function(engine, loss_fn, model, batches(1)[0])
    assert set(seen) == {(np.dtype(dtype), np.dtype(dtype), np.dtype("float32"), np.dtype(dtype))}
    assert loss.dtype == logits.dtype == jnp.float32
    assert {grad.dtype for grad in model._polyaccel_model.grads.values()} == {np.dtype("float32")}
    optimizer.step()
    assert {value.dtype for value in weights(model).values()} == {np.dtype("float32")}
    assert model(batches(1)[0]["x"]).dtype == jnp.float32


@pytest.mark.parametrize("form", ["fused", "function"])
@pytest.mark.parametrize("partitioning", ["pmap", "sharding"])
def test_a_gradient_that_overflows_skips_the_step_and_halves_the_scale(form, partitioning):
    def loss_fn(model, batch):
        return cross_entropy(model, batch) * batch["weight"]

    good = {**batches(1)[0], "weight": np.float32(1.0)}
    bad = {**good, "weight": np.float32(1e9)}  # gradients beyond float16
    engine = open_engine(4, mixed_precision="fp16", partitioning=partitioning)
    model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.adam(1e-2))
    train(engine, model, optimizer, [good], form=form, loss_fn=loss_fn)
    assert not optimizer.step_was_skipped
    before, moments = weights(model), jnp.copy(optimizer.opt_state[0].count)
    train(engine, model, optimizer, [bad], form=form, loss_fn=loss_fn)
    assert optimizer.step_was_skipped
    assert float(engine.scaler[0]) == 65536.0 / 2
    assert all((weights(model)[name] == before[name]).all() for name in before)
    assert optimizer.opt_state[0].count == moments
    train(engine, model, optimizer, [good], form=form, loss_fn=loss_fn)
    assert not optimizer.step_was_skipped


def test_clipping_by_value_cannot_hide_an_overflow():
    engine = open_engine(mixed_precision="fp16")
    model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.sgd(0.1))
    loss_by_function(engine, lambda m, b: cross_entropy(m, b) * 1e9, model, batches(1)[0])
    engine.clip_grad_value(model, 1.0)
    optimizer.step()
    assert optimizer.step_was_skipped


def test_one_overflow_among_the_micro_batches_skips_their_update():
    def loss_fn(model, batch):
        return cross_entropy(model, batch) * batch["weight"]

    one = batches(1)[0]
    data = [{**one, "weight": np.float32(weight)} for weight in (1.0, 1e9, 1.0)]
    engine = open_engine(mixed_precision="fp16")
    model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.sgd(0.1))
    before = weights(model)
    train(engine, model, optimizer, data, loss_fn=loss_fn, accumulation=3)
    assert optimizer.step_was_skipped
    assert all((weights(model)[name] == before[name]).all() for name in before)


def test_the_scale_grows_after_enough_good_steps(monkeypatch):
    engine = open_engine(mixed_precision="fp16")
    policy = engine.plan.precision
    object.__setattr__(policy, "loss_scaling", LossScaling(growth_interval=3))
    model, optimizer = prepared(engine, Mlp(nnx.Rngs(0)), optax.sgd(0.1))
    train(engine, model, optimizer, batches(3))
    assert float(engine.scaler[0]) == 65536.0 * 2
    assert int(engine.scaler[1]) == 0


def test_the_scale_does_not_show_in_gradients_or_in_the_loss():
    grads = {}
    for precision in ("no", "fp16"):
        engine = open_engine(mixed_precision=precision)
        model = engine.prepare_model(Mlp(nnx.Rngs(0)))
        loss_by_function(engine, cross_entropy, model, batches(1)[0])
        grads[precision] = model._polyaccel_model.grads
    for name, grad in grads["no"].items():
        np.testing.assert_allclose(grads["fp16"][name], grad, atol=2e-3)  # float16 keeps three digits
