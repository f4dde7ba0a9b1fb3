"""Unmodified transformers models with random weights: loss and every gradient against torch eager.

Tolerance 1e-4 of each gradient's largest value: float32, a few hundred operations deep, sums in another order.
"""

from __future__ import annotations

from typing import Any

import captured_parity
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def train_both(*args: Any) -> captured_parity.Parity:
    # The bias of a key projection has gradient 0 (softmax ignores a constant): below 1e-3 only rounding noise is left.
    return captured_parity.train_both(*args, floor=1e-3)


def padded_ids(batch: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(1, 100, (batch, length)), torch.ones(batch, length, dtype=torch.long)
    mask[0, 7:] = 0
    return ids, mask


def test_bert_with_a_padding_mask():
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL)
    model = BertForSequenceClassification(config).train()
    parity = train_both(
        lambda m, ids, mask, y: m["model"](input_ids=ids, attention_mask=mask, labels=y).loss,
        {"model": model},
        [*padded_ids(), torch.randint(0, 2, (3,))],
    )
    assert parity.worst < 1e-4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gpt2_with_tied_weights(implementation):
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0, attn_implementation=implementation,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    parity = train_both(lambda m, i: m["model"](input_ids=i, labels=i).loss, {"model": model}, [padded_ids()[0]])
    assert parity.graph.tied == {"model.lm_head.weight": "model.transformer.wte.weight"}
    assert parity.worst < 1e-4


def test_llama_with_grouped_queries_and_rotary_positions():
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SMALL)).train()
    ids, mask = padded_ids()
    parity = train_both(
        lambda m, i, a: m["model"](input_ids=i, attention_mask=a, labels=i, use_cache=False).loss,
        {"model": model},
        [ids, mask],
    )
    assert parity.worst < 1e-4


def test_llama_with_gradient_checkpointing_gives_the_same_gradients():
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SMALL)).train()
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
    parity = train_both(
        lambda m, i: m["model"](input_ids=i, labels=i, use_cache=False).loss, {"model": model}, [padded_ids()[0]]
    )
    assert parity.worst < 1e-4


def test_t5_with_relative_positions():
    config = T5Config(
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        vocab_size=100,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).train()
    ids, mask = padded_ids()
    parity = train_both(
        lambda m, i, a, y: m["model"](input_ids=i, attention_mask=a, labels=y, use_cache=False).loss,
        {"model": model},
        [ids, mask, torch.randint(1, 100, (3, 5))],
    )
    assert parity.worst < 1e-4


def test_a_vision_transformer():
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=5,
        **{k: v for k, v in SMALL.items() if k != "vocab_size"},
    )  # fmt: skip
    model = ViTForImageClassification(config).train()
    parity = train_both(
        lambda m, x, y: m["model"](pixel_values=x, labels=y).loss,
        {"model": model},
        [torch.randn(2, 3, 16, 16), torch.randint(0, 5, (2,))],
    )
    assert parity.worst < 1e-4
