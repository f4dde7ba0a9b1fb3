"""Accelerate's `accelerate.utils` names, re-exported. No code lives here, and nothing in the core imports it."""

from polyaccel.config.profile import ProfileKwargs
from polyaccel.config.project import ProjectConfiguration
from polyaccel.looking.bars import tqdm
from polyaccel.seeding import set_seed
from polyaccel.tracking.names import LoggerType

__all__ = ["LoggerType", "ProfileKwargs", "ProjectConfiguration", "set_seed", "tqdm"]
