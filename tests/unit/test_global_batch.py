"""`micro_batches_per_update`: the global batch of a job that is resumed on fewer or more devices."""

import pytest

from polyaccel.config.resolve import resolve
from polyaccel.errors import PlanError
from polyaccel.plan import make_plan
from polyaccel.schedules import steps_per_update
from polyaccel.topology import Topology


def plan_of(num_devices, arguments=None, **environment):
    config = resolve(arguments or {}, {"POLYACCEL_CONFIG_FILE": "off", **environment})
    topology = Topology(0, 1, 0, num_devices, num_devices, "cpu")
    axes = frozenset({"data", "fsdp", "tensor"})
    plan = make_plan(
        config, topology, backend="some", mesh_axes=axes, mixed_precision=frozenset({"no"}), features=frozenset()
    )
    return config, plan, topology


@pytest.mark.parametrize(("num_devices", "steps"), [(1, 8), (2, 4), (8, 1)])
def test_fewer_data_shards_accumulate_more_batches(num_devices, steps):
    config, plan, topology = plan_of(num_devices, POLYACCEL_MICRO_BATCHES_PER_UPDATE="8")
    assert plan.gradient_accumulation_steps == steps
    assert plan.remarks == ()
    assert steps_per_update(config, plan, topology, is_first=False) == 8, "a schedule by samples moves as far as before"


def test_devices_that_share_a_batch_are_one_data_shard():
    _, plan, _ = plan_of(4, POLYACCEL_MICRO_BATCHES_PER_UPDATE="4", POLYACCEL_MESH__TENSOR="2")
    assert (plan.num_data_shards, plan.gradient_accumulation_steps) == (2, 2)


def test_a_global_batch_that_cannot_be_kept_is_refused_by_name():
    with pytest.raises(PlanError, match=r"micro_batches_per_update=4 \(.*\) cannot be kept on 3 data shards") as caught:
        plan_of(3, POLYACCEL_MICRO_BATCHES_PER_UPDATE="4")
    assert "divides 4" in caught.value.hint
    with pytest.raises(PlanError, match="split_batches"):
        plan_of(2, {"split_batches": True}, POLYACCEL_MICRO_BATCHES_PER_UPDATE="4")


def test_a_script_that_says_otherwise_is_told():
    _, plan, _ = plan_of(2, {"gradient_accumulation_steps": 1}, POLYACCEL_MICRO_BATCHES_PER_UPDATE="4")
    assert plan.gradient_accumulation_steps == 2
    assert (
        "gradient_accumulation_steps=1 (argument gradient_accumulation_steps) is 2 on 2 data shards" in plan.remarks[0]
    )
    assert plan_of(2, {"gradient_accumulation_steps": 2}, POLYACCEL_MICRO_BATCHES_PER_UPDATE="4")[1].remarks == ()
