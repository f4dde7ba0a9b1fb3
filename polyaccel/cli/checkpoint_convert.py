"""`polyaccel checkpoint convert`: writes a checkpoint anew in another library's format, or one of theirs in ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from polyaccel.errors import CheckpointError

if TYPE_CHECKING:
    from polyaccel.checkpoint.formats.bundle import Choices

FORMATS = ("polyaccel", "accelerate", "dcp", "huggingface", "orbax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `checkpoint convert`."""
    parser.add_argument("source", type=Path, help="the checkpoint; its format is detected")
    parser.add_argument("target", type=Path, help="the folder to write, which must not exist")
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument(
        "--only", action="append", default=[], metavar="GROUP", help="take only this group (model, optimizer, ...)"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="FILE", help="leave out this file of an Accelerate folder"
    )
    parser.add_argument(
        "--map", action="append", default=[], metavar="GROUP=PATH",
        help="where a group stands in a DCP or Orbax tree, parts joined by '.': model=app.model, optimizer=opt_state",
    )  # fmt: skip
    parser.add_argument(
        "--parameter-names", type=Path, metavar="FILE",
        help="JSON list of the parameters in the order in which the optimizer was given them (several optimizers: an object of lists)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Convert, and say what was written and what was left behind."""
    from polyaccel.checkpoint.convert import convert

    done = convert(options.source, options.target, options.to, only=options.only, choices=choices_of(options))
    groups = ", ".join(f"{group} ({count})" for group, count in done.groups.items()) or "no arrays"
    print(f"{options.source} ({done.source_format}) -> {options.target} ({done.target_format}): {groups}")
    if done.left_behind:
        print(f"left behind, without a place in {done.target_format}: {', '.join(done.left_behind)}")
    return 0


def choices_of(options: argparse.Namespace) -> Choices:
    """What the flags say. Raises CheckpointError for one that says nothing."""
    from polyaccel.checkpoint.formats.bundle import Choices

    places = {}
    for text in options.map:
        group, found, path = text.partition("=")
        if not group or not found:
            raise CheckpointError(f"--map {text} names no group and path", "write it as --map model=app.model")
        places[group] = tuple(path.split(".")) if path else ()
    names = read_names(options.parameter_names) if options.parameter_names else {}
    return Choices(skip=frozenset(options.skip), places=places, parameter_names=names)


def read_names(file: Path) -> dict[str, tuple[str, ...]]:
    """Parameter names by optimizer group. Raises CheckpointError for a file that is no such JSON."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"--parameter-names {file} cannot be read: {error}", "give a JSON list of names"
        ) from error
    groups = {"optimizer": found} if isinstance(found, list) else found
    if not isinstance(groups, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in groups.values()
    ):
        raise CheckpointError(
            f"--parameter-names {file} is neither a list of names nor an object of such lists",
            'write ["embed.weight", "head.weight"] or {"optimizer": [...], "optimizer_1": [...]}',
        )
    return {group: tuple(names) for group, names in groups.items()}
