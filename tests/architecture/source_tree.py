"""The packages of this repository as files and syntax trees, for the tests that hold the design's promises."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]

PACKAGES = {
    "polyaccel": REPOSITORY / "polyaccel",
    "polyaccel_torch": REPOSITORY / "backends/torch/polyaccel_torch",
    "polyaccel_xla": REPOSITORY / "backends/xla/polyaccel_xla",
    "polyaccel_jax": REPOSITORY / "backends/jax/polyaccel_jax",
    "polyaccel_bridges": REPOSITORY / "backends/bridges/polyaccel_bridges",
}

FRAMEWORKS = frozenset(
    {"torch", "torch_xla", "torchax", "jax", "jaxlib", "flax", "optax", "grain", "transformers", "accelerate"}
)


def files_of(*packages: str) -> list[Path]:
    """Every Python file of the named packages (of all, without names), sorted."""
    folders = [PACKAGES[name] for name in packages or PACKAGES]
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def relative(file: Path) -> str:
    """The file as a reader of the repository names it."""
    return file.relative_to(REPOSITORY).as_posix()


@functools.cache
def tree_of(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each absolute module that the tree imports, at any depth and under TYPE_CHECKING too, or by a constant name; with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno
        elif isinstance(node, ast.Call) and called_name(node) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value, node.lineno


def called_name(call: ast.Call) -> str:
    """`torch.load(...)` -> "torch.load"; an empty string where the callee is not a plain dotted name."""
    return dotted_name(call.func)


def dotted_name(node: ast.AST) -> str:
    """`os.environ` -> "os.environ"; an empty string for anything that is not a plain dotted name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([node.id, *reversed(parts)])


def run_python(code: str, *flags: str) -> Any:
    """Run code in a fresh interpreter and return the JSON that it printed last."""
    result = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
