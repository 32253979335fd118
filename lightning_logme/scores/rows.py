"""Labels and features of a batch that passed every check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_logme.utilities.checks import Task

__all__ = ["Rows", "Target", "Task", "is_exclusive", "mixed", "moments_device", "moved"]

_MOST_TOKENS = 2**20  # of a sample


def is_exclusive(task: Task) -> bool:
    """Whether each sample belongs to exactly one of the outputs (one-vs-rest classes)."""
    return task in ("binary", "multiclass")


def moments_device(device: torch.device) -> torch.device:
    """Return the device for the moments of features on ``device``: the same, or the CPU if it has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def mixed(numbers: Tensor) -> Tensor:
    """Hash int64 numbers to int64 numbers that look random: SplitMix64's finaliser (Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> 31)


@dataclass(frozen=True, eq=False)
class Rows:
    """Features and targets of samples, ready to be summed.

    Attributes:
        features: (n, D) floating point, without a graph.
        target: (n,) int64 class labels in 0…K−1, or (n, K) numbers.
    """

    features: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: slice | Tensor) -> Rows:
        if isinstance(index, Tensor):
            index = moved(index, self.features.device)
        return Rows(self.features[index], self.target[index])

    def to(self, device: torch.device | str) -> Rows:
        """Return the same rows on another device."""
        return Rows(moved(self.features, torch.device(device)), moved(self.target, torch.device(device)))

    def normalized(self) -> Rows:
        """Return the rows with features scaled to length 1, in float32 at least; zeros stay zeros."""
        features = self.features if self.features.dtype == torch.float64 else self.features.float()
        # The largest number first, so that no square overflows.
        for order in (math.inf, 2) if features.shape[1] else ():
            length = torch.linalg.vector_norm(features, order, dim=1, keepdim=True)
            features = features / torch.where(length == 0, 1.0, length)
        return Rows(features, self.target)

    def dense_target(self, num_outputs: int) -> Tensor:
        """Return the target as (n, K) float64, one-vs-rest for class labels."""
        if self.target.ndim == 1:
            return torch.nn.functional.one_hot(self.target, num_outputs).double()
        return self.target.double()

    @classmethod
    def cat(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts, on one device; a single part is not copied."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([part.features for part in parts]), torch.cat([part.target for part in parts]))


@dataclass(frozen=True, eq=False)
class Target:
    """Labels of a batch, checked once for any number of sources of features.

    Attributes:
        values: (m,) int64 class labels, or (m, K) numbers, of the kept samples only.
        kept: (m,) int64 index of the kept samples; None where all are kept. Labels of tokens count in flat order.
        shape: of the labels as given.
        task: the labels' task.
    """

    values: Tensor
    kept: Tensor | None
    shape: torch.Size
    task: Task

    @classmethod
    def checked(
        cls, target: Tensor, task: Task, num_outputs: int | None = None, ignore_index: int | None = None
    ) -> Target:
        """Check the labels of a batch. Waits for the device once, and again only if a sample is ignored.

        Args:
            target: (N,) integers for "binary" and "multiclass", or (N, T) for the classes of tokens; (N, L) of 0 and 1
                for "multilabel"; (N,) or (N, M) numbers for "regression".
            task: one of the four tasks.
            num_outputs: K; None leaves class labels unbounded above and accepts any number of columns.
            ignore_index: samples with this label (multilabel: with any such entry) are not kept.

        Raises:
            TypeError: ``target`` is not a tensor. A sparse one is made dense.
            ValueError: a shape, dtype or label does not fit; the message names it.
        """
        target = _dense("target", target).detach()
        check = _checked_labels if is_exclusive(task) else _checked_columns
        values, keep = check(target, task, num_outputs, ignore_index)
        kept = None if keep is None else keep.nonzero()[:, 0]
        return cls(values if kept is None else values[kept], kept, target.shape, task)

    @property
    def num_samples(self) -> int:
        """Number of samples of the batch, also of those that are not kept."""
        return self.shape[0]

    def first(self, number: int) -> Target:
        """Return the target that keeps none but the first samples, as where the others are padding."""
        stop = number * (self.shape[1:].numel() if is_exclusive(self.task) else 1)
        kept = torch.arange(stop, device=self.values.device) if self.kept is None else self.kept[self.kept < stop]
        return replace(self, values=self.values[: len(kept)], kept=kept)

    def spread(self, values: Tensor) -> Tensor:
        """Return one of the values (N,), on the CPU, for each label that is kept: that of its sample."""
        if is_exclusive(self.task) and len(self.shape) == 2:
            values = values.repeat_interleave(self.shape[1])
        return values if self.kept is None else values[self.kept.cpu()]

    def index(self, places: range) -> Tensor:
        """Return the index in the whole data set of each label that is kept, given those of the samples (N,)."""
        index = self.spread(torch.arange(places.start, places.stop, places.step))
        if not (is_exclusive(self.task) and len(self.shape) == 2):
            return index
        tokens = torch.arange(self.shape[1]).repeat(self.shape[0])
        return index * _MOST_TOKENS + (tokens if self.kept is None else tokens[self.kept.cpu()])

    def rows(self, features: Tensor, num_features: int | None = None, normalize: bool = False) -> Rows:
        """Check one source of features against the labels, and return the kept rows. Does not wait for the device.

        Args:
            features: (N, D) floating point; (N, T, D) where the labels are (N, T).
            num_features: D; None accepts any.
            normalize: scale the features of each sample to length 1.

        Raises:
            TypeError: ``features`` is not a tensor. A sparse one is made dense.
            ValueError: a shape or dtype does not fit; the message names it.
        """
        features = _dense("features", features).detach()
        if not features.is_floating_point():
            raise ValueError(f"features must be floating point, got {features.dtype}; convert with features.float().")
        tokens = is_exclusive(self.task) and len(self.shape) == 2
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
        if len(features) != (self.shape.numel() if is_exclusive(self.task) else self.shape[0]):
            raise ValueError(
                f"features and target must have the same length, got {tuple(features.shape)} and {tuple(self.shape)}."
            )
        rows = Rows(features if self.kept is None else features[moved(self.kept, features.device)], self.values)
        rows = rows.to(features.device)
        return rows.normalized() if normalize else rows


def moved(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without a wait if that is a CUDA device."""
    # Only a copy to CUDA may be left to run: it is in order with what follows there.
    return value.to(device, non_blocking=device.type == "cuda")


