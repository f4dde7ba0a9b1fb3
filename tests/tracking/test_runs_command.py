"""`polyaccel runs` on run folders."""

import json

import numpy as np
import pytest
from doubles import Recorder, accelerator, run_of

from polyaccel.cli.main import main
from polyaccel.errors import TrackerError
from polyaccel.tracking import names, register_tracker_class, replay
from polyaccel.tracking.runs import Run


class Kept(Recorder):
    name = "kept_for_replay"
    takes_files = True
    made = []

    def __init__(self, *project, **options):
        super().__init__(*project, **options)
        self.made.append(self)


register_tracker_class(Kept)


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


def test_what_was_logged_to_one_tracker_is_replayed_to_that_one_alone(written, monkeypatch):
    monkeypatch.setattr(names, "_registered", {})
    register_tracker_class(type("Again", (Kept,), {"name": "recorder"}))
    Kept.made.clear()
    assert replay(written, "recorder").num_metrics == 3
    assert {"only": 1} in Kept.made[0].logged()


def test_a_tracker_that_fails_ends_the_replay_with_its_own_error(written):
    class Down(Kept):
        name = "down"

        def log(self, values, step=None, **kwargs):
            raise ConnectionError("the server is gone")

    register_tracker_class(Down)
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


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The id of a run of forty steps, two of them compiled, with a checkpoint; the working folder is that of `runs`."""
    monkeypatch.chdir(tmp_path)
    one = accelerator("runs", run_id="trained")
    one.init_trackers("digits", config={"lr": 0.1, "model": {"width": 8}})
    for step in range(40):
        one.log({"lr": 0.1, "train/loss": 1 / (step + 1), "<odd & name>": step}, step=step)
    one.tracking.event("compile", program="step", cause="first call", capture_s=0.5, compile_s=1.5, step=0)
    one.tracking.event("compile", program="step", cause="x changed", capture_s=0.0, compile_s=1.0, step=7)
    one.tracking.event("checkpoint", path="checkpoints/checkpoint_0", step=20)
    one.log({"accuracy": 0.875, "never": float("nan")}, step=40)
    one.end_training()
    return "trained"


def test_runs_alone_lists_them_with_the_curve_of_the_loss(trained, capsys):
    for arguments in (
        ["runs"],
        ["runs", "list"],
        ["runs", "--folder", "runs", "list"],
        ["runs", "--project", "digits"],
    ):
        assert main(arguments) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("trained  finished")
        assert "█▃▂▂" in line
        assert line.endswith("train/loss 0.025")
    assert main(["runs", "list", "--project", "another"]) == 0
    assert "no runs" in capsys.readouterr().out


def test_a_run_is_shown_with_a_plot_for_each_metric(trained, capsys):
    assert main(["runs", "show", "tr"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("digits / trained: finished")
    assert "compiled: 2 programs in 3.0 s" in shown
    assert "checkpoints: 1" in shown
    assert "train/loss: 0.025 at step 39" in shown
    assert "accuracy: 0.875 at step 40\n  (one value)" in shown
    assert shown.count("└") == 3
    assert main(["runs", "show", "trained", "--metric", "lr"]) == 0
    assert capsys.readouterr().out.count("└") == 1
    assert main(["runs", "show", "trained", "--metric", "los"]) == 1
    assert "no metric 'los'" in capsys.readouterr().err


def test_a_report_is_one_page_that_asks_nothing_of_the_network(trained, capsys):
    assert main(["runs", "report", trained, "-o", "pages/report.html"]) == 0
    assert "wrote pages/report.html" in capsys.readouterr().out
    with open("pages/report.html", encoding="utf-8") as file:
        page = file.read()
    assert page.count("<polyline") == 3
    assert "&lt;odd &amp; name&gt;" in page
    assert "<odd" not in page
    for said in ("2 programs in 3.0 s", "x changed", "checkpoints/checkpoint_0", "model.width", "0.875", "nan"):
        assert said in page
    assert not any(
        word in page.replace("http://www.w3.org/2000/svg", "") for word in ("http:", "https:", "src=", "@import")
    )


def test_a_report_stands_in_the_folder_of_its_run_by_default(trained, tmp_path):
    assert main(["runs", "report", trained]) == 0
    assert (tmp_path / "runs" / "digits" / "trained" / "report.html").is_file()


def test_throughput_is_that_of_stretches_and_a_resumed_run_starts_a_new_one(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    moments = [(1000 + 0.01 * step, step) for step in range(600)]  # 100 steps/s, then back to 400 after a minute
    moments += [(1066 + 0.02 * step, 400 + step) for step in range(600)]  # 50 steps/s
    lines = [json.dumps({"time": at, "step": step, "values": {"loss": 1.0}}) for at, step in moments]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    rates = [round(rate) for _, rate in Run(folder, {}).throughput()]
    assert set(rates) == {100, 50}
    assert Run(tmp_path, {}).throughput() == []
