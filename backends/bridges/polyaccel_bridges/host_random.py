"""Random numbers that forward takes from numpy or Python, not from torch: a captured program would repeat one draw in every step.

Whether a draw matters (layer dropping with probability 0 draws too) is seen by tracing again with generators that start elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule

from polyaccel.errors import PrepareError

_EXTREME = 0.002  # how near to 0 or 1 the first number of a probing generator is: rarer events are not seen


def host_random_state() -> tuple[Any, ...]:
    """The state of numpy's global generator and of Python's, comparable with ==."""
    name, keys, position, *rest = np.random.get_state()  # the global one is what models use
    return random.getstate(), (name, bytes(memoryview(keys)), position, *rest)  # type: ignore[arg-type]


def refuse_host_random(module: GraphModule, trace_again: Callable[[], GraphModule], name: str) -> None:
    """Raise PrepareError where `trace_again()`, under other draws, gives another graph than `module`. `name`: what draws."""
    for is_low in (True, False):
        with _first_number(is_low):
            other = trace_again()
        if not _is_same(module, other):
            raise PrepareError(
                f"the forward of {name} draws random numbers from numpy or Python's random, and what it computes depends on them:"
                " a captured program would repeat one draw in every step",
                "draw with torch (torch.rand, torch.bernoulli, nn.Dropout), or turn it off: audio models of transformers mask their"
                " input so in training, config.apply_spec_augment = False; or use the torch backend",
            )


@contextlib.contextmanager
def _first_number(is_low: bool) -> Iterator[None]:
    """Both generators begin with a number near 0, or near 1; afterwards they are as before."""
    host, numpy_state = random.getstate(), np.random.get_state()
    host_seed, numpy_seed = _seeds(is_low)
    random.seed(host_seed)
    np.random.seed(numpy_seed)
    try:
        yield
    finally:
        random.setstate(host)
        np.random.set_state(numpy_state)


@cache
def _seeds(is_low: bool) -> tuple[int, int]:
    def fits(number: float) -> bool:
        return number < _EXTREME if is_low else number > 1 - _EXTREME

    host = next(seed for seed in itertools.count() if fits(random.Random(seed).random()))
    of_numpy = next(seed for seed in itertools.count() if fits(np.random.RandomState(seed).random_sample()))
    return host, of_numpy


def _is_same(one: GraphModule, other: GraphModule) -> bool:
    if one.code != other.code:
        return False
    names = [str(node.target) for node in one.graph.nodes if node.op == "get_attr"]
    return all(_is_equal(getattr(one, name), getattr(other, name)) for name in names)


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)
