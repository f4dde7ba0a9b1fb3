"""Progress bars: what they count, what they show where, and that a loop is the same with them as without."""

import os
import pty
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from polyaccel.errors import PrepareError
from polyaccel.looking import bars, instruments
from polyaccel.looking.bars import Field, View
from polyaccel.looking.devices import peak_of, process_memory
from polyaccel.looking.meter import WINDOW_S, Meter, settle
from polyaccel.looking.progress import Instruments, Progress
from polyaccel.topology import Topology


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Shown:
    """A display that keeps what it was to draw."""

    every_s = 0.0
    may_close_late = False

    def __init__(self):
        self.views, self.closed = [], []

    def draw(self, view):
        self.views.append(view)

    def close(self, view):
        self.closed.append(view)

    def fields(self):
        return [field.text for field in self.closed[-1].fields]


@pytest.fixture
def shown(monkeypatch):
    display = Shown()
    monkeypatch.setattr(bars, "display_for", lambda view: display)
    return display


# -- what is counted -------------------------------------------------------------------------------------------------------


def test_rates_begin_after_the_first_step_which_may_have_compiled():
    clock = Clock()
    meter = Meter(counts_waiting=True, clock=clock)
    meter.counts_samples = True
    clock.now, meter.num_steps, meter.num_samples, meter.wait_s = 100.0, 1, 8, 50.0
    meter.mark()
    assert meter.recent().steps_per_s is None
    clock.now, meter.num_steps, meter.num_samples, meter.wait_s = 102.0, 11, 88, 50.5
    meter.mark()
    rates = meter.recent()
    assert (rates.steps_per_s, rates.samples_per_s, rates.data_share) == (5.0, 40.0, 0.25)
    assert meter.overall() == rates


def test_rates_are_those_of_the_last_seconds():
    clock = Clock()
    meter = Meter(counts_waiting=False, clock=clock)
    for _ in range(40):  # one step a second, then ten
        meter.mark()
        clock.now += 1
        meter.num_steps += 1 if clock.now < 20 else 10
    meter.mark()
    assert meter.recent().steps_per_s == pytest.approx(10)
    assert meter.recent().seconds <= WINDOW_S + 1
    assert meter.overall().steps_per_s == pytest.approx((19 + 21 * 10) / 40)


def test_operations_per_second_are_unknown_where_one_program_cannot_be_counted():
    clock = Clock()
    meter = Meter(counts_waiting=False, clock=clock)
    done = iter([0.0, 6e12, None])
    meter.flops = lambda: next(done)
    meter.mark()
    clock.now, meter.num_steps = 2.0, 3
    meter.mark()
    assert meter.recent().flops_per_s == 3e12
    clock.now, meter.num_steps = 4.0, 6
    meter.mark()
    assert meter.recent().flops_per_s is None


def test_a_device_that_is_behind_gives_the_rate_and_the_loop_does_not_wait_for_it(shown):
    """Ten steps are handed over at once, and the device takes ten milliseconds for each."""
    handed, notes = [], []

    def fence():
        done = start + 0.01 * len(handed)
        return lambda: time.sleep(max(0.0, done - time.perf_counter()))

    start = time.perf_counter()
    for item in Progress(range(30), Instruments(fence=fence, note=notes.append)):
        handed.append(item)
    assert time.perf_counter() - start < 0.15, "the loop was over long before the device"
    assert notes == []
    settle(5.0)
    (note,) = notes
    assert note["steps_per_s"] == pytest.approx(100, rel=0.2)
    assert note["num_steps"] == 30


def test_a_device_that_fails_ends_the_measurement_and_nothing_else(shown):
    def fence():
        return lambda: 1 / 0

    assert list(Progress(range(3), Instruments(fence=fence, note=pytest.fail))) == [0, 1, 2]
    settle(5.0)


def test_a_bar_passes_every_item_on_and_notes_the_loop(shown):
    notes = []
    loop = Progress(iter("abc"), Instruments(note=notes.append), description="letters", batch_size=4)
    assert list(loop) == ["a", "b", "c"]
    (note,) = notes
    assert (note["description"], note["num_steps"], note["is_over"]) == ("letters", 3, True)
    assert note["samples_per_s"] == pytest.approx(4 * note["steps_per_s"])
    assert shown.closed[-1].done == 3


def test_a_loop_that_breaks_or_raises_is_closed_with_the_batches_that_it_was_given(shown):
    for _ in Progress(range(10), Instruments()):
        if len(shown.views) == 2:
            break
    assert [view.done for view in shown.closed] == [3]

    def failing():
        for item in Progress(range(10), Instruments()):
            raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        failing()
    assert len(shown.closed) == 2


def test_a_loop_can_run_again_and_counts_anew(shown):
    loop = Progress([1, 2, 3], Instruments())
    assert [list(loop), list(loop)] == [[1, 2, 3], [1, 2, 3]]
    assert [view.done for view in shown.closed] == [3, 3]
    assert len(loop) == 3


def test_steps_can_be_counted_by_hand(shown):
    with Progress(None, Instruments(), total=6, batch_size=2) as bar:
        for _ in range(3):
            bar.update(2)
    assert (shown.closed[-1].done, shown.closed[-1].total) == (6, 6)
    assert "samples/s" in " ".join(shown.fields())


