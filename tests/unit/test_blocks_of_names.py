"""Blocks of a model, from the names of its parameters."""

from __future__ import annotations

from polyaccel.sharding.blocks import blocks_of_names


def test_items_of_the_outermost_lists_are_blocks():
    names = [
        "wte.weight",
        *(f"encoder.{i}.mlp.experts.{j}.up.weight" for i in range(2) for j in range(2)),
        *(f"decoder.layers.{i}.attn.weight" for i in range(3)),
        "head.weight",
    ]
    assert blocks_of_names(names) == ("encoder.0", "encoder.1", *(f"decoder.layers.{i}" for i in range(3)))


def test_layers_without_parts_are_no_blocks():
    assert blocks_of_names(["0.weight", "2.weight", "fc1.weight", "fc2.weight"]) == ()
    assert blocks_of_names(["h.0.fc.weight", "head.weight"]) == ()  # one alone repeats nothing


def test_numbered_names_are_blocks_where_there_are_no_lists():
    assert blocks_of_names(["Block_0.Dense_0.kernel", "Block_1.Dense_0.kernel"]) == ("Block_0", "Block_1")
    stages = ["layer1.0.conv.weight", "layer1.1.conv.weight", "layer2.0.conv.weight", "layer2.1.conv.weight"]
    assert blocks_of_names(stages) == ("layer1.0", "layer1.1", "layer2.0", "layer2.1")
    assert blocks_of_names(["student.fc.weight", "teacher.fc.weight"]) == ()
