"""`polyaccel checkpoint show` and `verify`."""

import numpy as np
import pytest
from saving import Contents, contents, save, whole

from polyaccel.cli.main import main


@pytest.fixture
def folder(tmp_path):
    facts = {"step": 7, "engine": "torch", "config": {"mixed_precision": "bf16", "api_key": "sk-very-secret-value-1"}}
    save(tmp_path / "checkpoint_2", contents(2))
    save(tmp_path / "checkpoint_10", contents(10), facts=facts)
    return tmp_path


def test_show_tells_what_is_in_a_checkpoint_without_reading_its_arrays(folder, capsys):
    model = folder / "checkpoint_10" / "model.safetensors"
    data = model.read_bytes()
    model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["checkpoint", "show", str(folder / "checkpoint_10")]) == 0
    said = capsys.readouterr().out
    assert "checkpoint_10: 1 process, 20" in said
    assert "  step: 7\n  engine: torch\n  config: mixed_precision=bf16, api_key=[redacted]\n" in said
    assert "model: 5 arrays, 22 elements, 70 bytes" in said
    assert "optimizer: 1 array, 12 elements, 48 bytes" in said
    assert "values: step, scheduler_0; of each process: python" in said


def test_show_lists_a_group_and_the_values_when_asked(folder, capsys):
    assert main(["checkpoint", "show", str(folder / "checkpoint_10"), "--group", "model", "--values"]) == 0
    said = capsys.readouterr().out
    assert "  layer.weight  float32  [4, 3]\n  layer.bias  bfloat16  [5]\n" in said
    assert "scheduler_0: last_lr=[1.0], best=inf" in said
    assert "values of process 0:\n  python: (3, (10, 11, 12, 13, 14), None)\n" in said
    assert main(["checkpoint", "show", str(folder / "checkpoint_10"), "--group", "ema"]) == 1
    assert "has no group 'ema'" in capsys.readouterr().err


def test_show_of_a_folder_of_checkpoints_takes_the_newest_whole_one(folder, capsys):
    (folder / "checkpoint_11").mkdir()
    assert main(["checkpoint", "show", str(folder)]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"passed over {folder / 'checkpoint_11'}: ")
    assert second.startswith(str(folder / "checkpoint_10"))


def test_verify_says_of_each_checkpoint_whether_it_is_whole(folder, capsys):
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["whole", f"{folder / 'checkpoint_10'}:"],
        ["whole", f"{folder / 'checkpoint_2'}:"],
    ]
    (folder / "checkpoint_2" / "optimizer.safetensors").unlink()
    assert main(["checkpoint", "verify", str(folder)]) == 1
    said = capsys.readouterr()
    assert "whole   " in said.out
    assert "BROKEN  " in said.err
    assert "optimizer.safetensors is missing" in said.err
    assert "1 of 2 checkpoints are broken" in said.err


def test_verify_of_one_checkpoint_has_an_exit_code(folder, capsys):
    assert main(["checkpoint", "verify", str(folder / "checkpoint_10")]) == 0
    model = folder / "checkpoint_10" / "model.safetensors"
    data = model.read_bytes()
    model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["checkpoint", "verify", str(folder / "checkpoint_10")]) == 1
    assert "model.safetensors is not what was written: its checksum differs" in capsys.readouterr().err
    assert main(["checkpoint", "verify", str(folder / "nowhere")]) == 1


def test_long_values_are_cut(tmp_path, capsys):
    save(tmp_path / "one", Contents(shared={"words": b"x" * 2500, "numbers": list(range(1000)), "short": b"y"}))
    assert main(["checkpoint", "show", str(tmp_path / "one"), "--values"]) == 0
    said = capsys.readouterr().out
    assert "  words: 2500 bytes\n  numbers: [0, 1, 2," in said
    assert "  short: 1 byte\n" in said
    assert max(map(len, said.splitlines())) < 220


def test_sizes_are_in_units_that_people_read(tmp_path, capsys):
    save(tmp_path / "one", Contents({"model": [whole("w", np.zeros(3 * 2**20, np.uint8))]}))
    assert main(["checkpoint", "show", str(tmp_path / "one")]) == 0
    assert "model: 1 array, 3145728 elements, 3.0 MiB" in capsys.readouterr().out
