"""`polyaccel plan`: a script's first step, compiled for a machine that need not exist, and what each device needs for it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyaccel.cli.flags import add_setting_flags, flags_of
from polyaccel.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from polyaccel.config.resolve import Gathered
    from polyaccel.planned.report import StepPlan
    from polyaccel.planned.topologies import TopologyName

_BACKEND = "jax"
_LINES_OF_OUTPUT = 15
_EXAMPLES = """examples:
  polyaccel plan train.py --topology v5e:4x4 --mesh.fsdp -1 -- --batch-size 8
  polyaccel plan train.py --topology v5p:4x4x8 --mixed-precision bf16 --search
  polyaccel plan train.py --topology v5e:4x4 --mesh.fsdp -1 --try batch-size=1,2,4,8
  polyaccel plan train.py --topology v5e:4x4 --scale 16,64,256
  polyaccel plan train.py --topology cpu:8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `polyaccel plan`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument("--topology", metavar="CHIP:AxB", help="a slice of TPU chips (v5e:4x4, v5p:4x4x8), or cpu:8")
    parser.add_argument(
        "--search", action="store_true", help="try every way of sharing the devices between data and fsdp"
    )
    parser.add_argument(
        "--try",
        dest="tried",
        metavar="NAME=A,B",
        help="try each of these values of an argument of the script: --try batch-size=1,2,4 gives it --batch-size 1, ...",
    )
    parser.add_argument("--scale", metavar="N,M", help="a table over slices of that many chips, such as 16,64,256")
    parser.add_argument("--json", action="store_true", help="print it as JSON, in bytes, operations and seconds")
    parser.add_argument(
        "--config-file",
        "--config_file",
        type=Path,
        help="TOML, YAML, or a YAML of Accelerate (default: polyaccel.toml here)",
    )
    add_setting_flags(parser, of_jobs=False)
    parser.add_argument("script", help="the training script; it is run up to its first update, on shapes alone")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, metavar="...", help="its arguments, after --")


@dataclass(frozen=True, slots=True)
class _Case:
    topology: TopologyName
    mesh: dict[str, int] | None  # None: as configured
    arguments: tuple[str, ...] = ()  # that are tried


def run(options: argparse.Namespace) -> int:
    """Plan and report; 0 where one of the planned meshes fits (or nobody knows the memory), else 3."""
    import json

    from polyaccel.cli import plan_tables
    from polyaccel.config.resolve import config_of, gather
    from polyaccel.planned.report import as_json, fits

    options = _with_flags_behind(options)
    if options.topology is None:
        raise ConfigError("--topology is not given", "name a slice of chips, such as --topology v5e:4x4, or cpu:8")
    gathered = gather(file=options.config_file, flags=_flags(options))
    config = config_of(gathered)
    if not Path(options.script).is_file():
        raise LaunchError(f"script {options.script!r} does not exist", "give the path of a Python file")
    cases = _cases(options, dict(config.mesh.sizes))
    plans = [(case.topology.chip, _planned(options, gathered, case)) for case in cases]
    if options.json:
        trees = [as_json(plan, chip) for chip, plan in plans]
        print(json.dumps(trees if len(cases) > 1 else trees[0], indent=2))
    elif len(plans) > 1:
        print(plan_tables.comparison(plans))
    else:
        print(plan_tables.page(plans[0][1], plans[0][0]))
    return 3 if all(fits(plan, chip) is False for chip, plan in plans) else 0


def _with_flags_behind(options: argparse.Namespace) -> argparse.Namespace:
    """Flags may stand before and behind the script; its own arguments stand behind `--`."""
    words = options.script_args
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="polyaccel plan", allow_abbrev=False)
    add_arguments(parser)
    parser.parse_args([*words[:end], options.script], namespace=options)
    options.script_args = words[end + 1 :]
    return options


