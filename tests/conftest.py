"""What every test stands on: a clean environment, four virtual devices per framework, and no folder left out without a word.

Warnings are errors (pyproject.toml, `filterwarnings`). A folder whose framework is not installed here is not collected, and the
end of the run says so; `--require` turns that into an error, which is how scripts/test calls it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# What the files of a folder import at their top. Folders that are not named here (unit, architecture, conformance, launch) run in
# every environment and choose their engines by probe.
NEEDS = {
    "adapter_torch": ("torch",),
    "adapter_xla": ("torch_xla",),
    "adapter_jax": ("jax", "flax", "optax"),
    "bridges": ("torch", "jax", "flax", "optax", "transformers"),
    "coverage": ("torch", "jax", "flax", "optax", "expecttest"),
    "parity": ("torch", "sklearn"),  # and the engine that is here: jax, or torch_xla
    "convert": ("torch", "jax", "flax", "optax", "accelerate", "transformers", "orbax"),
    "examples": ("torch", "jax", "flax", "optax", "sklearn"),
}

# A developer's own settings, or a launcher around pytest, must not decide what a test sees.
_FOREIGN = ("POLYACCEL_", "ACCELERATE_", "JAX_", "TORCHELASTIC_", "PJRT_", "XLA_")
_FOREIGN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")

# Files of minutes and few tests, most of them in processes of their own. xdist would begin them last, and one of its workers would wait
# for the other: with `--no-loadscope-reorder`, as scripts/test calls it, the order below counts.
BEGUN_FIRST = (
    "parity/test_parity.py",
    "launch/test_slurm.py",
    "launch/test_preempted_jobs.py",
    "launch/test_two_hosts.py",
    "adapter_jax/test_jax_mesh_processes.py",
    "checkpoint/test_kill_runs.py",
    "checkpoint/test_preemption_processes.py",
    "bridges/test_torch_remat.py",
    "adapter_jax/test_jax_sequence_processes.py",
)

_VIRTUAL_DEVICES = 4
_ENGINES = ("torch", "xla", "jax")
_CACHE_FOLDER = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("polyaccel")
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cpu: everything but tests/device, on four virtual devices. cuda: tests/device on the real ones.",
    )
    group.addoption(
        "--require",
        default="",
        metavar="MODULES",
        help="comma-separated modules that must be installed; without one of them the run stops instead of leaving folders out",
    )
    group.addoption(
        "--engine",
        choices=_ENGINES,
        help="leave out what is about other engines only: tests whose name in brackets, or marker `engine`, has one but not this one",
    )
    group.addoption("--libtpu", metavar="FOLDER", help="where the compiler for TPUs is installed: pip install --target")


def pytest_configure(config: pytest.Config) -> None:
    missing = [name for name in _names(config.getoption("--require")) if not _is_installed(name)]
    if missing:
        raise pytest.UsageError(f"--require: not installed here: {', '.join(missing)}")
    gone = [name for name in BEGUN_FIRST if not (TESTS / name).exists()]
    if gone:
        raise pytest.UsageError(f"BEGUN_FIRST in tests/conftest.py has what is no file any more: {', '.join(gone)}")
    if hasattr(config, "workerinput"):
        return  # an xdist worker inherits the environment that its parent set below
    for name in list(os.environ):
        if name.startswith(_FOREIGN) or name in _FOREIGN_NAMES:
            del os.environ[name]
    config.stash[_CACHE_FOLDER] = tempfile.mkdtemp(prefix="polyaccel-tests-")
    os.environ.update(
        XDG_CACHE_HOME=config.stash[_CACHE_FOLDER],  # compilation caches of one run are not the next run's
        XDG_CONFIG_HOME=config.stash[_CACHE_FOLDER],  # nor is the developer's own configuration file
        HF_HUB_OFFLINE="1",  # tests build models from configs and download nothing
        MPLBACKEND="Agg",
        OMP_NUM_THREADS="1",  # two xdist workers with two threads each are slower than with one
    )
    if config.getoption("--device") == "cpu":
        os.environ.update(
            CUDA_VISIBLE_DEVICES="",
            JAX_PLATFORMS="cpu",
            # Tests compile for minutes and run for seconds: without LLVM's optimizations, which change no program of XLA's, that is
            # half. tests/parity/mesh_parity.py compiles as a user's script does.
            XLA_FLAGS=f"--xla_force_host_platform_device_count={_VIRTUAL_DEVICES} --xla_backend_optimization_level=0",
            PJRT_DEVICE="CPU",
            CPU_NUM_DEVICES=str(_VIRTUAL_DEVICES),
        )
    else:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch and jax share the device


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(_CACHE_FOLDER, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Files are asked about too: pytest does not ask about a folder that stands on its command line.
    if collection_path != TESTS and collection_path.is_relative_to(TESTS):
        folder = TESTS / collection_path.relative_to(TESTS).parts[0]
        if folder.is_dir() and _why_not(folder.name, config):
            return True
    return None  # pytest's own rules decide


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    engine = config.getoption("--engine")
    if engine is not None:
        about = {item: _engines_of(item) for item in items}
        config.hook.pytest_deselected(items=[item for item in items if about[item] and engine not in about[item]])
        items[:] = [item for item in items if not about[item] or engine in about[item]]
    if hasattr(config, "workerinput"):  # alone, files come as they stand
        counts = Counter(item.path for item in items)
        items.sort(key=lambda item: (_turn(item.path), -counts[item.path]))


def _turn(path: Path) -> int:
    """When a file is begun; behind those of BEGUN_FIRST the one with the most tests comes first, as xdist would have it."""
    name = path.relative_to(TESTS).as_posix() if path.is_relative_to(TESTS) else ""
    return BEGUN_FIRST.index(name) if name in BEGUN_FIRST else len(BEGUN_FIRST)


def _engines_of(item: pytest.Item) -> set[str]:
    """The engines that a test says it is about."""
    callspec = getattr(item, "callspec", None)
    words = set(callspec.id.replace("_", "-").split("-")) if callspec else set()
    marked = {name for marker in item.iter_markers("engine") for name in marker.args}
    return words & set(_ENGINES) or marked


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name each folder that was asked for and left out, so that a green line never means less than it seems to."""
    asked = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    left_out = {
        folder.name: reason
        for folder in sorted(TESTS.iterdir())
        if folder.is_dir()
        and any(folder.is_relative_to(path) or path.is_relative_to(folder) for path in asked)
        and (reason := _why_not(folder.name, config))
    }
    if left_out:
        terminalreporter.section("not collected here")
        for name, reason in left_out.items():
            terminalreporter.write_line(f"tests/{name}: {reason}")


def _why_not(folder: str, config: pytest.Config) -> str:
    """Why a folder cannot run here, or an empty string."""
    on_device = config.getoption("--device") == "cuda"
    if folder == "device" and not on_device:
        return "needs an accelerator: pytest --device cuda tests/device"
    if folder not in ("device", "__pycache__") and on_device:
        return "written for four virtual devices: run it with --device cpu"
    missing = [name for name in NEEDS.get(folder, ()) if not _is_installed(name)]
    return f"needs {', '.join(missing)}" if missing else ""


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _names(comma_separated: str) -> list[str]:
    return [name.strip() for name in comma_separated.split(",") if name.strip()]
