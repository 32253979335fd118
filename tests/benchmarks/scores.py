"""Scores of features and labels that may predict, before any fine-tuning, which backbone suits a task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from lightning_logme.functional import evidence
from tests.benchmarks import peers
from tests.benchmarks.frozen import Array, Frozen

Score = Callable[[Frozen], float]

_FOLDS = 5
_NEIGHBOURS = 10
_PENALTIES = (1e-3, 1e-2, 1e-1, 1)  # of logistic regression on standardised features: C
_CENTRED = {"fit_intercept": True}


def logme(data: Frozen, **options: Any) -> float:
    return float(evidence(data.features, data.target, task_of(data), **options).score)


def gain(data: Frozen, **options: Any) -> float:
    return float(evidence(data.features, data.target, task_of(data), **options).gain)


def at_a_tenth(data: Frozen) -> float:
    count = len(data.target) // 10
    return logme(replace(data, features=data.features[:count], target=data.target[:count]))


def parameters(data: Frozen) -> float:
    return float(data.parameters)


def neighbours(data: Frozen) -> float:
    """Return the accuracy or R² of nearest neighbours. Features of random networks look alike, so they are centred."""
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    kind = KNeighborsRegressor if task_of(data) == "regression" else KNeighborsClassifier
    centred = _with(data, (data.features - data.features.mean(0)) / data.features.std())
    return float(np.mean(_cross_validated(lambda: kind(_NEIGHBOURS, metric="cosine"), centred)))


def papers(data: Frozen) -> float:
    if task_of(data) == "multiclass":
        return peers.papers_logme(data.features, data.target, int(data.target.max()) + 1)
    decompose = peers._truncated_svd if len(data.target) >= data.features.shape[1] else peers._thin_svd
    left, sigma = decompose(data.features.astype(np.float64))
    return peers._fixed_point(left, sigma, data.target.astype(np.float64), data.features.shape[1])


def standardised(data: Frozen) -> float:
    spread = data.features.std(0)
    return logme(_with(data, (data.features - data.features.mean(0)) / np.where(spread > 0, spread, 1)), **_CENTRED)


def unit_rows(data: Frozen, **options: Any) -> float:
    norm = np.linalg.norm(data.features, axis=1, keepdims=True)
    return logme(_with(data, data.features / np.where(norm > 0, norm, 1)), **options)


def mean_over_layers(data: Frozen) -> float:
    return fmean(_layer_scores(data))


def best_layer(data: Frozen) -> float:
    return max(_layer_scores(data))


def of_layer_mean(data: Frozen) -> float:
    """Return LogME of the mean over layers, if all layers have the same shape; else of the features."""
    if len({layer.shape for layer in data.layers}) != 1:
        return logme(data)
    return logme(_with(data, np.mean(data.layers, 0)))


def probe(data: Frozen) -> float:
    """Return the accuracy of logistic regression, or R² of ridge regression, with the best penalty."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if task_of(data) == "regression":
        models = [lambda: make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11)))]
    else:
        models = [
            lambda c=c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=200)) for c in _PENALTIES
        ]
    return max(float(np.mean(_cross_validated(model, data))) for model in models)


def _cross_validated(model: Callable[[], Any], data: Frozen) -> Array:
    from sklearn.model_selection import KFold, cross_val_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some fits do not converge to the last digit.
        return cross_val_score(model(), data.features, data.target, cv=KFold(_FOLDS))  # The order is already random.


def task_of(data: Frozen) -> Any:
    return "multiclass" if np.issubdtype(data.target.dtype, np.integer) else "regression"


def _with(data: Frozen, features: Array) -> Frozen:
    return replace(data, features=features)


def _layer_scores(data: Frozen) -> list[float]:
    return [logme(_with(data, layer)) for layer in data.layers] or [logme(data)]


SCORES: dict[str, Score] = {
    "LogME": logme,
    "LogME, intercept": lambda data: logme(data, **_CENTRED),
    "LogME, 10 % of the data": at_a_tenth,
    "parameters": parameters,
    f"{_NEIGHBOURS} nearest neighbours": neighbours,
    "papers' code": papers,
}
VARIANTS: dict[str, Score] = {
    "standardised, intercept": standardised,
    "rows of length 1": unit_rows,
    "rows of length 1, intercept": lambda data: unit_rows(data, **_CENTRED),
    "mean of the layers' scores": mean_over_layers,
    "best layer's score": best_layer,
    "mean of the layers' features": of_layer_mean,
}
