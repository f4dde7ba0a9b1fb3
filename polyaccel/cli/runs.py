"""`polyaccel runs`: lists run folders, and sends one to a tracker afterwards."""

from __future__ import annotations

import argparse
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `runs`."""
    commands = parser.add_subparsers(dest="runs_command", metavar="command", required=True)
    listing = commands.add_parser("list", help="all runs, newest first")
    sending = commands.add_parser("replay", help="send a run to a tracker, after an outage or for the first time")
    sending.add_argument("run", help="folder of the run, its id, or the start of its id")
    sending.add_argument("--to", required=True, metavar="TRACKER", help="wandb, tensorboard, mlflow, ...")
    for command in (listing, sending):
        command.add_argument("--folder", default="runs", help="where the runs are (default: runs)")
    listing.add_argument("--project", help="only the runs of this project")


def run(options: argparse.Namespace) -> int:
    """Run one of the subcommands."""
    return _list(options) if options.runs_command == "list" else _replay(options)


def _list(options: argparse.Namespace) -> int:
    from polyaccel.tracking.runs import list_runs

    runs = list_runs(options.folder, options.project)
    if not runs:
        print(f"no runs below {options.folder!r}")
        return 0
    width = max(len(run.id) for run in runs)
    for run in runs:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.created))
        print(f"{run.id:{width}}  {run.status:8}  {started}  {run.duration_s:8.0f} s  {run.project}")
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
