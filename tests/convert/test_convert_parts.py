"""What conversions are made of: names in trees, pickles read as data, arrays behind files, and flags of the command."""

from __future__ import annotations

import argparse
import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyaccel.checkpoint.convert import convert, detect
from polyaccel.checkpoint.formats import trees
from polyaccel.checkpoint.formats.bundle import Choices
from polyaccel.cli import checkpoint_convert
from polyaccel.errors import CheckpointError, UnsupportedError
from polyaccel.registry import load_tree_files
from polyaccel.stored import Spool, StoredArray
from polyaccel_torch.files.pickled_data import Pickled, read_pickle
from polyaccel_torch.files.torch_file import TorchFiles

PARAMETERS = {"head.kernel", "head.bias", "layers.0.kernel"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("head.kernel.0/mu", ("0", "mu", "head", "kernel")),
        ("layers.0.kernel.exp_avg", ("exp_avg", "layers", "0", "kernel")),
        ("0/count", ("0", "count")),
    ],
)
def test_an_optimizer_s_arrays_have_one_place_in_a_tree(name: str, path: tuple[str, ...]) -> None:
    assert trees.optimizer_path(name, PARAMETERS) == path
    assert trees.optimizer_name(path, PARAMETERS) == name


def array(value: Any) -> StoredArray:
    data = np.asarray(value)
    return StoredArray(data.dtype.name, data.shape, lambda: data)


def test_a_name_that_would_come_back_as_another_is_refused() -> None:
    # In a tree, this counter and the count of a parameter called `count` would be the same.
    parameters = {"count"}
    places = {"0/count": trees.optimizer_path("0/count", parameters)}
    back = {path: trees.optimizer_name(path, parameters) for path in places.values()}
    with pytest.raises(CheckpointError, match=r"would come back from this format as 'count\.0'"):
        trees.rename({"0/count": array(1)}, places, back)
    with pytest.raises(CheckpointError, match="are both arrays"):
        trees.nested({("a",): array(1), ("a", "b"): array(2)})


def test_usual_names_are_found_and_others_can_be_given() -> None:
    tree = {"state": {"params": {"w": array(1)}}, "opt_state": [{"mu": array(2)}], "params": {"w": array(3)}}
    assert trees.locate(tree, Choices(), "there") == {"model": ("params",), "optimizer": ("opt_state",)}
    places = {"model": ("state", "params"), "optimizer": ("opt_state", "0")}
    assert trees.locate(tree, Choices(places=places), "there") == places
    with pytest.raises(CheckpointError, match=r"there has nothing at 'x\.y', where --map puts model"):
        trees.locate(tree, Choices(places={"model": ("x", "y")}), "there")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickled_data_reads_what_pickle_writes(protocol: int) -> None:
    shared = [1, "two"]
    value = {
        "numbers": [0, 255, 65536, -1, 2**40, 1.5, True, None],
        "texts": ("", "ü", b"bytes", "x" * 300),
        3: {"shared": [shared, shared], ("a", 1): ()},
    }
    assert read_pickle(pickle.dumps(value, protocol)) == value
    many = {f"key{number}": number for number in range(3000)}
    assert read_pickle(pickle.dumps(many, protocol)) == many


def test_pickled_data_calls_and_imports_nothing(tmp_path: Path) -> None:
    found = read_pickle(pickle.dumps(collections.Counter("aab")))
    assert isinstance(found, Pickled)
    assert (found.name, found.arguments) == ("collections.Counter", ({"a": 2, "b": 1},))
    unknown = pickle.dumps(tmp_path).replace(b"pathlib", b"no_such")
    assert read_pickle(unknown).name == "no_such.PosixPath"
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickle(b"\x80\x04K\x01K\x02R.")  # calls a number
    with pytest.raises(CheckpointError, match="PERSID"):
        read_pickle(b"Pid\n.")


def test_spooled_arrays_are_mapped_and_leave_nothing(tmp_path: Path) -> None:
    values = [np.arange(5, dtype=np.float64), np.zeros((0, 2)), np.arange(6, dtype=np.uint8).reshape(2, 3).T]
    with Spool(tmp_path) as spool:
        kept = [spool.keep(value) for value in values]
        assert isinstance(kept[0], np.memmap)
        assert spool.keep(kept[0]) is kept[0]
    assert list(tmp_path.iterdir()) == []
    for value, mapped in zip(values, kept, strict=True):
        np.testing.assert_array_equal(mapped, value)


def test_torch_files_hold_plain_containers_and_tensors(tmp_path: Path) -> None:
    tree = {
        "bits": torch.tensor([1.5, float("nan")]).bfloat16(),
        "small": torch.ones(3).to(torch.float8_e4m3fn),
        "milestones": collections.Counter({2: 1}),
        "nested": [(1, None, "x"), {3: True}, 0.1, b"raw"],
    }
    torch.save(tree, tmp_path / "theirs.pt")
    read = TorchFiles().read(tmp_path / "theirs.pt")
    assert (read["bits"].dtype, read["small"].dtype) == ("bfloat16", "float8_e4m3fn")
    TorchFiles().write(tmp_path / "ours.pt", read)
    back = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert torch.equal(back["bits"].view(torch.uint16), tree["bits"].view(torch.uint16))
    assert torch.equal(back["small"].view(torch.uint8), tree["small"].view(torch.uint8))
    assert type(back["milestones"]) is collections.Counter
    assert (back["milestones"], back["nested"]) == (tree["milestones"], tree["nested"])
    with pytest.raises(CheckpointError, match=r"x\.pt: a is a builtins\.object, which is no plain data"):
        TorchFiles().write(tmp_path / "x.pt", {"a": object()})
    torch.save(torch.eye(3).to_sparse(), tmp_path / "sparse.pt")
    with pytest.raises(CheckpointError, match="sparse or quantized"):
        TorchFiles().read(tmp_path / "sparse.pt")


def test_flags_say_where_things_are(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    checkpoint_convert.add_arguments(parser)
    (tmp_path / "names.json").write_text('{"optimizer_1": ["a", "b"]}')
    flags = ["x", "y", "--to", "dcp", "--map", "model=app.model", "--map", "optimizer=", "--skip", "sampler.bin"]
    choices = checkpoint_convert.choices_of(
        parser.parse_args([*flags, "--parameter-names", str(tmp_path / "names.json")])
    )
    assert choices == Choices(
        skip=frozenset({"sampler.bin"}),
        parameter_names={"optimizer_1": ("a", "b")},
        places={"model": ("app", "model"), "optimizer": ()},
    )
    with pytest.raises(CheckpointError, match="names no group and path"):
        checkpoint_convert.choices_of(parser.parse_args(["x", "y", "--to", "dcp", "--map", "model"]))
    (tmp_path / "names.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="neither a list of names"):
        checkpoint_convert.read_names(tmp_path / "names.json")


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no"):
        detect(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="in none of the formats that are known"):
        detect(tmp_path)
    with pytest.raises(CheckpointError, match="did you mean 'orbax'"):
        convert(tmp_path, tmp_path / "new", "orbx")
    with pytest.raises(CheckpointError, match="only local folders are converted"):
        convert("memory://run/checkpoint_1", tmp_path / "new", "orbax")
    with pytest.raises(UnsupportedError, match="nothing that is installed reads or writes the files of zarr"):
        load_tree_files("zarr")
