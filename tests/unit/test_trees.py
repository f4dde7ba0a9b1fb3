"""Nested batches are rebuilt as what they were."""

import collections
import dataclasses

from polyaccel import trees

Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Batch:
    ids: int
    labels: list


class Encoding(collections.UserDict):
    """Like a tokenizer's result: a mapping with state beside its items."""

    def __init__(self, data, encodings=None):
        super().__init__(data)
        self.encodings = encodings


def test_containers_keep_their_type_and_order():
    tree = {"b": [1, (2, 3)], "a": Point(4, Batch(5, [6])), "n": {}}
    leaves, structure = trees.flatten(tree)
    assert leaves == [1, 2, 3, 4, 5, 6]
    assert structure.unflatten(leaves) == tree
    assert list(structure.unflatten(leaves)) == ["b", "a", "n"]
    assert trees.map_leaves(lambda leaf: leaf * 10, tree)["a"] == Point(40, Batch(50, [60]))


def test_a_mapping_with_state_keeps_it_and_the_original_is_not_changed():
    original = Encoding({"ids": 1}, encodings="kept")
    mapped = trees.map_leaves(lambda leaf: leaf + 1, original)
    assert type(mapped) is Encoding
    assert mapped["ids"] == 2
    assert mapped.encodings == "kept"
    assert original["ids"] == 1


def test_structures_of_equal_shape_are_equal_and_hashable():
    one, two = trees.flatten({"a": [1, 2]})[1], trees.flatten({"a": [3, 4]})[1]
    assert one == two
    assert hash(one) == hash(two)
    assert one != trees.flatten({"a": (1, 2)})[1]


def test_none_and_strings_are_leaves():
    assert trees.flatten([None, "text"])[0] == [None, "text"]
