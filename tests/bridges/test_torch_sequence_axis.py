"""mesh.sequence for torch modules on the jax engine: captured programs, whose layers merge batch and length, with sequences in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backward_programs import kept_by
from test_torch_tensor_axis import Gpt, llama, twenty_steps
from torch import nn
from torch.nn import functional as F

from polyaccel import Accelerator
from polyaccel_bridges import shards
from polyaccel_bridges.lowerings import attention


def trained(make: Callable[[], nn.Module], **settings: Any) -> tuple[np.ndarray, float]:
    """Losses, and operations of the backward program on each device, as its compiler counts them."""
    torch.manual_seed(0)
    accelerator = Accelerator(backend="jax", compilation_cache="off", **settings)
    module = make()
    model, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters(), lr=1e-3))
    compiled = kept_by(accelerator._engine)
    losses = twenty_steps(accelerator, model, optimizer)
    return losses, max(one.cost_analysis()["flops"] for one in compiled.values())


@pytest.mark.parametrize(
    ("make", "mesh"), [(Gpt, {"sequence": 4}), (llama, {"fsdp": 2, "sequence": 2})], ids=["gpt", "llama"]
)
def test_twenty_steps_are_those_of_whole_sequences_and_each_device_does_its_part(
    make: Callable[[], nn.Module], mesh: dict[str, int]
) -> None:
    whole, ideal = trained(make, partitioning="sharding")  # four data shards
    cut, flops = trained(make, mesh=mesh)
    np.testing.assert_allclose(cut, whole, rtol=0, atol=1e-5)  # fp32 sums in another order
    assert flops == pytest.approx(ideal, rel=0.15)


class _TwoParts:
    num_sequence_parts = 2


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_in_blocks_takes_rows_of_every_part_of_the_sequence(
    is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_MAX_BLOCK_SCORES", 4 * 16)
    rng = np.random.default_rng(0)
    query, key, value, grad = (rng.normal(size=(2, 2, 16, 4)).astype(np.float32) for _ in range(4))
    mask = None if is_causal else rng.normal(size=(1, 1, 16, 16)).astype(np.float32)
    inputs = [torch.from_numpy(array).requires_grad_() for array in (query, key, value)]
    expected = F.scaled_dot_product_attention(
        *inputs, attn_mask=None if mask is None else torch.from_numpy(mask), is_causal=is_causal
    )
    expected.backward(torch.from_numpy(grad))
    with shards.shared_by(_TwoParts()):  # type: ignore[arg-type]
        blocks = attention._Blocks.of(16, 16)
        out, lse = attention.flash_attention(query, key, value, is_causal=is_causal, attn_mask=mask)
        grads = attention.flash_attention_backward(grad, query, key, value, out, lse, 0.0, is_causal, attn_mask=mask)
    assert (blocks.size, blocks.parts, blocks.rows()[0].tolist()) == (4, 2, [0, 1, 2, 3, 8, 9, 10, 11])
    np.testing.assert_allclose(np.asarray(out), expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    for got, tensor in zip(grads, inputs, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(np.asarray(got), tensor.grad.numpy(), rtol=1e-4, atol=1e-5)
