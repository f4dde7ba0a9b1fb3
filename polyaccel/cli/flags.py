"""The settings as flags: one for each, in both spellings of dashes, taken from the schema."""

from __future__ import annotations

import argparse

from polyaccel.config.schema import SECTIONS
from polyaccel.config.settings import SETTINGS, Setting


def add_setting_flags(parser: argparse.ArgumentParser, *, of_jobs: bool = True) -> None:
    """A flag for every setting: `--mixed-precision bf16`, `--mesh.fsdp 4`, `--cpu`, `--no-even-batches`.

    Without `of_jobs` those of the script alone, and none of how and where its processes start.
    """
    groups = {"": parser.add_argument_group("settings of the script (an argument of Accelerator(...) goes before)")}
    for section in SECTIONS if of_jobs else ():
        title = "settings of the job" if section == "launch" else f"with --on {section.replace('_', '-')}"
        groups[section] = parser.add_argument_group(title)
    for setting in SETTINGS.values():
        section = setting.name.rpartition(".")[0]
        if of_jobs or section not in SECTIONS:
            _add(groups.get(section, groups[""]), setting)


def flags_of(options: argparse.Namespace) -> dict[str, str]:
    """The texts of the flags that were given, by setting name."""
    given = {name: getattr(options, f"setting {name}", None) for name in SETTINGS}
    return {name: text for name, text in given.items() if text is not None}


def _add(group: argparse._ArgumentGroup, setting: Setting) -> None:
    destination = f"setting {setting.name}"  # with a space: no flag of the parser itself has such a name
    help = setting.help.replace("%", "%%")
    if setting.kind == "bool":
        group.add_argument(*_spellings(setting.flag), dest=destination, action="store_const", const="true", help=help)
        negated = _spellings("--no-" + setting.flag[2:])
        group.add_argument(*negated, dest=destination, action="store_const", const="false", help=argparse.SUPPRESS)
    else:
        metavar = {"int": "N", "float": "X", "list": "A,B", "table": "JSON"}.get(
            setting.kind, "|".join(setting.choices) or "VALUE"
        )
        group.add_argument(*_spellings(setting.flag), dest=destination, metavar=metavar, help=help)


def _spellings(flag: str) -> tuple[str, ...]:
    underscored = "--" + flag[2:].replace("-", "_")
    return (flag,) if underscored == flag else (flag, underscored)
