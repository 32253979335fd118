"""Samples are drawn or streamed in rounds and blocks, the same in every process."""

import itertools
from itertools import pairwise

import pytest
import torch
from backbones import Stream
from torch.utils.data import (
    DataLoader,
    Dataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_logme.features.drawing import BLOCKS
from lightning_logme.features.sampling import Samples


def samples(loader, task="multiclass", target=None, seed=0):
    return Samples(loader, task, target, seed)


def seen(samples, start=0, stop=None, rank=0, world=1):
    """Return the numbers of the samples, in their order, and their blocks."""
    portions = list(samples.portions(start, stop, rank, world))
    return torch.cat([portion.batch[0] for portion in portions]), torch.cat([portion.block for portion in portions])


def identities(labels):
    return TensorDataset(torch.arange(len(labels)), labels)


def test_every_sample_is_drawn_once_in_an_order_given_by_the_seed():
    loader = DataLoader(identities(torch.randint(4, (500,))), 32, shuffle=True)
    first, _ = seen(samples(loader))
    assert sorted(first.tolist()) == list(range(500))
    assert torch.equal(first, seen(samples(loader))[0])
    assert not torch.equal(first, seen(samples(loader, seed=1))[0])


def test_rounds_continue_where_the_last_one_ended():
    it = samples(DataLoader(identities(torch.randint(4, (4000,))), 50))
    stops = list(it.rounds(4))
    assert stops == [256, 512, 1024, 2048, 4000]
    rounds = list(pairwise([0, *stops]))
    parts = [seen(it, start, stop)[0] for start, stop in rounds]
    assert [len(part) for part in parts] == [stop - start for start, stop in rounds]
    assert torch.equal(torch.cat(parts), seen(it)[0])


@pytest.mark.parametrize(
    ("number", "classes", "rounds"),
    [
        (16, 4, [16]),
        (300, 4, [300]),
        (400, 4, [256, 400]),
        (5000, 500, [2000, 5000]),
        (2100, 4, [256, 512, 1024, 2100]),
    ],
)
def test_rounds_double_the_number_of_samples(number, classes, rounds):
    it = samples(DataLoader(identities(torch.zeros(number, dtype=torch.long)), 50))
    assert list(it.rounds(classes)) == rounds


def test_blocks_are_about_equal_in_every_round():
    it = samples(DataLoader(identities(torch.randint(7, (2000,))), 50))
    _, block = seen(it, 0, 256)
    assert block.bincount(minlength=BLOCKS).min() >= 256 / BLOCKS - 7


def test_samples_of_the_sampler_are_drawn_with_the_classes_in_proportion():
    sampler = SubsetRandomSampler(range(20, 80))
    order, _ = seen(samples(DataLoader(identities(torch.arange(100) % 2), 16, sampler=sampler)))
    assert sorted(order.tolist()) == list(range(20, 80))
    assert [int((order[:n] % 2).sum()) for n in (10, 20, 40)] == [5, 10, 20]


@pytest.mark.parametrize("attribute", ["targets", "labels"])
def test_labels_at_hand_are_used_for_the_order(attribute):
    class Folder(Dataset):
        """A data set with a list of labels, as those of torchvision."""

        def __init__(self):
            setattr(self, attribute, [index * 3 // 90 for index in range(90)])

        def __len__(self):
            return 90

        def __getitem__(self, index):
            return torch.tensor(index), getattr(self, attribute)[index]

    folder = Folder()
    expected = torch.tensor(getattr(folder, attribute))
    for data, chosen in ((folder, torch.arange(90)), (Subset(folder, range(10, 70)), torch.arange(10, 70))):
        it = samples(DataLoader(data, 16))
        order, _ = seen(it)
        assert torch.equal(it.labels, expected[order])
        assert sorted(order.tolist()) == chosen.tolist()


def test_sampler_without_an_end_is_streamed():
    class Endless(torch.utils.data.Sampler):
        def __iter__(self):
            return itertools.cycle(range(100))

    data = identities(torch.arange(100) % 4)
    order, _ = seen(samples(DataLoader(data, 16, sampler=Endless())), stop=40)
    assert order.tolist() == list(range(48))


def test_loader_with_its_own_batches_is_streamed():
    class Doubled(DataLoader):
        def __iter__(self):
            return ((2 * x, y) for x, y in super().__iter__())

    order, _ = seen(samples(Doubled(identities(torch.arange(40) % 4), 16)))
    assert order.tolist() == list(range(0, 80, 2))


def test_processes_share_the_same_batches():
    it = samples(DataLoader(identities(torch.arange(500) % 4), 32))
    alone = [portion.batch[0].tolist() for portion in it.portions(0, 300)]
    assert len(alone) > 3
    shares = [[portion.batch[0].tolist() for portion in it.portions(0, 300, rank, 3)] for rank in range(3)]
    assert [shares[index % 3][index // 3] for index in range(len(alone))] == alone


def test_blocks_do_not_follow_a_period_of_the_stream():
    _, block = seen(samples(DataLoader(Stream(identities(torch.arange(1600) % 8)), 50)))
    labels = torch.arange(1600) % 8
    table = torch.zeros(8, BLOCKS).index_put_((labels, block), torch.ones(1600), accumulate=True)
    assert table.min() > 10  # 25 on average
