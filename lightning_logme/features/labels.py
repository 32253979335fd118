"""The labels and the attention mask of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_logme.scores.moments import Rows, moved
from lightning_logme.scores.subset import index_of
from lightning_logme.utilities.checks import EXCLUSIVE, Task

TargetSpec = int | str | Callable[[Any], Tensor] | None

LABEL_KEYS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True, eq=False)
class Target:
    """Labels of a batch, checked once for any number of sources of features.

    Attributes:
        values: the labels of the kept samples: (m,) int64 class labels, or (m, K) numbers.
        kept: (m,) int64 indices of the kept samples, with tokens in flat order; None if all are kept.
        shape: the shape of the labels as given.
        task: the task of the labels.
    """

    values: Tensor
    kept: Tensor | None
    shape: torch.Size
    task: Task

    @classmethod
    def checked(
        cls, target: Tensor, task: Task, num_outputs: int | None = None, ignore_index: int | None = None
    ) -> Target:
        """Check and return the labels of a batch. This waits for the device once, and again if a sample is ignored.

        Args:
            target: (N,) integers for "binary" and "multiclass", or (N, T) for the classes of tokens; (N, L) of 0 and 1
                for "multilabel"; (N,) or (N, M) numbers for "regression".
            task: one of the four tasks.
            num_outputs: K; None accepts class labels of any size and any number of columns.
            ignore_index: samples with this label are left out; for "multilabel", samples with any such entry.

        Raises:
            TypeError: ``target`` is not a tensor. A sparse tensor is made dense.
            ValueError: a shape, dtype or label is wrong. The message names it.
        """
        target = _dense("target", target).detach()
        check = _checked_labels if task in EXCLUSIVE else _checked_columns
        values, keep = check(target, task, num_outputs, ignore_index)
        kept = None if keep is None else keep.nonzero()[:, 0]
        return cls(values if kept is None else values[kept], kept, target.shape, task)

    def first(self, number: int) -> Target:
        """Return the labels of the first samples only, for a batch that ends with padding."""
        stop = number * (self.shape[1:].numel() if self.task in EXCLUSIVE else 1)
        kept = torch.arange(stop, device=self.values.device) if self.kept is None else self.kept[self.kept < stop]
        return replace(self, values=self.values[: len(kept)], kept=kept)

    def spread(self, values: Tensor) -> Tensor:
        """Return one value for each kept label, given one value for each sample, (N,) on the CPU."""
        if self.task in EXCLUSIVE and len(self.shape) == 2:
            values = values.repeat_interleave(self.shape[1])
        return values if self.kept is None else values[self.kept.cpu()]

    def index(self, positions: range) -> Tensor:
        """Return the index of each kept label in the whole data set, given the positions of the N samples there."""
        position = self.spread(torch.arange(positions.start, positions.stop, positions.step))
        if not (self.task in EXCLUSIVE and len(self.shape) == 2):
            return index_of(position)
        tokens = torch.arange(self.shape[1]).repeat(self.shape[0])
        return index_of(position, tokens if self.kept is None else tokens[self.kept.cpu()])

    def rows(self, features: Tensor, num_features: int | None = None, normalize: bool = False) -> Rows:
        """Check one source of features, and return its kept rows. This does not wait for the device.

        Args:
            features: (N, D) floating point; (N, T, D) if the labels are (N, T).
            num_features: D; None accepts any.
            normalize: scale the features of each sample to length 1.

        Raises:
            TypeError: ``features`` is not a tensor. A sparse tensor is made dense.
            ValueError: a shape or dtype is wrong. The message names it.
        """
        features = _dense("features", features).detach()
        if not features.is_floating_point():
            raise ValueError(f"features must be floating point, got {features.dtype}; convert with features.float().")
        if features.dtype.itemsize == 1:  # old versions of torch cannot index float8; float16 holds its numbers exactly
            features = features.half()
        tokens = self.task in EXCLUSIVE and len(self.shape) == 2
        if tokens and features.ndim == 3 and features.shape[:2] == self.shape:
            features, tokens = features.flatten(0, 1), False
        if features.ndim != 2:
            raise ValueError(
                f"features must have shape (N, D), got {tuple(features.shape)}; pool or flatten each sample to one "
                "vector."
            )
        if num_features is not None and features.shape[1] != num_features:
            raise ValueError(
                f"features must have shape (N, {num_features}) as num_features={num_features}, got "
                f"{tuple(features.shape)}."
            )
        if tokens:
            raise ValueError(_not_one_label(self.shape, self.task))
        if len(features) != (self.shape.numel() if self.task in EXCLUSIVE else self.shape[0]):
            raise ValueError(
                f"features and target must have the same length, got {tuple(features.shape)} and {tuple(self.shape)}."
            )
        if self.kept is not None:
            features = features[moved(self.kept, features.device)]
        is_near = self.values.device == features.device
        rows = Rows(features, self.values if is_near else moved(self.values, features.device))
        return rows.normalized() if normalize else rows


class Labels(NamedTuple):
    """The labels and the attention mask of a batch.

    Attributes:
        target: the checked labels.
        mask: (N, T) attention mask, non-zero for tokens that count; None if the batch has no mask.
    """

    target: Target
    mask: Tensor | None


def read_labels(
    batch: Any, target: TargetSpec, task: Task, num_outputs: int | None = None, ignore_index: int | None = None
) -> Labels:
    """Return the labels and the mask of a batch.

    Raises:
        ValueError: the labels are missing, or do not fit the task.
    """
    # Copied, because validation_step may write to the labels: -100 is often replaced before tokens are decoded.
    found = conform_target(find_target(batch, target), task).clone()
    return Labels(Target.checked(found, task, num_outputs, ignore_index), find_mask(batch))


def check_target(target: Any) -> None:
    """Raise ``ValueError`` unless ``target`` is a key, an index, a callable or None."""
    if target is not None and (isinstance(target, bool) or not (isinstance(target, (int, str)) or callable(target))):
        raise ValueError(f"target must be a key, an index, a callable(batch) -> Tensor, or None, got {target!r}.")


def find_target(batch: Any, target: TargetSpec = None) -> Tensor:
    """Return the labels of a batch.

    Args:
        batch: (inputs, labels, …), a mapping, or an object with attributes.
        target: a key, an index, or a callable(batch). None takes the second item of a tuple or list, or the entry with
            a usual name (labels, label, targets, target, y).

    Raises:
        ValueError: the labels are missing, or are not a tensor. The message says what to pass.
    """
    try:
        labels = _look_up(batch, target)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"target={target!r} does not lead to labels in a batch that is {_describe(batch)} ({type(error).__name__}: "
            f"{error}); set it to the key or the index of the labels, or to a callable(batch) -> Tensor."
        ) from error
    if labels is None:
        raise ValueError(
            f"no labels found in a batch that is {_describe(batch)}; set target to the key or the index of the labels, "
            "or to a callable(batch) -> Tensor."
        )
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"the labels (target={target!r}) must be a torch.Tensor, got {type(labels).__name__} from a batch that is "
            f"{_describe(batch)}; convert them with target=callable(batch)."
        )
    return labels


def describe_target(batch: Any, target: TargetSpec = None) -> tuple[str, str | None]:
    """Return where :func:`find_target` finds the labels of a batch, and which other items could be labels, or None."""
    if target is not None:
        return f"target={target!r}", None
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        rivals = [f"batch[{index}]" for index, item in enumerate(batch) if index > 1 and _looks_like(item, batch[1])]
        return "batch[1]", ", ".join(rivals) or None
    present = [key for key in LABEL_KEYS if _get(batch, key) is not None]
    if not present:
        return "batch[1]", None
    return f"batch[{present[0]!r}]", ", ".join(f"batch[{key!r}]" for key in present[1:]) or None


def conform_target(target: Tensor, task: Task) -> Tensor:
    """Return labels in the form that the metric takes, if only the form differs.

    Class labels (N, 1) become (N,), a scalar becomes (1,), and the 0.0 and 1.0 of a binary loss become integers.
    """
    if target.ndim == 0:  # a squeezed batch of one
        target = target[None]
    if task in EXCLUSIVE and target.ndim == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if task == "binary" and target.is_floating_point() and bool((target == target.round()).all()):
        target = target.long()
    return target


def find_mask(batch: Any) -> Tensor | None:
    """Return the attention mask of a Hugging Face batch, or of the inputs in (inputs, labels), or None."""
    inputs = inputs_of(batch)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def inputs_of(batch: Any) -> Any:
    """Return the inputs of a batch: the first item of (inputs, labels), or the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch


