"""The eigendecomposition of moments or rows. It makes the evidence of each output a function of one number."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_logme.scores.moments import Moments, Rows, add_gram_

EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny

# The rounding error of a difference is at most this many times eps times the subtracted number.
_ROUNDING = 4
# Features whose mean is more than this many times their spread are centred first, at the cost of an SVD.
_LARGE_MEAN = 100
# The relative error of a sum of a few numbers, in units of eps.
_FEW = 16

Decomposed = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # the eigenvalues, coordinates and basis of a Spectrum


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The non-zero eigenvalues of the Gram matrix, and the targets in its eigenbasis.

    With the thin singular value decomposition F = U S Vᵀ of the features, λ = S² and x = Uᵀy.

    Attributes:
        eigenvalues: (R,) λ above the resolution, descending.
        coordinates: (K, R) x of each output.
        residual: (K,) r₀ = ‖y‖² − ‖x‖², which no linear map of the features explains.
        square: (K,) q = ‖y‖².
        dof: degrees of freedom: n, or n − 1 with an intercept.
        basis: matrices whose product is V (D, R). The product itself is never needed.
        resolution: eigenvalues below it may be rounding errors: D · eps · λ_max. If the features were centred first,
            λ_max is that of centred features, and the resolution is at least the rounding error of centring.
        centre: the means of the features (D,) and of the targets (K,); None without an intercept.
        ratio: the length of the mean of the features, divided by their spread.
        unseen: the sum of the eigenvalues below the resolution; infinite if it is not known whether features vary.
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

    def to(self, device: torch.device | str) -> Spectrum:
        """Return the same spectrum on another device."""
        centre = None if self.centre is None else (self.centre[0].to(device), self.centre[1].to(device))
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, basis=tuple(factor.to(device) for factor in self.basis), centre=centre, **moved)

    def to_features(self, coefficients: Tensor) -> Tensor:
        """Return the (K, D) weights of the features for (K, R) coefficients in the eigenbasis."""
        for factor in reversed(self.basis):
            coefficients = coefficients @ factor.T
        return coefficients

    def leading(self, number: int) -> Tensor:
        """Return the first columns of V, at most ``number``: the directions of the largest eigenvalues."""
        *factors, columns = self.basis
        return functools.reduce(torch.matmul, [*factors, columns[:, :number]])

    @classmethod
    def from_moments(cls, moments: Moments, fit_intercept: bool = False) -> Spectrum:
        """Return the spectrum, computed from the Gram matrix (D × D)."""
        n, d = int(moments.count), len(moments.gram)
        gram, cross, floor = moments.gram, moments.cross, 0.0
        mean, spread = moments.feature_sum / n, centred_square(gram.diagonal(), moments.feature_sum, n)
        ratio = _ratio(mean, spread.sum() / n)
        centred = fit_intercept or ratio > _LARGE_MEAN
        if centred:
            # After centring, a constant feature holds only rounding errors, so it is set to zero. For the other
            # features, `floor` bounds the rounding errors.
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
        """Return the spectrum, computed from FFᵀ (n × n). If n < D, this is far cheaper than the Gram matrix."""
        features, target = rows.features.detach().double(), rows.dense_target(num_outputs)
        (n, d), mean, target_sum, square = features.shape, features.mean(0), target.sum(0), target.square().sum(0)
        spread = centred_square(features.square().sum(0), n * mean, n)
        ratio = _ratio(mean, spread.sum() / n)
        centred = fit_intercept or ratio > _LARGE_MEAN
        if centred:
            varies = (features != features[0]).any(0)  # After centring, constant features hold rounding errors.
            features, target = (features - mean).mul_(varies), target - target_sum / n
            exact = _ratio(mean, features.square().sum() / n)
            ratio = exact if exact > _LARGE_MEAN else ratio
        gram = add_gram_(features.new_zeros(n, n), features.T)
        eigenvalues, left = torch.linalg.eigh(gram)
        kept, resolution = _resolved(eigenvalues, n - centred, d)
        eigenvalues, left = eigenvalues[kept], left[:, kept]
        decomposed = eigenvalues, target.T @ left, (features.T, left / eigenvalues.sqrt())
        unseen = float(gram.diagonal().sum() - eigenvalues.sum())
        return cls._assemble(decomposed, mean, target_sum, square, n, fit_intercept, resolution, ratio, unseen)

    @classmethod
    def _assemble(
        cls,
        decomposed: Decomposed,
        mean: Tensor,
        target_sum: Tensor,
        square: Tensor,
        n: int,
        fit_intercept: bool,
        resolution: float,
        ratio: float,
        unseen: float,
    ) -> Spectrum:
        """Return the spectrum, given the decomposition of features that may be centred."""
        dof = n
        if fit_intercept:
            square, dof = centred_square(square, target_sum, n), n - 1
        elif ratio > _LARGE_MEAN:
            decomposed = _restore_mean(decomposed, mean, target_sum, n, resolution)
        eigenvalues, coordinates, basis = decomposed
        size = max(dof, len(basis[0]))
        residual = square - coordinates.square().sum(1)
        # If the residual is only rounding, the fit is perfect. It always is with as many directions as degrees
        # of freedom.
        residual = torch.where(residual <= size * EPS * square, 0.0, residual)
        if len(eigenvalues) == dof:
            residual = torch.zeros_like(residual)
        centre = (mean, target_sum / n) if fit_intercept else None
        return cls(eigenvalues, coordinates, residual, square, dof, basis, resolution, centre, ratio, unseen)

    def coarser(self, factor: float) -> Spectrum:
        """Return the spectrum without the eigenvalues below ``factor`` times the resolution."""
        resolution = factor * self.resolution
        kept = self.eigenvalues > resolution
        return replace(
            self,
            eigenvalues=self.eigenvalues[kept],
            coordinates=self.coordinates[:, kept],
            residual=self.residual + self.coordinates[:, ~kept].square().sum(1),
            basis=(*self.basis[:-1], self.basis[-1][:, kept]),
            resolution=resolution,
        )


def _ratio(mean: Tensor, variance: Tensor) -> float:
    """Return the length of the mean of the features, divided by their spread."""
    return math.sqrt(float(mean.square().sum() / variance)) if bool(mean.any()) else 0.0


def _restore_mean(decomposed: Decomposed, mean: Tensor, target_sum: Tensor, n: int, resolution: float) -> Decomposed:
    """Return the decomposition of the features themselves, given that of the centred features.

    The Gram matrix of features with a large mean m has no digits left for their differences. With the decomposition
    U Λ½ Vᵀ of the centred features,

        F = (U, 1/√n) B,  B = (Λ½ Vᵀ; √n mᵀ)

    where the first factor has orthonormal columns, and the singular values of B are computed without squaring them. In
    the basis of V and the part of m orthogonal to V, B is triangular with Λ½ on its diagonal.
    """
    eigenvalues, coordinates, basis = decomposed
    number = len(eigenvalues)
    vectors = functools.reduce(torch.matmul, basis)
    inside, orthogonal = torch.zeros_like(eigenvalues), mean
    for _ in range(2):  # A single pass leaves rounding errors of the size of the mean.
        projection = orthogonal @ vectors
        inside, orthogonal = inside + projection, orthogonal - vectors @ projection
    length = orthogonal.norm()
    factor = torch.zeros(number + 1, number + 1, dtype=mean.dtype, device=mean.device)
    factor.diagonal()[:number] = eigenvalues.sqrt()
    factor[number] = math.sqrt(n) * torch.cat([inside, length[None]])
    left, singular, right = torch.linalg.svd(factor)
    kept = singular.square() > resolution
    coordinates = torch.hstack([coordinates, target_sum[:, None] / math.sqrt(n)]) @ left[:, kept]
    vectors = torch.hstack([vectors, (orthogonal / length.clamp(min=TINY))[:, None]])
    return singular[kept].square(), coordinates, (vectors, right[kept].T)


def centred_square(square: Tensor, total: Tensor, n: int) -> Tensor:
    """Return Σ (y − ȳ)² of each column, and exactly zero if it is only rounding."""
    centred = square - total.square() / n
    return torch.where(centred <= n * EPS * square, 0.0, centred)


def _may_vary(moments: Moments, spread: Tensor) -> bool:
    """Return whether a feature that counts as constant may vary.

    In experiments, the relative error of a sum of n equal numbers was n · eps / 8 at most. Constant features beside
    varying ones are common, so small differences count as rounding errors there. If no feature varies at all, every
    difference counts.
    """
    n, square = int(moments.count), moments.gram.diagonal()
    difference = square - moments.feature_sum.square() / n
    if not bool((spread > 0).any()):
        return n > 1 and bool(difference.any())
    return bool(((spread == 0) & (difference > max(n / 4, _FEW) * EPS * square)).any())


def _resolved(eigenvalues: Tensor, dof: int, num_features: int, floor: float = 0.0) -> tuple[Tensor, float]:
    """Return the positions of the ascending eigenvalues to keep, largest first, and the resolution."""
    largest = float(eigenvalues[-1]) if len(eigenvalues) else 0.0
    # An exact Gram matrix has no negative eigenvalues. So a negative one shows the size of the rounding errors.
    error = -2 * float(eigenvalues[0]) if len(eigenvalues) else 0.0
    resolution = max(num_features * EPS * largest, floor, error, TINY / EPS)
    number = min(int((eigenvalues > resolution).sum()), dof)
    last = len(eigenvalues) - 1
    return torch.arange(last, last - number, -1, device=eigenvalues.device), resolution
