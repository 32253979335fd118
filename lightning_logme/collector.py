"""The metrics of one pass over the samples of a task."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_logme.curve import CurvePoint
from lightning_logme.distributed import gathered
from lightning_logme.evidence import Evidence
from lightning_logme.metric import LogME
from lightning_logme.moments import Moments, Task, is_exclusive, is_token_level, moments_device
from lightning_logme.packages import rank_zero_warn

Key = tuple[str, int]  # source of features, index of the loader
Shapes = dict[tuple[str, int, int], tuple[int, int]]  # by source, loader and part of the curve: (D, K)

# Samples behind the first point of a curve, or twice as many as there are classes.
_FIRST_POINT = 32
_MUCH_MEMORY = 2**30  # bytes


class Result(NamedTuple):
    """The result of a pass for one source of features.

    Attributes:
        evidence: of all samples, on the CPU.
        curve: the score after the first 32 (or twice the number of classes, if that is more), 64, 128, … samples and
            after all, where it was asked for.
    """

    evidence: Evidence
    curve: list[CurvePoint]


class Collector:
    """One metric for every source of features and every loader, made when their first batch tells the shapes.

    For a curve there is a metric for each doubling of the samples: the score of the first 64 is that of the sums of the
    first 32 and of the next 32, in however many processes.

    Args:
        task: of all metrics.
        num_outputs: K; None reads it off the first target.
        curve: whether the score is followed from few samples to all.
        fit_intercept: of the evidence.
        ignore_index: of all metrics.
        rank: of this process.
        world: the number of processes.

    Attributes:
        broken: by source, why this pass has no result; None stands for all sources. A source that breaks in one process
            breaks in all of them.
        batches: by loader, the batches that this process has had from it.
        rows: by loader, the samples in them.
        unseen: by loader, the batches in which no module was called.
        uncalled: sources whose module was not called in a batch.
    """

    def __init__(
        self,
        task: Task,
        num_outputs: int | None,
        curve: bool = False,
        fit_intercept: bool = False,
        ignore_index: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.task: Task = task
        self.num_outputs = num_outputs
        self.curve = curve
        self.fit_intercept = fit_intercept
        self.ignore_index = ignore_index
        self.broken: dict[str | None, str] = {}
        self.batches: Counter[int] = Counter()
        self.rows: Counter[int] = Counter()
        self.unseen: Counter[int] = Counter()
        self.uncalled: set[str | None] = set()
        self._rank, self._world = rank, world
        self._scored: Counter[int] = Counter()  # by loader, the rows of this process without those that are ignored
        self._counted_here: set[int] = set()  # loaders whose rows are not the samples of ``places``
        self._metrics: dict[tuple[str, int, int], LogME] = {}
        self._warned = False

    def add(
        self, loader: int, rows: Mapping[str, Tensor], target: Tensor, places: range
    ) -> dict[str | None, Exception]:
        """Add the rows of a batch; returns the errors by source, of those that could not be added.

        Args:
            loader: index of the loader.
            rows: by source, (n, D), or tokens (n, T, D).
            target: of the task.
            places: of these samples among those of all processes.
        """
        outputs = self.num_outputs or (target.shape[1] if target.ndim > 1 else 1)
        errors: dict[str | None, Exception] = {}
        parts = self._parts(loader, target, places, outputs)
        for source, features in rows.items():
            try:
                self._add((source, loader), features, target, parts, outputs)
            except Exception as error:
                errors[source] = error
        return errors

    def _add(
        self, key: Key, features: Tensor, target: Tensor, parts: Sequence[tuple[int, slice]], num_outputs: int
    ) -> None:
        if self.curve and is_token_level(features, target, self.task):
            features, target = features.flatten(0, 1), target.flatten()
        for part, rows in parts:
            place = (*key, part)
            if place not in self._metrics:
                self._metrics[place] = self._metric(features.shape[-1], num_outputs, features.device)
                self._check_memory()
            self._metrics[place].update(features[rows], target[rows])

    def has(self, source: str) -> bool:
        """Whether this process has added rows of a source."""
        return any(key[0] == source for key in self._metrics)

    def _check_memory(self) -> None:
        memory = sum(metric.gram.nbytes for metric in self._metrics.values())
        if memory > _MUCH_MEMORY and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"LogME holds {memory / 2**30:.1f} GiB of D × D matrices by now, for {len(self._metrics)} sources of "
                "features, loaders and points of curves; score fewer layers if that is too much."
            )

    def _parts(self, loader: int, target: Tensor, places: range, num_outputs: int) -> list[tuple[int, slice]]:
        """Return the parts of the curve that rows belong to: the i-th ends where the scored samples doubled i times.

        Ignored rows do not count, and every token counts. A process does not know how many rows of the other processes
        count, and assumes as many as its own.
        """
        if not self.curve:
            return [(0, slice(None))]
        kept = self._kept(target)
        number = int(kept.sum())
        if len(kept) != len(places) or number < len(kept):
            self._counted_here.add(loader)
        if loader in self._counted_here:
            own = self._scored[loader] + kept.cumsum(0) - 1
            positions = own.clamp(min=0) * self._world + self._rank
        else:
            positions = torch.arange(places.start, places.stop, places.step)
        self._scored[loader] += number
        end = max(_FIRST_POINT, 2 * num_outputs if is_exclusive(self.task) else 0)
        parts, start, part = [], 0, 0
        while start < len(positions):
            stop = int((positions < end).sum())
            if stop > start:
                parts.append((part, slice(start, stop)))
                start = stop
            part, end = part + 1, 2 * end
        return parts

    def _kept(self, target: Tensor) -> Tensor:
        """Which rows are scored, on the CPU: one for each label, or for each sample of several outputs."""
        if is_exclusive(self.task):
            target = target.flatten()
        if self.ignore_index is None:
            return torch.ones(len(target), dtype=torch.bool)
        kept = (target != self.ignore_index).cpu()
        return kept if kept.ndim == 1 else kept.all(1)

    def results(self, device: torch.device, alone: bool) -> Iterator[tuple[Key, Result | None]]:
        """Yield the result of every key that any process has met, summed over processes; None after an error.

        All processes iterate in step: they must sum the same tensors in the same order, even if one has seen no data or
        has failed.

        Args:
            device: for the sums.
            alone: whether the run has but one process.
        """
        mine = {key: (metric.num_features, metric.num_outputs) for key, metric in self._metrics.items()}
        shapes, broken = _together(gathered(alone, (mine, self.broken)))
        for reason in dict.fromkeys(broken[source] for source in broken if source not in self.broken):
            rank_zero_warn(f"LogME is NaN for these samples, after an error: {reason}")
        self.broken = broken
        if None in broken:
            return
        for (source, loader), parts in groupby(sorted(shapes), lambda key: key[:2]):
            if source in broken:
                continue
            # First all sums, then what may fail in one process: none may wait for another.
            sums = [self._sums(part, shapes[part], device) for part in parts]
            if not alone:
                sums = [part.all_reduce() for part in sums]
            yield (source, loader), self._result(sums)

    def _sums(self, key: tuple[str, int, int], shape: tuple[int, int], device: torch.device) -> Moments:
        metric = self._metrics.pop(key, None)
        on = moments_device(device)
        return Moments.zeros(*shape, on) if metric is None else metric.moments().to(on)

    def _result(self, parts: list[Moments]) -> Result | None:
        total, curve = None, []
        try:
            for part in parts:
                total = part if total is None else total.add_(part)
                with warnings.catch_warnings():
                    if part is not parts[-1]:
                        warnings.simplefilter("ignore")  # few samples may lack evidence
                    evidence = Evidence.from_moments(total, self.task, self.fit_intercept)
                curve.append(CurvePoint(evidence.num_samples, float(evidence.score), float(evidence.gain)))
            return Result(evidence.to("cpu"), curve if self.curve else [])
        except Exception as error:
            warnings.warn(f"LogME is NaN, after an error: {type(error).__name__}: {error}", stacklevel=2)
            return None

    def _metric(self, num_features: int, num_outputs: int, device: torch.device) -> LogME:
        metric = LogME(
            self.task,
            num_features,
            num_classes=num_outputs,
            num_labels=num_outputs,
            num_outputs=num_outputs,
            ignore_index=self.ignore_index,
        )
        return metric.to(moments_device(device))


def _together(everyone: Sequence[tuple[Shapes, dict[str | None, str]]]) -> tuple[Shapes, dict[str | None, str]]:
    """The shapes that any process has met, and what broke in any of them."""
    together: Shapes = {}
    broken: dict[str | None, str] = {}
    for rank, (shapes, reasons) in enumerate(everyone):
        for source, reason in reasons.items():
            broken.setdefault(source, reason if len(everyone) == 1 else f"{reason} (process {rank})")
        for key, shape in shapes.items():
            if together.setdefault(key, shape) != shape:
                broken.setdefault(
                    key[0],
                    f"features or targets of lengths {shape} in process {rank}, and {together[key]} in another",
                )
    return together, broken
