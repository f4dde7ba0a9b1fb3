"""Language models of transformers, as users take them: unmodified classes, default settings but for sizes and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from architecture_case import Batch, Case, token_ids, without_dropout
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def built(head: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A function that makes `transformers.<head>` from `transformers.<config>(**settings)` without dropout."""

    def build() -> nn.Module:
        made = getattr(transformers, config)(**settings)
        return getattr(transformers, head)(without_dropout(made))

    return build


def padded(ids: torch.Tensor) -> torch.Tensor:
    """An attention mask that leaves out the end of the first row."""
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    return mask


def causal(step: int) -> Batch:
    """Next-token prediction over whole rows."""
    ids = token_ids()
    return {"input_ids": ids, "labels": ids}


def causal_padded(step: int) -> Batch:
    """Next-token prediction with padding, which the loss leaves out."""
    ids = token_ids()
    mask = padded(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def masked(step: int) -> Batch:
    """A label at every fourth position."""
    ids = token_ids()
    labels = torch.where(torch.arange(ids.shape[1]) % 4 == 1, ids, -100)
    return {"input_ids": ids, "attention_mask": padded(ids), "labels": labels}


def classes(step: int) -> Batch:
    """One of two classes per row."""
    ids = token_ids()
    return {"input_ids": ids, "attention_mask": padded(ids), "labels": torch.randint(0, 2, (ids.shape[0],))}


def translation(step: int) -> Batch:
    """Source, padded, and target."""
    ids = token_ids()
    return {"input_ids": ids, "attention_mask": padded(ids), "labels": token_ids(length=8)}


ENCODERS = (Case("BERT", "encoders", built("BertForMaskedLM", "BertConfig", **SIZES), masked),)
DECODERS = (
    Case("Llama", "decoders", built("LlamaForCausalLM", "LlamaConfig", **SIZES, num_key_value_heads=2), causal_padded),
)

CASES: tuple[Case, ...] = (*ENCODERS, *DECODERS)
