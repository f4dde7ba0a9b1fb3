"""What one process of a run remembers, as the core holds it: the parts that a checkpoint is collected from and restored into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from polyaccel.config import Config
from polyaccel.errors import CheckpointError
from polyaccel.protocols import Engine

# How torch executes an update, not what it computes: an engine's own choice, which another engine makes again.
_EXECUTION = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})


@dataclass(frozen=True, slots=True)
class Part:
    """One prepared object: the group of its arrays, the engine's handle, what user code holds, and its class there."""

    group: str
    handle: Any
    public: Any
    kind: str

    @property
    def hyperparameters(self) -> list[dict[str, Any]] | None:
        """The live parameter groups of an optimizer without parameters and execution flags, None where it has no groups."""
        groups = getattr(self.public, "param_groups", None)
        if groups is None:
            return None
        return [{key: value for key, value in group.items() if key not in _EXECUTION} for group in groups]

    @property
    def group_sizes(self) -> list[int]:
        """Parameters per group."""
        return [len(group.get("params", ())) for group in self.public.param_groups]


@dataclass(frozen=True, slots=True)
class Run:
    """The live run. `window` is its GradientState; `data_shard`: which of how many has this process's gradients in an open window, None
    where they are those of the global batch."""

    engine: Engine
    models: tuple[Part, ...]
    optimizers: tuple[Part, ...]
    schedulers: tuple[Part, ...]
    loaders: tuple[Part, ...]
    registered: tuple[Any, ...]
    window: Any
    backend: str
    seed: int
    data_shard: tuple[int, int] | None

    @property
    def is_in_window(self) -> bool:
        """Whether gradients wait for further micro batches."""
        return self.window.step > 0 and not self.window.sync_gradients


def parts_of(entries: Iterable[Any], role: str) -> tuple[Part, ...]:
    """The prepared objects of one role, each once, in order: groups `model`, `model_1`, ..."""
    found: dict[int, Part] = {}
    for entry in entries:
        if entry.role == role and id(entry.handle) not in found:
            group = role if not found else f"{role}_{len(found)}"
            found[id(entry.handle)] = Part(group, entry.handle, entry.public, type(entry.original).__name__)
    return tuple(found.values())


def registered_group(index: int) -> str:
    """The group of the arrays of a registered object."""
    return f"custom_{index}"


def values_group(group: str) -> str:
    """The group of the arrays inside a part's plain values."""
    return f"{group}_values"


def gradients_group(model: Part) -> str:
    """The group of a model's gradients."""
    return model.group.replace("model", "gradients", 1)


def settings_of(config: Config) -> dict[str, Any]:
    """Every setting as a plain value, for people."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


def check_registrable(objects: Sequence[Any]) -> None:
    """Raises CheckpointError naming position and class of everything that cannot give and take its state."""
    bad = [
        f"Item at index {index} is a {type(value).__name__}"
        for index, value in enumerate(objects)
        if not all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))
    ]
    if bad:
        raise CheckpointError(
            f"register_for_checkpointing takes objects with state_dict and load_state_dict. {'. '.join(bad)}",
            "give them these two methods: state_dict() returns plain values and arrays, load_state_dict(state) takes them back",
        )
