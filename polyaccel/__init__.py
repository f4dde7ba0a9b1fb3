"""One training script, in PyTorch or in JAX/Flax, on PyTorch, PyTorch-XLA or JAX. See `Accelerator`.

Names are loaded when they are first used: importing the package imports no framework and costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyaccel.accelerator import Accelerator as Accelerator
    from polyaccel.big_models import cpu_offload as cpu_offload
    from polyaccel.big_models import cpu_offload_with_hook as cpu_offload_with_hook
    from polyaccel.big_models import disk_offload as disk_offload
    from polyaccel.big_models import dispatch_model as dispatch_model
    from polyaccel.big_models import infer_auto_device_map as infer_auto_device_map
    from polyaccel.big_models import init_empty_weights as init_empty_weights
    from polyaccel.big_models import init_on_device as init_on_device
    from polyaccel.big_models import load_checkpoint_and_dispatch as load_checkpoint_and_dispatch
    from polyaccel.big_models import load_checkpoint_in_model as load_checkpoint_in_model
    from polyaccel.config import Config as Config
    from polyaccel.data import skip_first_batches as skip_first_batches
    from polyaccel.errors import PolyaccelError as PolyaccelError
    from polyaccel.launch.notebook import debug_launcher as debug_launcher
    from polyaccel.launch.notebook import notebook_launcher as notebook_launcher
    from polyaccel.mesh import MeshSpec as MeshSpec
    from polyaccel.plan import Plan as Plan
    from polyaccel.seeding import set_seed as set_seed

__version__ = "0.1.0"

_HOME = {
    "Accelerator": "polyaccel.accelerator",
    "Config": "polyaccel.config",
    "MeshSpec": "polyaccel.mesh",
    "Plan": "polyaccel.plan",
    "PolyaccelError": "polyaccel.errors",
    "cpu_offload": "polyaccel.big_models",
    "cpu_offload_with_hook": "polyaccel.big_models",
    "debug_launcher": "polyaccel.launch.notebook",
    "disk_offload": "polyaccel.big_models",
    "dispatch_model": "polyaccel.big_models",
    "infer_auto_device_map": "polyaccel.big_models",
    "init_empty_weights": "polyaccel.big_models",
    "init_on_device": "polyaccel.big_models",
    "load_checkpoint_and_dispatch": "polyaccel.big_models",
    "load_checkpoint_in_model": "polyaccel.big_models",
    "notebook_launcher": "polyaccel.launch.notebook",
    "set_seed": "polyaccel.seeding",
    "skip_first_batches": "polyaccel.data",
}
__all__ = [
    "Accelerator",
    "Config",
    "MeshSpec",
    "Plan",
    "PolyaccelError",
    "__version__",
    "cpu_offload",
    "cpu_offload_with_hook",
    "debug_launcher",
    "disk_offload",
    "dispatch_model",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
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
