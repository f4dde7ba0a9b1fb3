"""Ragged samples become few shapes, and every mean over their data stays what it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyaccel.data import Bucketing, masked_mean, multiples, powers
from polyaccel.errors import PrepareError


def words(*lengths):
    return [{"ids": np.arange(1, n + 1), "labels": np.arange(n), "weight": np.float32(n)} for n in lengths]


def test_buckets_by_multiples_and_by_powers_reach_the_largest_length():
    assert multiples(64, 150) == (64, 128, 192)
    assert multiples(64, 128) == (64, 128)
    assert powers(16, 100) == (16, 32, 64, 128)
    assert powers(3, 10, 1.5) == (3, 5, 8, 12)
    with pytest.raises(PrepareError, match="do not grow"):
        powers(3, 10, 1.0)
    with pytest.raises(PrepareError, match="no positive sizes"):
        multiples(0, 10)


def test_samples_are_padded_to_the_next_bucket_with_a_mask():
    batch = Bucketing([4, 8])(words(2, 5, 3))
    assert batch["ids"].shape == batch["mask"].shape == (3, 8)
    np.testing.assert_array_equal(batch["ids"][0], [1, 2, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["labels"][0], [0, 1] + [-100] * 6)
    np.testing.assert_array_equal(batch["mask"].sum(1), [2, 5, 3])
    np.testing.assert_array_equal(batch["weight"], np.float32([2, 5, 3]))
    assert batch["ids"].dtype == np.int64
    assert batch["mask"].dtype == bool
    assert batch["weight"].dtype == np.float32


def test_a_length_that_is_a_bucket_is_not_padded():
    assert Bucketing([4, 8])(words(4, 2))["ids"].shape == (2, 4)


def test_a_short_batch_is_completed_by_rows_that_the_mask_leaves_out():
    batch = Bucketing([4], batch_size=3)(words(2))
    assert batch["ids"].shape == (3, 4)
    np.testing.assert_array_equal(
        batch["ids"][2], batch["ids"][0]
    )  # a real sample: attention over nothing would be nan
    assert (batch["labels"][1:] == -100).all()
    assert not batch["mask"][1:].any()
    images = Bucketing(batch_size=4)([(np.ones((2, 2), np.float32), 7)] * 3)
    assert images[0].shape == (4, 2, 2)
    assert images[1].shape == (4,)
    np.testing.assert_array_equal(images[2], [True, True, True, False])


def test_torch_samples_come_out_as_torch_tensors_of_their_dtype():
    samples = [(torch.arange(n, dtype=torch.int32), torch.ones(n, 2)) for n in (1, 3)]
    ids, features, mask = (
        torch.utils.data.DataLoader(samples, batch_size=2, collate_fn=Bucketing([4])).__iter__().__next__()
    )
    assert ids.dtype == torch.int32
    assert ids.shape == (2, 4)
    assert features.shape == (2, 4, 2)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [1, 3]
    lists = Bucketing([4], convert=torch.from_numpy)([{"ids": [1, 2]}, {"ids": [3]}])
    assert isinstance(lists["ids"], torch.Tensor)
    assert isinstance(lists["mask"], torch.Tensor)


def test_another_dim_and_named_entries_can_be_ragged():
    samples = [{"sound": np.ones((2, n)), "text": np.ones(3)} for n in (3, 5)]
    batch = Bucketing([6], dim=1, ragged=["sound"], pad_values={"sound": -1.0})(samples)
    assert batch["sound"].shape == (2, 2, 6)
    assert batch["text"].shape == (2, 3)
    np.testing.assert_array_equal(batch["sound"][0, 0], [1, 1, 1, -1, -1, -1])


def test_any_iterable_is_cut_into_batches():
    batches = list(Bucketing([4], batch_size=2).batches(iter(words(1, 2, 3)), 2))
    assert [batch["mask"].sum() for batch in batches] == [3, 3]
    assert {batch["ids"].shape for batch in batches} == {(2, 4)}
    assert len(list(Bucketing([4]).batches(words(1, 2, 3), 2, drop_last=True))) == 1


def test_the_number_of_shapes_is_at_most_the_number_of_buckets():
    lengths = np.random.default_rng(0).integers(1, 101, 203)
    bucketing = Bucketing(powers(16, 100), batch_size=8)
    shapes = {batch["ids"].shape for batch in bucketing.batches(words(*lengths), 8)}
    assert len(shapes) <= 4


def test_a_masked_mean_is_the_mean_over_the_data():
    losses = np.arange(6, dtype=np.float64).reshape(2, 3)
    mask = np.array([[True, True, False], [True, False, False]])
    assert masked_mean(losses, mask) == np.mean([0, 1, 3])
    assert float(masked_mean(torch.from_numpy(losses), torch.from_numpy(mask))) == np.mean([0, 1, 3])
    # Two shards with 1.5 elements per sample between them: the mean of both is the mean over all their data.
    both = np.mean([masked_mean(losses[:1], mask[:1], 1.5), masked_mean(losses[1:], mask[1:], 1.5)])
    assert both == pytest.approx(np.mean([0, 1, 3]), rel=1e-15)  # float64 rounding


@pytest.mark.parametrize(
    ("bucketing", "samples", "message"),
    [
        (Bucketing([4]), words(5), "a sample is 5 long in dim 0, and the largest bucket is 4"),
        (Bucketing([4], batch_size=1), words(1, 2), "2 samples"),
        (Bucketing([4]), [{"a": np.ones(2), "b": np.ones(3)}], "sample 0 is {'a': 2, 'b': 3} long"),
        (Bucketing([4]), [{"a": np.ones(2)}, {"b": np.ones(2)}], "samples hold"),
        (Bucketing([4], mask="ids"), words(1), "already hold 'ids'"),
        (Bucketing([4]), [], "no samples"),
    ],
)
def test_what_cannot_be_padded_is_refused_by_name(bucketing, samples, message):
    with pytest.raises(PrepareError, match=message.replace("{", r"\{").replace("}", r"\}")):
        bucketing(samples)


def test_sizes_and_dims_that_mean_nothing_are_refused():
    with pytest.raises(PrepareError, match="no sizes"):
        Bucketing([0, 4])
    with pytest.raises(PrepareError, match="counts from the end"):
        Bucketing([4], dim=-1)
