"""The additive sufficient statistics of features and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Task = Literal["binary", "multiclass", "multilabel", "regression"]

# Columns that one product takes: few enough to skip most of the upper triangle, enough for BLAS.
_GRAM_BLOCK = 256
# Rows that are converted to float64 at a time, so that one huge batch needs no second copy of itself.
_ROW_BLOCK = 4096


def is_exclusive(task: Task) -> bool:
    """Whether each sample belongs to exactly one of the outputs (one-vs-rest classes)."""
    return task in ("binary", "multiclass")


def is_token_level(features: Tensor, target: Tensor, task: Task) -> bool:
    """Whether there is a class label (N, T) for each of the tokens (N, T, D)."""
    return is_exclusive(task) and target.ndim == 2 and features.ndim == 3 and features.shape[:2] == target.shape


def moments_device(device: torch.device) -> torch.device:
    """The device moments live on for features on ``device``: the same, or the CPU where it has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over samples that determine the evidence of every output, in float64.

    With features F (n, D) and targets Y (n, K), one-vs-rest 0/1 columns for classes, these are all that the evidence
    depends on. Being sums, the moments of batches, ranks and nodes add up exactly: nothing but O(D² + DK) numbers is
    ever kept.

    Attributes:
        count: n, a scalar.
        gram: (D, D) the **lower triangle** of FᵀF; what lies above the diagonal is unspecified.
        cross: (K, D) YᵀF. For classes, row k is the sum of the features of class k.
        feature_sum: (D,) column sums of F.
        target_sum: (K,) column sums of Y.
        target_square: (K,) column sums of Y².
    """

    count: Tensor
    gram: Tensor
    cross: Tensor
    feature_sum: Tensor
    target_sum: Tensor
    target_square: Tensor

    @classmethod
    def zeros(cls, num_features: int, num_outputs: int, device: torch.device | str | None = None) -> Moments:
        """The moments of no samples."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            count=zeros(),
            gram=zeros(num_features, num_features),
            cross=zeros(num_outputs, num_features),
            feature_sum=zeros(num_features),
            target_sum=zeros(num_outputs),
            target_square=zeros(num_outputs),
        )

    @property
    def num_features(self) -> int:
        return self.cross.shape[1]

    def __add__(self, other: Moments) -> Moments:
        return Moments(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def add_(self, other: Moments) -> Moments:
        """Add in place."""
        for name, value in vars(self).items():
            value.add_(getattr(other, name))
        return self

    @classmethod
    def sum(cls, parts: Sequence[Moments]) -> Moments:
        """The moments of several parts together."""
        first, *rest = parts
        result = cls(**{name: value.clone() for name, value in vars(first).items()})
        for part in rest:
            result.add_(part)
        return result

    def all_reduce(self) -> Moments:
        """The moments of all processes, in place where torch allows it; use what is returned.

        Nothing is gathered: memory does not grow with the number of processes, all of which must call this.
        """
        sums = self.writable()
        for value in vars(sums).values():
            dist.all_reduce(value)
        return sums

    def writable(self) -> Moments:
        """With copies of tensors made under ``torch.inference_mode``, which must not be written to outside it."""
        outside = not torch.is_inference_mode_enabled()
        return Moments(
            **{name: value.clone() if outside and value.is_inference() else value for name, value in vars(self).items()}
        )

    def to(self, device: torch.device | str) -> Moments:
        return Moments(**{name: value.to(device) for name, value in vars(self).items()})

    def project(self, basis: Tensor) -> Moments:
        """The moments of the features F times a (D, R) matrix V."""
        gram = basis.new_zeros(basis.shape[1], basis.shape[1])
        for start in range(0, len(basis), _GRAM_BLOCK):
            rows = slice(start, start + _GRAM_BLOCK)
            # G = S + Sᵀ + the blocks on the diagonal, where S is what lies below those.
            half = self.gram[rows, :start] @ basis[:start]
            lower = self.gram[rows, rows].tril()
            half += (lower - lower.diagonal().diag() / 2) @ basis[rows]
            gram.addmm_(basis[rows].T, half)
        return replace(self, gram=gram + gram.T, cross=self.cross @ basis, feature_sum=self.feature_sum @ basis)

    @torch.no_grad()
    def accumulate(self, batch: Batch) -> Moments:
        """Add a batch, in place where torch allows it; use what is returned."""
        # Under autocast a matrix product of float64 would come back in half precision.
        device = self.gram.device
        with torch.autocast(device.type, enabled=False):
            sums = self.writable()
            for start in range(0, len(batch.features), _ROW_BLOCK):
                block = batch[start : start + _ROW_BLOCK]
                # Conversion happens on the device that has float64.
                sums._add_rows_(
                    block.features.detach().to(device).double(),
                    block.target.detach().to(device),
                    None if block.keep is None else block.keep.to(device),
                )
            return sums

    def _add_rows_(self, rows: Tensor, target: Tensor, keep: Tensor | None) -> None:
        if keep is None:
            weight = rows.new_ones(len(rows))
        else:
            # Zeroed, not selected: selection would make an accelerator wait for the CPU to learn the number of rows.
            weight = keep.double()
            rows = torch.where(keep[:, None], rows, 0.0)
            target = torch.where(keep.view(-1, *[1] * (target.ndim - 1)), target, 0)

        self.count.add_(weight.sum())
        self.feature_sum.add_(rows.sum(0))
        add_gram_(self.gram, rows)
        if target.ndim == 1:  # class labels
            self.cross.index_add_(0, target, rows)
            self.target_sum.index_add_(0, target, weight)
            self.target_square.index_add_(0, target, weight)
        else:
            target = target.double()
            self.cross.addmm_(target.T, rows)
            self.target_sum.add_(target.sum(0))
            self.target_square.add_(target.square().sum(0))


def add_gram_(gram: Tensor, rows: Tensor) -> Tensor:
    """Add FᵀF to the lower triangle of a matrix, in place, at little more than half the cost of the product."""
    for start in range(0, len(gram), _GRAM_BLOCK):
        stop = start + _GRAM_BLOCK
        gram[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])
    return gram


