"""The search for the largest evidence: a global search over one number per output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_logme.scores.spectrum import Spectrum

# The largest ratio of t to the largest eigenvalue. Beyond it, no target can gain more than 1e-10.
_LARGEST_RATIO = 1e10
# Each term of the slope is a sigmoid in log t of unit scale, so that steps of 0.29 bracket the zeros of the slope.
_POINTS_PER_DECADE = 8
# Newton's method ends after a step in log t below this. It converges quadratically, so the next step would be rounding.
_NEWTON_TOLERANCE = 1e-10
# After so many steps, bisection alone has narrowed a bracket down to rounding errors.
_MAX_NEWTON_STEPS = 60
# Temporary tensors of this many numbers are always allowed.
_MIN_TEMPORARY = 2**16


class Maximum(NamedTuple):
    """The largest evidence of each output. It is NaN for an output whose target is zero everywhere.

    Attributes:
        log_evidence: (K,) the largest log evidence.
        log_t: (K,) log α/β at the maximum: inf if the features explain nothing, −inf if they interpolate the target.
        saturated: (K,) bool, True if the evidence still grows at the resolution of the Gram matrix, where the search
            ends.
        null: (K,) the log evidence of features that explain nothing.
    """

    log_evidence: Tensor
    log_t: Tensor
    saturated: Tensor
    null: Tensor


def maximise(spectrum: Spectrum) -> Maximum:
    """Find the largest log evidence of each output.

    For fixed t = α/β, the best β is n/Q(t) with Q(t) = r₀ + Σ x² t/(λ+t), the least value of ‖Fw − y‖² + t‖w‖². This
    leaves a function of t alone (MacKay 1992; Bishop 2006, eq. 3.86 with β eliminated):

        L(t) = −n/2 (log(2π Q(t)/n) + 1) − ½ Σ log(1 + λ/t)

    It can have several local maxima. The zeros of its slope are bracketed on a grid for all outputs at once, each zero
    is refined, and the best is compared with the two ends. At t = ∞, the evidence is that of noise. For t → 0, it is
    finite if the features interpolate the target; else the search ends at the resolution of the Gram matrix.
    """
    null = best = torch.where(spectrum.square > 0, _gaussian(spectrum.square, spectrum.dof), math.nan)
    log_t = torch.where(best.isnan(), best, math.inf)
    if len(spectrum.eigenvalues) == 0:
        return Maximum(best, log_t, torch.zeros_like(best, dtype=torch.bool), null)

    low = math.log(spectrum.resolution)
    interpolates = len(spectrum.eigenvalues) == spectrum.dof  # as many directions as degrees of freedom
    lowest = _interpolation_evidence(spectrum) if interpolates else _evidence_at(spectrum, low)
    better = lowest > best
    best = torch.where(better, lowest, best)
    log_t = torch.where(better, -math.inf if interpolates else low, log_t)

    for output, left, right in _brackets(spectrum, low):
        at, value = _refine(spectrum, output, left, right)
        largest = best.scatter_reduce(0, output, value, "amax")
        wins = (value == largest[output]) & (value > best[output])
        best[output[wins]] = value[wins]
        log_t[output[wins]] = at[wins]
    return Maximum(best, log_t, log_t == low, null)


def _gaussian(square: Tensor, dof: int) -> Tensor:
    """Return the log density of ``dof`` residuals with this sum of squares, under Gaussian noise of the best size."""
    return -0.5 * dof * (torch.log(2 * math.pi * square / dof) + 1)


def _interpolation_evidence(spectrum: Spectrum) -> Tensor:
    """Return the limit of L for t → 0, if there are as many eigenvalues as samples: with Q(t) ≈ t Σ x²/λ, t cancels."""
    scaled = spectrum.coordinates.square() / spectrum.eigenvalues
    return _gaussian(scaled.sum(1), spectrum.dof) - 0.5 * spectrum.eigenvalues.log().sum()


def _evidence_at(spectrum: Spectrum, log_t: float) -> Tensor:
    """Return L(t) of each output."""
    offset = log_t - spectrum.eigenvalues.log()
    fit = spectrum.residual + spectrum.coordinates.square() @ offset.sigmoid()
    return _gaussian(fit, spectrum.dof) + 0.5 * logsigmoid(offset).sum()


def _brackets(spectrum: Spectrum, low: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield chunks of (output, left, right): intervals of log t in which L changes from rising to falling."""
    log_eigenvalues = spectrum.eigenvalues.log()
    high = float(log_eigenvalues[0]) + math.log(_LARGEST_RATIO)
    points = math.ceil((high - low) / math.log(10) * _POINTS_PER_DECADE) + 1
    grid = torch.linspace(low, high, points, dtype=torch.float64, device=log_eigenvalues.device)

    unused = (grid[:, None] - log_eigenvalues).sigmoid()  # t/(λ+t), (T, R)
    used = (log_eigenvalues - grid[:, None]).sigmoid()  # λ/(λ+t)
    x2 = spectrum.coordinates.square()
    fit = spectrum.residual[:, None] + x2 @ unused.T  # Q, (K, T)
    slope = used.sum(1) - spectrum.dof * (x2 @ (used * unused).T) / fit
    rising = slope > 0
    output, index = (rising[:, :-1] & ~rising[:, 1:]).nonzero().unbind(1)

    number = len(spectrum.eigenvalues)
    size = max(number // 4, _MIN_TEMPORARY // number, 1)  # Temporary tensors stay below a quarter of the Gram matrix.
    for start in range(0, len(output), size):
        chunk = slice(start, start + size)
        yield output[chunk], grid[index[chunk]], grid[index[chunk] + 1]


def _refine(spectrum: Spectrum, output: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return log t and L at the maximum in each bracket: Newton's method on dL/dlog t, or bisection to stay inside."""
    x2, residual = spectrum.coordinates[output].square(), spectrum.residual[output]
    log_eigenvalues, dof = spectrum.eigenvalues.log(), spectrum.dof
    at = (left + right) / 2
    for _ in range(_MAX_NEWTON_STEPS):
        used = (log_eigenvalues - at[:, None]).sigmoid()
        both = used * (1 - used)
        fit = residual + (x2 * (1 - used)).sum(1)
        x2_both = x2 * both
        first = x2_both.sum(1) / fit  # dlog Q/dlog t
        second = (x2_both * (2 * used - 1)).sum(1) / fit - first.square()
        slope = used.sum(1) - dof * first
        curvature = -both.sum(1) - dof * second
        left, right = torch.where(slope > 0, at, left), torch.where(slope > 0, right, at)
        newton = at - slope / curvature
        inside = (newton >= left) & (newton <= right)  # False for NaN. A step that rounds to zero counts as inside.
        proposal = torch.where(inside, newton, (left + right) / 2)
        moved = (proposal - at).abs().max()
        at = proposal
        if moved < _NEWTON_TOLERANCE:
            break
    offset = at[:, None] - log_eigenvalues
    fit = residual + (x2 * offset.sigmoid()).sum(1)
    return at, _gaussian(fit, dof) + 0.5 * logsigmoid(offset).sum(1)
