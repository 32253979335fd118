"""Samples of a map-style data set are drawn: which samples, in which order and blocks, in which batches."""

import itertools

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_logme.features.drawing import BLOCKS, labels_at_hand, sample_indices, stratified_order, with_batches

DATA = TensorDataset(torch.arange(100), torch.arange(100) % 4)


class Tensors(list):
    """A sampler that yields indices as tensors."""

    def __iter__(self):
        return (torch.tensor(index) for index in (*range(20, 80), *range(20, 40)))


class Endless(Sampler):
    def __iter__(self):
        return itertools.cycle(range(100))


class Doubled(DataLoader):
    """A loader that makes batches in its own way."""

    def __iter__(self):
        return ((2 * x, y) for x, y in super().__iter__())


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(100))


@pytest.mark.parametrize(
    "sampler",
    [
        SubsetRandomSampler(range(20, 80)),
        [*range(20, 80), 20, 21],
        WeightedRandomSampler([0] * 20 + [1] * 60, 4000),
        Tensors([0] * 80),
    ],
    ids=["subset", "list", "weighted", "tensors"],
)
def test_sampler_decides_which_samples_are_drawn(sampler):
    assert sample_indices(DataLoader(DATA, 16, sampler=sampler)).tolist() == list(range(20, 80))


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([[20, 21, 22], list(range(23, 80))], range(20, 80)),
        (BatchSampler(RandomSampler(DATA), 8, drop_last=False), range(100)),
    ],
    ids=["list", "batch sampler"],
)
def test_batch_sampler_decides_which_samples_are_drawn(batches, expected):
    assert sample_indices(DataLoader(DATA, batch_sampler=batches)).tolist() == list(expected)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, 16, sampler=Endless()),
        Doubled(DATA, 16),
        DataLoader(Numbers(), 16),
        DataLoader(DATA, batch_size=None),
        [(torch.arange(5), torch.arange(5))],
    ],
    ids=["sampler without an end", "loader of its own kind", "stream", "data set of batches", "list"],
)
def test_other_loaders_are_streams(loader):
    assert sample_indices(loader) is None


def test_labels_of_a_tensor_data_set_are_at_hand():
    assert torch.equal(labels_at_hand(DATA, None), DATA.tensors[1])
    assert torch.equal(labels_at_hand(DATA, -1), DATA.tensors[1])
    assert torch.equal(labels_at_hand(Subset(DATA, [3, 1]), None), torch.tensor([3, 1]))
    assert labels_at_hand(DATA, 2) is None


def test_every_prefix_and_every_block_has_the_classes_in_proportion():
    """Rare classes are present from the start."""
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate((700, 250, 40, 9, 1))])
    order, block = stratified_order(len(labels), labels, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(1000))
    for n in (100, 256, 700):
        counts = labels[order[:n]].bincount(minlength=5)
        expected = labels.bincount() * n / len(labels)
        assert (counts - expected).abs().max() < 3
    assert sorted(labels[order[:5]].tolist()) == [0, 1, 2, 3, 4]
    for k in range(BLOCKS):
        counts = labels[order[block == k]].bincount(minlength=5)
        assert (counts - labels.bincount() / BLOCKS).abs().max() < 1


def test_workers_and_collate_function_are_kept():
    def collate(rows):
        assert torch.utils.data.get_worker_info() is not None
        return torch.stack([row[0] for row in rows]) + 1000, torch.stack([row[1] for row in rows])

    loader = DataLoader(DATA, 16, collate_fn=collate, num_workers=1, multiprocessing_context="fork")
    batches = [x.tolist() for x, _ in with_batches(loader, [[5, 3], [8, 1, 2]], 0)]
    assert batches == [[1005, 1003], [1008, 1001, 1002]]


class Table:
    """Looks like a data set of Hugging Face."""

    column_names = ("text", "labels")

    def __init__(self, labels):
        self.columns = {"text": ["a", "b", "c"], "labels": labels}

    def __len__(self):
        return 3

    def __getitem__(self, name):
        return self.columns[name]


@pytest.mark.parametrize(
    ("labels", "target", "expected"),
    [
        ([2, 0, 1], None, [2, 0, 1]),
        ([2, 0, 1], "labels", [2, 0, 1]),
        ([2, 0, 1], 1, None),  # a position says nothing about a column
        ([2, 0, 1], "text", None),
        (["x", "y", "z"], None, None),
        ([2, 0], None, None),
    ],
)
def test_labels_of_a_table_are_read_from_its_column(labels, target, expected):
    found = labels_at_hand(Table(labels), target)
    assert (None if found is None else found.tolist()) == expected


def test_a_sampler_of_keys_has_no_indices():
    loader = DataLoader([0, 1, 2], sampler=["a", "b", "c"])
    assert sample_indices(loader) is None
