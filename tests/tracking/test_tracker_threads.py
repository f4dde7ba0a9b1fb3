"""Whatever a tracker does: it runs on its own thread, costs bounded time and memory, and the run folder has everything."""

import threading
import time

import numpy as np
import pytest
from doubles import Broken, Hanging, Recorder, accelerator, run_of, until

from polyaccel.config.project import ProjectConfiguration
from polyaccel.errors import TrackerError
from polyaccel.tracking import GeneralTracker, Run, RunInfo, Session, names, on_main_process, register_tracker_class
from polyaccel.tracking.worker import Worker
from polyaccel.utils import LoggerType

# -- the contract ------------------------------------------------------------------------------------------------------------


def test_a_tracker_is_made_started_configured_fed_and_finished_in_order(tmp_path):
    register_tracker_class(Recorder)
    made = []

    class Kept(Recorder):
        def __init__(self, *project, **options):
            super().__init__(*project, **options)
            made.append(self)

    register_tracker_class(type("Kept", (Kept,), {"name": "kept"}))
    one = accelerator(tmp_path, "kept")
    one.init_trackers("mine", config={"lr": 0.1}, init_kwargs={"kept": {"colour": "red"}})
    one.log({"loss": np.float32(0.5)}, step=3, log_kwargs={"kept": {"commit": True}})
    one.log_table("t", ["a"], [[1]], step=3)
    one.end_training()
    (tracker,) = made
    assert (tracker.project, tracker.options) == (("mine",), {"colour": "red"})
    assert tracker.calls == [
        ("start",),
        ("config", {"lr": 0.1}),
        ("log", {"loss": 0.5}, 3, {"commit": True}),
        ("table", "t", ["a"], [[1]], 3),
        ("finish",),
    ]
    assert (tracker.run.id, tracker.run.folder) == (run_of(one).id, run_of(one).folder)


def test_nothing_of_a_tracker_runs_on_the_training_thread(tmp_path):
    tracker = Recorder()
    one = accelerator(tmp_path, tracker)
    one.init_trackers("threads", config={"lr": 0.1})
    one.log({"loss": 1})
    one.log_images({"i": np.zeros((2, 2))})
    one.log_table("t", ["a"], [[1]])
    one.log_artifact(__file__)
    one.get_tracker("recorder").log({"loss": 2})
    one.end_training()
    assert [call[0] for call in tracker.calls] == [
        "start",
        "config",
        "log",
        "images",
        "table",
        "artifact",
        "log",
        "finish",
    ]
    assert len(tracker.threads) == 1
    assert threading.get_ident() not in tracker.threads


def test_log_costs_the_training_thread_less_than_ten_microseconds(tmp_path):
    """CPU time of this thread, so that other work on the machine does not count; the best of five rounds."""
    one = accelerator(tmp_path, Recorder())
    one.init_trackers("cost")
    rounds = []
    for _ in range(5):
        begin = time.thread_time()
        for step in range(500):
            one.log({"loss": 0.5, "lr": 1e-3}, step=step)
        rounds.append((time.thread_time() - begin) / 500 * 1e6)
        one.tracking.flush()
    one.end_training()
    assert min(rounds) < 10, rounds


def test_a_class_of_accelerates_contract_gets_its_logging_directory(tmp_path):
    seen = []

    class NeedsFolder(Recorder):
        name = "needs_folder"
        requires_logging_directory = True

        def __init__(self, project, logging_dir):
            super().__init__(project)
            seen.append(logging_dir)

    register_tracker_class(NeedsFolder)
    one = accelerator(tmp_path, "needs_folder")
    one.init_trackers("p")
    one.end_training()
    assert seen == [str(one.tracking.folder)]


def test_a_tracker_that_misses_a_part_of_the_contract_is_refused(tmp_path):
    class Nameless(GeneralTracker):
        requires_logging_directory = False

    with pytest.raises(TrackerError, match=r"tracker class .*Nameless has no name"):
        register_tracker_class(Nameless)
    with pytest.raises(TrackerError, match=r"<class 'dict'> is no subclass of GeneralTracker"):
        register_tracker_class(dict)
    with pytest.raises(ValueError, match="has no name, tracker"):
        accelerator(tmp_path, Nameless())


