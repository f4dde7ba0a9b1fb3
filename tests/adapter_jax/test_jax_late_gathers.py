"""mesh.fsdp: when parameters are gathered, how often, in which dtype, and that the numbers stay those of whole parameters."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_engines import open_engine

from polyaccel import ShardingRule
from polyaccel.protocols import StepSpec
from polyaccel_jax.late_gathers import Whole, run_with_late_gathers

WIDTH, NUM_LAYERS = 128, 4


def layers(num=NUM_LAYERS):
    rng = np.random.default_rng(0)
    return {f"m.blocks.{i}.w": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 12, jnp.float32) for i in range(num)}


def forward(params, x, dtype=jnp.float32, wrap=lambda layer: layer):
    layer = wrap(lambda w, x: jnp.tanh(x @ w.T.astype(dtype)))
    for name in sorted(params):
        x = layer(params[name], x.astype(dtype))
    return (x.astype(jnp.float32) ** 2).mean()


def run(function, params, *args, axis=-1, dropped=0):
    """The gathers that `function` took: (layer, dtype), in their order; of slices without `dropped` dims.

    There is one device: a part is whole. `axis`: the dim along which it would be one.
    """
    gathers = []

    def gather(name, part, num_dropped):
        assert dropped in (None, num_dropped)
        gathers.append((name.split(".")[2], part.dtype.name))
        return part

    whole = {name: Whole(value.shape, value.dtype, axis % value.ndim) for name, value in params.items()}
    found = jax.jit(lambda params, *args: run_with_late_gathers(function, params, whole, gather, *args))(params, *args)
    expected = jax.jit(function)(params, *args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6, atol=1e-7)
    return gathers


X = np.linspace(-1, 1, 3 * WIDTH, dtype=np.float32).reshape(3, WIDTH)


@pytest.mark.parametrize("wrap", [lambda layer: layer, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
def test_each_block_is_gathered_for_its_forward_and_again_for_its_backward_pass_but_the_last(wrap):
    gathers = run(jax.value_and_grad(lambda params, x: forward(params, x, wrap=wrap)), layers(), X)
    # The first block's input has no gradient: its weight is needed again where its forward pass runs again.
    again = "210" if wrap is jax.checkpoint else "21"
    assert "".join(layer for layer, _ in gathers) == "0123" + again


def test_without_a_backward_pass_each_is_gathered_once():
    assert [layer for layer, _ in run(forward, layers(), X)] == ["0", "1", "2", "3"]


def test_what_is_used_in_16_bits_is_gathered_in_16_bits():
    gathers = run(jax.value_and_grad(lambda params, x: forward(params, x, jnp.bfloat16)), layers(), X)
    assert {dtype for _, dtype in gathers} == {"bfloat16"}


def test_what_is_used_in_two_dtypes_is_gathered_in_both():
    def function(params, x):
        return forward(params, x, jnp.bfloat16) + sum((value**2).sum() for value in params.values())

    assert {dtype for _, dtype in run(function, layers(), X)} == {"bfloat16", "float32"}


def test_small_parameters_are_gathered_once():
    params = layers() | {"m.blocks.0.bias": jnp.ones(WIDTH)}

    def function(params, x):
        x = x * params["m.blocks.0.bias"]
        return forward({name: value for name, value in params.items() if name.endswith("w")}, x) + (x**2).sum()

    gathers = run(jax.value_and_grad(function), params, X)
    assert "".join(layer for layer, _ in gathers[:1]) == "0"
    assert Counter(layer for layer, _ in gathers) == {"0": 3, "1": 2, "2": 2, "3": 1}


def test_parameters_that_a_program_returns_or_multiplies_with_each_other_are_whole():
    def function(params, x):
        names = sorted(params)
        product = params[names[0]] @ params[names[1]].T
        return params[names[2]].reshape(-1), {"it": params[names[3]]}, product, (x @ product).sum()

    assert sorted(layer for layer, _ in run(function, layers(), X)) == ["0", "1", "2", "3"]


def test_weights_of_a_loop_are_gathered_once_before_it():
    def function(params, x):
        w = params["m.blocks.0.w"]
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0].sum()

    gathers = run(jax.value_and_grad(function), layers(1), X)
    assert gathers == [("0", "float32")]


def stacked_forward(params, x, dtype=jnp.float32, wrap=lambda turn: turn):
    """Layers of one stack; a turn also counts, and hands on a literal."""

    def turn(carry, w):
        x, count, scale = carry
        return (jnp.tanh(x @ w.T.astype(dtype) * scale.astype(dtype)), count + 1, scale), x.astype(jnp.float32).sum()

    (x, count, _), sums = jax.lax.scan(wrap(turn), (x.astype(dtype), 0, jnp.float32(1)), params["m.blocks.w"])
    return (x.astype(jnp.float32) ** 2).mean() * count + sums.mean()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wrap", [lambda turn: turn, jax.checkpoint], ids=["plain", "remat"])
def test_a_loop_over_stacked_layers_gathers_in_its_turns(dtype, wrap):
    params = {"m.blocks.w": jnp.stack(list(layers().values()))}
    function = jax.value_and_grad(lambda params, x: stacked_forward(params, x, dtype, wrap))
    gathers = run(function, params, X, dropped=1)
    assert gathers == [("w", jnp.dtype(dtype).name)] * 2  # one of the forward loop, and one of the backward loop


def test_layers_that_are_cut_between_each_other_are_gathered_before_the_loop():
    params = {"m.blocks.w": jnp.stack(list(layers().values()))}
    assert run(jax.value_and_grad(stacked_forward), params, X, axis=0) == [("w", "float32")]


def test_a_loop_that_returns_its_layers_returns_whole_ones():
    params = {"m.blocks.w": jnp.stack(list(layers().values()))}

    def function(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), (w, w.T)), x, params["m.blocks.w"])

    assert (
        run(function, params, X, dropped=None) == [("w", "float32")] * 2
    )  # a layer in the loop, and all of them behind it


def test_gathers_in_the_backward_pass_wait_for_it():
    params = layers()
    whole = {name: Whole(value.shape, value.dtype, value.ndim - 1) for name, value in params.items()}
    function = jax.value_and_grad(forward)
    traced = jax.make_jaxpr(
        lambda params, x: run_with_late_gathers(function, params, whole, lambda _, part, dropped: part, x)
    )(params, X)
    barriers = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "optimization_barrier"]
    assert len(barriers) == 2
    for part, operand in (eqn.outvars for eqn in barriers):
        users = [eqn for eqn in traced.jaxpr.eqns if operand in eqn.invars]
        assert part.aval.shape == (WIDTH, WIDTH)
        assert users  # or the compiler would forget what the part waits for


class Block(nnx.Module):
    def __init__(self, rngs, dtype):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Stack(nnx.Module):
    def __init__(self, rngs, dtype=None):
        self.blocks = nnx.List([Block(rngs, dtype) for _ in range(3)])
        self.head = nnx.Linear(WIDTH, 8, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scanned(nnx.Module):
    """The same blocks as one, stacked."""

    def __init__(self, rngs, dtype=None):
        make = nnx.vmap(lambda rngs: Block(rngs, dtype), in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=3)(make)(rngs)
        self.head = nnx.Linear(WIDTH, 8, rngs=rngs)

    def __call__(self, x):
        run = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.head(run(self.blocks, x))


def trained(num_devices, make=Stack, **settings):
    """Losses of five steps, and the step as it goes to the compiler."""
    engine = open_engine(num_devices, **settings)
    model = engine.prepare_model(make(nnx.Rngs(0)))
    optimizer = engine.prepare_optimizer(optax.adamw(1e-3), model)

    def loss_fn(model, batch):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()

    step = engine.train_step(StepSpec(loss_fn, model, model, optimizer))
    texts, run = [], engine.compiles.run

    def noted(function, *args):
        texts.append(function.lower(*args).as_text())
        engine.compiles.run = run
        return run(function, *args)

    engine.compiles.run = noted
    rng = np.random.default_rng(0)
    batches = [
        {"x": rng.normal(size=(16, WIDTH)).astype(np.float32), "y": rng.integers(0, 8, 16).astype(np.int32)}
        for _ in range(5)
    ]
    return np.array([float(step(batch)) for batch in batches]), texts[0]


def gathered(text):
    """How often weights of blocks are gathered, by their dtype."""
    shapes = f"{WIDTH}x{2 * WIDTH}|{2 * WIDTH}x{WIDTH}"
    return Counter(re.findall(rf"all_gather\"?\(.*?-> tensor<(?:{shapes})x(\w+)>", text))


@pytest.fixture(scope="module")
def losses_of_one_device():
    return {make: trained(1, make)[0] for make in (Stack, Scanned)}


MESHES = [
    pytest.param({"fsdp": 4}, "pmap", id="replicas"),
    pytest.param({"data": 2, "fsdp": 2}, "sharding", id="one program"),
]


@pytest.mark.parametrize(("mesh", "partitioning"), MESHES)
def test_a_flax_model_gathers_twice_and_trains_as_on_one_device(losses_of_one_device, mesh, partitioning):
    losses, text = trained(4, mesh=mesh, partitioning=partitioning)
    np.testing.assert_allclose(losses, losses_of_one_device[Stack], rtol=0, atol=1e-5)
    # Two of each of three blocks, and again in their backward pass, but for the last block.
    assert gathered(text) == {"f32": 10}
    assert text.count("stablehlo.reduce_scatter") == (3 * 6 + 2 if partitioning == "pmap" else 0)


@pytest.mark.parametrize(("mesh", "partitioning"), MESHES)
def test_stacked_layers_are_gathered_and_their_gradients_scattered_one_at_a_time(
    losses_of_one_device, mesh, partitioning
):
    losses, text = trained(4, Scanned, mesh=mesh, partitioning=partitioning)
    np.testing.assert_allclose(losses, losses_of_one_device[Scanned], rtol=0, atol=1e-5)
    assert gathered(text) == {"f32": 4}  # of one layer, in the forward loop and in the backward loop
    whole = re.findall(rf"all_gather\"?\(.*?-> tensor<3x({WIDTH}x{2 * WIDTH}|{2 * WIDTH}x{WIDTH})x", text)
    assert not whole
    if partitioning == "pmap":
        parts = re.findall(r"reduce_scatter\"?\(.*?-> tensor<(\w+)xf32>", text, flags=re.DOTALL)
        assert f"{WIDTH}x{WIDTH // 2}" in parts
        assert not any(part.startswith(f"3x{WIDTH}x") for part in parts)


def test_a_product_of_fsdp_and_tensor_gathers_what_tensor_leaves(losses_of_one_device):
    rules = [ShardingRule("*.up.kernel", ("fsdp", "tensor")), ShardingRule("*.down.kernel", ("tensor", "fsdp"))]
    losses, text = trained(4, mesh={"fsdp": 2, "tensor": 2}, sharding_rules=rules)
    np.testing.assert_allclose(losses, losses_of_one_device[Stack], rtol=0, atol=1e-5)
    kinds = Counter(re.findall(r"all_gather\"?\(.*?-> tensor<([^>]*)>", text))
    assert kinds[f"{WIDTH}x{WIDTH}xf32"] == 10


@pytest.mark.parametrize("partitioning", ["pmap", "sharding"])
def test_a_flax_model_in_bf16_gathers_half_the_bytes(partitioning):
    _, text = trained(4, mesh={"fsdp": 4}, partitioning=partitioning, mixed_precision="bf16")
    assert gathered(text) == {"bf16": 10}
