"""One seed for every random generator: python, numpy, the loaded frameworks, and the live engines' own streams."""

from __future__ import annotations

import random
import sys
import weakref

from polyaccel import jobs
from polyaccel.errors import ConfigError
from polyaccel.protocols import Engine
from polyaccel.registry import backend_names, load_backend

_last_seed: int | None = None
_draws_as: weakref.WeakKeyDictionary[Engine, int] = weakref.WeakKeyDictionary()


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed python, numpy, every loaded framework and every live engine.

    Args:
        seed: from 0 to 2**32 - 1.
        device_specific: add this process's index, so that processes draw different numbers; those that compute one data shard together
            (torch with mesh.tensor) add the same one, as what is whole on all of them has to stay the same.
        deterministic: ask the framework for deterministic kernels where it has a choice (torch.use_deterministic_algorithms).

    Call it on every process. An Accelerator created later starts from the same seed. Same name and meaning as
    `accelerate.utils.set_seed`.
    """
    global _last_seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r} is not a seed", "use an integer from 0 to 2**32 - 1")
    engines = jobs.engines()
    if device_specific and engines:
        newest = engines[-1]
        seed += _draws_as.get(newest, newest.topology.process_index)
    _last_seed = seed
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    for name in backend_names():
        load_backend(name).seed(seed)
    for engine in engines:
        engine.seed(seed)
    if deterministic and "torch" in sys.modules:
        sys.modules["torch"].use_deterministic_algorithms(True)


def seed_if_unset(seed: int) -> None:
    """`set_seed`, unless the script has called it before."""
    if _last_seed is None:
        set_seed(seed)


def adopt(engine: Engine, default: int, *, draws_as: int | None = None) -> None:
    """Start an engine's stream from the last `set_seed`, or from `default`, and let later ones reach it.

    draws_as: what its device-specific seeds have added (default: the process's index).
    """
    jobs.adopt(engine)
    if draws_as is not None:
        _draws_as[engine] = draws_as
    engine.seed(default if _last_seed is None else _last_seed)
