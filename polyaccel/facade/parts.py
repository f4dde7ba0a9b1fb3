"""The parts that an Accelerator is made of, as every topic of its facade sees them."""

from __future__ import annotations

from polyaccel.accumulation import GradientState
from polyaccel.config import Config
from polyaccel.config.profile import ProfileKwargs
from polyaccel.config.project import ProjectConfiguration
from polyaccel.gathering import Gathering
from polyaccel.plan import Plan
from polyaccel.preemption import Preemption
from polyaccel.prepare import Preparation
from polyaccel.processes import Trigger
from polyaccel.protocols import Engine
from polyaccel.tracking import Observer, Session


class Parts:
    """Set once by `Accelerator.__init__`; the topics forward to them and keep nothing of their own."""

    backend: str
    config: Config
    plan: Plan
    gradient_state: GradientState
    project_configuration: ProjectConfiguration
    tracking: Session
    _engine: Engine
    _prepared: Preparation
    _gathering: Gathering
    _trigger: Trigger
    _observer: Observer | None
    _preemption: Preemption | None
    _differentiates_values: bool
    _features: frozenset[str]
    _profile_handler: ProfileKwargs
