"""No secret is in any file of a run, however it came near: every byte of the folder is searched."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from launching import LAUNCH

from polyaccel.redaction import HIDDEN, Redaction, is_secret

# Each stands in another place; none may be found.
PLANTED = {
    "environment": "e1v-9f8a7b6c5d4e",
    "environment that is also logged": 's3cr3t/with"quote\\and-ü',
    "argument": "arg-0a1b2c3d4e5f",
    "argument after =": "eq-5e6f7a8b9c0d",
    "config by name": "cfg-1122334455aa",
    "nested config": "nst-66778899bbcc",
    "config by shape": "hf_" + "Ab1" * 10,
    "address": "pw-in-address-77",
    "logged text": "ghp_" + "x9Z" * 12,
}

SCRIPT = """
    import json, sys
    sys.path.insert(0, sys.argv[1])
    from doubles import accelerator
    from polyaccel.tracking import GeneralTracker
    import os

    class Complains(GeneralTracker):
        name, requires_logging_directory = "complains", False
        tracker = property(lambda self: None)
        def start(self): raise ConnectionError("no access with " + os.environ["MY_API_KEY"])

    planted = json.loads(open(sys.argv[2]).read())
    also = planted["environment that is also logged"]
    one = accelerator("logs", Complains(), *sys.argv[3].split())
    one.init_trackers("secrets", config={
        "db_password": planted["config by name"],
        "service": {"auth": {"access_key": planted["nested config"]}, "url": "https://me:" + planted["address"] + "@host/x"},
        "resume_from": planted["config by shape"],
        "copied": planted["config by name"] + "/suffix",
        "lr": 0.1, "max_tokens": 512, "pad_token": "<pad>", "tokenizer": "bert", also: 1,
    })
    one.log({"note": "used " + planted["logged text"] + " and " + also, also: 1.0, "loss": 0.5}, step=0)
    one.log_table(also, [also], [[planted["environment"]]], step=0)
    one.tracking.event("checkpoint", path="/data/" + also)
    one.tracking.flush()
    raise RuntimeError("failed with " + planted["environment"])