def test_nothing_to_iterate_over_is_an_error_with_the_way_out():
    with pytest.raises(PrepareError, match="update"):
        next(iter(Progress(None, Instruments())))


def test_a_process_without_a_bar_runs_the_same_loop(shown):
    loop = Progress("ab", Instruments(is_shown=False, note=pytest.fail))
    assert list(loop) == ["a", "b"]
    loop.update()
    loop.show(loss=1.0)
    assert shown.closed == []


def test_the_share_of_waiting_is_the_time_that_the_iterable_took(shown):
    def slow():
        for item in range(6):
            time.sleep(0.01)
            yield item

    for _ in Progress(slow(), Instruments()):
        time.sleep(0.01)
    (share,) = [text for text in shown.fields() if text.startswith("data")]
    assert 30 < int(share.split()[1].rstrip("%")) < 70


def test_a_step_costs_a_few_microseconds_at_most():
    """The bar is drawn in a pipe here, so never within this loop; the bound leaves room for a slow machine."""
    items = range(50_000)
    costs = []
    for _ in range(3):
        began = time.process_time()
        for _ in Progress(iter(items), Instruments()):
            pass
        costs.append((time.process_time() - began) / len(items) * 1e6)
    assert min(costs) < 5, f"{min(costs):.2f} us per step"


# -- what is shown ---------------------------------------------------------------------------------------------------------


def test_metrics_are_those_logged_since_the_bar_began_losses_first(shown):
    logged = {"old_loss": (3, 1.0), "epoch": (4, 1), "train/loss": (4, 0.25)}
    steps = iter([{"old_loss": (3, 1.0)}])
    instruments = Instruments(metrics=lambda: next(steps, logged))
    list(Progress([1], instruments))
    assert shown.fields()[-2:] == ["train/loss 0.25", "epoch 1"]


def test_shown_metrics_stand_instead_of_logged_ones(shown):
    loop = Progress([1, 2], Instruments(metrics=lambda: {"loss": (1, 5.0)}, fetch=dict))
    for item in loop:
        loop.show(accuracy=item / 2, name="not a number")
    assert shown.fields()[-1] == "accuracy 1"


def test_a_value_that_is_on_a_device_still_holds_nothing_up(shown):
    arrived, fetched = threading.Event(), threading.Event()

    def wait():
        assert arrived.wait(10)
        fetched.set()
        return {"loss": 0.5}

    loop = Progress(range(20), Instruments(fetch=lambda values: wait))
    for item in loop:
        loop.show(loss=object())
        if item == 10:
            arrived.set()
            assert fetched.wait(10)
            time.sleep(0.05)
    texts = [[field.text for field in view.fields][-1] for view in shown.views]
    assert "loss 0.5" not in texts[:9]
    assert texts[-1] == "loss 0.5"


def test_mfu_is_of_all_devices_and_without_a_known_peak_there_is_the_speed(shown):
    for peak, wanted in ((2e12, "MFU "), (None, "FLOP/s")):
        loop = Progress(iter(range(3)), Instruments(peak_flops=peak), flops_per_step=1e9)
        for _ in loop:
            time.sleep(0.01)
        assert wanted in " ".join(shown.fields())
    rate = float(" ".join(shown.fields()).split("GFLOP/s")[0].split()[-1])
    assert 20 < rate <= 100, "1 GFLOP in each step of ten milliseconds or more"


def test_fields_of_low_rank_leave_a_line_that_is_too_short():
    fields = [Field("time", 9), Field("memory", 2), Field("loss", 6)]
    assert bars.fitting(fields, 80) == "time, memory, loss"
    assert bars.fitting(fields, 12) == "time, loss"
    assert bars.fitting(fields, 2) == ""


