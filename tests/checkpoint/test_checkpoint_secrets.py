"""No byte of a checkpoint's folder holds a secret of the environment or the configuration, whatever happens to the attempt."""

import json
import os

import pytest
from saving import contents, save, save_together

from polyaccel.checkpoint import begin_checkpoint, lock_folder, open_checkpoint, work_folder
from polyaccel.errors import CheckpointError
from polyaccel.redaction import HIDDEN

PLANTED = {
    "environment": "env-9f8a7b6c5d4e",
    "by name": "cfg-1122334455aa",
    "nested": "nst-66778899bbcc",
    "by shape": "hf_" + "Ab1" * 10,
    "address": "pw-in-address-77",
}
FACTS = {
    "step": 7,
    "note": "read with " + PLANTED["environment"],
    "config": {
        "db_password": PLANTED["by name"],
        "service": {"auth": [{"access_key": PLANTED["nested"]}], "url": f"https://me:{PLANTED['address']}@host/x"},
        "resume_from": PLANTED["by shape"],
        "copied": PLANTED["by name"] + "/suffix",
        "lr": 0.1,
        "max_tokens": 512,
    },
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", PLANTED["environment"])
    monkeypatch.setenv("HOME_PAGE", "nothing-secret-here")


def every_byte(folder):
    for base, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(base, name), "rb") as file:
                yield os.path.join(base, name), file.read()


def assert_clean(folder):
    read = list(every_byte(folder))
    assert read
    for path, data in read:
        for what, secret in PLANTED.items():
            assert secret.encode() not in data, f"{what}: {path}"
            assert secret not in path


def test_no_byte_of_the_folder_holds_a_secret(tmp_path):
    with lock_folder(tmp_path, run="a-run"):
        save(tmp_path / "checkpoint_0", contents(), facts=FACTS)
        assert_clean(tmp_path)
    facts = open_checkpoint(tmp_path / "checkpoint_0").facts
    assert facts["config"]["db_password"] == HIDDEN
    assert (facts["step"], facts["config"]["lr"], facts["config"]["max_tokens"]) == (7, 0.1, 512)
    assert "nothing-secret-here" not in json.dumps(dict(facts))


def test_no_file_of_an_unfinished_attempt_holds_one(tmp_path, monkeypatch):
    from polyaccel.checkpoint import write

    monkeypatch.setattr(write, "_GRACE_S", 0.3)
    seen = []
    real = write._read_part

    def read_part(work, index, attempt):
        seen.extend(every_byte(tmp_path))
        return real(work, index, attempt)

    monkeypatch.setattr(write, "_read_part", read_part)
    bad = contents()
    bad.own[f"handle of {PLANTED['environment']}"] = object()
    results = save_together(tmp_path / "one", [contents(), bad])
    assert isinstance(results[0], CheckpointError)
    assert any("part-00001" in path for path, _ in seen)
    for path, data in seen:
        assert all(secret.encode() not in data for secret in PLANTED.values()), path


def test_names_of_attempts_say_nothing(tmp_path):
    attempt = begin_checkpoint(tmp_path / "one")
    assert os.listdir(work_folder(tmp_path / "one", attempt)) == []
    assert_clean(tmp_path)
