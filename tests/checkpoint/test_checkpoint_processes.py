"""Several processes, one checkpoint: it is complete for all of them or for none, and whoever failed is named."""

import os
import time

import numpy as np
import pytest
from saving import contents, cut, holds, listing, save, save_together, whole

from polyaccel.checkpoint import (
    Contents,
    abandon,
    begin_checkpoint,
    lock_folder,
    newest_checkpoint,
    open_checkpoint,
    work_folder,
    write,
    write_checkpoint,
)
from polyaccel.errors import CheckpointError


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch):
    monkeypatch.setattr(write, "_GRACE_S", 0.5)


def halves(*, lost: int = 0):
    array = np.arange(8.0)
    return [
        Contents({"model": [cut("w", array, [slice(0, 4)])]}),
        Contents({"model": [cut("w", array, [slice(4 + lost, 8)])]}),
    ]


def messages(results):
    assert all(isinstance(result, CheckpointError) for result in results), results
    return [str(result) for result in results]


def test_elements_that_no_process_gives_are_an_error_on_all(tmp_path):
    main, other = messages(save_together(tmp_path / "one", halves(lost=1)))
    assert "model: 'w': 1 of 8 elements are missing" in main
    assert "process 0 gave up" in other
    assert listing(tmp_path) == set()


def test_processes_that_disagree_about_an_array_are_named_by_it(tmp_path):
    shares = [Contents({"model": [whole("w", np.zeros(2))]}), Contents({"model": [whole("w", np.zeros(3))]})]
    main, _ = messages(save_together(tmp_path / "one", shares))
    assert "'w' is float64 of shape [2] in one piece and float64 of shape [3] in another" in main
    assert listing(tmp_path) == set()


def test_what_every_process_gives_twice_is_an_error(tmp_path):
    main, _ = messages(save_together(tmp_path / "one", [contents(), contents()]))
    assert "pieces overlap" in main


def test_the_failure_of_another_process_ends_the_attempt_at_once_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "hunter2-hunter2")
    shares = halves()
    shares[1].own["handle"] = open  # "... an object of type builtin_function_or_method ..."
    shares[1].own["handle hunter2-hunter2"] = open
    shares[1].own.pop("handle")
    start = time.monotonic()
    main, other = messages(save_together(tmp_path / "one", shares))
    assert time.monotonic() - start < 20
    assert "process 1 could not write its part: CheckpointError: own.handle" in main
    assert "neither a plain value nor an array" in other
    assert "hunter2" not in main  # it went through a file
    assert listing(tmp_path) == set()


def test_a_process_that_hands_in_nothing_is_waited_for_and_named(tmp_path):
    attempt = begin_checkpoint(tmp_path / "one")
    with pytest.raises(CheckpointError, match="processes 1, 2 have not handed in their part") as caught:
        write_checkpoint(
            tmp_path / "one", contents(), attempt=attempt, process_index=0, num_processes=3, facts={}, patience_s=0.3
        )
    assert "is the folder on a file system that all hosts share?" in str(caught.value)
    assert listing(tmp_path) == set()


def test_a_main_process_that_never_comes_is_not_waited_for_forever(tmp_path):
    attempt = begin_checkpoint(tmp_path / "one")
    with pytest.raises(CheckpointError, match="process 0 did not complete"):
        write_checkpoint(
            tmp_path / "one", contents(), attempt=attempt, process_index=1, num_processes=2, facts={}, patience_s=0.3
        )
    abandon(tmp_path / "one", attempt)
    assert listing(tmp_path) == set()


def test_a_folder_that_this_host_does_not_see_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="does not appear") as caught:
        write_checkpoint(
            tmp_path / "one", contents(), attempt="0" * 16, process_index=1, num_processes=2, facts={}, patience_s=0.3
        )
    assert "share" in str(caught.value)


def test_a_part_that_is_still_growing_is_waited_for(tmp_path, monkeypatch):
    real = write._hand_in

    def slow(work, part, index):
        for step in range(6):  # 1.2 s of progress against 0.6 s of patience
            work.write(f"growing-{step}", [memoryview(b"x")])
            time.sleep(0.2)
        for step in range(6):
            work.remove_file(f"growing-{step}")
        real(work, part, index)

    monkeypatch.setattr(write, "_hand_in", slow)
    assert save_together(tmp_path / "one", halves(), patience_s=0.6) == [str(tmp_path / "one")] * 2


def test_a_part_of_another_attempt_or_a_damaged_one_is_refused(tmp_path):
    for text, message in (("x", "part of process 1 .* cannot be read"), (None, "another attempt")):
        attempt = begin_checkpoint(tmp_path / "one")
        data = text.encode() if text else write.encode_part(write.Part("f" * 16, {}, {}, {}))
        with open(os.path.join(work_folder(tmp_path / "one", attempt), "part-00001.json"), "wb") as file:
            file.write(data)
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(tmp_path / "one", contents(), attempt=attempt, process_index=0, num_processes=2, facts={})


def test_facts_that_cannot_be_kept_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "layout", lambda *arguments: pytest.fail("arrays were written first"))
    with pytest.raises(
        CheckpointError, match=r"facts\.config\.output_dir is a .*Path, which is neither a plain value nor an array"
    ):
        save(tmp_path / "one", facts={"config": {"output_dir": tmp_path}})
    assert listing(tmp_path) == set()


# -- places ------------------------------------------------------------------------------------------------------------------------


