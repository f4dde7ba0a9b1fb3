"""What progress bars note in a run folder, and what `polyaccel runs` makes of it."""

import time

import pytest
from doubles import accelerator, run_of

from polyaccel.cli.main import main
from polyaccel.looking import progress
from polyaccel.tracking import speed
from polyaccel.tracking.report import report


@pytest.fixture
def noted(tmp_path):
    """A run of three short epochs, each with an evaluation that is faster."""
    one = accelerator(tmp_path / "runs", run_id="a-run")
    one.init_trackers("p")
    for epoch in range(3):
        for step in one.progress(iter(range(6)), description=f"epoch {epoch + 1}/3", batch_size=8):
            time.sleep(0.004)
            one.log({"loss": 1 / (step + 1)}, step=step)
        list(one.progress(range(5), description="evaluation", batch_size=100))
    one.end_training()
    return run_of(one)


def test_every_loop_is_noted_with_its_rates(noted):
    loops = speed.loops(noted)
    assert [loop["description"] for loop in loops] == [
        "epoch 1/3", "evaluation", "epoch 2/3", "evaluation", "epoch 3/3", "evaluation",
    ]  # fmt: skip
    assert {loop["num_steps"] for loop in loops} == {6, 5}
    for loop in loops[::2]:
        assert 20 < loop["steps_per_s"] < 250
        assert loop["samples_per_s"] == pytest.approx(8 * loop["steps_per_s"])


def test_the_main_loop_is_the_one_of_most_steps_with_its_epochs_together(noted):
    rates = [loop["steps_per_s"] for loop in speed.loops(noted)[::2]]
    assert min(rates) <= speed.main_loop(noted)["steps_per_s"] <= max(rates)
    times = speed.over_time(noted, "samples_per_s")
    assert len(times) == 3
    assert [at for at, _ in times] == sorted(at for at, _ in times)


def test_long_loops_are_noted_while_they_run(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "NOTE_S", 0.05)
    one = accelerator(tmp_path / "runs", run_id="long")
    one.init_trackers("p")
    for _ in one.progress(iter(range(40)), description="train", batch_size=2):
        time.sleep(0.005)
    one.end_training()
    events = list(run_of(one).events("progress"))
    assert len(events) > 2
    assert [event["is_over"] for event in events] == [False] * (len(events) - 1) + [True]
    assert sum(event["num_steps"] for event in events[-1:]) == 40
    assert len(speed.over_time(run_of(one), "steps_per_s")) == len(events) - 1, "the whole loop is no moment of it"


def test_show_and_report_tell_the_speed(noted, capsys):
    assert main(["runs", "show", str(noted.folder)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "throughput" in line)
    assert "steps/s" in line
    assert "samples/s, waiting for data" in line
    page = report(noted)
    assert "<th>samples/s</th>" in page
    assert "samples per second, by seconds" in page
    assert page.count("<td>evaluation</td>") == 3


def test_a_run_without_bars_is_reported_as_before(tmp_path):
    one = accelerator(tmp_path / "runs", run_id="plain")
    one.log({"loss": 1.0}, step=0)
    one.end_training()
    assert speed.main_loop(run_of(one)) is None
    assert speed.in_words(run_of(one)) is None
    assert "<th>samples/s</th>" not in report(run_of(one))


def test_a_bar_shows_what_is_logged_as_the_writer_gets_it(tmp_path, capsys):
    one = accelerator(tmp_path / "runs", run_id="shown")
    for step in one.progress(range(3), description="train"):
        one.log({"loss": 0.125 + step, "name": "a text"}, step=step)
        assert one.tracking.flush()
    one.end_training()
    assert "loss 2.125" in capsys.readouterr().err.splitlines()[-1]


def test_a_continued_epoch_starts_where_it_stopped(tmp_path, capsys):
    import numpy as np

    from polyaccel.testing.fake import FakeLoader

    one = accelerator(tmp_path / "runs")
    loader = one.prepare_data_loader(FakeLoader({"x": np.zeros((10, 1))}, 2))
    for index, _ in enumerate(loader):
        if index == 2:
            state = loader.state
            break
    loader.load_state(state)
    assert len(list(one.progress(loader))) == 2
    assert capsys.readouterr().err.startswith("5/5, ")
