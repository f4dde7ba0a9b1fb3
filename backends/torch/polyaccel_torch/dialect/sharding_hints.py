"""What a torch module says of how its parameters are cut: the plan of a transformers model, and layers that store (in, out)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from polyaccel.sharding.plan import ModelHints


def hints_of(module: nn.Module) -> ModelHints:
    """Read as data: transformers is not imported.

    A model's `_tp_plan` covers the modules below it, by names relative to it. GPT-2's Conv1D stores its weight transposed. An attention
    module that names its `head_dim`, with fewer heads of keys and values than of queries, says where these may be cut.
    """
    plan: dict[str, str] = {}
    covered: list[str] = []
    input_first: list[str] = []
    heads: dict[str, int] = {}
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        found = getattr(part, "_tp_plan", None)
        if isinstance(found, Mapping) and found and not any(prefix.startswith(outer) for outer in covered):
            covered.append(prefix)
            plan.update({f"{prefix}{key}": str(style) for key, style in found.items()})
        if is_conv1d(part):
            input_first.append(f"{prefix}weight")
        heads.update({f"{prefix}{key}": number for key, number in _shared_heads(part).items()})
    return ModelHints(plan=plan, input_first=frozenset(input_first), heads=heads)


def _shared_heads(part: nn.Module) -> dict[str, int]:
    """Heads of `k_proj` and `v_proj`, where there are fewer of them than of `q_proj`."""
    size = getattr(part, "head_dim", None)
    query, *others = (getattr(part, name, None) for name in ("q_proj", "k_proj", "v_proj"))
    if not isinstance(size, int) or not isinstance(query, nn.Linear):
        return {}
    named = zip(("k_proj", "v_proj"), others, strict=True)
    numbers = {name: one.out_features // size for name, one in named if isinstance(one, nn.Linear)}
    return {name: number for name, number in numbers.items() if number < query.out_features // size}


def is_conv1d(part: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D: a Linear whose weight is (in, out)."""
    return type(part).__name__ == "Conv1D" and isinstance(getattr(part, "nf", None), int)
