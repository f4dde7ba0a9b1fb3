"""`accelerate.utils.versions`: comparisons of the versions of installed packages."""

from __future__ import annotations

import operator
from importlib.metadata import version
from typing import Any

from polyaccel.errors import ConfigError, nearest

_OPERATIONS = {
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
}


def compare_versions(library_or_version: Any, operation: str, requirement_version: str) -> bool:
    """Whether a version, or the one of an installed package, stands to `requirement_version` as `operation` (">=", ...) says.

    Raises ConfigError for an unknown operation and PackageNotFoundError for a package that is not installed.
    """
    from packaging.version import Version, parse

    if operation not in _OPERATIONS:
        raise ConfigError(f"operation={operation!r} compares no versions", nearest(operation, _OPERATIONS))
    found = library_or_version if isinstance(library_or_version, Version) else parse(version(library_or_version))
    return bool(_OPERATIONS[operation](found, parse(requirement_version)))


def is_torch_version(operation: str, version: str) -> bool:
    """Whether the installed torch is of such a version; what follows a + in its name (+cpu) does not count."""
    from packaging.version import Version

    return compare_versions(Version(_torch_version().partition("+")[0]), operation, version)


def _torch_version() -> str:
    return version("torch")
