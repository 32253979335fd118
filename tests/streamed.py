"""The evidence by way of moments, whatever the shape."""

import torch

from lightning_logme import Evidence
from lightning_logme.features.labels import Target
from lightning_logme.scores.moments import Moments, Rows


def rows_of(features, target, task="multiclass", num_outputs=None, ignore_index=None) -> Rows:
    return Target.checked(target, task, num_outputs, ignore_index).rows(features)


def streamed(features, target, task="multiclass", num_outputs=None, fit_intercept=False, batch=64, ignore_index=None):
    features, target = torch.as_tensor(features), torch.as_tensor(target)
    if num_outputs is None:
        num_outputs = target.shape[1] if target.ndim == 2 else 1 if task == "regression" else int(target.max()) + 1
    moments = Moments.zeros(features.shape[1], num_outputs)
    for rows, labels in zip(features.split(batch), target.split(batch), strict=True):
        moments = moments.accumulate(rows_of(rows, labels, task, num_outputs, ignore_index))
    return Evidence.from_moments(moments, task, fit_intercept)
