"""How many digits float64 sums lose when the mean of the features is far above their spread.

The reference uses the singular values of the features themselves (``tests.oracles``). It squares no condition number,
so it keeps all digits of float64 features. The standard deviations of the features fall from 1 to 0.01, four classes
differ by 0.3 standard deviations, and a constant is added to all features.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from lightning_logme import LogME
from tests.benchmarks.common import print_table
from tests.oracles import by_singular_values, one_hot, without_mean

_ROWS, _CLASSES = 2000, 4
_WIDTHS, _RATIOS = (64, 512), (1e2, 1e3, 1e4, 1e5, 1e6)


def report(repeats: int, quick: bool) -> None:
    widths = _WIDTHS[:1] if quick else _WIDTHS
    print_table(
        f"Digits: {_ROWS} rows, nats per sample; an error below zero is a score that is too low",
        ("mean / spread", "D", "score", "error", "with an intercept", "error", "warned"),
        (_row(ratio, width) for width in widths for ratio in _RATIOS),
    )


def _row(ratio: float, width: int) -> tuple[str, ...]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, _CLASSES, _ROWS)
    centred = (0.3 * rng.normal(size=(_CLASSES, width)))[labels]
    centred = centred + rng.normal(size=(_ROWS, width)) * np.logspace(0, -2, width)
    target = one_hot(labels, _CLASSES)
    truths = (
        np.mean([by_singular_values(centred + ratio, y) for y in target.T]),
        np.mean([by_singular_values(without_mean(centred), y) for y in without_mean(target).T]),
    )
    cells, warned = [], False
    for fit_intercept, truth in zip((False, True), truths, strict=True):
        metric = LogME("multiclass", width, _CLASSES, fit_intercept=fit_intercept)
        features = torch.as_tensor(centred + ratio)
        for part, some in zip(features.split(100), torch.as_tensor(labels).split(100), strict=True):
            metric.update(part, some)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            score = float(metric.compute())
        warned |= any("lost digits" in str(warning.message) for warning in caught)
        cells += [f"{truth:.3f}", f"{score - truth:.0e}"]
    return f"{ratio:.0e}", str(width), *cells, "yes" if warned else "no"
