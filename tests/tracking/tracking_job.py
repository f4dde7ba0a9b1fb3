"""Run by test_tracker_processes.py in every process of a job of two: a tracker for every process beside one for the first."""

import json
import sys
from pathlib import Path

import numpy as np

from polyaccel import Accelerator
from polyaccel.config.project import ProjectConfiguration
from polyaccel.tracking import GeneralTracker

FOLDER = Path(sys.argv[1])


class Everywhere(GeneralTracker):
    """Writes down every call, in a file of its own process."""

    name, requires_logging_directory, main_process_only = "everywhere", False, False
    tracker = property(lambda self: self)

    def _note(self, *call):
        with (FOLDER / f"{self.name}-{rank}.jsonl").open("a") as file:
            print(json.dumps(call), file=file)

    def start(self):
        self._note("start")

    def store_init_configuration(self, values):
        self._note("config", values)

    def log(self, values, step=None, **kwargs):
        self._note("log", values, step)

    def log_images(self, values, step=None, **kwargs):
        self._note("images", sorted(values))

    def finish(self):
        self._note("finish")


class First(Everywhere):
    name, main_process_only = "first", True


configuration = ProjectConfiguration(logging_dir=FOLDER / "runs")
accelerator = Accelerator(cpu=True, log_with=[Everywhere(), First()], project_config=configuration)
rank = accelerator.process_index
assert accelerator.num_processes == 2
accelerator.init_trackers("job", config={"lr": 0.1})
for step in range(3):
    mine = accelerator.gather(np.array([float(10 * rank + step)]))  # a value of the engine, which is fetched late
    accelerator.log({"rank": rank, "step": step, "first": mine[0]}, step=step)
accelerator.log_images({"picture": [np.zeros((2, 2))]}, step=3)
accelerator.get_tracker("everywhere").log({"alone": float(rank)}, step=4)
accelerator.get_tracker("first").log({"alone": float(rank)}, step=4)  # absorbs the call where it does not run
accelerator.end_training()
