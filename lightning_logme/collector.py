"""The metrics of one pass over the samples of a task."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_logme.curve import CurvePoint
from lightning_logme.distributed import agree
from lightning_logme.evidence import Evidence
from lightning_logme.metric import LogME
from lightning_logme.moments import Moments, Task, is_exclusive, moments_device
from lightning_logme.packages import rank_zero_warn

Key = tuple[str, int]  # source of features, index of the loader

# Samples behind the first point of a curve, or twice as many as there are classes.
_FIRST_POINT = 32
_MUCH_MEMORY = 2**30  # bytes


class Result(NamedTuple):
    """What a pass has shown of one source of features.

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

    Attributes:
        broken: why this pass can have no result, if so. What breaks in one process breaks in all of them.
        seen: by loader, the batches and the rows that this process has had from it.
    """

    def __init__(
        self,
        task: Task,
        num_outputs: int | None,
        curve: bool = False,
        fit_intercept: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        self.task: Task = task
        self.num_outputs = num_outputs
        self.curve = curve
        self.fit_intercept = fit_intercept
        self.ignore_index = ignore_index
        self.broken: str | None = None
        self.seen: dict[int, tuple[int, int]] = {}
        self._metrics: dict[tuple[str, int, int], LogME] = {}
        self._warned = False

    def add(self, key: Key, features: Tensor, target: Tensor, places: range) -> None:
        """Add samples.

        Args:
            key: source and loader.
            features: (n, D), or tokens (n, T, D).
            target: of the task.
            places: of these samples among those of all processes.
        """
        outputs = self.num_outputs or (target.shape[1] if target.ndim > 1 else 1)
        for part, rows in self._parts(places, outputs):
            place = (*key, part)
            if place not in self._metrics:
                self._metrics[place] = self._metric(features.shape[-1], outputs, features.device)
                self._check_memory()
            self._metrics[place].update(features[rows], target[rows])

    def _check_memory(self) -> None:
        memory = sum(metric.gram.nbytes for metric in self._metrics.values())
        if memory > _MUCH_MEMORY and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"LogME holds {memory / 2**30:.1f} GiB of D × D matrices by now, for {len(self._metrics)} sources of "
                "features, loaders and points of curves; score fewer layers if that is too much."
            )

    def _parts(self, places: range, num_outputs: int) -> Iterator[tuple[int, slice]]:
        """The parts of the curve that rows belong to: the i-th ends where the samples have doubled i times."""
        if not self.curve:
            yield 0, slice(None)
            return
        start, part = 0, 0
        end = max(_FIRST_POINT, 2 * num_outputs if is_exclusive(self.task) else 0)
        while start < len(places):
            stop = len(range(places.start, min(end, places.stop), places.step))
            if stop > start:
                yield part, slice(start, stop)
                start = stop
            part, end = part + 1, 2 * end

    def results(self, device: torch.device, alone: bool) -> Iterator[tuple[Key, Result | None]]:
        """What there is for every key that any process has met, summed over processes; None after an error.

        To be run through by all processes, for their sums are added up in step.

        Args:
            device: for the sums, which processes exchange.
            alone: whether the run has but one process.
        """
        shapes = {key: (metric.num_features, metric.num_outputs) for key, metric in self._metrics.items()}
        mine = self.broken
        shapes, self.broken = agree(alone, shapes, mine)
        if self.broken is not None:
            if mine is None:
                rank_zero_warn(f"LogME is NaN for these samples, after an error: {self.broken}")
            return
        for (source, loader), parts in groupby(sorted(shapes), lambda key: key[:2]):
            # First all sums, then what may fail in one process: none may wait for another.
            sums = [self._sums(part, shapes[part], device) for part in parts]
            if not alone:
                sums = [part.all_reduce() for part in sums]
            yield (source, loader), self._result(sums)

    def _sums(self, key: tuple[str, int, int], shape: tuple[int, int], device: torch.device) -> Moments:
        metric = self._metrics.pop(key, None)
        moments = Moments.zeros(*shape) if metric is None else metric.moments()
        # Features may have been on another device, which the backend of the processes does not take.
        return moments.to(moments_device(device))

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
