"""From moments, or from rows, to the eigenbasis in which the evidence of every output is a function of one number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_logme.moments import Batch, Moments, add_gram_

EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny

_LOW_RANK = 0.8  # of D: with fewer samples than this, a low-rank factor comes cheaper than a full eigendecomposition
_PIVOTS = 64  # columns a step of the pivoted Cholesky factorisation takes at most
_ROUNDING = 4  # times eps and what a difference takes away: what may be left of it by rounding
_COMPARABLE = 0.1  # to the largest pivot: the size of the directions that a step takes


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
        resolution: the smallest eigenvalue that can be told from zero: D · eps · λ_max, and not less than what the
            removal of an intercept leaves by rounding.
        centre: the means of the features (D,) and of the targets (K,) where an intercept was taken out, else None.
    """

    eigenvalues: Tensor
    coordinates: Tensor
    residual: Tensor
    square: Tensor
    dof: int
    basis: tuple[Tensor, ...]
    resolution: float
    centre: tuple[Tensor, Tensor] | None

    @property
    def interpolates(self) -> bool:
        """Whether the features can reproduce any target exactly: as many directions as degrees of freedom."""
        return len(self.eigenvalues) == self.dof

    def to_features(self, coefficients: Tensor) -> Tensor:
        """Map (K, R) coefficients in the eigenbasis to (K, D) weights of the features."""
        for factor in reversed(self.basis):
            coefficients = coefficients @ factor.T
        return coefficients

    def leading(self, number: int) -> Tensor:
        """The first columns of V, at most so many: the directions of the largest eigenvalues."""
        *factors, columns = self.basis
        columns = columns[:, :number]
        for factor in reversed(factors):
            columns = factor @ columns
        return columns

    @classmethod
    def from_moments(cls, moments: Moments, fit_intercept: bool = False) -> Spectrum:
        """Decompose the Gram matrix; with fewer rows than features, only the subspace that the rows span."""
        n, d = int(moments.count), moments.num_features
        gram, cross, square, dof = moments.gram, moments.cross, moments.target_square, n
        centre, floor = None, 0.0
        if fit_intercept:
            mean = moments.feature_sum / n
            centre = mean, moments.target_sum / n
            gram = torch.addr(gram, moments.feature_sum, mean, alpha=-1)
            cross = torch.addr(cross, moments.target_sum, mean, alpha=-1)
            square = centred_square(square, moments.target_sum, n)
            dof = n - 1
            # Of a feature that is constant the difference leaves nothing but rounding, of the others some.
            varies = centred_square(moments.gram.diagonal(), moments.feature_sum, n) > 0
            gram, cross = gram.mul_(varies).mul_(varies[:, None]), cross.mul_(varies)  # new since addr
            floor = _ROUNDING * EPS * n * float((mean * varies).square().sum())

        basis: tuple[Tensor, ...]
        if n < _LOW_RANK * d:
            eigenvalues, basis = _low_rank_eigh(gram, n)
        else:
            eigenvalues, vectors = torch.linalg.eigh(gram)  # reads the lower triangle
            basis = (vectors,)
        kept, resolution = _resolved(eigenvalues, dof, d, floor)
        eigenvalues, basis = eigenvalues[kept], (*basis[:-1], basis[-1][:, kept])
        coordinates = cross
        for factor in basis:
            coordinates = coordinates @ factor
        coordinates = coordinates / eigenvalues.sqrt()
        return cls._assemble(eigenvalues, coordinates, square, dof, basis, resolution, centre)

    @classmethod
    def from_rows(cls, batch: Batch, num_outputs: int, fit_intercept: bool = False) -> Spectrum:
        """Decompose FFᵀ (n × n): cheaper than the Gram matrix where n < D, and no product of the targets is needed."""
        batch = batch.kept()
        rows, target = batch.features.detach().double(), batch.dense_target(num_outputs)
        (n, d), dof = rows.shape, len(rows)
        square = target.square().sum(0)
        centre = None
        if fit_intercept:
            square = centred_square(square, target.sum(0), n)
            centre = rows.mean(0), target.mean(0)
            varies = centred_square(rows.square().sum(0), rows.sum(0), n) > 0
            rows, target, dof = (rows - centre[0]).mul_(varies), target - centre[1], n - 1
        eigenvalues, left = torch.linalg.eigh(_gram(rows.T))
        kept, resolution = _resolved(eigenvalues, dof, d)
        eigenvalues, left = eigenvalues[kept], left[:, kept]
        basis = (rows.T, left / eigenvalues.sqrt())
        return cls._assemble(eigenvalues, target.T @ left, square, dof, basis, resolution, centre)

    @classmethod
    def _assemble(
        cls,
        eigenvalues: Tensor,
        coordinates: Tensor,
        square: Tensor,
        dof: int,
        basis: tuple[Tensor, ...],
        resolution: float,
        centre: tuple[Tensor, Tensor] | None,
    ) -> Spectrum:
        size = max(dof, len(basis[0]))
        residual = square - coordinates.square().sum(1)
        # What is left of q by rounding alone is a perfect fit, and as many directions as rows reach everything.
        residual = torch.where(residual <= size * EPS * square, 0.0, residual)
        if len(eigenvalues) == dof:
            residual = torch.zeros_like(residual)
        return cls(eigenvalues, coordinates, residual, square, dof, basis, resolution, centre)


