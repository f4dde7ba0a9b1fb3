"""Merges defaults, POLYACCEL_* environment and explicit arguments into one Config, once. All errors are shown at once.

This file and launch/rendezvous.py are the only readers of the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from polyaccel.config.schema import PARTITIONINGS, RNG_TYPES, Config
from polyaccel.errors import ConfigError, nearest
from polyaccel.mesh import MeshSpec
from polyaccel.precision import MIXED_PRECISIONS

PREFIX = "POLYACCEL_"
_LAUNCHED_BACKEND = (
    "POLYACCEL_LAUNCHED_BACKEND"  # set by the launcher, not by users: which engine's processes it started
)
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}
_MESH_AXES = tuple(f.name for f in fields(MeshSpec))


def resolve(arguments: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Config:
    """The Config of `defaults < environment < arguments`; an argument that is None was not given.

    Raises ConfigError that lists every unknown or impossible value with its source.
    """
    environment = os.environ if environment is None else environment
    problems: list[str] = []
    values, sources = _from_environment(environment, problems)
    for name, value in arguments.items():
        if value is not None:
            values[name], sources[name] = value, f"argument {name}"
    launched = environment.get(_LAUNCHED_BACKEND)
    chosen = values.get("backend", "auto")
    if launched and chosen not in ("auto", launched):
        problems.append(
            f"{sources['backend']}={chosen!r} contradicts the launcher, which started processes for {launched!r}"
            f" (use `polyaccel launch --backend {chosen}`, or leave the argument out)"
        )
    elif launched:
        values["backend"] = launched
    if isinstance(values.get("rng_types"), (list, set)):
        values["rng_types"] = tuple(values["rng_types"])
    try:
        values["mesh"] = MeshSpec.of(values.get("mesh"))
    except ConfigError as error:
        problems.append(f"{error.message} ({error.hint})")
        values.pop("mesh")
    config = Config(**values, sources=sources)
    _check(config, sources, problems)
    if problems:
        raise ConfigError(
            "the configuration has {}:\n{}".format(
                "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes",
                "\n".join(f"  - {p}" for p in problems),
            ),
            "correct the values above where they were given",
        )
    return config


def user_cache_folder() -> Path:
    """The folder for what can be computed again (compilation caches): $XDG_CACHE_HOME/polyaccel or ~/.cache/polyaccel."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyaccel"


def environment_for(config: Mapping[str, Any], *, launched: str) -> dict[str, str]:
    """The POLYACCEL_* variables that give a worker these settings; the launcher's side of `resolve`."""
    given = {PREFIX + name.upper(): str(value) for name, value in config.items() if value is not None}
    return {**given, _LAUNCHED_BACKEND: launched}


def inherited_environment() -> dict[str, str]:
    """A copy of this process's environment, for the processes that the launcher starts."""
    return dict(os.environ)


def _from_environment(environment: Mapping[str, str], problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    settings = {f.name: f for f in fields(Config) if f.name not in ("sources", "mesh")}
    mesh: dict[str, int] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable == _LAUNCHED_BACKEND:
            continue
        name, _, axis = variable.removeprefix(PREFIX).lower().partition("__")
        try:
            if name == "mesh" and axis in _MESH_AXES:
                mesh[axis] = int(text)
            elif name in settings and not axis:
                values[name] = _parse(text, settings[name].default)
                sources[name] = f"environment {variable}"
            else:
                known = [PREFIX + s.upper() for s in settings] + [f"{PREFIX}MESH__{a.upper()}" for a in _MESH_AXES]
                problems.append(f"environment {variable} is no setting: {nearest(variable, known)}")
        except ValueError as error:
            problems.append(f"environment {variable}={text!r}: {error}")
    if mesh:
        values["mesh"], sources["mesh"] = mesh, "environment POLYACCEL_MESH__*"
    return values, sources


def _parse(text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise ValueError("expected true or false")
    if isinstance(default, int):
        try:
            return int(text)
        except ValueError:
            raise ValueError("expected an integer") from None
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _check(config: Config, sources: Mapping[str, str], problems: list[str]) -> None:
    def wrong(name: str, why: str) -> None:
        problems.append(f"{sources.get(name, 'default')}: {name}={getattr(config, name)!r} {why}")

    for f in fields(Config):
        default = f.default if f.default is not MISSING else None
        kind = type(default) if default is not None else None
        value = getattr(config, f.name)
        if kind is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            wrong(f.name, f"is a {type(value).__name__}, expected {kind.__name__}")
            return
    for name, known in (("mixed_precision", MIXED_PRECISIONS), ("partitioning", PARTITIONINGS)):
        if getattr(config, name) not in known:
            wrong(name, f"is unknown: {nearest(str(getattr(config, name)), known)}")
    for kind_of_rng in config.rng_types:
        if kind_of_rng not in RNG_TYPES:
            wrong("rng_types", f"names {kind_of_rng!r}: {nearest(str(kind_of_rng), RNG_TYPES)}")
    if config.gradient_accumulation_steps < 1:
        wrong("gradient_accumulation_steps", "must be at least 1")
