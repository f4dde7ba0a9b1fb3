"""Replica programs (pmap) and global programs (sharding): what differs, what must not, and programs that a bridge makes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_engines import Mlp, Noisy, batches, cross_entropy, loss_by_function, open_engine, train

from polyaccel.errors import PlanError
from polyaccel.protocols import ProgramResult, StepSpec
from polyaccel.sharding.plan import ModelHints


class Norm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(8, momentum=0.0, rngs=rngs)
        self.second = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(self.norm(x))


@pytest.mark.parametrize(("partitioning", "rows"), [("pmap", 4), ("sharding", 16)])
def test_batch_statistics_are_of_one_replica_in_pmap_and_of_the_global_batch_in_sharding(partitioning, rows):
    engine = open_engine(4, partitioning=partitioning)
    model = engine.prepare_model(Norm(nnx.Rngs(0)))
    batch = batches(1)[0]
    loss_by_function(engine, cross_entropy, model, batch)
    # momentum 0 keeps the latest batch; of replicas, the first one's statistics stay, as DistributedDataParallel broadcasts them
    np.testing.assert_allclose(model.norm.mean[...], batch["x"][:rows].mean(0), rtol=0, atol=1e-6)


def test_replicas_draw_different_masks():
    class Mask(nnx.Module):
        def __init__(self, rngs):
            self.weight = nnx.Param(jnp.ones(()))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(x * self.weight[...])

    engine = open_engine(4, partitioning="pmap")
    model = engine.prepare_model(Mask(nnx.Rngs(0)))
    masks = np.asarray(model(np.ones((4, 64), np.float32)))
    assert len({row.tobytes() for row in masks}) == 4
    assert set(np.unique(masks)) == {0.0, 2.0}


def test_gradients_are_the_mean_over_replicas():
    by_partitioning = {}
    for partitioning in ("pmap", "sharding"):
        engine = open_engine(4, partitioning=partitioning)
        model = engine.prepare_model(Mlp(nnx.Rngs(0)))
        loss_by_function(engine, cross_entropy, model, batches(1)[0])
        by_partitioning[partitioning] = {n: np.array(g) for n, g in model._polyaccel_model.grads.items()}
    for name, grad in by_partitioning["pmap"].items():
        # fp32 sums in another order
        np.testing.assert_allclose(grad, by_partitioning["sharding"][name], rtol=0, atol=1e-7)


def test_parameters_and_state_stay_on_all_devices_and_batches_are_cut():
    engine = open_engine(4)
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    optimizer = engine.prepare_optimizer(optax.adam(1e-2), model)
    train(engine, model, optimizer, batches(2))
    arrays = [*model._polyaccel_model.leaves, *optimizer._polyaccel_optimizer.leaves]
    assert all(array.is_fully_replicated and len(array.devices()) == 4 for array in arrays)
    placed, scalar, table = engine.place([np.zeros((8, 3)), np.float32(1), np.zeros((5, 3))])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    assert scalar.is_fully_replicated
    assert table.is_fully_replicated
    assert engine.place([placed])[0] is placed


def test_a_batch_that_the_loader_overwrites_was_copied():
    for num_devices in (1, 4):
        engine = open_engine(num_devices)
        memory = np.zeros((64, 1024), np.float32)
        placed = engine.place([memory])[0]
        memory[:] = 1.0
        assert float(placed.sum()) == 0.0


def test_the_mesh_of_the_config_is_the_mesh_of_the_engine():
    engine = open_engine(4, mesh={"replica": 2, "data": 2})
    assert engine.plan.num_data_shards == 4
    assert engine.mesh.mesh.shape["replica"] == 2
    model = engine.prepare_model(Noisy(nnx.Rngs(0)))
    train(engine, model, engine.prepare_optimizer(optax.sgd(0.1), model), batches(1))


# -- programs of a bridge ----------------------------------------------------------------------------------------------------


class LinearSource:
    """What a bridge makes of a model: named host arrays, among them a 64-bit counter."""

    wants_64bit = True

    def read(self):
        return {"weight": np.arange(3, dtype=np.float32)}, {"seen": np.asarray(2**40, np.int64)}

    def specs(self):
        return self.read()

    def hints(self):
        return ModelHints()

    def attach(self, model):
        self.model = model


class LinearProgram:
    """mean over the batch of (x . weight - y)^2, with the gradient written out, as a captured program has it."""

    draws_randomly = True
    writes_params = False

    def __init__(self, model, with_grads, is_global, shard_call):
        self.prefix = model.name
        self.with_grads = with_grads
        self.is_global = is_global
        self.shard_call = shard_call
        self.grad_names = (f"{model.name}.weight",) if with_grads else ()
        self.output_axes = (0, None)

    def __call__(self, params, buffers, key, inputs, loss_scale):
        def replica(shard, x, y, weight):
            error = x @ weight - y
            noise = jax.random.uniform(jax.random.fold_in(key, shard), ())
            return (error**2).mean(), 2 * x.T @ error / len(y), error, y.astype(jnp.int64).sum(), noise

        weight = params[f"{self.prefix}.weight"]
        if self.is_global:
            run = self.shard_call(replica, [0, 0, None], ["mean", "mean", 0, "sum", None])
            loss, grad, error, total, _ = run(*inputs, weight)
        else:
            loss, grad, error, total, _ = replica(0, *inputs, weight)
        grads = {f"{self.prefix}.weight": grad if loss_scale is None else grad * loss_scale}
        seen = buffers[f"{self.prefix}.seen"] + 1
        return ProgramResult(loss, [error, total], grads if self.with_grads else {}, {f"{self.prefix}.seen": seen})


class LinearCall:
    wants_64bit = True
    draw = None
    input_axes = None

    def __init__(self, model, inputs, is_global):
        self.models = (model,)
        self.inputs = inputs
        self.is_global = is_global
        self.signature = ("linear", is_global)
        self.built = []

    def build(self, specs, *, with_grads, num_shards, shard_call):
        self.built.append((specs[0].shape, num_shards))
        return LinearProgram(self.models[0], with_grads, self.is_global, shard_call)

    def describe(self, inputs):
        return "linear", {"x": str(inputs[0].shape)}

    def finish(self, loss, outputs):
        return loss, outputs


class SgdSource:
    """What a bridge makes of an optimizer: a rule with a live hyperparameter."""

    def __init__(self, model):
        self.model = model
        self.lr = 0.5

    def names(self):
        return ("weight",)

    def init(self, params):
        return {"weight": {"step": jnp.zeros((), jnp.float32)}}

    def hyperparameters(self):
        return {"lr": np.float32(self.lr)}

    def signature(self):
        return "sgd"

    def update(self, params, grads, state, hyper):
        return (
            {name: value - hyper["lr"] * grads[name] for name, value in params.items()},
            {name: {"step": slots["step"] + 1} for name, slots in state.items()},
        )

    def attach(self, handle):
        self.handle = handle


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize(("num_devices", "partitioning"), [(1, "auto"), (4, "auto"), (4, "sharding")])
def test_a_bridges_program_runs_in_both_partitionings_with_64_bit_integers(num_devices, partitioning, is_global):
    engine = open_engine(num_devices, partitioning=partitioning)
    model = engine.prepare_model(LinearSource())
    source = SgdSource(model)
    optimizer = engine.prepare_optimizer(source, model)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)).astype(np.float32), rng.integers(2**40, 2**41, 8)
    call = LinearCall(model, [x, y], is_global)
    weight = np.arange(3, dtype=np.float32)
    loss, (error, total) = engine.backward(call, scale=0.5)
    expected = x @ weight - y
    replicas = num_devices if partitioning == "auto" else 1
    assert call.built == [((8 if is_global else 8 // replicas, 3), replicas)]
    assert error.shape == (8,)
    np.testing.assert_allclose(error, expected, rtol=1e-6)  # fp32
    assert total.dtype == np.int64
    assert int(total) == int(y.sum())  # exact beyond 32 bits
    assert float(loss) == pytest.approx((expected**2).mean(), rel=1e-5)
    grad = 2 * x.T @ expected / 8
    np.testing.assert_allclose(model.grads["weight"], grad * 0.5, rtol=1e-5)
    assert int(model.buffers["seen"]) == 2**40 + 1
    optimizer.step()
    np.testing.assert_allclose(model.params["weight"], weight - 0.5 * 0.5 * grad, rtol=1e-5)
    before = engine.num_compiles
    source.lr = 0.0
    engine.backward(LinearCall(model, [x, y], is_global), scale=0.5)
    unchanged = np.array(model.params["weight"])
    optimizer.step()
    np.testing.assert_array_equal(model.params["weight"], unchanged)
    assert engine.num_compiles == before  # the learning rate is an argument, not a constant


def test_a_bridge_says_which_dims_are_cut_over_the_shards():
    class Columns(LinearCall):
        input_axes = (1, None)  # x is (features, batch); y has the batch size in dim 0 and is the same for every shard

        def build(self, specs, *, with_grads, num_shards, shard_call):
            self.seen = [spec.shape for spec in specs]
            prefix = self.models[0].name

            def run(params, buffers, key, inputs, loss_scale):
                x, y = inputs
                grads = {f"{prefix}.weight": x.mean(1) * y.sum()}
                return ProgramResult((params[f"{prefix}.weight"] @ x).mean(), [x], grads, {})

            program = type("Program", (), {"__call__": lambda self, *args: run(*args)})()
            program.grad_names, program.output_axes, program.draws_randomly = (f"{prefix}.weight",), (1,), False
            return program

    engine = open_engine(4)
    model = engine.prepare_model(LinearSource())
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    call = Columns(model, [x, np.ones(8, np.float32)], False)
    loss, (output,) = engine.backward(call, scale=1.0)
    assert call.seen == [(3, 2), (8,)]
    np.testing.assert_array_equal(output, x)
    assert float(loss) == pytest.approx((np.arange(3) @ x).mean())
    np.testing.assert_allclose(model.grads["weight"], x.mean(1) * 8, rtol=1e-6)  # fp32


def test_a_forward_pass_and_the_backward_that_belongs_to_it_can_share_their_draw():
    seen = {}

    class Draw(LinearCall):
        def build(self, specs, *, with_grads, num_shards, shard_call):
            program = LinearProgram(self.models[0], with_grads, False, shard_call)

            def run(params, buffers, key, inputs, loss_scale):
                result = LinearProgram.__call__(program, params, buffers, key, inputs, loss_scale)
                result.outputs = [result.outputs[0], jax.random.uniform(key, ())]
                return result

            wrapped = type("Wrapped", (), {"__call__": lambda self, *args: run(*args)})()
            wrapped.grad_names, wrapped.output_axes, wrapped.draws_randomly = program.grad_names, (0, None), True
            return wrapped

    engine = open_engine()
    model = engine.prepare_model(LinearSource())
    inputs = [np.ones((2, 3), np.float32), np.ones(2, np.int64)]
    _, draw = engine.current_key()
    for name, run, number in (
        ("forward", engine.run_forward, draw),
        ("backward", lambda call: engine.backward(call, scale=1.0), draw),
        ("next", engine.run_forward, None),
    ):
        call = Draw(model, inputs, False)
        call.draw = number
        seen[name] = float(run(call)[1][1])
    assert seen["forward"] == seen["backward"] != seen["next"]
    assert engine.current_key()[1] == draw + 2


def test_values_of_another_shape_cannot_be_assigned():
    from polyaccel.errors import PrepareError

    model = open_engine().prepare_model(LinearSource())
    model.assign({"weight": np.ones(3), "seen": 7})
    assert model.buffers["seen"].dtype == np.int64
    with pytest.raises(PrepareError, match="shape"):
        model.assign({"weight": np.ones(4)})
    with pytest.raises(PrepareError, match="no parameter or buffer 'bias'"):
        model.assign({"bias": np.ones(4)})


def test_a_batch_that_does_not_divide_is_computed_whole_in_evaluation_and_refused_in_training():
    engine = open_engine(4)
    model = engine.prepare_model(LinearSource())
    inputs = [np.ones((6, 3), np.float32), np.ones(6, np.int64)]
    _, (error, _) = engine.run_forward(LinearCall(model, inputs, False))
    assert error.shape == (6,)
    with pytest.raises(PlanError, match="6 samples cannot be cut over 4"):
        engine.backward(LinearCall(model, inputs, False), scale=1.0)


def test_a_loop_that_never_waits_does_not_hang_on_virtual_devices():
    engine = open_engine(4, partitioning="pmap")
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    optimizer = engine.prepare_optimizer(optax.sgd(0.1), model)
    step = engine.train_step(StepSpec(cross_entropy, model, model, optimizer))
    batch = batches(1)[0]
    for _ in range(200):  # without pacing, 32 waiting programs stop each other for good
        loss = step(batch, True)
    assert np.isfinite(float(loss))
