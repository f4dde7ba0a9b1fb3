"""What `scripts/demo` reads of a run: its losses, speed and compile time, in one JSON file."""

import json
import time
from pathlib import Path


class Curve:
    """Collects one loss per step without waiting for the device; `save` reads them all."""

    WARM_UP = 5  # steps that may compile; speed is measured on the later ones

    def __init__(self, path, **facts):
        self.path, self.facts = path, facts
        self.losses, self.times = [], [time.perf_counter()]

    def add(self, loss):
        self.losses.append(loss)
        if len(self.losses) == self.WARM_UP:
            float(loss)  # the one wait: everything before it is done
            self.times.append(time.perf_counter())

    def stop(self):
        """Training is over; what follows (evaluation) is not timed."""
        float(self.losses[-1])
        self.times.append(time.perf_counter())

    def save(self, **results):
        if self.path is None:
            return
        start, warm, end = self.times
        steps_per_s = (len(self.losses) - self.WARM_UP) / (end - warm)
        results |= {
            "losses": [float(loss) for loss in self.losses],
            "steps_per_s": steps_per_s,
            "compile_s": max(0.0, warm - start - self.WARM_UP / steps_per_s),
        }
        Path(self.path).write_text(json.dumps(self.facts | results))
