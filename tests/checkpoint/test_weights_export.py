"""Weights for other libraries: which files, which arrays in them, and what stays of older ones."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from saving import cut, whole

from polyaccel.checkpoint import export
from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard

EMBED = np.arange(40, dtype=np.float32).reshape(10, 4)
HEAD = np.arange(8, dtype=np.float32).reshape(2, 4)
BITS = np.array([1, 2, 3, 65535], np.uint16)


def pieces() -> list[Shard]:
    return [whole("embed", EMBED), whole("scale", BITS, "bfloat16"), whole("head", HEAD), whole("steps", np.array(7))]


def write(folder: Path, shards: list[Shard] | None = None, size: int | str = "10GB") -> None:
    export.export_weights(
        pieces() if shards is None else shards,
        folder,
        max_shard_size=size,
        metadata={"format": "pt"},
        gather=lambda value: [value],
        process_index=0,
    )


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_one_file_holds_every_array_under_its_name(tmp_path: Path) -> None:
    write(tmp_path)
    assert names(tmp_path) == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(file.get_tensor("embed"), EMBED)
        np.testing.assert_array_equal(file.get_tensor("steps"), np.array(7))
        assert file.get_slice("scale").get_dtype() == "BF16"


def test_a_limit_cuts_the_weights_into_files_with_an_index(tmp_path: Path) -> None:
    write(tmp_path, size=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 160 + 8 + 32 + 8}
    assert index["weight_map"] == {
        "embed": "model-00001-of-00002.safetensors",  # above the limit: alone
        "scale": "model-00002-of-00002.safetensors",
        "head": "model-00002-of-00002.safetensors",
        "steps": "model-00002-of-00002.safetensors",
    }
    assert names(tmp_path) == [*sorted(set(index["weight_map"].values())), "model.safetensors.index.json"]
    np.testing.assert_array_equal(load_file(tmp_path / "model-00001-of-00002.safetensors")["embed"], EMBED)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("10GB", 10 * 10**9), ("1GiB", 2**30), ("500 MB", 500 * 10**6), ("1.5kb", 1500), ("7B", 7), (123, 123)],
)
def test_sizes_are_read_as_accelerate_reads_them(size: int | str, expected: int) -> None:
    assert export.parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "ten GB", "0GB", 0, -1, True, None, "10XB"])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(CheckpointError, match="max_shard_size"):
        export.parse_size(size)


def test_weights_replace_those_of_a_larger_model_and_leave_other_files_alone(tmp_path: Path) -> None:
    write(tmp_path, size=40)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".model-00001-of-00009.safetensors.saving").write_text("of a save that was cut off")
    write(tmp_path)
    assert names(tmp_path) == ["config.json", "model.safetensors"]


def test_nothing_changes_where_the_weights_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.LocalFolder, "write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, [whole("embed", EMBED + 1)])
    assert names(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_pieces_of_several_processes_become_whole_arrays_of_process_0(tmp_path: Path) -> None:
    halves = {
        0: [whole("head", HEAD), cut("embed", EMBED, [slice(0, 5), slice(0, 4)])],
        1: [cut("embed", EMBED, [slice(5, 10), slice(0, 4)]), whole("scale", BITS, "bfloat16")],
    }
    run_processes(tmp_path, halves)
    found = load_file(tmp_path / "model-00002-of-00003.safetensors")
    np.testing.assert_array_equal(found["embed"], EMBED)
    with safe_open(tmp_path / "model-00003-of-00003.safetensors", "np") as file:
        assert file.get_slice("scale").get_dtype() == "BF16"


def test_every_process_hears_that_process_0_could_not_write(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    halves = {0: [whole("head", HEAD)], 1: [whole("embed", EMBED)]}
    failures = run_processes(tmp_path / "taken", halves, fails=True)
    assert len(failures) == 2
    assert all("taken" in str(failure) for failure in failures)


def test_missing_elements_are_noticed_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="20 of 40 elements are missing"):
        write(tmp_path / "new", [cut("embed", EMBED, [slice(0, 5), slice(0, 4)])])
    assert not (tmp_path / "new").exists()


def test_a_dtype_that_safetensors_has_not_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'packed' has dtype int4"):
        write(tmp_path, [whole("packed", np.zeros(4, np.uint8), "int4")])


def test_save_writes_a_dict_of_arrays(tmp_path: Path) -> None:
    export.save_arrays({"embed": EMBED}, tmp_path / "embed.safetensors")
    export.save_arrays({"head": HEAD}, tmp_path / "embed.safetensors")
    assert names(tmp_path) == ["embed.safetensors"]
    np.testing.assert_array_equal(load_file(tmp_path / "embed.safetensors")["head"], HEAD)


@pytest.mark.parametrize(
    ("value", "file", "words"),
    [
        ({"a": EMBED}, "weights.pt", "named like a pickled file"),
        ([EMBED], "weights.safetensors", "not a list"),
        ({"a": {"b": EMBED}}, "weights.safetensors", "'a' is a dict"),
        ({"a": 3}, "weights.safetensors", "'a' is a int"),
        ({"a": EMBED}, "missing/weights.safetensors", "cannot be written"),
    ],
)
def test_save_refuses_what_is_no_dict_of_arrays(tmp_path: Path, value: Any, file: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        export.save_arrays(value, tmp_path / file)
    assert names(tmp_path) == []


def test_pickled_weights_are_refused() -> None:
    with pytest.raises(CheckpointError, match="run code when they are loaded"):
        export.require_safe(False)


def run_processes(folder: Path, shards: dict[int, list[Shard]], *, fails: bool = False) -> list[BaseException]:
    """Export from processes that are threads; returns what was raised."""
    barrier = threading.Barrier(len(shards), timeout=10)
    given: dict[int, Any] = {}
    failures: list[BaseException] = []

    def run(index: int) -> None:
        def gather(value: Any) -> list[Any]:
            given[index] = value
            barrier.wait()
            values = [given[process] for process in sorted(given)]
            barrier.wait()
            return values

        try:
            export.export_weights(
                shards[index], folder, max_shard_size=40, metadata={}, gather=gather, process_index=index
            )
        except CheckpointError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert fails or not failures, failures
    return failures
