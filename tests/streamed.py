"""Rows, and their evidence from moments or from the metric, for tests that compare ways to compute a score."""

import pytest
import torch

from lightning_logme import Evidence, LogME
from lightning_logme.features.labels import Target
from lightning_logme.functional import evidence
from lightning_logme.scores.moments import Moments, Rows


def rows_of(features, target, task="multiclass", num_outputs=None, ignore_index=None) -> Rows:
    return Target.checked(target, task, num_outputs, ignore_index).rows(features)


def streamed(features, target, task="multiclass", num_outputs=None, fit_intercept=False, batch=64, ignore_index=None):
    """Return the evidence of moments that are summed over batches, whatever the shape of the features."""
    features, target = torch.as_tensor(features), torch.as_tensor(target)
    if num_outputs is None:
        num_outputs = target.shape[1] if target.ndim == 2 else 1 if task == "regression" else int(target.max()) + 1
    moments = Moments.zeros(features.shape[1], num_outputs)
    for rows, labels in zip(features.split(batch), target.split(batch), strict=True):
        moments = moments.accumulate(rows_of(rows, labels, task, num_outputs, ignore_index))
    return Evidence.from_moments(moments, task, fit_intercept)


def metric_of(features, target, batch=50, task="multiclass", **options) -> Evidence:
    """Return the evidence of a metric that is updated batch by batch."""
    features, target = torch.as_tensor(features), torch.as_tensor(target)
    metric = LogME(task, features.shape[1], **options)
    for part, labels in zip(features.split(batch), target.split(batch), strict=True):
        metric.update(part, labels)
    return metric.evidence()


def assert_same_moments(found: Moments, expected: Moments) -> None:
    """Compare moments. Only the lower triangle of a Gram matrix counts."""
    for name, value in vars(expected).items():
        ours = getattr(found, name)
        torch.testing.assert_close(ours.tril() if name == "gram" else ours, value.tril() if name == "gram" else value)


PATHS = pytest.mark.parametrize("path", [evidence, streamed], ids=["rows", "moments"])