def test_a_pipe_gets_one_line_at_the_end_and_one_every_half_a_minute(capsys, monkeypatch):
    list(Progress(range(5), Instruments(), description="short"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("short: 5/5, 0:00")
    monkeypatch.setattr(bars.PlainLines, "every_s", 0.02)
    for _ in Progress(iter(range(5)), Instruments(), description="long {}"):
        time.sleep(0.03)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert all(line.startswith("long {}: ") for line in lines)
    assert "\r" not in "".join(lines)


NESTED = """
    import time
    from polyaccel.looking.progress import Instruments, Progress

    for epoch in Progress(range(2), Instruments(), description="epochs"):
        for step in Progress(iter(range(4)), Instruments(), description=f"epoch {epoch} {{}}"):
            time.sleep(0.03)
    with Progress(None, Instruments(), total=10, description="left") as bar:
        bar.update(3)
    print("done")
"""


def in_terminal(script):
    """What a script writes to a terminal (of no columns, as some containers have them)."""
    main, other = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=other, stderr=other)
    os.close(other)
    written = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the last writer has gone
            break
        if not part:
            break
        written += part
    os.close(main)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_a_terminal_gets_bars_that_are_drawn_over_and_nested_ones_below():
    written = in_terminal(NESTED)
    screens = [line.strip() for line in written.replace("\x1b[A", "").split("\r")]
    assert any(line.startswith("epochs:  50%|") for line in screens)
    assert any(line.startswith("epoch 1 {}: 4, ") and "steps/s" in line for line in screens)
    assert any(line.startswith("left:  30%|") and "3/10" in line for line in screens)
    assert screens[-2:][0].endswith("done") or "done" in screens[-1]
    assert max(map(len, screens)) <= 80


# -- names and numbers -----------------------------------------------------------------------------------------------------


def test_numbers_are_short_enough_for_a_bar():
    assert [bars.short(n) for n in (0.123456, 12.345, 787.4, 9999.0, 45_600, 3.12e14, 2.5e15, float("inf"))] == [
        "0.123", "12.3", "787", "9999", "45.6k", "312T", "2.5P", "inf",
    ]  # fmt: skip
    assert [bars.clock(n) for n in (0.4, 83, 3723, 200_000)] == ["0:00", "1:23", "1:02:03", "55:33:20"]
    assert [bars.memory(400 * 2**20, None), bars.memory(3 * 2**30, None), bars.memory(2**34, 80 * 2**30)] == [
        "400 MiB", "3.0 GiB", "16.0/80 GiB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_the_peak_of_a_device_is_found_by_the_name_that_its_driver_gives(name, peak):
    assert peak_of(name).flops == peak
    assert peak_of(name).source


@pytest.mark.parametrize("name", ["cpu", "NVIDIA A10G", "TPU v4 lite", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Apple M3"])
def test_a_device_that_is_not_in_the_table_has_no_peak(name):
    assert peak_of(name) is None


def test_the_memory_of_the_process_is_what_it_holds():
    before = process_memory()
    held = bytearray(64 * 2**20)
    assert process_memory() - before > 0.8 * len(held)


def test_a_view_without_a_total_says_how_many():
    assert bars.counted(View("", 3, None, ())) == "3"


def test_the_last_line_in_a_pipe_waits_for_the_device_on_a_thread_of_its_own_also_at_the_end_of_the_script():
    script = """
        import time
        from polyaccel.looking.progress import Instruments, Progress

        count = 0
        def fence():
            done = start + 0.02 * count
            return lambda: time.sleep(max(0.0, done - time.perf_counter()))

        start = time.perf_counter()
        for _ in Progress(range(20), Instruments(fence=fence), description="fast"):
            count += 1
        print("the loop is over", flush=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("fast: 20/20, 0:00, ")
    # 50 in a second; more where the thread came late to see the first of them; tens of thousands where nobody waits.
    assert 35 < float(line.split("0:00, ")[1].split()[0]) < 1000


def test_what_is_printed_in_a_loop_stands_above_the_bar():
    written = in_terminal(
        """
        from polyaccel.looking.bars import print_above
        from polyaccel.looking.progress import Instruments, Progress

        for step in Progress(range(3), Instruments(), description="train"):
            print_above("said in step", step)
        """
    )
    lines = [line.split("\r")[-1].strip() for line in written.replace("\r\n", "\n").split("\n")]
    assert [line for line in lines if line.startswith("said")] == [f"said in step {step}" for step in range(3)]
    assert lines[-2].startswith("train: 100%|")


def test_accelerates_tqdm_is_shown_on_the_first_process_of_a_host_alone(monkeypatch):
    from polyaccel import jobs
    from polyaccel.utils import tqdm

    class Engine:
        class topology:
            is_local_main_process = False

    monkeypatch.setattr(jobs, "current", lambda: Engine)
    assert tqdm(range(3)).disable
    with tqdm(range(3), main_process_only=False) as shown:
        assert not shown.disable
    assert list(tqdm("ab")) == ["a", "b"]
    with pytest.raises(ValueError, match="main_process_only=True"):
        tqdm(True, range(3))


class DeviceEngine:
    """What an engine tells of its devices."""

    device_name = "NVIDIA H100 80GB HBM3"

    def __init__(self, kind, memory=None):
        self.topology = Topology(0, 1, 0, 1, 8, kind)
        self.memory = memory

    def device_memory(self):
        return self.memory


def reads(engine, *features):
    nothing = {"is_shown": True, "metrics": dict, "fetch": dict, "note": print}
    return instruments(engine, frozenset(features), **nothing)


def test_memory_is_that_of_the_device_or_of_the_process_where_the_device_is_the_host():
    assert reads(DeviceEngine("tpu", (3, 4)), "device_stats").memory() == (3, 4)
    used, limit = reads(DeviceEngine("cpu"), "device_stats").memory()
    assert used > 2**20
    assert limit is None
    assert reads(DeviceEngine("cpu")).memory()[0] > 2**20
    assert reads(DeviceEngine("tpu")).memory() is None, "what the host holds says nothing of a device"


def test_the_peak_is_that_of_all_devices_of_the_job():
    assert reads(DeviceEngine("cuda"), "device_stats").peak_flops == 8 * 989e12
    assert reads(DeviceEngine("cuda")).peak_flops is None
    assert reads(DeviceEngine("cuda")).fence is None
    assert reads(DeviceEngine("cuda")).count_flops is None
