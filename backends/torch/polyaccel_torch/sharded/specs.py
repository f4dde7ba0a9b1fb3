"""How each parameter is cut: a mesh axis or None per dim, by parameter name. What follows in this package reads nothing else.

`specs_of` is the one place that decides. Its few names are those of common transformer layers in torch's spelling.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from polyaccel.errors import PrepareError

log = logging.getLogger("polyaccel.torch")

Spec = tuple[str | None, ...]
Specs = Mapping[str, Spec]  # of every parameter of a model, tied ones under their first name

_OUTPUTS_CUT = (
    "q_proj",
    "k_proj",
    "v_proj",
    "query",
    "key",
    "value",
    "gate_proj",
    "up_proj",
    "fc1",
    "c_fc",
    "w1",
    "w3",
)
_INPUTS_CUT = ("o_proj", "out_proj", "down_proj", "fc2", "c_proj", "w2")
_TENSOR_RULES: tuple[tuple[str, Spec], ...] = (
    *((f"*{name}.weight", ("tensor", None)) for name in _OUTPUTS_CUT),
    *((f"*{name}.bias", ("tensor",)) for name in _OUTPUTS_CUT),
    *((f"*{name}.weight", (None, "tensor")) for name in _INPUTS_CUT),
)


def specs_of(module: nn.Module, sizes: Mapping[str, int]) -> dict[str, Spec]:
    """A spec for every parameter of the module on axes of these sizes.

    Raises PrepareError for a `tensor` axis of which no layer of the model makes use.
    """
    named = dict(module.named_parameters())
    specs: dict[str, Spec] = {name: (None,) * parameter.dim() for name, parameter in named.items()}
    size = sizes.get("tensor", 1)
    if size > 1:
        uneven = []
        users = Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)
        for name, parameter in named.items():
            spec = _matched(name, parameter.dim())
            dim = None if spec is None else spec.index("tensor")
            if spec is None or dim is None or users[id(parameter)] > 1 or not _is_linear(module, name):
                continue  # where two layers share a parameter, each would get pieces of its own
            if parameter.shape[dim] % size:
                uneven.append(f"{name} {tuple(parameter.shape)}")
            else:
                specs[name] = spec
        _whole_layers(specs)
        if not any("tensor" in spec for spec in specs.values()):
            raise PrepareError(
                f"mesh.tensor={size} splits no layer of {type(module).__name__}:"
                + (
                    f" {', '.join(uneven[:3])} cannot be cut into {size} equal parts" if uneven else " no name is known"
                ),
                f"use mesh.fsdp for this model; known are Linear layers named {', '.join((*_OUTPUTS_CUT, *_INPUTS_CUT))}",
            )
        if uneven:
            log.warning("mesh.tensor=%d: whole on every device, as they do not divide: %s", size, ", ".join(uneven))
    parts = sizes.get("fsdp", 1)
    if parts > 1:
        for name, parameter in named.items():
            specs[name] = _with_fsdp(specs[name], tuple(parameter.shape), parts)
    return specs


def _matched(name: str, num_dims: int) -> Spec | None:
    return next((spec for pattern, spec in _TENSOR_RULES if fnmatchcase(name, pattern) and len(spec) == num_dims), None)


def _is_linear(module: nn.Module, name: str) -> bool:
    # Subclasses may be used without being called (the out_proj of nn.MultiheadAttention), where no hook sees their input.
    return type(module.get_submodule(name.rpartition(".")[0])) is nn.Linear


def _whole_layers(specs: dict[str, Spec]) -> None:
    """A bias is cut with its weight's outputs or not at all."""
    for name in list(specs):
        layer, _, kind = name.rpartition(".")
        weight = specs.get(f"{layer}.weight")
        if kind == "bias" and "tensor" in specs[name] and (weight is None or weight[0] != "tensor"):
            specs[name] = (None,)


def _with_fsdp(spec: Spec, shape: tuple[int, ...], parts: int) -> Spec:
    """`fsdp` along the largest dim that is not cut and divides; none where there is no such dim."""
    free = [dim for dim, axis in enumerate(spec) if axis is None and shape[dim] and shape[dim] % parts == 0]
    if not free:
        return spec
    chosen = max(free, key=lambda dim: shape[dim])
    return tuple("fsdp" if dim == chosen else axis for dim, axis in enumerate(spec))
