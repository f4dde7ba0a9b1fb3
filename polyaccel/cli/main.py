"""The entry point of `polyaccel`: finds the subcommand, shows errors in their short form, returns exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from polyaccel.errors import PolyaccelError

COMMANDS = {
    "checkpoint": "show what is in a checkpoint, check every byte of it, and convert it to and from other libraries' formats",
    "compare": "run one script on several engines, and say where their numbers part",
    "config": "ask for, write, show and check the configuration",
    "doctor": "try every engine on this machine, and name what is wrong and its cure",
    "env": "what a bug report needs to say about this machine",
    "estimate-memory": "count what a model needs for training and inference, from its shapes alone",
    "launch": "start a training script on an engine, with one or more processes",
    "plan": "compile a script's first step for a machine that need not exist, and say what it needs there",
    "runs": "list, show, report and open the runs that scripts have logged, and send them to trackers",
    "test": "train on every engine through the configuration in force, and hold the numbers against known ones",
}


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all subcommands; where one is named, the others are known by name alone, which is what makes --help quick."""
    top = argparse.ArgumentParser(prog="polyaccel", description="One training script on PyTorch, PyTorch-XLA or JAX.")
    top.add_argument("--version", action="store_true", help="print the version")
    commands = top.add_subparsers(dest="command", metavar="command")
    for name, summary in COMMANDS.items():
        # No abbreviations: argparse would try to complete the options of the user's script with ours.
        own = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if command is None or name == command:
            import_module(_module(name)).add_arguments(own)
    return top


def _module(command: str) -> str:
    return f"polyaccel.cli.{command.replace('-', '_')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is the command's own, 2 for unusable arguments, 1 for a PolyaccelError.

    Without `arguments`, those of this process, which is taken to end with the command.
    """
    is_program = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    top = parser(next((text for text in arguments if not text.startswith("-")), ""))
    options = top.parse_args(arguments)
    options.is_program = is_program
    if options.version:
        from polyaccel import __version__

        print(__version__)
        return 0
    if options.command is None:
        top.print_help()
        return 0
    try:
        code = int(import_module(_module(options.command)).run(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. What is still buffered must go nowhere, or the interpreter complains at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except PolyaccelError as error:
        print(f"polyaccel {options.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
