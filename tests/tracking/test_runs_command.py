"""`polyaccel runs` on run folders."""

import json

import numpy as np
import pytest
from doubles import Recorder, accelerator, run_of

from polyaccel.cli.main import main
from polyaccel.errors import TrackerError
from polyaccel.tracking import register_tracker_class, replay


class Kept(Recorder):
    name = "kept_for_replay"
    takes_files = True
    made = []

    def __init__(self, *project, **options):
        super().__init__(*project, **options)
        self.made.append(self)


register_tracker_class("kept_for_replay", Kept)


@pytest.fixture
def written(tmp_path):
    """A run with two metrics, an object of a vendor's own, an image, a table and an artifact."""
    one = accelerator(tmp_path / "runs", Recorder(), run_id="a-run")
    one.init_trackers("p", config={"lr": 0.1, "api_key": "never-to-be-seen"})
    one.log({"loss": float("nan"), "nested": {"a": 1}}, step=0)
    one.get_tracker("recorder").log({"only": 1}, step=0)
    one.log({"loss": 0.5, "object": object()}, step=1)
    one.log_images({"i": np.zeros((2, 2))}, step=1)
    one.log_table("t", ["a"], [[float("inf")]], step=1)
    (tmp_path / "f.txt").write_text("x")
    one.log_artifact(tmp_path / "f.txt")
    one.end_training()
    return run_of(one)


def test_runs_are_listed(written, capsys):
    assert main(["runs", "list", "--folder", str(written.folder.parent.parent)]) == 0
    assert capsys.readouterr().out.split()[:2] == ["a-run", "finished"]


def test_no_runs_is_an_answer(tmp_path, capsys):
    assert main(["runs", "list", "--folder", str(tmp_path)]) == 0
    assert "no runs below" in capsys.readouterr().out


def test_a_run_is_sent_to_a_tracker_as_it_was_logged(written, capsys):
    Kept.made.clear()
    assert (
        main(["runs", "replay", "a-r", "--folder", str(written.folder.parent.parent), "--to", "kept_for_replay"]) == 0
    )
    assert "sent a-run to kept_for_replay: 2 log calls, 1 images, 1 tables, 1 artifacts" in capsys.readouterr().out
    (tracker,) = Kept.made
    kinds = [call[0] for call in tracker.calls]
    assert kinds == ["start", "config", "log", "log", "images", "table", "artifact", "finish"]
    assert tracker.calls[1][1] == {"lr": 0.1, "api_key": "[redacted]"}
    first, second = [call[1:3] for call in tracker.calls if call[0] == "log"]
    assert (str(first[0]["loss"]), first[0]["nested/a"], first[1]) == ("nan", 1, 0)
    assert second == ({"loss": 0.5}, 1)
    assert tracker.calls[5][1:] == ("t", ["a"], [[float("inf")]], 1)


def test_what_was_logged_to_one_tracker_is_replayed_to_that_one_alone(written):
    register_tracker_class("recorder", type("Again", (Kept,), {"name": "recorder"}))
    Kept.made.clear()
    assert replay(written, "recorder").num_metrics == 3
    assert {"only": 1} in Kept.made[0].logged()


def test_a_tracker_that_fails_ends_the_replay_with_its_own_error(written):
    class Down(Kept):
        name = "down"

        def log(self, values, step=None, **kwargs):
            raise ConnectionError("the server is gone")

    register_tracker_class("down", Down)
    with pytest.raises(ConnectionError, match="gone"):
        replay(written, "down")
    assert Kept.made[-1].calls[-1] == ("finish",)


def test_an_unknown_run_or_tracker_is_named(written, capsys):
    folder = str(written.folder.parent.parent)
    assert main(["runs", "replay", "b", "--folder", folder, "--to", "wandb"]) == 1
    assert "no run 'b' below" in capsys.readouterr().err
    with pytest.raises(TrackerError, match="'wandbb' is no tracker"):
        replay(written, "wandbb")


def test_a_line_that_is_not_json_is_passed_over(written):
    with (written.folder / "metrics.jsonl").open("a") as file:
        file.write("{half\n" + json.dumps({"time": 9, "step": 2, "values": {"loss": 1}}) + "\n")
    assert written.series("loss")[-1] == (2, 1.0)
