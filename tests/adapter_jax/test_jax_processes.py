"""Several processes with several devices each: the numbers of one process, on CPU through gloo."""

import subprocess
import sys

import numpy as np
import optax
import pytest
from asked_jobs import HERE, free_port, start
from flax import nnx
from jax_engines import Mlp, Noisy, batches, open_engine, train, weights

from polyaccel.errors import LaunchError, PrepareError

# fp32 sums in another order
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module", params=["pmap", "sharding"])
def results(request):
    return request.param, start("two_processes.py", [request.param], num_processes=2, num_devices=2)


def test_two_processes_with_two_devices_each_train_like_one_process(results):
    partitioning, (first, second) = results
    assert first["topology"] == [0, 2, 4, 2]
    assert second["topology"] == [1, 2, 4, 2]
    engine = open_engine(4, partitioning=partitioning)
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    optimizer = engine.prepare_optimizer(optax.adam(1e-2), model)
    expected = train(engine, model, optimizer, batches(8)[:4], max_grad_norm=0.5, accumulation=2)
    expected += train(engine, model, optimizer, batches(8)[4:], form="function")
    for result in (first, second):
        np.testing.assert_allclose(result["losses"], expected, **CLOSE)
        np.testing.assert_allclose(result["weight"], weights(model)["first.kernel"].ravel()[:4], rtol=0, atol=1e-5)
    assert first["losses"] == second["losses"]


def test_values_beside_the_loss_are_this_processs_samples_and_sums_over_all(results):
    _, (first, second) = results
    assert first["logits"] == second["logits"] == [8, 4]
    assert first["outputs"] == second["outputs"] == [8, 4]
    assert first["hits"] == second["hits"] == first["fused hits"] == second["fused hits"]
    assert first["loss"] == second["loss"]


def test_each_process_reads_its_own_data_shards(results):
    _, (first, second) = results
    # four shards, six batches of two: the last two shards of the second step start again from the first batches
    assert first["seen"] == [[0, 0, 1, 1], [4, 4, 5, 5]]
    assert second["seen"] == [[2, 2, 3, 3], [0, 0, 1, 1]]


def test_a_batch_that_is_spread_over_the_processes_is_gathered_whole_and_not_reduced(results):
    _, both = results
    for result in both:
        assert result["whole"] == [[0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 0, 0, 1, 1]]
        assert "reduce takes one array of every process" in result["refused"]


def test_the_state_is_read_once_over_all_processes(results):
    _, (first, second) = results
    assert sorted(shard[0] for shard in first["shards"] + second["shards"]) == sorted(
        ["first.kernel", "first.bias", "second.kernel", "second.bias"]
    )


def test_collectives_between_processes(results):
    for rank, result in enumerate(results[1]):
        assert result["gather"] == [0, 10, 1, 11]
        assert result["gather scalar"] == [0.0, 1.0]
        assert result["sum"] == [3.0]
        assert result["mean"] == [1.5]
        assert result["max"] == [1]
        assert result["broadcast"] == [1]
        assert result["objects"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "xx"}]
        assert result["wide"] == 2**40 + 1
        assert result["topology"][0] == rank


def test_processes_that_were_seeded_differently_train_one_model(results):
    _, (first, second) = results
    assert first["noisy"] == second["noisy"]
    assert first["statistics"] == second["statistics"]
    # the seed of process 0 counts for all: one process with four devices draws the same masks
    engine = open_engine(4, partitioning="pmap", seed=1)
    model = engine.prepare_model(Noisy(nnx.Rngs(0)))
    losses = train(engine, model, engine.prepare_optimizer(optax.sgd(0.1), model), batches(3))
    np.testing.assert_allclose(first["noisy"], losses, **CLOSE)


def test_an_array_that_could_be_the_whole_batch_is_refused(monkeypatch):
    engine = open_engine(4)
    monkeypatch.setattr(engine.mesh, "num_feeds", 2)  # as if half of the devices belonged to another process
    with pytest.raises(PrepareError, match="could be the whole batch"):
        engine.mesh._refuse_ambiguous((16, 3), 8)


def test_a_job_whose_process_0_is_missing_says_so():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import polyaccel_jax.engine as e; e._JOIN_TIMEOUT_S = 3;"
        "from polyaccel.errors import LaunchError; from polyaccel.launch.rendezvous import Rendezvous;"
        "from jax_engines import open_engine\n"
        "open_engine(rendezvous=Rendezvous(1, 2, 1, 2, '127.0.0.1', int(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(HERE), str(free_port())],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert LaunchError.__name__ in done.stderr
    assert "process 1 of 2 could not reach process 0" in done.stderr
