"""Candidates and targets for rankings: small, with a known order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import Ranking, rank_backbones

CLASSES = 4
WIDTH = 24


def target_set(n: int = 600, seed: int = 0, classes: int = CLASSES) -> TensorDataset:
    """Inputs whose columns tell less and less of the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    strength = torch.linspace(1.5, 0.0, WIDTH)
    means = torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(99)) * strength
    return TensorDataset(means[labels] + torch.randn(n, WIDTH, generator=generator), labels)


def target_loader(n: int = 600, batch_size: int = 50, **options) -> DataLoader:
    return DataLoader(target_set(n), batch_size=batch_size, **options)


class Columns(nn.Module):
    """Some of the input's columns."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.first : self.last] * self.scale


def good_to_bad() -> dict[str, nn.Module]:
    return {"bad": Columns(16, 24), "fair": Columns(8, 16), "good": Columns(0, 8)}


QUIET = {"num_classes": CLASSES, "accelerator": "cpu", "progress": False}


def rank(candidates=None, loader=None, **options) -> Ranking:
    return rank_backbones(
        candidates or good_to_bad(), target_loader() if loader is None else loader, **{**QUIET, **options}
    )
