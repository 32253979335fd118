"""Eigendecomposition of moments or rows: in the eigenbasis, each output's evidence is a function of one number."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_logme.scores.moments import Moments, Rows, add_gram_

EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny

_ROUNDING = 4  # times eps and what a difference takes away: what may be left of it by rounding
_LARGE_MEAN = 100  # times the spread: features with a larger mean are centred first, at the cost of an SVD
_FEW = 16  # times eps: the error of a sum of a few numbers

Decomposed = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # eigenvalues, coordinates and basis of a Spectrum


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The Gram matrix's non-zero eigenvalues, and the targets in its eigenbasis.

    With the thin singular value decomposition F = U S Vᵀ of the features, λ = S² and x = Uᵀy.

    Attributes:
        eigenvalues: (R,) λ, descending, above the resolution of a float64 Gram.
        coordinates: (K, R) x of every output.
        residual: (K,) r₀ = ‖y‖² − ‖x‖², what no linear map of the features can reach.
        square: (K,) q = ‖y‖².
        dof: n, or n − 1 where an intercept was taken out.
        basis: matrices whose product is V (D, R); the product itself is never needed.
        resolution: eigenvalues below it may be rounding: D · eps · λ_max, where λ_max is that of centred features if
            they were centred first, and not less than what the removal of a mean leaves by rounding.
        centre: the means of the features (D,) and of the targets (K,) where an intercept was taken out, else None.
        ratio: the mean of the features in units of their spread, both as lengths of vectors.
        unseen: sum of the eigenvalues below the resolution; infinite where features vary so little that they may as
            well be constant.
    """

    eigenvalues: Tensor
    coordinates: Tensor
    residual: Tensor
    square: Tensor
    dof: int
    basis: tuple[Tensor, ...]
    resolution: float
    centre: tuple[Tensor, Tensor] | None
    ratio: float
    unseen: float

    @property
    def has_large_mean(self) -> bool:
        """Whether the mean of the features is so large that they were centred first."""
        return self.ratio > _LARGE_MEAN

    def to_features(self, coefficients: Tensor) -> Tensor:
        """Map (K, R) coefficients in the eigenbasis to (K, D) weights of the features."""
        for factor in reversed(self.basis):
            coefficients = coefficients @ factor.T
        return coefficients

    def leading(self, number: int) -> Tensor:
        """The first columns of V, at most so many: the directions of the largest eigenvalues."""
        *factors, columns = self.basis
        return functools.reduce(torch.matmul, [*factors, columns[:, :number]])

    @classmethod
    def from_moments(cls, moments: Moments, fit_intercept: bool = False) -> Spectrum:
        """Decompose the Gram matrix (D × D)."""
        n, d = int(moments.count), len(moments.gram)
        gram, cross, floor = moments.gram, moments.cross, 0.0
        mean, spread = moments.feature_sum / n, centred_square(gram.diagonal(), moments.feature_sum, n)
        ratio = _ratio(mean, spread.sum() / n)
        centred = fit_intercept or ratio > _LARGE_MEAN
        if centred:
            # Of a feature that is constant the difference leaves nothing but rounding, of the others some.
            varies = spread > 0
            gram = torch.addr(gram, moments.feature_sum, mean, alpha=-1).mul_(varies).mul_(varies[:, None])
            cross = torch.addr(cross, moments.target_sum, mean, alpha=-1).mul_(varies)
            floor = _ROUNDING * EPS * n * float((mean * varies).square().sum())

        eigenvalues, vectors = torch.linalg.eigh(gram)  # reads the lower triangle
        kept, resolution = _resolved(eigenvalues, n - centred, d, floor)
        eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
        unseen = float(gram.diagonal().sum() - eigenvalues.sum())
        if centred and _may_vary(moments, spread):
            unseen = math.inf
        decomposed = eigenvalues, cross @ vectors / eigenvalues.sqrt(), (vectors,)
        target = moments.target_sum, moments.target_square
        return cls._assemble(decomposed, mean, *target, n, fit_intercept, resolution, ratio, unseen)

    @classmethod
    def from_rows(cls, rows: Rows, num_outputs: int, fit_intercept: bool = False) -> Spectrum:
        """Decompose FFᵀ (n × n): far cheaper than the Gram matrix where n < D."""
        features, target = rows.features.detach().double(), rows.dense_target(num_outputs)
        (n, d), mean, total, square = features.shape, features.mean(0), target.sum(0), target.square().sum(0)
        spread = centred_square(features.square().sum(0), n * mean, n)
        ratio = _ratio(mean, spread.sum() / n)
        centred = fit_intercept or ratio > _LARGE_MEAN
        if centred:
            varies = (features != features[0]).any(0)  # of a constant, rounding would be left
            features, target = (features - mean).mul_(varies), target - total / n
            exact = _ratio(mean, features.square().sum() / n)
            ratio = exact if exact > _LARGE_MEAN else ratio
        gram = add_gram_(features.new_zeros(n, n), features.T)
        eigenvalues, left = torch.linalg.eigh(gram)
        kept, resolution = _resolved(eigenvalues, n - centred, d)
        eigenvalues, left = eigenvalues[kept], left[:, kept]
        decomposed = eigenvalues, target.T @ left, (features.T, left / eigenvalues.sqrt())
        unseen = float(gram.diagonal().sum() - eigenvalues.sum())
        return cls._assemble(decomposed, mean, total, square, n, fit_intercept, resolution, ratio, unseen)

    @classmethod
    def _assemble(
        cls,
        decomposed: Decomposed,
        mean: Tensor,
        total: Tensor,
        square: Tensor,
        n: int,
        fit_intercept: bool,
        resolution: float,
        ratio: float,
        unseen: float,
    ) -> Spectrum:
        dof = n
        if fit_intercept:
            square, dof = centred_square(square, total, n), n - 1
        elif ratio > _LARGE_MEAN:
            decomposed = _put_back(decomposed, mean, total, n, resolution)
        eigenvalues, coordinates, basis = decomposed
        size = max(dof, len(basis[0]))
        residual = square - coordinates.square().sum(1)
        # What is left of q by rounding alone is a perfect fit, and as many directions as rows reach everything.
        residual = torch.where(residual <= size * EPS * square, 0.0, residual)
        if len(eigenvalues) == dof:
            residual = torch.zeros_like(residual)
        centre = (mean, total / n) if fit_intercept else None
        return cls(eigenvalues, coordinates, residual, square, dof, basis, resolution, centre, ratio, unseen)

    def coarser(self, factor: float) -> Spectrum:
        """Return the spectrum to a resolution that is larger by a factor."""
        resolution = factor * self.resolution
        seen = self.eigenvalues > resolution
        return replace(
            self,
            eigenvalues=self.eigenvalues[seen],
            coordinates=self.coordinates[:, seen],
            residual=self.residual + self.coordinates[:, ~seen].square().sum(1),
            basis=(*self.basis[:-1], self.basis[-1][:, seen]),
            resolution=resolution,
        )


