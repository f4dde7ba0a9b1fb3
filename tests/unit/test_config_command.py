"""`polyaccel config`: what it asks, writes, shows and refuses."""

import pytest

from polyaccel.cli import config_questions
from polyaccel.cli.main import main
from polyaccel.config.files import read_file
from polyaccel.config.settings import SETTINGS


def test_the_default_file_has_every_setting_as_a_comment_and_is_itself_valid(tmp_path, capsys):
    path = tmp_path / "new" / "c.toml"
    assert main(["config", "default", "--file", str(path)]) == 0
    assert read_file(path).values == {}
    uncommented = "\n".join(
        line.removeprefix("# ") if line.startswith("# ") and " = " in line else line
        for line in path.read_text().splitlines()
        if not line.endswith(" =")
    )
    path.write_text(uncommented)
    found = read_file(path)
    assert found.problems == []
    assert {name for name, setting in SETTINGS.items() if setting.default is not None} == set(found.values)
    assert all(found.values[name] == SETTINGS[name].default for name in found.values)
    assert main(["config", "default", "--file", str(path)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_set_changes_one_value_and_keeps_comments(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("# mine\nseed = 1 # because\n\n[mesh]\nfsdp = 2\n")
    for name, value in (("mesh.fsdp", "4"), ("mixed_precision", "bf16"), ("rng_types", "torch,numpy"), ("cpu", "yes")):
        assert main(["config", "set", name, value, "--file", str(path)]) == 0
    text = path.read_text()
    assert "# mine\nseed = 1 # because" in text
    values = {"seed": 1, "mesh.fsdp": 4, "mixed_precision": "bf16", "rng_types": ("torch", "numpy"), "cpu": True}
    assert read_file(path).values == values


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("mesh.fsp", "2", "did you mean 'mesh.fsdp'"),
        ("seed", "x", "is not an integer"),
        ("mixed_precision", "fp", "is unknown"),
    ],
)
def test_set_refuses_before_it_writes(tmp_path, capsys, name, value, reason):
    path = tmp_path / "c.toml"
    path.write_text("seed = 1\n")
    assert main(["config", "set", name, value, "--file", str(path)]) == 1
    assert reason in capsys.readouterr().err
    assert path.read_text() == "seed = 1\n"


def test_show_names_every_value_and_its_source(tmp_path, capsys, monkeypatch):
    path = tmp_path / "c.toml"
    path.write_text("seed = 3\n")
    monkeypatch.setenv("POLYACCEL_MIXED_PRECISION", "bf16")
    assert main(["config", "show", "--file", str(path)]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines["seed"] == ["3", f"{path}:1"]
    assert lines["mixed_precision"] == ["bf16", "environment", "POLYACCEL_MIXED_PRECISION"]
    assert lines["cpu"] == ["false", "default"]
    assert set(lines) == set(SETTINGS)


def test_check_counts_settings_or_lists_mistakes(tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text("seed = 3\n[mesh]\ndata = -1\nfsdp = 2\n")
    assert main(["config", "check", str(path)]) == 0
    assert "3 settings, no mistakes" in capsys.readouterr().out
    path.write_text("[mesh]\ndata = -1\nfsdp = -1\n")
    assert main(["config", "check", str(path)]) == 1
    assert "only one axis can be inferred" in capsys.readouterr().err


def test_from_accelerate_writes_a_file_that_means_the_same(tmp_path, capsys):
    yaml, toml = tmp_path / "default_config.yaml", tmp_path / "c.toml"
    yaml.write_text("distributed_type: MULTI_CPU\nmixed_precision: bf16\nnum_processes: 2\n")
    assert main(["config", "from-accelerate", str(yaml), "-o", str(toml)]) == 0
    assert read_file(toml).values == read_file(yaml).values
    assert main(["config", "from-accelerate", str(toml)]) == 1
    assert "is not from Accelerate" in capsys.readouterr().err


def test_questions_are_refused_where_nobody_can_answer(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert main(["config"]) == 1
    assert "is no terminal" in capsys.readouterr().err


def test_answers_become_a_file_and_a_wrong_answer_is_asked_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    answers = iter(["torhc", "auto", "bf16", "2", "", "1", "host0", "", "x", "4"])
    path = tmp_path / "c.toml"
    assert config_questions.ask(path, lambda question: next(answers)) == 0
    assert read_file(path).values == {
        "mixed_precision": "bf16",
        "gradient_accumulation_steps": 4,
        "launch.num_machines": 2,
        "launch.num_processes": 2,
        "launch.machine_rank": 1,
        "launch.main_process_ip": "host0",
        "launch.main_process_port": 29500,
    }
    assert "did you mean" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["config", "default", "--file", str(tmp_path / "file" / "c.toml")]) == 1
    assert "cannot be written" in capsys.readouterr().err
