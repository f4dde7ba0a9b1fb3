"""Sizes of modules, and the devices that are inferred from them. The expected maps are those of Accelerate 1.15."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from big_networks import Net, TiedNet, three_nets
from torch import nn

from polyaccel import infer_auto_device_map, init_empty_weights
from polyaccel.big_models import compute_module_sizes, get_balanced_memory
from polyaccel.errors import ConfigError


def test_sizes_count_every_module_and_its_parents() -> None:
    sizes = compute_module_sizes(Net())
    assert sizes[""] == 236
    assert (sizes["linear1"], sizes["batchnorm"], sizes["linear2"]) == (64, 72, 100)
    assert sizes["linear1.weight"] == 48


def test_sizes_in_another_dtype_leave_integers_as_they_are() -> None:
    sizes = compute_module_sizes(Net(), dtype="float16")
    assert sizes["batchnorm"] == 4 * 4 * 2 + 8
    assert compute_module_sizes(Net(), dtype=torch.float64)["linear1"] == 128
    assert compute_module_sizes(Net(), dtype="float16", special_dtypes={"linear1.bias": torch.float32})["linear1"] == 40
    assert compute_module_sizes(Net(), buffers_only=True)[""] == 40


def test_a_tied_parameter_counts_once_and_an_empty_model_like_a_real_one() -> None:
    with init_empty_weights():
        empty = TiedNet()
    assert compute_module_sizes(empty) == compute_module_sizes(TiedNet())
    assert compute_module_sizes(empty)[""] == 11 * 8 * 4 + (8 * 8 + 8) * 4 + 8 * 4


def test_the_first_device_keeps_room_for_the_largest_layer_that_follows() -> None:
    split = {"linear1": 0, "batchnorm": 1, "linear2": 1}
    assert infer_auto_device_map(Net(), max_memory={0: 200, 1: 200}) == split
    assert infer_auto_device_map(Net(), max_memory={0: 200, 1: 172, 2: 200}) == split


def test_tied_modules_that_fit_together_make_one_entry() -> None:
    model = Net()
    model.linear1.weight = model.linear2.weight
    assert infer_auto_device_map(model, max_memory={0: 200, 1: 200}) == {"": 0}


def test_models_are_split_at_layers_and_never_inside_a_class_that_stays_whole() -> None:
    model = nn.Sequential(Net(), Net(), Net())
    memory = {0: 500, 1: 500}
    split = {"0": 0, "1.linear1": 0, "1.batchnorm": 0, "1.linear2": 1, "2": 1}
    assert infer_auto_device_map(model, max_memory=memory) == split
    for whole in ("Net", ["Net"], {"Net"}):
        assert infer_auto_device_map(model, memory, whole) == {"0": 0, "1": 1, "2": 1}
    assert infer_auto_device_map(model, memory, "Net", clean_result=False) == {"0": 0, "1": 1, "2": 1}


def test_a_parameter_that_is_shared_goes_to_one_device_with_all_its_modules() -> None:
    model = three_nets()
    model.layer3.linear2.weight = model.layer1.linear2.weight
    memory = {0: 400, 1: 500}
    assert infer_auto_device_map(model, max_memory=memory) == {
        "layer1": 0,
        "layer3.linear2": 0,
        "layer2": 1,
        "layer3.linear1": 1,
        "layer3.batchnorm": 1,
    }
    model.layer2.linear2.weight = model.layer1.linear2.weight
    model.layer2.linear1.weight = model.layer1.linear1.weight
    assert infer_auto_device_map(model, max_memory=memory) == {
        "layer1": 0,
        "layer2.linear1": 0,
        "layer2.linear2": 0,
        "layer3.linear2": 0,
        "layer2.batchnorm": 1,
        "layer3.linear1": 1,
        "layer3.batchnorm": 1,
    }


def test_a_parameter_shared_with_a_child_of_its_own_module_is_placed() -> None:
    model = nn.Sequential(nn.Linear(3, 8))
    model[0].child = nn.Module()
    model[0].child.weight = model[0].weight
    placed = infer_auto_device_map(model, max_memory={0: 4, "cpu": 96000})
    assert set(placed.values()) == {"cpu"}


def test_what_fits_nowhere_goes_to_disk_and_sizes_may_be_written_out() -> None:
    assert infer_auto_device_map(Net(), max_memory={"cpu": 0}) == {"": "disk"}
    assert infer_auto_device_map(Net(), max_memory={"cpu": "1KB"}) == {"": "cpu"}
    assert infer_auto_device_map(Net(), max_memory={0: "1KiB", "cpu": "1MB"}) == {"": 0}


def test_every_buffer_of_a_module_that_is_split_has_a_device() -> None:
    """Accelerate leaves out the buffers of a module that it splits, and then refuses its own map."""
    model = Net()
    model.register_buffer("table", torch.zeros(4))
    wrapped = nn.Sequential(model)
    placed = infer_auto_device_map(wrapped, max_memory={0: 200, 1: 200, "cpu": 1000})
    assert "0.table" in placed


def test_a_smaller_module_fills_a_device_that_would_stay_empty(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 4), nn.Linear(4, 8)))
    with caplog.at_level(logging.INFO):
        assert infer_auto_device_map(model, max_memory={0: 256}) == {"": "disk"}
    assert "insufficient memory" in caplog.text
    assert "0: 336 bytes" in caplog.text
    placed = infer_auto_device_map(model, max_memory={0: 256}, fallback_allocation=True)
    assert placed == {"0.0": "disk", "0.1": 0, "0.2": "disk"}


def test_a_smaller_part_of_a_later_module_may_fill_the_device() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Sequential(nn.Linear(20, 20), nn.Linear(2, 2)))
    placed = infer_auto_device_map(model, max_memory={0: 1800}, fallback_allocation=True)
    assert placed == {"0": "disk", "1.0": "disk", "1.1": 0}


def test_buffers_that_stay_on_the_accelerator_and_do_not_fit_are_announced() -> None:
    model = Net()
    for module, size in ((model.linear1, 20), (model.batchnorm, 30), (model.linear2, 30)):
        module.register_buffer("table", torch.zeros(size))
    expected = {"linear1": 0, "batchnorm": "cpu", "linear2": "cpu"}
    with pytest.warns(UserWarning, match="offload_buffers"):
        assert infer_auto_device_map(model, max_memory={0: 400, "cpu": "1GB"}) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert infer_auto_device_map(model, max_memory={0: 400, "cpu": "1GB"}, offload_buffers=True) == expected


def test_verbose_prints_the_decisions(capsys: pytest.CaptureFixture[str]) -> None:
    infer_auto_device_map(Net(), max_memory={0: 200, 1: 200}, verbose=True)
    printed = capsys.readouterr().out
    assert "linear1 (64 bytes) goes to 0" in printed
    assert "batchnorm (72 bytes) does not fit on 0" in printed


def test_balanced_memory_gives_each_accelerator_its_part_and_the_last_one_everything() -> None:
    model = Net()
    assert get_balanced_memory(model, max_memory={0: 200, 1: 200}) == {0: 200, 1: 200}
    assert get_balanced_memory(model, max_memory={0: 300, 1: 500}) == {0: 215, 1: 500}
    assert get_balanced_memory(model, max_memory={0: 300, "cpu": 1000}) == {0: 300, "cpu": 1000}
    assert get_balanced_memory(model, max_memory={0: 0, 1: 300, 2: 300}) == {0: 0, 1: 215, 2: 300}
    assert get_balanced_memory(model, max_memory={0: 0, "cpu": 100}) == {0: 0, "cpu": 100}


def test_balanced_memory_can_spare_device_zero() -> None:
    spared = get_balanced_memory(three_nets(), max_memory={0: 900, 1: 900, 2: 900}, low_zero=True)
    assert spared[0] == 0
    assert spared[2] == 900
    assert 708 // 2 < spared[1] < 900


def test_balanced_memory_keeps_room_for_a_class_that_stays_whole() -> None:
    loose = get_balanced_memory(three_nets(), max_memory={0: 900, 1: 900})
    whole = get_balanced_memory(three_nets(), max_memory={0: 900, 1: 900}, no_split_module_classes={"Net"})
    assert whole[0] == 708 // 2 + int(1.25 * 236) > loose[0]


@pytest.mark.parametrize(
    ("memory", "named"), [({"tpu": 5}, "tpu"), ({0: "many"}, "many"), ({0: -1}, "-1"), ({0: "5GiBs"}, "5GiBs")]
)
def test_memory_that_makes_no_sense_is_named(memory: dict[object, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        infer_auto_device_map(Net(), max_memory=memory)


def test_free_memory_is_found_where_none_is_given() -> None:
    assert set(infer_auto_device_map(Net()).values()) <= {0, "cpu", "mps"}
