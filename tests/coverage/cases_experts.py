"""Mixtures of experts of transformers: tokens are routed to a few of several experts by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from architecture_case import Batch, Case, token_ids
from text_models import BART, GROUPED, SIZES, SPECIAL, T5, built, causal_padded, padded


def experts(
    name: str, head: str, config: str, batch: Callable[[int], Batch] = causal_padded, note: str = "", **settings: Any
) -> Case:
    """A causal language model whose tokens are routed to a few of several experts."""
    return Case(name, "mixtures of experts", built(head, config, **SIZES | settings), batch, note=note)


IDLE = "every expert gets tokens here: one that gets none has gradients of 0, where torch has none"


def many_tokens(step: int) -> Batch:
    """Enough tokens that no expert is idle."""
    ids = token_ids(4, 32)
    return {"input_ids": ids, "attention_mask": padded(ids), "labels": token_ids(4, 32)}


MOE: dict[str, Any] = {
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LATENT: dict[str, Any] = {  # attention of DeepSeek
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1,
}  # fmt: skip

CASES: tuple[Case, ...] = (
    experts("Mixtral", "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **GROUPED),
    experts(
        "Mixtral, router loss",
        "MixtralForCausalLM",
        "MixtralConfig",
        num_local_experts=4,
        output_router_logits=True,
        **GROUPED,
    ),
    experts(
        "Mixtral, batched_mm",
        "MixtralForCausalLM",
        "MixtralConfig",
        num_local_experts=4,
        experts_implementation="batched_mm",
        **GROUPED,
    ),
    experts("Qwen2-MoE", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", shared_expert_intermediate_size=32, **MOE),
    experts("Qwen3-MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", head_dim=8, **MOE),
    experts("OLMoE", "OlmoeForCausalLM", "OlmoeConfig", **MOE, **SPECIAL),
    experts(
        "PhiMoE",
        "PhimoeForCausalLM",
        "PhimoeConfig",
        num_local_experts=4,
        router_jitter_noise=0.0,
        input_jitter_noise=0.0,
        note="without its random choice of near experts",
        **GROUPED,
    ),
    experts(
        "Granite-MoE",
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        **GROUPED,
    ),
    experts(
        "JetMoE",
        "JetMoeForCausalLM",
        "JetMoeConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        kv_channels=8,
        num_key_value_heads=2,
    ),
    experts(
        "DBRX",
        "DbrxForCausalLM",
        "DbrxConfig",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        ffn_config={"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 32, "hidden_size": 32},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    ),
    experts(
        "DeepSeek-V2", "DeepseekV2ForCausalLM", "DeepseekV2Config", n_shared_experts=1, topk_method="greedy", **LATENT
    ),
    experts("DeepSeek-V3", "DeepseekV3ForCausalLM", "DeepseekV3Config", n_shared_experts=1, **LATENT),
    experts(
        "GPT-OSS",
        "GptOssForCausalLM",
        "GptOssConfig",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        num_key_value_heads=2,
        **SPECIAL,
    ),
    experts(
        "GLM-4.5-MoE",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        head_dim=8,
        **GROUPED,
    ),
    experts(
        "ERNIE 4.5 MoE",
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=32,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        **GROUPED,
    ),
    experts(
        "Llama 4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=64,
        attention_chunk_size=8,
        **GROUPED,
    ),
    experts(
        "Mixtral, eager",
        "MixtralForCausalLM",
        "MixtralConfig",
        num_local_experts=4,
        experts_implementation="eager",
        note='`experts_implementation="eager"` is captured as grouped products',
        **GROUPED,
    ),
    experts(
        "LongCat Flash",
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        num_layers=2,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=32,
        moe_topk=2,
        zero_expert_num=1,
        n_routed_experts=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        head_dim=4,
        num_key_value_heads=4,
    ),
    Case(
        "Switch Transformers",
        "mixtures of experts",
        built(
            "SwitchTransformersForConditionalGeneration",
            "SwitchTransformersConfig",
            **T5
            | {
                "num_experts": 2,
                "expert_capacity": 32,
                "num_sparse_encoder_layers": 1,
                "num_sparse_decoder_layers": 1,
                "router_jitter_noise": 0.0,
            },
        ),
        many_tokens,
        note=IDLE,
    ),
    Case(
        "NLLB-MoE",
        "mixtures of experts",
        built(
            "NllbMoeForConditionalGeneration",
            "NllbMoeConfig",
            **BART
            | {
                "num_experts": 2,
                "expert_capacity": 32,
                "encoder_sparse_step": 2,
                "decoder_sparse_step": 2,
                "router_jitter_noise": 0.0,
            },
        ),
        many_tokens,
        note=IDLE,
    ),
)
