"""The job that this process has joined through jax.distributed: its store, and its operations between processes."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import jax
from jax._src import (
    config,
    distributed,  # the job's key-value store has no public name; orbax takes it from here, too
    xla_bridge,
)
from jax._src.lib import _jax

from polyaccel.collective_calls import LOOK_S, CollectiveCalls
from polyaccel.topology import Topology

T = TypeVar("T")


class CoordinatorStore:
    """See `polyaccel.store.Store`."""

    def __init__(self) -> None:
        client = distributed.global_state.client
        assert client is not None  # a job of several processes has one
        self._client = client

    def set(self, key: str, value: str) -> None:
        """Write a text for all processes."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def get(self, key: str) -> str | None:
        """The text of this key, or None; does not wait."""
        try:
            text: str = self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if str(error).startswith("NOT_FOUND"):
                return None
            raise
        return text


class Job:
    """What all engines of this process share. `num_exchanges` counts the programs of training that exchange something."""

    def __init__(self, topology: Topology) -> None:
        self.client = distributed.global_state.client
        self.num_exchanges = 0
        self.calls = CollectiveCalls(
            topology.process_index,
            topology.num_processes,
            open_store=CoordinatorStore,
            num_exchanges=lambda: self.num_exchanges,
        )
        self._waits_for_devices = topology.device_kind == "cpu"
        self._work: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[tuple[Any, BaseException | None]]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], T]) -> T:
        """What `work` gives. It runs on a thread: jax waits for the other processes in a way that nothing can interrupt, and this one
        looks meanwhile where they are."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_all, name="collectives", daemon=True)
            self._thread.start()
        done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._work.put((work, done))
        while True:
            try:
                result, error = done.get(timeout=LOOK_S)
            except Empty:
                self.calls.look()
                continue
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise self.calls.failed(error) from error
            if error is not None:
                raise error
            return result

    def _run_all(self) -> None:
        while True:
            work, done = self._work.get()
            try:
                if self._waits_for_devices:
                    # On CPUs a step that is under way exchanges through the same connections, and would be given these bytes.
                    jax.block_until_ready(jax.live_arrays())
                result = work()
                done.put((jax.block_until_ready(result) if self._waits_for_devices else result, None))
            except BaseException as error:  # noqa: BLE001 - raised by the thread that asked for the work
                done.put((None, error))


_LINGER_S = 0.3
_job: Job | None = None


def job_of(topology: Topology, timeout_s: float) -> Job:
    """The one job of this process, whose operations wait so long from now on."""
    global _job
    if _job is None or _job.client is not distributed.global_state.client:
        _job = Job(topology)
    _job.calls.timeout_s = timeout_s
    return _job


def exchange_over(interface: str) -> None:
    """After jax.distributed.initialize: processes on CPUs exchange over this network interface.

    jax takes the address that this host's name has on the host itself, which is 127.0.1.1 on many, and has no setting for it.
    """
    if config.cpu_collectives_implementation.value != "gloo":
        return
    gloo = _jax.make_gloo_tcp_collectives(distributed_client=distributed.global_state.client, interface=interface)
    client = functools.partial(xla_bridge.make_cpu_client, collectives=gloo)
    xla_bridge.register_backend_factory("cpu", client, priority=0, fail_quietly=False)


def leave_at_exit() -> None:
    """After jax.distributed.initialize: at its end this process says goodbye to the others, and ends at once where it failed.

    jax would wait for the others to say goodbye (5 minutes), and for a program that still waits for them (for ever). In a process that
    was forked it says none: what it registered is its parent's.
    """
    atexit.register(_end)


def say_goodbye() -> None:
    """Leave the job, when every process does. Process 0 serves the others a moment longer.

    The service tells whoever asks for errors that it ends, and jax's client ends its process for that (exit code -6), where it has not
    stopped asking by then.
    """
    state = distributed.global_state
    if state.client is not None and state.service is not None:
        state.client.shutdown()  # returns when all have called it
        state.client = None
        time.sleep(_LINGER_S)
    jax.distributed.shutdown()


def _end() -> None:
    if hasattr(sys, "last_value") or (_job is not None and _job.calls.is_broken):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    say_goodbye()
