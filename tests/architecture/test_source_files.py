"""Rules that every file of the five packages keeps: size, docstrings, one place for the environment, nothing that runs foreign code."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from source_tree import REPOSITORY, called_name, dotted_name, files_of, imported_modules, relative, tree_of

MAX_LINES = 600

READERS_OF_THE_ENVIRONMENT = {"polyaccel/config/resolve.py", "polyaccel/launch/rendezvous.py"}
# Accelerate's own tools for scripts that change or read their environment; nothing of ours is decided by them.
READERS_OF_THE_ENVIRONMENT |= {"polyaccel/compat/utils/environment.py"}

# Modules that run code, or may, when they load what somebody else wrote.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
# Accelerate reads its folders in no other form; what is written is checked to be plain containers of tensors and numbers.
WRITERS_OF_PICKLES = {"backends/torch/polyaccel_torch/files/torch_file.py": ["torch.save"]}
UNSAFE_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "torch.save"}


def unsafe_constructs(tree: ast.AST) -> list[str]:
    """What the tree has of pickles, shells, evaluated strings and loaders that run code, each with its line."""
    found = [
        f"{line}: import {name}" for name, line in imported_modules(tree) if name.partition(".")[0] in UNSAFE_MODULES
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called_name(node)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in UNSAFE_CALLS:
            found.append(f"{node.lineno}: {name}")
        if _is(keywords.get("shell"), True):
            found.append(f"{node.lineno}: {name}(shell=True)")
        if name == "torch.load" and not _is(keywords.get("weights_only"), True):
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if name.endswith(("np.load", "numpy.load")) and _is(keywords.get("allow_pickle"), True):
            found.append(f"{node.lineno}: numpy.load(allow_pickle=True)")
    return found


def environment_reads(tree: ast.AST) -> list[int]:
    """Lines that touch the process environment."""
    lines = [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and dotted_name(node) in _ENVIRONMENT
    ]
    lines += [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module == "os"
        and any(f"os.{alias.name}" in _ENVIRONMENT for alias in node.names)
    ]
    return lines


_ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}


def _is(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_file_is_longer_than_600_lines() -> None:
    folders = ("tests", "examples", "benchmarks", "scripts")
    files = files_of() + [file for folder in folders for file in (REPOSITORY / folder).rglob("*.py")]
    lengths = {relative(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_every_module_opens_with_a_docstring() -> None:
    assert [relative(file) for file in files_of() if not ast.get_docstring(tree_of(file))] == []


def test_the_environment_is_read_in_few_files() -> None:
    readers = {relative(file): environment_reads(tree_of(file)) for file in files_of()}
    assert {name: lines for name, lines in readers.items() if lines and name not in READERS_OF_THE_ENVIRONMENT} == {}


@pytest.mark.parametrize(
    "source", ["os.environ['A']", "os.getenv('A')", "os.environ.get('A')", "from os import environ"]
)
def test_every_way_to_read_the_environment_is_noticed(source: str) -> None:
    assert environment_reads(ast.parse(source)) == [1]


def test_nothing_runs_code_that_it_loads() -> None:
    found = {relative(file): unsafe_constructs(tree_of(file)) for file in files_of()}
    unsafe = {
        name: [text.partition(": ")[2] for text in constructs] for name, constructs in found.items() if constructs
    }
    assert unsafe == WRITERS_OF_PICKLES


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "exec(text)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_every_construct_that_runs_code_is_noticed(source: str) -> None:
    assert unsafe_constructs(ast.parse(source)) != []


def test_ordinary_code_is_not_taken_for_unsafe() -> None:
    source = "model.eval()\nyaml.safe_load(text)\ntorch.load(path, weights_only=True)\nre.compile(text)\nsubprocess.run([command])"
    assert unsafe_constructs(ast.parse(source)) == []


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    home = re.compile(r"(?<![\w.$}])/(home|root|Users)/\w")
    found = [relative(file) for file in files_of() if home.search(file.read_text(encoding="utf-8"))]
    assert found == []


def test_every_public_name_is_documented() -> None:
    """The names a user imports, and each method that a user can call on them."""
    import polyaccel

    silent = []
    for name in polyaccel.__all__:
        value = getattr(polyaccel, name)
        if inspect.isclass(value):
            members = {f"{name}.{key}": member for key, member in vars(value).items() if not key.startswith("_")}
            callables = {
                key: member for key, member in members.items() if callable(member) or isinstance(member, property)
            }
            silent += [key for key, member in callables.items() if not inspect.getdoc(member)]
        if (inspect.isclass(value) or inspect.isroutine(value)) and not inspect.getdoc(value):
            silent.append(name)
    assert silent == []
