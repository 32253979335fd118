"""Moments are sums over rows: they add up, can be projected, and do not depend on how rows are split."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import one_hot, problem
from streamed import assert_same_moments, rows_of

from lightning_logme import Evidence
from lightning_logme.functional import evidence
from lightning_logme.scores.moments import Moments, Rows, moments_device

SHAPES = st.tuples(st.integers(4, 40), st.integers(1, 30), st.integers(2, 4), st.integers(0, 10_000))  # n, d, k, seed


def test_projected_moments_are_those_of_projected_features():
    features, labels = map(torch.as_tensor, problem(300, 600, 3))
    moments = Moments.zeros(600, 3).accumulate(rows_of(features, labels, "multiclass", 3))
    basis = torch.randn(600, 20, dtype=torch.float64)
    got = moments.project(basis)
    expected = Moments.zeros(20, 3).accumulate(rows_of(features @ basis, labels, "multiclass", 3))
    assert_same_moments(got, expected)


def test_sum_does_not_change_its_terms():
    features, labels = map(torch.as_tensor, problem(64, 5, 3))
    blocks = [Moments.zeros(5, 3).accumulate(rows_of(features[k::8], labels[k::8], num_outputs=3)) for k in range(8)]
    before = blocks[0].cross.clone()
    assert int(Moments.sum(blocks).count) == 64
    torch.testing.assert_close(blocks[0].cross, before)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, cuts=st.lists(st.integers(0, 40), max_size=5), task=st.sampled_from(["multiclass", "regression"]))
def test_sums_over_parts_add_up_to_the_whole(shape, cuts, task):
    n, d, k, seed = shape
    features, labels = map(torch.as_tensor, problem(n, d, k, seed))
    target = labels if task == "multiclass" else features[:, :1].sin() + labels[:, None]
    outputs = k if task == "multiclass" else 1
    bounds = sorted({0, n, *(cut for cut in cuts if cut < n)})
    total, parts = Moments.zeros(d, outputs), Moments.zeros(d, outputs)
    total = total.accumulate(rows_of(features, target, task, outputs))
    for start, stop in pairwise(bounds):
        part = Moments.zeros(d, outputs).accumulate(rows_of(features[start:stop], target[start:stop], task, outputs))
        parts.add_(part)
    for name, value in vars(total).items():
        torch.testing.assert_close(getattr(parts, name), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
def test_moments_of_a_large_batch_are_sums_over_its_rows(task):
    rng = np.random.default_rng(0)
    n, d, k = 9001, 3, 2
    features = rng.normal(size=(n, d))
    labels = rng.integers(k, size=n)
    left_out = rng.random(n) < 0.2
    dense = rng.normal(size=(n, k)) if task == "regression" else one_hot(labels, k)
    target = labels.copy() if task == "multiclass" else dense.astype(float if task == "regression" else int)
    kept = np.ones(n, bool)
    if task != "regression":
        target[left_out] = -1
        kept = ~left_out
    ignore_index = None if task == "regression" else -1
    rows = rows_of(torch.as_tensor(features), torch.as_tensor(target), task, k, ignore_index)
    sums = Moments.zeros(d, k).accumulate(rows)
    features, dense = features[kept], dense[kept]
    assert float(sums.count) == kept.sum()
    np.testing.assert_allclose(np.tril(sums.gram), np.tril(features.T @ features), rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(sums.cross, dense.T @ features, rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(sums.feature_sum, features.sum(0), rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(sums.target_sum, dense.sum(0), rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(sums.target_square, (dense**2).sum(0), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("n", [60, 400])
def test_upper_triangle_of_the_gram_matrix_is_not_read(n, fit_intercept):
    features, labels = problem(n, 300, 3, noise=3.0)
    rows = rows_of(torch.as_tensor(features), torch.as_tensor(labels), num_outputs=3)
    moments = Moments.zeros(300, 3).accumulate(rows)
    moments.gram.masked_fill_(torch.ones(300, 300).triu(1).bool(), math.nan)
    result = Evidence.from_moments(moments, "multiclass", fit_intercept)
    np.testing.assert_allclose(
        result.per_output, evidence(features, labels, fit_intercept=fit_intercept).per_output, rtol=1e-8
    )
    basis = np.random.default_rng(0).normal(size=(300, 4))
    projected = moments.project(torch.as_tensor(basis)).gram
    np.testing.assert_allclose(np.tril(projected), np.tril(basis.T @ features.T @ features @ basis), rtol=1e-8)


def test_moments_are_on_a_device_with_float64():
    assert moments_device(torch.device("mps")) == torch.device("cpu")
    assert moments_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_normalizing_keeps_nan_in_its_row():
    features = torch.ones(3, 2)
    features[1, 0] = math.nan
    found = Rows(features, torch.arange(3)).normalized().features.isnan()
    assert found.any(1).tolist() == [False, True, False]
    assert Rows(torch.empty(3, 0), torch.arange(3)).normalized().features.shape == (3, 0)
