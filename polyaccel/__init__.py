"""One training script, in PyTorch or in JAX/Flax, on PyTorch, PyTorch-XLA or JAX. See `Accelerator`.

Names are loaded when they are first used: importing the package imports no framework and costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyaccel.accelerator import Accelerator as Accelerator
    from polyaccel.config import Config as Config
    from polyaccel.data import skip_first_batches as skip_first_batches
    from polyaccel.ema import EMA as EMA
    from polyaccel.errors import PolyaccelError as PolyaccelError
    from polyaccel.launch.notebook import debug_launcher as debug_launcher
    from polyaccel.launch.notebook import notebook_launcher as notebook_launcher
    from polyaccel.local_sgd import LocalSGD as LocalSGD
    from polyaccel.mesh import MeshSpec as MeshSpec
    from polyaccel.plan import Plan as Plan
    from polyaccel.seeding import set_seed as set_seed

__version__ = "0.1.0"

_HOME = {
    "Accelerator": "polyaccel.accelerator",
    "Config": "polyaccel.config",
    "EMA": "polyaccel.ema",
    "LocalSGD": "polyaccel.local_sgd",
    "MeshSpec": "polyaccel.mesh",
    "Plan": "polyaccel.plan",
    "PolyaccelError": "polyaccel.errors",
    "debug_launcher": "polyaccel.launch.notebook",
    "notebook_launcher": "polyaccel.launch.notebook",
    "set_seed": "polyaccel.seeding",
    "skip_first_batches": "polyaccel.data",
}
__all__ = [
    "Accelerator",
    "Config",
    "EMA",
    "LocalSGD",
    "MeshSpec",
    "Plan",
    "PolyaccelError",
    "__version__",
    "debug_launcher",
    "notebook_launcher",
    "set_seed",
    "skip_first_batches",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'polyaccel' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
