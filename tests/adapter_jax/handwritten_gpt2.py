"""GPT-2 as one would write it in jax alone: arrays in a dict, one shard_map, AdamW on the shards. What `polyaccel plan` is held against.

The same model and precision as planned_gpt2.py: float32 parameters and residual stream, matrix products in the dtype of
`Size`, softmax, normalization and loss in float32. Weights are gathered where they are used, and again in the backward pass, which
computes attention probabilities and GELU (with `remat` whole blocks) again.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXIS = "fsdp"


@dataclass(frozen=True)
class Size:
    layers: int = 12
    width: int = 768
    heads: int = 12
    vocab: int = 50257
    length: int = 1024
    batch: int = 4  # of one device
    dtype: str = "bfloat16"  # of matrix products
    remat: bool = False


def shapes(size):
    """Of all parameters, by name."""
    width = size.width
    found = {"wte": (size.vocab, width), "wpe": (size.length, width), "ln_f.scale": (width,), "ln_f.bias": (width,)}
    for layer in range(size.layers):
        for name, shape in {
            "ln_1.scale": (width,),
            "ln_1.bias": (width,),
            "attn.w": (width, 3 * width),
            "attn.b": (3 * width,),
            "attn_out.w": (width, width),
            "attn_out.b": (width,),
            "ln_2.scale": (width,),
            "ln_2.bias": (width,),
            "mlp.w": (width, 4 * width),
            "mlp.b": (4 * width,),
            "mlp_out.w": (4 * width, width),
            "mlp_out.b": (width,),
        }.items():
            found[f"{layer}.{name}"] = shape
    return found


def cut(shape, num_devices):
    """The largest dim that divides over the devices; None: kept whole."""
    dims = [dim for dim, length in enumerate(shape) if length % num_devices == 0]
    return max(dims, key=lambda dim: (shape[dim], -dim), default=None)


def norm(x, scale, bias):
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5) * scale + bias


@jax.checkpoint
def attend(query, key, value):  # (batch, heads, length, head)
    length = query.shape[2]
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value)


@jax.checkpoint
def gelu(x):
    return jax.nn.gelu(x, approximate=True)


class Model:
    """Forward and loss of one device, whose parameters are parts along `dims`."""

    def __init__(self, size, dims):
        self.size, self.dims = size, dims
        self.dtype = jnp.dtype(size.dtype)

    def whole(self, part, name, dtype):
        part = part.astype(dtype)
        return part if self.dims[name] is None else lax.all_gather(part, AXIS, axis=self.dims[name], tiled=True)

    def linear(self, x, p, name):
        @jax.checkpoint
        def product(x, w, b):  # what is kept for the backward pass is x and the part
            return x @ self.whole(w, f"{name}.w", self.dtype) + self.whole(b, f"{name}.b", self.dtype)

        return product(x.astype(self.dtype), p[f"{name}.w"], p[f"{name}.b"])

    def norm(self, x, p, name):
        scale, bias = (self.whole(p[f"{name}.{part}"], f"{name}.{part}", jnp.float32) for part in ("scale", "bias"))
        return norm(x, scale, bias)

    def block(self, x, p, layer):
        batch, length, width = x.shape
        qkv = self.linear(self.norm(x, p, f"{layer}.ln_1"), p, f"{layer}.attn")
        split = [
            part.reshape(batch, length, self.size.heads, -1).transpose(0, 2, 1, 3)
            for part in jnp.split(qkv, 3, axis=-1)
        ]
        attended = attend(*split).transpose(0, 2, 1, 3).reshape(batch, length, width)
        x = x + self.linear(attended, p, f"{layer}.attn_out")
        hidden = gelu(self.linear(self.norm(x, p, f"{layer}.ln_2"), p, f"{layer}.mlp"))
        return x + self.linear(hidden, p, f"{layer}.mlp_out")

    def loss(self, p, tokens):
        x = self.whole(p["wte"], "wte", jnp.float32)[tokens] + self.whole(p["wpe"], "wpe", jnp.float32)
        for layer in range(self.size.layers):
            block = functools.partial(self.block, layer=layer)
            x = jax.checkpoint(block)(x, p) if self.size.remat else block(x, p)
        x = self.norm(x, p, "ln_f").astype(self.dtype)
        logits = jax.checkpoint(lambda x, w: x @ self.whole(w, "wte", self.dtype).T)(x, p["wte"])
        return cross_entropy(logits.astype(jnp.float32), tokens)


def cross_entropy(logits, tokens):
    targets = jnp.concatenate([tokens[:, 1:], jnp.full_like(tokens[:, :1], -100)], axis=1)
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    total = jnp.log(jnp.exp(logits - top).sum(-1)) + top[..., 0]
    here = lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    chosen = jnp.where(here, logits, 0).sum(-1)
    kept = targets != -100
    return jnp.where(kept, total - chosen, 0).sum() / kept.sum()


def compiled(devices, size):
    """The compiled step (parameters, moments, tokens) -> (loss, parameters, moments) for these devices."""
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    dims = {name: cut(shape, len(devices)) for name, shape in shapes(size).items()}
    specs = {name: PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, AXIS) for name, dim in dims.items()}

    model = Model(size, dims)

    def replica(params, first, second, count, tokens):
        # What was gathered is summed and scattered by its own gradient; the others are summed here.
        loss, grads = jax.value_and_grad(model.loss)(params, tokens)
        grads = {
            name: (lax.psum(grad, AXIS) if dims[name] is None else grad) / len(devices) for name, grad in grads.items()
        }
        first = {name: 0.9 * first[name] + 0.1 * grad for name, grad in grads.items()}
        second = {name: 0.999 * second[name] + 0.001 * grad * grad for name, grad in grads.items()}
        rate, root = 1e-4 / (1 - 0.9**count), jnp.sqrt(1 - 0.999**count)
        params = {
            name: value * (1 - 1e-6) - rate * first[name] / (jnp.sqrt(second[name]) / root + 1e-8)
            for name, value in params.items()
        }
        return lax.pmean(loss, AXIS), params, first, second

    step = jax.jit(
        jax.shard_map(
            replica,
            mesh=mesh,
            in_specs=(specs, specs, specs, PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=(PartitionSpec(), specs, specs, specs),
            check_vma=False,
        ),
        donate_argnums=(0, 1, 2),
    )

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    kept = {name: array(shape, jnp.float32, specs[name]) for name, shape in shapes(size).items()}
    count = array((), jnp.float32, PartitionSpec())
    tokens = array((size.batch * len(devices), size.length), jnp.int32, PartitionSpec(AXIS))
    return step.lower(kept, kept, kept, count, tokens).compile()


def figures(program):
    """Bytes and operations of one device."""
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return {
        "peak": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "flops": cost["flops"],
    }
