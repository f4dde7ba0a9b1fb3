"""The models of bridge_torch_models.py by hand in JAX, from the same weights: flat dicts by torch's names, images and kernels in NHWC.

`precision` is the dtype that matrix products run in; parameters, norms and losses stay float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax


def params_of(model):
    """(parameters, running statistics) of a torch model as float32 arrays; convolution kernels as (height, width, in, out)."""
    values = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    names = {name for name, _ in model.named_parameters()}
    params = {name: _kernel(values[name]) for name in names}
    return params, {
        name: jnp.asarray(v) for name, v in values.items() if name.endswith(("running_mean", "running_var"))
    }


def _kernel(value):
    return jnp.asarray(np.transpose(value, (2, 3, 1, 0)) if value.ndim == 4 else value)


def _norm(p, name, x, eps=1e-5):
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def _dense(p, name, x, precision):
    out = x.astype(precision) @ p[f"{name}.weight"].astype(precision).T
    return out + p[f"{name}.bias"].astype(precision)


def library_attention(q, k, v, *, mask=None, is_causal=False, implementation=None):
    """(batch, time, heads, head) in and out."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal, implementation=implementation)


def plain_attention(q, k, v, *, mask=None, is_causal=False):
    """The same with einsum and softmax."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5  # (batch, heads, time, time)
    if is_causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores).astype(v.dtype), v)


def gpt_loss(p, statistics, batch, *, layers, heads, attention, precision=jnp.float32):
    ids = batch["ids"]
    x = p["token.weight"][ids] + p["position.weight"][: ids.shape[1]]  # (batch, time, width)
    dense = functools.partial(_dense, p, precision=precision)
    for block in (f"blocks.{index}" for index in range(layers)):
        qkv = dense(f"{block}.qkv", _norm(p, f"{block}.norm1", x)).reshape(*ids.shape, 3, heads, -1)
        q, k, v = jnp.moveaxis(qkv, 2, 0)  # (batch, time, heads, head)
        x = x + dense(f"{block}.out", attention(q, k, v, is_causal=True).reshape(x.shape))
        x = x + dense(f"{block}.down", jax.nn.gelu(dense(f"{block}.up", _norm(p, f"{block}.norm2", x))))
    logits = _norm(p, "norm", x).astype(precision) @ p["token.weight"].astype(precision).T
    loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["targets"])
    return loss.mean(), statistics


def bert_loss(p, statistics, batch, *, layers, heads, attention, precision=jnp.float32):
    ids = batch["ids"]
    dense = functools.partial(_dense, p, precision=precision)
    mask = (ids != 0)[:, None, None, :]  # (batch, 1, 1, time)
    x = _norm(p, "norm", p["token.weight"][ids] + p["position.weight"][: ids.shape[1]], 1e-12)
    for layer in (f"layers.{index}" for index in range(layers)):
        q, k, v = (dense(f"{layer}.{name}", x).reshape(*ids.shape, heads, -1) for name in ("query", "key", "value"))
        x = _norm(p, f"{layer}.norm1", x + dense(f"{layer}.out", attention(q, k, v, mask=mask).reshape(x.shape)), 1e-12)
        y = dense(f"{layer}.down", jax.nn.gelu(dense(f"{layer}.up", x), approximate=False))
        x = _norm(p, f"{layer}.norm2", x + y, 1e-12)
    logits = dense("head", jnp.tanh(dense("pooler", x[:, 0]))).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), statistics


def _conv(p, name, x, stride, padding, precision):
    return jax.lax.conv_general_dilated(
        x.astype(precision),
        p[f"{name}.weight"].astype(precision),
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _batch_norm(p, statistics, new, name, x):
    x = x.astype(jnp.float32)
    mean = x.mean((0, 1, 2))
    variance = jnp.square(x - mean).mean((0, 1, 2))
    count = x.size // x.shape[-1]
    for key, value in (("running_mean", mean), ("running_var", variance * count / (count - 1))):
        new[f"{name}.{key}"] = 0.9 * statistics[f"{name}.{key}"] + 0.1 * jax.lax.stop_gradient(value)
    return (x - mean) * (jax.lax.rsqrt(variance + 1e-5) * p[f"{name}.weight"]) + p[f"{name}.bias"]


def resnet_loss(p, statistics, batch, *, precision=jnp.float32):
    new = {}

    def normed(name, norm, x, stride, padding):
        return _batch_norm(p, statistics, new, norm, _conv(p, name, x, stride, padding, precision))

    x = jax.nn.relu(normed("conv", "norm", batch["images"], 2, 3))  # (batch, height, width, channels)
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (1, 1), (1, 1), (0, 0)])
    for index in range(8):
        block, stride = f"blocks.{index}", 2 if index in (2, 4, 6) else 1
        y = jax.nn.relu(normed(f"{block}.conv1", f"{block}.norm1", x, stride, 1))
        y = normed(f"{block}.conv2", f"{block}.norm2", y, 1, 1)
        if f"{block}.shortcut.weight" in p:
            x = normed(f"{block}.shortcut", f"{block}.shortcut_norm", x, stride, 0)
        x = jax.nn.relu(x + y)
    logits = _dense(p, "head", x.mean((1, 2)), precision).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), new
