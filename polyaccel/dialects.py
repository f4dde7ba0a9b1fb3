"""What a user's object is, told from the names of its classes: no framework is imported to find out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

Dialect = str  # "torch", "flax", or what a third-party backend calls its own
Role = Literal["model", "optimizer", "scheduler", "loader", "loss", "value", "parameters"]

# A class name (module, qualified name) in the object's MRO -> what it is. The module is matched by its first part or exactly.
_KNOWN: dict[tuple[str, str], tuple[Dialect, Role]] = {
    ("torch", "Module"): ("torch", "model"),
    ("torch", "Optimizer"): ("torch", "optimizer"),
    ("torch", "LRScheduler"): ("torch", "scheduler"),
    ("torch", "ReduceLROnPlateau"): ("torch", "scheduler"),
    ("torch", "DataLoader"): ("torch", "loader"),
    ("torch", "Tensor"): ("torch", "loss"),
    ("flax", "Module"): ("flax", "model"),
    ("flax", "Optimizer"): ("flax", "optimizer"),
    ("optax", "GradientTransformation"): ("flax", "optimizer"),
    ("optax", "GradientTransformationExtraArgs"): ("flax", "optimizer"),
    ("grain", "DataLoader"): ("flax", "loader"),
    ("grain", "IterDataset"): ("flax", "loader"),
    ("grain", "MapDataset"): ("flax", "loader"),
    ("jax", "Array"): ("flax", "loss"),
    ("jaxlib", "ArrayImpl"): ("flax", "loss"),
    ("jax", "Tracer"): ("flax", "loss"),
}


def of_script() -> Dialect | None:
    """The dialect that a script seems to be written in, told from what it has imported so far; None if that tells nothing."""
    if "flax" in sys.modules:
        return "flax"
    return "torch" if "torch" in sys.modules else None


def identify(value: Any, extra: Mapping[tuple[str, str], tuple[Dialect, Role]] = {}) -> tuple[Dialect, Role] | None:
    """The dialect and role of a user's object, or None for one that no engine needs to know (it passes through prepare).

    `extra` adds a third-party backend's own classes: (first part of the module, class name) -> (dialect, role).
    """
    for kind in type(value).__mro__:
        name = (kind.__module__.partition(".")[0], kind.__name__)
        found = _KNOWN.get(name) or extra.get(name)
        if found is not None:
            return found
    return None