def _flags(options: argparse.Namespace) -> dict[str, str]:
    flags = flags_of(options)
    if flags.setdefault("backend", _BACKEND) != _BACKEND:
        raise ConfigError(
            f"--backend {flags['backend']} with polyaccel plan", f"leave it out: steps are planned on {_BACKEND}"
        )
    return flags


def _cases(options: argparse.Namespace, mesh: dict[str, int]) -> list[_Case]:
    from polyaccel.planned.topologies import topology_named, with_devices

    topology = topology_named(options.topology)
    topologies = [topology]
    if options.scale is not None:
        try:
            numbers = [int(text) for text in options.scale.split(",")]
        except ValueError as error:
            raise ConfigError(f"--scale {options.scale} is no list of numbers", "write --scale 16,64,256") from error
        topologies = [with_devices(topology, number) for number in numbers]
    cases: list[_Case] = []
    for each in topologies:
        meshes: list[dict[str, int] | None] = [*_meshes(mesh, each.num_devices)] if options.search else [None]
        cases += [_Case(each, shared, given) for shared in meshes for given in _arguments(options.tried)]
    return cases


def _arguments(tried: str | None) -> list[tuple[str, ...]]:
    if tried is None:
        return [()]
    name, equals, values = tried.partition("=")
    if not equals or not name or not values:
        raise ConfigError(f"--try {tried} is no NAME=A,B", "write it as in --try batch-size=1,2,4")
    flag = name if name.startswith("-") else f"--{name}"
    return [(flag, value) for value in values.split(",")]


def _meshes(mesh: dict[str, int], num_devices: int) -> list[dict[str, int]]:
    """Every way of sharing the devices between `data` and `fsdp`; the other axes stay. Fewest parts first: they exchange least."""
    others = {name: size for name, size in mesh.items() if name not in ("data", "fsdp")}
    fixed = 1
    for size in others.values():
        fixed *= max(size, 1)
    left, rest = divmod(num_devices, fixed)
    if rest or not left:
        raise ConfigError(f"the mesh {others} does not divide {num_devices} devices", "choose sizes that divide it")
    fixed_axes = {name: size for name, size in others.items() if size > 0}
    return [{**fixed_axes, "data": left // parts, "fsdp": parts} for parts in range(1, left + 1) if left % parts == 0]


def _planned(options: argparse.Namespace, gathered: Gathered, case: _Case) -> StepPlan:
    """One case, in a process of its own: devices are opened once in a process, and a script may leave anything behind."""
    import json
    import subprocess
    import sys
    import tempfile

    from polyaccel.config.resolve import environment_for, environment_without_settings
    from polyaccel.planned.report import step_plan_of
    from polyaccel.registry import choose_backend

    planner: Any = choose_backend(_BACKEND)
    environment = {**environment_without_settings(), **environment_for(gathered, launched=_BACKEND)}
    environment.update(planner.planner().environment(case.topology))
    for axis, size in (case.mesh or {}).items():
        environment[f"POLYACCEL_MESH__{axis.upper()}"] = str(size)
    shown = "" if case.mesh is None else "".join(f" {name}={size}" for name, size in case.mesh.items() if size != 1)
    shown += "".join(f" {word}" for word in case.arguments)
    print(f"planning {options.script} on {case.topology.text}{shown} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="polyaccel-plan-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "polyaccel.cli.plan_worker", case.topology.text, str(report)]
        done = subprocess.run(
            [*command, options.script, *options.script_args, *case.arguments],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode or not report.exists():
            last = "\n".join((done.stdout + done.stderr).splitlines()[-_LINES_OF_OUTPUT:])
            raise LaunchError(
                f"{options.script} could not be planned on {case.topology.text} (exit code {done.returncode}):\n{last}",
                f"see that it trains at all: polyaccel launch --backend {_BACKEND} --cpu {options.script}",
            )
        return replace(step_plan_of(json.loads(report.read_text("utf-8"))), arguments=case.arguments)
