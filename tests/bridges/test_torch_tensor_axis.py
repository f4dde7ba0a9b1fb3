"""mesh.tensor for torch modules on the jax engine: captured programs whose layers are cut, by names and by plans of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from polyaccel import Accelerator
from polyaccel_torch.dialect.sharding_hints import hints_of

VOCAB, WIDTH, LENGTH, BATCH = 64, 32, 16, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, length, width)
        parts = self.c_attn(self.norm1(x)).split(WIDTH, dim=2)
        q, k, v = (part.view(*part.shape[:2], 4, -1).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.c_proj(attended)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList([Block() for _ in range(2)])
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe.weight
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def twenty_steps(accelerator: Accelerator, model: Any, optimizer: Any, max_norm: float | None = None) -> np.ndarray:
    """The losses of a recorded loop."""
    losses = []
    for rows in np.random.default_rng(0).integers(0, VOCAB, (20, BATCH, LENGTH + 1)):
        tokens = torch.from_numpy(rows)
        out = model(tokens[:, :-1])
        logits = out if isinstance(out, torch.Tensor) else out.logits
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
        accelerator.backward(loss)
        if max_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return np.array(losses)


def losses_of(make: Callable[[], nn.Module], **settings: Any) -> tuple[np.ndarray, dict[str, Any]]:
    torch.manual_seed(0)
    accelerator = Accelerator(backend="jax", compilation_cache="off", **settings)
    module = make()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(module, optimizer)
    losses = twenty_steps(accelerator, model, optimizer, max_norm=1.0)
    engine: Any = accelerator._engine
    (handle,) = (reference() for reference in engine._models)
    return losses, {name: tuple(leaf.sharding.spec) for name, leaf in handle.params.items()}


@pytest.mark.parametrize("make", [Gpt, llama], ids=["gpt", "llama"])
def test_twenty_steps_are_those_of_whole_layers(make: Callable[[], nn.Module]) -> None:
    whole, _ = losses_of(make, partitioning="sharding")
    cut, specs = losses_of(make, mesh={"fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(cut, whole, rtol=0, atol=1e-5)  # fp32 sums in another order
    if make is Gpt:
        assert specs["h.0.c_attn.weight"] == ("tensor", "fsdp")
        assert specs["h.1.c_proj.weight"] == ("fsdp", "tensor")
        assert specs["wte.weight"] == ("tensor", "fsdp")
    else:
        assert specs["model.layers.0.self_attn.k_proj.weight"] == ("tensor", "fsdp")
        assert specs["model.layers.0.mlp.down_proj.weight"] == ("fsdp", "tensor")


def test_the_plan_of_a_transformers_model_and_its_transposed_layers_are_read_as_data() -> None:
    found = hints_of(nn.ModuleDict({"inner": llama()}))
    assert found.plan["inner.model.layers.*.self_attn.q_proj"] == "colwise"
    assert found.input_first == frozenset()
    assert found.heads["inner.model.layers.0.self_attn.k_proj"] == 2
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8, n_positions=8))
    assert "transformer.h.0.attn.c_proj.weight" in (hints_of(gpt2).input_first or ())
