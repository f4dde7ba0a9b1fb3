"""Joining the job and data parallelism: one process per device, DistributedDataParallel between them."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous as find_store
from torch.nn.parallel import DistributedDataParallel

from polyaccel.collective_calls import CollectiveCalls
from polyaccel.errors import LaunchError, PlanError
from polyaccel.topology import Topology
from polyaccel_torch import tpu
from polyaccel_torch.collectives import ProcessCollectives, SingleCollectives
from polyaccel_torch.dialect.host_exchange import HostExchange
from polyaccel_torch.dialect.stores import GroupStore

if TYPE_CHECKING:
    from polyaccel.launch.rendezvous import Rendezvous

JOIN_TIMEOUT = timedelta(minutes=5)  # for all processes to appear
_MARGIN = timedelta(minutes=1)  # our own deadline, which says who is missing, comes before gloo's


@dataclass(slots=True)
class Job:
    """This process's place in a job. `leave` is idempotent and ends the process group only if this job made it."""

    topology: Topology
    device: torch.device
    collectives: ProcessCollectives | SingleCollectives
    owns_group: bool = False

    def leave(self) -> None:
        """Leave the job. The other processes do not have to call it at the same time."""
        if self.owns_group and dist.is_initialized():
            self.collectives.calls.close()
            dist.destroy_process_group()
        self.owns_group = False


