"""Starts a function instead of a script: from a notebook or a test, in processes forked from this one."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from polyaccel import jobs
from polyaccel.config.resolve import adopt_environment, environment_for, gather
from polyaccel.config.settings import SETTINGS
from polyaccel.errors import LaunchError, UnsupportedError
from polyaccel.launch.guarding import Guardian
from polyaccel.launch.rendezvous import Rendezvous, free_port, visible_gpus
from polyaccel.registry import choose_backend


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str | None = None,
    use_port: int | str | None = None,
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: Mapping[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
    *,
    backend: str | None = None,
    cpu: bool | None = None,
) -> None:
    """Run `function(*args)` as a training script, in as many processes as asked for, and return when all have ended.

    Args:
        function: makes its own Accelerator. It may be defined in the notebook: processes are forked, nothing is sent to them.
        args: its arguments.
        num_processes: on this machine. None: what the backend wants (torch one per GPU, jax and xla one). A single one runs in this
            process.
        mixed_precision: "no", "bf16" or "fp16", unless the function's Accelerator says otherwise.
        use_port: port of process 0; None chooses a free one. (Accelerate's default, 29500, may be taken.)
        master_addr, node_rank, num_nodes: the address of machine 0, this machine, and how many there are; each calls the launcher, with
            the same `num_processes` and `use_port`.
        rdzv_backend, rdzv_endpoint, rdzv_conf, rdzv_id: only what they are by default, and "c10d" on one machine: processes find each
            other at `master_addr`.
        max_restarts: how often all processes are started again after one failed; on one machine, where there are several.
        monitor_interval: at most so many seconds until a failure is noticed; it is noticed at once.
        log_line_prefix_template: only None.
        backend, cpu: as in `Accelerator`.

    Raises LaunchError with the traceback of the first process that failed, after the others were stopped; also where this process
    has an Accelerator, or a framework holds devices, which a forked process cannot use. (Accelerate's `notebook_launcher`.)
    """
    given = {"rdzv_endpoint": (rdzv_endpoint, ""), "rdzv_conf": (rdzv_conf or None, None), "rdzv_id": (rdzv_id, "none")}
    given["rdzv_backend"] = (rdzv_backend, "c10d" if rdzv_backend == "c10d" and num_nodes == 1 else "static")
    given["log_line_prefix_template"] = (log_line_prefix_template, None)
    for name, (value, usual) in given.items():
        if value != usual:
            raise UnsupportedError(
                f"notebook_launcher cannot honour {name}={value!r}: it starts the processes itself, and they meet at master_addr",
                "leave it out, or start a script with `polyaccel launch` or torchrun",
            )
    machines = _Machines(num_nodes, node_rank, master_addr, None if use_port is None else int(use_port), max_restarts)
    machines.check()
    flags = {"backend": backend, "mixed_precision": mixed_precision, "cpu": None if cpu is None else str(cpu).lower()}
    _launch(function, args, num_processes, flags, machines, holder=jobs.accelerator())


def _launch(
    function: Callable[..., Any],
    args: Sequence[Any],
    num_processes: int | None,
    flags: Mapping[str, str | None],
    machines: _Machines,
    *,
    holder: Any = None,
) -> None:
    """See `notebook_launcher`. `holder` is an Accelerator that keeps this process from being forked."""
    gathered = gather(flags={name: text for name, text in flags.items() if text is not None})
    gathered.raise_problems()
    chosen = choose_backend(gathered.values.get("backend", "auto"))
    if num_processes is not None:
        try:
            SETTINGS["launch.num_processes"].check(num_processes)
        except ValueError as error:
            raise LaunchError(f"num_processes={num_processes!r} {error}", "use 1 or more") from None
    use_cpu, gpus = bool(gathered.values.get("cpu")), visible_gpus()
    slots = chosen.worker_slots(num_processes, use_cpu=use_cpu, gpus=gpus)
    settings = environment_for(gathered, launched=chosen.name)
    if len(slots) == 1 and machines.num_nodes == 1:
        with adopt_environment(settings):
            function(*args)
        return
    held = "it has an Accelerator" if holder is not None else chosen.holds_devices()
    if held is not None:
        raise LaunchError(
            f"{len(slots)} processes cannot be forked from this one: {held}",
            "restart the notebook's kernel, and make models, arrays and the Accelerator inside the function only",
        )
    for attempt in itertools.count():
        places = machines.places(len(slots), attempt)
        try:
            _run(
                function,
                args,
                [{**settings, **slot.environment, **place.environment()} for slot, place in zip(slots, places)],
            )
            return
        except LaunchError as error:
            if attempt == machines.max_restarts:
                raise
            again = f"notebook_launcher: restart {attempt + 1} of {machines.max_restarts}"
            print(f"{again}, since {error.message}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Machines:
    """Where the processes are: this machine among those of the job."""

    num_nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int | None = None
    max_restarts: int = 0

    def check(self) -> None:
        """Raises LaunchError for what cannot be."""
        if not 0 <= self.node_rank < self.num_nodes:
            raise LaunchError(
                f"node_rank={self.node_rank} is outside a job of {self.num_nodes} machines (num_nodes)",
                "machines count from 0 to their number - 1",
            )
        if self.num_nodes > 1 and (self.port is None or self.max_restarts):
            problem = "max_restarts" if self.max_restarts else "no use_port"
            raise LaunchError(
                f"num_nodes={self.num_nodes} with {problem}: the machines cannot agree on it",
                "give use_port, a free port of machine 0, on all of them; for restarts use `polyaccel launch`",
            )

    def places(self, size: int, attempt: int) -> list[Rendezvous]:
        """Of this machine's `size` processes, on a port that the attempt before has not held."""
        port = free_port() if self.port is None else self.port + attempt
        first, total = self.node_rank * size, self.num_nodes * size
        return [Rendezvous(first + index, total, index, size, self.address, port) for index in range(size)]


def debug_launcher(function: Callable[..., Any], args: Sequence[Any] = (), num_processes: int = 2) -> None:
    """Run `function(*args)` in CPU processes, to try distributed code on any machine. See `notebook_launcher`.

    Also from a process that has an Accelerator of its own, as tests have.
    """
    _launch(function, args, num_processes, {"cpu": "true"}, _Machines())


def _run(function: Callable[..., Any], args: Sequence[Any], environments: Sequence[dict[str, str]]) -> None:
    context = multiprocessing.get_context("fork")
    processes = []
    reports: dict[Any, int] = {}
    with Guardian() as guardian:
        for index, environment in enumerate(environments):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(function, args, environment, sender, guardian), name=f"process {index}"
            )
            process.start()
            assert process.pid is not None
            guardian.watch(process.pid, with_group=False)
            sender.close()  # the child's end alone is left: its death closes the pipe
            processes.append(process)
            reports[receiver] = index
        try:
            failed = _first_failure(reports)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(15)
                process.kill()
                process.join()
                assert process.pid is not None
                guardian.forget(process.pid)
    if failed is not None:
        index, text = failed
        code = processes[index].exitcode
        raise LaunchError(
            f"process {index} of {len(processes)} failed{'' if text else f' with exit code {code}'}"
            + (f":\n{text.rstrip()}" if text else ""),
            "the others were stopped",
        )


def _first_failure(reports: dict[Any, int]) -> tuple[int, str] | None:
    """Wait until every process reported success, or one failed: its index and traceback (empty if it was killed)."""
    waiting = dict(reports)
    while waiting:
        for receiver in wait(list(waiting)):
            assert isinstance(receiver, Connection)
            index = waiting.pop(receiver)
            try:
                text = receiver.recv_bytes().decode()
            except EOFError:
                return index, ""
            if text:
                return index, text
    return None


def _child(
    function: Callable[..., Any],
    args: Sequence[Any],
    environment: dict[str, str],
    sender: Connection,
    guardian: Guardian,
) -> None:
    guardian.leave()
    with adopt_environment(environment):
        atexit._clear()  # what the parent does at its own end is not for this process
        jobs.forget()  # nor are its Accelerators
        try:
            function(*args)
        except BaseException as error:  # noqa: BLE001 - SystemExit of the function too; the parent raises it
            sender.send_bytes(traceback.format_exc().encode())
            sys.last_value = error  # as after a script that failed
            atexit._run_exitfuncs()
            sys.exit(1)
        # As at the end of a script: multiprocessing ends a forked process without (before Python 3.13). The report comes after it.
        atexit._run_exitfuncs()
    sender.send_bytes(b"")
