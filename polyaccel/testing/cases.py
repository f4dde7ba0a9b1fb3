"""Finds the case that is trained on an engine: in its own dialect, or in another one, which a bridge translates."""

from __future__ import annotations

from polyaccel.case import Case
from polyaccel.errors import UnsupportedError
from polyaccel.registry import backend_names, load_backend


def case_for(backend: str, dialect: str | None = None) -> Case:
    """The case of an engine; of `dialect`, that of an installed engine which speaks it. Raises UnsupportedError where there is none."""
    own = load_backend(backend)
    if dialect is None or dialect == own.capabilities.dialect:
        return own.case()
    for name in backend_names():
        other = load_backend(name)
        if other.capabilities.dialect == dialect and other.probe().is_usable:
            case = other.case()
            case.backend = backend
            return case
    raise UnsupportedError(
        f"no engine that speaks {dialect} is installed here, and its scripts cannot be tried on {backend!r}",
        "pip install 'polyaccel[bridges]'",
    )
