"""The options for scoring that validations, probes and rankings share."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_logme.utilities.checks import Task


@dataclass(frozen=True)
class Scoring:
    """The options for scoring the features of a task.

    Attributes:
        task: the task of the labels.
        num_outputs: the number of outputs, K; None until the first labels determine it.
        ignore_index: the label of samples that do not count.
        fit_intercept: centre features and targets first.
        normalize: scale the features of each sample to length 1.
        curve: compute the curve of the score against the number of samples.
        sample_size: the number of samples in the random subset that each accumulator keeps.
    """

    task: Task = "multiclass"
    num_outputs: int | None = None
    ignore_index: int | None = None
    fit_intercept: bool = False
    normalize: bool = False
    curve: bool = False
    sample_size: int = 0
