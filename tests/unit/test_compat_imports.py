"""Accelerate's module names: which module each finds, and that two names never give two copies of it."""

import importlib
import importlib.util
import inspect
import subprocess
import sys

import pytest

from polyaccel.errors import UnsupportedError


@pytest.mark.parametrize(
    "name",
    ["state", "logging", "memory_utils", "utils"]
    + [
        f"utils.{name}"
        for name in ("dataclasses", "environment", "imports", "memory", "operations", "random", "versions")
    ],
)
def test_a_name_of_accelerate_is_the_module_in_compat_itself(name):
    assert importlib.import_module(f"polyaccel.{name}") is importlib.import_module(f"polyaccel.compat.{name}")
    assert importlib.util.find_spec(f"polyaccel.{name}") is not None


def test_import_statements_bind_the_names_that_accelerate_scripts_use():
    import polyaccel.utils.operations
    from polyaccel.state import PartialState
    from polyaccel.utils import gather

    assert polyaccel.utils.operations.gather is gather
    assert polyaccel.PartialState is PartialState


def test_a_submodule_imported_first_under_its_own_name_is_found_under_the_other():
    code = (
        "import polyaccel.compat.utils.random as own\n"
        "import polyaccel.utils.random as theirs\n"
        "assert own is theirs and own.__spec__.name == 'polyaccel.compat.utils.random'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["polyaccel.nothing", "polyaccel.utils.nothing", "polyaccel.state.nothing"])
def test_a_name_that_is_nowhere_is_an_ordinary_import_error(name):
    with pytest.raises(ModuleNotFoundError, match=name.replace(".", r"\.")):
        importlib.import_module(name)


def test_a_module_of_the_core_is_not_looked_for_in_compat():
    import polyaccel.memory

    assert polyaccel.memory.__spec__.origin.endswith("polyaccel/memory.py")


def test_reloading_the_package_adds_no_second_finder():
    code = (
        "import importlib, sys, polyaccel\n"
        "before = len(sys.meta_path)\n"
        "importlib.reload(polyaccel)\n"
        "assert len(sys.meta_path) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_name_that_utils_offers_is_there():
    import polyaccel.utils

    assert [name for name in polyaccel.utils.__all__ if not hasattr(polyaccel.utils, name)] == []


def test_a_module_that_compat_lacks_something_for_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "polyaccel.logs", None)
    monkeypatch.delitem(sys.modules, "polyaccel.logging", raising=False)
    monkeypatch.delitem(sys.modules, "polyaccel.compat.logging", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"polyaccel\.logs"):
        importlib.import_module("polyaccel.logging")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("megatron_lm_initialize", "mesh"),
        ("merge_fsdp_weights", "polyaccel checkpoint convert"),
        ("HfDeepSpeedConfig", "mesh"),
        ("OPTIMIZER_NAME", "safetensors"),
    ],
)
def test_a_name_of_what_is_no_engine_here_says_what_to_use_instead(name, instead):
    utils = importlib.import_module("polyaccel.utils")
    with pytest.raises(UnsupportedError, match=name) as caught:
        getattr(utils, name)
    assert instead in caught.value.hint


def test_pipelines_are_refused_and_not_offered():
    from polyaccel import prepare_pippy
    from polyaccel.utils import is_pippy_available

    assert not is_pippy_available()
    with pytest.raises(UnsupportedError, match="prepare_pippy") as caught:
        prepare_pippy(object())
    assert "dispatch_model" in caught.value.hint


def test_every_name_of_accelerate_itself_is_there():
    accelerate = pytest.importorskip("accelerate")
    import polyaccel

    offered = {name for name, value in vars(accelerate).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert {name for name in offered if not hasattr(polyaccel, name)} == set()
