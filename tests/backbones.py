"""Candidates and targets for rankings: small, with a known order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_logme import Ranking, rank_backbones

CLASSES = 4
WIDTH = 24


def target_set(n: int = 600, seed: int = 0, classes: int = CLASSES) -> TensorDataset:
    """Return inputs whose columns hold less and less information about the labels, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    strength = torch.linspace(1.5, 0.0, WIDTH)
    means = torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(99)) * strength
    return TensorDataset(means[labels] + torch.randn(n, WIDTH, generator=generator), labels)


def tokens(n=300, length=5, ignored=0.3):
    """Return sequences of the rows of a target set. Some of their labels are -100, which does not count."""
    x, y = target_set(n * length).tensors
    generator = torch.Generator().manual_seed(7)
    y = torch.where(torch.rand(len(y), generator=generator) < ignored, -100, y)
    return TensorDataset(x.unflatten(0, (n, length)), y.unflatten(0, (n, length)))


class Stream(IterableDataset):
    def __init__(self, data, order=None):
        self.data, self.order = data, range(len(data)) if order is None else order

    def __iter__(self):
        return (self.data[index] for index in self.order)


def target_loader(n: int = 600, batch_size: int = 50, **options) -> DataLoader:
    return DataLoader(target_set(n), batch_size=batch_size, **options)


class Columns(nn.Module):
    """Return some columns of the input."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.first : self.last] * self.scale


class Counted(Columns):
    """Count the samples that all instances together get."""

    seen = 0

    def forward(self, x):
        Counted.seen += len(x)
        return super().forward(x)


class Net(nn.Module):
    """Two hidden layers and a head. Takes vectors or sequences of vectors."""

    def __init__(self, first=0, last=WIDTH, width=12, seed=0):
        super().__init__()
        self.columns = Columns(first, last)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.low = nn.Linear(last - first, width)
            self.high = nn.Sequential(nn.Tanh(), nn.Linear(width, width))
            self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.high(self.low(x[..., self.columns.first : self.columns.last])).relu())

    @torch.no_grad()
    def features(self, x):
        """Return the features of each row of a ranking, from plain calls of the layers."""
        low = self.low(x[..., self.columns.first : self.columns.last])
        high = self.high(low)
        return {"": high.relu(), "/low": low, "/high": high, "/layer_mean": (low + high) / 2}


def good_to_bad() -> dict[str, nn.Module]:
    return {"bad": Columns(16, 24), "fair": Columns(8, 16), "good": Columns(0, 8)}


QUIET = {"num_classes": CLASSES, "accelerator": "cpu", "progress": False}


def rank(candidates=None, loader=None, **options) -> Ranking:
    return rank_backbones(
        candidates or good_to_bad(), target_loader() if loader is None else loader, **{**QUIET, **options}
    )
