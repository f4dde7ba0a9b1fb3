"""Merges defaults, file, POLYACCEL_* environment, flags and explicit arguments, once. All errors are shown at once.

This file and launch/rendezvous.py are the only readers of the environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from polyaccel.config.schema import SECTIONS, Config
from polyaccel.config.settings import PREFIX, SETTINGS, of_variable, unknown, unknown_variable
from polyaccel.errors import ConfigError
from polyaccel.mesh import MeshSpec

S = TypeVar("S")
FILE_NAME = "polyaccel.toml"
# Set by the launcher, not by users: which engine's processes it started, and where the values that it passes on came from.
_LAUNCHED_BACKEND = "POLYACCEL_LAUNCHED_BACKEND"
_SOURCES = "POLYACCEL_CONFIG_SOURCES"
# A user's: the configuration file, or "off".
_FILE = "POLYACCEL_CONFIG_FILE"
# Accelerate's names of settings; our own counts where both are set.
_ACCELERATE = {
    "ACCELERATE_DEBUG_MODE": "debug",
    "ACCELERATE_USE_CPU": "cpu",
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_DYNAMO_BACKEND": "compile_backend",
    "ACCELERATE_DYNAMO_MODE": "compile_mode",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "compile_fullgraph",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "compile_dynamic",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "compile_regions",
}


@dataclass(slots=True)
class Gathered:
    """Settings by dotted name before they become values of the schema, their sources, and every mistake so far."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, source: str) -> None:
        """Let a value of higher precedence take the place of an earlier one."""
        self.values[name], self.sources[name] = value, source

    def raise_problems(self) -> None:
        """Raise one ConfigError that lists every mistake, if there is any."""
        if self.problems:
            count = "a mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
            listed = "\n".join(f"  - {problem}" for problem in self.problems)
            raise ConfigError(
                f"the configuration has {count}:\n{listed}", "correct the values above where they were given"
            )


def resolve(
    arguments: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    *,
    origins: Mapping[str, str] | None = None,
) -> Config:
    """The Config of `defaults < file < environment < flags < arguments`; an argument that is None was not given.

    `origins`: the argument of the script that a setting came with, where it has another name than the setting.

    The file is the one that POLYACCEL_CONFIG_FILE names ("off" for none), else polyaccel.toml in the working folder, else the
    user's (`user_config_file`). Flags arrive through the environment that `polyaccel launch` gives its workers.

    Raises ConfigError that lists every unknown or impossible value with its source.
    """
    environment = os.environ if environment is None else environment
    gathered = gather(environment)
    for name, value in arguments.items():
        if value is not None:
            _add_argument(gathered, name, value, f"argument {(origins or {}).get(name, name)}")
    launched = environment.get(_LAUNCHED_BACKEND)
    chosen = gathered.values.get("backend", "auto")
    if launched and chosen not in ("auto", launched):
        gathered.problems.append(
            f"{gathered.sources['backend']}={chosen!r} contradicts the launcher, which started processes for {launched!r}"
            f" (use `polyaccel launch --backend {chosen}`, or leave the argument out)"
        )
    elif launched:
        gathered.values["backend"] = launched
    return config_of(gathered)


def gather(
    environment: Mapping[str, str] | None = None, *, file: Path | None = None, flags: Mapping[str, str] | None = None
) -> Gathered:
    """What file, environment and flags (texts by setting name) say, later ones over earlier ones; mistakes are collected."""
    environment = os.environ if environment is None else environment
    gathered = Gathered()
    path = file or config_file(environment)
    if path is not None:
        _add_file(gathered, path)
    _add_environment(gathered, environment)
    for name, text in (flags or {}).items():
        _add_text(gathered, name, text, f"flag {SETTINGS[name].flag}")
    return gathered


def config_of(gathered: Gathered) -> Config:
    """The Config of gathered settings. Raises ConfigError for all mistakes at once."""
    values = {name: value for name, value in gathered.values.items() if "." not in name}
    sizes = {name.removeprefix("mesh."): size for name, size in gathered.values.items() if name.startswith("mesh.")}
    try:
        values["mesh"] = MeshSpec.of(values.get("mesh") or sizes or None)
    except ConfigError as error:
        gathered.problems.append(f"{error.message} ({error.hint})")
    gathered.raise_problems()
    return Config(**values, sources={name: source for name, source in gathered.sources.items() if not _launches(name)})


def section_of(gathered: Gathered, section: type[S]) -> S:
    """A table of the launcher (LaunchSettings, SlurmSettings, ...) from gathered settings. Raises ConfigError for all mistakes."""
    gathered.raise_problems()
    prefix = next(name for name, schema in SECTIONS.items() if schema is section) + "."
    return section(**{name.removeprefix(prefix): v for name, v in gathered.values.items() if name.startswith(prefix)})


