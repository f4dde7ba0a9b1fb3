"""Somebody wrote this checkpoint on purpose: its checksums are right, and what it says must still not lead anywhere."""

import json
import os
import random
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from saving import bits, contents, save, whole

from polyaccel.checkpoint import Contents, open_checkpoint
from polyaccel.checkpoint.names import is_safe
from polyaccel.checkpoint.pieces import why_not_whole
from polyaccel.errors import CheckpointError


def sealed(body: str) -> bytes:
    """A manifest of this text, opening brace left out, with the checksum that belongs to it."""
    text = body.encode("utf-8", "surrogatepass")
    return b'{"checksum": "xxh3_128:' + xxhash.xxh3_128_hexdigest(text).encode() + b'",\n' + text


def rewrite(checkpoint, fields) -> None:
    (checkpoint / "manifest.json").write_bytes(sealed(json.dumps(fields)[1:]))


def fields_of(checkpoint):
    fields = json.loads((checkpoint / "manifest.json").read_text())
    del fields["checksum"]
    return fields


def reseal(checkpoint, name, data) -> None:
    """Replace a file, and let the manifest say that this is how it was written."""
    (checkpoint / name).write_bytes(data)
    fields = fields_of(checkpoint)
    fields["files"][name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    rewrite(checkpoint, fields)


@pytest.fixture
def checkpoint(tmp_path):
    save(tmp_path / "one", contents(1))
    return tmp_path / "one"


def test_the_rewritten_manifest_of_these_tests_is_read(checkpoint):
    rewrite(checkpoint, fields_of(checkpoint))
    assert open_checkpoint(checkpoint).shared == contents(1).shared


def array(fields, **changes):
    fields["groups"]["model"]["layer.weight"].update(changes)


def piece(fields, **changes):
    fields["groups"]["model"]["layer.weight"]["pieces"][0].update(changes)


def twice(fields):
    pieces = fields["groups"]["model"]["layer.weight"]["pieces"]
    pieces.append(pieces[0])


def moved(name):
    def edit(fields):
        fields["files"][name] = fields["files"].pop("model.safetensors")
        for one in fields["groups"]["model"].values():
            for part in one["pieces"]:
                part["file"] = name

    return edit


DEEP = "[" * 200_000
HOSTILE = {
    **{
        f"file {name!r}": moved(name)
        for name in (
            "../outside.safetensors", "/etc/passwd", "a/../../b", "model.safetensors\0", "mod\nel", "..", ".", "", "a//b", "./x",
            "C:\\x", "x" * 300, "manifest.json", "part-00000.json", "model.00001-of-2.safetensors/..",
        )
    },
    "a file that is not there": moved("ema.safetensors"),
    "no files": lambda f: f.update(files={}),
    "1 GB claimed for a file": lambda f: f["files"]["model.safetensors"].update(bytes=2**30),
    "a negative size": lambda f: f["files"]["model.safetensors"].update(bytes=-1),
    "a size that is a truth value": lambda f: f["files"]["model.safetensors"].update(bytes=True),
    "a size beyond every disk": lambda f: f["files"]["model.safetensors"].update(bytes=2**200),
    "a checksum that is none": lambda f: f["files"]["model.safetensors"].update(xxh3_128="0"),
    "a group with a path": lambda f: f["groups"].update({"../x": {}}),
    "a huge shape": lambda f: array(f, shape=[2**61, 4]),
    "a shape that overflows to the right size": lambda f: array(f, shape=[2**62 + 4, 3]),
    "a shape whose product overflows": lambda f: array(f, shape=[2**40, 2**40]),
    "a huge shape without elements": lambda f: array(f, shape=[0, 2**61, 2**61], pieces=[]),
    "a negative dim": lambda f: array(f, shape=[-4, -3]),
    "a fractional dim": lambda f: array(f, shape=[4.0, 3]),
    "1000 dims": lambda f: array(f, shape=[1] * 1000, pieces=[]),
    "an unknown dtype": lambda f: array(f, dtype="object"),
    "another dtype of the same size": lambda f: array(f, dtype="int32"),
    "a wider dtype": lambda f: array(f, dtype="float64"),
    "no pieces": lambda f: array(f, pieces=[]),
    "the same piece twice": twice,
    "a piece outside": lambda f: piece(f, offset=[1, 0]),
    "a piece at a negative place": lambda f: piece(f, offset=[-1, 0]),
    "a piece of other dims": lambda f: piece(f, offset=[0], shape=[12]),
    "a piece too small": lambda f: piece(f, shape=[4, 2]),
    "a piece that is another array's": lambda f: piece(f, key="mask"),
    "a piece that is in another file": lambda f: piece(f, file="optimizer.safetensors"),
    "a key that is not there": lambda f: piece(f, key="nothing at all"),
    "an array that nobody claims": lambda f: f["groups"]["model"].pop("mask"),
    "a future version": lambda f: f.update(version=2),
    "a version that is a truth value": lambda f: f.update(version=True),
    "a number of processes that is a truth value": lambda f: f.update(num_processes=True),
    "another format": lambda f: f.update(format="something"),
    "an unknown field": lambda f: f.update(extra=1),
    "a missing field": lambda f: f.pop("shared"),
    "values that are a list": lambda f: f.update(shared=[]),
    "an unknown tag": lambda f: f.update(shared={"x": {"$object": "os.system"}}),
    "a tag beside names": lambda f: f.update(shared={"x": {"$tuple": [], "y": 1}}),
    "a float that is code": lambda f: f.update(shared={"x": {"$float": "__import__('os')"}}),
    "bytes that are no base64": lambda f: f.update(shared={"x": {"$bytes": "%"}}),
    "an int that is none": lambda f: f.update(shared={"x": {"$int": "zz"}}),
    "a key that cannot be one": lambda f: f.update(shared={"x": {"$dict": [[[], 1]]}}),
    "a key twice": lambda f: f.update(shared={"x": {"$dict": [[1, 1], [1, 2]]}}),
    "a set of lists": lambda f: f.update(shared={"x": {"$set": [[]]}}),
    "values of too few processes": lambda f: f.update(num_processes=2),
    "no process": lambda f: f.update(num_processes=0, own=[]),
    "a billion processes": lambda f: f.update(num_processes=10**9),
    "a creation time that is text": lambda f: f.update(created="today"),
    "an attempt that is a path": lambda f: f.update(attempt="../../../../x"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_refused(checkpoint, what):
    fields = fields_of(checkpoint)
    HOSTILE[what](fields)
    rewrite(checkpoint, fields)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            open_checkpoint(checkpoint, verify=False)  # the checksums are right
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        '"shared": ' + "[" * 200_000 + "]" * 200_000 + "}",
        '"shared": ' + '{"a":' * 200_000,
        '"version": 1, "version": 1}',
        '"created": NaN}',
        '"created": 1e999}',
        '"created": ' + "9" * 10_000 + "}",
        '"format": "\ud800"}',
        "[]",
        "",
        "}",
        '"a": 1} trailing',
        "\0",
    ],
    ids=[
        "deep lists",
        "deep objects",
        "name twice",
        "NaN",
        "overflow",
        "long number",
        "surrogate",
        "list",
        "nothing",
        "empty",
        "tail",
        "NUL",
    ],
)
def test_text_that_no_checkpoint_writes_is_refused(checkpoint, text):
    (checkpoint / "manifest.json").write_bytes(sealed(text))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        open_checkpoint(checkpoint)


def test_a_file_outside_is_not_even_opened(checkpoint, monkeypatch):
    outside = checkpoint.parent / "outside.safetensors"
    os.rename(checkpoint / "model.safetensors", outside)
    fields = fields_of(checkpoint)
    moved("../outside.safetensors")(fields)
    rewrite(checkpoint, fields)
    opened = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **options: opened.append(str(path)) or real(path, *rest, **options)
    )
    with pytest.raises(CheckpointError, match="cannot be a file of"):
        open_checkpoint(checkpoint)
    assert opened == [str(checkpoint), "manifest.json"]


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "..", "", "a//b", "a/./b", "a/../b", "x\0", "x\n", "a\\b", "x" * 300, "a/" * 600 + "a", "\x7f"],
)
def test_a_name_that_could_lead_elsewhere_is_no_name(checkpoint, name):
    assert not is_safe(name)
    fields = fields_of(checkpoint)
    fields["files"][name] = {"bytes": 0, "xxh3_128": "0" * 32}
    rewrite(checkpoint, fields)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: .* cannot be a file of a checkpoint"):
        open_checkpoint(checkpoint)


