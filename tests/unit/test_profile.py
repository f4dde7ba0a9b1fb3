"""When a profile records, and what it keeps: on the backend without a framework."""

import json

import pytest

from polyaccel import Accelerator
from polyaccel.config.profile import ProfileKwargs
from polyaccel.errors import ConfigError, UnsupportedError
from polyaccel.looking.spans import averages_of
from polyaccel.registry import register_backend
from polyaccel.testing.fake import FakeBackend, FakeTracer

register_backend(FakeBackend())


def accelerator(**arguments):
    return Accelerator(backend="fake", cpu=True, **arguments)


def names(file):
    return [event["name"] for event in json.loads(file.read_text())["traceEvents"]]


def test_phases_are_those_of_torchs_schedule():
    option = {"skip_first": 1, "wait": 2, "warmup": 1, "active": 2, "repeat": 2}
    phases = [ProfileKwargs(schedule_option=option).phase(step) for step in range(13)]
    circle = ["idle", "idle", "warm up", "record", "record and save"]
    assert phases == ["idle", *circle, *circle, "idle", "idle"]
    early = ProfileKwargs(schedule_option={**option, "skip_first_wait": 1})
    assert [early.phase(step) for step in range(4)] == ["idle", "warm up", "record", "record and save"]


def test_phases_agree_with_torch_where_it_is_installed():
    profiler = pytest.importorskip("torch.profiler")
    known = {
        profiler.ProfilerAction.NONE: "idle",
        profiler.ProfilerAction.WARMUP: "warm up",
        profiler.ProfilerAction.RECORD: "record",
        profiler.ProfilerAction.RECORD_AND_SAVE: "record and save",
    }
    for option in (
        {"wait": 1, "warmup": 1, "active": 3},
        {"wait": 2, "warmup": 1, "active": 1, "repeat": 2, "skip_first": 3},
        {"wait": 3, "warmup": 2, "active": 2, "repeat": 1, "skip_first": 1, "skip_first_wait": 1},
    ):
        theirs = profiler.schedule(**option)
        assert [ProfileKwargs(schedule_option=option).phase(s) for s in range(25)] == [
            known[theirs(s)] for s in range(25)
        ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"warm_up": 1, "active": 1}, "did you mean 'warmup'"),
        ({"wait": 1}, "no active steps"),
        ({"active": 0}, "active=0"),
        ({"active": 1, "wait": -1}, "wait=-1"),
    ],
)
def test_a_schedule_that_is_none_is_refused(option, message):
    with pytest.raises(ConfigError, match=message):
        ProfileKwargs(schedule_option=option)


def test_every_circle_is_a_trace_of_its_active_steps_and_is_handed_on(tmp_path):
    ready = []
    settings = ProfileKwargs(
        schedule_option={"wait": 1, "warmup": 1, "active": 2, "repeat": 2},
        on_trace_ready=lambda profile: ready.append((profile.step_num, len(profile.files))),
        output_trace_dir=tmp_path,
    )
    with accelerator().profile(settings) as profile:
        for _ in range(10):
            profile.step()
    traces = sorted(tmp_path.glob("*.trace.json"))
    assert [names(file) for file in traces] == [
        ["ProfilerStep#2", "ProfilerStep#3"], ["ProfilerStep#6", "ProfilerStep#7"],
    ]  # fmt: skip
    assert ready == [(4, 2), (8, 3)]
    assert names(tmp_path / "profile_0.json") == ["ProfilerStep#6", "ProfilerStep#7"], "where Accelerate's scripts look"


def test_without_a_schedule_the_block_is_one_trace_in_the_folder_of_the_run(tmp_path):
    one = accelerator(project_dir=tmp_path)
    one.init_trackers("p")
    with one.profile() as profile, profile.span("mine"):
        pass
    one.end_training()
    (file,) = profile.files
    assert file.parent == one.tracking.folder / "profile"
    assert names(file) == ["mine", "ProfilerStep#0"]
    events = (one.tracking.folder / "events.jsonl").read_text()
    assert '"event":"profile"' in events


