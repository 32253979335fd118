"""Evidence against the number of samples, and where it has stopped to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["CurvePoint", "gain_settled_at", "order_settled_at"]

TOLERANCE = 0.05  # of the last gain


class CurvePoint(NamedTuple):
    """The score of the first so many samples.

    Attributes:
        num_samples: n.
        logme: log of maximum evidence, nats per sample; NaN where there is none.
        gain: what it exceeds the score of useless features by.
    """

    num_samples: int
    logme: float
    gain: float


def gain_settled_at(curve: Sequence[CurvePoint], tolerance: float = TOLERANCE) -> int | None:
    """The number of samples from which on the gain stayed where it ended: more labels have brought nothing more.

    Args:
        curve: points in the order of their ``num_samples``.
        tolerance: how far from the last gain, as a part of it, still counts as the same.

    Returns:
        ``num_samples`` of the earliest such point; None where even the last but one differs, or there is none: then
        more labels may well bring more.

    Example:
        >>> from lightning_logme.curve import CurvePoint, gain_settled_at
        >>> gains = {64: 0.2, 128: 0.39, 256: 0.4, 512: 0.4}
        >>> gain_settled_at([CurvePoint(n, gain - 1, gain) for n, gain in gains.items()])
        128
    """
    known = [point for point in curve if not math.isnan(point.gain)]
    if len(known) < 2:
        return None
    end = known[-1].gain
    return _since([point.num_samples for point in known], [abs(p.gain - end) <= tolerance * abs(end) for p in known])


def order_settled_at(curves: Mapping[str, Sequence[CurvePoint]]) -> int | None:
    """The number of samples from which on the order of several curves was the one at the end.

    Args:
        curves: by name, of layers, probes of one task, networks or candidates. Compared where all have a point of the
            same ``num_samples``.

    Returns:
        The smallest such number; None where the order changed with the last samples, or where there is nothing to
        compare.

    Example:
        >>> from lightning_logme.curve import CurvePoint, order_settled_at
        >>> shallow = [CurvePoint(64, -1.0, 0.20), CurvePoint(128, -1.0, 0.21), CurvePoint(256, -1.0, 0.22)]
        >>> deep = [CurvePoint(64, -1.0, 0.10), CurvePoint(128, -1.0, 0.30), CurvePoint(256, -1.0, 0.40)]
        >>> order_settled_at({"layer.1": shallow, "layer.9": deep})
        128
    """
    if len(curves) < 2:
        return None
    gains = [
        {point.num_samples: point.gain for point in curve if not math.isnan(point.gain)} for curve in curves.values()
    ]
    common = sorted(set.intersection(*map(set, gains)))
    orders = [sorted(range(len(gains)), key=lambda index: gains[index][number]) for number in common]
    return _since(common, [order == orders[-1] for order in orders]) if len(common) > 1 else None


def _since(numbers: Sequence[int], same: Sequence[bool]) -> int | None:
    """The first of the numbers from which on all are the same as the last, which is so by itself."""
    first = len(same) - 1
    while first > 0 and same[first - 1]:
        first -= 1
    return numbers[first] if first < len(same) - 1 else None