@dataclass(frozen=True, eq=False)
class Batch:
    """Features and targets that passed every check, ready to be summed.

    Attributes:
        features: (n, D) floating point.
        target: (n,) int64 class labels in 0…K−1, or (n, K) numbers.
        keep: (n,) bool, False where a row is to be left out; None keeps all.
    """

    features: Tensor
    target: Tensor
    keep: Tensor | None = None

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.features[rows], self.target[rows], None if self.keep is None else self.keep[rows])

    def kept(self) -> Batch:
        """The batch without the rows that are left out."""
        return self if self.keep is None else Batch(self.features[self.keep], self.target[self.keep])

    def dense_target(self, num_outputs: int) -> Tensor:
        """The target as (n, K) float64, one-vs-rest for class labels."""
        if self.target.ndim == 1:
            return torch.nn.functional.one_hot(self.target, num_outputs).double()
        return self.target.double()

    @classmethod
    def checked(
        cls,
        features: Tensor,
        target: Tensor,
        task: Task,
        num_outputs: int | None = None,
        num_features: int | None = None,
        ignore_index: int | None = None,
    ) -> Batch:
        """Check a batch for a task.

        Args:
            features: (n, D) floating point; or tokens (n, T, D).
            target: (n,) integers for "binary" and "multiclass", (n, L) of 0 and 1 for "multilabel", (n,) or (n, M) for
                "regression"; (n, T) integers for the classes of tokens, each of which is then a sample.
            task: one of the four tasks.
            num_outputs: K; None leaves labels unbounded above and takes the number of columns as it comes.
            num_features: D; None takes it as it comes.
            ignore_index: rows with this label (multilabel: with any such entry) are left out.

        Raises:
            TypeError: ``features`` or ``target`` is not a tensor. A sparse one is made dense.
            ValueError: a shape, dtype or label does not fit; the message names it.
        """
        features, target = _dense("features", features), _dense("target", target)
        if not features.is_floating_point():
            raise ValueError(f"features must be floating point, got {features.dtype}; convert with features.float().")
        if is_token_level(features, target, task):
            features, target = features.flatten(0, 1), target.flatten()
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
        if target.ndim == 0 or len(target) != len(features):
            raise ValueError(
                f"features and target must have the same length, got {tuple(features.shape)} and {tuple(target.shape)}."
            )
        target = target.detach().to(features.device)
        if is_exclusive(task):
            return cls(features, *_check_labels(target, task, num_outputs, ignore_index))
        return cls(features, *_check_columns(target, task, num_outputs, ignore_index))


def _dense(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if value.is_nested:
        raise ValueError(f"{name} must be one block of numbers, got a nested tensor; pool each sample to one vector.")
    if value.is_meta:
        raise ValueError(f"{name} must hold data, got a tensor of shape {tuple(value.shape)} on the meta device.")
    return value if value.layout == torch.strided else value.to_dense()


def _check_labels(
    target: Tensor, task: Task, num_classes: int | None, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
    if target.ndim != 1:
        raise ValueError(
            f"target must have shape (N,) for task={task!r}, got {tuple(target.shape)}: one label a sample; several "
            "labels "
            "or numbers a sample are task='multilabel' and task='regression'."
        )
    if target.is_floating_point() or target.is_complex():
        raise ValueError(
            f"target must hold integer class labels for task={task!r}, got {target.dtype}; convert with "
            "target.long(), or use task='regression' for numbers."
        )
    labels = target.long()
    keep = None if ignore_index is None else labels != ignore_index
    met = labels if keep is None else torch.where(keep, labels, 0)
    if len(met):
        low, high = torch.stack(met.aminmax()).tolist()  # one wait for the device instead of a device-side assert
        if low < 0 or (num_classes is not None and high >= num_classes):
            expected = "at least 0" if num_classes is None else f"in 0…{num_classes - 1} ({num_classes} classes)"
            raise ValueError(
                f"target holds labels from {low} to {high}, but for task={task!r} labels must be {expected}; "
                "are these the labels? Give the right num_classes, or leave such rows out (with "
                f"ignore_index={low if low < 0 else high}, where that is an argument)."
            )
    return labels, keep


def _check_columns(
    target: Tensor, task: Task, num_outputs: int | None, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
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
    keep = None if ignore_index is None else (target != ignore_index).all(1)
    met = target if keep is None else torch.where(keep[:, None], target, 0)
    if not bool(((met == 0) | (met == 1)).all()):
        raise ValueError(
            f"target must hold only 0 and 1 for task={task!r}, got values from {met.min().item()} to "
            f"{met.max().item()}."
        )
    return target, keep
