"""Rows of features and targets, and their sums, which determine the evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

# Columns per matrix product: few enough to skip most of the upper triangle, many enough for a fast BLAS.
_GRAM_BLOCK = 256
# Rows that are converted to float64 at once, so that a huge batch is never copied as a whole.
_ROW_BLOCK = 4096


def moments_device(device: torch.device) -> torch.device:
    """Return the device for moments: the device of the features, or the CPU if it has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def moved(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. A copy to CUDA does not wait."""
    # Later operations on a CUDA device wait for the copy. On other devices, they may not.
    return value.to(device, non_blocking=device.type == "cuda")


def unit_vectors(features: Tensor) -> Tensor:
    """Return feature vectors (…, D) scaled to length 1, in float32 or float64. Zeros stay zeros."""
    features = features if features.dtype == torch.float64 else features.float()
    # Divide by the largest number first, so that no square overflows.
    for order in (math.inf, 2) if features.shape[-1] else ():
        length = torch.linalg.vector_norm(features, order, dim=-1, keepdim=True)
        features = features / torch.where(length == 0, 1.0, length)
    return features


@dataclass(frozen=True, eq=False)
class Rows:
    """The features and targets of samples, checked and ready to be summed.

    Attributes:
        features: (n, D) floating point, detached from the autograd graph.
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
        """Return the rows with each feature vector scaled to length 1."""
        return Rows(unit_vectors(self.features), self.target)

    def dense_target(self, num_outputs: int) -> Tensor:
        """Return the target as (n, K) float64. Class labels become one-vs-rest columns."""
        if self.target.ndim == 1:
            return torch.nn.functional.one_hot(self.target, num_outputs).double()
        return self.target.double()

    @classmethod
    def cat(cls, groups: Sequence[Rows]) -> Rows:
        """Return the rows of several objects, which are on one device. A single object is not copied."""
        if len(groups) == 1:
            return groups[0]
        return cls(torch.cat([group.features for group in groups]), torch.cat([group.target for group in groups]))


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over samples that determine the evidence of every output, in float64.

    The evidence depends on features F (n, D) and targets Y (n, K), one-vs-rest 0/1 columns for classes, only through
    these sums. The moments of batches, ranks and nodes add up exactly, so only O(D² + DK) numbers are kept.

    Attributes:
        count: n, a scalar.
        gram: (D, D) the **lower triangle** of FᵀF. Numbers above the diagonal are unspecified.
        cross: (K, D) YᵀF. For classes, row k is the sum of the features of class k.
        feature_sum: (D,) the column sums of F.
        target_sum: (K,) the column sums of Y.
        target_square: (K,) the column sums of Y².
    """

    count: Tensor
    gram: Tensor
    cross: Tensor
    feature_sum: Tensor
    target_sum: Tensor
    target_square: Tensor

    @classmethod
    def zeros(cls, num_features: int, num_outputs: int, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no samples."""

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

    def add_(self, other: Moments) -> Moments:
        """Add other moments in place."""
        for name, value in vars(self).items():
            value.add_(getattr(other, name))
        return self

    @classmethod
    def sum(cls, several: Sequence[Moments]) -> Moments:
        """Return the sum of several moments."""
        first, *rest = several
        result = cls(**{name: value.clone() for name, value in vars(first).items()})
        for moments in rest:
            result.add_(moments)
        return result

    def all_reduce(self) -> Moments:
        """Return the sums over all processes, in place if torch allows it. All processes must call this.

        Nothing is gathered, so memory does not grow with the world size.
        """
        sums = self.writable()
        for value in vars(sums).values():
            dist.all_reduce(value)
        return sums

    def writable(self) -> Moments:
        """Return moments that may be written to. Inference tensors are copied outside ``torch.inference_mode``."""
        outside = not torch.is_inference_mode_enabled()
        return Moments(
            **{name: value.clone() if outside and value.is_inference() else value for name, value in vars(self).items()}
        )

    def to(self, device: torch.device | str) -> Moments:
        """Return the same moments on another device."""
        return Moments(**{name: value.to(device) for name, value in vars(self).items()})

    def project(self, basis: Tensor) -> Moments:
        """Return the moments of the features F times a (D, R) matrix V."""
        gram = basis.new_zeros(basis.shape[1], basis.shape[1])
        for start in range(0, len(basis), _GRAM_BLOCK):
            rows = slice(start, start + _GRAM_BLOCK)
            # G = S + Sᵀ + the blocks on the diagonal, where S holds the blocks below the diagonal.
            half = self.gram[rows, :start] @ basis[:start]
            lower = self.gram[rows, rows].tril()
            half += (lower - lower.diagonal().diag() / 2) @ basis[rows]
            gram.addmm_(basis[rows].T, half)
        return replace(self, gram=gram + gram.T, cross=self.cross @ basis, feature_sum=self.feature_sum @ basis)

    @torch.no_grad()
    def accumulate(self, rows: Rows) -> Moments:
        """Add rows, in place if torch allows it, and return the sums."""
        # Autocast would compute the matrix products in half precision.
        device = self.gram.device
        with torch.autocast(device.type, enabled=False):
            sums = self.writable()
            for start in range(0, len(rows), _ROW_BLOCK):
                # Rows are moved before they are converted, because their own device may have no float64.
                block = rows[start : start + _ROW_BLOCK].to(device)
                sums._add_(block.features.double(), block.target)
            return sums

    def _add_(self, features: Tensor, target: Tensor) -> None:
        self.count.add_(len(features))
        self.feature_sum.add_(features.sum(0))
        add_gram_(self.gram, features)
        if target.ndim == 1:  # class labels
            ones = features.new_ones(len(features))
            self.cross.index_add_(0, target, features)
            self.target_sum.index_add_(0, target, ones)
            self.target_square.index_add_(0, target, ones)
        else:
            target = target.double()
            self.cross.addmm_(target.T, features)
            self.target_sum.add_(target.sum(0))
            self.target_square.add_(target.square().sum(0))


def add_gram_(gram: Tensor, rows: Tensor) -> Tensor:
    """Add FᵀF to the lower triangle of a matrix, in place, for little more than half the cost of the product."""
    for start in range(0, len(gram), _GRAM_BLOCK):
        stop = start + _GRAM_BLOCK
        gram[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])
    return gram
