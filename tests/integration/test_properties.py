"""Scores of any shape, precision, split, task and edge case agree with a definition that shares no code."""

import warnings
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_logme import LogME
from lightning_logme.functional import evidence

TASKS = ["binary", "multiclass", "multilabel", "regression"]
OUTPUTS = 3


@st.composite
def problems(draw):
    """Draw features with edge cases, a target, its task, and the target as columns."""
    n, d = draw(st.integers(2, 40)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    task = draw(st.sampled_from(TASKS))
    labels = rng.integers(0, 2 if task == "binary" else OUTPUTS, n)
    features = draw(st.sampled_from([0.0, 0.5, 3.0])) * rng.normal(size=(OUTPUTS, d))[labels] + rng.normal(size=(n, d))
    for edge in draw(st.sets(st.sampled_from(["zero column", "equal columns", "equal rows", "sizes", "mean", "relu"]))):
        if edge == "zero column":
            features[:, rng.integers(d)] = 0
        elif edge == "equal columns":
            features[:, -1] = features[:, 0]
        elif edge == "equal rows":
            features[-1], labels[-1] = features[0], labels[0]
        elif edge == "sizes":
            features = features * np.logspace(0, draw(st.integers(-2, 2)), d)
        elif edge == "mean":
            features = features + draw(st.integers(-10, 10))
        else:
            features = np.maximum(features, 0)
    features = torch.as_tensor(features).to(draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])))
    columns = oracles.one_hot(labels, 2 if task == "binary" else OUTPUTS)
    target = torch.as_tensor(labels)
    if task == "multilabel":
        columns = (rng.random((n, OUTPUTS)) < 0.4).astype(float)
        target = torch.as_tensor(columns)
    elif task == "regression":
        columns = rng.normal(size=(n, OUTPUTS)) + columns
        target = torch.as_tensor(columns)
    return features, target, task, columns


def metric(task, features, **options):
    sizes = {"multiclass": {"num_classes": OUTPUTS}, "multilabel": {"num_labels": OUTPUTS}}
    return LogME(task, features.shape[1], **sizes.get(task, {"num_outputs": OUTPUTS}), **options)


def score_of(columns, features, fit_intercept):
    """Return the score by its definition; None if there is no evidence."""
    present = [y for y in columns.T if y.any()]
    if fit_intercept:
        constant = np.ptp(features, axis=0) == 0
        features = oracles.without_mean(np.where(constant, 0.0, features))
        present = [oracles.without_mean(y) for y in present]
        present = [y for y in present if np.abs(y).max() > 1e-12]
    return np.mean([oracles.by_singular_values(features, y) for y in present]) if present else None


def fits_by_chance(features, columns, fit_intercept):
    """Return whether fewer directions than samples fit perfectly, so that the evidence has no maximum."""
    if fit_intercept:
        features, columns = features - features.mean(0), columns - columns.mean(0)
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    left = left[:, singular > 1e-10 * singular.max(initial=0)]
    residual = np.square(columns - left @ (left.T @ columns)).sum(0)
    few = left.shape[1] < len(features) - fit_intercept
    return few and bool(((residual < 1e-9 * np.square(columns).sum(0)) & columns.any(0)).any())


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    problem=problems(),
    fit_intercept=st.booleans(),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    ignored=st.floats(0, 0.6),
    seed=st.integers(0, 1000),
)
def test_function_and_metric_agree_with_the_definition(problem, fit_intercept, cuts, ignored, seed):
    features, target, task, columns = problem
    keep = np.random.default_rng(seed).random(len(features)) >= ignored
    options = {}
    if task != "regression":
        target = target.clone()
        target[~keep] = -100
        options["ignore_index"] = -100
    else:
        keep[:] = True
    dense, columns = features.double().numpy()[keep], columns[keep]
    exclusive = task in ("binary", "multiclass")
    assume(keep.sum() >= 2)
    assume(not exclusive or columns.any(0).sum() >= 2)
    expected = score_of(columns, dense, fit_intercept)
    assume(expected is not None)
    assume(not fits_by_chance(dense, columns, fit_intercept))
    bounds = sorted({0, len(features), *(cut for cut in cuts if cut < len(features))})
    whole = metric(task, features, fit_intercept=fit_intercept, **options)
    other = whole.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LogME: the features are all zero")
        warnings.filterwarnings("ignore", message=".* because the features are constant")
        for index, (start, stop) in enumerate(pairwise(bounds)):
            (whole if index % 2 else other).update(features[start:stop], target[start:stop])
        whole.merge_state(other)
        number = {"multiclass": OUTPUTS, "multilabel": OUTPUTS}.get(task)
        direct = evidence(features, target, task, num_classes=number, fit_intercept=fit_intercept, **options)
        results = [direct, whole.evidence()]
    for result in results:
        assert result.num_samples == keep.sum()
        assert not result.saturated.any()
        assert float(result.score) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert float(result.gain) >= 0


@settings(max_examples=100, deadline=None)
@given(problem=problems(), seed=st.integers(0, 1000))
def test_order_of_samples_does_not_matter(problem, seed):
    features, target, task, _ = problem
    order = torch.as_tensor(np.random.default_rng(seed).permutation(len(features)))
    scores = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Only one class may be present.
        for rows in (slice(None), order):
            one = metric(task, features)
            for part in torch.arange(len(features)).split(6):
                one.update(features[rows][part], target[rows][part])
            scores.append(one.evidence())
    first, second = scores
    if not bool(first.saturated.any() or second.saturated.any()):
        torch.testing.assert_close(first.score, second.score, rtol=1e-6, atol=1e-7, equal_nan=True)