def _ratio(mean: Tensor, variance: Tensor) -> float:
    """The mean of the features, a vector, in units of their spread."""
    return math.sqrt(float(mean.square().sum() / variance)) if bool(mean.any()) else 0.0


def _put_back(decomposed: Decomposed, mean: Tensor, total: Tensor, n: int, resolution: float) -> Decomposed:
    """Turn the decomposition of centred features into that of the features themselves.

    The Gram matrix of features with a large mean has no digits left for their differences. With the decomposition
    U Λ½ Vᵀ of the centred features,

        F = (U, 1/√n) B,  B = (Λ½ Vᵀ; √n mᵀ)

    where the first factor has orthonormal columns, and the singular values of B are computed without squaring them.
    In the basis of V and what m has beside it, B is a triangle with Λ½ on its diagonal.
    """
    eigenvalues, coordinates, basis = decomposed
    rank = len(eigenvalues)
    vectors = functools.reduce(torch.matmul, basis)
    inside, beside = torch.zeros_like(eigenvalues), mean
    for _ in range(2):  # once leaves rounding of the size of the mean
        part = beside @ vectors
        inside, beside = inside + part, beside - vectors @ part
    length = beside.norm()
    factor = torch.zeros(rank + 1, rank + 1, dtype=mean.dtype, device=mean.device)
    factor.diagonal()[:rank] = eigenvalues.sqrt()
    factor[rank] = math.sqrt(n) * torch.cat([inside, length[None]])
    left, singular, right = torch.linalg.svd(factor)
    kept = singular.square() > resolution
    coordinates = torch.hstack([coordinates, total[:, None] / math.sqrt(n)]) @ left[:, kept]
    vectors = torch.hstack([vectors, (beside / length.clamp(min=TINY))[:, None]])
    return singular[kept].square(), coordinates, (vectors, right[kept].T)


def centred_square(square: Tensor, total: Tensor, n: int) -> Tensor:
    """Σ (y − ȳ)² by column, exactly zero where only rounding is left of it."""
    centred = square - total.square() / n
    return torch.where(centred <= n * EPS * square, 0.0, centred)


def _may_vary(moments: Moments, spread: Tensor) -> bool:
    """Whether a feature that was taken for a constant may be none.

    Sums of n equal numbers were seen to be off by n · eps / 8 at most. Constants beside other features are common, so
    smaller differences count as rounding. Where no feature varies, only exact sums leave no doubt.
    """
    n, square = int(moments.count), moments.gram.diagonal()
    left = square - moments.feature_sum.square() / n
    if not bool((spread > 0).any()):
        return n > 1 and bool(left.any())
    return bool(((spread == 0) & (left > max(n / 4, _FEW) * EPS * square)).any())


def _resolved(eigenvalues: Tensor, dof: int, num_features: int, floor: float = 0.0) -> tuple[Tensor, float]:
    """Which of the ascending eigenvalues to keep, largest first, and the resolution below which none is meaningful."""
    largest = float(eigenvalues[-1]) if len(eigenvalues) else 0.0
    # A Gram matrix has no negative eigenvalues: they show how large the errors of its sums are.
    error = -2 * float(eigenvalues[0]) if len(eigenvalues) else 0.0
    resolution = max(num_features * EPS * largest, floor, error, TINY / EPS)
    number = min(int((eigenvalues > resolution).sum()), dof)
    last = len(eigenvalues) - 1
    return torch.arange(last, last - number, -1, device=eigenvalues.device), resolution
