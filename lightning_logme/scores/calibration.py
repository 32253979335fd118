"""The temperature that turns the outputs of a linear head into probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_logme.utilities.checks import EXCLUSIVE, Task

# The most samples that a temperature is fitted to. More would take too large a share of the time.
CALIBRATION_SIZE = 1024

_STEPS = 200  # more steps than a bisection of float64 numbers takes
_TOLERANCE = 1e-10  # relative
_ROUNDING = 1e-12  # relative to the largest prediction
_START, _GROWTH = 8.0, 4.0


@torch.no_grad()
def fit_temperature(predictions: Tensor, target: Tensor, task: Task, present: Tensor) -> float:
    """Return the temperature T with which predictions of held-out samples have the smallest cross-entropy.

    The probabilities are softmax(predictions / T) in "binary" and "multiclass", and sigmoid((predictions − ½) / T) in
    "multilabel". The cross-entropy is a convex function of 1/T. Even if all predictions are right, errors are possible.
    The loss therefore has one more sample, whose label is unknown, so that T > 0, and m samples give a probability of
    about 1 − 1/m at most (as in Platt 1999).

    Args:
        predictions: (m, K) estimates of 0/1 targets, such as leave-one-out predictions.
        target: (m,) int64 class labels, or (m, K) of 0 and 1 for "multilabel".
        task: "binary", "multiclass" or "multilabel".
        present: (K,) bool, False for outputs without evidence, which are left out. No sample may have such a label.

    Returns:
        T. It is infinite if no finite T is better than equal probabilities for all classes, and NaN without samples or
        outputs, or if a prediction is NaN.

    Raises:
        ValueError: the task is "regression".
    """
    if task == "regression":
        raise ValueError("task='regression' has no probabilities, so there is no temperature.")
    logits = predictions.double()
    if task in EXCLUSIVE:
        truth = torch.nn.functional.one_hot(target, len(present)).to(logits)[:, present]
        logits = logits[:, present]
    else:  # each label is a choice between two classes with the logits z and 0
        truth, logits = target[:, present].to(logits).flatten(), logits[:, present].flatten() - 0.5
        truth, logits = torch.stack([truth, 1 - truth], 1), torch.stack([logits, torch.zeros_like(logits)], 1)
    if logits.numel() == 0 or bool(logits.isnan().any()):
        return math.nan
    logits = logits - logits.mean(1, keepdim=True)
    unit = float(logits.abs().max())
    if unit == 0:
        return math.inf
    logits = logits / unit
    # The unknown label adds nothing here, because the logits of each sample have mean 0.
    wanted = float((truth * logits).sum(1).mean()) * len(target) / (len(target) + 1)
    return math.inf if wanted <= _ROUNDING else unit / _minimise(logits, wanted)


def _minimise(logits: Tensor, wanted: float) -> float:
    """Return the scale s > 0 where the mean of log Σ exp(s · logits) − s · wanted is smallest: Newton in a bracket."""
    low, high, scale = 0.0, math.inf, _START
    for _ in range(_STEPS):
        probability = (scale * logits).softmax(1)
        mean = (probability * logits).sum(1)
        slope = float(mean.mean()) - wanted
        curvature = float(((probability * logits * logits).sum(1) - mean.square()).mean())
        low, high = (low, scale) if slope > 0 else (scale, high)
        following = scale - slope / curvature if curvature > 0 else math.inf
        following = min(following, _GROWTH * scale)
        if not low < following < high:
            following = _GROWTH * scale if high == math.inf else (low + high) / 2
        if abs(following - scale) <= _TOLERANCE * scale:
            break
        scale = following
    return following
