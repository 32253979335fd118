"""A random subset of the samples that does not depend on their order, their batches, or the world size."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_logme.scores.moments import Rows, moved

IndexedRows = tuple[Rows, Tensor]  # rows, and the index of each row in the whole data set

SAMPLE_SIZE = 2048


def mixed(numbers: Tensor) -> Tensor:
    """Hash int64 numbers to int64 numbers that look random: SplitMix64's finaliser (Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> 31)


class Subset:
    """A subset of at most ``size`` samples: those whose indices have the smallest hashes.

    Args:
        size: the largest number of samples.

    Attributes:
        buffer: memory for ``size`` rows. The first ``len(index)`` rows are in use. None without rows.
        index: int64 on the CPU, the index of each row in the whole data set.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffer: Rows | None = None
        self.index = torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def add(self, rows: Rows, index: Tensor) -> None:
        """Copy the rows that belong to the subset. They replace rows that no longer belong to it."""
        if self.size == 0:
            return
        own, hashes, bound = mixed(self.index), mixed(index), torch.iinfo(torch.int64).max
        if len(own) + len(hashes) > self.size:
            bound = int(torch.cat([own, hashes]).kthvalue(self.size).values)
        slots = torch.cat([(own > bound).nonzero()[:, 0], torch.arange(len(own), self.size)])
        new = (hashes <= bound).nonzero()[: len(slots), 0]
        slots = slots[: len(new)]
        if not len(new):
            return
        self.buffer = self._room_for(rows)
        device = self.buffer.features.device
        at = slots if device.type == "cpu" else moved(slots, device)
        for mine, value in zip(vars(self.buffer).values(), vars(rows[new]).values(), strict=True):
            mine[at] = value.to(device, mine.dtype)
        grown = min(self.size, len(own) + len(hashes)) - len(own)
        self.index = torch.cat([self.index, index.new_zeros(grown)])
        self.index[slots] = index[new]

    def contents(self) -> list[IndexedRows]:
        """Return the rows and their indices, unordered, as a list with one item, or an empty list."""
        return [] if self.buffer is None else [(self.buffer[: len(self.index)], self.index)]

    def by_hash(self) -> list[IndexedRows]:
        """Return the same as :meth:`contents`, copied and in the order of the hashes."""
        order = mixed(self.index).argsort(stable=True)
        return [(rows[order], index[order]) for rows, index in self.contents()]

    def _room_for(self, rows: Rows) -> Rows:
        """Return a buffer that can be written to, in a dtype that can hold the rows as well."""
        if self.buffer is None:
            return Rows(*(value.new_zeros(self.size, *value.shape[1:]) for value in vars(rows).values()))
        outside, found = not torch.is_inference_mode_enabled(), []
        for mine, value in zip(vars(self.buffer).values(), vars(rows).values(), strict=True):
            if mine.dtype != value.dtype:
                mine = mine.to(torch.promote_types(mine.dtype, value.dtype))
            found.append(mine.clone() if outside and mine.is_inference() else mine)
        return Rows(*found)
