"""Sizes and batches that the text cases share: unmodified classes of transformers, default settings but for sizes and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from architecture_case import Batch, token_ids, without_dropout
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5: dict[str, Any] = {
    "vocab_size": 100, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}  # fmt: skip


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


def without_mask(batch: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """The same batches without padding."""
    return lambda step: {name: value for name, value in batch(step).items() if name != "attention_mask"}


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


def long_masked(step: int) -> Batch:
    """64 tokens, where an attention is sparse in longer rows only."""
    ids = token_ids(length=64)
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


def translation_aligned(step: int) -> Batch:
    """For models that take the decoder's inputs and the labels of the same positions."""
    target = token_ids(length=9)
    return translation(step) | {"decoder_input_ids": target[:, :-1], "labels": target[:, 1:].contiguous()}