def _dense(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if value.is_nested:
        raise ValueError(f"{name} must be one block of numbers, got a nested tensor; pool each sample to one vector.")
    if value.is_meta:
        raise ValueError(f"{name} must hold data, got a tensor of shape {tuple(value.shape)} on the meta device.")
    return value if value.layout == torch.strided else value.to_dense()


def _not_one_label(shape: Sequence[int], task: Task) -> str:
    return (
        f"target must have shape (N,) for task={task!r}, got {tuple(shape)}: one label a sample; several labels or "
        "numbers a sample are task='multilabel' and task='regression'."
    )


def _checked_labels(
    target: Tensor, task: Task, num_classes: int | None, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return the labels as a flat int64 tensor, and which to keep; None keeps all."""
    numbers = target.is_floating_point() or target.is_complex()
    if target.ndim not in (1, 2) or (target.ndim == 2 and numbers):
        raise ValueError(_not_one_label(target.shape, task))
    if numbers:
        raise ValueError(
            f"target must hold integer class labels for task={task!r}, got {target.dtype}; convert with "
            "target.long(), or use task='regression' for numbers."
        )
    labels = target.flatten().long()
    if not len(labels):
        return labels, None
    keep = labels != ignore_index if ignore_index is not None else torch.ones_like(labels, dtype=torch.bool)
    # One wait for the device instead of a device-side assert.
    low, high, all_kept = torch.stack([*torch.where(keep, labels, 0).aminmax(), keep.all().long()]).tolist()
    if low < 0 or (num_classes is not None and high >= num_classes):
        expected = "at least 0" if num_classes is None else f"in 0…{num_classes - 1} ({num_classes} classes)"
        raise ValueError(
            f"target holds labels from {low} to {high}, but for task={task!r} labels must be {expected}; "
            "are these the labels? Give the right num_classes, or leave such rows out (with "
            f"ignore_index={low if low < 0 else high}, where that is an argument)."
        )
    return labels, None if all_kept else keep


def _checked_columns(
    target: Tensor, task: Task, num_outputs: int | None, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return the target as (N, K), and which samples to keep; None keeps all."""
    if task == "regression" and target.ndim == 1:
        target = target[:, None]
    columns = {"multilabel": "L", "regression": "M"}[task] if num_outputs is None else str(num_outputs)
    if target.ndim != 2 or (num_outputs is not None and target.shape[1] != num_outputs) or target.shape[1] == 0:
        also = "(N,) or " if task == "regression" and num_outputs in (None, 1) else ""
        given = "" if num_outputs is None else f"; {num_outputs} is the num_classes, num_labels or num_outputs given"
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
    met = torch.where(keep[:, None], target, 0)
    valid, all_kept = torch.stack([((met == 0) | (met == 1)).all(), keep.all()]).tolist()
    if not valid:
        raise ValueError(
            f"target must hold only 0 and 1 for task={task!r}, got values from {met.min().item()} to "
            f"{met.max().item()}."
        )
    return target, None if all_kept else keep
