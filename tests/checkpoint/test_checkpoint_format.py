"""What goes in comes out bit by bit, the files are those of the real safetensors library, and the manifest says what is there."""

import json
import math
import tracemalloc
from collections import Counter, OrderedDict

import numpy as np
import pytest
import xxhash
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from safetensors import safe_open
from saving import bits, contents, cut, given, holds, listing, save, save_together, whole

from polyaccel.checkpoint import Contents, open_checkpoint
from polyaccel.checkpoint.dtypes import STORED
from polyaccel.checkpoint.values import pack, unpack
from polyaccel.errors import CheckpointError


def test_arrays_and_values_come_back_as_they_were(tmp_path):
    save(tmp_path / "one", contents(3), facts={"step": 3})
    saved = open_checkpoint(tmp_path / "one")
    assert bits(saved) == given(contents(3))
    assert saved.groups == ("model", "optimizer", "custom_0")
    assert saved.arrays("model")["layer.bias"] == ("bfloat16", (5,))
    assert saved.shared == contents(3).shared
    assert saved.own(0) == contents(3).own
    assert saved.facts == {"step": 3}


def test_a_checkpoint_is_data_files_and_one_manifest(tmp_path):
    save(tmp_path / "one")
    assert listing(tmp_path) == {"one", "one/manifest.json", "one/model.safetensors", "one/optimizer.safetensors"}


def test_the_safetensors_library_reads_the_files(tmp_path):
    weights = {
        "w": np.arange(12, dtype=np.float64).reshape(3, 4),
        "odd": np.arange(3, dtype=np.int8),
        "h": np.linspace(0, 1, 7, dtype=np.float16),
        "flag": np.array([True, False]),
        "z": np.array([1 + 2j], np.complex64),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        'ünïcode " name': np.ones(1, np.uint32),
    }
    save(tmp_path / "one", Contents({"model": [whole(name, array) for name, array in weights.items()]}))
    with safe_open(tmp_path / "one" / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(weights)
        for name, array in weights.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)
            assert file.get_tensor(name).dtype == array.dtype


def test_every_array_is_aligned_to_its_element_size(tmp_path):
    save(
        tmp_path / "one",
        Contents(
            {"model": [whole("b", np.ones(3, np.int8)), whole("a", np.ones(3)), whole("c", np.ones(1, np.float16))]}
        ),
    )
    data = (tmp_path / "one" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"F64": 8, "F16": 2, "I8": 1}
    assert all((8 + length + header[name]["data_offsets"][0]) % sizes[header[name]["dtype"]] == 0 for name in "abc")


@pytest.mark.parametrize("dtype", sorted(STORED))
def test_every_dtype_comes_back_bit_by_bit(tmp_path, dtype):
    numpy_dtype = np.dtype(STORED[dtype].numpy)  # of its bits, where numpy has no such dtype
    raw = np.random.default_rng(0).integers(0, 256, 24 * numpy_dtype.itemsize, dtype=np.uint8)
    array = (raw % 2 if dtype == "bool" else raw).view(numpy_dtype).reshape(2, 3, 4)
    save(tmp_path / "one", Contents({"model": [whole("w", array, dtype)]}))
    saved = open_checkpoint(tmp_path / "one")
    (shard,) = saved.shards("model")
    assert (shard.dtype, shard.data.shape, shard.data.tobytes()) == (dtype, (2, 3, 4), array.tobytes())
    shard.data[...] = 0  # its memory is the reader's own