def test_the_names_of_accelerates_tracking_module_are_here():
    from polyaccel import tracking

    for name in tracking._VENDORS:
        cls = getattr(tracking, name)
        assert (cls.__name__, tracking.LOGGER_TYPE_TO_CLASS[cls.name]) == (name, cls)
    assert "recorder" in tracking.LOGGER_TYPE_TO_CLASS
    assert {"recorder", "tensorboard"} <= set(tracking.get_available_trackers())


def test_a_method_for_the_main_process_does_nothing_elsewhere(tmp_path):
    class Careful(Recorder):
        @on_main_process
        def log(self, values, step=None, **kwargs):
            self._note("log", values)
            return "noted"

    tracker = Careful()
    assert tracker.log({"a": 1}) == "noted"
    tracker.run = RunInfo("1", "p", tmp_path, is_main_process=False)
    assert tracker.log({"a": 2}) is None
    tracker.main_process_only = False
    assert tracker.log({"a": 3}) == "noted"
    assert tracker.calls == [("log", {"a": 1}), ("log", {"a": 3})]


def test_a_tracker_without_a_configuration_is_given_none(tmp_path):
    tracker = Recorder()
    one = accelerator(tmp_path, tracker)
    one.init_trackers("p")
    one.end_training()
    assert tracker.calls == [("start",), ("finish",)]


def test_accelerates_enum_names_its_trackers(tmp_path):
    assert {kind.value for kind in LoggerType} == {"all", *names.tracker_entries()}
    with pytest.warns(UserWarning, match="Stub takes the place of the tracker named 'wandb'"):
        register_tracker_class(type("Stub", (Recorder,), {"name": "wandb"}))
    try:
        one = accelerator(tmp_path, LoggerType.WANDB)
        one.init_trackers("p")
        assert [handle.name for handle in one.trackers] == ["wandb"]
        one.end_training()
    finally:
        del names._registered["wandb"]


def test_an_unknown_tracker_names_the_nearest(tmp_path):
    with pytest.raises(TrackerError, match=r"log_with='tensorbord' is no tracker\nhint: did you mean 'tensorboard'\?"):
        accelerator(tmp_path, "tensorbord")


def test_options_for_an_unknown_tracker_are_refused_before_anything_starts(tmp_path):
    one = accelerator(tmp_path)
    with pytest.raises(TrackerError, match=r"init_kwargs has options for 'wandbb'.*\nhint: did you mean 'wandb'"):
        one.init_trackers("p", init_kwargs={"wandbb": {}})
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_whose_package_is_missing_is_named_and_the_run_goes_on(tmp_path, caplog):
    class Absent(Recorder):
        name = "absent"
        package = "package_that_does_not_exist"

    register_tracker_class(Absent)
    one = accelerator(tmp_path, "absent")
    assert "the package package_that_does_not_exist is not installed" in caplog.text
    one.init_trackers("p")
    one.log({"a": 1})
    one.end_training()
    assert run_of(one).series("a") == [(0, 1.0)]


# -- handles ------------------------------------------------------------------------------------------------------------------


def test_get_tracker_gives_a_handle_and_unwrapped_the_trackers_own_object(tmp_path):
    tracker = Recorder()
    one = accelerator(tmp_path, tracker)
    with pytest.raises(TrackerError, match=r"get_tracker\('recorder'\): no such tracker was started"):
        one.get_tracker("recorder")
    one.init_trackers("p")
    assert one.get_tracker("recorder", unwrap=True) is tracker.calls
    assert one.get_tracker("recorder").logged() == []  # a method of the user's own class
    assert [handle.name for handle in one.trackers] == ["recorder"]
    with pytest.raises(TrackerError, match="did you mean 'recorder'"):
        one.get_tracker("recorde")
    one.end_training()


