"""The search finds the largest evidence over both precisions."""

import math

import numpy as np
import pytest
import torch
from oracles import one_hot, problem
from streamed import PATHS

from lightning_logme.functional import evidence, logme


def test_largest_of_several_maxima_is_found():
    # One direction explains a little at large t = α/β. Many weak directions explain the rest at small t.
    rng = np.random.default_rng(3)
    n, found = 60, 0
    for _ in range(40):
        scales = np.concatenate([[1e3], np.full(25, 10.0 ** rng.uniform(-1, 1))])
        features = rng.normal(size=(n, 26)) * scales
        y = features[:, :1] @ [1e-3] + (features[:, 1:] / scales[1:]) @ rng.normal(size=25) * rng.uniform(0.1, 0.6)
        y = y + rng.normal(size=n)
        left, singular, _ = np.linalg.svd(features, full_matrices=False)
        x2, grid = ((left.T @ y) ** 2)[:, None], np.exp(np.linspace(-25, 25, 20001))
        eigenvalues = singular[:, None] ** 2
        fit = y @ y - x2.sum() + (x2 * grid / (eigenvalues + grid)).sum(0)
        curve = -n / 2 * (np.log(2 * np.pi * fit / n) + 1) - np.log1p(eigenvalues / grid).sum(0) / 2
        found += ((curve[1:-1] > curve[:-2]) & (curve[1:-1] > curve[2:])).sum() > 1
        score = float(logme(features, y, "regression"))
        assert score == pytest.approx(curve.max() / n, abs=1e-6)
        assert score >= curve.max() / n - 1e-8
    assert found >= 3  # cases with several maxima


@pytest.mark.parametrize("seed", range(4))
@PATHS
@pytest.mark.parametrize(("n", "d"), [(200, 8), (60, 30)])
def test_slope_of_the_evidence_is_zero_at_the_precisions(path, n, d, seed):
    """At the maximum the score is flat, but the weights change with α/β to first order."""
    features, labels = problem(n, d, 6, seed, noise=2.0)
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    eigenvalues = singular**2
    result = path(features, labels)
    ratios = (result.alpha / result.beta).tolist()
    interior = [k for k, t in enumerate(ratios) if 0 < t < math.inf]
    assert interior
    for k in interior:
        t, y = ratios[k], one_hot(labels, 6)[:, k]
        x2 = (left.T @ y) ** 2
        used = eigenvalues / (eigenvalues + t)
        fit = y @ y - (x2 * used).sum()
        slope = used.sum() - n * (x2 * used * (1 - used)).sum() / fit
        assert abs(slope) < 1e-11 * used.sum()  # The difference of two sums, each with an error of about 100 eps.


def test_many_outputs_are_maximised_independently():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(240, 200))
    y = features @ rng.normal(size=(200, 600)) * rng.uniform(0.01, 0.3, size=600) + rng.normal(size=(240, 600))
    together = evidence(features, y, "regression")
    apart = [evidence(features, part, "regression") for part in np.split(y, 12, axis=1)]
    for name in ("per_output", "alpha", "beta", "effective_dim"):
        expected = torch.cat([getattr(result, name) for result in apart])
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-5, atol=0)


@PATHS
def test_maximum_beyond_a_valley_is_found(path):
    """From t = 0, where the features interpolate, the evidence first falls and then rises again."""
    rng = np.random.default_rng(0)
    n, valleys = 8, 0
    grid = np.exp(np.linspace(-25, 25, 4001))
    for _ in range(200):
        eigenvalues = 10 ** rng.uniform(-5, 5, size=(n, 1))
        x2 = eigenvalues ** rng.uniform(0, 1.2) * 10 ** rng.normal(0, rng.uniform(0, 1.5), size=(n, 1))
        fit = (x2 * grid / (eigenvalues + grid)).sum(0)
        curve = -n / 2 * (np.log(2 * np.pi * fit / n) + 1) - np.log1p(eigenvalues / grid).sum(0) / 2
        valleys += curve[: curve.argmax() + 1].min() < curve[0] - 1e-3
        score = float(path(np.diag(eigenvalues[:, 0] ** 0.5), x2[:, 0] ** 0.5, "regression").score)
        assert score == pytest.approx(curve.max() / n, abs=1e-4)
    assert valleys >= 5  # cases with a valley
