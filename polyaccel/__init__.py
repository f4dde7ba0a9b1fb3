"""One training script, in PyTorch or in JAX/Flax, on PyTorch, PyTorch-XLA or JAX. See `Accelerator`.

Names are loaded when they are first used: importing the package imports no framework and costs next to nothing.
"""

from __future__ import annotations

import sys
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
    from polyaccel.compat.inference import prepare_pippy as prepare_pippy
    from polyaccel.compat.parallelism_config import ParallelismConfig as ParallelismConfig
    from polyaccel.compat.state import PartialState as PartialState
    from polyaccel.compat.utils.imports import is_rich_available as is_rich_available
    from polyaccel.compat.utils.random import synchronize_rng_states as synchronize_rng_states
    from polyaccel.config import Config as Config
    from polyaccel.config.absent import DeepSpeedPlugin as DeepSpeedPlugin
    from polyaccel.config.accumulating import GradientAccumulationPlugin as GradientAccumulationPlugin
    from polyaccel.config.exchange import DDPCommunicationHookType as DDPCommunicationHookType
    from polyaccel.config.exchange import DistributedDataParallelKwargs as DistributedDataParallelKwargs
    from polyaccel.config.exchange import InitProcessGroupKwargs as InitProcessGroupKwargs
    from polyaccel.config.loading import DataLoaderConfiguration as DataLoaderConfiguration
    from polyaccel.config.numerics import AutocastKwargs as AutocastKwargs
    from polyaccel.config.numerics import GradScalerKwargs as GradScalerKwargs
    from polyaccel.config.parallel import FullyShardedDataParallelPlugin as FullyShardedDataParallelPlugin
    from polyaccel.config.profile import ProfileKwargs as ProfileKwargs
    from polyaccel.data import skip_first_batches as skip_first_batches
    from polyaccel.distribution import DistributedType as DistributedType
    from polyaccel.ema import EMA as EMA
    from polyaccel.errors import PolyaccelError as PolyaccelError
    from polyaccel.launch.notebook import debug_launcher as debug_launcher
    from polyaccel.launch.notebook import notebook_launcher as notebook_launcher
    from polyaccel.local_sgd import LocalSGD as LocalSGD
    from polyaccel.memory import find_executable_batch_size as find_executable_batch_size
    from polyaccel.mesh import MeshSpec as MeshSpec
    from polyaccel.plan import Plan as Plan
    from polyaccel.seeding import set_seed as set_seed
    from polyaccel.sharding.rules import ShardingRule as ShardingRule

__version__ = "0.1.0"

_HOME = {
    "Accelerator": "polyaccel.accelerator",
    "AutocastKwargs": "polyaccel.config.numerics",
    "Config": "polyaccel.config",
    "DDPCommunicationHookType": "polyaccel.config.exchange",
    "DataLoaderConfiguration": "polyaccel.config.loading",
    "DeepSpeedPlugin": "polyaccel.config.absent",
    "DistributedDataParallelKwargs": "polyaccel.config.exchange",
    "DistributedType": "polyaccel.distribution",
    "EMA": "polyaccel.ema",
    "FullyShardedDataParallelPlugin": "polyaccel.config.parallel",
    "GradScalerKwargs": "polyaccel.config.numerics",
    "GradientAccumulationPlugin": "polyaccel.config.accumulating",
    "InitProcessGroupKwargs": "polyaccel.config.exchange",
    "LocalSGD": "polyaccel.local_sgd",
    "MeshSpec": "polyaccel.mesh",
    "ParallelismConfig": "polyaccel.compat.parallelism_config",
    "PartialState": "polyaccel.compat.state",
    "Plan": "polyaccel.plan",
    "PolyaccelError": "polyaccel.errors",
    "ProfileKwargs": "polyaccel.config.profile",
    "ShardingRule": "polyaccel.sharding.rules",
    "cpu_offload": "polyaccel.big_models",
    "cpu_offload_with_hook": "polyaccel.big_models",
    "debug_launcher": "polyaccel.launch.notebook",
    "disk_offload": "polyaccel.big_models",
    "dispatch_model": "polyaccel.big_models",
    "find_executable_batch_size": "polyaccel.memory",
    "infer_auto_device_map": "polyaccel.big_models",
    "init_empty_weights": "polyaccel.big_models",
    "init_on_device": "polyaccel.big_models",
    "load_checkpoint_and_dispatch": "polyaccel.big_models",
    "load_checkpoint_in_model": "polyaccel.big_models",
    "is_rich_available": "polyaccel.compat.utils.imports",
    "notebook_launcher": "polyaccel.launch.notebook",
    "prepare_pippy": "polyaccel.compat.inference",
    "set_seed": "polyaccel.seeding",
    "skip_first_batches": "polyaccel.data",
    "synchronize_rng_states": "polyaccel.compat.utils.random",
}
__all__ = [
    "Accelerator",
    "AutocastKwargs",
    "Config",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "EMA",
    "FullyShardedDataParallelPlugin",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "LocalSGD",
    "MeshSpec",
    "ParallelismConfig",
    "PartialState",
    "Plan",
    "PolyaccelError",
    "ProfileKwargs",
    "ShardingRule",
    "__version__",
    "cpu_offload",
    "cpu_offload_with_hook",
    "debug_launcher",
    "disk_offload",
    "dispatch_model",
    "find_executable_batch_size",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "is_rich_available",
    "notebook_launcher",
    "prepare_pippy",
    "set_seed",
    "skip_first_batches",
    "synchronize_rng_states",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'polyaccel' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__


class _Accelerate:
    """Finds Accelerate's module names (`polyaccel.state`, `polyaccel.utils.operations`, ...) in `polyaccel.compat`.

    First in line: `polyaccel.utils` is the package `polyaccel.compat.utils` itself, and the ordinary finder would load a second copy
    of the modules in its folder. What is imported under both names is one module.
    """

    names = frozenset(
        {
            "big_modeling",
            "data_loader",
            "hooks",
            "inference",
            "launchers",
            "logging",
            "memory_utils",
            "optimizer",
            "parallelism_config",
            "scheduler",
            "state",
            "utils",
        }
    )

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith("polyaccel.") or name.split(".", 2)[1] not in cls.names:
            return None
        from importlib.machinery import ModuleSpec
        from importlib.util import find_spec

        home = f"polyaccel.compat.{name.removeprefix('polyaccel.')}"
        try:
            found = find_spec(home)
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("polyaccel.compat"):
                raise  # something that the module needs
            return None
        loader: Any = cls
        return found and ModuleSpec(name, loader, origin=found.origin)

    @staticmethod
    def create_module(spec: Any) -> None:
        return None

    @staticmethod
    def exec_module(module: Any) -> None:
        name = module.__spec__.name
        sys.modules[name] = import_module(f"polyaccel.compat.{name.removeprefix('polyaccel.')}")


if not any(getattr(finder, "__qualname__", "") == "_Accelerate" for finder in sys.meta_path):
    sys.meta_path.insert(0, _Accelerate)
