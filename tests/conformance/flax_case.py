"""The suite's model in the flax dialect (nnx and optax)."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class Linear(nnx.Module):
    def __init__(self, weight, bias):
        self.weight = nnx.Param(jnp.asarray(weight))
        self.bias = nnx.Param(jnp.asarray(bias))

    def __call__(self, x):
        return x @ self.weight[...] + self.bias[...]


class FlaxCase:
    dialect = "flax"

    def __init__(self, backend):
        self.backend = backend

    def model(self, weight, bias):
        return Linear(weight, bias)

    def optimizer(self, model, lr):
        return nnx.Optimizer(
            model, optax.sgd(lr, momentum=0.0), wrt=nnx.Param
        )  # momentum: a state, by which it is told apart

    def scheduler(self, optimizer, gamma):
        return None

    def loader(self, x, y, batch_size):
        from torch.utils.data import DataLoader  # the loader most JAX users have

        rows = [{"x": a, "y": b} for a, b in zip(np.asarray(x), np.asarray(y), strict=True)]
        return DataLoader(rows, batch_size=batch_size)

    def loss(self, model, batch):
        return ((model(batch["x"]) - batch["y"]) ** 2).mean()

    def parameters(self, model):
        return model

    def array(self, values):
        return jnp.asarray(values)

    def weights(self, model):
        return {"weight": np.asarray(model.weight[...]), "bias": np.asarray(model.bias[...])}