def test_a_vendors_own_objects_reach_the_tracker_as_they_are(tmp_path):
    tracker, image = Recorder(), object()
    one = accelerator(tmp_path, tracker)
    one.init_trackers("p")
    one.trackers[0].log({"validation": [image]}, step=1)
    one.end_training()
    assert tracker.logged()[0]["validation"][0] is image
    (entry,) = run_of(one).metrics()
    assert (entry.only, entry.values) == ("recorder", {"validation": [{"object": "builtins.object"}]})


def test_on_main_process_decorates_and_is_a_context(tmp_path):
    one = accelerator(tmp_path)

    @one.on_main_process
    def work():
        return 1

    with one.on_main_process as is_main:
        assert is_main
    assert work() == 1


def session(folder, index, *trackers, share=lambda value: value):
    return Session(list(trackers), ProjectConfiguration(logging_dir=folder), process_index=index, share=share)


def test_off_the_main_process_nothing_is_written_and_every_call_is_absorbed(tmp_path):
    tracker = Recorder()
    other = session(tmp_path, 1, tracker)
    other.start("p", {"a": 1})
    other.log({"loss": 1})
    other.log_images({"i": np.zeros((2, 2))})
    run = other.get("recorder", unwrap=True)
    run.log_artifact("x").wait()
    run["key"] = run.summary["best"]
    with run.context() as inner:
        assert not inner
    assert list(run) == other.trackers == []
    other.finish()
    assert (tracker.calls, list(tmp_path.iterdir())) == ([], [])


def test_a_tracker_for_all_processes_runs_on_all_with_one_run_id(tmp_path):
    trackers, shared = [Recorder() for _ in range(2)], []
    for tracker in trackers:
        tracker.main_process_only = False

    def share(value):
        shared.append(value)
        return shared[0]  # as the broadcast of process 0 gives it

    sessions = [session(tmp_path, index, tracker, share=share) for index, tracker in enumerate(trackers)]
    for index, one in enumerate(sessions):
        one.start("p")
        one.log({"loss": index}, step=0)
    for one in sessions:
        one.finish()
    assert sessions[0].folder == sessions[1].folder
    assert [tracker.logged() for tracker in trackers] == [[{"loss": 0}], [{"loss": 1}]]
    run = Run.load(sessions[0].folder)
    assert [entry.values for index in (0, 1) for entry in run.metrics(index)] == [{"loss": 0}, {"loss": 1}]


def test_a_tracker_for_the_main_process_needs_no_other_process(tmp_path):
    def share(value):
        raise AssertionError("init_trackers on the main process alone would wait for ever")

    one = session(tmp_path, 0, Recorder(), share=share)
    one.start("p")
    one.finish()


# -- failures -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["start", "config", "log", "images", "finish"])
def test_an_exception_of_a_tracker_never_reaches_the_training_loop(tmp_path, caplog, where):
    bad, good = Broken(where), Recorder()
    one = accelerator(tmp_path, bad, good)
    one.init_trackers("p", config={"lr": 0.1})
    for step in range(20):
        one.log({"loss": step}, step=step)
    one.log_images({"i": np.zeros((2, 2))})
    one.end_training()
    assert len(good.logged()) == 20
    assert run_of(one).series("loss") == [(step, step) for step in range(20)]
    first = [record.getMessage() for record in caplog.records if "the server is gone" in record.getMessage()]
    assert len(first) == 1, "it is said once"
    assert f"polyaccel runs replay {one.tracking.folder} --to broken" in first[0]


def test_the_circuit_opens_after_three_failures_and_closes_when_the_server_is_back():
    tracker = Broken("log")
    one = Worker("broken", lambda: tracker, config={}, init_timeout_s=5, replay_command="replay", first_pause_s=0.3)
    one.start()
    for number in range(10):
        one.put(lambda tracker, number=number: tracker.log({"n": number}))
    until(lambda: one.counts.failed == 3)
    time.sleep(0.1)
    assert one.counts.failed == 3, "nothing is tried while the circuit is open"
    tracker.broken.clear()
    until(lambda: one.counts.sent == 7)
    assert [values["n"] for values in tracker.logged()] == list(range(10))
    one.end()
    assert one.wait_until(time.monotonic() + 5)


