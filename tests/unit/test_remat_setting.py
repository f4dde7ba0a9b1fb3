"""`remat`: a setting of every engine that can compute the inside of blocks again, refused by name by the others."""

from __future__ import annotations

import pytest

from polyaccel.config.resolve import resolve
from polyaccel.errors import ConfigError, UnsupportedError
from polyaccel.plan import Plan, make_plan
from polyaccel.topology import Topology


def plan_of(config, features=()) -> Plan:
    return make_plan(
        config,
        Topology(
            process_index=0,
            num_processes=1,
            local_process_index=0,
            num_local_devices=1,
            num_devices=1,
            device_kind="cpu",
        ),
        backend="fake",
        mesh_axes=frozenset({"data"}),
        mixed_precision=frozenset({"no"}),
        features=frozenset(features),
    )


def test_nothing_is_computed_again_by_default():
    assert plan_of(resolve({})).remat == "none"


def test_an_engine_with_the_feature_is_told_what_to_compute_again():
    assert plan_of(resolve({"remat": "dots"}), ["remat"]).remat == "dots"


def test_an_engine_without_it_refuses_the_setting_by_its_name():
    with pytest.raises(UnsupportedError, match=r"remat='full' \(argument remat\) is not supported by backend 'fake'"):
        plan_of(resolve({"remat": "full"}))


def test_other_words_are_refused():
    with pytest.raises(ConfigError, match="remat='all' is unknown"):
        resolve({"remat": "all"})
