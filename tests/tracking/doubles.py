"""Trackers that behave badly on purpose, and an Accelerator without a framework to log through."""

import threading
import time

from polyaccel import Accelerator
from polyaccel.config.project import ProjectConfiguration
from polyaccel.registry import register_backend
from polyaccel.testing.fake import FakeBackend
from polyaccel.tracking import GeneralTracker, find_run

register_backend(FakeBackend())


def accelerator(folder, *trackers, **project):
    """An Accelerator whose runs stand in `folder`."""
    configuration = ProjectConfiguration(logging_dir=folder, **project)
    return Accelerator(backend="fake", cpu=True, log_with=list(trackers), project_config=configuration)


def run_of(accelerator):
    """The run that it wrote."""
    return find_run(str(accelerator.tracking.folder))


def until(condition, seconds=10.0):
    """Wait for something that happens on another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class Recorder(GeneralTracker):
    """Keeps every call, and the thread that made it."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self, *project, **options):
        self.project, self.options = project, options
        self.calls, self.threads = [], {threading.get_ident()} if project else set()

    @property
    def tracker(self):
        return self.calls

    def _note(self, *call):
        self.threads.add(threading.get_ident())
        self.calls.append(call)

    def start(self):
        self._note("start")

    def store_init_configuration(self, values):
        self._note("config", values)

    def log(self, values, step=None, **kwargs):
        self._note("log", values, step, kwargs)

    def log_images(self, values, step=None, **kwargs):
        self._note("images", values, step, kwargs)

    def log_table(self, table_name, columns=None, data=None, dataframe=None, step=None, **kwargs):
        self._note("table", table_name, columns, data, step)

    def log_artifact(self, artifact, name=None, **kwargs):
        self._note("artifact", artifact, name)

    def finish(self):
        self._note("finish")

    def logged(self):
        return [call[1] for call in self.calls if call[0] == "log"]


class Broken(Recorder):
    """Raises in the methods that it is told to."""

    name = "broken"

    def __init__(self, *broken):
        super().__init__()
        self.broken = set(broken)

    def _note(self, *call):
        super()._note(*call)
        if call[0] in self.broken:
            raise ConnectionError("the server is gone")


class Hanging(Recorder):
    """Does not come back from one of its methods until it is released."""

    name = "hanging"

    def __init__(self, where):
        super().__init__()
        self.where, self.released, self.reached = where, threading.Event(), threading.Event()

    def _note(self, *call):
        super()._note(*call)
        if call[0] == self.where:
            self.reached.set()
            self.released.wait(30)
