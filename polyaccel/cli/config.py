"""`polyaccel config`: asks for, writes, shows and checks the configuration file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyaccel.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `polyaccel config`; without one it asks."""
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument(
        "--file",
        "--config-file",
        "--config_file",
        type=Path,
        help="the file (default: polyaccel.toml here, else the user's)",
    )
    commands = parser.add_subparsers(dest="action", metavar="action")
    parser.add_argument(
        "--file", "--config-file", "--config_file", type=Path, dest="asked_file", help="where the answers go"
    )
    default = commands.add_parser(
        "default", parents=[file], help="write a file with every setting, commented, at its default"
    )
    default.add_argument("--force", action="store_true", help="replace an existing file")
    commands.add_parser("show", parents=[file], help="every setting that is in force here, and where it comes from")
    setter = commands.add_parser(
        "set", parents=[file], help="change one setting and keep the rest of the file as it is"
    )
    setter.add_argument("name", help="such as mixed_precision or mesh.fsdp")
    setter.add_argument("value")
    checker = commands.add_parser("check", help="name every mistake of a file, with its line")
    checker.add_argument("path", type=Path, nargs="?", help="the file (default: the one in force)")
    translator = commands.add_parser("from-accelerate", help="translate a configuration of Hugging Face Accelerate")
    translator.add_argument("path", type=Path, help="the YAML file that `accelerate config` wrote")
    translator.add_argument("--output", "-o", type=Path, help="where to write (default: print)")


def run(options: argparse.Namespace) -> int:
    """Run the chosen action; 1 when `check` found mistakes."""
    if options.action is None:
        from polyaccel.cli.config_questions import ask

        return ask(options.asked_file)
    actions = {"default": _default, "show": _show, "set": _set, "check": _check, "from-accelerate": _from_accelerate}
    return actions[options.action](options)


def _default(options: argparse.Namespace) -> int:
    from polyaccel.config.resolve import user_config_file
    from polyaccel.config.writing import template, write

    path = options.file or user_config_file()
    if path.exists() and not options.force:
        raise ConfigError(f"{path} exists already", "use --force to replace it, or --file to write another")
    write(path, template())
    print(f"wrote {path}: every setting is there as a comment with its default; remove the # of what you change")
    return 0


def _show(options: argparse.Namespace) -> int:
    from polyaccel.config.resolve import config_file, gather
    from polyaccel.config.settings import SETTINGS

    path = options.file or config_file()
    gathered = gather(file=path)
    width = max(map(len, SETTINGS))
    print(f"file: {path or 'none'}")
    for name, setting in SETTINGS.items():
        value = gathered.values.get(name, setting.default)
        print(f"{name:{width}}  {_text(value):16}  {gathered.sources.get(name, 'default')}")
    gathered.raise_problems()
    return 0


def _set(options: argparse.Namespace) -> int:
    from polyaccel.config.resolve import config_file, user_config_file
    from polyaccel.config.settings import SETTINGS, unknown
    from polyaccel.config.writing import set_value

    setting = SETTINGS.get(options.name)
    if setting is None:
        raise ConfigError(f"{options.name} {unknown(options.name)}", "`polyaccel config show` lists all settings")
    try:
        value = setting.parse(options.value)
    except ValueError as error:
        raise ConfigError(f"{options.name}={options.value!r} {error}", f"{options.name}: {setting.help}") from None
    path = options.file or config_file() or user_config_file()
    set_value(path, options.name, value)
    print(f"{path}: {options.name} = {_text(value)}")
    return 0


def _check(options: argparse.Namespace) -> int:
    from polyaccel.config.files import read_file
    from polyaccel.config.resolve import Gathered, config_file, config_of

    path = options.path or config_file()
    if path is None:
        raise ConfigError("no configuration file is in force", "give a path, or make one: `polyaccel config default`")
    read = read_file(path)
    for note in read.notes:
        print(f"note: {note}")
    gathered = Gathered(read.values, read.sources, read.problems)
    config_of(gathered)
    print(f"{path}: {len(read.values)} setting{'' if len(read.values) == 1 else 's'}, no mistakes")
    return 0


def _from_accelerate(options: argparse.Namespace) -> int:
    from polyaccel.config import accelerate_yaml
    from polyaccel.config.files import read_entries, read_file
    from polyaccel.config.resolve import Gathered
    from polyaccel.config.settings import SETTINGS
    from polyaccel.config.writing import document, write

    if not accelerate_yaml.is_accelerate(entry.name for entry in read_entries(options.path)):
        raise ConfigError(
            f"{options.path} is not from Accelerate: it has neither compute_environment nor distributed_type",
            "give the file that `accelerate config` wrote (default_config.yaml)",
        )
    read = read_file(options.path)
    for note in read.notes:
        print(f"note: {note}", file=sys.stderr)
    Gathered(problems=read.problems).raise_problems()
    changed: Mapping[str, Any] = {name: v for name, v in read.values.items() if v != SETTINGS[name].default}
    text = document(changed, title=f"Translated from {options.path.name}")
    if options.output is None:
        print(text, end="")
    else:
        write(options.output, text)
        print(f"wrote {options.output}")
    return 0


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        import json

        return json.dumps(value) if value else "-"
    return (",".join(value) if isinstance(value, tuple) else "" if value is None else str(value)) or "-"
