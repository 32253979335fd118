"""A random subset of the samples that does not depend on their order, their batches, or the world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_logme.scores.moments import Rows, moved

SAMPLE_SIZE = 2048

_MOST_TOKENS = 2**20  # the largest number of tokens in a sample


def index_of(position: Tensor, token: Tensor | int = 0) -> Tensor:
    """Return the indices (int64) of rows in the data set, given the positions of their samples and tokens."""
    return position * _MOST_TOKENS + token


def position_of(index: Tensor) -> Tensor:
    """Return the positions of the samples to which rows belong, given the indices of the rows."""
    return index // _MOST_TOKENS


def mixed(numbers: Tensor) -> Tensor:
    """Hash int64 numbers to int64 numbers that look random: SplitMix64's finaliser (Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> 31)


@dataclass(frozen=True, eq=False)
class IndexedRows:
    """Rows that are kept, with their indices in the data set.

    Attributes:
        rows: m rows.
        index: (m,) int64 on the CPU, the index of each row in the data set: see :func:`index_of`.
        segment: (m,) int64 on the CPU, the segment of each row; or one segment for all rows.
    """

    rows: Rows
    index: Tensor
    segment: int | Tensor = 0

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, at: slice | Tensor) -> IndexedRows:
        segment = self.segment[at] if isinstance(self.segment, Tensor) else self.segment
        return IndexedRows(self.rows[at], self.index[at], segment)

    def to(self, device: torch.device | str) -> IndexedRows:
        """Return a copy with the rows on another device."""
        return replace(self, rows=self.rows.to(device))

    def of(self, segment: int) -> Rows:
        """Return the rows of a segment."""
        if isinstance(self.segment, Tensor):
            return self.rows[(self.segment == segment).nonzero()[:, 0]]
        return self.rows if self.segment == segment else self.rows[:0]

    @property
    def segments(self) -> Tensor:
        """(m,) int64, the segment of each row."""
        return self.segment if isinstance(self.segment, Tensor) else torch.full_like(self.index, self.segment)


class Subset:
    """A subset of at most ``size`` rows: those whose indices have the smallest hashes.

    Args:
        size: the largest number of rows.
        contents: what :meth:`contents` of an earlier subset returned. It is not copied: :meth:`add` writes to it.

    Attributes:
        buffer: memory for at most ``size`` rows. The first ``len(index)`` rows are in use. None without rows.
        index: int64 on the CPU, the index of each row in the whole data set.
        segment: int64 on the CPU, the segment of each row.
    """

    def __init__(self, size: int, contents: IndexedRows | None = None) -> None:
        self.size = size
        self.buffer: Rows | None = None
        self.index = self.segment = torch.empty(0, dtype=torch.int64)
        if contents is not None:
            self.buffer, self.index, self.segment = contents.rows, contents.index, contents.segments

    @torch.no_grad()
    def add(self, new: IndexedRows) -> None:
        """Copy the rows that belong to the subset. They replace rows that no longer belong to it."""
        if self.size == 0:
            return
        own = mixed(self.index)
        bound = largest_hash([self.index, new.index], self.size)
        slots = torch.cat([(own > bound).nonzero()[:, 0], torch.arange(len(own), self.size)])
        new = new[(mixed(new.index) <= bound).nonzero()[: len(slots), 0]]
        slots = slots[: len(new)]
        if not len(new):
            return
        self.buffer = self._room_for(new.rows)
        device = self.buffer.features.device
        at = slots if device.type == "cpu" else moved(slots, device)
        for mine, value in zip(vars(self.buffer).values(), vars(new.rows).values(), strict=True):
            mine[at] = value.to(device, mine.dtype)
        grown = self.index.new_zeros(max(0, int(slots.max()) + 1 - len(own)))
        self.index, self.segment = torch.cat([self.index, grown]), torch.cat([self.segment, grown])
        self.index[slots], self.segment[slots] = new.index, new.segments

    def contents(self) -> IndexedRows | None:
        """Return the rows, in no order; None without rows."""
        if self.buffer is None:
            return None
        return IndexedRows(self.buffer[: len(self.index)], self.index, self.segment)

    def by_hash(self) -> IndexedRows | None:
        """Return a copy of :meth:`contents`, in the order of the hashes."""
        contents = self.contents()
        return None if contents is None else contents[mixed(self.index).argsort(stable=True)]

    def _room_for(self, rows: Rows) -> Rows:
        """Return a buffer that can be written to, in a dtype that can hold the rows as well."""
        if self.buffer is None or len(self.buffer) < self.size:
            room = [value.new_zeros(self.size, *value.shape[1:]) for value in vars(self.buffer or rows).values()]
            if self.buffer is None:
                return Rows(*room)
            for new, old in zip(room, vars(self.buffer).values(), strict=True):
                new[: len(old)] = old
            self.buffer = Rows(*room)
        outside, found = not torch.is_inference_mode_enabled(), []
        for mine, value in zip(vars(self.buffer).values(), vars(rows).values(), strict=True):
            if mine.dtype != value.dtype:
                mine = mine.to(torch.promote_types(mine.dtype, value.dtype))
            found.append(mine.clone() if outside and mine.is_inference() else mine)
        return Rows(*found)


def largest_hash(indices: Sequence[Tensor], size: int) -> int:
    """Return the largest hash in a subset of at most ``size`` of these indices."""
    hashes = mixed(torch.cat([*indices, torch.empty(0, dtype=torch.int64)]))
    return int(hashes.kthvalue(size).values) if len(hashes) > size else torch.iinfo(torch.int64).max
