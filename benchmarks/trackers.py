"""What `accelerator.log` costs the training thread with each tracker, what the vendor's own call would cost there, and how a run goes on
when the tracker's server dies.

    python benchmarks/trackers.py                    # every tracker that is installed here
    python benchmarks/trackers.py wandb tensorboard  # these
    python benchmarks/trackers.py --outages          # the outages instead of the costs

Rows are added to benchmarks/results/trackers.json, so that environments that cannot hold all vendors fill one table.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from interleaved import machine

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "trackers.json"
CASES = HERE.parent / "tests" / "tracking"
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
OFFLINE = {
    "wandb": {"mode": "offline"},
    "comet_ml": {"online": False},
    "clearml": {"offline": True},
    "swanlab": {"mode": "offline"},
}
STEPS = 500


def quantiles(times):
    """Of (wall, CPU of this thread) per call. On a busy machine the wall clock also counts other people's work."""
    row = {}
    for index, clock in enumerate(("wall", "cpu")):
        ordered = sorted(time[index] for time in times)
        row |= {
            f"{clock}_median_us": statistics.median(ordered) / 1e3,
            f"{clock}_p99_us": ordered[int(len(ordered) * 0.99)] / 1e3,
            f"{clock}_max_us": ordered[-1] / 1e3,
        }
    return row


def timed(log, steps, work):
    """Nanoseconds of each `log` call, with `work` milliseconds of arithmetic before it, as in a training loop."""
    matrix = np.random.default_rng(0).normal(size=(160, 160))
    times = []
    for step in range(steps):
        begin = time.perf_counter()
        while time.perf_counter() - begin < work / 1e3:
            matrix @ matrix
        values = {"loss": 1 / (step + 1), "lr": 1e-3}
        begin, cpu = time.perf_counter_ns(), time.thread_time_ns()
        log(values, step)
        times.append((time.perf_counter_ns() - begin, time.thread_time_ns() - cpu))
    return times


def measure(name, folder):
    """One tracker (None: the run folder alone), in a process of its own."""
    from polyaccel import Accelerator
    from polyaccel.config.project import ProjectConfiguration
    from polyaccel.registry import register_backend
    from polyaccel.testing.fake import FakeBackend

    register_backend(FakeBackend())
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    os.environ["HOME"] = str(folder)
    options = {"tracking_uri": f"sqlite:///{folder}/mlflow.db"} if name == "mlflow" else OFFLINE.get(name, {})
    accelerator = Accelerator(
        backend="fake",
        cpu=True,
        log_with=name,
        project_config=ProjectConfiguration(
            logging_dir=folder, tracker_init_timeout_s=120, tracker_finish_timeout_s=300
        ),
    )
    begin = time.perf_counter()
    accelerator.init_trackers("benchmark", config={"lr": 0.1}, init_kwargs={name: options} if name else {})
    row = {"init_ms": (time.perf_counter() - begin) * 1e3}
    row["empty_function"] = quantiles(timed(lambda values, step: None, STEPS, 2))  # what cold caches alone cost
    direct = None
    if name:
        worker = accelerator.tracking._workers[0]
        assert worker.is_started.wait(120)
        direct = worker.tracker
    row["log"] = quantiles(timed(lambda values, step: accelerator.log(values, step=step), STEPS, 2))
    row["log_back_to_back"] = quantiles(
        timed(lambda values, step: accelerator.log(values, step=STEPS + step), STEPS, 0)
    )
    if direct is not None:
        accelerator.tracking.flush()
        while worker.counts.sent + worker.counts.failed < 2 * STEPS:
            time.sleep(0.1)
        few = STEPS if name != "mlflow" else 100
        row["vendors_own_call"] = quantiles(timed(lambda values, step: direct.log(values, 2 * STEPS + step), few, 2))
    begin = time.perf_counter()
    accelerator.end_training()
    row["end_training_s"] = time.perf_counter() - begin
    print(json.dumps(row))


def described(row):
    return f"{row['cpu_median_us']:.1f} us CPU ({row['wall_median_us']:.1f} wall, p99 {row['wall_p99_us']:.1f})"


def in_a_process(*command, timeout=900):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CASES), str(HERE)])}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, *command, folder],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def cost(name):
    """The row of one tracker, printed."""
    row = in_a_process(str(Path(__file__).resolve()), "--measure", name)
    parts = {"log": row["log"], "back to back": row["log_back_to_back"], "an empty function": row["empty_function"]}
    if "vendors_own_call" in row:
        parts["the vendor's own call"] = row["vendors_own_call"]
    print(f"{name:12} " + "; ".join(f"{part} {described(times)}" for part, times in parts.items()), flush=True)
    return row


def outage(name):
    """What happened to training when the server of one tracker was taken away, printed."""
    found = in_a_process(str(CASES / "vendor_outages.py"), name)
    found["warnings"] = [warning.split("; everything")[0] for warning in found["warnings"]]
    print(
        f"{name:12} log max {found['log_us_max']:.0f} us, end_training {found['finish_s']:.1f} s, {found['lines']} of 400 lines,"
        f" calls {found['calls']}, said {found['warnings']}",
        flush=True,
    )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trackers", nargs="*")
    parser.add_argument("--outages", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("TRACKER", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(None if args.measure[0] == "none" else args.measure[0], Path(args.measure[1]))
        return
    installed = [name for name in TRACKERS if importlib.util.find_spec(name)]
    for name in args.trackers or (installed if args.outages else ["none", *installed]):
        table, row = ("outages", outage(name)) if args.outages else ("log", cost(name))
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"log": {}, "outages": {}}
        results["machine"] = machine()
        results[table]["run folder alone" if name == "none" else name] = row
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: {RESULTS}")


if __name__ == "__main__":
    main()
