"""`polyaccel runs`: lists run folders, shows and reports one, sends one to a tracker afterwards, and opens them in a dashboard."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

_SHOWN_METRICS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `runs`; without one, the list."""
    _add_place(parser)
    commands = parser.add_subparsers(dest="runs_command", metavar="command")
    listing = commands.add_parser("list", help="all runs, newest first")
    showing = commands.add_parser("show", help="plot the metrics of a run in the terminal")
    reporting = commands.add_parser("report", help="write a run as one HTML page that needs nothing else")
    sending = commands.add_parser("replay", help="send a run to a tracker, after an outage or for the first time")
    for command in (showing, reporting, sending):
        command.add_argument("run", help="folder of the run, its id, or the start of its id")
    sending.add_argument("--to", required=True, metavar="TRACKER", help="wandb, tensorboard, mlflow, ...")
    showing.add_argument("--metric", action="append", metavar="NAME", help="only this metric; may be given again")
    reporting.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the page (default: report.html in the run's folder)"
    )
    opening = commands.add_parser("ui", help="show runs in trackio's dashboard")
    opening.add_argument("run", nargs="*", help="only these: folders, ids, or starts of ids (default: all)")
    opening.add_argument(
        "--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, this machine alone)"
    )
    opening.add_argument("--port", type=int, help="port to serve at (default: the first free one from 7860 on)")
    opening.add_argument("--no-browser", action="store_true", help="do not open a browser")
    for command in (listing, showing, reporting, sending, opening):
        _add_place(command, is_sub=True)


def _add_place(parser: argparse.ArgumentParser, *, is_sub: bool = False) -> None:
    # A subcommand's default would overwrite what stands before it: `polyaccel runs --folder there list`.
    parser.add_argument(
        "--folder", default=argparse.SUPPRESS if is_sub else "runs", help="where the runs are (default: runs)"
    )
    lists = not is_sub or parser.prog.endswith((" list", " ui"))
    if lists:
        parser.add_argument(
            "--project", default=argparse.SUPPRESS if is_sub else None, help="only the runs of this project"
        )


def run(options: argparse.Namespace) -> int:
    """Run one of the subcommands."""
    commands = {None: _list, "list": _list, "show": _show, "report": _report, "replay": _replay, "ui": _ui}
    return commands[options.runs_command](options)


def _list(options: argparse.Namespace) -> int:
    from polyaccel.tracking.charts import sparkline
    from polyaccel.tracking.runs import leading_metric, list_runs

    runs = list_runs(options.folder, options.project)
    if not runs:
        print(f"no runs below {options.folder!r}")
        return 0
    width = max(len(run.id) for run in runs)
    project_width = max(len(run.project) for run in runs)
    for run in runs:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.created))
        curve = ""
        name = leading_metric(run.names())
        if name is not None:
            series = run.series(name)
            curve = f"  {sparkline(series)} {name} {series[-1][1]:.4g}"
        line = f"{run.id:{width}}  {run.status:9}  {started}  {run.duration_s:8.0f} s  {run.project:{project_width}}{curve}"
        print(line.rstrip())
    return 0


def _show(options: argparse.Namespace) -> int:
    from polyaccel.tracking.charts import braille
    from polyaccel.tracking.report import duration, summary
    from polyaccel.tracking.runs import find_run

    run = find_run(options.run, options.folder)
    print(f"{run.project} / {run.id}: {run.status}, {duration(run.duration_s)}")
    for name, text in summary(run).items():
        print(f"  {name}: {text}")
    names = options.metric or run.names()
    shown = names if options.metric else names[:_SHOWN_METRICS]
    for name in shown:
        series = run.series(name)
        print(f"\n{name}: {series[-1][1]:.6g} at step {series[-1][0]}")
        print(braille({name: series}, height=10).rsplit("\n", 1)[0] if len(series) > 1 else "  (one value)")
    if len(shown) < len(names):
        print(f"\nand {', '.join(names[_SHOWN_METRICS:])}: choose with --metric")
    if not names:
        print("no numbers were logged")
    return 0


def _report(options: argparse.Namespace) -> int:
    from polyaccel.tracking.report import report, write_page
    from polyaccel.tracking.runs import find_run

    run = find_run(options.run, options.folder)
    file = write_page(options.output or run.folder / "report.html", report(run))
    print(f"wrote {file}")
    return 0


def _replay(options: argparse.Namespace) -> int:
    from polyaccel.tracking.replay import replay
    from polyaccel.tracking.runs import find_run

    run = find_run(options.run, options.folder)
    sent = replay(run, options.to)
    left_out = f", {sent.num_left_out} left out that {options.to} has no place for" if sent.num_left_out else ""
    print(
        f"sent {run.id} to {options.to}: {sent.num_metrics} log calls, {sent.num_images} images, {sent.num_tables} tables,"
        f" {sent.num_artifacts} artifacts{left_out}"
    )
    return 0


def _ui(options: argparse.Namespace) -> int:
    from polyaccel.tracking.dashboard import serve
    from polyaccel.tracking.runs import find_run, list_runs

    if options.run:
        runs = [find_run(name, options.folder) for name in options.run]
    else:
        runs = list_runs(options.folder, options.project)
    if not runs:
        print(f"no runs below {options.folder!r}")
        return 1
    return serve(runs, host=options.host, port=options.port, opens_browser=not options.no_browser)
