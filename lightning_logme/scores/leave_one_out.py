"""Leave-one-out predictions: the linear head, fitted without a sample, predicts that sample."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_logme.scores.moments import Rows
from lightning_logme.scores.spectrum import Spectrum

# Rows that are projected at once. Several matrices of this many rows and K columns are in memory.
_ROWS = 512
# If 1 − leverage is smaller than this, it has lost half of its digits.
_SMALL = 1e-8


@torch.no_grad()
def predict_without_each(rows: Rows, spectrum: Spectrum, ratio: Tensor) -> Tensor:
    """Return the leave-one-out predictions (m, K) of m samples, float64.

    The head is a ridge regression. Its ridge t = α/β is chosen once, by the evidence of all samples. With the thin
    singular value decomposition F = U S Vᵀ and row z of U, a sample with target y has the leverage h = Σ z² λ/(λ+t),
    plus 1/n with an intercept. Its leave-one-out residual is e = (y − ŷ)/(1 − h) (PRESS, Allen 1974; Hastie, Tibshirani
    and Friedman 2009, section 7.10). The prediction is y − e. If the head interpolates the sample, y − ŷ and 1 − h both
    vanish, and e = Σ z x/(λ+t) / Σ z²/(λ+t).

    Args:
        rows: some or all of the samples behind the spectrum, in any order.
        spectrum: the spectrum of all samples.
        ratio: (K,) t = α/β of each output. NaN counts as infinite: such an output predicts the mean.
    """
    predictions = [_of_some(rows[start : start + _ROWS], spectrum, ratio) for start in range(0, len(rows), _ROWS)]
    return torch.cat(predictions) if predictions else ratio.new_empty(0, len(ratio))


def _of_some(rows: Rows, spectrum: Spectrum, ratio: Tensor) -> Tensor:
    features, target = rows.features.double(), rows.dense_target(len(ratio))
    eigenvalues, x, t = spectrum.eigenvalues, spectrum.coordinates, ratio.nan_to_num(torch.inf, torch.inf)[:, None]
    mean, rest = torch.zeros_like(target[:1]), 1.0
    if spectrum.centre is not None:
        features, mean, rest = features - spectrum.centre[0], spectrum.centre[1], 1 - 1 / (spectrum.dof + 1)
    z = features
    for factor in spectrum.basis:
        z = z @ factor
    z = z / eigenvalues.sqrt()
    used = eigenvalues / (eigenvalues + t)  # (K, R)
    y = target - mean
    residual, remaining = y - z @ (x * used).T, rest - z.square() @ used.T
    # With as many directions as degrees of freedom, a small t leaves only rounding errors in these two.
    interpolates = ((remaining < _SMALL) | (len(eigenvalues) == spectrum.dof)) & t.isfinite().T
    if bool(interpolates.any()):
        unused = (eigenvalues[-1:] + t) / (eigenvalues + t)
        residual = torch.where(interpolates, z @ (x * unused).T, residual)
        remaining = torch.where(interpolates, z.square() @ unused.T, remaining)
    return target - residual / remaining
