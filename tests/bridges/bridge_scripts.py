"""Runs one training script twice: by plain torch, and by polyaccel on jax. A script takes an accelerator and gives its numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import jax
import torch

from polyaccel import Accelerator, registry
from polyaccel_jax.backend import JaxBackend
from polyaccel_jax.engine import JaxEngine


class PlainTorch:
    """The calls of an Accelerate script, done by torch itself: the reference."""

    device = torch.device("cpu")
    backend = "plain torch"

    def prepare(self, *objects: Any) -> Any:
        return objects[0] if len(objects) == 1 else objects

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        if callable(loss) and not isinstance(loss, torch.Tensor):
            result = loss(*args, **kwargs)
            (result[0] if isinstance(result, tuple) else result).backward()
            return result
        loss.backward()
        return None

    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> Any:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def unwrap_model(self, model: Any) -> Any:
        return model


class SomeDevices(JaxBackend):
    """The jax backend on the first of the virtual devices."""

    def __init__(self, num_devices: int) -> None:
        super().__init__()
        self.num_devices = num_devices

    def open(self, config: Any, rendezvous: Any) -> JaxEngine:
        return JaxEngine(config, rendezvous, jax.devices()[: self.num_devices])


def on_jax(num_devices: int = 1, **options: Any) -> Accelerator:
    """An Accelerator on the jax backend, on this many devices."""
    registry.register_backend(SomeDevices(num_devices))
    try:
        return Accelerator(backend="jax", compilation_cache="off", **options)
    finally:
        registry._registered.pop("jax")


def run(script: Callable[[Any], Any], accelerator: Any, seed: int = 0) -> Any:
    """What the script gives, from seeded generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    return plain(script(accelerator))


def plain(value: Any) -> Any:
    """Nested values with every tensor as an independent plain one."""
    if isinstance(value, torch.Tensor):
        return copy.deepcopy(value.detach()).clone()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return [ord(letter) for letter in value] if isinstance(value, str) else value  # assert_close compares no strings


def assert_same_on_jax(script: Callable[[Any], Any], *, atol: float = 2e-6, rtol: float = 2e-5, **options: Any) -> None:
    """The script gives the same numbers on jax as by plain torch; float32 sums in another order leave the tolerance."""
    expected = run(script, PlainTorch())
    actual = run(script, on_jax(**options))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)
