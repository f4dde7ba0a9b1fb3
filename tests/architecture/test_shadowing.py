"""No file or folder of the repository hides an installed framework, from whichever folder Python is started.

Each trap was met: `backends/torch/__init__.py`, a test folder `torch` with an `__init__.py`, and `examples/torch.py` all make
`import torch` find the repository's own file.
"""

from __future__ import annotations

import importlib.machinery
import os
from pathlib import Path

import pytest
from source_tree import FRAMEWORKS, REPOSITORY

NAMES = sorted(
    FRAMEWORKS | {"numpy", "safetensors", "yaml", "xla", "wandb", "tensorboard", "ray", "sklearn", "matplotlib", "tqdm"}
)


def folders_that_can_be_on_the_path(root: Path) -> list[Path]:
    """Every folder of the repository that is not inside a package: the place of a script, or where a shell may stand."""
    found = []
    for folder, children, files in os.walk(root):
        children[:] = [name for name in children if not name.startswith((".", "__"))]
        if "__init__.py" in files:
            children.clear()
            continue
        found.append(Path(folder))
    return found


def hidden(root: Path) -> list[str]:
    """Names that would be imported from the repository instead of from an installed package."""
    return [
        f"{folder.relative_to(root)}: {name}"
        for folder in folders_that_can_be_on_the_path(root)
        for name in NAMES
        # A folder without __init__.py is a namespace: its spec has no loader, and an installed package wins over it.
        if (spec := importlib.machinery.PathFinder.find_spec(name, [str(folder)])) is not None
        and spec.loader is not None
    ]


def test_nothing_in_the_repository_hides_a_framework() -> None:
    assert hidden(REPOSITORY) == []


@pytest.mark.parametrize("trap", ["backends/torch/__init__.py", "tests/engines/jax/__init__.py", "examples/torch.py"])
def test_each_trap_that_was_met_is_found(tmp_path: Path, trap: str) -> None:
    (tmp_path / trap).parent.mkdir(parents=True)
    (tmp_path / trap).touch()
    importlib.invalidate_caches()
    assert hidden(tmp_path) != []


def test_the_folders_above_the_adapters_are_no_packages() -> None:
    packages = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("backends/**/__init__.py")]
    assert [path for path in packages if len(Path(path).parts) < 4] == []


def test_file_names_of_tests_are_unique() -> None:
    """Test folders are no packages, so two files of one name would be one module."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert list((REPOSITORY / "tests").rglob("__init__.py")) == []
