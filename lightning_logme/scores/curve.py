"""The score against the number of samples."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.accuracy import Accuracy, measure
from lightning_logme.scores.evidence import Evidence, maximise_moments, maximise_rows
from lightning_logme.scores.moments import Moments
from lightning_logme.utilities.checks import EXCLUSIVE, Task

_FIRST_POINT = 32  # samples, or twice the number of classes if that is more


class CurvePoint(NamedTuple):
    """The score of the first n samples.

    Attributes:
        num_samples: n.
        logme: the logarithm of maximum evidence, in nats per sample; NaN without evidence.
        gain: ``logme`` minus the score of useless features, in nats per sample.
        accuracy: the accuracy, on all samples, of the linear head fitted to the first n: see
            :class:`~lightning_logme.Accuracy`. Each of these n is predicted by leave-one-out. NaN if accuracy is not
            measured.
    """

    num_samples: int
    logme: float
    gain: float
    accuracy: float = math.nan


def segments(positions: Tensor, task: Task, num_outputs: int) -> Tensor:
    """Return the segment of a curve for each sample. Segment i ends at 2ⁱ times the length of segment 0.

    Args:
        positions: (n,) int64, the positions of the samples among all samples.
        task: the task of the labels.
        num_outputs: K.
    """
    first = max(_FIRST_POINT, 2 * num_outputs if task in EXCLUSIVE else 0)
    return torch.bucketize(positions, first * 2 ** torch.arange(40), right=True)


def curve_of(
    accumulator: Accumulator, fit_intercept: bool = False, whole: tuple[Evidence, Accuracy | None] | None = None
) -> list[CurvePoint]:
    """Return the scores of the first segment, of the first two, …, and of all. Only the last score may warn.

    Args:
        accumulator: its segments are those of a curve. If it has a random subset, accuracy is measured.
        fit_intercept: as in :meth:`Evidence.from_moments`.
        whole: the evidence and accuracy of all rows, if known, so that they are not computed again.
    """
    chosen, task = accumulator.sample() if accumulator.sample_size else None, accumulator.task
    points = []
    for segment, prefix in accumulator.prefixes():
        is_last = segment == max(accumulator.segments)
        if is_last and whole is not None:
            evidence, accuracy = whole
        else:
            with warnings.catch_warnings():
                if not is_last:
                    warnings.simplefilter("ignore")  # A few samples may have no evidence.
                if isinstance(prefix, Moments):
                    evidence, spectrum = maximise_moments(prefix, task, fit_intercept)
                else:
                    evidence, spectrum = maximise_rows(prefix, accumulator.num_outputs, task, fit_intercept)
                accuracy = None if chosen is None else measure(chosen, evidence, spectrum, task, segment)
        value = math.nan if accuracy is None else accuracy.value
        points.append(CurvePoint(evidence.num_samples, float(evidence.score), float(evidence.gain), value))
    return points