def test_without_a_run_the_folder_is_that_of_the_project(tmp_path):
    with accelerator(project_dir=tmp_path).profile() as profile:
        pass
    assert profile.files[0].parent.parent == tmp_path / "profile"


def test_a_trace_can_be_copied_while_the_script_goes_on(tmp_path):
    with accelerator().profile(ProfileKwargs(output_trace_dir=tmp_path / "a")) as profile:
        with pytest.raises(ConfigError, match="no trace"):
            profile.export_chrome_trace(tmp_path / "too-early.json")
    profile.export_chrome_trace(tmp_path / "copy.json")
    assert names(tmp_path / "copy.json") == ["ProfilerStep#0"]


def test_an_exception_passes_and_what_was_recorded_is_kept(tmp_path):
    with pytest.raises(KeyError), accelerator().profile(ProfileKwargs(output_trace_dir=tmp_path)) as profile:
        raise KeyError
    assert profile.files


def test_the_handler_of_the_accelerator_counts_where_the_call_gives_none(tmp_path):
    one = accelerator(kwargs_handlers=[ProfileKwargs(output_trace_dir=tmp_path)])
    with one.profile() as profile:
        pass
    assert profile.folder == tmp_path


def test_other_handlers_and_two_of_them_are_refused():
    class GradScalerKwargs:
        pass

    with pytest.raises(ConfigError, match="GradScalerKwargs"):
        accelerator(kwargs_handlers=[GradScalerKwargs()])
    with pytest.raises(ConfigError, match="two"):
        accelerator(kwargs_handlers=[ProfileKwargs(), ProfileKwargs()])


def test_a_backend_that_declares_no_profile_refuses(monkeypatch):
    one = accelerator()
    one._features = one._features - {"profile"}
    with pytest.raises(UnsupportedError, match="backend 'fake' records no profile"):
        one.profile()


def test_a_warm_up_that_nothing_follows_is_ended(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(FakeTracer, "discard", lambda self: ended.append(self))
    option = {"warmup": 2, "active": 1}
    with accelerator().profile(ProfileKwargs(schedule_option=option, output_trace_dir=tmp_path)) as profile:
        pass
    assert len(ended) == 1
    assert profile.files == []


def test_what_only_another_frameworks_profiler_has_is_an_attribute_error():
    with pytest.raises(AttributeError, match="events"):
        _ = accelerator().profile().events


def test_a_trace_is_summed_up_by_the_names_of_its_spans(tmp_path):
    def span(name, start, duration, pid=1, tid=1):
        return {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": duration, "name": name}

    trace = tmp_path / "trace.json"
    place = {"ph": "M", "name": "process_name"}
    trace.write_text(json.dumps({"traceEvents": [
        {**place, "pid": 1, "args": {"name": "/host:CPU"}},
        {**place, "pid": 2, "args": {"name": "/device:GPU:0"}},
        span("outer", 0, 10), span("inner", 1, 4), span("innermost", 2, 1), span("inner", 6, 2),
        span("inner", 20, 5), span("inner", 0, 1, tid=2), span("kernel", 3, 7, pid=2), {},
    ]}))  # fmt: skip
    found = averages_of(trace)
    assert {(row.key, row.is_on_device): (row.count, row.total_us, row.self_us) for row in found} == {
        ("outer", False): (1, 10, 4),
        ("inner", False): (4, 12, 11),
        ("innermost", False): (1, 1, 1),
        ("kernel", True): (1, 7, 7),
    }
    assert [line.split()[0] for line in found.table("self_cuda_time_total").splitlines()][:2] == ["name", "kernel"]
    assert [line.split()[0] for line in found.table("cpu_time", row_limit=1).splitlines()] == ["name", "outer"]
    assert found.table("count", row_limit=1).splitlines()[1].split() == [
        "inner",
        "host",
        "11.0",
        "us",
        "12.0",
        "us",
        "3.0",
        "us",
        "4",
    ]
    with pytest.raises(ConfigError, match="self_cpu_memory_usage"):
        found.table(sort_by="self_cpu_memory_usage")


def test_a_profile_without_a_trace_has_nothing_to_sum_up():
    with pytest.raises(ConfigError, match="no trace to sum up yet"):
        accelerator().profile().key_averages()
