"""Small slips in the mathematics that no other test notices."""

import math

import numpy as np
import pytest
import torch
from oracles import log_density, one_hot, problem, without_mean
from streamed import rows_of, streamed

from lightning_logme import Evidence
from lightning_logme.features.labels import Labels, Target
from lightning_logme.functional import evidence, logme
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.moments import Moments
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.validation import Pass

PATHS = pytest.mark.parametrize("path", [evidence, streamed], ids=["rows", "moments"])


def test_one_label_is_enough_for_multilabel():
    features, labels = problem(40, 5, 2)
    column = labels[:, None]
    result = evidence(features, column, "multilabel", num_classes=1)
    np.testing.assert_allclose(result.per_output, evidence(features, labels).per_output[1:], rtol=1e-12)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize(("n", "d"), [(60, 5), (20, 40)])
@PATHS
def test_unit_of_the_target_is_a_shift_of_the_score(path, n, d, scale, fit_intercept):
    """log p(c·y) = log p(y) − n log c, and the same directions are of use."""
    features, labels = problem(n, d, 3, noise=3.0)
    y = np.stack([labels, labels == 1], 1) + np.random.default_rng(0).normal(size=(n, 2))
    options = {"num_outputs": 2} if path is streamed else {}
    plain = path(features, y, "regression", fit_intercept=fit_intercept, **options)
    scaled = path(features, y * scale, "regression", fit_intercept=fit_intercept, **options)
    np.testing.assert_allclose(scaled.per_output, plain.per_output - math.log(scale), rtol=1e-7)
    np.testing.assert_allclose(scaled.effective_dim, plain.effective_dim, rtol=1e-4)
    np.testing.assert_allclose(scaled.weight, plain.weight * scale, rtol=1e-4, atol=1e-7 * scale)
    assert torch.equal(scaled.saturated, plain.saturated)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize(("n", "d"), [(60, 5), (20, 40)])
@PATHS
def test_unit_of_the_features_changes_nothing(path, n, d, scale):
    features, labels = problem(n, d, 3, noise=3.0)
    plain, scaled = path(features, labels), path(features * scale, labels)
    np.testing.assert_allclose(scaled.per_output, plain.per_output, rtol=1e-9)
    np.testing.assert_allclose(scaled.spectrum, plain.spectrum * scale**2, rtol=1e-9)
    np.testing.assert_allclose(scaled.weight * scale, plain.weight, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("n", [300, 3000])
@PATHS
def test_perfect_fits_of_many_rows_are_flagged(path, n):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(n, 3))
        result = path(features, features @ rng.normal(size=3), "regression")
        assert result.saturated.all()


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
def test_moments_of_a_huge_batch_are_the_sums_over_its_rows(task):
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


def test_many_outputs_are_maximised_as_each_would_be_alone():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(240, 200))
    y = features @ rng.normal(size=(200, 600)) * rng.uniform(0.01, 0.3, size=600) + rng.normal(size=(240, 600))
    together = evidence(features, y, "regression")
    apart = [evidence(features, part, "regression") for part in np.split(y, 12, axis=1)]
    for name in ("per_output", "alpha", "beta", "effective_dim"):
        expected = torch.cat([getattr(result, name) for result in apart])
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-5, atol=0)


def test_no_intercept_unless_asked_for():
    features, labels = map(torch.as_tensor, problem(30, 5, 3))
    rows = rows_of(features + 2, labels, num_outputs=3)
    moments = Moments.zeros(5, 3).accumulate(rows)
    expected = evidence(features + 2, labels)
    for result in (Evidence.from_moments(moments, "multiclass"), Evidence.from_rows(rows, 3, "multiclass")):
        torch.testing.assert_close(result.per_output, expected.per_output, rtol=1e-9, atol=0)
        assert result.bias is None


def test_nan_in_one_of_several_targets_is_named():
    target = torch.randn(30, 3)
    target[4, 1] = math.nan
    with pytest.warns(UserWarning, match="targets contain NaN or Inf"):
        assert math.isnan(streamed(torch.randn(30, 4), target, "regression").score)


@pytest.mark.parametrize("d", [1, 2, 5])
@PATHS
def test_two_samples_with_an_intercept_are_one_contrast(path, d):
    rng = np.random.default_rng(d)
    features, y = rng.normal(size=(2, d)), rng.normal(size=2)
    expected = evidence(without_mean(features), without_mean(y[:, None]), "regression")
    result = path(features, y, "regression", fit_intercept=True)
    np.testing.assert_allclose(result.per_output, expected.per_output, rtol=1e-9)
    assert torch.isfinite(result.score)


