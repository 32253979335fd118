"""Padding: the rows that a distributed sampler repeats, so that all processes have the same number of samples."""

import pytest
import torch
from models import vectors
from torch.utils.data import DataLoader, DistributedSampler

from lightning_logme.features.padding import rows_without_padding


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("number", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_each_sample_is_kept_in_exactly_one_process(world, number, shuffle, batch_size):
    kept = []
    for rank in range(world):
        sampler = DistributedSampler(range(number), world, rank, shuffle=shuffle)
        data = DataLoader(range(number), batch_size=batch_size, sampler=sampler)
        for index, batch in enumerate(data):
            kept += batch[: rows_without_padding(data, index, len(batch))].tolist()
    assert sorted(kept) == list(range(number))


def test_a_data_set_of_batches_is_padded_with_whole_batches():
    kept = []
    for rank in range(2):
        data = DataLoader(vectors(5), batch_size=None, sampler=DistributedSampler(range(5), 2, rank, shuffle=False))
        kept += [rows_without_padding(data, index, 7) for index in range(3)]
    assert kept == [7, 7, 7, 7, 7, 0]


class Blocks(DistributedSampler):
    """The first process has the first samples."""

    def __iter__(self):
        share = len(self)
        return iter([index % 11 for index in range(self.rank * share, (self.rank + 1) * share)])


class Twice(DistributedSampler):
    """Every sample comes twice."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.num_samples *= 2
        self.total_size *= 2


class Sorted(torch.utils.data.BatchSampler):
    """In another order, as when batches are sorted by length."""

    def __iter__(self):
        return iter(sorted(super().__iter__()))


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (DataLoader(range(11), sampler=Blocks(range(11), 2, 1), batch_size=3), 3),
        (DataLoader(range(11), sampler=Twice(range(11), 2, 1), batch_size=3), 3),
        (DataLoader(range(11), batch_sampler=Sorted(DistributedSampler(range(11), 2, 1), 3, False)), 3),
        (DataLoader(range(11), sampler=DistributedSampler(range(11), 2, 1), batch_size=3), 6),  # two crops a sample
        (DataLoader(range(11), sampler=DistributedSampler(range(11), 2, 1), batch_size=3), 2),  # one row was dropped
    ],
)
def test_padding_of_other_orders_and_rows_is_not_guessed(data, number):
    assert rows_without_padding(data, 0, number) is None


def test_other_samplers_have_no_padding():
    assert rows_without_padding(DataLoader(range(5), batch_size=2), 2, 2) == 2
    assert rows_without_padding(None, 0, 3) == 3
    sampler = DistributedSampler(range(5), 2, 1, drop_last=True)
    assert rows_without_padding(DataLoader(range(5), sampler=sampler), 0, 2) == 2
    batched = torch.utils.data.BatchSampler(DistributedSampler(range(5), 2, 1), 2, drop_last=False)
    assert rows_without_padding(DataLoader(range(5), batch_sampler=batched), 1, 1) == 0
