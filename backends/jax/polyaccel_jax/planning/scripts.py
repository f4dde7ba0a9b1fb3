"""Plans the first step of whatever script runs inside `planning`: its Accelerator gets an engine that compiles and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, final

from polyaccel.errors import PlanError
from polyaccel_jax.planning.devices import chip_of, devices_of, environment, num_gpus

if TYPE_CHECKING:
    from polyaccel.config import Config
    from polyaccel.launch.rendezvous import Rendezvous
    from polyaccel.planned.chips import Chip
    from polyaccel.planned.report import StepPlan
    from polyaccel.planned.topologies import TopologyName
    from polyaccel_jax.engine import JaxEngine
    from polyaccel_jax.planning.planner import Planner

__all__ = ["Session", "active", "environment", "num_gpus", "planning"]


@final
class Session:
    """One script on one topology. The first engine that it opens is the one that is planned."""

    def __init__(self, topology: TopologyName) -> None:
        self.topology = topology
        self._planner: Planner | None = None
        self._engine: JaxEngine | None = None

    def open(self, config: Config, rendezvous: Rendezvous) -> JaxEngine:
        """An engine on the devices of the topology. Raises PlanError for a second one in the same script."""
        from polyaccel_jax.engine import JaxEngine
        from polyaccel_jax.planning.planner import Planner

        if self._engine is not None:
            raise PlanError("the script creates a second Accelerator before its first update", "plan one at a time")
        devices = devices_of(self.topology)
        self._planner = Planner(self.topology)
        # What was compiled for devices that are not here cannot be loaded from a cache.
        config = replace(config, compilation_cache="off")
        self._engine = JaxEngine(config, rendezvous, devices, self._planner)
        return self._engine

    def close(self) -> None:
        """The script is over."""
        if self._planner is not None:
            self._planner.close()

    def step_plan(self) -> StepPlan:
        """What the compiler said. Raises PlanError where the script made no Accelerator, or ended before its first update."""
        if self._planner is None or self._engine is None:
            raise PlanError(
                "the script opened no jax engine",
                'it must create a polyaccel.Accelerator, without backend= or with backend="jax"',
            )
        if not self._planner.is_complete and self._planner.refusal is None:
            raise PlanError(
                "the script ended before its first update, which is what a plan is about",
                "give it data for one step, and arguments with which it trains",
            )
        return self._planner.step_plan(self._engine.plan.mesh.sizes)

    def chip(self) -> Chip | None:
        """What its devices can do, as far as somebody says it."""
        return chip_of(self.topology)


_active: list[Session] = []


def active() -> Session | None:
    """The session whose script runs; None when nothing is planned."""
    return _active[-1] if _active else None


@contextmanager
def planning(topology: TopologyName) -> Iterator[Session]:
    """Engines that are opened inside are those of the topology; the script inside ends when its first step is compiled."""
    session = Session(topology)
    _active.append(session)
    try:
        yield session
    except BaseException as error:
        from polyaccel_jax.planning.planner import StepIsPlanned

        if not isinstance(error, StepIsPlanned):
            raise
    finally:
        _active.pop()
        session.close()
