"""`polyaccel checkpoint`: shows what is in a checkpoint, says whether every byte of it is what was written, and converts it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from polyaccel.cli import checkpoint_convert
from polyaccel.cli.amounts import bytes_text

if TYPE_CHECKING:
    from polyaccel.checkpoint.read import Saved

_LONGEST = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `checkpoint`."""
    commands = parser.add_subparsers(dest="checkpoint_command", metavar="command", required=True)
    showing = commands.add_parser("show", help="what is in a checkpoint, from its manifest alone")
    showing.add_argument(
        "folder", help="a checkpoint, or a folder of checkpoint_<n> (then the newest): a path or a URL"
    )
    showing.add_argument(
        "--group", action="append", metavar="NAME", help="list the arrays of this group; may be given again"
    )
    showing.add_argument("--values", action="store_true", help="print the plain values too")
    verifying = commands.add_parser(
        "verify", help="read every byte and compare the checksums; exit code 1 if one differs"
    )
    verifying.add_argument(
        "folder", help="a checkpoint, or a folder of checkpoint_<n> (then all of them): a path or a URL"
    )
    converting = commands.add_parser(
        "convert", help="write a checkpoint anew in another library's format, or theirs in ours"
    )
    checkpoint_convert.add_arguments(converting)


def run(options: argparse.Namespace) -> int:
    """Run one of the subcommands."""
    commands = {"show": _show, "verify": _verify, "convert": checkpoint_convert.run}
    return commands[options.checkpoint_command](options)


def _show(options: argparse.Namespace) -> int:
    from polyaccel.checkpoint.dtypes import STORED
    from polyaccel.checkpoint.newest import newest_checkpoint, numbered
    from polyaccel.checkpoint.read import open_checkpoint
    from polyaccel.errors import CheckpointError

    if numbered(options.folder):
        newest, passed_over = newest_checkpoint(options.folder, verify=False)
        for path, why in passed_over:
            print(f"passed over {path}: {why}")
        if newest is None:
            raise CheckpointError(f"{options.folder} has no whole checkpoint", "see the reasons above")
        saved = newest
    else:
        saved = open_checkpoint(options.folder, verify=False)
    manifest = saved.manifest
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created))
    total = sum(file.bytes for file in manifest.files.values())
    size = f"{bytes_text(total)} in {_count(len(manifest.files), 'file')}"
    print(f"{saved.path}: {_count(saved.num_processes, 'process', 'es')}, {written}, {size}")
    for name, value in saved.facts.items():
        print(f"  {name}: {_line(value)}")
    for group, arrays in manifest.groups.items():
        elements = sum(prod(array.shape) for array in arrays.values())
        num_bytes = sum(prod(array.shape) * STORED[array.dtype].size for array in arrays.values())
        print(f"{group}: {_count(len(arrays), 'array')}, {elements} elements, {bytes_text(num_bytes)}")
        if options.group and group in options.group:
            for name, array in arrays.items():
                pieces = f"  {len(array.pieces)} pieces" if len(array.pieces) > 1 else ""
                print(f"  {name}  {array.dtype}  {list(array.shape)}{pieces}")
    for group in options.group or ():
        saved.arrays(group)  # refuses a group that is not there
    if manifest.added:
        print(f"added by hooks: {', '.join(manifest.added)}")
    _show_values(saved, in_full=options.values)
    return 0


def _show_values(saved: Saved, *, in_full: bool) -> None:
    if not in_full:
        print(f"values: {', '.join(saved.shared) or 'none'}; of each process: {', '.join(saved.own(0)) or 'none'}")
        return
    print("values:")
    for name, value in saved.shared.items():
        print(f"  {name}: {_line(value)}")
    for index in range(saved.num_processes):
        print(f"values of process {index}:")
        for name, value in saved.own(index).items():
            print(f"  {name}: {_line(value)}")


def _verify(options: argparse.Namespace) -> int:
    from polyaccel.checkpoint.newest import numbered
    from polyaccel.checkpoint.read import open_checkpoint
    from polyaccel.checkpoint.storage import open_folder
    from polyaccel.errors import CheckpointError

    found = [open_folder(options.folder).child(name).url for name in numbered(options.folder)] or [options.folder]
    num_broken = 0
    for path in found:
        start = time.perf_counter()
        try:
            saved = open_checkpoint(path)
        except CheckpointError as error:
            num_broken += 1
            print(f"BROKEN  {error.message}", file=sys.stderr)
            continue
        total = sum(file.bytes for file in saved.manifest.files.values())
        print(
            f"whole   {path}: {_count(len(saved.manifest.files), 'file')}, {bytes_text(total)}, {time.perf_counter() - start:.1f} s"
        )
    if num_broken and len(found) > 1:
        print(f"{num_broken} of {len(found)} checkpoints are broken", file=sys.stderr)
    return 1 if num_broken else 0


def _line(value: Any) -> str:
    """A value in one line; of long ones (the state of a random generator) the beginning."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_line(item)}" for name, item in value.items()) or "{}"
    if isinstance(value, bytes):
        return _count(len(value), "byte")
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