def _look_up(batch: Any, target: TargetSpec) -> Any:
    if callable(target):
        return target(batch)
    if isinstance(target, str) and not isinstance(batch, Mapping):
        return getattr(batch, target)
    if target is not None:
        return batch[target]
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        return batch[1] if len(batch) > 1 else None
    if isinstance(batch, Tensor):
        return None
    found = (_get(batch, key) for key in LABEL_KEYS)
    named = next((labels for labels in found if labels is not None), None)
    return batch[1] if named is None and isinstance(batch, tuple) and len(batch) > 1 else named


def _get(batch: Any, key: str) -> Any:
    return batch.get(key) if isinstance(batch, Mapping) else getattr(batch, key, None)


def _looks_like(item: Any, labels: Any) -> bool:
    both = isinstance(item, Tensor) and isinstance(labels, Tensor)
    return both and item.shape == labels.shape and item.is_floating_point() == labels.is_floating_point()


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with keys {', '.join(map(repr, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(item).__name__ for item in batch)})"
    return f"a {type(batch).__name__}"


def _dense(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if value.is_nested:
        raise ValueError(f"{name} must be a plain tensor, got a nested tensor; pool each sample to one vector.")
    if value.is_meta:
        raise ValueError(f"{name} must hold data, got a tensor of shape {tuple(value.shape)} on the meta device.")
    return value if value.layout == torch.strided else value.to_dense()


def _not_one_label(shape: Sequence[int], task: Task) -> str:
    return (
        f"target must have shape (N,) for task={task!r}, got {tuple(shape)}; give one label per sample, or "
        "use task='multilabel' for several labels and task='regression' for numbers."
    )


def _checked_labels(
    target: Tensor, task: Task, num_classes: int | None, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return the labels as a flat int64 tensor, and a mask of those to keep; None keeps all."""
    is_inexact = target.is_floating_point() or target.is_complex()
    if target.ndim not in (1, 2) or (target.ndim == 2 and is_inexact):
        raise ValueError(_not_one_label(target.shape, task))
    if is_inexact:
        raise ValueError(
            f"target must hold integer class labels for task={task!r}, got {target.dtype}; convert with "
            "target.long(), or use task='regression' for numbers."
        )
    labels = target.flatten().long()
    if not len(labels):
        return labels, None
    keep = labels != ignore_index if ignore_index is not None else torch.ones_like(labels, dtype=torch.bool)
    # All checks together wait for the device once. Without them, a wrong label would cause a device-side assert.
    low, high, all_kept = torch.stack([*torch.where(keep, labels, 0).aminmax(), keep.all().long()]).tolist()
    if low < 0 or (num_classes is not None and high >= num_classes):
        expected = "at least 0" if num_classes is None else f"in 0…{num_classes - 1} ({num_classes} classes)"
        raise ValueError(
            f"target holds labels from {low} to {high}, but for task={task!r} labels must be {expected}; "
            "check that these are the labels, give the right num_classes, or leave such rows out with "
            f"ignore_index={low if low < 0 else high}, where this argument exists."
        )
    return labels, None if all_kept else keep


def _checked_columns(
    target: Tensor, task: Task, num_outputs: int | None, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return the target as (N, K), and a mask of samples to keep; None keeps all."""
    if task == "regression" and target.ndim == 1:
        target = target[:, None]
    columns = {"multilabel": "L", "regression": "M"}[task] if num_outputs is None else str(num_outputs)
    if target.ndim != 2 or (num_outputs is not None and target.shape[1] != num_outputs) or target.shape[1] == 0:
        also = "(N,) or " if task == "regression" and num_outputs in (None, 1) else ""
        given = "" if num_outputs is None else f"; {num_outputs} was given as num_classes, num_labels or num_outputs"
        raise ValueError(
            f"target must have shape {also}(N, {columns}) for task={task!r}, got {tuple(target.shape)}{given}."
        )
    if target.is_complex() or (task == "regression" and target.dtype == torch.bool):
        raise ValueError(f"target must hold real numbers for task={task!r}, got {target.dtype}.")
    if task == "regression":
        return target, None
    keep = (
        (target != ignore_index).all(1) if ignore_index is not None else torch.ones_like(target[:, 0], dtype=torch.bool)
    )
    counted = torch.where(keep[:, None], target, 0)
    valid, all_kept = torch.stack([((counted == 0) | (counted == 1)).all(), keep.all()]).tolist()
    if not valid:
        raise ValueError(
            f"target must hold only 0 and 1 for task={task!r}, got values from {counted.min().item()} to "
            f"{counted.max().item()}."
        )
    return target, None if all_kept else keep
