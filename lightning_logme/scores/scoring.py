"""The options for scoring that validations, probes and rankings share."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_logme.utilities.checks import Task


@dataclass(frozen=True)
class Scoring:
    """The options for scoring the features of a task.

    Attributes:
        task: the task of the labels.
        num_outputs: K; None until the first labels show it.
        ignore_index: the label of samples that do not count.
        fit_intercept: centre features and targets first.
        normalize: scale the features of each sample to length 1.
        curve: score the first few samples, twice as many, …, and all.
        accuracy: measure the accuracy of the linear head, on a random subset of the samples.
    """

    task: Task = "multiclass"
    num_outputs: int | None = None
    ignore_index: int | None = None
    fit_intercept: bool = False
    normalize: bool = False
    curve: bool = False
    accuracy: bool = True
