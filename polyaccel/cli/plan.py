"""`polyaccel plan`: a script's first step, compiled for a machine that need not exist, and what each device needs for it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polyaccel.cli.flags import add_setting_flags, flags_of
from polyaccel.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from polyaccel.cli.plan_cases import Case
    from polyaccel.config.resolve import Gathered
    from polyaccel.planned.chips import Chip
    from polyaccel.planned.report import StepPlan
    from polyaccel.planned.topologies import TopologyName

_BACKEND = "jax"
_TIMEOUT_S = 3600.0
_EXAMPLES = """examples:
  polyaccel plan train.py --topology v5e:4x4 --mesh.fsdp -1 -- --batch-size 8
  polyaccel plan train.py --topology v5p:4x4x8 --mixed-precision bf16 --search --first
  polyaccel plan train.py --topology v5e:4x4 --mesh.fsdp -1 --try batch-size=1,2,4,8
  polyaccel plan train.py --topology v5e:4x4 --scale 16,64,256
  polyaccel plan train.py --topology cpu:8
  polyaccel plan train.py --topology gpu"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `polyaccel plan`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--topology",
        metavar="CHIP:AxB",
        help="a slice of TPU chips (v5e:4x4, v5p:4x4x8), cpu:8, or gpu for those that are here",
    )
    parser.add_argument(
        "--search", action="store_true", help="try every way of sharing the devices between the axes of --search-axes"
    )
    parser.add_argument(
        "--search-axes", metavar="A,B", default="data,fsdp", help="axes of the mesh to search (default: data,fsdp)"
    )
    parser.add_argument("--first", action="store_true", help="of several, end with the first that fits")
    parser.add_argument(
        "--try",
        dest="tried",
        metavar="NAME=A,B",
        help="try each of these values of an argument of the script: --try batch-size=1,2,4 gives it --batch-size 1, ...",
    )
    parser.add_argument("--scale", metavar="N,M", help="a table over slices of that many chips, such as 16,64,256")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=_TIMEOUT_S,
        help=f"give one step no more time than this to compile (default: {_TIMEOUT_S:g})",
    )
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


class _Planned(NamedTuple):
    """A case with its plan, or with the reason why there is none."""

    case: Case
    chip: Chip | None
    plan: StepPlan | None
    error: LaunchError | None


def run(options: argparse.Namespace) -> int:
    """Plan and report; 0 where one of the planned meshes fits (or nobody knows the memory), else 3."""
    from polyaccel.config.resolve import config_of, gather
    from polyaccel.planned.report import fits

    options = _with_flags_behind(options)
    if options.topology is None:
        raise ConfigError("--topology is not given", "name a slice of chips, such as --topology v5e:4x4, or cpu:8")
    if options.timeout <= 0:
        raise ConfigError(f"--timeout {options.timeout:g} is no time", "give a number of seconds")
    gathered = gather(file=options.config_file, flags=_flags(options))
    config = config_of(gathered)
    if not Path(options.script).is_file():
        raise LaunchError(f"script {options.script!r} does not exist", "give the path of a Python file")
    cases = _cases(options, dict(config.mesh.sizes))
    results: list[_Planned] = []
    for case in cases:
        results.append(_planned(options, gathered, case, is_lone=len(cases) == 1))
        plan = results[-1].plan
        if options.first and plan is not None and fits(plan, results[-1].chip) is not False:
            break
    plans = [(result.chip, result.plan) for result in results if result.plan is not None]
    if not plans and results[0].error is not None:
        raise results[0].error
    _print(options, results, is_lone=len(cases) == 1)
    return 3 if all(fits(plan, chip) is False for chip, plan in plans) else 0


def _print(options: argparse.Namespace, results: list[_Planned], *, is_lone: bool) -> None:
    import json

    from polyaccel.cli import plan_tables
    from polyaccel.planned.report import as_json

    plans = [(result.chip, result.plan) for result in results if result.plan is not None]
    failed = [(result.case, result.error) for result in results if result.error is not None]
    if options.json:
        trees = [as_json(plan, chip) for chip, plan in plans]
        trees += [
            {"topology": case.topology.text, "mesh": case.mesh, "arguments": case.arguments, "error": str(error)}
            for case, error in failed
        ]
        print(json.dumps(trees[0] if is_lone else trees, indent=2))
    elif is_lone:
        print(plan_tables.page(plans[0][1], plans[0][0]))
    else:
        print(
            plan_tables.comparison(
                plans, [(f"{case.topology.text} {case.variant}", error.message) for case, error in failed]
            )
        )


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


def _cases(options: argparse.Namespace, mesh: dict[str, int]) -> list[Case]:
    from polyaccel.cli.plan_cases import Case, arguments_of, axes_of, meshes, scaled
    from polyaccel.registry import choose_backend

    axes = axes_of(options.search_axes, choose_backend(_BACKEND).capabilities.mesh_axes)
    cases: list[Case] = []
    for each in scaled(_topology(options.topology), options.scale):
        shared: list[dict[str, int] | None] = [*meshes(mesh, axes, each.num_devices)] if options.search else [None]
        cases += [Case(each, mesh, given) for mesh in shared for given in arguments_of(options.tried)]
    return cases


def _topology(text: str) -> TopologyName:
    from polyaccel.planned.topologies import GPU, topology_named
    from polyaccel.registry import choose_backend

    if text.partition(":")[0] != GPU:
        return topology_named(text)
    backend: Any = choose_backend(_BACKEND)
    num_here = backend.planner().num_gpus()
    topology = topology_named(text if text != GPU else f"{GPU}:{max(num_here, 1)}")
    if topology.num_devices > num_here:
        raise LaunchError(
            f"--topology {text} is about the GPUs of this machine, and it has {num_here}",
            "plan there, or for a slice that need not be here, such as v5e:4x4",
        )
    return topology


def _planned(options: argparse.Namespace, gathered: Gathered, case: Case, *, is_lone: bool) -> _Planned:
    """One case, in a process of its own: devices are opened once in a process, and a script may leave anything behind.

    Raises LaunchError where it is the only one; of several, one that cannot be planned is a line of the result.
    """
    import json
    import sys
    import tempfile

    from polyaccel.cli.plan_runs import run_worker
    from polyaccel.config.resolve import environment_for, environment_without_settings
    from polyaccel.planned.report import chip_of, step_plan_of
    from polyaccel.registry import choose_backend

    planner: Any = choose_backend(_BACKEND)
    environment = {**environment_without_settings(), **environment_for(gathered, launched=_BACKEND)}
    environment.update(planner.planner().environment(case.topology))
    for axis, size in (case.mesh or {}).items():
        environment[f"POLYACCEL_MESH__{axis.upper()}"] = str(size)
    what = f"planning {options.script} on {case.topology.text} {case.variant}".rstrip()
    print(f"{what} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="polyaccel-plan-") as folder:
        report = Path(folder) / "report.json"
        try:
            run_worker(
                [case.topology.text, str(report), options.script, *options.script_args, *case.arguments],
                environment,
                what=what,
                hint=f"see that it trains at all: polyaccel launch --backend {_BACKEND} --cpu {options.script}",
                timeout_s=options.timeout,
            )
        except LaunchError as error:
            if is_lone:
                raise
            return _Planned(case, None, None, error)
        tree = json.loads(report.read_text("utf-8"))
    return _Planned(case, chip_of(tree), replace(step_plan_of(tree), arguments=case.arguments), None)
