"""The run folder: where it is, what is in it, and that it can be read whatever happened."""

import argparse
import dataclasses
import enum
import json
import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from doubles import accelerator, run_of

from polyaccel import Accelerator
from polyaccel.config.project import ProjectConfiguration
from polyaccel.errors import ConfigError, TrackerError
from polyaccel.tracking import Run, find_run, list_runs


def strictly(file):
    """The lines of a file, by a parser that refuses NaN and Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


def python(code, folder, *arguments, **options):
    """Run a script that logs through the backend without a framework; warnings go to stderr."""
    setup = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom doubles import accelerator\n"
    return subprocess.Popen(
        [sys.executable, "-c", setup + textwrap.dedent(code), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def done(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


# -- where -------------------------------------------------------------------------------------------------------------------


def test_nothing_is_written_before_something_is_logged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Accelerator(backend="fake", cpu=True, project_dir=tmp_path / "project").end_training()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({}, "runs"),
        ({"project_dir": "out"}, "out/runs"),
        ({"project_config": ProjectConfiguration("out", logging_dir="logs")}, "logs"),
        ({"project_dir": "out", "project_config": ProjectConfiguration(total_limit=2)}, "out/runs"),
    ],
)
def test_runs_stand_where_the_project_says(tmp_path, monkeypatch, arguments, place):
    monkeypatch.chdir(tmp_path)
    logging_accelerator = Accelerator(backend="fake", cpu=True, **arguments)
    logging_accelerator.init_trackers("my project")
    logging_accelerator.end_training()
    (run,) = list_runs(tmp_path / place)
    assert (run.project, run.folder.parent.name) == ("my project", "my_project")


def test_two_places_for_one_project_are_refused():
    with pytest.raises(ConfigError, match="project_dir='a' contradicts"):
        Accelerator(backend="fake", cpu=True, project_dir="a", project_config=ProjectConfiguration("b"))


def test_a_run_id_that_is_no_folder_name_is_refused():
    with pytest.raises(ConfigError, match=r"run_id='\.\./x' cannot name a folder"):
        ProjectConfiguration(run_id="../x")


def test_logging_without_init_trackers_writes_a_run_named_after_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    one = accelerator(tmp_path)
    one.log({"loss": 1.0}, step=0)
    one.end_training()
    assert (run_of(one).project, run_of(one).series("loss")) == ("train", [(0, 1.0)])


def test_a_second_start_is_refused(tmp_path):
    one = accelerator(tmp_path)
    one.init_trackers("a")
    with pytest.raises(TrackerError, match=r"init_trackers\('b'\) cannot start another"):
        one.init_trackers("b")
    one.end_training()


# -- what --------------------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_become_numbers_and_every_line_is_strict_json(tmp_path):
    one = accelerator(tmp_path)
    one.init_trackers("numbers")
    one.log(
        {
            "f32": np.float32(0.5),
            "i64": np.int64(2**53 + 1),
            "zero_d": np.array(3.0),
            "one": np.array([[4]]),
            "vector": np.arange(3),
            "flag": np.bool_(True),
            "nan": math.nan,
            "inf": np.float64("inf"),
            "low": -math.inf,
            "text": "é\n",
            "nested": {"loss": {"a": 1}},
            "big": np.zeros(5000),
            "object": object(),
        },
        step=7,
    )
    one.end_training()
    (line,) = strictly(one.tracking.folder / "metrics.jsonl")
    values = line["values"]
    assert line["step"] == 7
    assert values.pop("big") == {"shape": [5000], "dtype": "float64"}
    assert values.pop("object") == {"object": "builtins.object"}
    assert values == {
        "f32": 0.5, "i64": 2**53 + 1, "zero_d": 3.0, "one": 4, "vector": [0, 1, 2], "flag": True, "nan": "NaN",
        "inf": "Infinity", "low": "-Infinity", "text": "é\n", "nested": {"loss": {"a": 1}},
    }  # fmt: skip
    (entry,) = run_of(one).metrics()
    assert math.isnan(entry.values["nan"])
    assert (entry.values["inf"], entry.values["nested/loss/a"]) == (math.inf, 1)


def test_numbers_of_torch_become_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    one = accelerator(tmp_path)
    one.init_trackers("torch")
    one.log(
        {
            "loss": torch.tensor(0.5, requires_grad=True),
            "bf16": torch.tensor(1.5, dtype=torch.bfloat16),
            "int": torch.tensor([3]),
            "vector": torch.tensor([1.0, math.nan]),
        }
    )
    one.end_training()
    (line,) = strictly(one.tracking.folder / "metrics.jsonl")
    assert line["values"] == {"loss": 0.5, "bf16": 1.5, "int": 3, "vector": [1.0, "NaN"]}


def test_numbers_of_jax_become_numbers(tmp_path):
    jax = pytest.importorskip("jax")
    one = accelerator(tmp_path)
    one.init_trackers("jax")
    one.log({"loss": jax.numpy.float32(0.5), "bf16": jax.numpy.bfloat16(1.5), "vector": jax.numpy.arange(2)})
    one.end_training()
    (line,) = strictly(one.tracking.folder / "metrics.jsonl")
    assert line["values"] == {"loss": 0.5, "bf16": 1.5, "vector": [0, 1]}


def test_a_value_that_changes_after_the_call_was_logged_as_it_was(tmp_path):
    one = accelerator(tmp_path)
    one.init_trackers("copies")
    total, rows, values = np.zeros(()), np.zeros(3), {"python": 0}
    for step in range(5):
        total += 1
        rows += 1
        values["python"] += 1
        one.log({"total": total, "rows": rows, "list": [total], **values}, step=step)
    one.end_training()
    for entry in run_of(one).metrics():
        count = entry.step + 1
        assert entry.values == {"total": count, "rows": [count] * 3, "list": [count], "python": count}


def test_a_tensor_that_changes_after_the_call_was_logged_as_it_was(tmp_path):
    torch = pytest.importorskip("torch")
    one = accelerator(tmp_path)
    one.init_trackers("copies")
    total, rows = torch.zeros(()), torch.zeros(2)
    for step in range(3):
        total += 1
        rows += 1
        one.log({"total": total, "rows": rows}, step=step)
    one.end_training()
    assert [entry.values for entry in run_of(one).metrics()] == [{"total": n, "rows": [n, n]} for n in (1, 2, 3)]


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Settings:
    lr: float
    layers: tuple


def test_any_nesting_of_a_configuration_is_kept(tmp_path):
    config = {
        "model": Settings(1e-3, (1, 2)),
        "arguments": argparse.Namespace(path=Path("a/b"), colour=Colour.RED),
        "sizes": {3, 1, 2},
        "array": np.arange(2),
        "function": math.sqrt,
        1: None,
        "nan": math.nan,
    }
    one = accelerator(tmp_path)
    one.init_trackers("config", config=config)
    one.end_training()
    assert run_of(one).config == {
        "model": {"lr": 1e-3, "layers": [1, 2]},
        "arguments": {"path": "a/b", "colour": "red"},
        "sizes": [1, 2, 3],
        "array": [0, 1],
        "function": "sqrt",
        "1": None,
        "nan": "NaN",
    }


def test_a_namespace_is_a_configuration(tmp_path):
    one = accelerator(tmp_path)
    one.init_trackers("config", config=argparse.Namespace(lr=0.1))
    one.end_training()
    assert run_of(one).config == {"lr": 0.1}


def test_run_json_says_where_and_with_what_the_run_was_made(tmp_path):
    one = accelerator(tmp_path)
    one.init_trackers("facts")
    one.end_training()
    facts = run_of(one).facts
    assert facts["engine"]["backend"] == "fake"
    assert facts["engine"]["num_devices"] == 1
    assert (facts["host"], facts["pid"]) == (socket.gethostname(), os.getpid())
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["command"][0] == sys.executable
    assert [event["event"] for event in run_of(one).events()] == ["start", "end"]


def test_the_commit_of_the_script_is_noted(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    done(python("a = accelerator('logs'); a.init_trackers('x'); a.end_training()", tmp_path))
    (run,) = list_runs(tmp_path / "logs")
    assert len(run.facts["git"]["commit"]) == 40
    assert run.facts["git"]["is_changed"] is False


def pixels(png):
    """Width, height, colour type and raw rows of a PNG file without filters."""
    width, height, _, colour = struct.unpack(">IIBB", png[16:26])
    start = png.index(b"IDAT") + 4
    size = struct.unpack(">I", png[start - 8 : start - 4])[0]
    return width, height, colour, zlib.decompress(png[start : start + size])


def test_images_tables_and_artifacts_are_files_of_the_run(tmp_path):
    one = accelerator(tmp_path)
    one.init_trackers("things")
    picture = np.zeros((2, 3, 3))
    picture[0, 0] = 1.0, 0.5, 2.0  # floats from 0 to 1; what is above is clipped
    one.log_images({"train/input": picture, "gray": [np.full((2, 2), 7, np.uint8)] * 2}, step=1)
    one.log_table("scores", columns=["name", "score"], data=[["a", np.float32(0.5)], ["b", math.nan]], step=1)
    (tmp_path / "weights.bin").write_bytes(b"abc")
    one.log_artifact(tmp_path / "weights.bin", name="weights")
    (tmp_path / "weights.bin").unlink()
    one.end_training()
    run = run_of(one)
    images = [event["file"] for event in run.events("image")]
    assert images == ["images/train_input-1-0.png", "images/gray-1-0.png", "images/gray-1-1.png"]
    assert pixels((run.folder / images[0]).read_bytes())[:3] == (3, 2, 2)
    assert pixels((run.folder / images[0]).read_bytes())[3][:4] == bytes([0, 255, 128, 255])
    assert pixels((run.folder / images[1]).read_bytes()) == (2, 2, 0, bytes([0, 7, 7, 0, 7, 7]))
    (table,) = run.events("table")
    assert json.loads((run.folder / table["file"]).read_text())["rows"] == [["a", 0.5], ["b", "NaN"]]
    (artifact,) = run.events("artifact")
    assert (artifact["name"], (run.folder / artifact["file"]).read_bytes()) == ("weights", b"abc")


def test_what_is_no_image_costs_the_run_nothing_else(tmp_path, caplog):
    one = accelerator(tmp_path)
    one.init_trackers("things")
    one.log_images({"odd": np.zeros((2, 2, 7, 1, 1))})
    one.log({"loss": 1.0})
    one.end_training()
    assert "an image of shape (2, 2, 7, 1, 1) and dtype float64 cannot be drawn" in caplog.text
    assert run_of(one).series("loss") == [(0, 1.0)]


# -- how it stands -------------------------------------------------------------------------------------------------------------


def test_a_killed_process_keeps_what_was_logged_a_tenth_of_a_second_before(tmp_path):
    code = """
        import time
        one = accelerator('logs')
        one.init_trackers('killed')
        for step in range(500):
            one.log({'loss': step}, step=step)
        time.sleep(1)
        print('acknowledged', flush=True)
        time.sleep(60)
    """
    process = python(code, tmp_path)
    assert process.stdout.readline() == "acknowledged\n"
    (run,) = list_runs(tmp_path / "logs")
    assert run.status == "running"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    (run,) = list_runs(tmp_path / "logs")
    assert run.status == "crashed"
    assert run.series("loss") == [(step, step) for step in range(500)]


@pytest.mark.parametrize(
    ("end", "status", "error"),
    [
        ("one.end_training()", "finished", None),
        ("", "finished", None),
        ("raise ValueError('no such file')", "crashed", "ValueError: no such file"),
    ],
)
def test_a_run_says_how_it_ended(tmp_path, end, status, error):
    process = python(f"one = accelerator('logs'); one.init_trackers('x'); one.log({{'a': 1}}); {end}", tmp_path)
    process.communicate(timeout=60)
    (run,) = list_runs(tmp_path / "logs")
    assert (run.status, run.facts["error"], run.series("a")) == (status, error, [(0, 1.0)])


def test_a_run_of_another_host_lives_as_long_as_its_heart_beats(tmp_path):
    one = accelerator(tmp_path)
    one.init_trackers("far")
    one.tracking.flush()
    file = one.tracking.folder / "run.json"
    time.sleep(0.2)  # the facts of the start have been added
    facts = json.loads(file.read_text()) | {"host": "another"}
    file.write_text(json.dumps(facts))
    assert run_of(one).status == "running"
    os.utime(one.tracking.folder / "heartbeat", (0, time.time() - 3600))
    assert run_of(one).status == "crashed"
    one.end_training()


FULL_DISK = """
    import os, resource, signal, sys, time
    one = accelerator('logs')
    one.init_trackers('full')
    one.log({'loss': 0}, step=0)
    time.sleep(0.5)
    # A limit on the size of files is a full disk that needs no disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    for step in range(1, 1000):
        one.log({'loss': step}, step=step)
    time.sleep(1)
    size = os.path.getsize(one.tracking.folder / 'metrics.jsonl')
    if sys.argv[1] == 'freed':
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    one.end_training()
    print(size)
