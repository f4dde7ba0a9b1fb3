"""The facade forwards and decides nothing: it knows no backend by name, and none of its methods is long."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from source_tree import FRAMEWORKS, PACKAGES, tree_of

FACADE = [PACKAGES["polyaccel"] / "accelerator.py", *sorted((PACKAGES["polyaccel"] / "facade").glob("*.py"))]
BACKEND_NAMES = {"torch", "xla", "jax", "cuda", "tpu", "flax", "nccl", "gloo"}
MAX_STATEMENTS = 15  # of one method, docstring not counted; __init__ wires the parts and may have 30
MAX_STATEMENTS_OF_INIT = 30


def methods() -> list[ast.FunctionDef]:
    return [node for path in FACADE for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]


def statements(function: ast.FunctionDef) -> int:
    count = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1
    return count - (ast.get_docstring(function) is not None)


def names_and_strings(tree: ast.AST) -> set[str]:
    """Every identifier, attribute and string of the code; docstrings and annotations are prose and types, not decisions."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        prose: list[ast.AST | None] = []
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.append(node.value)
        if isinstance(node, ast.FunctionDef):
            prose.append(node.returns)
        if isinstance(node, ast.arg | ast.AnnAssign):
            prose.append(node.annotation)
        skipped.update(id(child) for root in prose if root is not None for child in ast.walk(root))
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


@pytest.mark.parametrize("path", FACADE, ids=lambda path: path.stem)
def test_the_facade_names_no_backend_and_no_framework(path: Path) -> None:
    assert names_and_strings(tree_of(path)) & (BACKEND_NAMES | FRAMEWORKS) == set()


def test_a_branch_on_a_backend_name_would_be_noticed() -> None:
    source = "def f(self) -> 'torch':\n    'torch in prose'\n    return 1 if self.backend == 'jax' else 2"
    assert names_and_strings(ast.parse(source)) & BACKEND_NAMES == {"jax"}


@pytest.mark.parametrize("function", methods(), ids=lambda function: function.name)
def test_no_method_of_the_facade_is_long(function: ast.FunctionDef) -> None:
    allowed = MAX_STATEMENTS_OF_INIT if function.name == "__init__" else MAX_STATEMENTS
    assert statements(function) <= allowed