def centred_square(square: Tensor, total: Tensor, n: int) -> Tensor:
    """Σ (y − ȳ)² by column, exactly zero where only rounding is left of it."""
    centred = square - total.square() / n
    return torch.where(centred <= n * EPS * square, 0.0, centred)


def _resolved(eigenvalues: Tensor, dof: int, num_features: int, floor: float = 0.0) -> tuple[Tensor, float]:
    """Which of the ascending eigenvalues to keep, largest first, and the resolution below which none is meaningful."""
    largest = float(eigenvalues[-1]) if len(eigenvalues) else 0.0
    resolution = max(num_features * EPS * largest, floor, TINY / EPS)  # what is smaller was summed with fewer digits
    number = min(int((eigenvalues > resolution).sum()), dof)
    last = len(eigenvalues) - 1
    return torch.arange(last, last - number, -1, device=eigenvalues.device), resolution


def _low_rank_eigh(gram: Tensor, rank: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Eigenvalues (ascending) and eigenvectors, in two factors, of a Gram matrix of at most this rank."""
    factor = _pivoted_cholesky(gram, rank)
    eigenvalues, vectors = torch.linalg.eigh(_gram(factor))
    return eigenvalues, (
        factor,
        vectors / eigenvalues.clamp(min=TINY).sqrt(),
    )  # those that are nearly zero will be dropped


def _gram(rows: Tensor) -> Tensor:
    """The lower triangle of FᵀF."""
    return add_gram_(rows.new_zeros(rows.shape[1], rows.shape[1]), rows)


def _pivoted_cholesky(gram: Tensor, rank: int) -> Tensor:
    """L (D, at most rank) with G = L Lᵀ, from the lower triangle of a positive semidefinite G.

    The columns with the largest diagonal of what is still unexplained are taken a block at a time, and within the
    block only directions of comparable size, which keeps rounding errors from being magnified; the others come back in
    a later block. See Higham 2002, "Accuracy and Stability of Numerical Algorithms", ch. 10.3 for pivoting by the
    diagonal.
    """
    left_over = gram.diagonal().clone()
    noise = EPS * left_over.max()
    factor = gram.new_empty(len(gram), rank)
    size = 0
    while size < rank:
        largest, pivots = left_over.topk(min(_PIVOTS, rank - size))
        pivots = pivots[largest > noise].sort().values  # in the order of memory
        if len(pivots) == 0:
            break
        columns = _columns(gram, pivots).addmm_(factor[:, :size], factor[pivots, :size].T, alpha=-1)
        eigenvalues, vectors = torch.linalg.eigh(columns[pivots])
        kept = eigenvalues > _COMPARABLE * largest[0]
        if not kept.any():  # the running diagonal took rounding for more: look again at what is really there
            left_over[pivots] = columns[pivots].diagonal().clamp(min=0)
            continue
        new = columns @ (vectors[:, kept] / eigenvalues[kept].sqrt())
        factor[:, size : size + new.shape[1]] = new
        size += new.shape[1]
        left_over = (left_over - new.square().sum(1)).clamp_(min=0)
    return factor[:, :size]


def _columns(lower: Tensor, index: Tensor) -> Tensor:
    """Columns of a symmetric matrix given its lower triangle."""
    below = torch.arange(len(lower), device=lower.device)[:, None] >= index
    return torch.where(below, lower[:, index], lower[index].T)
