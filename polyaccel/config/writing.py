"""Writes configuration files in TOML; a change keeps the user's comments and order."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyaccel.config.settings import SETTINGS
from polyaccel.errors import ConfigError


def document(values: Mapping[str, Any], *, title: str) -> str:
    """A TOML text that sets these values, in the order of the schema."""
    import tomlkit

    text = tomlkit.document()
    text.add(tomlkit.comment(title))
    for name in _in_sections():
        if name in values:
            _put(text, name, values[name])
    return tomlkit.dumps(text)


def template() -> str:
    """A TOML text with every setting as a comment: its default and its meaning."""

    lines = ["# polyaccel: what is a comment here is at its default."]
    section = ""
    for name in _in_sections():
        setting = SETTINGS[name]
        table, _, key = name.rpartition(".")
        if table != section:
            section = table
            lines.append(f"\n[{table}]")
        shown = "" if setting.default is None else _item(setting.default).as_string()
        lines.append(f"\n# {setting.help}\n# {key} = {shown}".rstrip())
    return "\n".join(lines) + "\n"


def set_value(path: Path, name: str, value: Any) -> None:
    """Set one value in a TOML file, which is made if it is missing. Raises ConfigError if the file is no TOML."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        raise ConfigError(f"{path} is YAML, which is read but not written", "edit it, or use --file with a .toml file")
    try:
        text = tomlkit.parse(path.read_text(encoding="utf-8")) if path.exists() else tomlkit.document()
        _put(text, name, value)
    except (TOMLKitError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be changed: {error}", "`polyaccel config check` names its mistakes"
        ) from error
    write(path, tomlkit.dumps(text))


def write(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader never sees half of it. Raises ConfigError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes it readable by the owner alone
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", "use --file to write elsewhere") from error


def _in_sections() -> list[str]:
    """Setting names with those outside a table first: in TOML, a key after a table's header belongs to the table."""
    return sorted(SETTINGS, key=lambda name: "." in name)


def _put(text: Any, name: str, value: Any) -> None:
    import tomlkit

    table, _, key = name.rpartition(".")
    target = text
    if table:
        if table not in text:
            text[table] = tomlkit.table()
        target = text[table]
    target[key] = _item(value)


def _item(value: Any) -> Any:
    import tomlkit

    if isinstance(value, dict):
        item = tomlkit.inline_table()
        item.update(value)
        return item
    return tomlkit.item(list(value) if isinstance(value, tuple) else value)