@pytest.mark.parametrize("dtype", sorted(name for name, stored in STORED.items() if stored.numpy[1:] in ("u1", "u2")))
def test_bits_and_arrays_of_ml_dtypes_are_the_same_file(tmp_path, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="jax brings it")
    array = np.array([1, 0, 1], getattr(ml_dtypes, dtype, None) or dtype)
    save(tmp_path / "a", Contents({"model": [whole("w", array)]}))
    save(tmp_path / "b", Contents({"model": [whole("w", array.view(STORED[dtype].numpy), dtype)]}))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_views_and_big_endian_arrays_are_stored_by_value(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    save(
        tmp_path / "one",
        Contents({"model": [whole("t", base.T), whole("s", base[::2, 1::2]), whole("e", base.astype(">f4"))]}),
    )
    found = {shard.name: shard.data for shard in open_checkpoint(tmp_path / "one").shards("model")}
    np.testing.assert_array_equal(found["t"], base.T)
    np.testing.assert_array_equal(found["s"], base[::2, 1::2])
    np.testing.assert_array_equal(found["e"], base)


def test_only_the_named_arrays_are_read(tmp_path):
    save(tmp_path / "one")
    saved = open_checkpoint(tmp_path / "one")
    assert [shard.name for shard in saved.shards("model", ["mask", "layer.bias"])] == ["layer.bias", "mask"]
    with pytest.raises(CheckpointError, match=r"no array 'layer\.wait'"):
        saved.shards("model", ["layer.wait"])
    with pytest.raises(CheckpointError, match="no group 'ema'"):
        saved.shards("ema")


def test_the_manifest_lists_size_and_checksum_of_every_file(tmp_path):
    save(tmp_path / "one")
    manifest = json.loads((tmp_path / "one/manifest.json").read_text())
    for name, facts in manifest["files"].items():
        data = (tmp_path / "one" / name).read_bytes()
        assert facts == {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    assert manifest["format"] == "polyaccel checkpoint"
    assert manifest["groups"]["optimizer"]["layer.weight.exp_avg"] == {
        "dtype": "float32",
        "shape": [4, 3],
        "pieces": [{"file": "optimizer.safetensors", "key": "layer.weight.exp_avg", "offset": [0, 0], "shape": [4, 3]}],
    }


def test_an_array_whose_name_looks_like_a_piece_or_like_metadata_is_kept_apart(tmp_path):
    two = np.arange(4.0)
    pieces = [cut("w", two, [slice(0, 2)]), cut("w", two, [slice(2, 4)])]
    names = [whole("w@0", np.zeros(1)), whole("w@2", np.ones(1)), whole("__metadata__", np.full(1, 7.0))]
    save(tmp_path / "one", Contents({"model": [*pieces, *names]}))
    found = bits(open_checkpoint(tmp_path / "one"))["model"]
    assert {name: np.frombuffer(data).tolist() for name, (_, _, data) in found.items()} == {
        "w": [0, 1, 2, 3],
        "w@0": [0],
        "w@2": [1],
        "__metadata__": [7],
    }


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"Model": []}, "cannot be called 'Model'"),
        ({"../model": []}, "cannot be called"),
        ({"a.00001-of-00002": []}, "cannot be called"),
    ],
)
def test_a_group_that_cannot_be_a_file_is_refused(groups, message):
    with pytest.raises(CheckpointError, match=message):
        Contents(groups)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([whole("w", np.zeros(2, np.complex128))], "'w' has dtype complex128, which checkpoints cannot hold"),
        ([whole("w", np.zeros(2, np.float32), "float64")], "said to be float64, and its data is float32"),
        (
            [whole("w", np.zeros(2)), whole("w", np.zeros(3))],
            "'w' is float64 of shape \\[2\\] in one piece and .* \\[3\\] in another",
        ),
        ([whole("w", np.zeros(2)), whole("w", np.zeros(2))], "'w': pieces overlap"),
        ([cut("w", np.zeros(4), [slice(0, 3)])], "'w': 1 of 4 elements are missing"),
    ],
)
def test_arrays_that_could_not_be_read_back_are_refused_and_nothing_stays(tmp_path, shards, message):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "one", Contents({"model": shards}))
    assert listing(tmp_path) == set()


