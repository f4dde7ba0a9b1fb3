"""How each parameter is cut: a mesh axis or None per dim, by parameter name. What follows in this package reads nothing else.

`specs_of` is the one place that decides, by names of common transformer layers in torch's spelling and by shapes; it looks at no module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

Spec = tuple[str | None, ...]
Specs = Mapping[str, Spec]  # of every parameter of a model, tied ones under their first name

OUTPUTS_CUT = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "gate_proj", "up_proj", "fc1", "c_fc", "w1", "w3")
INPUTS_CUT = ("o_proj", "out_proj", "down_proj", "fc2", "c_proj", "w2")
_TENSOR_RULES: tuple[tuple[str, Spec], ...] = (
    *((f"*{name}.weight", ("tensor", None)) for name in OUTPUTS_CUT),
    *((f"*{name}.bias", ("tensor",)) for name in OUTPUTS_CUT),
    *((f"*{name}.weight", (None, "tensor")) for name in INPUTS_CUT),
)


def specs_of(shapes: Mapping[str, Sequence[int]], sizes: Mapping[str, int]) -> tuple[dict[str, Spec], tuple[str, ...]]:
    """A spec for parameters of these shapes on axes of these sizes, and the names of those that a rule would cut and that do not divide."""
    specs: dict[str, Spec] = {}
    uneven: list[str] = []
    size, parts = sizes.get("tensor", 1), sizes.get("fsdp", 1)
    for name, shape in shapes.items():
        spec: Spec = (None,) * len(shape)
        found = _matched(name, len(shape)) if size > 1 else None
        if found is not None and shape[found.index("tensor")] % size == 0:
            spec = found
        elif found is not None:
            uneven.append(name)
        specs[name] = _with_fsdp(spec, shape, parts) if parts > 1 else spec
    return specs, tuple(uneven)


def without_tensor(spec: Spec) -> Spec:
    """The same, whole along the tensor axis."""
    return tuple(None if axis == "tensor" else axis for axis in spec)


def _matched(name: str, num_dims: int) -> Spec | None:
    return next((spec for pattern, spec in _TENSOR_RULES if fnmatchcase(name, pattern) and len(spec) == num_dims), None)


def _with_fsdp(spec: Spec, shape: Sequence[int], parts: int) -> Spec:
    """`fsdp` along the largest dim that is not cut and divides; none where there is no such dim."""
    free = [dim for dim, axis in enumerate(spec) if axis is None and shape[dim] and shape[dim] % parts == 0]
    if not free:
        return spec
    chosen = max(free, key=lambda dim: shape[dim])
    return tuple("fsdp" if dim == chosen else axis for dim, axis in enumerate(spec))
