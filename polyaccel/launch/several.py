"""This machine's part of a job of several: it starts and stops its processes as the job's meeting says, until the job is over."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from polyaccel.config.schema import LaunchSettings
from polyaccel.launch.interfaces import interface_of
from polyaccel.launch.leading import Rules
from polyaccel.launch.meeting import Meeting
from polyaccel.launch.membership import Membership, greeting, join
from polyaccel.launch.rendezvous import Rendezvous
from polyaccel.launch.supervision import StopRequest, Worker, supervise

_ENDS_WITH_MACHINE_0 = (
    "polyaccel launch: machine 0 leads the job, which ends here without it\n"
    "hint: launch it again on all machines, with any of them as machine 0: a script that begins with `if accelerator.has_checkpoint:"
    " accelerator.load_state()` goes on from its newest checkpoint. --max-restarts lets the machines wait for machine 0 instead"
)
WorkersAt = Callable[[Rendezvous, str | None], Sequence[Worker]]


def run(
    workers_at: WorkersAt, num_local: int, *, backend: str, port: int, settings: LaunchSettings, stop: StopRequest
) -> int:
    """Take part in the job until it is over, on all machines with the same exit code.

    Args:
        workers_at: this machine's processes, from the place of the first and the interface that the others reach this machine by.
        num_local: how many these are.
        port: where machine 0 listens for the launchers; processes meet at higher ones.

    Raises LaunchError where the machines do not find each other or were started differently.
    """
    assert settings.main_process_ip is not None  # checked by the caller
    silence_s = float(settings.heartbeat_timeout_s)
    with ExitStack() as stack:
        if settings.machine_rank == 0:
            rules = Rules(
                settings.num_machines,
                settings.min_machines or settings.num_machines,
                settings.max_restarts,
                float(settings.join_timeout_s),
            )
            meeting = Meeting(settings.main_process_ip, port, rules, backend=backend, heartbeat_timeout_s=silence_s)
            stack.enter_context(meeting)
        hello = greeting(
            settings.machine_rank, num_machines=settings.num_machines, num_processes=num_local, backend=backend
        )
        address = settings.main_process_ip
        restarts = 0  # after losses of machine 0, which counts the others
        while True:
            membership = join(
                address, port, hello, timeout_s=float(settings.join_timeout_s), silence_s=silence_s, stop=stop
            )
            if membership is None:
                return stop.code
            with membership:
                code = _take_part(membership, workers_at, num_local, address, settings.grace_s, stop)
            if code is not None:
                return code
            # Only machine 0 leads, so that a network that is cut never leaves two parts of a job that both train.
            if settings.machine_rank == 0 or stop.is_set or restarts == membership.max_restarts:
                print(_ENDS_WITH_MACHINE_0, file=sys.stderr)
                return 1
            restarts += 1
            words = (
                f"waiting up to {settings.join_timeout_s} s for it (restart {restarts} of {membership.max_restarts})"
            )
            print(f"polyaccel launch: {words}", file=sys.stderr)


def _take_part(
    membership: Membership, workers_at: WorkersAt, num_local: int, address: str, grace_s: float, stop: StopRequest
) -> int | None:
    """Follow the meeting's orders; returns the job's exit code, or None once machine 0 is lost and no process is left here."""
    interface = interface_of(membership.address)
    while True:
        order = membership.next_order()
        kind, words = order["type"], order.get("words", "")
        if words:
            print(f"polyaccel launch: {words}", file=sys.stderr)
        if kind == "lost":
            return None
        if kind == "finish":
            return int(order["code"])
        if kind == "start":
            first = int(order["first"])
            place = Rendezvous(first, int(order["num_processes"]), 0, num_local, address, int(order["port"]))
            code = supervise(workers_at(place, interface), grace_s=grace_s, stop=stop, peers=membership)
            if code and not membership.has_failed:
                membership.failed(str(first), code)  # stopped before they were started
            membership.ended()