def test_a_field_that_stands_there_twice_is_refused_though_the_last_one_is_right(checkpoint):
    text = (checkpoint / "manifest.json").read_text().partition("\n")[2]
    (checkpoint / "manifest.json").write_bytes(sealed('"format": "another",\n' + text))
    with pytest.raises(CheckpointError, match="the name 'format' stands there twice"):
        open_checkpoint(checkpoint)


HEADERS = {
    "a header longer than the file": lambda h, d: (2**63).to_bytes(8, "little") + b"{}" + d,
    "a header of 1 GB": lambda h, d: (2**30).to_bytes(8, "little") + json.dumps(h).encode() + d,
    "no header": lambda h, d: b"\1\0",
    "a header that is a list": lambda h, d: file_of("[]", d),
    "a header that is deep": lambda h, d: file_of(DEEP, d),
    "a name twice": lambda h, d: file_of('{"mask": 1, "mask": 2}', d),
    "an offset behind the end": lambda h, d: file_of(h | {"mask": h["mask"] | {"data_offsets": [10**6, 10**6 + 4]}}, d),
    "offsets that overlap": lambda h, d: file_of(h | {"mask": h["mask"] | {"data_offsets": [0, 4]}}, d),
    "offsets that are reversed": lambda h, d: file_of(h | {"mask": h["mask"] | {"data_offsets": [4, 0]}}, d),
    "offsets that overflow": lambda h, d: file_of(h | {"mask": h["mask"] | {"data_offsets": [2**64 - 4, 2**64]}}, d),
    "a gap": lambda h, d: file_of(h, d + b"\0"),
    "too few bytes": lambda h, d: file_of(h, d[:-1]),
    "an unknown dtype": lambda h, d: file_of(h | {"mask": h["mask"] | {"dtype": "F4"}}, d),
    "a huge shape": lambda h, d: file_of(h | {"mask": h["mask"] | {"shape": [2**61, 2**61]}}, d),
    "another shape of the same size": lambda h, d: file_of(h | {"mask": h["mask"] | {"shape": [4]}}, d),
    "a missing array": lambda h, d: file_of({k: v for k, v in h.items() if k != "nothing"}, d),
    "one array more": lambda h, d: file_of(h | {"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, d),
    "a truth value that is neither": lambda h, d: file_of(h, with_byte(d, h["mask"]["data_offsets"][0], 7)),
}  # fmt: skip


def with_byte(data: bytes, position: int, value: int) -> bytes:
    return data[:position] + bytes([value]) + data[position + 1 :]


def file_of(header, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("what", HEADERS)
def test_a_hostile_data_file_is_refused(checkpoint, what):
    data = (checkpoint / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    reseal(checkpoint, "model.safetensors", HEADERS[what](json.loads(data[8 : 8 + length]), data[8 + length :]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        list(open_checkpoint(checkpoint).shards("model"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def edited(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = edited(copy[path[0]], path[1:], value)
    return copy


@given(data=st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_whatever_stands_anywhere_in_a_manifest_gives_an_error_or_the_same_arrays(checkpoint, data):
    if not (checkpoint.parent / "fields").exists():
        (checkpoint.parent / "fields").write_text(json.dumps(fields_of(checkpoint)))
    fields = json.loads((checkpoint.parent / "fields").read_text())
    expected = bits_expected()
    path = data.draw(st.sampled_from([path for path in places(fields) if path]))
    rewrite(checkpoint, edited(fields, path, data.draw(JSON)))
    try:
        found = bits(open_checkpoint(checkpoint))
    except CheckpointError:
        return
    # A name or a value may be another one; what is stored under the names that are still there is not.
    for group, arrays in found.items():
        for name, stored in arrays.items():
            assert expected.get(group, {}).get(name, stored) == stored


def bits_expected():
    what = contents(1)
    return {
        group: {shard.name: (shard.dtype, shard.global_shape, shard.data.tobytes()) for shard in shards}
        for group, shards in what.groups.items()
    }


# -- pieces ------------------------------------------------------------------------------------------------------------------------


@st.composite
def tilings(draw):
    """An array cut by a random mesh: every dim into chunks of its own."""
    shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=3))
    boxes = [((), ())]
    for length in shape:
        cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=3))})
        spans = list(pairwise(cuts))
        boxes = [((*offset, a), (*size, b - a)) for offset, size in boxes for a, b in spans]
    return tuple(shape), draw(st.permutations(boxes))


@given(tilings(), st.data())
@settings(max_examples=200, deadline=None)
def test_a_cut_array_is_whole_and_with_one_piece_moved_it_is_not(tiling, data):
    shape, boxes = tiling
    assert why_not_whole(shape, boxes) is None
    assert why_not_whole(shape, boxes[1:]) is not None
    assert why_not_whole(shape, [*boxes, boxes[0]]) is not None
    index = data.draw(st.integers(0, len(boxes) - 1))
    offset, size = boxes[index]
    other = tuple(data.draw(st.integers(0, whole - length)) for whole, length in zip(shape, size))
    if other != offset:
        assert why_not_whole(shape, [*boxes[:index], (other, size), *boxes[index + 1 :]]) == "pieces overlap"


@given(
    st.lists(
        st.tuples(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.tuples(st.integers(0, 4), st.integers(0, 4))),
        max_size=6,
    )
)
@example([((0, 0), (4, 4)), ((1, 0), (4, 0))])
@example([((0, 0), (4, 4)), ((1, 1), (3, 0)), ((1, 1), (0, 2))])
@settings(max_examples=300, deadline=None)
def test_boxes_are_whole_exactly_if_they_lie_inside_and_cover_every_element_once(boxes):
    count = np.zeros((8, 8), int)
    for (row, column), (height, width) in boxes:
        count[row : row + height, column : column + width] += 1
    # A piece of no elements must lie inside too.
    are_inside = all(row + height <= 4 and column + width <= 4 for (row, column), (height, width) in boxes)
    is_exact = are_inside and bool((count[:4, :4] == 1).all())
    assert (why_not_whole((4, 4), boxes) is None) == is_exact


def test_a_pinwheel_that_no_straight_cut_separates_is_whole():
    boxes = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert why_not_whole((3, 3), boxes) is None


def test_very_many_pieces_are_judged_in_bounded_time(tmp_path):
    side = 300
    boxes = [((r, c), (1, 1)) for r in range(side) for c in range(side)]
    random.Random(0).shuffle(boxes)
    assert why_not_whole((side, side), boxes) is None
    boxes[0] = boxes[1]
    assert why_not_whole((side, side), boxes) == "pieces overlap"
    spiral = [
        ((i, j), (1, side - i)) if k else ((i, j), (side - j, 1)) for i in range(side) for j in (i,) for k in (0, 1)
    ]
    assert why_not_whole((side, side), spiral) is not None
    save(tmp_path / "many", Contents({"model": [whole(str(i), np.zeros(1, np.int8)) for i in range(2000)]}))
    assert len(open_checkpoint(tmp_path / "many").arrays("model")) == 2000
