"""How far leave-one-out predictions, whose ridge stays that of all samples, are from refits that choose the ridge anew.

The features are random rectified features of scikit-learn's digits. Each of N samples is predicted by
``leave_one_out``, and by the head of the evidence of the other N − 1 samples.
"""

from __future__ import annotations

import torch

from lightning_logme.functional import evidence, leave_one_out
from tests.benchmarks.common import print_table
from tests.oracles import digits_features

_CASES = ((100, 32), (100, 256), (400, 32), (400, 256), (400, 1024))


def report(repeats: int, quick: bool) -> None:
    print_table(
        "Leave-one-out predictions against refits without each sample",
        ("N × D", "intercept", "largest difference", "mean difference", "accuracy", "accuracy of refits", "same class"),
        (_row(n, d, fit_intercept) for n, d in _CASES[: 1 if quick else None] for fit_intercept in (False, True)),
    )


def _row(n: int, d: int, fit_intercept: bool) -> tuple[str, ...]:
    features, labels = (torch.as_tensor(array)[:n] for array in digits_features(d))
    predictions = leave_one_out(features, labels, num_classes=10, fit_intercept=fit_intercept)
    refits = torch.stack([_refit(features, labels, i, fit_intercept) for i in range(n)])
    difference = (predictions - refits).abs()
    classes, refitted = predictions.argmax(1), refits.argmax(1)
    return (
        f"{n} × {d}",
        "yes" if fit_intercept else "no",
        f"{float(difference.max()):.3f}",
        f"{float(difference.mean()):.4f}",
        f"{float((classes == labels).double().mean()):.3f}",
        f"{float((refitted == labels).double().mean()):.3f}",
        f"{float((classes == refitted).double().mean()):.1%}",
    )


def _refit(features: torch.Tensor, labels: torch.Tensor, left_out: int, fit_intercept: bool) -> torch.Tensor:
    """Return the prediction of a sample by the head of all others."""
    others = torch.arange(len(labels)) != left_out
    head = evidence(features[others], labels[others], num_classes=10, fit_intercept=fit_intercept).head(torch.float64)
    with torch.no_grad():
        return head(features[left_out].double())
