"""Finds backends, bridges, trackers and readers of files by entry point, ours and third parties' alike; imports none until asked for."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from polyaccel.dialects import Dialect
from polyaccel.errors import BackendNotFoundError, BackendUnavailableError, UnsupportedError, nearest
from polyaccel.protocols import Backend, Bridge
from polyaccel.stored import TreeFiles

BACKENDS = "polyaccel.backends"
BRIDGES = "polyaccel.bridges"
TRACKERS = "polyaccel.trackers"
TREE_FILES = "polyaccel.tree_files"
# For "auto". torch_xla is only imported by who means it, and a jax that is loaded beside torch is often some library's.
_PREFERENCE = ("torch", "jax", "xla")
_PREFERENCE_LOADED = ("xla", "torch", "jax")


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


_registered: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Make a backend known to this process only, without packaging: for tests and notebooks."""
    _registered[backend.name] = backend


def backend_names() -> list[str]:
    """Names that `Accelerator(backend=...)` takes beside "auto"."""
    return sorted({*_entries(BACKENDS), *_registered})


def load_backend(name: str) -> Backend:
    """The backend of that name, not opened. Raises BackendNotFoundError with the nearest name."""
    if name in _registered:
        return _registered[name]
    entry = _entries(BACKENDS).get(name)
    if entry is None:
        raise BackendNotFoundError(f"backend={name!r} is unknown", nearest(name, [*backend_names(), "auto"]))
    backend: Backend = entry.load()()
    return backend


def choose_backend(name: str) -> Backend:
    """The backend of that name, or for "auto" the usable one whose framework the script has loaded, else the first usable.

    Raises BackendNotFoundError for an unknown name and BackendUnavailableError, with the command that cures it, for one that
    cannot be used here.
    """
    if name != "auto":
        backend = load_backend(name)
        probe = backend.probe()
        if not probe.is_usable:
            raise BackendUnavailableError(f"backend={name!r} cannot be used here: {probe.reason}", probe.cure)
        return backend
    return automatic_choice()[0]


def automatic_choice() -> tuple[Backend, str]:
    """The backend that "auto" stands for here, and why, in words that follow its name. Raises BackendUnavailableError."""
    candidates = [load_backend(known) for known in _in_order(_PREFERENCE)]
    probes = [(backend, backend.probe()) for backend in candidates]
    usable = [(backend, probe) for backend, probe in probes if probe.is_usable]
    if not usable:
        reasons = "; ".join(f"{backend.name}: {probe.reason}" for backend, probe in probes) or "none is installed"
        raise BackendUnavailableError(
            f"no backend can be used here ({reasons})",
            next((p.cure for _, p in probes if p.cure), "pip install 'polyaccel[torch]'"),
        )
    found = {backend.name: (backend, probe) for backend, probe in usable}
    loaded = [known for known in _in_order(_PREFERENCE_LOADED) if known in found and found[known][1].is_loaded]
    chosen, probe = found[loaded[0]] if loaded else usable[0]
    why = "its framework is loaded" if loaded else f"the first of {', '.join(found)}, the installed ones"
    if probe.device is not None:
        return chosen, f"{why}, and it computes on the {probe.device.upper()} of this machine"
    for other, seen in usable:
        if seen.device is not None and other.capabilities.dialect == chosen.capabilities.dialect:
            return (
                other,
                f"it speaks the same language as {chosen.name!r}, and it alone finds the {seen.device.upper()} of this machine",
            )
    return chosen, why


def _in_order(preference: tuple[str, ...]) -> list[str]:
    return sorted(backend_names(), key=lambda name: preference.index(name) if name in preference else len(preference))


def tracker_entries() -> dict[str, EntryPoint]:
    """Installed trackers by name; `polyaccel.tracking` loads and checks them."""
    return _entries(TRACKERS)


def load_tree_files(name: str) -> TreeFiles:
    """Whoever reads and writes another library's files: "torch", "dcp", "orbax". Raises UnsupportedError when nobody is installed."""
    entry = _entries(TREE_FILES).get(name)
    if entry is None:
        raise UnsupportedError(
            f"nothing that is installed reads or writes the files of {name}", nearest(name, _entries(TREE_FILES))
        )
    files: TreeFiles = entry.load()()
    return files


def served_by(backend_name: str, part: str, what: str) -> Any:
    """The module that a backend gives for a part of Accelerate's surface, by the name of its method. Imports the framework.

    Raises what `choose_backend` raises, and UnsupportedError, saying `what` it does not do, for a third party's adapter without it.
    """
    backend: Any = choose_backend(backend_name)
    if not hasattr(backend, part):
        raise UnsupportedError(
            f"backend {backend_name!r} is {type(backend).__name__} here, which {what}", "use polyaccel's own adapter"
        )
    return getattr(backend, part)()


def load_bridge(source: Dialect, target: Dialect, *, backend: str) -> Bridge:
    """The bridge between two dialects. Raises UnsupportedError, naming the backend, when none is installed."""
    for entry in _entries(BRIDGES).values():
        if entry.name == f"{source}_to_{'jax' if target == 'flax' else target}":
            loaded: Any = entry.load()
            bridge: Bridge = loaded()
            return bridge
    raise UnsupportedError(
        f"backend {backend!r} speaks {target}, and no bridge from {source} is installed",
        "pip install 'polyaccel[bridges]', or choose a backend of the script's own dialect",
    )
