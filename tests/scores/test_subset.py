"""The random subset does not depend on the order, batches or segments of the samples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import problem
from streamed import rows_of

from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.moments import Rows
from lightning_logme.scores.subset import IndexedRows, Subset, index_of, mixed, position_of


def chosen(n, size, index_of=torch.clone):
    """Return the indices that the subset of n samples must have, in its order."""
    index = index_of(torch.arange(n))
    return index[mixed(index).argsort()[:size]]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300),
    batch=st.integers(1, 80),
    segments=st.integers(1, 4),
    size=st.integers(1, 60),
    seed=st.integers(0, 100),
)
def test_subset_does_not_depend_on_batches_or_order(n, batch, segments, size, seed):
    features = torch.arange(n, dtype=torch.float64)[:, None] + torch.zeros(6)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    accumulator = Accumulator("regression", 6, 1, sample_size=size)
    for at in order.split(batch):
        accumulator.add(rows_of(features[at], at.double(), "regression"), at % segments, at)
    for _ in range(2):
        sample = accumulator.sample()
        assert torch.equal(sample.index, chosen(n, size))
        assert torch.equal(sample.rows.features[:, 0].long(), sample.index)
        assert torch.equal(sample.rows.target[:, 0].long(), sample.index)
        assert torch.equal(sample.segments, sample.index % segments)
        accumulator.moments()


def test_samples_without_indices_are_numbered_in_turn():
    features, labels = map(torch.as_tensor, problem(300, 6, 3))
    accumulator = Accumulator("multiclass", 6, 3, sample_size=20)
    for rows, target in zip(features.split(7), labels.split(7), strict=True):
        accumulator.add(rows_of(rows, target))
    sample = accumulator.sample()
    assert torch.equal(sample.index, index_of(position_of(sample.index)))
    assert torch.equal(sample.index, chosen(300, 20, index_of))
    assert torch.equal(sample.rows.features, features[position_of(sample.index)])


def test_hash_chooses_uniformly():
    """Each tenth of 20 000 samples, and each residue modulo 7, has about its share of the 2048 samples."""
    index = chosen(20_000, 2048)
    for counts in (torch.bincount(index // 2000), torch.bincount(index % 7)):
        expected = 2048 / len(counts)
        assert float(((counts - expected) ** 2 / expected).sum()) < 25  # χ² with 9 degrees of freedom: 0.3 %


def test_subset_keeps_no_batch_alive():
    features, labels = map(torch.as_tensor, problem(4000, 8, 3))
    accumulator = Accumulator("multiclass", 8, 3, sample_size=10)
    for rows, target in zip(features.float().split(1000), labels.split(1000), strict=True):
        accumulator.add(rows_of(rows, target))
    assert accumulator.subset.buffer.features.untyped_storage().nbytes() == 10 * 8 * 4
    assert accumulator.nbytes < 2 * (8 * 8 + 2 * 3 * 8) * 8


def test_rows_are_chosen_without_waiting_for_the_device():
    """On "meta", reading a value is an error."""
    subset, index = Subset(20), torch.arange(400)
    for at in index.split(40):
        rows = Rows(torch.empty(40, 8, device="meta"), torch.empty(40, dtype=torch.long, device="meta"))
        subset.add(IndexedRows(rows, at))
    found = subset.by_hash()
    assert torch.equal(found.index, chosen(400, 20))
    assert (found.rows.features.shape, found.rows.features.device.type) == ((20, 8), "meta")


@pytest.mark.parametrize("precise", [torch.float32, torch.float64])
def test_later_rows_may_be_more_precise(precise):
    subset, features = Subset(30), torch.randn(40, 3, dtype=torch.float64)
    for at, dtype in ((slice(0, 20), torch.bfloat16), (slice(20, 40), precise)):
        subset.add(IndexedRows(Rows(features[at].to(dtype), torch.arange(40)[at]), torch.arange(40)[at]))
    found = subset.by_hash()
    expected = torch.cat([features[:20].bfloat16().to(precise), features[20:].to(precise)])
    assert torch.equal(found.index, chosen(40, 30))
    assert torch.equal(found.rows.features, expected[found.index])
    assert torch.equal(found.rows.target, found.index)


def test_empty_subset_keeps_nothing():
    subset = Subset(0)
    subset.add(IndexedRows(rows_of(torch.randn(5, 3), torch.arange(5)), torch.arange(5)))
    assert (subset.contents(), len(subset.index)) == (None, 0)
