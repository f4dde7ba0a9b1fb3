"""Which process feeds which data shards, on meshes whose tensor axis lies within or over processes."""

from __future__ import annotations

import pytest

from polyaccel.config import Config
from polyaccel.errors import PlanError
from polyaccel.mesh import MeshSpec
from polyaccel.plan import make_plan
from polyaccel.topology import Topology

AXES = frozenset({"replica", "data", "fsdp", "tensor", "sequence"})


def feeding(mesh, num_processes, devices_per_process=1):
    """(first data shard, how many, processes per shard) of every process."""
    plans = [
        make_plan(
            Config(mesh=MeshSpec.of(mesh)),
            Topology(
                process_index=index,
                num_processes=num_processes,
                local_process_index=index,
                num_local_devices=devices_per_process,
                num_devices=num_processes * devices_per_process,
                device_kind="cpu",
            ),
            backend="any",
            mesh_axes=AXES,
            mixed_precision=frozenset({"no"}),
            features=frozenset({"ddp", "autocast_cache", "process_group"}),
        )
        for index in range(num_processes)
    ]
    return [(plan.first_data_shard, plan.num_local_data_shards, plan.num_processes_per_shard) for plan in plans]


def test_every_process_feeds_its_own_shards_where_axes_only_split_the_batch():
    assert feeding({"data": 2, "fsdp": 2}, 4) == [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1)]
    assert feeding({"data": 2, "fsdp": 4}, 2, 4) == [(0, 4, 1), (4, 4, 1)]


def test_processes_of_one_tensor_group_feed_the_same_shard():
    assert feeding({"fsdp": 2, "tensor": 2}, 4) == [(0, 1, 2), (0, 1, 2), (1, 1, 2), (1, 1, 2)]
    assert feeding({"data": 1, "tensor": 4}, 4) == [(0, 1, 4)] * 4
    assert feeding({"data": 2, "tensor": 2, "sequence": 2}, 8) == [(0, 1, 4)] * 4 + [(1, 1, 4)] * 4


def test_a_process_whose_devices_are_a_tensor_group_feeds_one_shard():
    assert feeding({"data": 2, "tensor": 4}, 2, 4) == [(0, 1, 1), (1, 1, 1)]
    assert feeding({"data": 2, "tensor": 4}, 4, 2) == [(0, 1, 2), (0, 1, 2), (1, 1, 2), (1, 1, 2)]


def test_a_process_between_two_shards_is_refused():
    with pytest.raises(PlanError, match="3 data shards cannot be fed by 2 processes"):
        feeding({"data": 3, "tensor": 2}, 2, 3)
