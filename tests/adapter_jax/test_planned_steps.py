"""Steps that an engine plans without running them, held against what a real engine on the same devices keeps and counts."""

from __future__ import annotations

import gc
import weakref

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax_engines import Mlp, Noisy, batches, bound, cross_entropy, open_engine, train

from polyaccel.config.resolve import resolve
from polyaccel.errors import PlanError
from polyaccel.launch.rendezvous import Rendezvous
from polyaccel.planned.topologies import topology_named
from polyaccel_jax.backend import JaxBackend
from polyaccel_jax.engine import JaxEngine
from polyaccel_jax.planning import scripts
from polyaccel_jax.planning.arrays import PlannedArray
from polyaccel_jax.planning.planner import Planner, StepIsPlanned

FOUR = topology_named("cpu:4")


def planning_engine(**settings):
    planner = Planner(FOUR)
    config = resolve({"backend": "jax", "compilation_cache": "off", **settings}, {})
    return bound(JaxEngine(config, Rendezvous(), jax.devices()[:4], planner), config), planner


def planned(make=lambda: Mlp(nnx.Rngs(0)), *, form="fused", accumulation=1, loss_fn=cross_entropy, **settings):
    engine, planner = planning_engine(**settings)
    try:
        model = engine.prepare_model(engine.create_model(make))
        optimizer = engine.prepare_optimizer(optax.adamw(1e-3), model)
        with pytest.raises(StepIsPlanned):
            train(
                engine,
                model,
                optimizer,
                batches(8),
                form=form,
                max_grad_norm=1.0,
                accumulation=accumulation,
                loss_fn=loss_fn,
            )
    finally:
        planner.close()
    return planner.step_plan(engine.plan.mesh.sizes)


def on_first_device(arrays):
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)


@pytest.mark.parametrize("mesh", [{"data": 4}, {"fsdp": 4}, {"data": 2, "fsdp": 2}])
@pytest.mark.parametrize("partitioning", ["pmap", "sharding"])
def test_bytes_and_operations_are_those_of_a_real_engine(mesh, partitioning):
    plan = planned(mesh=mesh, partitioning=partitioning)
    engine = open_engine(4, mesh=mesh, partitioning=partitioning)
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    optimizer = engine.prepare_optimizer(optax.adamw(1e-3), model)
    handle = model._polyaccel_model
    assert plan.parameter_bytes == on_first_device(handle.leaves)
    assert plan.optimizer_bytes == on_first_device(optimizer._polyaccel_optimizer.leaves)
    assert plan.num_parameters == sum(leaf.size for leaf in handle.leaves)
    count = engine.count_flops()
    train(engine, model, optimizer, batches(1), max_grad_norm=1.0)
    assert plan.matrix_flops * 4 == count()


def test_parameters_in_parts_are_gathered_and_their_gradients_scattered():
    kinds = {one.kind: one for one in planned(mesh={"fsdp": 4}, partitioning="pmap").collectives}
    all_of_them = 4 * (8 * 16 + 16 + 16 * 4 + 4)
    assert kinds["all-gather"].bytes == all_of_them
    assert kinds["reduce-scatter"].bytes == all_of_them


def test_repeated_parameters_are_averaged_whole():
    (only,) = planned(mesh={"data": 4}, partitioning="pmap").collectives
    assert (only.kind, only.group_size) == ("all-reduce", 4)
    assert only.bytes == 4 * (8 * 16 + 16 + 16 * 4 + 4) + 4  # the gradients, and the loss


def test_a_step_in_pieces_counts_what_lies_beside_each_program():
    plan = planned(form="pieces", mesh={"data": 4})
    backward, clip, update = plan.programs
    assert backward.resident_bytes == plan.optimizer_bytes
    assert clip.resident_bytes == plan.parameter_bytes + plan.optimizer_bytes
    assert update.resident_bytes == 0
    assert plan.peak_bytes == max(one.peak_bytes for one in plan.programs)


def test_an_accumulated_step_counts_its_backward_once_for_every_micro_batch():
    plan = planned(form="pieces", accumulation=4, gradient_accumulation_steps=4)
    backward, *_ = plan.programs
    assert backward.runs == 4
    assert plan.matrix_flops == pytest.approx(4 * backward.matrix_flops)


def test_statistics_random_numbers_and_loss_scaling_are_planned_too():
    plan = planned(lambda: Noisy(nnx.Rngs(0)), mixed_precision="fp16", form="pieces")
    assert plan.buffer_bytes > 0
    assert plan.programs[-1].name.startswith("update")


def test_a_value_that_is_read_before_the_update_is_zero_and_noted():
    engine, planner = planning_engine()
    try:
        model = engine.prepare_model(engine.create_model(lambda: Mlp(nnx.Rngs(0))))
        engine.prepare_optimizer(optax.adamw(1e-3), model)
        (leaf, *_) = engine.place([np.ones((8, 4), np.float32)])
        assert isinstance(leaf, PlannedArray)
        assert engine.to_host(leaf).tolist() == np.zeros((8, 4)).tolist()
        assert "zeros" in planner.step_plan({}).remarks[0]
    finally:
        planner.close()


def test_no_array_of_a_planned_model_is_on_a_device():
    before = {id(array) for array in jax.live_arrays()}
    engine, planner = planning_engine(mesh={"fsdp": 4})
    try:
        model = engine.prepare_model(engine.create_model(lambda: nnx.Linear(4096, 4096, rngs=nnx.Rngs(0))))
        optimizer = engine.prepare_optimizer(optax.adamw(1e-3), model)
        made = [array for array in jax.live_arrays() if id(array) not in before]
        assert sum(array.nbytes for array in made) < 4096
        assert optimizer is not None
    finally:
        planner.close()


def test_a_script_that_never_updates_has_no_plan():
    with scripts.planning(FOUR) as session:
        pass
    with pytest.raises(PlanError, match="opened no jax engine"):
        session.step_plan()
    with scripts.planning(FOUR) as session:
        JaxBackend().open(resolve({"backend": "jax"}, {}), Rendezvous())
    with pytest.raises(PlanError, match="before its first update"):
        session.step_plan()
    assert scripts.active() is None


def test_a_planned_engine_is_freed():
    engine, planner = planning_engine()
    planner.close()
    gone = weakref.ref(engine)
    del engine, planner
    gc.collect()
    assert gone() is None


class Refused:
    """A jitted function that its compiler refuses."""

    def __init__(self, words):
        self.words = words

    def trace(self, *args):
        return self

    lower = trace

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.words)


def test_a_step_that_is_too_large_ends_with_the_compilers_reason():
    _, planner = planning_engine()
    words = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 70.72G of 15.75G hbm."
    with pytest.raises(StepIsPlanned):
        planner.planned(Refused(words))()
    plan = planner.step_plan({"data": 4})
    planner.close()
    assert plan.refusal == words
    assert plan.peak_bytes is None


def test_other_errors_of_a_compiler_are_errors():
    _, planner = planning_engine()
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        planner.planned(Refused("INTERNAL: this is a defect"))()
    planner.close()