def config_file(environment: Mapping[str, str] | None = None) -> Path | None:
    """The configuration file that is in force, or None. Raises ConfigError when POLYACCEL_CONFIG_FILE names none."""
    environment = os.environ if environment is None else environment
    named = environment.get(_FILE)
    if named:
        return None if named == "off" else Path(named)
    return next((path for path in (Path(FILE_NAME), user_config_file(environment)) if path.is_file()), None)


def user_config_file(environment: Mapping[str, str] | None = None) -> Path:
    """The user's own file: $XDG_CONFIG_HOME/polyaccel/config.toml, or ~/.config/polyaccel/config.toml."""
    environment = os.environ if environment is None else environment
    home = environment.get("XDG_CONFIG_HOME") or Path(environment.get("HOME") or Path.home()) / ".config"
    return Path(home) / "polyaccel" / "config.toml"


def user_cache_folder() -> Path:
    """The folder for what can be computed again (compilation caches): $XDG_CACHE_HOME/polyaccel or ~/.cache/polyaccel."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyaccel"


def environment_for(gathered: Gathered, *, launched: str) -> dict[str, str]:
    """The variables that give a worker these settings and their sources; the launcher's side of `resolve`.

    The worker reads no file of its own: it may run on another machine, or in another folder.
    """
    given = {name: value for name, value in gathered.values.items() if not _launches(name)}
    texts = {SETTINGS[name].variable: SETTINGS[name].text(value) for name, value in given.items()}
    sources = json.dumps({name: gathered.sources[name] for name in given})
    return {**texts, _FILE: "off", _SOURCES: sources, _LAUNCHED_BACKEND: launched}


def inherited_environment() -> dict[str, str]:
    """A copy of this process's environment: for processes that it starts, and for variables that are no settings."""
    return dict(os.environ)


def environment_without_settings() -> dict[str, str]:
    """This process's environment for a process to which none of the settings applies, those of the user's file included."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith((PREFIX, *_ACCELERATE))}
    return {**kept, _FILE: "off"}


@contextmanager
def adopt_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Let this process be a worker with these variables, as if the launcher had started it with them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _launches(name: str) -> bool:
    return name.partition(".")[0] in SECTIONS


def _add_file(gathered: Gathered, path: Path) -> None:
    from polyaccel.config.files import read_file

    read = read_file(path)
    for name, value in read.values.items():
        gathered.add(name, value, read.sources[name])
    gathered.problems += read.problems


def _add_environment(gathered: Gathered, environment: Mapping[str, str]) -> None:
    sources = _sources_of(environment)
    for variable, name in _ACCELERATE.items():
        text = environment.get(variable, "")
        if name == "compile_backend" and text:
            # Accelerate's one name for two settings: whether, and with what.
            gathered.add("compile", text.lower() != "no", f"environment {variable}")
            text = "" if text.lower() == "no" else text.lower()
        if text:
            _add_text(gathered, name, text, f"environment {variable}")
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable in (_LAUNCHED_BACKEND, _SOURCES, _FILE):
            continue
        setting = of_variable(variable)
        if setting is None:
            gathered.problems.append(f"environment {variable} {unknown_variable(variable)}")
        else:
            _add_text(gathered, setting.name, text, sources.get(setting.name, f"environment {variable}"))


def _sources_of(environment: Mapping[str, str]) -> dict[str, str]:
    try:
        sources = json.loads(environment.get(_SOURCES, "{}"))
    except ValueError:
        return {}
    return {str(name): str(source) for name, source in sources.items()} if isinstance(sources, dict) else {}


def _add_text(gathered: Gathered, name: str, text: str, source: str) -> None:
    try:
        gathered.add(name, SETTINGS[name].parse(text), source)
    except ValueError as error:
        gathered.problems.append(f"{source}={text!r} {error}")


def _add_argument(gathered: Gathered, name: str, value: Any, source: str) -> None:
    if name == "mesh":
        for axis in [known for known in gathered.values if known.startswith("mesh.")]:
            del gathered.values[axis]  # a mesh is one value: sizes from elsewhere do not mix into it
        gathered.add(name, value, source)
    elif name not in SETTINGS:
        gathered.problems.append(f"{source} {unknown(name)}")
    else:
        try:
            gathered.add(name, SETTINGS[name].check(value), source)
        except ValueError as error:
            gathered.problems.append(f"{source}: {name}={value!r} {error}")
