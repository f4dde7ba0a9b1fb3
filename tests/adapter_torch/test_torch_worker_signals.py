"""Workers of a DataLoader when a scheduler signals every process of a job, and when their loader ends them."""

import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from polyaccel.data import DataSharding
from polyaccel_torch.dialect.loaders import TorchHostLoader
from polyaccel_torch.dialect.worker_signals import outliving


@pytest.fixture
def _handled():
    """The script handles both signals, and counts them."""
    before = [signal.signal(number, lambda number, frame: None) for number in (signal.SIGTERM, signal.SIGUSR1)]
    yield
    for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
        signal.signal(number, handler)


def prepared(**options):
    loader = DataLoader(TensorDataset(torch.arange(24)), batch_size=2, num_workers=1, prefetch_factor=1, **options)
    return TorchHostLoader(loader).shard(DataSharding())


def worker_of(host):
    """The worker process of a loader with persistent workers."""
    return host._source._iterator._workers[0]


def signalled_from_elsewhere(pid, number):
    """A signal whose sender is not this process: what Slurm's daemon sends."""
    child = os.fork()
    if not child:
        os.kill(pid, number)
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.usefixtures("_handled")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_workers_outlive_a_signal_that_the_script_handles(number):
    seen = []
    host = prepared(persistent_workers=True, worker_init_fn=seen.append)
    batches = host.read()
    first = next(batches)
    signalled_from_elsewhere(worker_of(host).pid, number)
    assert [batch[0][0].tolist() for batch in (first, *batches)] == [[i, i + 1] for i in range(0, 24, 2)]
    assert worker_of(host).is_alive()


@pytest.mark.usefixtures("_handled")
def test_their_own_loader_can_still_end_them():
    host = prepared(persistent_workers=True)
    next(host.read())
    worker = worker_of(host)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
    host._source._iterator._shutdown_workers()


def test_a_script_that_handles_no_signal_has_workers_as_torch_makes_them():
    def init(worker_id):
        pass

    assert outliving(init) is init
    assert outliving(None) is None
