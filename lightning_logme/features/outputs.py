"""The number of outputs, K: two for binary labels, else the number of classes, of labels per sample, or of columns."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_logme.utilities.checks import Task, positive_or_none

# Larger numbers are probably not class labels, unless there are enough samples for so many classes.
_MOST_CLASSES = 1_000_000


def decide_num_outputs(
    task: Task, num_classes: int | None = None, *, head_outputs: int | None = None, values: Tensor | None = None
) -> int | None:
    """Return K, or None if it is not known yet.

    Args:
        task: the task of the labels.
        num_classes: K of "multiclass" and "multilabel", if the user gave it.
        head_outputs: the number of outputs of the classifier head. If it is at least 2, it is K for "multiclass"
            without ``values``.
        values: checked labels: all labels for "multiclass", any labels for other tasks.

    Raises:
        ValueError: ``num_classes`` has no meaning for the task, or the labels are probably not class labels.
    """
    num_classes = positive_or_none("num_classes", num_classes)
    if task == "binary":
        if num_classes not in (None, 2):
            raise ValueError(f"num_classes must be 2 or None for task='binary', got {num_classes}.")
        return 2
    if task == "regression" and num_classes is not None:
        raise ValueError(
            f"num_classes={num_classes} has no meaning for task='regression', where each column of the target is an "
            "output; leave it out."
        )
    if num_classes is not None:
        return num_classes
    if task != "multiclass":
        return None if values is None else values.shape[1]
    if values is None or len(values) == 0:
        return head_outputs if head_outputs is not None and head_outputs >= 2 else None
    number = int(values.max()) + 1
    if number > max(_MOST_CLASSES, 10 * len(values)):
        raise ValueError(
            f"target holds labels up to {number - 1} in only {len(values)} samples; number the classes 0, 1, 2, …, or "
            "give num_classes."
        )
    return number


def num_outputs_of(head: nn.Module | None) -> int | None:
    """Return the number of outputs of a head, or None if not known."""
    return getattr(head, "out_features", getattr(head, "out_channels", None))
