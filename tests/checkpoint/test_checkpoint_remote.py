"""Checkpoints on a URL: fsspec's memory and local storages stand for the remote ones; the manifest, written last, commits."""

import subprocess
import sys

import fsspec
import numpy as np
import pytest
from saving import bits, contents, given, holds, save, save_together, whole

from polyaccel.checkpoint import (
    Contents,
    begin_checkpoint,
    enforce_limit,
    folder_holder,
    lock_folder,
    newest_checkpoint,
    next_number,
    open_checkpoint,
    sweep,
    write,
)
from polyaccel.errors import CheckpointError


@pytest.fixture(params=["memory", "local"])
def url(request, tmp_path):
    if request.param == "local":
        yield f"local://{tmp_path}/run"
        return
    yield f"memory://{tmp_path.name}/run"
    storage = fsspec.filesystem("memory")
    if storage.exists(f"/{tmp_path.name}"):
        storage.rm(f"/{tmp_path.name}", recursive=True)


def names(url):
    storage, path = fsspec.core.url_to_fs(url)
    return sorted(found.removeprefix(path).lstrip("/") for found in storage.find(path))


def test_arrays_and_values_come_back_as_they_were(url):
    assert save(f"{url}/checkpoint_0", contents(3)) == f"{url}/checkpoint_0"
    assert holds(f"{url}/checkpoint_0", contents(3))
    assert names(url) == [
        f"checkpoint_0/{name}" for name in ("manifest.json", "model.safetensors", "optimizer.safetensors")
    ]


def test_an_array_larger_than_a_request_is_cut_and_joined(url):
    large = Contents({"model": [whole("w", np.arange(3_000_001, dtype=np.float32)), whole("b", np.ones(3, np.int8))]})
    save(f"{url}/checkpoint_0", large)
    assert bits(open_checkpoint(f"{url}/checkpoint_0")) == given(large)


def test_several_processes_write_one(url):
    shares = [
        Contents({"model": [whole("a", np.ones(2))]}),
        Contents({"model": [whole("b", np.zeros(2))]}, own={"rank": 1}),
    ]
    assert save_together(f"{url}/checkpoint_0", shares) == [f"{url}/checkpoint_0"] * 2
    saved = open_checkpoint(f"{url}/checkpoint_0")
    assert (set(saved.arrays("model")), saved.own(1)) == ({"a", "b"}, {"rank": 1})
    assert not any("part" in name for name in names(url))


def test_the_manifest_is_written_last(url, monkeypatch):
    from polyaccel.checkpoint.remote import RemoteFolder

    order = []
    real = RemoteFolder.write
    monkeypatch.setattr(RemoteFolder, "write", lambda self, name, data: order.append(name) or real(self, name, data))
    save(f"{url}/checkpoint_0")
    assert order == ["model.safetensors", "optimizer.safetensors", "manifest.json"]


def test_without_its_manifest_nothing_is_chosen_and_the_sweep_takes_it(url):
    save(f"{url}/checkpoint_0", contents(0))
    save(f"{url}/checkpoint_1", contents(1))
    storage, path = fsspec.core.url_to_fs(f"{url}/checkpoint_1/manifest.json")
    storage.rm_file(path)
    saved, passed_over = newest_checkpoint(url)
    assert saved.shared["step"] == 0
    assert [(path, "it has no manifest.json" in why) for path, why in passed_over] == [(f"{url}/checkpoint_1", True)]
    assert next_number(url) == 2
    assert sweep(url) == ["checkpoint_1"]
    assert all(name.startswith("checkpoint_0/") for name in names(url))
    save(f"{url}/checkpoint_1", contents(1))


def test_a_complete_one_is_never_overwritten(url):
    save(f"{url}/checkpoint_0", contents(1))
    for replace in (False, True):
        with pytest.raises(CheckpointError, match="exists already, and a URL cannot be replaced in one step"):
            begin_checkpoint(f"{url}/checkpoint_0", replace=replace)
    assert holds(f"{url}/checkpoint_0", contents(1))


def test_a_failed_attempt_leaves_nothing(url, monkeypatch):
    save(f"{url}/checkpoint_0", contents(0))
    monkeypatch.setattr(
        write, "encode_manifest", lambda manifest: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(CheckpointError, match="checkpoint_1 was not written: No space left on device"):
        save(f"{url}/checkpoint_1", contents(1))
    assert all(name.startswith("checkpoint_0/") for name in names(url))
    assert holds(f"{url}/checkpoint_0", contents(0))


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_a_flipped_bit_and_a_foreign_or_missing_file_are_found(url, name):
    save(f"{url}/checkpoint_0")
    storage, path = fsspec.core.url_to_fs(f"{url}/checkpoint_0")
    data = storage.cat_file(f"{path}/{name}")
    storage.pipe_file(f"{path}/{name}", data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(f"{url}/checkpoint_0")
    storage.pipe_file(f"{path}/{name}", data[:-1])
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(f"{url}/checkpoint_0")
    storage.rm_file(f"{path}/{name}")
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(f"{url}/checkpoint_0")
    storage.pipe_file(f"{path}/{name}", data)
    storage.pipe_file(f"{path}/more.pkl", b"x")
    with pytest.raises(CheckpointError, match=r"more\.pkl is a file that does not belong"):
        open_checkpoint(f"{url}/checkpoint_0")


def test_the_limit_keeps_the_newest(url):
    for number in range(4):
        save(f"{url}/checkpoint_{number}", contents(number))
    assert enforce_limit(url, 2) == ["checkpoint_1", "checkpoint_0"]
    assert newest_checkpoint(url)[0].shared["step"] == 3
    assert {name.split("/")[0] for name in names(url)} == {"checkpoint_2", "checkpoint_3"}


def test_a_url_has_no_lock(url):
    with lock_folder(url), lock_folder(url):
        assert folder_holder(url) is None


def test_a_scheme_that_nothing_understands_is_named():
    with pytest.raises(CheckpointError, match="'nosuch://bucket/x' cannot be opened"):
        open_checkpoint("nosuch://bucket/x")


def test_fsspec_is_imported_for_a_url_alone_and_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    save(tmp_path / "one")
    save(f"file://{tmp_path}/two")  # a path: renamed and synced as every path
    assert holds(tmp_path / "two", contents())
    with pytest.raises(CheckpointError, match=r"(?s)fsspec is not installed.*pip install 'polyaccel\[remote\]'"):
        save("memory://x/one")


def test_importing_checkpoints_imports_none_of_what_it_may_need():
    heavy = ("numpy", "fsspec", "xxhash", "safetensors", "torch")
    script = f"import sys, polyaccel.checkpoint; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