def choose_device(place: Rendezvous, *, use_cpu: bool) -> torch.device:
    """The device of this process: the GPU of its local index, its TPU, else the CPU. Raises PlanError for more processes than these."""
    if not use_cpu and torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if place.num_local_processes > num_gpus:
            raise PlanError(
                f"{place.num_local_processes} processes on this machine need as many GPUs, and torch sees {num_gpus}",
                f"start {num_gpus} here, make more GPUs visible to each process, or use cpu=True",
            )
        return torch.device("cuda", place.local_process_index)
    num_tpus = 0 if use_cpu else tpu.num_devices()
    if num_tpus:
        if place.num_local_processes > num_tpus:
            raise PlanError(
                f"{place.num_local_processes} processes on this machine need as many TPU devices, and torch sees {num_tpus}",
                f"start {num_tpus} here, or use cpu=True",
            )
        return torch.device("tpu")  # its index is known when the processes have met
    if not use_cpu and place.num_processes == 1 and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def join(
    place: Rendezvous,
    *,
    use_cpu: bool,
    timeout: timedelta = JOIN_TIMEOUT,
    exchange_timeout: timedelta = timedelta(minutes=30),
    process_group: str = "auto",
) -> Job:
    """Find the other processes of the job within `timeout` and connect to them. Every process must call it.

    `exchange_timeout` is how long an exchange waits for them afterwards, which may be as long as a checkpoint. `process_group` is
    the torch.distributed backend of training; "auto": what the device needs.

    Raises PlanError (too few GPUs, or nccl without one) or LaunchError, naming the address, when the others cannot be reached in time.
    """
    device = choose_device(place, use_cpu=use_cpu)
    if process_group == "nccl" and device.type != "cuda":
        raise PlanError(
            f"process_group='nccl' needs GPUs, and this process computes on {device.type!r}",
            "leave process_group out, or use 'gloo'",
        )
    if process_group == "auto":
        process_group = {"cuda": "nccl", "tpu": tpu.PROCESS_GROUP}.get(device.type, "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif place.num_local_processes > 1:
        _share_cores(place.num_local_processes)
    topology = Topology(
        process_index=place.process_index,
        num_processes=place.num_processes,
        local_process_index=place.local_process_index,
        num_local_devices=1,
        num_devices=place.num_processes,
        device_kind=device.type,
    )
    if place.num_processes == 1:
        return Job(topology, tpu.current_device() if device.type == "tpu" else device, SingleCollectives())
    if dist.is_initialized() and dist.get_world_size() != place.num_processes:
        raise LaunchError(
            f"torch.distributed is initialized with {dist.get_world_size()} processes, but WORLD_SIZE is {place.num_processes}",
            "leave init_process_group out: Accelerator calls it",
        )
    owns_group = not dist.is_initialized()
    if owns_group:
        _connect(place, device, process_group, timeout, exchange_timeout)
        atexit.register(_leave_at_exit)
    if device.type == "tpu":
        device = tpu.current_device()
    collectives = ProcessCollectives(place.num_processes, _host_exchange(topology, exchange_timeout))
    return Job(topology, device, collectives, owns_group)


_exchanges: weakref.WeakKeyDictionary[Any, HostExchange] = (
    weakref.WeakKeyDictionary()
)  # by the default group that they are beside


def _host_exchange(topology: Topology, timeout: timedelta) -> HostExchange:
    """A group for the script's own collectives, one per job: training's exchanges, and a mistake among them, do not meet them."""
    default: Any = dist.distributed_c10d._get_default_group()
    found = _exchanges.get(default)
    if found is None:
        calls = CollectiveCalls(
            topology.process_index,
            topology.num_processes,
            open_store=GroupStore,
            num_exchanges=functools.partial(_num_exchanges, weakref.ref(default)),
        )
        group = dist.new_group(backend="gloo", timeout=timeout + _MARGIN)
        found = _exchanges[default] = HostExchange(group, topology.num_processes, calls)
    found.calls.timeout_s = timeout.total_seconds()
    return found


def _num_exchanges(group: weakref.ref[Any]) -> int:
    """How many collectives this process has begun on training's group. Each process begins the same ones, in the same order."""
    found = group()
    return 0 if found is None else int(found._get_sequence_number_for_group())


@dataclass(slots=True)
class _Store:
    store: dist.Store
    num_groups: int = 0  # every process of the job makes as many


# By address, until the process ends: one that makes another Accelerator after `end_training` may be there before others have left the
# first, whose store would be gone with them.
_stores: dict[str, _Store] = {}


def _connect(
    place: Rendezvous, device: torch.device, process_group: str, timeout: timedelta, exchange_timeout: timedelta
) -> None:
    assert place.address is not None  # a job of several processes has one
    host = f"[{place.address}]" if ":" in place.address else place.address
    url = f"tcp://{host}:{place.port}"
    try:
        if url not in _stores:
            # torchrun's agent may serve the store already; this function knows, where a TCPStore of our own would not.
            _stores[url] = _Store(next(find_store(url, place.process_index, place.num_processes, timeout=timeout))[0])
        store = _stores[url]
        store.num_groups += 1
        store.store.set_timeout(timeout)
        dist.init_process_group(
            process_group,
            store=dist.PrefixStore(f"group_{store.num_groups}", store.store),
            rank=place.process_index,
            world_size=place.num_processes,
            timeout=exchange_timeout,
            device_id=device if process_group == "nccl" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"process {place.process_index} of {place.num_processes} could not join the job at {host}:{place.port}"
            f" within {timeout.total_seconds():g} s: {error}",
            "check that process 0 runs, that MASTER_ADDR and MASTER_PORT name its host and a free port, and that all processes"
            " were started",
        ) from error


def _share_cores(num_processes: int) -> None:
    """Fewer threads where the processes of this machine would otherwise fight for its cores (torch takes all by default)."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.get_num_threads() * num_processes > num_cores:
        torch.set_num_threads(max(1, num_cores // num_processes))


def _leave_at_exit() -> None:
    # After an uncaught exception, or a wait in vain, the peers may never answer, and a goodbye could wait for them.
    is_broken = any(exchange.calls.is_broken for exchange in _exchanges.values())
    if dist.is_initialized() and not is_broken and not hasattr(sys, "last_value"):
        dist.destroy_process_group()
    _await_threads()


def _await_threads(limit_s: float = 1.0) -> None:
    """Return when no other thread of this process computes, or after `limit_s` seconds.

    A thread of gloo takes the GIL to let go of the tensors of the last exchange. Where the interpreter is being taken down by
    then, Python ends that thread, and C++ the process, with SIGABRT after a training that went well (pytorch/pytorch#179291).
    """
    mine, tasks = str(threading.get_native_id()), Path("/proc/self/task")
    deadline, quiet = time.monotonic() + limit_s, 0
    # Several looks: a thread that waits for the GIL, which is held while we look, seems to rest. It gets it while we sleep.
    while time.monotonic() < deadline and quiet < 3:
        time.sleep(0.005)
        is_busy = tasks.is_dir() and any(_computes(task) for task in tasks.iterdir() if task.name != mine)
        quiet = 0 if is_busy else quiet + 1


def _computes(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"  # on a core, or waiting for one
    except OSError:
        return False  # it has ended


@contextmanager
def exchanging(part: DistributedDataParallel) -> Iterator[None]:
    """Inside, backward exchanges gradients though the forward passes before it ran under `no_sync`."""
    before = part.require_backward_grad_sync, part.require_forward_param_sync
    part.require_backward_grad_sync = part.require_forward_param_sync = True
    part.reducer.prepare_for_backward([])  # as forward does before an exchange, of all parameters
    try:
        yield
    finally:
        part.require_backward_grad_sync, part.require_forward_param_sync = before


def parallel_part(handle: Any) -> DistributedDataParallel | None:
    """The DistributedDataParallel of a prepared model, under torch.compile too; None without one."""
    part = getattr(handle, "_orig_mod", handle)
    return part if isinstance(part, DistributedDataParallel) else None
