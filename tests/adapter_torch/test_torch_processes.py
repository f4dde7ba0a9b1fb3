"""Two gloo processes compared with one: torch_job.py answers in both, the arithmetic is judged here."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import pytest
import torch
import torch_job
from gloo_jobs import answers_of
from torch import nn
from torch_network import X, Y, mean_squared_error, network

from polyaccel_torch.parallel import _await_threads

JOB = Path(torch_job.__file__)


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict]:
    """What process 0 and process 1 answered."""
    return answers_of(JOB, tmp_path_factory.mktemp("job"), 2, warnings="error")


def one_process(steps_per_update: int = 1) -> dict:
    """Two epochs over the same global batches: eight samples, or sixteen."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        for start in range(0, 16, 8 * steps_per_update):
            batches = [slice(first, first + 8) for first in range(start, start + 8 * steps_per_update, 8)]
            for rows in batches:
                loss = mean_squared_error(model, (X[rows], Y[rows]))
                (loss / len(batches)).backward()
                losses.append(loss.item())
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": losses, "weights": torch_job.flat(model)}


def assert_agree(answer: dict, expected: dict, *, tolerance: float) -> None:
    assert answer["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert answer["weights"] == pytest.approx(expected["weights"], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("form", ["value_form", "function_form", "train_step_form"])
def test_two_processes_compute_what_one_does_with_the_global_batch(answers, form):
    for answer in answers:
        # Two half sums instead of one, through AdamW's division by small second moments.
        assert_agree(answer[form], one_process(), tolerance=2e-5)
    assert answers[0][form] == answers[1][form]


@pytest.mark.parametrize("form", ["value", "function", "train_step"])
def test_accumulation_over_two_processes_equals_the_large_batch(answers, form):
    for answer in answers:
        assert_agree(answer["accumulated"][form], one_process(steps_per_update=2), tolerance=2e-5)


def test_bfloat16_stays_close_to_float32(answers):
    # 8 bits of mantissa; the losses fall from 1.3 to 0.9 here
    assert answers[0]["bfloat16"]["losses"] == pytest.approx(one_process()["losses"], rel=2e-2)
    assert answers[0]["bfloat16"]["weights"] == answers[1]["bfloat16"]["weights"]


def test_a_compiled_model_exchanges_gradients_too(answers):
    for answer in answers:
        assert_agree(answer["compiled"], one_process(), tolerance=2e-5)
        assert_agree(answer["compiled_and_accumulated"], one_process(steps_per_update=2), tolerance=2e-5)


def test_gradients_are_exchanged_only_when_the_window_closes(answers):
    # Sixteen samples in batches of two on two processes: four batches each, in windows of four.
    assert answers[0]["exchanges"] == answers[1]["exchanges"] == [0, 0, 0, 1]


def test_an_overflow_on_one_process_makes_all_skip(answers):
    for answer in answers:
        assert answer["overflow_on_one_process"]["skipped"] == [True, False]
        assert answer["overflow_on_one_process"]["scales"] == [256.0, 128.0]
    assert answers[0]["overflow_on_one_process"]["weights"] == answers[1]["overflow_on_one_process"]["weights"]


def test_auxiliary_floats_are_averaged_integers_added_and_arrays_kept(answers):
    for answer in answers:
        aux = answer["auxiliary_values"]
        assert aux["rows"] == [4, 2]
        assert (aux["rate"], aux["seen"], aux["flag"]) == (0.5, 5, 2)
        assert aux["loss"] == pytest.approx(one_process()["losses"][0], rel=1e-6)


@pytest.mark.parametrize("kind", ["default", "own"])
def test_processes_with_different_seeds_share_the_order_of_process_0(answers, kind):
    for epoch in range(2):
        parts = [answer["shuffled_orders"][kind][epoch] for answer in answers]
        order = [number for step in zip(*parts, strict=True) for batch in step for number in batch]
        assert sorted(order[:22]) == list(range(22))
        assert order[22:] == order[:2]
    first, second = answers[0]["shuffled_orders"][kind]
    assert first != second, "every epoch has its own order"


def test_global_generators_are_taken_from_process_0_when_asked(answers):
    assert answers[0]["shared_generators"] == answers[1]["shared_generators"]


@pytest.mark.parametrize("kind", ["indexed", "workers", "stream"])
def test_every_sample_counts_once_in_metrics(answers, kind):
    for answer in answers:
        assert [len(batch) for batch in answer["metrics"][kind]] == [8, 8, 6]
        assert [number for batch in answer["metrics"][kind] for number in batch] == list(range(22))


def test_collectives_of_every_kind_of_tensor(answers):
    rows = [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    higher = [[value + 1 for value in row] for row in rows]
    for answer in answers:
        assert answer["collectives"] == {
            "gather": rows + higher,
            "gather scalar": [0, 1],
            "gather bool": [True, True, False, True],
            "gather bfloat16": [0.0, 1.0],
            "gather empty": [0, 3],
            "sum": [[1.0, 3.0, 5.0], [7.0, 9.0, 11.0]],
            "mean int": [0.5],
            "max": [1, 0],
            "min bool": [False, True],
            "sum bool": [1, 2],
            "broadcast": higher,
            "broadcast bool": [True],
            "objects": [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 1000}],
        }


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("shapes", ["CollectiveError", "process 0: (2,)", "process 1: (3,)", "pad_across_processes"]),
        ("dtypes", ["CollectiveError", "torch.float32", "torch.int64"]),
        (
            "barriers",
            ["CollectiveError", "process 0: barrier at", "(barrier save); process 1: barrier at", "(barrier load)"],
        ),
        ("split", ["PrepareError", "batch_size=3 over 2 data shards"]),
    ],
)
def test_mistakes_are_errors_on_every_process_and_not_hangs(answers, mistake, words):
    for answer in answers:
        assert all(word in answer["mistakes"][mistake] for word in words), answer["mistakes"][mistake]


def test_process_0_reads_all_of_the_state_and_the_others_nothing(answers):
    assert answers[0]["states"]["model"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(answers[0]["states"]["optimizer"]) == 12
    assert answers[1]["states"] == {"model": [], "optimizer": []}


def test_models_without_gradients_are_not_wrapped(answers):
    for answer in answers:
        assert answer["frozen_models_are_not_wrapped"] == [True, True, "DistributedDataParallel"]


def test_a_barrier_that_not_everyone_reaches_names_itself(answers):
    said = answers[0]["a_process_that_does_not_come"]
    assert said.startswith("CollectiveError: barrier at")
    assert "has waited 1 s (timeout_s) for process 1" in said


def test_a_process_waits_for_threads_that_still_compute_before_it_ends_and_not_for_ever():
    """gloo's, which let go of the last exchange: an interpreter that is taken down under them aborts."""
    _await_threads(5.0)
    started = time.perf_counter()
    _await_threads(5.0)
    assert time.perf_counter() - started < 4  # nothing computes
    stop = threading.Event()
    data = bytes(2**24)
    waits = (lambda: [hashlib.sha256(data) for _ in iter(stop.is_set, True)], stop.wait)  # hashing holds no GIL
    for target, seconds in zip(waits, (0.5, 0.0), strict=True):
        stop.clear()
        thread = threading.Thread(target=target)
        thread.start()
        started = time.perf_counter()
        _await_threads(0.5)
        taken = time.perf_counter() - started
        stop.set()
        thread.join()
        assert taken >= seconds


def test_processes_that_leave_one_after_the_other_meet_again(answers):
    assert answers[0]["left_and_joined_again"] == answers[1]["left_and_joined_again"] == [[0, 1], [0, 1]]
