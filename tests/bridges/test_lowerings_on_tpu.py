"""Forms that a lowering takes for XLA:TPU alone: read from the lowered text, and their numbers on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from polyaccel_bridges.lowerings import attention, indexing

LOGITS = jax.ShapeDtypeStruct((6, 50), jnp.float32)
TARGETS = jax.ShapeDtypeStruct((6, 1), jnp.int64)


def lowered(function, platform, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def test_one_element_of_each_line_is_compared_and_summed_on_tpu_and_gathered_elsewhere():
    def picked(x, index):
        return indexing.gather(x, 1, index)

    assert "stablehlo.gather" not in lowered(picked, "tpu", LOGITS, TARGETS)
    assert "stablehlo.gather" in lowered(picked, "cpu", LOGITS, TARGETS)


def test_both_forms_give_the_same_elements_of_lines_with_infinities_and_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int8):
        x = torch.randn(6, 50).mul(20).to(dtype)
        if dtype.is_floating_point:
            x[:, 7] = float("-inf")
        index = torch.tensor([[0], [7], [49], [3], [3], [12]])
        with jax.enable_x64(True):
            values = jnp.asarray(x.float().numpy() if dtype == torch.bfloat16 else x.numpy())
            values = values.astype(jnp.bfloat16) if dtype == torch.bfloat16 else values
            found = indexing._compared(1, values, jnp.asarray(index.numpy()))
            assert found.dtype == values.dtype
        assert np.array_equal(np.asarray(found, np.float64), torch.gather(x, 1, index).double().numpy())


def test_the_backward_of_attention_computes_its_scores_again():
    """Without the barrier XLA keeps those of the forward pass from every layer."""
    head = jax.ShapeDtypeStruct((2, 3, 16, 8), jnp.bfloat16)
    sums = jax.ShapeDtypeStruct((2, 3, 16), jnp.float32)

    def backward(grad, query, key, value, out, sums):
        return attention.flash_attention_backward(grad, query, key, value, out, sums, 0.0, True)

    assert "optimization_barrier" in lowered(backward, "tpu", head, head, head, head, head, sums)
