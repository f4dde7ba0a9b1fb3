"""Forwards of transformers' routed experts that loop over the experts which a batch happens to hit, with shapes that hold for any batch.

Most of its models have such a form of their own, grouped matrix products, which is the default and is captured as it is; a model that
was set to `experts_implementation="eager"` is captured in it too. The classes below have none. Each goes when transformers gives the
class `use_experts_implementation` (github.com/huggingface/transformers, src/transformers/integrations/moe.py).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_log = logging.getLogger(__name__)
_MODELS = "transformers.models"


def fixed_form_of(module: nn.Module) -> Callable[..., Any] | None:
    """What to call instead of the module's forward while it is captured (the module first), or None."""
    kind = type(module)
    form = _FORMS.get(f"{kind.__module__}.{kind.__qualname__}")
    if form is not None:
        return form
    config = getattr(module, "config", None)
    if not hasattr(module, "_is_expert_parallel") or getattr(config, "_experts_implementation", None) != "eager":
        return None
    form = getattr(sys.modules.get("transformers.integrations.moe"), "grouped_mm_experts_forward", None)
    return form if hasattr(kind.forward, "__wrapped__") else None  # a subclass with a forward of its own keeps it


# -- experts that are modules: each sees every token, and its output counts where the token was sent to it -----------------------------

_said: set[type] = set()


def _say_once(module: nn.Module) -> None:
    if type(module) not in _said:
        _said.add(type(module))
        _log.warning(
            "every expert of %s is computed for every token, because its loop over the experts of a batch is no fixed program;"
            " an expert that gets no token has gradients of 0 where torch has none, so weight decay and momentum still move it",
            type(module).__name__,
        )


def _sum_over_experts(
    hidden: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    expert: Callable[[int], Callable[..., torch.Tensor]],
) -> torch.Tensor:
    """hidden (tokens, dim), mask (tokens, choices, experts) of 0 and 1, weights (tokens, choices or 1) -> (tokens, dim)."""
    total = torch.zeros_like(hidden)
    for index in range(mask.shape[-1]):
        chosen = mask[..., index]
        share = (chosen * weights).sum(-1, keepdim=True)
        given = expert(index)(hidden)
        # where, not a product alone: a token that the expert does not serve may overflow in it
        total = total + torch.where(chosen.any(-1, keepdim=True), given * share, 0).to(hidden.dtype)
    return total


def _switch(
    module: Any, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
) -> torch.Tensor:
    _say_once(module)
    return _sum_over_experts(hidden_states, selected_experts, routing_weights, lambda index: module[f"expert_{index}"])


def _nllb(
    module: Any, hidden_states: torch.Tensor, router_mask: torch.Tensor, router_probs: torch.Tensor
) -> torch.Tensor:
    _say_once(module)
    dropped = module.moe_token_dropout

    def expert(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(hidden: torch.Tensor) -> torch.Tensor:
            given: torch.Tensor = module[f"expert_{index}"](hidden)
            if dropped > 0:
                given = module.token_dropout(given) if module.training else given * (1 - dropped)
            return given

        return run

    return _sum_over_experts(hidden_states, F.one_hot(router_mask, module.num_experts), router_probs, expert)


# -- experts that are slices of one weight: tokens sorted by expert, grouped products --------------------------------------------------


def _product(rows: torch.Tensor, matrices: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """(rows, k) sorted by group x (groups, k, n) -> (rows, n); rows behind the last group give 0."""
    ends = sizes.cumsum(0).to(torch.int32)
    result: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(rows.to(matrices.dtype), matrices, ends)
    return result


def _sizes(experts: torch.Tensor, count: int) -> torch.Tensor:
    return (experts.unsqueeze(-1) == torch.arange(count)).sum(0)


def _sorted_by_expert(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`run(rows, experts)` on the chosen (token, expert) pairs in the order of their experts; weighted, summed by token."""
    experts, order = top_k_index.flatten().sort()
    tokens = order // top_k_index.shape[-1]
    given = run(hidden[tokens], experts) * top_k_weights.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(hidden).index_add(0, tokens, given.to(hidden.dtype))


def _dbrx(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    flat = hidden_states.reshape(-1, module.hidden_size)
    shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
    w1, v1, w2 = (weight.view(shape) for weight in (module.mlp.w1, module.mlp.v1, module.mlp.w2))

    def run(rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        sizes = _sizes(experts, module.num_experts)
        gate = module.mlp.activation_fn(_product(rows, w1.transpose(1, 2), sizes))
        return _product(gate * _product(rows, v1.transpose(1, 2), sizes), w2, sizes)

    return _sorted_by_expert(flat, top_k_index, top_k_weights, run).view(hidden_states.shape[0], -1, module.hidden_size)


def _longcat(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts behind the routed ones hand a token on unchanged."""
    count = module.num_routed_experts if module.gate_up_proj is not None else 0

    def run(rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        if not count:
            return rows
        sizes = _sizes(experts, count)
        both = _product(rows, module.gate_up_proj[:count].transpose(1, 2), sizes)
        gate, up = both.chunk(2, dim=-1)
        given = _product(module.act_fn(gate) * up, module.down_proj.transpose(1, 2), sizes)
        return torch.where((experts < count).unsqueeze(-1), given, rows)

    return _sorted_by_expert(hidden_states, top_k_index, top_k_weights, run)


def _jetmoe_gating(module: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As JetMoeTopKGating, with the number of tokens per expert as a tensor, which `_jetmoe_experts` takes."""
    logits = module.layer(hidden_states).float()
    top_logits, top_experts = logits.topk(module.top_k, dim=1)
    gates = torch.softmax(top_logits, dim=1).type_as(hidden_states).flatten()
    _, order = top_experts.flatten().sort(0)
    return order, order // module.top_k, gates[order], _sizes(top_experts.flatten(), module.num_experts), logits


def _jetmoe_experts(module: Any, inputs: torch.Tensor, expert_size: torch.Tensor) -> torch.Tensor:
    return _product(inputs, module.weight.transpose(1, 2), expert_size)


_FORMS: dict[str, Callable[..., Any]] = {
    f"{_MODELS}.switch_transformers.modeling_switch_transformers.SwitchTransformersExperts": _switch,
    f"{_MODELS}.nllb_moe.modeling_nllb_moe.NllbMoeExperts": _nllb,
    f"{_MODELS}.dbrx.modeling_dbrx.DbrxExperts": _dbrx,
    f"{_MODELS}.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": _longcat,
    f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeTopKGating": _jetmoe_gating,
    f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeParallelExperts": _jetmoe_experts,
}
