"""The metrics of one validation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_logme.distributed import agree
from lightning_logme.evidence import Evidence
from lightning_logme.metric import LogME
from lightning_logme.moments import Task, is_exclusive, moments_device

Key = tuple[str, int]  # source of features, index of the loader


class Collector:
    """One metric for every source of features and every loader, made when their first batch tells the shapes.

    Args:
        task: of all metrics.
        num_outputs: K; None reads it off the first target.
        options: of all metrics.

    Attributes:
        broken: why this validation can have no result, if so. What breaks in one process breaks in all of them.
        rows: by loader, the rows this process has had from it.
    """

    def __init__(self, task: Task, num_outputs: int | None, **options: Any) -> None:
        self.task: Task = task
        self.num_outputs = num_outputs
        self.options = options
        self.broken: str | None = None
        self.rows: dict[int, int] = {}
        self._metrics: dict[Key, LogME] = {}

    def add(self, key: Key, features: Tensor, target: Tensor) -> None:
        if key not in self._metrics:
            outputs = self.num_outputs or (target.shape[1] if target.ndim > 1 else 1)
            self._metrics[key] = self._metric(features.shape[1], outputs, features.device)
        self._metrics[key].update(features, target)

    def evidence(self, device: torch.device) -> Iterator[tuple[Key, Evidence | None]]:
        """The evidence of every key that any process has met, summed over processes; None after an error.

        To be run through by all processes, for their metrics are summed in step.

        Args:
            device: for the metrics of a process that has seen no data.
        """
        shapes = {key: (metric.num_features, metric.num_outputs) for key, metric in self._metrics.items()}
        shapes, self.broken = agree(shapes, self.broken)
        for key in sorted(shapes):
            if self.broken is None:
                yield key, self._evidence(key, *shapes[key], device)

    def _evidence(self, key: Key, num_features: int, num_outputs: int, device: torch.device) -> Evidence | None:
        metric = self._metrics.pop(key, None)
        try:
            if metric is None:
                metric = self._metric(num_features, num_outputs, device)
                nothing = metric.gram.new_empty(0, num_outputs)
                target = nothing[:, 0].long() if is_exclusive(self.task) else nothing
                metric.update(metric.gram.new_empty(0, num_features), target)
            return metric.evidence().to("cpu")
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
            **self.options,
        )
        return metric.to(moments_device(device))
