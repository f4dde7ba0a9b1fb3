"""`polyaccel doctor` and `polyaccel env`: what they say of a healthy engine, of one that hangs, and of secrets."""

import json

import pytest

from polyaccel.cli import doctor
from polyaccel.cli.main import main
from polyaccel.registry import backend_names, load_backend

OURS = [
    name for name in backend_names() if name in ("torch", "jax", "xla")
]  # other tests register backends of their own
INSTALLED = [name for name in OURS if load_backend(name).probe().is_usable]


@pytest.mark.parametrize("backend", INSTALLED)
def test_a_healthy_engine_goes_through_every_stage(backend):
    findings = list(doctor.check(backend, 240, cpu=True))
    assert [finding.stage for finding in findings] == list(doctor.STAGES), findings
    assert all(finding.is_good for finding in findings), findings


def test_an_engine_that_does_not_answer_in_time_is_named_with_a_cure():
    findings = list(doctor.check(INSTALLED[0], 0.2, cpu=True))
    assert not findings[-1].is_good
    assert findings[-1].words == "did not join the job within 0.2 s"
    assert "firewall" in findings[-1].cure


def test_what_the_processes_cannot_do_is_shown_in_their_own_words():
    [finding] = doctor.check("jax" if "jax" in INSTALLED else "xla", 240, cpu=True, num_processes=-1)
    assert not finding.is_good
    assert "must be at least 1" in finding.words or "hint" in finding.words


def test_an_engine_that_was_asked_for_and_is_not_here_is_a_failure(capsys, monkeypatch):
    missing = [name for name in OURS if name not in INSTALLED]
    if not missing:
        pytest.skip("every engine is installed here")
    assert main(["doctor", "--backend", missing[0]]) == 1
    out = capsys.readouterr().out
    assert "not usable here" in out
    assert "cure: pip install" in out


def test_env_names_versions_engines_and_settings_and_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-that-must-not-be-seen")
    monkeypatch.setenv("POLYACCEL_COMPILE_BACKEND", "a-secret-that-must-not-be-seen")
    monkeypatch.setenv("POLYACCEL_SEED", "3")
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    facts = json.loads(text)
    assert set(facts["engines"]) == set(backend_names())
    assert facts["settings"]["seed"] == "3 (environment POLYACCEL_SEED)"
    assert "polyaccel" in facts["packages"]
    assert "a-secret-that-must-not-be-seen" not in text
