"""Accumulate rows, and return their evidence: of segments, of blocks, or of all rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_logme.scores.evidence import Evidence, maximise_moments, maximise_rows
from lightning_logme.scores.moments import Moments, Rows, moments_device
from lightning_logme.scores.scoring import Scoring
from lightning_logme.scores.spectrum import Spectrum
from lightning_logme.scores.subset import SAMPLE_SIZE, IndexedRows, Subset, index_of
from lightning_logme.utilities.checks import Task

Key = TypeVar("Key")

# Rows per segment that are summed at once. With fewer, reading and writing the Gram matrix takes most of the time.
_ROWS_PER_FOLD = 256


class Accumulator:
    """The rows of one source of features, and their sums.

    Rows are held in their own dtype while they need less memory than their Gram matrices. After that, they are summed
    to one :class:`Moments` per segment, and only a random subset of them is kept.

    Args:
        task: the task of the targets.
        num_features: D.
        num_outputs: K.
        device: the device of the sums and results. None, or a device without float64 (MPS), means the CPU.
        sample_size: the number of samples in the random subset.

    Attributes:
        num_samples: the number of rows added so far.
        segments: the segments that have rows.
        held: the rows that are not summed yet.
        sums: the moments of the summed rows, by segment.
        subset: the summed rows in the random subset; None if ``sample_size`` is 0.

    Example:
        >>> import torch
        >>> from lightning_logme.scores.accumulator import Accumulator
        >>> from lightning_logme.features.labels import Target
        >>> accumulator = Accumulator("multiclass", num_features=8, num_outputs=4)
        >>> for _ in range(10):
        ...     target = torch.arange(20) % 4
        ...     features = torch.randn(20, 8) + torch.eye(4, 8)[target]
        ...     accumulator.add(Target.checked(target, "multiclass", 4).rows(features))
        >>> accumulator.evidence().num_samples
        200
    """

    def __init__(
        self,
        task: Task,
        num_features: int,
        num_outputs: int,
        device: torch.device | str | None = None,
        sample_size: int = SAMPLE_SIZE,
    ) -> None:
        self.task: Task = task
        self.num_features = num_features
        self.num_outputs = num_outputs
        self.device = moments_device(torch.device(device or "cpu"))
        self.sample_size = sample_size
        self.num_samples = 0
        self.held: list[IndexedRows] = []
        self.sums: dict[int, Moments] = {}
        self.subset = Subset(sample_size) if sample_size else None
        self.segments: set[int] = set()

    @torch.no_grad()
    def add(self, rows: Rows, segment: int | Tensor = 0, index: Tensor | None = None) -> None:
        """Add rows without copying them. The caller must not write to them later.

        Args:
            rows: rows of this task, with D features each.
            segment: the segment of a curve, or the block of the jackknife: one for all rows, or one for each (int64, on
                the CPU).
            index: (m,) int64 on the CPU, the index of each row in the data set. None counts each row as a
                sample, and numbers them from ``num_samples`` on.

        Raises:
            ValueError: the number of features is not D.
        """
        if rows.features.shape[1] != self.num_features:
            raise ValueError(
                f"features have length {rows.features.shape[1]}, but length {self.num_features} in earlier batches; "
                "pool them to one length, with pooling=callable or forward=callable."
            )
        number = len(rows.target)
        if number == 0:
            return
        if index is None:
            index = index_of(torch.arange(self.num_samples, self.num_samples + number))
        present = segment.unique().tolist() if isinstance(segment, Tensor) else [segment]
        self.segments.update(present)
        self.held.append(IndexedRows(rows, index, segment if len(present) > 1 else present[0]))
        self.num_samples += number
        self._fold_if_cheaper()

    def merge_(self, other: Accumulator) -> None:
        """Add everything of another accumulator of the same task, which must not be used later.

        Raises:
            ValueError: it has another number of features or outputs.
        """
        own_shape, other_shape = ((each.num_features, each.num_outputs) for each in (self, other))
        if own_shape != other_shape:
            raise ValueError(
                f"features and targets of lengths {other_shape} cannot be added to those of lengths {own_shape}."
            )
        other.to(self.device)
        self.held += other.held
        self.choose(other.chosen())
        for segment, sums in other.sums.items():
            present = self.sums.get(segment)
            self.sums[segment] = sums if present is None else present.writable().add_(sums)
        self.segments |= other.segments
        self.num_samples += other.num_samples
        self._fold_if_cheaper()

    def to(self, device: torch.device | str) -> Accumulator:
        """Move everything to another device, in place, and return the accumulator."""
        self.device = moments_device(torch.device(device))
        self.held = [held.to(self.device) for held in self.held]
        self.sums = {segment: sums.to(self.device) for segment, sums in self.sums.items()}
        if self.subset is not None and self.subset.buffer is not None:
            self.subset.buffer = self.subset.buffer.to(self.device)
        return self

    @property
    def nbytes(self) -> int:
        """The size of all rows and sums, in bytes."""
        groups: list[Rows | Moments] = [*(held.rows for held in self.held), *self.sums.values()]
        if self.subset is not None and self.subset.buffer is not None:
            groups.append(self.subset.buffer)
        return sum(tensor.nbytes for group in groups for tensor in vars(group).values())

    @property
    def is_finite(self) -> bool:
        """Whether all features and their squares are finite."""
        squares = [sums.gram.diagonal() for sums in self.sums.values()]
        squares += [held.rows.features.double().square().sum(0) for held in self.held]
        return all(bool(each.isfinite().all()) for each in squares)

    def moments(self) -> dict[int, Moments]:
        """Sum the held rows, and return the moments by segment, in ascending order. They are not copied."""
        self._fold()
        return {segment: self.sums[segment] for segment in sorted(self.sums)}

    def choose(self, groups: Iterable[IndexedRows]) -> None:
        """Copy the rows that belong to the random subset, because they will no longer be held."""
        if self.subset is not None:
            for group in groups:
                self.subset.add(group)

    def chosen(self) -> list[IndexedRows]:
        """Return the summed rows in the random subset, as a list of one item, or an empty list."""
        contents = None if self.subset is None else self.subset.contents()
        return [] if contents is None else [contents]

    def sample(self) -> IndexedRows:
        """Return the rows whose indices have the smallest hashes, in the order of the hashes.

        They do not depend on the batches, their order, or the world size.
        """
        chosen = Subset(self.sample_size)
        for group in [*self.chosen(), *self.held]:
            chosen.add(group)
        found = chosen.by_hash() or IndexedRows(self._cat([]), chosen.index)
        return found.to(self.device)

    def evidence(self, fit_intercept: bool = False) -> Evidence:
        """Return the evidence of all rows: from rows if n < D and all are held, else from moments."""
        return self.decomposed(fit_intercept)[0]

    def decomposed(self, fit_intercept: bool = False) -> tuple[Evidence, Spectrum | None]:
        """Return the evidence and the spectrum of the features. The spectrum is None if it could not be computed."""
        if self._has_few_rows:
            rows = self._cat([held.rows for held in self.held])
            return maximise_rows(rows, self.num_outputs, self.task, fit_intercept)
        sums = list(self.moments().values())
        total = sums[0] if len(sums) == 1 else Moments.sum(sums)
        return maximise_moments(total, self.task, fit_intercept)

    def prefixes(self) -> Iterator[tuple[int, Rows | Moments]]:
        """Yield the first segment, the first two, …, and all: the number of the last segment, and rows or moments."""
        if self._has_few_rows:
            groups: list[Rows] = []
            for segment, rows in self._by_segment(self.held):
                groups.append(rows)
                yield segment, self._cat(groups)
        elif len(self.segments) == 1:
            yield from self.moments().items()
        else:
            total = self._zeros()
            for segment, sums in self.moments().items():
                yield segment, total.add_(sums)

    def projected(self, basis: Tensor | None) -> list[Moments]:
        """Return the moments of each segment, of the features times a basis (D, R). If n < D, the rows stay held."""
        if not self._has_few_rows:
            sums = self.moments().values()
            return list(sums) if basis is None else [each.project(basis) for each in sums]
        result = []
        for _, rows in self._by_segment(self.held):
            if basis is not None:
                rows = Rows(rows.features.double() @ basis, rows.target)
            result.append(self._zeros(rows.features.shape[1]).accumulate(rows))
        return result

    @property
    def _has_few_rows(self) -> bool:
        """Whether all rows are held, and FFᵀ is smaller than the Gram matrix."""
        return not self.sums and self.num_samples < self.num_features

    def _by_segment(self, held: Sequence[IndexedRows]) -> Iterator[tuple[int, Rows]]:
        """Yield the rows of each segment that has some, in ascending order."""
        for segment in sorted(self.segments):
            rows = self._cat([each.of(segment) for each in held])
            if len(rows.target):
                yield segment, rows

    def _cat(self, groups: Sequence[Rows]) -> Rows:
        groups = [group for group in groups if len(group.target)]
        if groups:
            rows = groups[0] if len(groups) == 1 else Rows.cat(groups)
            return rows if rows.features.device == self.device else rows.to(self.device)
        target = torch.empty(0, self.num_outputs, device=self.device)
        return Rows(torch.empty(0, self.num_features, device=self.device), target)

    def _zeros(self, num_features: int | None = None) -> Moments:
        return Moments.zeros(num_features or self.num_features, self.num_outputs, self.device)

    def _fold_if_cheaper(self) -> None:
        """Sum the held rows once they need as much memory as the Gram matrices, and later in large groups."""
        limit = min(self.num_features, _ROWS_PER_FOLD) if self.sums else self.num_features
        if sum(len(held.index) for held in self.held) >= len(self.segments) * limit:
            self._fold()

    @torch.no_grad()
    def _fold(self) -> None:
        """Sum all held rows, and keep those in the random subset. Does not wait for the device."""
        held, self.held = self.held, []
        while held:  # A few batches at a time, so that there is never a copy of all rows.
            some, number = [], 0
            while held and number < _ROWS_PER_FOLD * len(self.segments):
                some.append(held.pop(0))
                number += len(some[-1].index)
            self.choose(some)
            for segment, rows in self._by_segment(some):
                sums = self.sums[segment] if segment in self.sums else self._zeros()
                self.sums[segment] = sums.accumulate(rows)


def accumulate(
    accumulators: MutableMapping[Key, Accumulator],
    key: Key,
    rows: Rows,
    scoring: Scoring,
    segment: int | Tensor,
    index: Tensor,
) -> None:
    """Add rows to the accumulator of their source. The first rows create it.

    Args:
        accumulators: the accumulators, by source.
        key: the source.
        rows: the rows of a batch.
        scoring: the options. ``num_outputs`` must be known.
        segment: as in :meth:`Accumulator.add`.
        index: as in :meth:`Accumulator.add`.
    """
    if key not in accumulators:
        assert scoring.num_outputs is not None
        width, device = rows.features.shape[1], rows.features.device
        size = SAMPLE_SIZE if scoring.accuracy else 0
        accumulators[key] = Accumulator(scoring.task, width, scoring.num_outputs, device, size)
    accumulators[key].add(rows, segment, index)
