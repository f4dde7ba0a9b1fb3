"""What `Accelerator` can do, one file per topic; `polyaccel/accelerator.py` puts the topics together."""

from polyaccel.facade.checkpoints import Checkpoints
from polyaccel.facade.collectives import Collectives
from polyaccel.facade.looking import Looking
from polyaccel.facade.preparing import Preparing
from polyaccel.facade.settings import Settings
from polyaccel.facade.steps import Steps
from polyaccel.facade.tracking import Tracking

__all__ = ["Checkpoints", "Collectives", "Looking", "Preparing", "Settings", "Steps", "Tracking"]
