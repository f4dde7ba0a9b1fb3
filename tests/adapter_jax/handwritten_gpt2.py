"""GPT-2 as one would write it in jax alone: arrays in a dict, one shard_map, AdamW on the shards. What `polyaccel plan` is held against.

The same model and mixed precision as transformers' GPT2LMHeadModel under bf16: float32 parameters and residual stream, matrix products
in bfloat16, softmax, normalization and loss in float32, attention probabilities computed again in the backward pass.
"""

from __future__ import annotations

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


def linear(x, w, b):
    return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16) + b.astype(jnp.bfloat16)


@jax.checkpoint
def attend(query, key, value):  # (batch, heads, length, head)
    length = query.shape[2]
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value)


def block(x, p, size):
    batch, length, width = x.shape
    qkv = linear(norm(x, p["ln_1.scale"], p["ln_1.bias"]), p["attn.w"], p["attn.b"])
    split = [
        part.reshape(batch, length, size.heads, width // size.heads).transpose(0, 2, 1, 3)
        for part in jnp.split(qkv, 3, axis=-1)
    ]
    attended = attend(*split).transpose(0, 2, 1, 3).reshape(batch, length, width)
    x = x + linear(attended, p["attn_out.w"], p["attn_out.b"])
    hidden = linear(norm(x, p["ln_2.scale"], p["ln_2.bias"]), p["mlp.w"], p["mlp.b"])
    hidden = jax.nn.gelu(hidden, approximate=True)
    return x + linear(hidden, p["mlp_out.w"], p["mlp_out.b"])


def loss_of(params, tokens, size):
    x = params["wte"][tokens] + params["wpe"]
    for layer in range(size.layers):
        prefix = f"{layer}."
        own = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
        x = block(x, own, size)
    x = norm(x, params["ln_f.scale"], params["ln_f.bias"])
    logits = (x.astype(jnp.bfloat16) @ params["wte"].astype(jnp.bfloat16).T).astype(jnp.float32)
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

    def replica(params, first, second, count, tokens):
        whole = {
            name: value if dims[name] is None else lax.all_gather(value, AXIS, axis=dims[name], tiled=True)
            for name, value in params.items()
        }
        loss, grads = jax.value_and_grad(loss_of)(whole, tokens, size)
        grads = {
            name: (
                lax.psum(grad, AXIS)
                if dims[name] is None
                else lax.psum_scatter(grad, AXIS, scatter_dimension=dims[name], tiled=True)
            )
            / len(devices)
            for name, grad in grads.items()
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
