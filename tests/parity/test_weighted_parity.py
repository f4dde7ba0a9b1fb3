"""Token-weighted accumulation is the gradient of one large batch, whatever engine runs it and over however many data shards."""

import functools
import importlib.util
import json
import os
import subprocess

import numpy as np
import pytest
import weighted_training as training
from launching import launch_command, with_devices

# float32 sums over some hundred tokens in another order; the gradients themselves go up to 0.1
CLOSE = {"rtol": 0, "atol": 1e-6}
# AdamW divides by the root of the gradient's square: what differs in a small element counts as in a large one
UPDATED = {"rtol": 0, "atol": 1e-5}

# xla first: it accepts no process in which another device has differentiated before.
HERE = [name for name in ("xla", "torch", "jax") if importlib.util.find_spec("torch_xla" if name == "xla" else name)]
PLACES = [
    *[pytest.param({"backend": name}, id=name) for name in HERE if name != "jax"],
    *[
        pytest.param({"backend": "jax", "partitioning": p}, id=f"jax-{p}")
        for p in ("pmap", "sharding")
        if "jax" in HERE
    ],
]


@functools.cache
def one_large_batch():
    return training.one_large_batch()


def assert_as_one_large_batch(answer, form):
    wanted = one_large_batch()
    if form != "train_step":  # which drops its gradients before anybody could look
        np.testing.assert_allclose(answer["grads"], wanted["grads"], **CLOSE)
        np.testing.assert_allclose(answer["norms"], wanted["norms"], rtol=1e-5)  # the clip saw the divided gradients
    np.testing.assert_allclose(answer["weights"], wanted["weights"], **UPDATED)


@pytest.mark.parametrize("place", PLACES)
def test_micro_batches_of_any_token_count_are_one_large_batch_on_every_engine(place):
    for form in ("device", "name", "train_step"):
        answer = training.trained(form, **place)
        assert_as_one_large_batch(answer, form)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What both processes of a data-parallel torch job answered."""
    if "jax" not in HERE:
        pytest.skip("the engine of two processes is torch's, which the main environment tests")
    return answers_of("torch", tmp_path_factory.mktemp("weighted"))


def answers_of(backend, folder):
    """What each of two processes of an engine answered."""
    environment = {**os.environ, **with_devices(2)}
    command = launch_command(backend, 2, training.__file__, folder)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("form", ["number", "device", "name", "train_step"])
def test_four_micro_batches_on_two_data_parallel_processes_are_one_large_batch(two_processes, form):
    for answer in two_processes:
        assert_as_one_large_batch(answer[form], form)


@pytest.mark.slow
@pytest.mark.skipif("jax" not in HERE, reason="jax is of the main environment")
def test_two_processes_of_jax_with_two_devices_each_are_one_large_batch(tmp_path):
    for answer in answers_of("jax", tmp_path):
        for form, found in answer.items():
            assert_as_one_large_batch(found, form)


def test_the_processes_exchange_one_scalar_per_window(two_processes):
    # and one more in the very first: what a weight usually is
    assert two_processes[0]["number"]["exchanged"] == two_processes[0]["device"]["exchanged"] == [1, 1, 1]


def test_a_short_window_of_two_processes_is_divided_by_its_size_when_asked(two_processes):
    for mode in ("full", "actual"):
        np.testing.assert_allclose(two_processes[0][mode], training.tail(mode), **CLOSE)
    assert np.abs(np.subtract(two_processes[0]["full"], two_processes[0]["actual"])).max() > 1e-3


def test_inside_local_sgd_each_process_divides_by_its_own_tokens(two_processes):
    one, other = (answer["local_sgd"] for answer in two_processes)
    for rank, answer in enumerate((one, other)):
        model = training.network()
        rows = slice(-training.ROWS + rank * 4, len(training.TOKENS) - 4 * (1 - rank))
        training.token_loss(model, (training.TOKENS[rows], training.LABELS[rows]))[0].backward()
        alone = training.flat(p - 0.5 * p.grad for p in model.parameters())
        np.testing.assert_allclose(answer["alone"], alone, **CLOSE)
        assert answer["restored"]
    np.testing.assert_allclose(one["averaged"], np.mean([one["alone"], other["alone"]], 0), **CLOSE)


def test_every_reduction_is_scaled(two_processes):
    wanted = {"sum": [1.5, 1.5], "mean": [0.75, 0.75], "max": [1.0, 1.0], "min": [0.5, 0.5]}
    assert [answer["reduced"] for answer in two_processes] == [wanted, wanted]
