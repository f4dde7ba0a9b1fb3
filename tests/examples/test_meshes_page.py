"""The examples of docs/meshes.md run on four devices and print what the page says; its commands are ones that polyaccel takes."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from polyaccel import ShardingRule
from polyaccel.cli.main import parser

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "meshes.md").read_text()
CHECKS = """
specs = {name: tuple(leaf.sharding.spec) for name, leaf in accelerator._engine._models[-1]().params.items()}
assert specs["expand.weight"] == ("tensor", "fsdp"), specs
assert specs["shrink.weight"] == ("fsdp", "tensor"), specs
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def commands():
    """Every `polyaccel ...` of the page, without its variables and its comment."""
    for block in blocks("bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def test_the_examples_of_the_page_train_and_print_what_it_says(tmp_path):
    script = tmp_path / "page.py"
    script.write_text("\n".join([*blocks("python"), CHECKS]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[:-1] == blocks("text")[0].splitlines()
    assert float(said[-1]) == pytest.approx(1, abs=0.5)  # noise cannot be learned, and x has variance 1


def test_the_files_of_the_page_hold_settings_that_can_be_read():
    (text,) = blocks("toml")
    rules = [ShardingRule.of(rule) for rule in tomllib.loads(text)["sharding_rules"]]
    assert [rule.axes for rule in rules] == [(None, "tensor"), None]


def test_the_commands_of_the_page_and_of_its_example_are_known():
    docstring = ast.get_docstring(ast.parse((ROOT / "examples" / "mesh_gpt.py").read_text())) or ""
    lines = [line.strip() for line in docstring.splitlines() if "polyaccel " in line and line.startswith("    ")]
    assert len(lines) >= 4
    own = [re.sub(r"^([A-Z_]+=\S+ )*", "", line) for line in lines]
    found = [*commands(), *(shlex.split(line, comments=True) for line in own)]
    assert len(found) >= 10
    for words in found:
        assert words[0] == "polyaccel", words
        parser(words[1]).parse_args(words[1:])  # SystemExit: an unknown flag
        for word in words:
            assert not word.startswith("examples/") or (ROOT / word).is_file(), word


def test_the_example_learns_on_a_mesh_of_the_environment_and_continues_without_one(tmp_path):
    def losses(name, *arguments, **variables):
        curve = tmp_path / f"{name}.json"
        command = [sys.executable, str(ROOT / "examples" / "mesh_gpt.py"), "--layers", "1", "--width", "32", *arguments]
        done = subprocess.run(
            [*command, "--curve", str(curve)],
            cwd=tmp_path,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(curve.read_text())["losses"]

    whole = losses("whole", "--steps", "12", "--backend", "torch")
    assert whole[-1] < whole[0] - 0.1
    saved = ("--project", str(tmp_path / "project"))
    mesh = {"POLYACCEL_MESH__FSDP": "2", "POLYACCEL_MESH__TENSOR": "2"}
    first = losses("first", "--steps", "6", "--backend", "jax", *saved, "--save-every", "6", **mesh)
    rest = losses("rest", "--steps", "6", "--backend", "torch", *saved, "--resume")
    assert first + rest == pytest.approx(whole, abs=1e-5)  # float32 sums in another order
