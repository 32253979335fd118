"""LogME of tensors or arrays, in one call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_logme.features.labels import Target
from lightning_logme.features.outputs import decide_num_outputs
from lightning_logme.scores.calibration import CALIBRATION_SIZE
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.moments import Rows, moments_device, unit_vectors
from lightning_logme.scores.subset import mixed
from lightning_logme.utilities.checks import EXCLUSIVE, Task, check_flags, check_options, check_task

__all__ = ["evidence", "leave_one_out", "logme"]


def logme(
    features: Tensor | np.ndarray[Any, Any],
    target: Tensor | np.ndarray[Any, Any],
    task: Task = "multiclass",
    *,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    fit_intercept: bool = False,
    normalize: bool = False,
) -> Tensor:
    r"""Return the log of maximum evidence (LogME): how well features suit a target, without any training.

    Each output (class one-vs-rest, label or regression target) is modelled by Bayesian linear regression,
    :math:`y \mid w \sim N(F w, \beta^{-1} I)` with :math:`w \sim N(0, \alpha^{-1} I)`. LogME is the mean over the
    outputs of :math:`\frac{1}{n} \max_{\alpha, \beta} \log p(y \mid F, \alpha, \beta)`, in nats per sample (You et
    al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning", ICML 2021, eq. 2–3). The maximum is
    the global one. Scaling or rotating the features does not change the score. Higher is better. Compare only scores of
    the same samples and labels.

    Args:
        features: (N, D) floating point of any precision, tensor or array; converted to float64.
        target: (N,) integers for "binary" and "multiclass", (N, L) of 0 and 1 for "multilabel", (N,) or (N, M) for
            "regression".
        task: "binary", "multiclass", "multilabel" or "regression".
        num_classes: K; None takes the largest label + 1. In "multilabel", the number of labels; None counts columns.
        ignore_index: label of rows that are left out ("multilabel": rows with any such entry). Not accepted for
            "regression".
        fit_intercept: centre features and targets first. The LogME papers do not.
        normalize: scale the features of each sample to length 1 first. The LogME papers do not.

    Returns:
        A float64 scalar on the device of the features. It is NaN, with a warning that names the cause, if there is no
        evidence: no rows, or fewer than two classes.

    Raises:
        TypeError: an input is neither a tensor nor an array.
        ValueError: a shape, dtype, label or option does not fit, or an input contains NaN or Inf. The message names the
            argument.

    Example:
        >>> import torch
        >>> from lightning_logme.functional import logme
        >>> generator = torch.Generator().manual_seed(0)
        >>> target = torch.arange(200) % 4
        >>> noise = torch.randn(200, 8, generator=generator)
        >>> informative = noise + 2 * torch.eye(4, 8)[target]
        >>> bool(logme(informative, target) > logme(noise, target))
        True
        >>> logme(informative, target).dtype
        torch.float64
    """
    rows, _, num_outputs = _checked(features, target, task, num_classes, ignore_index, fit_intercept, normalize)
    return Evidence.of(rows, num_outputs, task, fit_intercept).score


def evidence(
    features: Tensor | np.ndarray[Any, Any],
    target: Tensor | np.ndarray[Any, Any],
    task: Task = "multiclass",
    *,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    fit_intercept: bool = False,
    normalize: bool = False,
) -> Evidence:
    """Return all results behind :func:`logme`: the evidence of each output, the gain and the posterior.

    The arguments and errors are those of :func:`logme`. The result keeps a fixed random subset of up to 1024
    samples, from which ``head(calibrated=True)`` computes the temperature.

    Example:
        >>> import torch
        >>> from lightning_logme.functional import evidence
        >>> features = torch.eye(3).repeat(8, 1) + 0.1 * torch.arange(24)[:, None] / 24
        >>> result = evidence(features, torch.arange(3).repeat(8))
        >>> result.num_samples, tuple(result.per_output.shape), tuple(result.weight.shape)
        (24, (3,), (3, 3))
        >>> bool((result.per_output >= result.null).all())
        True
    """
    rows, _, num_outputs = _checked(features, target, task, num_classes, ignore_index, fit_intercept, normalize)
    found = Evidence.of(rows, num_outputs, task, fit_intercept)
    if task == "regression":
        return found
    return replace(found, sample=rows[mixed(torch.arange(len(rows))).argsort()[:CALIBRATION_SIZE]])


def leave_one_out(
    features: Tensor | np.ndarray[Any, Any],
    target: Tensor | np.ndarray[Any, Any],
    task: Task = "multiclass",
    *,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    fit_intercept: bool = False,
    normalize: bool = False,
) -> Tensor:
    """Return a prediction for each sample, by the linear head of the evidence fitted without that sample.

    The predictions are exact and need no training and no folds (PRESS, Allen 1974): the head is a ridge regression. Its
    ridge α/β for each output is chosen once, by the evidence of all samples. The predictions estimate the targets (0/1
    per class). The largest is the predicted class.

    The arguments and errors are those of :func:`logme`.

    Returns:
        (N, K) float64, or (N, T, K) for labels of tokens (N, T), on the device of the features. Samples with
        ``ignore_index`` are never in the fit: the head fitted to all other samples predicts them. NaN, with a warning,
        if there is no evidence.

    Example:
        >>> import torch
        >>> from lightning_logme.functional import leave_one_out
        >>> target = torch.arange(200) % 4
        >>> features = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4, 8)[target]
        >>> predictions = leave_one_out(features, target)
        >>> tuple(predictions.shape), bool((predictions.argmax(1) == target).double().mean() > 0.9)
        ((200, 4), True)
    """
    rows, labels, num_outputs = _checked(features, target, task, num_classes, ignore_index, fit_intercept, normalize)
    found = Evidence.of(rows, num_outputs, task, fit_intercept)
    predictions = found.leave_one_out(rows.features, rows.target)
    if labels.kept is not None:
        everything = _as_tensor(features, "features").flatten(0, -2).to(rows.features.device)
        everything = unit_vectors(everything) if normalize else everything
        of_kept, predictions = predictions, found.predict(everything)
        predictions[labels.kept.to(predictions.device)] = of_kept
    is_tokens = task in EXCLUSIVE and len(labels.shape) == 2
    return predictions.unflatten(0, labels.shape) if is_tokens else predictions


def _checked(
    features: Tensor | np.ndarray[Any, Any],
    target: Tensor | np.ndarray[Any, Any],
    task: Task,
    num_classes: int | None,
    ignore_index: int | None,
    fit_intercept: bool,
    normalize: bool,
) -> tuple[Rows, Target, int]:
    """Return the rows that count, the checked labels, and the number of outputs."""
    check_task(task)
    check_options(task, ignore_index, fit_intercept)
    check_flags(normalize=normalize)
    labels = Target.checked(_as_tensor(target, "target"), task, decide_num_outputs(task, num_classes), ignore_index)
    rows = labels.rows(_as_tensor(features, "features"))
    for name, value in (("features", rows.features), ("target", rows.target)):
        if not torch.isfinite(value.sum(dtype=torch.float64)):  # one sum is far cheaper than a test of each value
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise ValueError(f"{name} must be finite, but {bad} of {value.numel()} values are NaN or Inf.")
    if normalize:
        rows = rows.normalized()
    rows = rows.to(moments_device(rows.features.device))
    return rows, labels, decide_num_outputs(task, num_classes, values=rows.target) or 1  # 1 if there are no samples


def _as_tensor(values: Tensor | np.ndarray[Any, Any], name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, np.ndarray):
        if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
            raise ValueError(f"{name} must not hold masked values, got {np.ma.count_masked(values)}; drop those rows.")
        native = values.dtype.newbyteorder("=")
        try:
            # torch rejects negative strides, and warns about read-only memory.
            return torch.from_numpy(np.require(np.asarray(values), dtype=native, requirements=["C", "W"]))
        except TypeError as error:
            raise TypeError(
                f"{name} must have a dtype that torch supports, got {values.dtype}; convert it, as in "
                f"{name}.astype('float64')."
            ) from error
    raise TypeError(f"{name} must be a torch.Tensor or a numpy.ndarray, got {type(values).__name__}.")
