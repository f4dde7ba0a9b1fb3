"""Normalization layers and reparametrized weights: running statistics, modes, and what data shards share.

The synchronized ones hold the lowering of `polyaccel.sum_over_shards.default`, which no sample of PyTorch reaches.
"""

from __future__ import annotations

import pytest
import torch
from bridge_scripts import on_jax
from semantics import assert_trains_as_torch, mean_square, sgd
from torch import nn

torch.set_num_threads(1)


def rows(num: int = 3, size: int = 8, width: int = 4) -> list[torch.Tensor]:
    return [torch.randn(size, width) for _ in range(num)]


def images(num: int = 3, size: int = 4) -> list[torch.Tensor]:
    return [torch.randn(size, 2, 5, 5) for _ in range(num)]


def around(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},  # a cumulative average: the count of batches takes part
        {"track_running_stats": False},
        {"affine": False, "momentum": 0.3},
    ],
    ids=str,
)
def test_batch_norm_trains_and_keeps_its_statistics(options):
    assert_trains_as_torch(lambda: around(nn.BatchNorm1d(6, **options)), rows, forms=("loop", "function", "fused"))


def test_batch_norm_in_evaluation_mode_uses_its_statistics_and_leaves_them():
    def freeze(model, step):
        model[1].train(step == 0)

    assert_trains_as_torch(lambda: around(nn.BatchNorm1d(6)), rows, before_step=freeze)


def test_batch_norm_may_be_evaluated_between_the_steps():
    def look(model, step):
        model.eval()
        with torch.no_grad():
            seen.append(model(torch.ones(3, 4)).clone())
        model.train()

    seen: list[torch.Tensor] = []
    assert_trains_as_torch(lambda: around(nn.BatchNorm1d(6)), rows, before_step=look, forms=("loop", "fused"))
    torch.testing.assert_close(seen[3:6], seen[:3], atol=2e-6, rtol=2e-5)  # loop by torch, loop on jax, ...
    torch.testing.assert_close(seen[9:], seen[:3], atol=2e-6, rtol=2e-5)


class Normalized(nn.Module):
    """Every normalization of images, one after the other."""

    def __init__(self):
        super().__init__()
        self.batch = nn.BatchNorm2d(2)
        self.instance = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
        self.group = nn.GroupNorm(1, 2)
        self.layer = nn.LayerNorm([5, 5])
        self.rms = nn.RMSNorm(5)
        self.local = nn.LocalResponseNorm(2)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        x = self.conv(self.instance(self.batch(x)))
        return self.local(self.rms(self.layer(self.group(x) + x.sin())))


def test_normalizations_of_images_train():
    assert_trains_as_torch(Normalized, images, forms=("function",))


def test_a_batch_norm_without_tracked_statistics_counts_nothing():
    norm = nn.BatchNorm3d(2, track_running_stats=False)
    assert not list(norm.buffers())
    assert_trains_as_torch(
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2, track_running_stats=False)),
        lambda: [torch.randn(2, 1, 3, 3, 3) for _ in range(2)],
        forms=("loop",),
    )


# -- statistics of the whole batch -----------------------------------------------------------------------------------------------


def synchronized(**options) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(around(nn.BatchNorm1d(6, **options)))


@pytest.mark.parametrize("form", ["loop", "function", "fused"])
@pytest.mark.parametrize("partitioning", ["pmap", "sharding"])
def test_a_synchronized_batch_norm_sees_the_batch_of_all_data_shards(partitioning, form):
    """As if one process had the whole batch: outputs, gradients and running statistics."""
    assert_trains_as_torch(synchronized, rows, forms=(form,), num_devices=4, partitioning=partitioning)


def test_a_synchronized_batch_norm_without_running_statistics_and_with_a_cumulative_average():
    assert_trains_as_torch(lambda: synchronized(track_running_stats=False), rows, forms=("function",), num_devices=2)
    assert_trains_as_torch(lambda: synchronized(momentum=None, affine=False), rows, forms=("loop",), num_devices=2)


def test_a_plain_batch_norm_sees_its_own_data_shard_and_a_synchronized_one_does_not():
    def outputs(make):
        acc = on_jax(num_devices=2)
        torch.manual_seed(0)
        model = acc.prepare(make())
        return model(torch.arange(16.0).view(4, 4)).detach().clone()

    own, all_shards = outputs(lambda: around(nn.BatchNorm1d(6))), outputs(synchronized)
    torch.testing.assert_close(own[:2], own[2:])  # each shard's two rows are normalized by each other
    assert (all_shards[:2] - all_shards[2:]).abs().max() > 0.1


# -- reparametrized weights ------------------------------------------------------------------------------------------------


def with_weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


def with_old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


def with_spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


def with_old_spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


def with_orthogonal_weights() -> nn.Module:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley")
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3))


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


def with_own_parametrization() -> nn.Module:
    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    "make",
    [
        with_weight_norm,
        with_old_weight_norm,
        with_spectral_norm,
        with_old_spectral_norm,
        with_orthogonal_weights,
        with_own_parametrization,
    ],
)
def test_reparametrized_weights_train(make):
    assert_trains_as_torch(make, rows, atol=1e-5)  # divisions by norms


def test_a_parametrization_is_computed_once_where_it_is_cached():
    def cached(model, batch):
        with nn.utils.parametrize.cached():
            return mean_square(model, batch) + mean_square(model, batch * 2)

    assert_trains_as_torch(with_own_parametrization, rows, cached, forms=("function",), optimizer=sgd)
