"""Starts a function instead of a script: from a notebook or a test, in processes forked from this one."""

from __future__ import annotations

import atexit
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from polyaccel.config.resolve import adopt_environment, environment_for, gather
from polyaccel.config.settings import SETTINGS
from polyaccel.errors import LaunchError
from polyaccel.launch.rendezvous import Rendezvous, free_port, visible_gpus
from polyaccel.registry import choose_backend


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str | None = None,
    use_port: int | str | None = None,
    *,
    backend: str | None = None,
    cpu: bool | None = None,
) -> None:
    """Run `function(*args)` as a training script, in as many processes as asked for, and return when all have ended.

    Args:
        function: makes its own Accelerator. It may be defined in the notebook: processes are forked, nothing is sent to them.
        args: its arguments.
        num_processes: None: what the backend wants (torch one per GPU, jax and xla one). A single one runs in this process.
        mixed_precision: "no", "bf16" or "fp16", unless the function's Accelerator says otherwise.
        use_port: port of process 0 on this machine; None chooses a free one. (Accelerate's default, 29500, may be taken.)
        backend, cpu: as in `Accelerator`.

    Raises LaunchError with the traceback of the first process that failed, after the others were stopped; also where a framework
    holds devices in this process already, which a forked process cannot use. (Accelerate's `notebook_launcher`.)
    """
    flags = {"backend": backend, "mixed_precision": mixed_precision, "cpu": None if cpu is None else str(cpu).lower()}
    gathered = gather(flags={name: text for name, text in flags.items() if text is not None})
    gathered.raise_problems()
    chosen = choose_backend(gathered.values.get("backend", "auto"))
    if num_processes is not None:
        try:
            SETTINGS["launch.num_processes"].check(num_processes)
        except ValueError as error:
            raise LaunchError(f"num_processes={num_processes!r} {error}", "use 1 or more") from None
    use_cpu, gpus = bool(gathered.values.get("cpu")), visible_gpus()
    size = len(chosen.worker_slots(num_processes, use_cpu=use_cpu, gpus=gpus))
    settings = environment_for(gathered, launched=chosen.name)
    if size == 1:
        with adopt_environment(settings):
            function(*args)
        return
    held = chosen.holds_devices()
    if held is not None:
        raise LaunchError(
            f"{size} processes cannot be forked from this one: {held}",
            "restart the notebook's kernel, and make models, arrays and the Accelerator inside the function only",
        )
    slots = chosen.worker_slots(size, use_cpu=use_cpu, gpus=gpus)
    port = int(use_port) if use_port is not None else free_port()
    places = [Rendezvous(index, size, index, size, "127.0.0.1", port) for index in range(size)]
    _run(
        function, args, [{**settings, **slot.environment, **place.environment()} for slot, place in zip(slots, places)]
    )


def debug_launcher(function: Callable[..., Any], args: Sequence[Any] = (), num_processes: int = 2) -> None:
    """Run `function(*args)` in CPU processes, to try distributed code on any machine. See `notebook_launcher`."""
    notebook_launcher(function, args, num_processes, cpu=True)


def _run(function: Callable[..., Any], args: Sequence[Any], environments: Sequence[dict[str, str]]) -> None:
    context = multiprocessing.get_context("fork")
    processes = []
    reports: dict[Any, int] = {}
    for index, environment in enumerate(environments):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(function, args, environment, sender), name=f"process {index}")
        process.start()
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


def _child(function: Callable[..., Any], args: Sequence[Any], environment: dict[str, str], sender: Connection) -> None:
    with adopt_environment(environment):
        atexit._clear()  # what the parent does at its own end is not for this process
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