def test_an_existing_checkpoint_is_not_overwritten_and_nothing_is_written(tmp_path):
    save(tmp_path / "one", contents(1))
    with pytest.raises(CheckpointError, match="one exists already"):
        begin_checkpoint(tmp_path / "one")
    assert holds(tmp_path / "one", contents(1))
    assert set(os.listdir(tmp_path)) == {"one"}


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "one").mkdir()
    save(tmp_path / "one", contents(1))
    (tmp_path / "two").mkdir()
    save(tmp_path / "two", contents(2), replace=True)
    assert holds(tmp_path / "one", contents(1))
    assert holds(tmp_path / "two", contents(2))


def test_a_process_that_looks_before_an_empty_folder_is_filled_still_sees_the_checkpoint(tmp_path, monkeypatch):
    target = tmp_path / "one"
    target.mkdir()
    complete = write._name_plainly

    def slowly(*arguments):  # the parts are gone already, and the checkpoint is not there yet
        time.sleep(0.3)
        complete(*arguments)

    monkeypatch.setattr(write, "_name_plainly", slowly)
    assert save_together(target, halves()) == [str(target)] * 2


def test_replacing_takes_the_place_of_a_checkpoint_and_of_nothing_else(tmp_path):
    save(tmp_path / "one", contents(1))
    save(tmp_path / "one", contents(2), replace=True)
    assert holds(tmp_path / "one", contents(2))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("precious")
    (tmp_path / "note").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    for name, message in (
        ("thesis", "is no checkpoint, so it is not replaced"),
        ("note", "is a file"),
        ("link", "is a link"),
    ):
        with pytest.raises(CheckpointError, match=message):
            begin_checkpoint(tmp_path / name, replace=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == (tmp_path / "note").read_text() == "precious"
    assert set(os.listdir(tmp_path)) == {"one", "thesis", "note", "link"}


def test_what_appears_at_the_target_meanwhile_is_not_overwritten(tmp_path):
    attempt = begin_checkpoint(tmp_path / "one")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x").write_text("somebody else's")
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(tmp_path / "one", contents(), attempt=attempt, process_index=0, num_processes=1, facts={})
    assert listing(tmp_path) == {"one", "one/x"}


def test_missing_parents_are_made_and_a_file_in_the_way_is_named(tmp_path):
    save(tmp_path / "a" / "b" / "one", contents(1))
    assert holds(tmp_path / "a" / "b" / "one", contents(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/one cannot be written"):
        begin_checkpoint(tmp_path / "file" / "one")
    with pytest.raises(CheckpointError, match="file cannot be locked"):
        lock_folder(tmp_path / "file")
    assert newest_checkpoint(tmp_path / "file") == (None, [])


def test_an_abandoned_attempt_leaves_nothing_and_frees_the_name(tmp_path):
    abandon(tmp_path / "one", begin_checkpoint(tmp_path / "one"))
    assert listing(tmp_path) == set()
    save(tmp_path / "one")


def test_files_of_hooks_are_kept_with_their_checksum_wherever_they_are(tmp_path):
    added = ("config.json", "unet/weights.bin", "unet/deep/x", "pytorch_lora_weights.safetensors", "scheduler.bin")
    attempt = begin_checkpoint(tmp_path / "one")
    place = work_folder(tmp_path / "one", attempt)
    os.makedirs(os.path.join(place, "unet", "deep"))
    for name in added:
        with open(os.path.join(place, name), "w") as file:
            file.write(name)
    write_checkpoint(tmp_path / "one", contents(), attempt=attempt, process_index=0, num_processes=1, facts={})
    assert set(open_checkpoint(tmp_path / "one").manifest.added) == set(added)
    assert (tmp_path / "one/unet/deep/x").read_text() == "unet/deep/x"
    (tmp_path / "one/unet/deep/x").write_text("unet/deep/y")
    with pytest.raises(CheckpointError, match="unet/deep/x is not what was written"):
        open_checkpoint(tmp_path / "one")


@pytest.mark.parametrize("name", ["part-00007.json", "link", "manifest.json", "new\nline"])
def test_files_of_hooks_that_no_checkpoint_can_hold_are_refused(tmp_path, name):
    attempt = begin_checkpoint(tmp_path / "one")
    path = os.path.join(work_folder(tmp_path / "one", attempt), name)
    if name == "link":
        os.symlink("/etc/hostname", path)
    else:
        with open(path, "w") as file:
            file.write("x")
    with pytest.raises(CheckpointError, match="a checkpoint cannot keep it"):
        write_checkpoint(tmp_path / "one", contents(), attempt=attempt, process_index=0, num_processes=1, facts={})
    assert listing(tmp_path) == set()


def test_a_hook_that_writes_where_the_arrays_belong_is_told_so(tmp_path):
    attempt = begin_checkpoint(tmp_path / "one")
    with open(os.path.join(work_folder(tmp_path / "one", attempt), "model.safetensors"), "w") as file:
        file.write("x")
    with pytest.raises(
        CheckpointError, match=r"a hook has written 'model\.safetensors' .* where the arrays of 'model' belong"
    ):
        write_checkpoint(tmp_path / "one", contents(), attempt=attempt, process_index=0, num_processes=1, facts={})
    attempt = begin_checkpoint(tmp_path / "one")
    with open(os.path.join(work_folder(tmp_path / "one", attempt), "model.safetensors"), "w") as file:
        file.write("the hook's own")
    rest = Contents({"optimizer": contents().groups["optimizer"]})
    write_checkpoint(tmp_path / "one", rest, attempt=attempt, process_index=0, num_processes=1, facts={})
    assert open_checkpoint(tmp_path / "one").manifest.added == ("model.safetensors",)
    assert holds(tmp_path / "one", rest)
