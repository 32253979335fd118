"""What one pass over labelled samples accumulates, and its results."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_logme.features.extractor import Errors
from lightning_logme.features.labels import Labels
from lightning_logme.scores.accumulator import Accumulator, reduced
from lightning_logme.scores.curve import CurvePoint
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.rows import Task, is_exclusive
from lightning_logme.utilities.compat import rank_zero_warn
from lightning_logme.utilities.distributed import gathered

Key = tuple[str, int]  # source of features, index of the loader

_FIRST_POINT = 32  # samples behind the first point of a curve, or twice as many as there are classes
_MUCH_MEMORY = 2**30  # bytes


@dataclass(frozen=True)
class Scoring:
    """How the features of a task are scored.

    Attributes:
        task: of the labels.
        num_outputs: K; None reads it off the first labels.
        ignore_index: label of samples that do not count.
        fit_intercept: centre features and targets first.
        normalize: scale the features of each sample to length 1.
        curve: follow the score from few samples to all.
    """

    task: Task = "multiclass"
    num_outputs: int | None = None
    ignore_index: int | None = None
    fit_intercept: bool = False
    normalize: bool = False
    curve: bool = False


class Result(NamedTuple):
    """The result of a pass for one source of features.

    Attributes:
        evidence: of all samples, on the CPU.
        curve: the score after the first 32 (or twice the number of classes, if that is more), 64, 128, … samples and
            after all, where it was asked for.
    """

    evidence: Evidence
    curve: list[CurvePoint]


class Pass:
    """One accumulator for every source of features and every loader.

    For a curve each doubling of the samples is a segment: the score of the first 64 is that of the sums of the first 32
    and of the next 32, in however many processes.

    Args:
        scoring: of the task.
        rank: of this process.
        world: the number of processes.
        num_loaders: of the samples.

    Attributes:
        errors: by source, why this pass has no result; None stands for all sources. A source that fails in one process
            fails in all of them.
        batches: by loader, the batches that this process has had from it.
        rows: by loader, the samples in them, padding included.
        unseen: by loader, the batches in which no module was called.
        accumulators: by source and loader.
    """

    def __init__(self, scoring: Scoring, rank: int = 0, world: int = 1, num_loaders: int = 1) -> None:
        self.scoring = scoring
        self.num_loaders = num_loaders
        self.num_outputs = scoring.num_outputs
        self.errors: dict[str | None, str] = {}
        self.batches: Counter[int] = Counter()
        self.rows: Counter[int] = Counter()
        self.unseen: Counter[int] = Counter()
        self.accumulators: dict[Key, Accumulator] = {}
        self._rank, self._world = rank, world
        self._scored: Counter[int] = Counter()  # by loader, the rows of this process that count
        self._counted_here: set[int] = set()  # loaders whose rows are not one for each sample
        self._warned = False

    def add(self, rows: Mapping[str, Tensor], labels: Labels, places: range, loader: int = 0) -> Errors:
        """Add the rows of a batch; return the errors of the sources whose rows could not be added.

        Args:
            rows: by source, (n, D), or tokens (n, T, D).
            labels: of the batch.
            places: of its samples among those of all processes.
            loader: index of the loader.
        """
        target = labels.target
        if self.num_outputs is None:
            self.num_outputs = 1 if target.values.ndim == 1 else target.values.shape[1]
        errors: Errors = {}
        segment, index = self._segment(len(target.values), places, loader), target.index(places)
        for source, features in rows.items():
            try:
                kept = target.rows(features, normalize=self.scoring.normalize)
                if (source, loader) not in self.accumulators:
                    self.accumulators[source, loader] = Accumulator(
                        self.scoring.task, kept.features.shape[1], self.num_outputs, kept.features.device
                    )
                self.accumulators[source, loader].add(kept, segment, index)
            except Exception as error:
                errors[source] = error
        self._check_memory()
        return errors

    def _segment(self, number: int, places: range, loader: int) -> int | Tensor:
        """Return the segment of the curve of each row: the i-th ends where the rows that count doubled i times.

        A process does not know how many rows of the other processes count, and assumes as many as its own.
        """
        if not self.scoring.curve:
            return 0
        positions = torch.arange(places.start, places.stop, places.step)
        if number != len(places):  # tokens count one by one, and rows that are ignored do not
            self._counted_here.add(loader)
        if loader in self._counted_here:
            positions = (self._scored[loader] + torch.arange(number)) * self._world + self._rank
        self._scored[loader] += number
        first = max(_FIRST_POINT, 2 * (self.num_outputs or 0) if is_exclusive(self.scoring.task) else 0)
        ends = first * 2 ** torch.arange(40)
        return torch.bucketize(positions, ends, right=True)

    def _check_memory(self) -> None:
        memory = sum(accumulator.nbytes for accumulator in self.accumulators.values())
        if memory > _MUCH_MEMORY and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"LogME holds {memory / 2**30:.1f} GiB of D × D matrices by now, for {len(self.accumulators)} sources "
                "of features and loaders; score fewer layers, or no curve, if that is too much."
            )

    def results(self, device: torch.device, alone: bool) -> Iterator[tuple[Key, Result | None]]:
        """Yield the result of every key that any process has met, summed over processes; None after an error.

        All processes call this in step.

        Args:
            device: for the sums.
            alone: whether the run has but one process.
        """
        mine, everyone = dict(self.errors), gathered(alone, self.errors)
        accumulators, mismatches = reduced(self.accumulators, self.scoring.task, device, alone)
        for rank, errors in enumerate(everyone):
            for source, reason in errors.items():
                self.errors.setdefault(source, reason if alone else f"{reason} (process {rank})")
        for (source, _), reason in mismatches.items():
            self.errors.setdefault(source, reason)
        for reason in dict.fromkeys(reason for source, reason in self.errors.items() if source not in mine):
            rank_zero_warn(f"LogME is NaN for these samples, after an error: {reason}")
        for key in sorted(accumulators):
            if None not in self.errors and key[0] not in self.errors:
                yield key, self._result(accumulators[key])

    def _result(self, accumulator: Accumulator) -> Result | None:
        try:
            evidence = accumulator.evidence(self.scoring.fit_intercept)
            curve = accumulator.curve(self.scoring.fit_intercept, evidence) if self.scoring.curve else []
            return Result(evidence.to("cpu"), curve)
        except Exception as error:
            warnings.warn(f"LogME is NaN, after an error: {type(error).__name__}: {error}", stacklevel=2)
            return None