def test_tokens_are_samples():
    features, labels = problem(60, 5, 3)
    tokens, target = features.reshape(12, 5, 5), labels.reshape(12, 5)
    assert float(logme(tokens, target)) == pytest.approx(float(logme(features, labels)), rel=1e-12)
    with pytest.raises(ValueError, match="features must have shape"):
        logme(tokens, target % 2, "multilabel")
    with pytest.raises(ValueError, match="target must have shape"):
        logme(features, np.stack([labels, labels], 1))
    with pytest.raises(ValueError, match="features must have shape"):
        logme(tokens, target[:, :4])


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("n", [60, 400])
def test_numbers_above_the_diagonal_of_the_gram_matrix_do_not_matter(n, fit_intercept):
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


def test_ignored_labels_may_have_any_value():
    labels = torch.tensor([0, -7, 0, -7])
    rows = rows_of(torch.randn(4, 2), labels, num_outputs=1, ignore_index=-7)
    assert rows.target.tolist() == [0, 0]


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@PATHS
def test_value_of_a_perfect_fit_is_the_evidence_at_the_resolution(path, scale):
    rng = np.random.default_rng(0)
    n, d = 60, 6
    features = scale * rng.normal(size=(n, d))
    y = features @ rng.normal(size=d)
    result = path(features, y, "regression")
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    eigenvalues = singular**2
    t = d * np.finfo(float).eps * eigenvalues[0]
    fit = ((left.T @ y) ** 2 * t / (eigenvalues + t)).sum()
    expected = -n / 2 * (np.log(2 * np.pi * fit / n) + 1) - np.log1p(eigenvalues / t).sum() / 2
    assert result.saturated.all()
    assert float(result.per_output) == pytest.approx(expected / n, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_evidence_is_the_density_at_its_own_precisions_in_any_unit(scale):
    features, labels = problem(40, 7, 3)
    y = scale * (labels + np.random.default_rng(0).normal(size=40))
    result = evidence(features, y, "regression")
    density = log_density(features, y, math.log(result.alpha), math.log(result.beta))
    assert float(result.per_output) == pytest.approx(density / 40, rel=1e-9, abs=1e-9)


@PATHS
def test_precisions_of_a_perfect_fit_have_the_ratio_at_which_the_search_ends(path):
    rng = np.random.default_rng(0)
    features = 1e3 * rng.normal(size=(60, 6))
    result = path(features, features @ rng.normal(size=6), "regression")
    t = 6 * np.finfo(float).eps * float(result.spectrum[0])
    assert float(result.alpha / result.beta) == pytest.approx(t, rel=1e-6)


@PATHS
def test_largest_evidence_may_lie_beyond_a_valley(path):
    """From t = 0, where the features interpolate, the evidence falls first, and rises again."""
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
    assert valleys >= 5  # the cases that this test is about did occur


@PATHS
def test_shapes_are_the_same_without_evidence(path):
    with pytest.warns(UserWarning, match="only one class"):
        result = path(torch.randn(10, 20), torch.zeros(10, dtype=torch.long) + 2)
    assert result.weight.shape == (3, 20)
    for value in (result.per_output, result.null, result.alpha, result.beta, result.effective_dim, result.saturated):
        assert value.shape == (3,)
    assert len(result.spectrum) == 0


def collected(number):
    current = Pass(Scoring(num_outputs=3, curve=True))
    labels = Labels(Target.checked(torch.zeros(number, dtype=torch.long), "multiclass", 3), None)
    current.add({"": torch.randn(number, 4)}, labels, range(number))
    return current.results(torch.device("cpu"), alone=True)


def test_only_the_last_point_of_a_curve_says_what_is_missing():
    with pytest.warns(UserWarning, match="only one class is present in 128 samples") as caught:
        collected(128)
    assert len(caught) == 1


def test_error_in_the_evidence_is_named(monkeypatch):
    monkeypatch.setattr(Accumulator, "evidence", lambda *args: {}["on purpose"])
    with pytest.warns(UserWarning, match="after an error: KeyError: 'on purpose'"):
        assert collected(64) == {("", 0): None}
