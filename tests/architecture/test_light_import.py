"""Importing the package, the facade, an adapter or a backend's description loads no framework and costs next to nothing."""

from __future__ import annotations

import sys

import pytest
from source_tree import FRAMEWORKS, PACKAGES, run_python

# Not frameworks, but each costs more than the whole package: they are imported where they are used.
HEAVY = frozenset({"numpy", "safetensors", "yaml", "rich", "asyncio", "multiprocessing", "unittest"})

_NEW_MODULES = """
import json, sys
before = set(sys.modules)
{statement}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a statement adds to a fresh interpreter."""
    return set(run_python(_NEW_MODULES.format(statement=statement)))


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_no_framework(package: str) -> None:
    assert loaded_by(f"import {package}") & (FRAMEWORKS | HEAVY) == set()


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "polyaccel"])
def test_importing_an_adapter_does_not_import_another_one(package: str) -> None:
    others = set(PACKAGES) - {package, "polyaccel"}
    assert loaded_by(f"import {package}") & others == set()


@pytest.mark.parametrize(
    "statement",
    [
        "from polyaccel import Accelerator",
        "from polyaccel.utils import set_seed",
        "from polyaccel.data_loader import DataLoaderShard, prepare_data_loader; isinstance([], DataLoaderShard)",
        "import polyaccel.cli.main",
        "import polyaccel.protocols, polyaccel.plan, polyaccel.registry",
        "import polyaccel.testing",
    ],
)
def test_the_facade_and_the_command_line_load_no_framework(statement: str) -> None:
    assert loaded_by(statement) & FRAMEWORKS == set()


def test_reading_what_a_backend_can_do_and_probing_it_loads_no_framework() -> None:
    statement = (
        "from polyaccel.registry import backend_names, load_backend\n"
        "names = backend_names()\n"
        "assert {'torch', 'xla', 'jax'} <= set(names), names\n"
        "for name in names:\n"
        "    backend = load_backend(name)\n"
        "    assert backend.name == name\n"
        "    backend.capabilities, backend.probe()"
    )
    assert loaded_by(statement) & FRAMEWORKS == set()


def test_import_polyaccel_costs_less_than_30_ms_of_cpu() -> None:
    """CPU time of the process, so that other work on the machine does not count; the best of seven, because caches start cold."""
    code = (
        "import json, time\n"
        "start = time.process_time()\n"
        "import polyaccel\n"
        "print(json.dumps((time.process_time() - start) * 1000))"
    )
    best_ms = min(run_python(code) for _ in range(7))
    assert best_ms < 30, (
        f"import polyaccel took {best_ms:.1f} ms of CPU; python -X importtime -c 'import polyaccel' shows where"
    )


def test_the_measuring_interpreter_can_see_a_framework() -> None:
    """The assertions above would hold in an environment without frameworks too; here they must have something to find."""
    installed = "[n for n in NAMES if importlib.util.find_spec(n)]"
    found = run_python(f"import importlib.util, json; NAMES = {sorted(FRAMEWORKS)!r}; print(json.dumps({installed}))")
    assert found, f"no framework is installed in {sys.prefix}"
