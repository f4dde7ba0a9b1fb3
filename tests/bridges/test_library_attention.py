"""Attention by jax's own kernels: which calls they serve, and, with the XLA one in cudnn's place, torch's numbers and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captured_parity import specs_of
from test_lowerings_neural import Case, check, floats

from polyaccel_bridges.capture import capture_forward, capture_training
from polyaccel_bridges.lowerings import attention, library_attention
from polyaccel_bridges.replay import exact_dtypes, run_forward, run_training

PLAIN = (2, 4, 64, 32)


def chosen(query=PLAIN, key=PLAIN, value=None, dtype=jnp.bfloat16, *, mask=False, causal=False, capability=9.0):
    return library_attention.choose(
        query, key, key if value is None else value, dtype, has_mask=mask, is_causal=causal, capability=capability
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cudnn_serves_16_bit_attention_on_recent_gpus(dtype):
    assert chosen(dtype=dtype) == "cudnn"
    assert chosen(dtype=dtype, causal=True) == "cudnn"
    assert chosen(dtype=dtype, mask=True) == "cudnn"
    assert chosen(key=(2, 2, 64, 32), dtype=dtype) == "cudnn"  # grouped-query


@pytest.mark.parametrize(
    "call",
    [
        {"capability": None},
        {"capability": 7.5},
        {"dtype": jnp.float32},
        {"query": (2, 4, 64, 36), "key": (2, 4, 64, 36)},
        {"query": (2, 4, 64, 256), "key": (2, 4, 64, 256)},
        {"value": (2, 4, 64, 16)},
        {"query": (2, 4, 63, 32), "mask": True},
        {"query": (2, 4, 32, 32), "causal": True},
        {"query": (0, 4, 64, 32), "key": (0, 4, 64, 32)},
    ],
    ids=str,
)
def test_what_cudnn_does_not_take_is_computed_in_blocks(call):
    assert chosen(**call) == "blocks"


def test_no_gpu_means_blocks():
    assert library_attention.gpu_capability() is None


@pytest.fixture
def library(monkeypatch):
    """Every attention through `library_attention` with XLA's implementation; the names of its functions that ran."""
    calls = []
    monkeypatch.setattr(attention, "_is_for_library", lambda *args: True)
    for name in ("attend", "attend_backward"):
        function = functools.partial(getattr(library_attention, name), implementation="xla")

        def noting(*args, _name=name, _function=function, **kwargs):
            calls.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(library_attention, name, noting)
    return calls


def test_numbers_and_gradients_are_torchs(library):
    q, k, v = floats(2, 4, 6, 8), floats(2, 4, 6, 8), floats(2, 4, 6, 8)
    allowed = torch.rand(6, 6) > 0.3
    allowed[2] = False  # a row that may attend to nothing
    attend = F.scaled_dot_product_attention
    check(
        {
            "plain": Case(attend, q, k, v),
            "causal": Case(lambda q, k, v: attend(q, k, v, is_causal=True), q, k, v),
            "scaled": Case(lambda q, k, v: attend(q, k, v, scale=0.3), q, k, v),
            "masked": Case(lambda q, k, v, m: attend(q, k, v, m), q, k, v, allowed),
            "per_key": Case(lambda q, k, v, m: attend(q, k, v, m), q, k, v, allowed[None, None, :1].expand(2, 1, 1, 6)),
            "biased": Case(lambda q, k, v, m: attend(q, k, v, m.detach()), q, k, v, floats(2, 1, 6, 6)),
            "grouped": Case(
                lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=True),
                q,
                floats(2, 2, 6, 8),
                floats(2, 2, 6, 8),
            ),
            "longer_keys": Case(attend, q, floats(2, 4, 9, 8), floats(2, 4, 9, 8)),
        },
        1e-5,
    )
    assert {"attend", "attend_backward"} <= set(library)


def training_graph(q):
    def step(q):
        out = F.scaled_dot_product_attention(layer(q), layer(q), layer(q), is_causal=True)
        return (out**2).sum(), [out]

    layer = torch.nn.Linear(8, 8)
    params = {f"layer.{name}": jnp.asarray(value.detach().numpy()) for name, value in layer.named_parameters()}
    return capture_training(step, {"layer": layer}, specs_of([q]), autocast=None), params


def test_one_program_computes_the_forward_once(library, monkeypatch):
    q = floats(2, 4, 6, 8)
    graph, params = training_graph(q)
    made = []
    library_call = jax.nn.dot_product_attention

    def counting(*args, **kwargs):
        made.append(args)
        return library_call(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", counting)
    with exact_dtypes():
        jax.make_jaxpr(lambda p, q: run_training(graph, p, {}, [q], jax.random.key(0)).grads)(
            params, jnp.asarray(q.detach().numpy())
        )
    assert library == ["attend", "attend_backward"]
    assert len(made) == 1


def test_a_forward_alone_keeps_nothing_for_a_backward(library):
    q = floats(2, 4, 6, 8)
    graph = capture_forward(lambda q: [F.scaled_dot_product_attention(q, q, q)], {}, specs_of([q]), autocast=None)
    with exact_dtypes():
        (out,), _ = run_forward(graph, {}, {}, [jnp.asarray(q.detach().numpy())], jax.random.key(0))
    expected = F.scaled_dot_product_attention(q, q, q).detach().numpy()
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert library == ["attend"]
    assert library_attention._pairs.get() is None
