"""How features are scored: the options that validations, probes and rankings share."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_logme.utilities.checks import Task


@dataclass(frozen=True)
class Scoring:
    """How the features of a task are scored.

    Attributes:
        task: of the labels.
        num_outputs: K; None until the first labels show it.
        ignore_index: label of samples that do not count.
        fit_intercept: centre features and targets first.
        normalize: scale the features of each sample to length 1.
        curve: follow the score from few samples to all.
        sample_size: of the random subset of samples that each accumulator keeps.
    """

    task: Task = "multiclass"
    num_outputs: int | None = None
    ignore_index: int | None = None
    fit_intercept: bool = False
    normalize: bool = False
    curve: bool = False
    sample_size: int = 0