def test_neither_writing_nor_reading_copies_what_is_large(tmp_path):
    size = 48 * 2**20
    what = Contents({"model": [whole("w", np.zeros((size // 8, 8), np.uint8)), whole("small", np.zeros(3))]})
    tracemalloc.start()  # numpy tells it of every array
    try:
        save(tmp_path / "one", what)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        saved = open_checkpoint(tmp_path / "one")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        assert sum(shard.data.nbytes for shard in saved.shards("model")) == size + 24
        assert tracemalloc.get_traced_memory()[1] < size + 8 * 2**20
    finally:
        tracemalloc.stop()


# -- values ----------------------------------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.tuples(st.integers()), inner, max_size=4)
        | st.sets(st.integers() | st.text(max_size=3), max_size=4)
        | st.frozensets(st.binary(max_size=3), max_size=4)
        | st.dictionaries(st.text(max_size=2), st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=12,
)


def told(value):
    """A text that differs for -0.0, NaN, True and 1, a tuple and a list, the order of a dict; not for the order of a set."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__} {sorted(map(told, value))}"
    if isinstance(value, dict):
        return f"{type(value).__name__} {[(told(key), told(item)) for key, item in value.items()]}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} {[told(item) for item in value]}"
    return repr(value)


@for_all(PLAIN)
@settings(max_examples=200, deadline=None)
def test_plain_values_survive_json_exactly(value):
    assert told(unpack(json.loads(json.dumps(pack(value, "value"), allow_nan=False)))) == told(value)


def test_scalars_of_numpy_and_ordered_dicts_become_plain():
    value = OrderedDict(lr=np.float64(0.1), step=np.int32(7), on=np.bool_(True), low=np.float32(0.1))
    back = unpack(json.loads(json.dumps(pack(value, "value"))))
    assert back == {"lr": 0.1, "step": 7, "on": True, "low": float(np.float32(0.1))}
    assert [type(item) for item in back.values()] == [float, int, bool, float]


class Settings:
    pass


@pytest.mark.parametrize("value", [Settings(), Settings, len, np.zeros(2), math, {"deep": [1, (Settings(),)]}, 1j])
def test_what_is_no_plain_value_is_refused_by_its_place(value):
    with pytest.raises(CheckpointError, match=r"^shared\.thing.*neither a plain value nor an array"):
        pack({"thing": value}, "shared")


def test_values_nested_without_end_are_refused(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="nested more than 100 deep"):
        save(tmp_path / "one", Contents(shared={"loop": loop}))
    deep = 0
    for _ in range(99):
        deep = (deep,)
    save(tmp_path / "two", Contents(shared={"deep": deep}))
    assert open_checkpoint(tmp_path / "two").shared == {"deep": deep}


# -- several processes -------------------------------------------------------------------------------------------------------------


def test_pieces_of_four_processes_become_one_checkpoint(tmp_path):
    array = np.arange(48, dtype=np.float32).reshape(6, 8)
    boxes = [[slice(r, r + 3), slice(c, c + 4)] for r in (0, 3) for c in (0, 4)]
    shares = [Contents({"model": [cut("w", array, box)]}, {"step": i}, {"rank": i}) for i, box in enumerate(boxes)]
    shares[1].groups["model"].append(whole("bias", np.ones(3)))
    assert save_together(tmp_path / "one", shares) == [str(tmp_path / "one")] * 4
    saved = open_checkpoint(tmp_path / "one")
    assert bits(saved)["model"]["w"] == ("float32", (6, 8), array.tobytes())
    assert [saved.own(index) for index in range(4)] == [{"rank": index} for index in range(4)]
    assert saved.shared == {"step": 0}
    assert listing(tmp_path / "one") == {"manifest.json", *(f"model.0000{i}-of-00004.safetensors" for i in range(1, 5))}
    with pytest.raises(CheckpointError, match="no values of process 4: 4 processes wrote it"):
        saved.own(4)


def test_a_group_that_one_of_several_processes_holds_is_one_file(tmp_path):
    shares = [Contents({"model": [whole("w", np.ones(3))]}), Contents({"model": []})]
    save_together(tmp_path / "one", shares)
    assert listing(tmp_path / "one") == {"manifest.json", "model.safetensors"}
    assert holds(tmp_path / "one", Contents({"model": [whole("w", np.ones(3))]}))