def test_a_tracker_that_could_not_start_is_tried_again_and_gets_what_it_missed():
    tracker = Broken("start")
    one = Worker("broken", lambda: tracker, config={}, init_timeout_s=5, replay_command="replay", first_pause_s=0.1)
    one.start()
    one.put(lambda tracker: tracker.log({"n": 1}))
    until(one.is_settled.is_set)
    tracker.broken.clear()
    until(lambda: one.counts.sent == 1)
    one.end()
    assert one.wait_until(time.monotonic() + 5)


def test_a_full_queue_drops_what_is_new_counts_it_and_says_so_once(tmp_path, monkeypatch, caplog):
    tracker = Hanging("log")
    monkeypatch.setattr(Worker.__init__, "__kwdefaults__", {**Worker.__init__.__kwdefaults__, "queue_size": 10})
    one = accelerator(tmp_path, tracker)
    one.init_trackers("p")
    for step in range(100):
        one.log({"loss": step}, step=step)
        if step == 0:
            assert tracker.reached.wait(10)
    one.tracking.flush()
    assert caplog.text.count("takes calls too slowly") == 1
    tracker.released.set()
    one.end_training()
    assert [values["loss"] for values in tracker.logged()] == list(range(11))
    assert run_of(one).facts["calls"]["hanging"] == {"sent": 11, "failed": 0, "dropped": 89}
    assert len(run_of(one).series("loss")) == 100


def test_a_tracker_that_does_not_start_is_not_waited_for(tmp_path, caplog):
    tracker = Hanging("start")
    one = accelerator(tmp_path, tracker, tracker_init_timeout_s=0.3, tracker_finish_timeout_s=0.5)
    begin = time.monotonic()
    one.init_trackers("p")
    for step in range(10):
        one.log({"loss": step}, step=step)
    assert time.monotonic() - begin < 0.3, "init_trackers and log wait for nobody"
    with pytest.raises(TrackerError, match="tracker 'hanging' has not started"):
        one.get_tracker("hanging", unwrap=True)
    until(lambda: "did not start within 0.3 s" in caplog.text)
    begin = time.monotonic()
    one.end_training()
    assert time.monotonic() - begin < 3
    assert caplog.text.count("did not start") == 1
    assert run_of(one).status == "finished"
    assert len(run_of(one).series("loss")) == 10
    tracker.released.set()


def test_a_tracker_that_does_not_finish_is_not_waited_for(tmp_path, caplog):
    slow, good = Hanging("finish"), Recorder()
    one = accelerator(tmp_path, slow, good, tracker_finish_timeout_s=0.5)
    one.init_trackers("p")
    one.log({"loss": 1})
    begin = time.monotonic()
    one.end_training()
    assert time.monotonic() - begin < 3
    assert caplog.text.count("did not finish in time") == 1
    assert good.calls[-1] == ("finish",)
    slow.released.set()


def test_end_training_twice_finishes_once(tmp_path):
    tracker = Recorder()
    one = accelerator(tmp_path, tracker)
    one.init_trackers("p")
    one.end_training()
    one.end_training()
    one.log({"late": 1})  # after the end: nothing, and no error
    assert [call[0] for call in tracker.calls].count("finish") == 1
    assert run_of(one).names() == []


def test_a_tracker_without_a_place_for_something_keeps_the_rest(tmp_path, caplog):
    class NumbersOnly(Recorder):
        name = "numbers_only"
        log_images = GeneralTracker.log_images

    tracker = NumbersOnly()
    one = accelerator(tmp_path, tracker)
    one.init_trackers("p")
    for _ in range(5):
        one.log_images({"i": np.zeros((2, 2))})
    one.log({"a": 1})
    one.end_training()
    assert len(tracker.logged()) == 1
    assert caplog.text.count("has no place for images") == 1


def test_what_is_queued_while_a_tracker_starts_arrives_in_order(tmp_path):
    tracker = Hanging("start")
    one = accelerator(tmp_path, tracker)
    one.init_trackers("p")
    for step in range(50):
        one.log({"n": step})
    threading.Timer(0.2, tracker.released.set).start()
    one.end_training()
    assert [values["n"] for values in tracker.logged()] == list(range(50))