"""


def test_a_full_disk_does_not_stop_training_and_is_said_once(tmp_path):
    out, err = done(python(FULL_DISK, tmp_path, "full"))
    assert int(out) <= 5000
    assert err.count("takes no more (File too large); training goes on") == 1
    assert "lines are missing from the run folder" in err
    (run,) = list_runs(tmp_path / "logs")
    steps = [line["step"] for line in strictly(run.folder / "metrics.jsonl")]
    assert steps == list(range(len(steps)))
    assert steps


def test_lines_that_a_full_disk_refused_are_written_when_it_has_room_again(tmp_path):
    out, err = done(python(FULL_DISK, tmp_path, "freed"))
    assert int(out) <= 5000
    assert "takes no more" in err
    assert "missing" not in err
    (run,) = list_runs(tmp_path / "logs")
    assert run.series("loss") == [(step, step) for step in range(1000)]


# -- going on -----------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_continued_appends_to_the_same_files(tmp_path):
    for part in range(2):
        one = accelerator(tmp_path, run_id="mine")
        one.init_trackers("resumed", config={"part": part})
        for step in range(3 + part * 2, 6 + part * 2):
            one.log({"loss": step + 100 * part}, step=step)
        one.end_training()
    (run,) = list_runs(tmp_path)
    assert (run.id, run.config, len(run.facts["resumed"])) == ("mine", {"part": 1}, 1)
    assert run.series("loss") == [(3, 3), (4, 4), (5, 105), (6, 106), (7, 107)]  # step 5 was taken twice
    assert [event["event"] for event in run.events()] == ["start", "end", "resume", "end"]


def test_a_continued_run_does_not_go_on_in_the_middle_of_a_line(tmp_path):
    folder = tmp_path / "x" / "mine"
    one = accelerator(tmp_path, run_id="mine")
    one.init_trackers("x")
    one.log({"loss": 1}, step=1)
    one.end_training()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "st')
    two = accelerator(tmp_path, run_id="mine")
    two.init_trackers("x")
    two.log({"loss": 2}, step=2)
    two.end_training()
    assert Run.load(folder).series("loss") == [(1, 1.0), (2, 2.0)]


def test_a_run_that_another_process_writes_is_not_continued(tmp_path):
    process = python(
        "import time; one = accelerator('logs', run_id='mine'); one.init_trackers('x'); print(1, flush=True); time.sleep(60)",
        tmp_path,
    )
    assert process.stdout.readline() == "1\n"
    two = accelerator(tmp_path / "logs", run_id="mine")
    with pytest.raises(TrackerError, match=rf"run 'mine' is being written by process {process.pid}"):
        two.init_trackers("x")
    process.kill()
    process.communicate(timeout=30)


# -- reading ------------------------------------------------------------------------------------------------------------------


def test_runs_are_listed_newest_first_and_found_by_the_start_of_their_id(tmp_path):
    for name in ("alpha-1", "alpha-2", "beta"):
        one = accelerator(tmp_path, run_id=name)
        one.init_trackers("p" if name != "beta" else "q")
        one.end_training()
    assert [run.id for run in list_runs(tmp_path)] == ["beta", "alpha-2", "alpha-1"]
    assert [run.id for run in list_runs(tmp_path, project="q")] == ["beta"]
    assert find_run("be", tmp_path).id == "beta"
    with pytest.raises(TrackerError, match="'alpha' could be any of alpha-2, alpha-1"):
        find_run("alpha", tmp_path)
    with pytest.raises(TrackerError, match=r"no run 'betta'.*\nhint: did you mean 'beta'"):
        find_run("betta", tmp_path)
    assert list_runs(tmp_path / "nothing") == []


def test_a_metric_that_was_never_logged_names_the_nearest(tmp_path):
    one = accelerator(tmp_path)
    one.init_trackers("p")
    one.log({"loss": 1.0, "note": "text"})
    one.log({"loss": 2.0})
    one.end_training()
    run = run_of(one)
    assert (run.names(), run.series("loss")) == (["loss"], [(0, 1.0), (1, 2.0)])
    with pytest.raises(TrackerError, match=r"no metric 'los'\nhint: did you mean 'loss'"):
        run.series("los")


def test_a_folder_without_run_json_is_no_run(tmp_path):
    with pytest.raises(TrackerError, match="is no run folder"):
        Run.load(tmp_path)


def test_logging_is_quiet_when_all_is_well(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        one = accelerator(tmp_path)
        one.init_trackers("quiet")
        one.log({"a": 1})
        one.end_training()
    assert caplog.records == []
