"""What user code does with a prepared nnx or linen model, and with its optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax_engines import LinenNoisy, Mlp, Noisy, batches, cross_entropy, loss_by_function, open_engine, train, weights

from polyaccel.errors import PrepareError, UnsupportedError

# fp32 sums in another order, by another compiled program
CLOSE = {"rtol": 0, "atol": 1e-6}


# -- nnx -------------------------------------------------------------------------------------------------------------------


def test_calling_a_prepared_module_gives_its_outputs():
    module = Mlp(nnx.Rngs(0))
    x = batches(1)[0]["x"]
    expected = module(jnp.asarray(x))
    for num_devices in (1, 4):
        model = open_engine(num_devices).prepare_model(Mlp(nnx.Rngs(0)))
        np.testing.assert_allclose(model(x), expected, **CLOSE)
        np.testing.assert_allclose(model(x[:3]), expected[:3], **CLOSE)  # three samples on four devices: evaluation may
        np.testing.assert_allclose(model.first(jnp.asarray(x)), module.first(jnp.asarray(x)), **CLOSE)


def test_train_and_eval_switch_dropout_and_batch_norm():
    module = Noisy(nnx.Rngs(0))
    x = jnp.asarray(batches(1)[0]["x"])
    engine = open_engine()
    model = engine.prepare_model(module)
    first, second = model(x), model(x)
    assert np.abs(first - second).max() > 1e-3  # two masks
    statistics = np.array(model.norm.mean[...])
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))
    np.testing.assert_array_equal(model.norm.mean[...], statistics)
    model.train()
    model(x)
    assert np.abs(model.norm.mean[...] - statistics).max() > 1e-5


def test_a_mode_that_was_seen_before_does_not_compile_again():
    engine = open_engine()
    model = engine.prepare_model(Noisy(nnx.Rngs(0)))
    x = batches(1)[0]["x"]
    for _ in range(3):
        model.eval()
        model(x)
        model.train()
        model(x)
    assert engine.num_compiles == 2


def test_what_user_code_changes_in_the_module_counts_from_the_next_step_on():
    engine = open_engine()
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    x = batches(1)[0]["x"]
    model(x)
    model.second.bias[...] = jnp.full(4, 7.0)
    np.testing.assert_allclose(model(x).mean(), 7.0, atol=1.5)
    np.testing.assert_array_equal(weights(model)["second.bias"], np.full(4, 7.0))
    model.second.kernel[...] = jnp.zeros((16, 4))
    np.testing.assert_array_equal(model(x), np.full((16, 4), 7.0))


def test_only_what_the_wrt_filter_selects_is_trained():
    def is_second(path, value):
        return path[0] == "second" and isinstance(value, nnx.Param)

    engine = open_engine()
    module = Mlp(nnx.Rngs(0))
    model = engine.prepare_model(module)
    optimizer = engine.prepare_optimizer(nnx.Optimizer(module, optax.sgd(0.5), wrt=is_second), model)
    before = weights(model)
    train(engine, model, optimizer, batches(2))
    after = weights(model)
    np.testing.assert_array_equal(before["first.kernel"], after["first.kernel"])
    assert np.abs(before["second.kernel"] - after["second.kernel"]).max() > 1e-3
    loss_by_function(engine, cross_entropy, model, batches(1)[0])
    assert set(model._polyaccel_model.grads) == {"second.kernel", "second.bias"}


def test_a_variable_type_of_ones_own_can_be_trained():
    class Scale(nnx.Variable):
        pass

    class Scaled(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(8, 4, rngs=rngs)
            self.scale = Scale(jnp.ones(4))

        def __call__(self, x):
            return self.inner(x) * self.scale[...]

    engine = open_engine()
    module = Scaled(nnx.Rngs(0))
    model = engine.prepare_model(module)
    optimizer = engine.prepare_optimizer(nnx.Optimizer(module, optax.sgd(0.5), wrt=Scale), model)
    before = weights(model)
    train(engine, model, optimizer, batches(2))
    after = weights(model)
    np.testing.assert_array_equal(before["inner.kernel"], after["inner.kernel"])
    assert np.abs(after["scale"] - 1).max() > 1e-3


def test_an_nnx_optimizer_goes_on_where_it_was_and_is_given_back_with_its_state():
    data = batches(6)
    module = Mlp(nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)

    def by_hand(batch):
        _, grads = nnx.value_and_grad(cross_entropy)(module, jax.tree.map(jnp.asarray, batch))
        optimizer.update(module, grads)

    for batch in data[:3]:
        by_hand(batch)
    engine = open_engine()
    model = engine.prepare_model(nnx.clone(module))
    prepared = engine.prepare_optimizer(nnx.clone(optimizer), model)
    train(engine, model, prepared, data[3:])
    for batch in data[3:]:
        by_hand(batch)
    np.testing.assert_allclose(engine.unwrap(model).first.kernel[...], module.first.kernel[...], **CLOSE)
    ours, theirs = nnx.as_pure(engine.unwrap(prepared).opt_state), nnx.as_pure(optimizer.opt_state)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, **CLOSE)


def test_masks_and_labels_see_the_parameters_in_the_models_own_structure():
    def is_kernel(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    results = []
    for transformation in (
        optax.chain(optax.masked(optax.add_decayed_weights(0.1), is_kernel), optax.sgd(0.5)),
        optax.chain(optax.add_decayed_weights(0.1, mask=is_kernel), optax.sgd(0.5)),
    ):
        engine = open_engine()
        model = engine.prepare_model(Mlp(nnx.Rngs(0)))
        train(engine, model, engine.prepare_optimizer(transformation, model), batches(3))
        results.append(weights(model))
    np.testing.assert_array_equal(results[0]["first.kernel"], results[1]["first.kernel"])


def test_two_models_train_together_with_an_optimizer_each():
    def loss_fn(first, second, batch):
        logits = first(batch["x"]) + second(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    engine = open_engine()
    models = [engine.prepare_model(Mlp(nnx.Rngs(seed))) for seed in (0, 1)]
    optimizers = [engine.prepare_optimizer(optax.sgd(0.5), model) for model in models]
    before = [weights(model) for model in models]
    losses = []
    for batch in batches(1) * 5:
        losses.append(float(loss_by_function(engine, loss_fn, *models, batch)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for model, old in zip(models, before, strict=True):
        assert np.abs(weights(model)["first.kernel"] - old["first.kernel"]).max() > 1e-4


def test_an_optimizer_that_was_made_for_another_model_is_refused():
    engine = open_engine()
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    other = nnx.Optimizer(Noisy(nnx.Rngs(0)), optax.adam(1e-2), wrt=nnx.Param)
    with pytest.raises(PrepareError, match="made for another model"):
        engine.prepare_optimizer(other, model)
    nothing = nnx.Optimizer(Mlp(nnx.Rngs(0)), optax.sgd(1e-2), wrt=nnx.BatchStat)
    with pytest.raises(PrepareError, match="selects no variable"):
        engine.prepare_optimizer(nothing, model)


def test_a_variable_made_inside_the_loss_function_is_refused_by_name():
    def loss_fn(model, batch):
        model.extra = nnx.Param(jnp.zeros(3))
        return cross_entropy(model, batch)

    engine = open_engine()
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    with pytest.raises(UnsupportedError, match="extra"):
        loss_by_function(engine, loss_fn, model, batches(1)[0])


# -- linen -----------------------------------------------------------------------------------------------------------------


def bound(seed=0, module=None):
    module = module or LinenNoisy()
    variables = module.init({"params": jax.random.key(seed)}, jnp.zeros((1, 8)), train=False)
    return module.bind(variables)


def test_a_linen_module_trains_like_a_loop_by_hand_without_dropout():
    class Plain(linen.Module):
        @linen.compact
        def __call__(self, x, train=True):
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(16)(x))
            return linen.Dense(4)(linen.tanh(x))

    module, variables = bound(module=Plain()).unbind()
    params, statistics = variables["params"], variables["batch_stats"]
    transformation = optax.sgd(0.5)
    state = transformation.init(params)

    @jax.jit
    def by_hand(params, statistics, state, batch):
        def loss_fn(params):
            logits, new = module.apply(
                {"params": params, "batch_stats": statistics}, batch["x"], mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
            return loss, new["batch_stats"]

        (loss, statistics_), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = transformation.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), statistics_, state

    expected = []
    for batch in batches(6):
        loss, params, statistics, state = by_hand(params, statistics, state, batch)
        expected.append(float(loss))
    for num_devices, form in ((1, "fused"), (4, "function")):
        engine = open_engine(num_devices)
        model = engine.prepare_model(bound(module=Plain()))
        optimizer = engine.prepare_optimizer(optax.sgd(0.5), model)
        np.testing.assert_allclose(train(engine, model, optimizer, batches(6), form=form), expected, **CLOSE)
        ours = model.variables["batch_stats"]["BatchNorm_0"]["mean"]
        np.testing.assert_allclose(ours, statistics["BatchNorm_0"]["mean"], **CLOSE)


def test_linen_dropout_gets_its_keys_and_a_rerun_draws_the_same():
    def run(seed):
        engine = open_engine(seed=seed)
        model = engine.prepare_model(bound())
        return train(engine, model, engine.prepare_optimizer(optax.sgd(0.0), model), batches(1) * 4)

    first = run(3)
    assert len(set(first)) == 4  # a new mask in every step
    assert run(3) == first
    assert run(4) != first


def test_evaluation_of_a_linen_module_changes_no_statistics():
    engine = open_engine()
    model = engine.prepare_model(bound())
    x = batches(1)[0]["x"]
    before = np.array(model.variables["batch_stats"]["BatchNorm_0"]["mean"])
    model.eval()
    assert model(x, train=False).shape == (16, 4)
    model(x, train=True)
    np.testing.assert_array_equal(model.variables["batch_stats"]["BatchNorm_0"]["mean"], before)
    model.train()
    model(x, train=True)
    assert np.abs(model.variables["batch_stats"]["BatchNorm_0"]["mean"] - before).max() > 1e-5


def test_a_linen_module_without_variables_is_refused():
    with pytest.raises(PrepareError, match="without variables") as caught:
        open_engine().prepare_model(LinenNoisy())
    assert "module.bind" in caught.value.hint


def test_unwrapping_a_linen_module_gives_it_bound_to_current_variables():
    engine = open_engine()
    model = engine.prepare_model(bound())
    train(engine, model, engine.prepare_optimizer(optax.sgd(0.5), model), batches(2))
    user = engine.unwrap(model)
    x = batches(1)[0]["x"]
    np.testing.assert_allclose(user(jnp.asarray(x), train=False), model(x, train=False), **CLOSE)


# -- state -----------------------------------------------------------------------------------------------------------------


def test_state_read_from_one_mesh_is_written_to_another():
    data = batches(6)
    source = open_engine(4, partitioning="pmap")
    model = source.prepare_model(Noisy(nnx.Rngs(0)))
    optimizer = source.prepare_optimizer(optax.adam(1e-2), model)
    train(source, model, optimizer, data[:3])
    shards, state = list(source.read_state(model)), list(source.read_state(optimizer))
    assert len({shard.name for shard in shards}) == len(shards)  # replicated arrays are given once
    goal = open_engine(1)
    other = goal.prepare_model(Noisy(nnx.Rngs(9)))
    other_optimizer = goal.prepare_optimizer(optax.adam(1e-2), other)
    goal.write_state(other, shards)
    goal.write_state(other_optimizer, state)
    for handle in (model, other):
        handle.eval()
    x = data[0]["x"]
    np.testing.assert_allclose(other(x), model(x), **CLOSE)
    train(source, model, optimizer, data[3:])
    train(goal, other, other_optimizer, data[3:])
    np.testing.assert_allclose(weights(other)["second.kernel"], weights(model)["second.kernel"], rtol=0, atol=1e-5)
