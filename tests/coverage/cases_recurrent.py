"""State-space, linear-attention and hybrid language models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from architecture_case import Batch, Case
from cases_experts import MOE
from text_models import GROUPED, SIZES, SPECIAL, built, causal, causal_padded


def recurrent(
    name: str, head: str, config: str, batch: Callable[[int], Batch] = causal, note: str = "", **settings: Any
) -> Case:
    """A causal language model with a state, or with states and attention."""
    return Case(name, "state-space and linear", built(head, config, **SIZES | settings), batch, note=note)


CASES: tuple[Case, ...] = (
    recurrent("Mamba", "MambaForCausalLM", "MambaConfig", state_size=4, time_step_rank=4),
    recurrent(
        "Mamba 2", "Mamba2ForCausalLM", "Mamba2Config", state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8
    ),
    recurrent("FalconMamba", "FalconMambaForCausalLM", "FalconMambaConfig", state_size=4, time_step_rank=4),
    recurrent("RWKV", "RwkvForCausalLM", "RwkvConfig", attention_hidden_size=32, context_length=64),
    recurrent(
        "RecurrentGemma",
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
        **GROUPED,
    ),
    recurrent(
        "Jamba",
        "JambaForCausalLM",
        "JambaConfig",
        causal_padded,
        use_mamba_kernels=False,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        **GROUPED,
    ),
    recurrent(
        "Zamba",
        "ZambaForCausalLM",
        "ZambaConfig",
        causal_padded,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
        n_mamba_heads=2,
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        attention_hidden_size=64,
        num_key_value_heads=4,
    ),
    recurrent(
        "Zamba 2",
        "Zamba2ForCausalLM",
        "Zamba2Config",
        causal_padded,
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=8,
        mamba_headdim=8,
        chunk_size=8,
        use_mem_rope=True,
        layers_block_type=["mamba", "hybrid"],
        num_mem_blocks=1,
    ),
    recurrent(
        "Bamba",
        "BambaForCausalLM",
        "BambaConfig",
        causal_padded,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        attn_layer_indices=[1],
        **GROUPED,
    ),
    recurrent(
        "FalconH1",
        "FalconH1ForCausalLM",
        "FalconH1Config",
        causal_padded,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_ssm=64,
        mamba_d_state=8,
        mamba_chunk_size=8,
        **GROUPED,
    ),
    recurrent(
        "Granite-MoE hybrid",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        causal_padded,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        **GROUPED,
    ),
    recurrent(
        "LFM2", "Lfm2ForCausalLM", "Lfm2Config", causal_padded, layer_types=["conv", "full_attention"], **GROUPED
    ),
    recurrent(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        causal_padded,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        head_dim=8,
        shared_expert_intermediate_size=32,
        **MOE,
    ),
    recurrent(
        "MiniMax",
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        causal_padded,
        layer_types=["linear_attention", "full_attention"],
        block_size=8,
        num_local_experts=4,
        head_dim=8,
        **GROUPED,
    ),
    recurrent(
        "OLMo hybrid",
        "OlmoHybridForCausalLM",
        "OlmoHybridConfig",
        causal_padded,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        **GROUPED,
        **SPECIAL,
    ),
)
