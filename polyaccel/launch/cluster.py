"""A job that another machine starts: the script and its settings as the command line that runs there, and safe shell text for it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyaccel.config.resolve import Gathered
from polyaccel.config.schema import LaunchSettings
from polyaccel.config.settings import SETTINGS
from polyaccel.errors import LaunchError

# Said by the launcher of every machine itself, or only of use where the job is handed over.
_NOT_PASSED_ON = tuple(
    f"launch.{name}" for name in ("on", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
)


@dataclass(frozen=True, slots=True)
class Job:
    """What to run on every machine: `command` follows `python`, `flags` carry every setting that is no default."""

    command: tuple[str, ...]
    flags: Mapping[str, tuple[str, ...]]
    settings: LaunchSettings

    @classmethod
    def of(cls, command: Sequence[str], gathered: Gathered, settings: LaunchSettings) -> Job:
        """The job of `polyaccel launch` with these settings."""
        return cls(tuple(command), _flags(gathered), settings)

    def launch_command(self, *extra: str, without: Sequence[str] = ()) -> list[str]:
        """`polyaccel launch` as every machine runs it: `extra` flags tell it its place, settings named in `without` stay here."""
        flags = [part for name, parts in self.flags.items() if name not in without for part in parts]
        return ["polyaccel", "launch", *flags, *extra, *self.command]


def shell_lines(*commands: Sequence[str] | str | None) -> str:
    """Commands as one shell text that stops at the first failure: argument lists are quoted, a user's own text is kept."""
    texts = [c if isinstance(c, str) else shlex.join(c) for c in commands if c]
    return "\n".join(["set -e", *texts])


def run_tool(arguments: Sequence[str], *, cure: str, stdin: str | None = None) -> str:
    """Run a scheduler's own program and return what it printed. Raises LaunchError with its words, or where it is not installed."""
    find_tool(arguments[0], cure=cure)
    done = subprocess.run(list(arguments), input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LaunchError(
            f"{arguments[0]} failed with exit code {done.returncode}: {(done.stderr or done.stdout).strip() or 'no message'}",
            f"what was run: {shlex.join(arguments)}",
        )
    return done.stdout


def find_tool(name: str, *, cure: str) -> str:
    """The path of a scheduler's program. Raises LaunchError with the cure where it is not installed."""
    path = shutil.which(name)
    if path is None:
        raise LaunchError(f"{name} is not installed on this machine", cure)
    return path


def _flags(gathered: Gathered) -> dict[str, tuple[str, ...]]:
    flags: dict[str, tuple[str, ...]] = {}
    for name, value in gathered.values.items():
        setting = SETTINGS[name]
        section = name.rpartition(".")[0]
        if section not in ("", "mesh", "launch") or name in _NOT_PASSED_ON or value == setting.default:
            continue
        if setting.kind == "bool":
            flags[name] = (setting.flag if value else f"--no-{setting.flag[2:]}",)
        else:
            flags[name] = (setting.flag, ",".join(value) if isinstance(value, tuple) else str(value))
    return flags
