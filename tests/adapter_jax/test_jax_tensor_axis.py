"""mesh.tensor: single layers are cut, products with them stay cut, and the training is that of one device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_engines import open_engine, train

from polyaccel.errors import PlanError, UnsupportedError
from polyaccel.protocols import StepSpec
from polyaccel_jax.constraints import Constrainer, reshaped

VOCAB, HEADS, BATCH = 64, 4, 8
FSDP_TENSOR, DATA_TENSOR, TENSOR = {"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2}, {"tensor": 4}


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nnx.Linear(width, width, rngs=rngs))
        self.up_proj = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down_proj = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):  # (batch, length, width)
        y = self.norm1(x)
        q, k, v = (f(y).reshape(*y.shape[:2], HEADS, -1) for f in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down_proj(nnx.gelu(self.up_proj(self.norm2(x))))


class Gpt(nnx.Module):
    def __init__(self, rngs, *, width=32, length=16, vocab=VOCAB):
        self.wte, self.wpe = nnx.Embed(vocab, width, rngs=rngs), nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.lm_head = nnx.Linear(width, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens):  # (batch, length) -> (batch, length, vocabulary)
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def next_token_loss(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


def token_batches(num_batches, length=16):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (num_batches, BATCH, length + 1)).astype(np.int32)
    return [{"x": rows[:, :-1], "y": rows[:, 1:]} for rows in tokens]


def prepared(engine, **sizes):
    model = engine.prepare_model(Gpt(nnx.Rngs(0), **sizes))
    return model, engine.prepare_optimizer(optax.adamw(1e-3), model)


def run(engine, vocab=VOCAB, **how):
    model, optimizer = prepared(engine, vocab=vocab)
    losses = train(engine, model, optimizer, token_batches(20), loss_fn=next_token_loss, max_grad_norm=1.0, **how)
    return np.array(losses), model._polyaccel_model, optimizer._polyaccel_optimizer


@functools.cache
def losses_of_one_device(vocab):
    return run(open_engine(1), vocab)[0]


def flops_per_device(engine, length, vocab=VOCAB):
    """Of the fused step, as its compiler counts them."""
    model, optimizer = prepared(engine, width=128, length=length, vocab=vocab)
    step = engine.train_step(StepSpec(next_token_loss, model, model, optimizer))
    found = []

    def compiled(function, *args):
        found.append(function.lower(*args).compile().cost_analysis()["flops"])
        raise StopIteration

    engine.compiles.run = compiled
    with pytest.raises(StopIteration):
        step(token_batches(1, length)[0])
    return found[0]


@pytest.mark.parametrize("mesh", [FSDP_TENSOR, DATA_TENSOR], ids=str)
def test_twenty_steps_of_a_gpt_are_those_of_one_device(mesh):
    losses, model, optimizer = run(open_engine(4, mesh=mesh))
    np.testing.assert_allclose(losses, losses_of_one_device(VOCAB), rtol=0, atol=1e-5)  # fp32 sums in another order
    specs = {name: tuple(leaf.sharding.spec) for name, leaf in model.params.items()}
    fsdp = "fsdp" if "fsdp" in mesh else None
    assert specs["blocks.0.q_proj.kernel"] == (fsdp, "tensor")
    assert specs["blocks.1.down_proj.kernel"] == (("tensor", fsdp) if fsdp else ("tensor",))
    assert specs["wte.embedding"] == (("tensor", fsdp) if fsdp else ("tensor",))
    by_name = dict(zip(model.names, model.leaves, strict=True))
    for leaf, owner in zip(optimizer.leaves, optimizer.owners, strict=True):
        assert owner is None or leaf.sharding == by_name[owner.removeprefix(f"{model.name}.")].sharding


def test_gradients_that_are_clipped_on_their_own_lie_as_their_parameters():
    losses, _, _ = run(open_engine(4, mesh=FSDP_TENSOR), form="calls")
    np.testing.assert_allclose(losses, losses_of_one_device(VOCAB), rtol=0, atol=1e-5)


def test_every_device_does_its_part_of_the_operations():
    ideal = flops_per_device(open_engine(1), 64) / 4
    assert flops_per_device(open_engine(4, mesh=FSDP_TENSOR), 64) == pytest.approx(ideal, rel=0.15)


def test_a_vocabulary_that_does_not_divide_is_kept_whole_and_computed_in_parts():
    losses, model, _ = run(open_engine(4, mesh=TENSOR), vocab=1001)
    assert model.params["lm_head.kernel"].is_fully_replicated
    np.testing.assert_allclose(losses, losses_of_one_device(1001), rtol=0, atol=1e-5)
    ideal = flops_per_device(open_engine(1), 64, 1001) / 4
    assert flops_per_device(open_engine(4, mesh=TENSOR), 64, 1001) == pytest.approx(ideal, rel=0.15)


def test_each_device_keeps_its_part_of_both_axes():
    engine = open_engine(4, mesh={"fsdp": 2, "tensor": 2})
    model, _ = prepared(engine)
    whole = sum(leaf.nbytes for leaf in model._polyaccel_model.leaves)
    kept = sum(leaf.addressable_shards[0].data.nbytes for leaf in model._polyaccel_model.leaves)
    assert whole / 4 <= kept <= whole / 4 * 1.2  # norms and biases are cut over one axis, or none


def test_rules_of_the_script_count_and_their_mistakes_name_a_parameter():
    engine = open_engine(
        4, mesh={"fsdp": 2, "tensor": 2}, sharding_rules=["*.q_proj.kernel = tensor fsdp", "wte.* = whole"]
    )
    model, _ = prepared(engine)
    params = model._polyaccel_model.params
    assert params["blocks.0.q_proj.kernel"].sharding.spec == jax.P("tensor", "fsdp")
    assert params["wte.embedding"].is_fully_replicated
    engine = open_engine(4, mesh={"fsdp": 2, "tensor": 2}, sharding_rules=["*.bias = tensor -"])
    with pytest.raises(PlanError, match=r"names 2 dims, and parameter blocks\.0\..*bias has shape"):
        prepared(engine)


def test_partitioning_metadata_of_nnx_is_honoured():
    class Labelled(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
            self.first = nnx.Linear(8, 16, kernel_init=init, rngs=rngs)

    engine = open_engine(4, mesh={"fsdp": 2, "tensor": 2})
    with nnx.use_eager_sharding(False):  # else flax asks for a mesh with axes of these names
        model = engine.prepare_model(Labelled(nnx.Rngs(0)))
    assert model._polyaccel_model.params["first.kernel"].sharding.spec == jax.P("fsdp", "tensor")


def test_statistics_of_rows_are_cut_where_they_have_the_dim():
    engine = open_engine(4, mesh=FSDP_TENSOR)
    model, _ = prepared(engine)
    name = f"{model._polyaccel_model.name}.blocks.0.q_proj.kernel"
    assert engine.mesh.spec_of((32, 32), name) == ("fsdp", "tensor")
    assert engine.mesh.spec_of((32, 1), name) == ("fsdp", None)
    assert engine.mesh.spec_of((32,), name) == ("fsdp",)


def test_whole_layers_on_every_device_are_refused():
    with pytest.raises(UnsupportedError, match=r"mesh\.tensor=4 cuts single layers"):
        open_engine(4, mesh={"tensor": 4}, partitioning="pmap")


def test_an_axis_stays_with_the_outermost_dim_of_a_view():
    sizes = {"tensor": 2}
    assert reshaped(("tensor", None), (8, 6), (4, 2, 6), sizes) == ("tensor", None, None)
    assert reshaped((None, "tensor", None), (6, 4, 2), (6, 8), sizes) == (None, "tensor")
    assert reshaped((None, "tensor", None), (3, 4, 2), (12, 2), sizes) is None
    assert reshaped((None, "tensor"), (3, 6), (3, 3, 2), sizes) is None
    assert reshaped(("tensor",), (8,), (1, 1, 8), sizes) == (None, None, "tensor")
    assert reshaped(("tensor", None), (8, 6), (8, 6, 1), sizes) == ("tensor", None, None)


def constraints_in(jaxpr):
    """Specs of all constraints of a jaxpr, those of loops and recomputed parts included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            yield tuple(eqn.params["sharding"].spec)
        for value in eqn.params.values():
            for one in value if isinstance(value, tuple) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from constraints_in(inner)


