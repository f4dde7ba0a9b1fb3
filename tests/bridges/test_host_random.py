"""Random numbers of numpy and Python in forward: refused where they matter, harmless where they do not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from polyaccel.errors import PrepareError
from polyaccel_bridges.capture import capture_training
from polyaccel_bridges.graphs import TensorSpec


class Dropping(nn.Module):
    """Leaves its layer out with probability `p`, drawn on the host, as layer dropping and SpecAugment of transformers do."""

    def __init__(self, p, draw):
        super().__init__()
        self.layer, self.p, self.draw = nn.Linear(4, 4), p, draw

    def forward(self, x):
        return x * self.layer.bias if self.draw() < self.p else self.layer(x)


class Masking(nn.Module):
    """Sets columns to 0 that numpy chooses."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        mask = np.random.rand(4) < 0.5
        return self.layer(x.masked_fill(torch.from_numpy(mask), 0.0))


def capture(model):
    return capture_training(
        lambda x: (model(x).sum(), []), {"model": model}, [TensorSpec((3, 4), torch.float32)], autocast=None
    )


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_a_draw_of_the_host_that_decides_what_is_computed_is_refused(draw):
    with pytest.raises(PrepareError, match="Dropping draws random numbers from numpy or Python's random"):
        capture(Dropping(0.05, draw))


def test_a_mask_of_numpy_is_refused():
    with pytest.raises(PrepareError, match="would repeat one draw in every step"):
        capture(Masking())


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_a_draw_that_decides_nothing_is_no_obstacle_and_is_taken_once(draw):
    random.seed(3)
    np.random.seed(3)
    expected = [draw(), draw()][1]
    random.seed(3)
    np.random.seed(3)
    capture(Dropping(0.0, draw))
    assert draw() == expected
