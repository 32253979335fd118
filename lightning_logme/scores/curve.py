"""The score against the number of samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_logme.utilities.checks import EXCLUSIVE, Task

_FIRST_POINT = 32  # samples, or twice the number of classes if that is more


class CurvePoint(NamedTuple):
    """The score of the first n samples.

    Attributes:
        num_samples: n.
        logme: the logarithm of maximum evidence, in nats per sample; NaN without evidence.
        gain: ``logme`` minus the score of useless features, in nats per sample.
    """

    num_samples: int
    logme: float
    gain: float


def segments(positions: Tensor, task: Task, num_outputs: int) -> Tensor:
    """Return the segment of a curve for each sample. Segment i ends at 2ⁱ times the length of segment 0.

    Args:
        positions: (n,) int64, the positions of the samples among all samples.
        task: the task of the labels.
        num_outputs: K.
    """
    first = max(_FIRST_POINT, 2 * num_outputs if task in EXCLUSIVE else 0)
    return torch.bucketize(positions, first * 2 ** torch.arange(40), right=True)
