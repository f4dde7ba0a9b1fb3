"""A flipped bit, a truncated, missing, exchanged or foreign file, wherever it is, is found before any array is handed out."""

import errno
import os
import pickle
import random
import shutil

import numpy as np
import pytest
from saving import contents, holds, listing, save, whole

from polyaccel.checkpoint import Contents, open_checkpoint
from polyaccel.checkpoint.documents import Malformed
from polyaccel.checkpoint.local import LocalFolder
from polyaccel.checkpoint.manifest import decode_manifest
from polyaccel.errors import CheckpointError

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "unet/weights.bin")


@pytest.fixture
def checkpoint(tmp_path):
    """One with a file that a hook has added in a folder of its own."""
    from polyaccel.checkpoint import begin_checkpoint, work_folder, write_checkpoint

    target = tmp_path / "checkpoint_0"
    attempt = begin_checkpoint(target)
    added = os.path.join(work_folder(target, attempt), "unet")
    os.mkdir(added)
    with open(os.path.join(added, "weights.bin"), "wb") as file:
        file.write(bytes(range(40)))
    write_checkpoint(target, contents(1), attempt=attempt, process_index=0, num_processes=1, facts={})
    assert listing(target) == {*FILES, "unet"}
    assert holds(target, contents(1))
    return target


@pytest.mark.parametrize("name", FILES)
def test_a_bit_flipped_in_any_byte_of_any_file_is_found(checkpoint, name):
    data = (checkpoint / name).read_bytes()
    rng = random.Random(0)
    # The manifest is the longest, and test_every_single_bit_of_the_manifest_counts leaves out nothing of it.
    for position in range(0, len(data), 5 if name == "manifest.json" else 1):
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.randrange(8)
        (checkpoint / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(checkpoint)
    (checkpoint / name).write_bytes(data)
    assert holds(checkpoint, contents(1))


def test_every_single_bit_of_the_manifest_counts(checkpoint):
    data = (checkpoint / "manifest.json").read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(Malformed):
                decode_manifest(bytes(damaged))


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_or_continued_anywhere_is_found(checkpoint, name):
    data = (checkpoint / name).read_bytes()
    for length in {*range(0, len(data), 37), len(data) - 1}:
        (checkpoint / name).write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(checkpoint)
    for more in (b"\0", b" ", b"\n", data):
        (checkpoint / name).write_bytes(data + more)
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(checkpoint)
    if name != "manifest.json":
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            open_checkpoint(checkpoint, verify=False)


@pytest.mark.parametrize("name", FILES)
def test_the_file_of_another_checkpoint_is_found(checkpoint, name):
    save(checkpoint.with_name("checkpoint_1"), contents(2))
    other = checkpoint.with_name("checkpoint_1") / name
    if not other.exists():
        other = checkpoint.with_name("checkpoint_1") / "model.safetensors"
    shutil.copy(other, checkpoint / name)
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "name", ["extra.safetensors", "random_states_0.pkl", "part-00001.json", "unet/more.bin", "deep/er/x"]
)
def test_a_file_that_does_not_belong_is_found(checkpoint, name):
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    (checkpoint / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{name} is a file that does not belong to this checkpoint"):
        open_checkpoint(checkpoint, verify=False)


@pytest.mark.parametrize("name", ["model.safetensors", "unet/weights.bin", "manifest.json"])
@pytest.mark.parametrize("kind", ["link to the same bytes", "link to a folder", "pipe", "folder"])
def test_what_is_no_plain_file_is_refused(checkpoint, name, kind):
    place = checkpoint / name
    data = place.read_bytes()
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)  # opening it to read would wait for a writer
    elif kind == "folder":
        place.mkdir()
    elif kind == "link to a folder":
        place.symlink_to(checkpoint.parent)
    else:
        (checkpoint.parent / "elsewhere").write_bytes(data)
        place.symlink_to(checkpoint.parent / "elsewhere")
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint)


def test_a_folder_that_is_a_link_is_not_entered(checkpoint):
    os.rename(checkpoint / "unet", checkpoint.parent / "unet")
    (checkpoint / "unet").symlink_to(checkpoint.parent / "unet")
    with pytest.raises(CheckpointError, match="unet"):
        open_checkpoint(checkpoint)
    with pytest.raises(OSError, match="Not a directory"):
        LocalFolder(checkpoint).open("unet/weights.bin")


def test_without_verification_sizes_and_headers_are_still_checked(checkpoint):
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert open_checkpoint(checkpoint, verify=False).shared == contents(1).shared  # what it was asked for
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes, and was written with \d+"):
        open_checkpoint(checkpoint, verify=False)
    file.write_bytes(data.replace(b"layer.weight", b"layer.height"))
    with pytest.raises(CheckpointError, match=r"does not have model 'layer\.weight' as the manifest says"):
        open_checkpoint(checkpoint, verify=False)


def test_a_share_of_the_files_can_be_verified(checkpoint):
    data = (checkpoint / "optimizer.safetensors").read_bytes()
    (checkpoint / "optimizer.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    saved = open_checkpoint(checkpoint, verify=False)
    saved.verify(["model.safetensors"])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is not what was written"):
        saved.verify(["optimizer.safetensors"])


def test_an_opened_checkpoint_is_read_to_its_end_while_another_takes_its_name(tmp_path):
    big = Contents({"model": [whole(f"w{i}", np.full(1000, float(i))) for i in range(4)]})
    save(tmp_path / "last", big)
    saved = open_checkpoint(tmp_path / "last")
    shards = saved.shards("model")
    first = next(shards)
    save(tmp_path / "last", contents(2), replace=True)
    assert [shard.data[0] for shard in (first, *shards)] == [0.0, 1.0, 2.0, 3.0]
    assert holds(tmp_path / "last", contents(2))


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no .*/nowhere"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is no complete checkpoint: it has no manifest\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_disk_that_fails_while_arrays_are_read_is_named_by_the_file(checkpoint, monkeypatch):
    saved = open_checkpoint(checkpoint)

    def failing(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: Input/output error"):
        list(saved.shards("model"))
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Input/output error"):
        open_checkpoint(checkpoint)


class Bomb:
    """A pickle of it leaves a mark where it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_planted_pickles_are_never_loaded(checkpoint, tmp_path):
    bomb = pickle.dumps(Bomb(str(tmp_path / "exploded")))
    for name in (
        *FILES,
        "random_states_0.pkl",
        "custom_checkpoint_0.pkl",
        ".metadata",
        "optimizer.bin",
        "part-00001.json",
    ):
        copy = tmp_path / f"with {name.replace('/', ' ')}"
        shutil.copytree(checkpoint, copy)
        (copy / name).write_bytes(bomb)
        for verify in (True, False):
            with pytest.raises(CheckpointError):
                open_checkpoint(copy, verify=verify)
    everywhere = tmp_path / "everywhere"
    shutil.copytree(checkpoint, everywhere)
    for name in FILES:
        (everywhere / name).write_bytes(bomb)
    with pytest.raises(CheckpointError):
        open_checkpoint(everywhere)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # they would have