"""


@pytest.mark.parametrize("tracker", ["", "tensorboard"])
def test_no_byte_of_a_run_folder_holds_a_secret(tmp_path, tracker):
    if tracker:
        pytest.importorskip(tracker)
    environment = {
        **os.environ,
        "MY_API_KEY": PLANTED["environment"],
        "DB_SECRET": PLANTED["environment that is also logged"],
        "SLURM_JOB_TOKEN": PLANTED["environment"],
    }
    arguments = ["--api-key", PLANTED["argument"], f"--hub-token={PLANTED['argument after =']}", "--lr", "0.1"]
    (tmp_path / "planted.json").write_text(json.dumps(PLANTED))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(SCRIPT),
            str(Path(__file__).parent),
            "planted.json",
            tracker,
            *arguments,
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "RuntimeError: failed with" in done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("tracker 'complains'")]
    (run,) = (file.parent for file in (tmp_path / "logs").rglob("run.json"))
    shown = [subprocess.run(
        [sys.executable, "-m", "polyaccel.cli.main", "runs", *command, str(run)],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    ).stdout for command in (["report"], ["show"])]  # fmt: skip
    files = {file: file.read_bytes() for file in (tmp_path / "logs").rglob("*") if file.is_file()}
    assert {file.name for file in files} >= {"run.json", "metrics.jsonl", "events.jsonl", "report.html"}
    assert [place for place, secret in PLANTED.items() if any(secret in text for text in shown)] == []
    found = [
        (place, file.name)
        for place, secret in PLANTED.items()
        for file, content in files.items()
        for form in {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
        if form.encode() in content
    ]
    assert found == []
    assert warnings
    assert PLANTED["environment"] not in warnings[0]
    text = next(content for file, content in files.items() if file.name == "run.json").decode()
    for kept in (
        '"max_tokens": 512',
        '"pad_token": "<pad>"',
        '"tokenizer": "bert"',
        '"lr": 0.1',
        f'"copied": "{HIDDEN}/suffix"',
    ):
        assert kept in text


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("api_key", "abc", True),
        ("OPENAI_API_KEY", "x", True),
        ("apiKey", "x", True),
        ("aws_secret_access_key", "x", True),
        ("password", 1234, True),
        ("HF_TOKEN", "abcdefghij", True),
        ("--hub-token", "abcdefghij", True),
        ("max_tokens", 512, False),
        ("pad_token", "<pad>", False),
        ("eos_token", "[EOS token]", False),
        ("token", 5, False),
        ("tokenizer", "bert-base-uncased", False),
        ("key", "value", False),
        ("monkey", "abcdefghij", False),
        ("use_password", True, False),
        ("password", None, False),
    ],
)
def test_what_a_name_says_about_its_value(name, value, secret):
    assert is_secret(name, value) is secret


def test_a_secret_within_another_one_leaves_no_rest():
    redaction = Redaction({"A_SECRET": "abcdef", "B_SECRET": "abcdefghij"})
    assert redaction.text("x abcdefghij y abcdef") == f"x {HIDDEN} y {HIDDEN}"


def test_addresses_lose_their_password_and_keep_the_rest():
    assert Redaction().text("https://user:pw@host:80/p?q=1") == f"https://{HIDDEN}@host:80/p?q=1"


def test_command_lines_keep_what_is_not_secret():
    arguments = ["train.py", "--token", "--lr", "0.1", "--api-key", "abcdefgh", "password=geheim", "--data", "abcdefgh"]
    assert Redaction().arguments(arguments) == [
        "train.py", "--token", "--lr", "0.1", "--api-key", HIDDEN, f"password={HIDDEN}", "--data", HIDDEN,
    ]  # fmt: skip


@pytest.mark.parametrize("restarts", [0, 1])
def test_launch_leaves_no_secret_in_any_file(tmp_path, restarts):
    pytest.importorskip("torch")
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\nfrom polyaccel import Accelerator\n"
        "one = Accelerator(cpu=True, project_dir='project')\none.init_trackers('secrets')\none.log({'loss': 1.0}, step=0)\n"
        "print('with', *sys.argv[1:], flush=True)\nraise SystemExit(9)\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "MY_API_KEY": PLANTED["environment"], "TMPDIR": str(temporary), "HOME": str(tmp_path)}
    secrets = [f"--hub-token={PLANTED['argument after =']}", "--api-key", PLANTED["argument"]]
    command = [*LAUNCH, "--backend", "torch", "--cpu"]
    done = subprocess.run(
        [*command, "--max-restarts", str(restarts), str(script), *secrets],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 9, done.stderr
    assert done.stdout.count(PLANTED["argument"]) == restarts + 1  # the script's own output is the script's own
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert sum(file.name == "run.json" for file in files) == restarts + 1
    assert [file for file in files for secret in PLANTED.values() if secret.encode() in file.read_bytes()] == []


@pytest.mark.parametrize("target", ["slurm", "kubernetes"])
def test_what_a_cluster_is_given_has_no_secret_of_the_environment_and_arguments_are_warned_of(tmp_path, target):
    """The job needs its arguments as they are; whoever writes a secret there is told."""
    (tmp_path / "train.py").write_text("")
    environment = {**os.environ, "MY_API_KEY": PLANTED["environment"], "HF_TOKEN": PLANTED["config by shape"]}
    command = [*LAUNCH, "--on", target, "--kubernetes.image", "image", "--emit"]
    for arguments, is_warned in (([], False), (["--api-key", PLANTED["argument"]], True)):
        done = subprocess.run(
            [*command, "train.py", "--lr", "0.1", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert PLANTED["environment"] not in done.stdout + done.stderr
        assert PLANTED["config by shape"] not in done.stdout + done.stderr
        assert ("warning: an argument looks like a secret" in done.stderr) is is_warned
        assert PLANTED["argument"] not in done.stderr
        assert (PLANTED["argument"] in done.stdout) is is_warned