def turn(x, weights):
    column, row = weights
    return jnp.tanh(x @ column) @ row, None


@pytest.mark.parametrize("form", ["plain", "jit", "remat", "scan", "while", "cond"])
def test_products_with_cut_weights_are_constrained_in_calls_loops_branches_and_recomputed_parts(form):
    mesh = open_engine(4, mesh={"data": 2, "tensor": 2}).mesh
    rng = np.random.default_rng(0)
    column, row, x = (rng.normal(size=size).astype(np.float32) for size in ((2, 6, 8), (2, 8, 6), (4, 3, 6)))

    def loss(weights, x):
        if form == "scan":
            return jax.lax.scan(turn, x, weights)[0].sum()
        first = jax.tree.map(lambda stacked: stacked[0], weights)
        if form == "while":
            return jax.lax.while_loop(lambda x: x.sum() > 1e6, lambda x: turn(x, first)[0], x).sum()
        if form == "cond":
            return jax.lax.cond(x.sum() > 1e6, lambda x: 2 * x, lambda x: turn(x, first)[0], x).sum()
        body = {"plain": turn, "jit": jax.jit(turn), "remat": jax.checkpoint(turn)}[form]
        for index in range(2):
            x, _ = body(x, jax.tree.map(lambda stacked, index=index: stacked[index], weights))
        return x.sum()

    both = jax.value_and_grad(loss) if form not in ("scan", "while") else loss
    tags = [(None, None, "tensor"), (None, "tensor", None), None]

    def constrained(weights, x):
        return Constrainer(mesh, 4).run(both, tags, weights, x)

    args = ((column, row), x)
    found = list(constraints_in(jax.make_jaxpr(constrained)(*args).jaxpr))
    assert (("replica", "data", "fsdp"), jax.P.UNCONSTRAINED, "tensor") in found
    assert (("replica", "data", "fsdp"), jax.P.UNCONSTRAINED, None) in found
    results = zip(jax.tree.leaves(jax.jit(constrained)(*args)), jax.tree.leaves(both(*args)), strict=True)
    for got, expected in results:
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-5, atol=1e-5)
