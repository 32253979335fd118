"""Evidence against the number of samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_logme.utilities.checks import EXCLUSIVE, Task

_FIRST_POINT = 32  # samples, or twice as many as there are classes


class CurvePoint(NamedTuple):
    """The score of the first n samples.

    Attributes:
        num_samples: n.
        logme: log of maximum evidence in nats per sample; NaN where there is none.
        gain: nats per sample above the score of useless features.
    """

    num_samples: int
    logme: float
    gain: float


def segments(positions: Tensor, task: Task, num_outputs: int) -> Tensor:
    """Return the segment of a curve for each sample: the i-th ends where the number of samples has doubled i times.

    Args:
        positions: (n,) int64, of the samples among all.
        task: of their labels.
        num_outputs: K.
    """
    first = max(_FIRST_POINT, 2 * num_outputs if task in EXCLUSIVE else 0)
    return torch.bucketize(positions, first * 2 ** torch.arange(40), right=True)
