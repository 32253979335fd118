"""Other implementations of LogME, for comparison.

- :func:`papers_logme`: the algorithm of the papers (You et al., ICML 2021 and JMLR 2022), written plainly in NumPy.
- :func:`transformer_ranker_logme`: the estimator of transformer-ranker on PyPI, if it is installed.

Both hold all features in memory at once, in float64.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]

_MAX_ROUNDS = 11
_TOLERANCE = 1e-3  # of α/β between rounds
_EPSILON = 1e-5  # keeps α and β finite


def papers_logme(features: Array, target: Array, num_classes: int) -> float:
    """Return LogME by one singular value decomposition, and a fixed-point iteration of α and β for each class."""
    features = features.astype(np.float64)
    left, sigma = _truncated_svd(features) if len(features) >= features.shape[1] else _thin_svd(features)
    evidences = [
        _fixed_point(left, sigma, (target == label).astype(np.float64), features.shape[1])
        for label in range(num_classes)
    ]
    return float(np.mean(evidences))


def _truncated_svd(features: Array) -> tuple[Array, Array]:
    """Return left singular vectors and squared singular values, computed from the D × D matrix FᵀF."""
    _, sigma, right = np.linalg.svd(features.T @ features)
    kept = np.sqrt(sigma) > 1e-10
    return (features @ right[kept].T) / np.sqrt(sigma[kept]), sigma[kept]


def _thin_svd(features: Array) -> tuple[Array, Array]:
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    return left, singular**2


def _fixed_point(left: Array, sigma: Array, y: Array, num_features: int) -> float:
    n, rank = left.shape
    x2 = (left.T @ y) ** 2
    outside = y @ y - x2.sum()
    alpha = beta = 1.0
    for _ in range(_MAX_ROUNDS):
        t = alpha / beta
        gamma = (sigma / (sigma + t)).sum()
        weight2 = (sigma * x2 / (sigma + t) ** 2).sum()
        residual2 = (x2 / (1 + sigma / t) ** 2).sum() + outside
        alpha = gamma / (weight2 + _EPSILON)
        beta = (n - gamma) / (residual2 + _EPSILON)
        if abs(alpha / beta - t) / t <= _TOLERANCE:
            break
    # Directions outside the rank contribute log(α + β·0) = log α, which cancels against the term of the prior.
    log_determinant = np.log(alpha + beta * sigma).sum() - rank * math.log(alpha)
    evidence = n * math.log(beta / (2 * math.pi)) - log_determinant - beta * residual2 - alpha * weight2
    return float(evidence) / (2 * n)


def transformer_ranker_logme() -> Callable[[Tensor, Tensor], float] | None:
    """Return the estimator of transformer-ranker; None if the package is not installed.

    Only the file of the estimator is imported: the package would import transformers and datasets.
    """
    spec = importlib.util.find_spec("transformer_ranker")
    if spec is None or not spec.submodule_search_locations:
        return None
    alias = "_transformer_ranker_estimators"
    package = ModuleType(alias)
    package.__path__ = [f"{location}/estimators" for location in spec.submodule_search_locations]
    sys.modules[alias] = package
    estimator = importlib.import_module(f"{alias}.logme").LogME
    return lambda features, target: estimator().fit(embeddings=features, labels=target)
