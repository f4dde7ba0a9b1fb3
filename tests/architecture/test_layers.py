"""Who may import whom: the contracts in pyproject.toml hold, and each of them catches the arrow that it forbids."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from source_tree import FRAMEWORKS, PACKAGES, REPOSITORY, files_of, imported_modules, relative, tree_of

# What a package may not name, even in an annotation (the contracts see only imports that run).
FORBIDDEN_FRAMEWORKS = {
    "polyaccel": FRAMEWORKS,
    "polyaccel_torch": FRAMEWORKS - {"torch"},
    "polyaccel_xla": FRAMEWORKS - {"torch", "torch_xla"},
    "polyaccel_jax": FRAMEWORKS - {"jax", "jaxlib", "flax", "optax", "grain"},
    "polyaccel_bridges": {"torch_xla", "torchax", "grain", "transformers", "accelerate"},
}

# contract id -> an import that it must catch: (file, line to append)
PLANTED = {
    "core-layers": ("polyaccel/errors.py", "import polyaccel.plan"),
    "core-knows-no-framework": ("polyaccel/trees.py", "import torch"),
    "adapters-see-the-seam": ("backends/torch/polyaccel_torch/engine.py", "import polyaccel.plan"),
    "nothing-imports-the-facade": ("backends/jax/polyaccel_jax/engine.py", "from polyaccel import Accelerator"),
    "torch-and-jax-apart": ("backends/torch/polyaccel_torch/engine.py", "import polyaccel_jax"),
    "xla-and-jax-apart": ("backends/xla/polyaccel_xla/engine.py", "import polyaccel_jax.dialect"),
    "torch-side-knows-no-jax": ("backends/xla/polyaccel_xla/engine.py", "def late():\n    import jax"),
    "torch-knows-no-xla": ("backends/torch/polyaccel_torch/engine.py", "import torch_xla"),
    "jax-side-knows-no-torch": ("backends/jax/polyaccel_jax/engine.py", "import torch"),
    "xla-borrows-the-dialect": ("backends/xla/polyaccel_xla/engine.py", "from polyaccel_torch import engine"),
    "bridges-know-no-engine": ("backends/bridges/polyaccel_bridges/__init__.py", "import polyaccel_jax.engine"),
    "dialects-know-no-engine": ("backends/torch/polyaccel_torch/dialect/__init__.py", "import polyaccel_torch.engine"),
    "nobody-imports-a-bridge": ("backends/jax/polyaccel_jax/engine.py", "import polyaccel_bridges"),
    "nobody-imports-the-shelf": ("polyaccel/prepare.py", "import polyaccel.testing"),
}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over a copy of the repository."""
    folders = [root, *(root / folder.parent.relative_to(REPOSITORY) for folder in PACKAGES.values())]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(map(str, folders))),
        "NO_COLOR": "1",
        "COLUMNS": "250",  # names of contracts are not to be wrapped
    }
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
        "--no-cache",
        "--no-logo",
    ]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)


def contracts() -> dict[str, str]:
    """Contract id -> name, as pyproject.toml has them."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    return {contract["id"]: contract["name"] for contract in settings["tool"]["importlinter"]["contracts"]}


def copy_of_the_packages(folder: Path) -> Path:
    """The five packages and pyproject.toml, in a folder of their own."""
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    for package in PACKAGES.values():
        target = folder / package.relative_to(REPOSITORY)
        shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_every_contract_is_kept() -> None:
    result = lint_imports(REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_contract_catches_the_arrow_that_it_forbids(tmp_path: Path) -> None:
    assert set(PLANTED) == set(contracts()), "a contract without a planted violation may be one that never fails"
    root = copy_of_the_packages(tmp_path)
    for file, line in PLANTED.values():
        with (root / file).open("a", encoding="utf-8") as source:
            source.write(f"\n{line}\n")
    report = lint_imports(root).stdout
    kept = [identifier for identifier, name in contracts().items() if f"{name} BROKEN" not in report]
    assert kept == [], report


# `polyaccel estimate-memory` is asked about one of its configurations: it is looked for then, and nowhere else.
TRANSFORMERS_BY_QUESTION = ("backends/torch/polyaccel_torch/estimate.py", "transformers")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_names_a_framework_that_is_not_its_own(package: str) -> None:
    found = [
        f"{relative(file)}:{line} imports {module}"
        for file in files_of(package)
        for module, line in imported_modules(tree_of(file))
        if module.partition(".")[0] in FORBIDDEN_FRAMEWORKS[package]
        if (str(relative(file)), module) != TRANSFORMERS_BY_QUESTION
    ]
    assert found == []


def test_a_framework_under_type_checking_or_by_name_would_be_found() -> None:
    source = "if TYPE_CHECKING:\n    import torch\nflax = importlib.import_module('flax.nnx')\nfrom jax import numpy"
    assert {module for module, _ in imported_modules(ast.parse(source))} == {"torch", "jax", "flax.nnx"}


def test_every_module_of_the_core_has_a_layer() -> None:
    """import-linter skips a layer in brackets that does not exist; this is the other half: nothing in the tree lacks one."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    named = {name.strip(" ()") for layer in layers for name in layer.replace(":", "|").split("|")}
    present = {
        entry.stem
        for entry in PACKAGES["polyaccel"].iterdir()
        if (entry.suffix == ".py" or (entry / "__init__.py").exists()) and entry.stem != "__init__"
    }
    assert present - named == set()
