"""Reads a configuration file, TOML or YAML, into settings that know their line. It never runs anything and shows all mistakes.

YAML scalars are taken as text and read by the setting's own type, so `mixed_precision: no` is "no" and `seed: 1e3` is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyaccel.config import accelerate_yaml
from polyaccel.config.settings import SETTINGS, unknown
from polyaccel.errors import ConfigError

_TABLES = {name for name, setting in SETTINGS.items() if setting.kind == "table"}
_SECTIONS = {name.rpartition(".")[0] for name in SETTINGS} - {""}
_LARGEST_BYTES = 1 << 20  # a configuration is a page of text; a checkpoint given by mistake is not read into memory


@dataclass(frozen=True, slots=True)
class Text:
    """A YAML scalar as it was written; its setting knows what it means."""

    text: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One `name = value` of a file, nested names joined by dots, and the line where it stands (0 where unknown)."""

    name: str
    value: Any
    line: int


@dataclass(slots=True)
class FileSettings:
    """What a file says: values and sources (`file:line`) by setting name, its mistakes in words, and remarks on the rest."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_file(path: Path) -> FileSettings:
    """The settings of a file: TOML, YAML, or the YAML that `accelerate config` writes.

    Raises ConfigError where nothing can be read from it at all: it is missing, not text, or not TOML or YAML.
    """
    entries = read_entries(path)
    if accelerate_yaml.is_accelerate(entry.name for entry in entries):
        return _of_accelerate(path, entries)
    found = FileSettings()
    for entry in entries:
        where = _where(path, entry)
        setting = SETTINGS.get(entry.name)
        if setting is None:
            if entry.name in _SECTIONS:
                found.problems.append(f"{where}: {entry.name}={_shown(entry.value)} is not a table of settings")
            else:
                found.problems.append(f"{where}: {entry.name} {unknown(entry.name)}")
        elif setting.name in found.values:
            found.problems.append(f"{where}: {entry.name} is given twice; first at {found.sources[setting.name]}")
        else:
            try:
                is_text = isinstance(entry.value, Text)
                value = setting.parse(entry.value.text) if is_text else setting.check(_plain(entry.value))
            except ValueError as error:
                found.problems.append(f"{where}: {entry.name}={_shown(entry.value)} {error}")
            else:
                found.values[setting.name], found.sources[setting.name] = value, where
    return found


def _of_accelerate(path: Path, entries: list[Entry]) -> FileSettings:
    texts = {entry.name: _text(entry.value) for entry in entries}
    lines = {entry.name: _where(path, entry) for entry in entries}
    found = FileSettings()
    for key, answer in accelerate_yaml.translate(texts).items():
        found.notes += [f"{lines[key]}: {note}" for note in answer.notes]
        found.problems += [f"{lines[key]}: {problem}" for problem in answer.problems]
        for name, value in answer.settings.items():
            try:
                found.values[name] = SETTINGS[name].parse(value)
            except ValueError as error:
                found.problems.append(f"{lines[key]}: {key}={value!r} {error}")
            else:
                found.sources[name] = lines[key]
    return found


def _where(path: Path, entry: Entry) -> str:
    return f"{path}:{entry.line}" if entry.line else str(path)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return value.text if isinstance(value, Text) else str(value)


def read_entries(path: Path) -> list[Entry]:
    """Every `name = value` of the file, without judging the names. Raises ConfigError as `read_file` does."""
    text = _text_of(path)
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        return list(_yaml_entries(path, text))
    return list(_toml_entries(path, text))


def _text_of(path: Path) -> str:
    hint = "give the path of a TOML or YAML file; `polyaccel config default` writes one"
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes: that is no configuration file", hint)
        return path.read_text(encoding="utf-8")
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}", hint) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"configuration file {str(path)!r} cannot be read: {reason}", hint) from error


def _toml_entries(path: Path, text: str) -> Iterator[Entry]:
    import tomllib

    try:
        tree = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not TOML: {error}", "a text value needs quotes; a file in YAML is to end in .yaml"
        ) from error
    lines = _toml_lines(text)
    yield from _leaves(tree, "", lines)


def _leaves(tree: dict[str, Any], prefix: str, lines: dict[str, int]) -> Iterator[Entry]:
    for key, value in tree.items():
        name = prefix + key
        if isinstance(value, dict) and name in _TABLES:
            yield Entry(name, value, lines.get(name, 0))
        elif isinstance(value, dict) and value:
            yield from _leaves(value, name + ".", lines)
        elif not isinstance(value, dict) or name not in _SECTIONS:
            yield Entry(name, value, lines.get(name, lines.get(prefix.rstrip("."), 0)))


_TABLE = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


def _toml_lines(text: str) -> dict[str, int]:
    """The line of every key; tomllib tells none. A key inside a multi-line string may be taken for one: only its line is wrong."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _TABLE.match(line):
            table = _dotted(header[1])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault(f"{table}.{_dotted(key[1])}" if table else _dotted(key[1]), number)
    return lines


def _dotted(text: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in text.split("."))


def _yaml_entries(path: Path, text: str) -> Iterator[Entry]:
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # nodes with their lines; no object is ever constructed
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path} is a {root.id}, not a mapping of settings", "write one `name: value` per line")
        yield from _yaml_leaves(path, root, "", frozenset())
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", "correct the line above, or write TOML") from error


def _yaml_leaves(path: Path, node: Any, prefix: str, above: frozenset[int]) -> Iterator[Entry]:
    import yaml

    if id(node) in above:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: an alias contains itself", "write the value out")
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}:{line}: a {key.id} cannot name a setting", "write one `name: value` per line")
        name = prefix + key.value
        if isinstance(value, yaml.MappingNode) and name in _TABLES:
            # The names of a backend's own options: their values are of YAML's types, as nothing here knows them.
            yield Entry(name, yaml.safe_load(yaml.serialize(value)), line)
        elif isinstance(value, yaml.MappingNode):
            if value.value or name not in _SECTIONS:
                yield from _yaml_leaves(path, value, name + ".", above | {id(node)})
        elif isinstance(value, yaml.SequenceNode):
            yield Entry(
                name, [Text(item.value) if isinstance(item, yaml.ScalarNode) else [] for item in value.value], line
            )
        elif value.tag != "tag:yaml.org,2002:null":
            yield Entry(name, Text(value.value), line)


def _plain(value: Any) -> Any:
    return [item.text if isinstance(item, Text) else item for item in value] if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return repr(value.text if isinstance(value, Text) else _plain(value))
