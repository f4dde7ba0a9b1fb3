"""`polyaccel launch`: turns flags into the settings of workers and starts them."""

from __future__ import annotations

import argparse
from pathlib import Path

from polyaccel.cli.flags import add_setting_flags, flags_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `polyaccel launch`."""
    parser.add_argument(
        "--config-file",
        "--config_file",
        type=Path,
        help="TOML, YAML, or a YAML of Accelerate (default: polyaccel.toml here)",
    )
    parser.add_argument("-m", "--module", action="store_true", help="the script is a module name, as in python -m")
    add_setting_flags(parser)
    parser.add_argument("script", help="the training script")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, metavar="...", help="its arguments")


def run(options: argparse.Namespace) -> int:
    """Start the workers and wait; returns the first failing worker's exit code, else 0."""
    from polyaccel.config.resolve import config_of, gather, launch_settings_of
    from polyaccel.launch.local import launch

    gathered = gather(file=options.config_file, flags=flags_of(options))
    settings = launch_settings_of(gathered)
    config_of(gathered)  # every mistake is shown before a process starts
    command = ["-m", options.script] if options.module else [options.script]
    return launch([*command, *options.script_args], gathered=gathered, settings=settings)
