"""The questions of `polyaccel config`: few, with this machine's devices as defaults; the answers become a TOML file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyaccel.config.resolve import user_config_file
from polyaccel.config.settings import SETTINGS
from polyaccel.config.writing import document, write
from polyaccel.errors import ConfigError, nearest
from polyaccel.launch.rendezvous import visible_gpus
from polyaccel.registry import backend_names, load_backend


def ask(path: Path | None, read: Callable[[str], str] = input) -> int:
    """Ask, and write the answers to `path` (default: the user's file). Raises ConfigError where nobody can answer."""
    if not sys.stdin.isatty():
        raise ConfigError(
            "`polyaccel config` asks questions, and its input is no terminal",
            "write a file with `polyaccel config default`, then `polyaccel config set NAME VALUE`",
        )
    target = path or user_config_file()
    usable = _usable_backends()
    print("polyaccel: Enter takes the value in [brackets].\n")
    for name, reason in usable.items():
        print(f"  {name:8} {reason}")
    values: dict[str, Any] = {}
    values["backend"] = _choice(read, "Engine", "auto", ("auto", *usable))
    values["mixed_precision"] = _setting(read, "Mixed precision (no, bf16, fp16)", "mixed_precision")
    values["launch.num_machines"] = _setting(read, "Machines", "launch.num_machines")
    default_processes = _processes(values["backend"]) * values["launch.num_machines"]
    values["launch.num_processes"] = _setting(read, "Processes in all", "launch.num_processes", default_processes)
    if values["launch.num_machines"] > 1:
        values["launch.machine_rank"] = _setting(read, "This machine's rank, from 0", "launch.machine_rank")
        values["launch.main_process_ip"] = _setting(read, "Address of machine 0", "launch.main_process_ip")
        values["launch.main_process_port"] = _setting(read, "A free port there", "launch.main_process_port", 29500)
    values["gradient_accumulation_steps"] = _setting(read, "Batches per update", "gradient_accumulation_steps")
    if path is None and target.exists() and not _yes(read, f"{target} exists. Replace it"):
        print("nothing was written")
        return 1
    changed = {name: value for name, value in values.items() if value != SETTINGS[name].default}
    write(target, document(changed, title="Written by `polyaccel config`."))
    print(f"\nwrote {target}\nnext: polyaccel launch train.py")
    return 0


def _usable_backends() -> dict[str, str]:
    found = {}
    for name in backend_names():
        probe = load_backend(name).probe()
        if probe.is_usable:
            found[name] = f"version {probe.version}"
    return found


def _processes(backend: str) -> int:
    if backend != "auto":
        return len(load_backend(backend).worker_slots(None, use_cpu=False, gpus=visible_gpus()))
    return 1


def _setting(read: Callable[[str], str], question: str, name: str, default: Any = None) -> Any:
    setting = SETTINGS[name]
    default = setting.default if default is None else default
    while True:
        text = read(f"{question}{'' if default is None else f' [{default}]'}: ").strip()
        if not text and default is not None:
            return default
        try:
            return setting.parse(text)
        except ValueError as error:
            print(f"  {text!r} {error}")


def _choice(read: Callable[[str], str], question: str, default: str, choices: tuple[str, ...]) -> str:
    while True:
        text = read(f"{question} ({', '.join(choices)}) [{default}]: ").strip() or default
        if text in choices:
            return text
        print(f"  {text!r} is none of them: {nearest(text, choices)}")


def _yes(read: Callable[[str], str], question: str) -> bool:
    return read(f"{question}? [y/N] ").strip().lower() in ("y", "yes")
