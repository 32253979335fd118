"""The accuracy of the linear head of the evidence, on samples that it was not fitted to."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multilabel_f1_score,
)
from torchmetrics.functional.regression import r2_score

from lightning_logme.scores.calibration import CALIBRATION_SIZE, fit_temperature
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.jackknife import standard_error
from lightning_logme.scores.leave_one_out import predict_without_each
from lightning_logme.scores.moments import moved
from lightning_logme.scores.spectrum import Spectrum
from lightning_logme.scores.subset import IndexedRows, mixed, position_of
from lightning_logme.utilities.checks import EXCLUSIVE, Task

METRICS: dict[Task, str] = {"binary": "accuracy", "multiclass": "accuracy", "multilabel": "f1", "regression": "r2"}

# Random blocks of samples for the jackknife. More blocks make the standard error more certain.
_BLOCKS = 32
_MOST_CLASSES = 30  # of a confusion matrix
_THRESHOLD = 0.5  # of a label's prediction


@dataclass(frozen=True, eq=False)
class Accuracy:
    """The accuracy of a linear head on samples that it was not fitted to.

    By default it is the leave-one-out accuracy: the head predicts each sample as if it were fitted without this sample.
    See :func:`lightning_logme.functional.leave_one_out`.

    Attributes:
        metric: "accuracy", the share of samples whose class is predicted, in the tasks "binary" and "multiclass"; "f1",
            the mean F1 of the labels that occur, in "multilabel" (with features of mean zero, it needs
            ``fit_intercept=True``: without an intercept, few predictions exceed the threshold of ½); "r2", the mean R²
            of the targets that vary, in "regression".
        value: the value of the metric, at most 1; NaN without evidence.
        num_samples: the number of samples that were predicted: all, or a random subset of 2048.
        replicates: the value without each of 32 random blocks of these samples. Candidates that see the same samples
            have the same blocks.
        confusion: the confusion matrix, (K, K) int64 on the CPU: the number of samples by label (row) and predicted
            class (column). None in other tasks than "binary" and "multiclass", and with more than 30 classes.
        temperature: the temperature that calibrates the head: see :meth:`lightning_logme.Evidence.head`. None in
            regression, and for test samples.

    Example:
        >>> import torch
        >>> from lightning_logme import LogME
        >>> metric = LogME("multiclass", num_features=3, num_classes=3)
        >>> target = torch.arange(30) % 3
        >>> metric.update(torch.eye(3)[target], target.clone().index_fill_(0, torch.tensor([0]), 1))
        >>> accuracy = metric.accuracy()
        >>> accuracy.metric, accuracy.num_samples, round(accuracy.value, 3), round(accuracy.stderr, 3)
        ('accuracy', 30, 0.967, 0.033)
        >>> accuracy.confusion
        tensor([[ 9,  0,  0],
                [ 1, 10,  0],
                [ 0,  0, 10]])
    """

    metric: str
    value: float = math.nan
    num_samples: int = 0
    replicates: list[float] = field(default_factory=list)
    confusion: Tensor | None = None
    temperature: float | None = None

    @property
    def stderr(self) -> float:
        """The standard error of the value by the block jackknife. It is itself uncertain by about an eighth.

        It holds the head fixed. F1 at a threshold also varies with the head: in simulations, its spread over data sets
        was up to twice the standard error.
        """
        return standard_error(self.replicates)


@torch.no_grad()
def measure(
    chosen: IndexedRows, evidence: Evidence, spectrum: Spectrum | None, task: Task, last: int | None = None
) -> Accuracy:
    """Return the accuracy of the head on chosen samples. If all of them are in the fit, it includes the temperature.

    Args:
        chosen: samples. Some or all of them may be in the fit.
        evidence: the evidence of the samples in the fit.
        spectrum: the spectrum of the samples in the fit; None without evidence.
        task: the task of the labels.
        last: the last segment in the fit. Samples of later segments are held out. None if all samples are in the fit.
    """
    if spectrum is None or len(chosen) == 0:
        return Accuracy(METRICS[task])
    rows, ratio = chosen.rows, evidence.alpha / evidence.beta
    if last is None:
        predictions = predict_without_each(rows, spectrum, ratio)
    else:
        predictions = evidence.predict(rows.features)
        fitted = moved((chosen.segments <= last).nonzero()[:, 0], predictions.device)
        predictions[fitted] = predict_without_each(rows[fitted], spectrum, ratio)
    accuracy = accuracy_of(decide(predictions, evidence, task), rows.target, chosen.index, evidence, task)
    if last is not None or task == "regression":
        return accuracy
    some, target = predictions[:CALIBRATION_SIZE], rows.target[:CALIBRATION_SIZE]
    return replace(accuracy, temperature=fit_temperature(some, target, task, evidence.per_output.isfinite()))


def decide(predictions: Tensor, evidence: Evidence, task: Task) -> Tensor:
    """Return the predicted classes (m,) or labels (m, K), int64, or the predicted numbers (m, K).

    A class without evidence is never predicted. The decision is −1 if a prediction is NaN or infinite.

    Args:
        predictions: (m, K) float64, estimates of the targets.
        evidence: the evidence of the head.
        task: the task of the labels.
    """
    if task == "regression":
        return predictions
    if task == "multilabel":
        return torch.where(predictions.isfinite(), (predictions > _THRESHOLD).long(), -1)
    classes = predictions.masked_fill(evidence.per_output.isnan(), -math.inf).argmax(1)
    return torch.where(predictions.isfinite().all(1), classes, -1)


def accuracy_of(decisions: Tensor, target: Tensor, index: Tensor, evidence: Evidence, task: Task) -> Accuracy:
    """Return the accuracy of decisions.

    Args:
        decisions: as returned by :func:`decide`, of m rows.
        target: the targets of these rows: (m,) int64 class labels, or (m, K) numbers.
        index: (m,) int64 on the CPU, the indices of the rows in the data set. Rows of one sample share a block.
        evidence: the evidence of the head.
        task: the task of the labels.
    """
    present = evidence.per_output.isfinite()
    valid = decisions.isfinite() & target.isfinite() if task == "regression" else decisions >= 0
    if not bool(valid.all()):
        cause = "features, predictions or targets contain NaN or Inf"
        warnings.warn(f"LogME: the accuracy is NaN, because {cause}.", stacklevel=2)
        return Accuracy(METRICS[task])
    block = moved(torch.unique(mixed(position_of(index)), return_inverse=True)[1] % _BLOCKS, decisions.device)
    replicates = [
        _value(decisions[others], target[others], present, task)
        for others in (block != each for each in range(_BLOCKS))
    ]
    confusion = None
    if task in EXCLUSIVE and len(present) <= _MOST_CLASSES:
        confusion = multiclass_confusion_matrix(decisions, target, len(present), validate_args=False).cpu()
    return Accuracy(METRICS[task], _value(decisions, target, present, task), len(index), replicates, confusion)


def _value(decisions: Tensor, target: Tensor, present: Tensor, task: Task) -> float:
    """Return the value of the task's metric; NaN if no output or no sample counts."""
    if task in EXCLUSIVE:
        if len(target) == 0:
            return math.nan
        return float(multiclass_accuracy(decisions, target, len(present), average="micro", validate_args=False))
    if task == "multilabel":
        present = present & (target > 0).any(0)
        if not bool(present.any()):
            return math.nan
        decisions, target = decisions[:, present], target[:, present].long()
        return float(multilabel_f1_score(decisions, target, decisions.shape[1], average="macro", validate_args=False))
    centre, spread = target.double().mean(0), target.double().std(0, correction=0)
    present = present & (target != target[:1]).any(0) & (spread > 0)  # rounding can give a constant a spread
    if not bool(present.any()):
        return math.nan
    # R² does not depend on shift and scale, and torchmetrics treats sums of squares below 1e-4 as zero.
    scaled = [((each - centre) / spread)[:, present] for each in (decisions, target)]
    return float(r2_score(scaled[0], scaled[1]))
