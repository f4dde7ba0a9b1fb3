"""The schema as a flat table: every setting by its dotted name, and how its text and its values are checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import Any

from polyaccel.config.schema import MESH_HELP, SECTIONS, Config
from polyaccel.errors import ConfigError, nearest
from polyaccel.mesh import MeshSpec

PREFIX = "POLYACCEL_"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_KINDS = {bool: "bool", int: "int", float: "float", str: "str", tuple: "list", dict: "table"}
_WORDS = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "a text",
    "list": "a list of names",
    "table": 'a table of options, such as {"max_autotune": true}',
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its name in a file (`mesh.tensor`), in the environment and as a flag follow from each other."""

    name: str
    kind: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    least: int | None = None
    reads: Callable[[str], Any] | None = None

    @property
    def variable(self) -> str:
        """Its environment variable: POLYACCEL_MESH__TENSOR."""
        return PREFIX + self.name.upper().replace(".", "__")

    @property
    def flag(self) -> str:
        """Its flag of `polyaccel launch`; a launch setting goes without its section there."""
        return "--" + self.name.removeprefix("launch.").replace("_", "-")

    def parse(self, text: str) -> Any:
        """The value that a text from the environment, a flag or a YAML scalar means. Raises ValueError that says why not."""
        if self.kind == "bool":
            if text.lower() not in _TRUE + _FALSE:
                raise ValueError("is not true or false")
            return text.lower() in _TRUE
        if self.kind == "int":
            try:
                value = int(text)
            except ValueError:
                raise ValueError("is not an integer") from None
            return self.check(value)
        if self.kind == "float":
            try:
                return self.check(float(text))
            except ValueError:
                raise ValueError("is not a number") from None
        if self.kind == "table":
            try:
                return self.check(json.loads(text))
            except json.JSONDecodeError:
                raise ValueError(f"is not {_WORDS['table']}, in JSON") from None
        if self.kind == "list":
            return self.check(tuple(part.strip() for part in text.split(",") if part.strip()))
        return self.check(text)

    def check(self, value: Any) -> Any:
        """The value, a list as a tuple, members of enums as what they stand for. Raises ValueError that says why it cannot be."""
        value = value.value if isinstance(value, Enum) else value
        if self.kind == "list" and isinstance(value, (list, tuple, set)):
            value = tuple(item.value if isinstance(item, Enum) else item for item in value)
        elif self.kind == "float" and type(value) is int:
            value = float(value)
        elif self.kind == "table" and isinstance(value, Mapping):
            value = dict(value)
        if _KINDS.get(type(value)) != self.kind:
            raise ValueError(f"is not {_WORDS[self.kind]}")
        if self.least is not None and value < self.least:
            raise ValueError(f"must be at least {self.least}")
        if self.kind == "float" and not math.isfinite(value):
            raise ValueError("is not a number")
        if self.kind == "table":
            _check_table(value)
        if self.choices and self.kind == "list":
            for name in value:
                if name not in self.choices:
                    raise ValueError(f"names {name!r}: {nearest(str(name), self.choices)}")
        elif self.reads is not None:
            for item in value:
                try:
                    self.reads(item)
                except ConfigError as error:
                    raise ValueError(f"has a mistake: {error.message}; {error.hint}") from None
        elif self.choices and value not in self.choices:
            raise ValueError(f"is unknown: {nearest(value, self.choices)}")
        return value

    def text(self, value: Any) -> str:
        """The text that `parse` reads as this value."""
        if self.kind == "table":
            return json.dumps(value)
        return ",".join(value) if self.kind == "list" else str(value)


def _check_table(value: Mapping[Any, Any]) -> None:
    for name, option in value.items():
        if not isinstance(name, str) or not isinstance(option, (bool, int, float, str)):
            raise ValueError(f"has {name!r}: {option!r}, and options are names with numbers, texts or true and false")


def _flatten() -> Iterator[Setting]:
    for section, schema in (("", Config), *((name + ".", section) for name, section in SECTIONS.items())):
        for f in fields(schema):
            if f.name == "mesh":
                sizes = MeshSpec().sizes
                yield from (Setting(f"mesh.{axis}", "int", sizes[axis], MESH_HELP[axis]) for axis in sizes)
            elif "help" in f.metadata:
                default = f.default if f.default_factory is MISSING else f.default_factory()
                kind = f.metadata["kind"] or _KINDS[type(default)]
                least = f.metadata["least"] if kind in ("int", "float") else None
                choices, reads = f.metadata["choices"], f.metadata["reads"]
                yield Setting(section + f.name, kind, default, f.metadata["help"], choices, least, reads)


SETTINGS: Mapping[str, Setting] = {setting.name: setting for setting in _flatten()}
_BY_VARIABLE: Mapping[str, Setting] = {setting.variable: setting for setting in SETTINGS.values()}


def of_variable(variable: str) -> Setting | None:
    """The setting that an environment variable names."""
    return _BY_VARIABLE.get(variable)


def unknown(name: str, known: Mapping[str, Any] = SETTINGS) -> str:
    """What to say of a name that is no setting."""
    if f"launch.{name}" in known:
        return f"is no setting: did you mean 'launch.{name}'?"
    return f"is no setting: {nearest(name, known)}"


def unknown_variable(variable: str) -> str:
    """What to say of a POLYACCEL_ variable that names no setting."""
    return f"is no setting: {nearest(variable, _BY_VARIABLE)}"
