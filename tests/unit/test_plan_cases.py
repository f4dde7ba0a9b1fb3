"""Which steps one `polyaccel plan` compiles."""

from __future__ import annotations

import pytest

from polyaccel.cli.plan_cases import Case, arguments_of, axes_of, meshes, scaled
from polyaccel.errors import ConfigError
from polyaccel.planned.topologies import topology_named

ONE_EACH = {"replica": 1, "data": -1, "fsdp": 1, "tensor": 1, "sequence": 1}


def test_a_search_tries_every_way_of_sharing_the_devices_and_the_one_that_cuts_least_first():
    found = [(mesh["data"], mesh["fsdp"]) for mesh in meshes(ONE_EACH, ("data", "fsdp"), 8)]
    assert found == [(8, 1), (4, 2), (2, 4), (1, 8)]


def test_layers_are_cut_after_parameters_are():
    found = [(mesh["fsdp"], mesh["tensor"]) for mesh in meshes({**ONE_EACH, "data": 1}, ("fsdp", "tensor"), 4)]
    assert found == [(4, 1), (2, 2), (1, 4)]


def test_axes_that_are_not_searched_keep_their_sizes():
    found = meshes({**ONE_EACH, "tensor": 2}, ("data", "fsdp"), 8)
    assert [(mesh["data"], mesh["fsdp"], mesh["tensor"]) for mesh in found] == [(4, 1, 2), (2, 2, 2), (1, 4, 2)]
    with pytest.raises(ConfigError, match="does not divide 8"):
        meshes({**ONE_EACH, "tensor": 3}, ("data", "fsdp"), 8)


def test_an_axis_that_is_none_or_that_the_engine_lacks_is_named():
    assert axes_of("data,tensor", {"data", "tensor"}) == ("data", "tensor")
    with pytest.raises(ConfigError, match="'tenso' is no axis"):
        axes_of("tenso", {"data", "tensor"})
    with pytest.raises(ConfigError, match="does not shard over 'sequence'"):
        axes_of("data,sequence", {"data", "tensor"})


def test_scales_and_values_are_lists():
    topology = topology_named("v5e:4x4")
    assert [one.text for one in scaled(topology, "16,256")] == ["v5e:4x4", "v5e:16x16"]
    assert [one.text for one in scaled(topology_named("v5p:2x2x2"), "128")] == ["v5p:4x4x8"]
    with pytest.raises(ConfigError, match="no list of numbers"):
        scaled(topology, "16,all")
    assert arguments_of("batch-size=1,2") == [("--batch-size", "1"), ("--batch-size", "2")]
    assert Case(topology, {"data": 2, "fsdp": 8}, ("--batch-size", "4")).variant == "data=2 fsdp=8 --batch-size 4"
