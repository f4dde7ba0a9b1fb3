"""`polyaccel test`: it finds what computes wrong numbers, through the user's own configuration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polyaccel import Accelerator
from polyaccel.cli.main import main
from polyaccel.registry import backend_names, load_backend, register_backend
from polyaccel.testing import suite, trial
from polyaccel.testing.fake import FakeBackend, FakeEngine, FakeSGD

register_backend(FakeBackend())
OURS = [name for name in ("torch", "jax", "xla") if name in backend_names()]
INSTALLED = [name for name in OURS if load_backend(name).probe().is_usable]


def polyaccel(*arguments, folder, **variables):
    command = [sys.executable, "-m", "polyaccel.cli.main", "test", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("backend", INSTALLED)
def test_an_engine_gives_the_right_numbers_through_the_users_file(tmp_path, backend):
    count = 1 if backend == "xla" else 2
    (tmp_path / "polyaccel.toml").write_text(
        f'mixed_precision = "bf16"\ngradient_accumulation_steps = 3\n[launch]\nnum_processes = {count}\nnum_machines = 1\n'
    )
    one_device = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = polyaccel("--backend", backend, "--cpu", folder=tmp_path, **one_device)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mixed_precision=bf16 (polyaccel.toml:1)" in done.stdout
    stages = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("  ok")]
    assert stages == [["ok", stage] for stage in trial.STAGES]
    assert f"{count} process" in done.stdout
    assert "3 batches per update" in done.stdout
    assert done.stdout.endswith(f"{backend}: the numbers are right\n")


@pytest.mark.skipif("jax" not in INSTALLED, reason="the xla environment has no jax; the main one runs it")
def test_a_script_of_another_dialect_is_tried_through_its_bridge(tmp_path):
    done = polyaccel("--backend", "jax", "--dialect", "torch", "--cpu", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("losses and the weights differ from numpy by at most") == 3  # a loss value, too


def test_a_dialect_that_nobody_speaks_is_refused_with_a_cure(monkeypatch):
    made = []
    monkeypatch.setattr(trial, "Accelerator", lambda: Accelerator(backend="fake"))
    assert not trial.run(made.append, "cobol")
    assert "no engine that speaks cobol is installed here" in made[0]["words"]


def findings(monkeypatch, **settings):
    """What the trial reports of the engine without a framework, in this process."""
    made = []
    monkeypatch.setattr(trial, "Accelerator", lambda: Accelerator(backend="fake", **settings))
    is_good = trial.run(made.append)
    assert is_good == all(finding["is_good"] for finding in made)
    return {finding["stage"]: finding for finding in made}


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 4}, {"split_batches": True}])
def test_a_right_engine_goes_through_every_stage(monkeypatch, settings):
    found = findings(monkeypatch, **settings)
    assert list(found) == list(trial.STAGES)
    assert all(finding["is_good"] for finding in found.values())


def test_a_step_that_is_too_long_is_found(monkeypatch):
    step = FakeSGD.step

    def longer(self):
        self.param_groups[0]["lr"] = 0.1 * 1.01
        step(self)

    monkeypatch.setattr(FakeSGD, "step", longer)
    found = findings(monkeypatch)
    assert not found["value"]["is_good"]
    assert found["value"]["words"].startswith("backward(loss): loss[1] is ")
    assert "numpy computes" in found["value"]["words"]
    assert "do not train like this" in found["value"]["cure"]


def test_a_fused_step_that_does_not_clip_is_found(monkeypatch):
    monkeypatch.setattr(FakeEngine, "clip_grad_norm", lambda *args: 0.0)
    assert not findings(monkeypatch)["value"]["is_good"]


def test_gathering_in_the_wrong_order_is_found(monkeypatch):
    gather = Accelerator.gather_for_metrics
    monkeypatch.setattr(Accelerator, "gather_for_metrics", lambda self, data: gather(self, data)[::-1], raising=True)
    found = findings(monkeypatch)
    assert found["train_step"]["is_good"]
    assert "in another order" in found["gather"]["words"]


def test_an_engine_that_was_asked_for_and_is_not_here_is_a_failure(capsys, tmp_path, monkeypatch):
    missing = [name for name in OURS if name not in INSTALLED]
    if not missing:
        pytest.skip("every engine is installed here")
    monkeypatch.chdir(tmp_path)
    assert main(["test", "--backend", missing[0]]) == 1
    out = capsys.readouterr().out
    assert out.endswith(f"{missing[0]}: not usable here\n")
    assert "cure: pip install" in out


def test_mistakes_of_the_file_are_shown_before_anything_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("polyaccel.toml").write_text('mixed_precision = "bf61"\n')
    assert main(["test"]) == 1
    assert "did you mean 'bf16'" in capsys.readouterr().err


def test_the_suite_reports_how_many_tests_pass_and_which_do_not(tmp_path):
    script = (
        "import sys\nfrom polyaccel.registry import register_backend\nfrom polyaccel.testing import fake, suite\n"
        "register_backend(fake.FakeBackend())\n{}\nsys.argv[1:] = [{}'fake', sys.argv[1]]\nsys.exit(suite.main())\n"
    )
    breaks = "fake.FakeEngine.clip_grad_value = lambda *args: None"
    for name, addition, where, code in (("good", "", "'--device', ", 0), ("broken", breaks, "", 1)):
        report = tmp_path / name
        done = subprocess.run(
            [sys.executable, "-c", script.format(addition, where), str(report)],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
    assert "tests pass on the device" in (tmp_path / "good").read_text()
    (line,) = (tmp_path / "broken").read_text().splitlines()
    assert "test_clipping_by_value_bounds_every_element: " in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "good"]  # pytest has left nothing
    assert suite.STAGE == "conformance"


def test_the_suite_without_pytest_is_refused_with_its_cure(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["test", "--conformance"]) == 1
    err = capsys.readouterr().err
    assert "--conformance needs pytest" in err
    assert "pip install pytest" in err
