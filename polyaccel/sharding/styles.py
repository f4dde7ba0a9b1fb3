"""What a layer does with its inputs, by its name: which dim of its weight the tensor axis cuts. Knows the layouts of torch and flax.

A column layer computes a part of its outputs on each device, the row layer after it takes that part as its inputs: between the two,
nothing is exchanged (Shoeybi et al. 2019, Megatron-LM, section 3).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from polyaccel.sharding.rules import Spec, matches

Style = Literal["column", "row", "vocabulary", "embedding_column", "whole"]

# Layers (or parameters) by the end of their names; the first that matches counts.
AUTOMATIC: tuple[tuple[str, Style], ...] = (
    *((f"*.{name}", "column") for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv")),
    *(
        (f"*.{name}", "column")
        for name in ("query", "key", "value", "q_lin", "k_lin", "v_lin", "qkv", "c_attn", "q_attn")
    ),
    *((f"*.{name}", "column") for name in ("wq", "wk", "wv", "w1", "w3", "wi", "wi_0", "wi_1")),
    *((f"*.{name}", "column") for name in ("gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "lin1")),
    *((f"*.{name}", "column") for name in ("dense_h_to_4h", "intermediate.dense", "linear1")),
    *((f"*.{name}", "row") for name in ("o_proj", "out_proj", "down_proj", "c_proj", "out_lin", "wo", "w2", "fc2")),
    *((f"*.{name}", "row") for name in ("fc_out", "lin2", "dense_4h_to_h", "output.dense", "linear2")),
    *((f"*.{name}", "row") for name in ("attention.dense", "self_attention.dense", "attention.out", "attn.out")),
    *((f"*.{name}", "vocabulary") for name in ("wte", "embed_tokens", "word_embeddings", "tok_embeddings", "embed_in")),
    *((f"*.{name}", "column") for name in ("lm_head", "embed_out", "unembed")),
    *((f"*.{name}", "whole") for name in ("wpe", "position_embeddings", "token_type_embeddings", "embed_positions")),
)

# Styles of transformers' `_tp_plan` (its integrations/tensor_parallel.py); others have no counterpart.
PLAN_STYLES: Mapping[str, Style] = {
    "colwise": "column",
    "colwise_rep": "column",
    "colwise_gather_output": "column",
    "packed_colwise": "column",
    "rowwise": "row",
    "rowwise_rep": "row",
    "rowwise_split_input": "row",
    "packed_rowwise": "row",
    "embedding_rowwise": "vocabulary",
    "embedding_colwise": "embedding_column",
    "replicate": "whole",
    "replicated_with_grad_allreduce": "whole",
    "all_reduce": "whole",
    "sequence_parallel": "whole",
    "mla_kv_a_proj": "whole",
}

_WEIGHT_DIMS = (2, 3)  # three: one matrix per expert, or flax's heads beside their size
_BIASES = ("bias", "b")
_FUSED = ("*.c_attn", "*.c_fc")  # write more than they read


def layer_of(name: str) -> str:
    """The layer whose parameter this is: the name without its last part."""
    return name.rpartition(".")[0]


def is_bias(name: str) -> bool:
    """Whether a parameter is added to the layer's output."""
    return name.rpartition(".")[2] in _BIASES or name.endswith("_bias")


def style_of(name: str, styles: Sequence[tuple[str, Style]] = AUTOMATIC) -> Style | None:
    """The style of a parameter, or of its layer: the first whose pattern matches."""
    layer = layer_of(name)
    return next((style for pattern, style in styles if matches(pattern, layer) or matches(pattern, name)), None)


def input_first(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Weights that are stored as (in, out): flax's kernels, and those of GPT-2's Conv1D, where a model has that.

    The names of Conv1D layers are those of Linear layers elsewhere. Their fused projections tell: these have more outputs than inputs.
    """
    kernels = {name for name in shapes if name.endswith(("kernel", "kernel_q"))}
    fused = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith("weight") and any(matches(glob, layer_of(name)) for glob in _FUSED)
    ]
    if fused and all(shape[1] > shape[0] for shape in fused):
        conv1d = ("*.c_attn", "*.q_attn", "*.c_fc", "*.c_proj")
        kernels |= {name for name in shapes if any(matches(f"{glob}.weight", name) for glob in conv1d)}
    return frozenset(kernels)


def axes_of_style(
    style: Style, name: str, shape: tuple[int, ...], *, input_first: Collection[str], axis: str = "tensor"
) -> Spec | None:
    """Per dim the axis that cuts it, in a layer of this style; None where the style says nothing about such a parameter."""
    rank = len(shape)
    if style == "whole":
        return (None,) * rank
    if is_bias(name):
        # The bias of a row layer is added once, to the whole output. That of flax's DenseGeneral is (heads, head_dim).
        return _cut(rank, 0 if style == "column" else None, axis) if rank in (1, 2) else None
    if style in ("vocabulary", "embedding_column"):
        return _cut(rank, 0 if style == "vocabulary" else 1, axis) if rank == 2 else None
    if rank not in _WEIGHT_DIMS:
        return None
    if name in input_first:  # (in, out), (in, heads, head_dim), (heads, head_dim, out)
        return _cut(rank, 1 if style == "column" else 0, axis)
    return _cut(rank, rank - 2 if style == "column" else rank - 1, axis)  # (out, in), (experts, out, in)


def _cut(rank: int, dim: int | None, axis: str) -> Spec:
    return tuple(axis if index == dim else None for index in range(rank))
