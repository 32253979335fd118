"""The score agrees with independent oracles, and every edge case has a defined result."""

import math
import warnings
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import digits_features, one_hot, problem
from streamed import PATHS, rows_of, streamed

from lightning_logme import Evidence
from lightning_logme.features.labels import Target
from lightning_logme.functional import evidence, logme
from lightning_logme.scores.calibration import fit_temperature
from lightning_logme.scores.moments import Moments, Rows
from lightning_logme.scores.spectrum import Spectrum


@pytest.mark.parametrize(
    ("num_features", "rows", "scale", "expected"),
    [
        (None, 1797, 1, 0.2702776),
        (None, 1797, 1 / 16, 0.2702776),
        (256, 1797, 1, 0.6175636),
        (256, 1797, 1e-3, 0.6175636),
        (256, 1797, 1e3, 0.6175636),
        (1024, 1797, 1, 0.8459305),
        (1024, 500, 1, 0.7365210),
        (2048, 1797, 1, 0.9288831),
    ],
)
def test_scores_of_digits_are_the_recorded_ones(num_features, rows, scale, expected):
    if num_features is None:
        features, labels = oracles.load_digits(return_X_y=True)
    else:
        features, labels = digits_features(num_features)
    features = (features * scale).astype(features.dtype)[:rows]
    assert float(logme(features, labels[:rows])) == pytest.approx(expected, abs=1e-7)
    assert float(streamed(features, labels[:rows]).score) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("n", "d"), [(16, 3), (12, 6), (8, 20), (10, 10)])
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_brute_force_search_agrees(n, d, noise):
    features, labels = problem(n, d, 2, seed=n + d, noise=noise)
    target = one_hot(labels, 2)
    expected = [oracles.brute_force(features, y) for y in target.T]
    for result in (evidence(features, labels), streamed(features, labels)):
        if n <= d:  # The search cannot reach t = 0, where the evidence of an interpolation is largest.
            assert (result.per_output.numpy() >= np.array(expected) - 1e-8).all()
            np.testing.assert_allclose(result.per_output, expected, atol=2e-4)
        else:
            np.testing.assert_allclose(result.per_output, expected, rtol=1e-8)


@pytest.mark.parametrize(("scale", "tolerance"), [(None, 1e-10), (1e-4, 1e-9), (1.0, 1e-9), (1e4, 1e-9)])
def test_evidence_is_the_density_at_its_own_precisions(scale, tolerance):
    features, labels = problem(40, 7, 3)
    if scale is None:
        columns, result = one_hot(labels, 3).T, evidence(features, labels)
    else:  # a regression target in different units
        columns = scale * (labels + np.random.default_rng(0).normal(size=40))[None]
        result = evidence(features, columns[0], "regression")
    assert len(result.per_output) == len(columns)
    for k, y in enumerate(columns):
        density = oracles.log_density(features, y, math.log(result.alpha[k]), math.log(result.beta[k]))
        assert float(result.per_output[k]) == pytest.approx(density / 40, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("n", "d", "k"), [(300, 20, 3), (200, 50, 5), (1000, 5, 2)])
def test_bayesian_ridge_of_scikit_learn_agrees(n, d, k):
    features, labels = problem(n, d, k, noise=3.0)
    expected = [oracles.bayesian_ridge(features, y) for y in one_hot(labels, k).T]
    np.testing.assert_allclose(evidence(features, labels).per_output, expected, rtol=1e-8)


@pytest.mark.slow
def test_fixed_point_of_the_papers_is_close_and_never_higher():
    features, labels = digits_features(64)
    ours = evidence(features, labels).per_output.numpy()
    papers = np.array([oracles.papers_fixed_point(features.astype(float), y) for y in one_hot(labels, 10).T])
    assert (papers <= ours + 1e-12).all()
    np.testing.assert_allclose(papers, ours, atol=1e-4)


class TestIntercept:
    def test_intercept_gives_the_evidence_of_the_contrasts(self):
        features, labels = problem(14, 4, 2)
        contrasts = oracles.without_mean(features + 5), oracles.without_mean(one_hot(labels, 2))
        expected = [oracles.brute_force(contrasts[0], y) for y in contrasts[1].T]
        for result in (
            evidence(features + 5, labels, fit_intercept=True),
            streamed(features + 5, labels, fit_intercept=True),
        ):
            np.testing.assert_allclose(result.per_output, expected, rtol=1e-8)

    @pytest.mark.parametrize(("n", "d"), [(100, 8), (30, 60)])
    def test_shift_of_the_features_changes_nothing(self, n, d):
        features, labels = problem(n, d, 3)
        shifted = features + np.random.default_rng(1).normal(size=d) * 10
        for score in (
            lambda f: evidence(f, labels, fit_intercept=True).score,
            lambda f: streamed(f, labels, fit_intercept=True).score,
        ):
            assert float(score(features)) == pytest.approx(float(score(shifted)), rel=1e-8)

    def test_rows_and_moments_agree(self):
        features, labels = problem(30, 60, 3)
        rows, moments = evidence(features, labels, fit_intercept=True), streamed(features, labels, fit_intercept=True)
        np.testing.assert_allclose(rows.per_output, moments.per_output, rtol=1e-9)
        np.testing.assert_allclose(rows.weight, moments.weight, atol=1e-9)
        np.testing.assert_allclose(rows.bias, moments.bias, atol=1e-8)

    def test_constant_target_is_nan_with_a_warning(self):
        features, _ = problem(30, 4, 2)
        with pytest.warns(UserWarning, match="every target is constant in 30 samples"):
            assert math.isnan(logme(features, np.full(30, 0.1), "regression", fit_intercept=True))


class TestEnds:
    """Edge cases."""

    def test_useless_features_have_no_gain(self):
        # The feature is orthogonal to the target, so the best prior is infinitely narrow.
        features, y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([1.0, 1.0, 1.0, 1.0])
        for result in (evidence(features, y, "regression"), streamed(features, y, "regression")):
            assert float(result.per_output) == pytest.approx(-0.5 * (math.log(2 * math.pi) + 1), abs=1e-12)
            assert float(result.gain) == 0
            assert float(result.alpha) == math.inf
            assert result.weight.abs().max() == 0
            assert float(result.effective_dim) == 0

    def test_interpolation_has_a_finite_score(self):
        features, labels = problem(8, 20, 2, noise=0.1)
        for result in (evidence(features, labels), streamed(features, labels)):
            assert torch.isinf(result.beta[0])
            assert not result.saturated.any()
            y, alpha = one_hot(labels, 2)[:, 0], float(result.alpha[0])
            nearly = oracles.log_density(features, y, math.log(alpha), math.log(alpha / 1e-9)) / 8
            assert float(result.per_output[0]) == pytest.approx(nearly, abs=1e-8)
            np.testing.assert_allclose(features @ result.weight[0].numpy(), y, atol=1e-8)

    def test_absent_class_is_left_out(self):
        features, labels = problem(100, 6, 3)
        gap = np.where(labels == 2, 3, labels)
        whole, result = evidence(features, labels), evidence(features, gap, num_classes=5)
        np.testing.assert_allclose(result.per_output[[0, 1, 3]], whole.per_output, rtol=1e-12)
        assert result.per_output[[2, 4]].isnan().all()
        assert result.null[[2, 4]].isnan().all()
        assert result.weight[[2, 4]].abs().max() == 0
        assert float(result.score) == pytest.approx(float(whole.score), rel=1e-12)
        assert result.head()(torch.as_tensor(features).float()).shape == (100, 5)

    @PATHS
    def test_single_class_is_nan_with_a_warning(self, path):
        with pytest.warns(UserWarning, match="only one class is present in 10 samples"):
            result = path(torch.randn(10, 20), torch.full((10,), 2))
        assert math.isnan(result.score)
        assert math.isnan(result.gain)
        with pytest.raises(ValueError, match="no posterior"):
            result.head()
        assert result.weight.shape == (3, 20)
        fields = (result.per_output, result.null, result.alpha, result.beta, result.effective_dim, result.saturated)
        assert [tuple(value.shape) for value in fields] == [(3,)] * 6
        assert len(result.spectrum) == 0

    @PATHS
    def test_no_samples_are_nan_with_a_warning(self, path):
        with pytest.warns(UserWarning, match="no samples"):
            result = path(torch.randn(0, 20), torch.empty(0), "regression")
        assert math.isnan(result.score)
        assert result.num_samples == 0

    @pytest.mark.parametrize("shape", [(30, 4), (5, 20)])
    @PATHS
    def test_zero_features_have_no_gain_and_a_warning(self, path, shape):
        labels = torch.arange(shape[0]) % 2
        with pytest.warns(UserWarning, match="all zero"):
            result = path(torch.zeros(shape), labels)
        np.testing.assert_allclose(result.per_output, result.null)
        assert float(result.gain) == 0

    @pytest.mark.parametrize(("n", "d"), [(60, 5), (20, 40)])
    def test_ignored_rows_are_left_out(self, n, d):
        features, labels = problem(n, d, 3)
        marked = labels.copy()
        marked[::4] = -100
        features[0] = np.nan  # The numbers in an ignored row do not matter.
        kept = marked != -100
        expected = evidence(features[kept], labels[kept])
        for result in (evidence(features, marked, ignore_index=-100), streamed(features, marked, ignore_index=-100)):
            assert result.num_samples == kept.sum()
            np.testing.assert_allclose(result.per_output, expected.per_output, rtol=1e-9)

    def test_ignored_label_of_multilabel_drops_the_row(self):
        features, labels = problem(60, 5, 3)
        target = one_hot(labels, 3).astype(int)
        marked = target.copy()
        marked[::5, 1] = -1
        kept = (marked != -1).all(1)
        expected = evidence(features[kept], target[kept], "multilabel")
        for result in (
            evidence(features, marked, "multilabel", ignore_index=-1),
            streamed(features, marked, "multilabel", ignore_index=-1),
        ):
            np.testing.assert_allclose(result.per_output, expected.per_output, rtol=1e-9)

    def test_constant_target_is_scored_without_an_intercept(self):
        features, _ = problem(20, 3, 2)
        result = evidence(features, np.full(20, 2.0), "regression")
        assert float(result.score) == pytest.approx(oracles.brute_force(features, np.full(20, 2.0)), rel=1e-8)

    @pytest.mark.parametrize(
        ("changed", "columns", "value"),
        [("features", 1, math.inf), ("features", 1, math.nan), ("targets", 1, math.nan), ("targets", 3, math.nan)],
    )
    def test_nan_in_the_data_is_nan_with_a_warning(self, changed, columns, value):
        data = {"features": torch.randn(30, 4), "targets": torch.randn(30, columns)}
        data[changed][3, -1] = value
        with pytest.warns(UserWarning, match=f"{changed} contain NaN or Inf"):
            assert math.isnan(streamed(*data.values(), "regression").score)

    @pytest.mark.parametrize("decomposition", ["eigh", "svd"])
    @PATHS
    def test_decomposition_that_does_not_converge_is_nan_with_a_warning(self, path, decomposition, monkeypatch):
        def fail(*args, **options):
            raise torch.linalg.LinAlgError("failed to converge")

        monkeypatch.setattr(torch.linalg, decomposition, fail)
        features, labels = problem(20, 40, 2)
        with pytest.warns(UserWarning, match=r"LogME is NaN: .* \(failed to converge\)") as caught:
            result = path(features + 1e3, labels)  # A large mean needs both decompositions.
        assert math.isnan(result.score)
        assert result.weight.isnan().all()
        assert result.weight.shape == (2, 40)
        assert len(caught) == 1

    @PATHS
    def test_features_too_large_to_square_are_nan_with_a_warning(self, path):
        features, labels = problem(20, 40, 2)
        with pytest.warns(UserWarning, match="features contain NaN or Inf, or numbers too large to square"):
            assert math.isnan(path(features * 1e200, labels).score)

    @PATHS
    def test_sums_may_exceed_the_range_of_half_precision(self, path):
        features, labels = problem(100, 120, 2)
        half = torch.as_tensor(features + 2000).half()
        expected = float(path(half.double(), labels).score)
        assert float(path(half, labels).score) == pytest.approx(expected, rel=1e-6)

    def test_regression_target_of_zeros_is_left_out(self):
        features, _ = problem(20, 3, 2)
        y = np.random.default_rng(0).normal(size=(20, 2))
        y[:, 1] = 0
        result = evidence(features, y, "regression")
        assert float(result.score) == pytest.approx(float(logme(features, y[:, 0], "regression")), rel=1e-12)


class TestPosterior:
    @pytest.mark.parametrize(("n", "d"), [(80, 6), (20, 50)])
    @PATHS
    def test_weight_is_the_ridge_solution(self, n, d, path):
        features, labels = problem(n, d, 3, noise=4.0)
        result = path(features, labels)
        ratios = (result.alpha / result.beta).tolist()
        interior = [k for k, t in enumerate(ratios) if 0 < t < math.inf]
        assert interior
        for k in interior:
            t, y = ratios[k], one_hot(labels, 3)[:, k]
            expected = np.linalg.solve(features.T @ features + t * np.eye(d), features.T @ y)
            np.testing.assert_allclose(result.weight[k], expected, atol=1e-8)
            eigenvalues = np.linalg.eigvalsh(features.T @ features)
            assert float(result.effective_dim[k]) == pytest.approx((eigenvalues / (eigenvalues + t)).sum(), rel=1e-6)

    def test_head_with_intercept_does_not_depend_on_a_shift(self):
        features, labels = problem(200, 6, 3, noise=0.5)
        first = evidence(features, labels, fit_intercept=True).head(torch.float64)
        second = evidence(features + 3, labels, fit_intercept=True).head(torch.float64)
        x = torch.as_tensor(features)
        torch.testing.assert_close(first(x), second(x + 3), rtol=1e-6, atol=1e-8)
        assert (first(x).argmax(1).numpy() == labels).mean() > 0.95

    def test_head_is_a_linear_layer_ready_to_train(self):
        features, labels = problem(200, 6, 3, noise=0.5)
        head = evidence(features, labels).head()
        assert isinstance(head, torch.nn.Linear)
        assert (head.in_features, head.out_features, head.bias) == (6, 3, None)
        assert head.weight.dtype == torch.float32
        assert head.weight.requires_grad
        head(torch.as_tensor(features).float()).sum().backward()
        assert (head(torch.as_tensor(features).float()).argmax(1).numpy() == labels).mean() > 0.95

    @pytest.mark.parametrize("fit_intercept", [False, True])
    @pytest.mark.parametrize("n", [150, 6000])
    @torch.no_grad()
    def test_calibrated_head_is_as_sure_as_it_is_right(self, n, fit_intercept):
        """On new samples, the mean probability of the predicted class is the accuracy."""
        features, labels = problem(n + 20000, 12, 4, noise=3.0)
        head = evidence(features[:n], labels[:n], fit_intercept=fit_intercept).head(calibrated=True)
        probability = head(torch.as_tensor(features[n:]).float()).softmax(1)
        accuracy = float((probability.argmax(1).numpy() == labels[n:]).mean())
        assert accuracy < 0.9
        assert float(probability.amax(1).mean()) == pytest.approx(accuracy, abs=0.04)
        plain = evidence(features[:n], labels[:n], fit_intercept=fit_intercept).head()
        unsure = plain(torch.as_tensor(features[n:]).float()).softmax(1)
        assert float(unsure.amax(1).mean()) < accuracy - 0.1
        assert torch.equal(unsure.argmax(1), probability.argmax(1))

    @torch.no_grad()
    def test_calibrated_head_of_labels_is_as_sure_as_it_is_right(self):
        features, labels = problem(20300, 12, 4, noise=3.0)
        target = torch.as_tensor(one_hot(labels, 4))
        result = evidence(features[:300], target[:300].long(), "multilabel")
        x, y = torch.as_tensor(features[300:]).float(), target[300:] == 1
        probability = result.head(calibrated=True)(x).sigmoid()
        on = probability > 0.5
        confidence = torch.where(on, probability, 1 - probability)
        assert float(confidence.mean()) == pytest.approx(float((on == y).float().mean()), abs=0.04)
        assert torch.equal(on, result.head()(x) > 0.5)

    def test_calibrated_head_divides_by_the_temperature(self):
        features, labels = problem(200, 6, 3)
        result = evidence(features, labels)
        predictions = result.leave_one_out(torch.as_tensor(features), torch.as_tensor(labels))
        temperature = fit_temperature(predictions, torch.as_tensor(labels), "multiclass", ~result.per_output.isnan())
        head = result.head(torch.float64, calibrated=True)
        torch.testing.assert_close(head.weight.detach(), result.weight / temperature)
        torch.testing.assert_close(head.bias.detach(), torch.full_like(head.bias, -0.5 / temperature))
        given = replace(result, temperature=2.0).to("cpu").head(torch.float64, calibrated=True)
        torch.testing.assert_close(given.weight.detach(), result.weight / 2)

    def test_calibration_without_a_temperature_says_what_to_do(self):
        features, labels = problem(50, 6, 3)
        with pytest.raises(ValueError, match=r"no temperature, because it is of a regression .* use head\(\)"):
            evidence(features, features[:, :2], "regression").head(calibrated=True)
        with pytest.raises(ValueError, match="made without its samples"):
            streamed(features, labels).head(calibrated=True)

    def test_head_draws_no_random_numbers(self):
        features, labels = problem(50, 6, 3)
        state = torch.get_rng_state()
        evidence(features, labels).head(calibrated=True)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_features_of_any_precision_are_scored_in_double(dtype):
    features, labels = problem(100, 8, 3)
    features = torch.as_tensor(features).to(dtype)
    exact = evidence(features.double(), torch.as_tensor(labels))
    for result in (evidence(features, torch.as_tensor(labels)), streamed(features, labels)):
        assert result.score.dtype == torch.float64
        assert float(result.score) == pytest.approx(float(exact.score), rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda features, labels: Rows(features, labels),
        lambda features, labels: Target.checked(labels, "multiclass"),
        lambda features, labels: Moments.zeros(3, 2).accumulate(Rows(features, labels)),
        lambda features, labels: Spectrum.from_rows(Rows(features, labels), 2),
        evidence,
    ],
    ids=["rows", "target", "moments", "spectrum", "evidence"],
)
def test_objects_that_hold_tensors_compare_by_identity(make):
    """A comparison by fields would raise, because tensors of several numbers have no truth value."""
    features, labels = map(torch.as_tensor, problem(12, 3, 2))
    first, second = make(features, labels), make(features, labels)
    assert first == first
    assert first != second
    assert len({first, second}) == 2


shapes = st.tuples(st.integers(4, 40), st.integers(1, 30), st.integers(2, 4), st.integers(0, 10_000))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, scale=st.sampled_from([1e-6, 1e-2, 7.0, 1e5]), intercept=st.booleans())
def test_scale_rotation_order_and_zero_columns_change_nothing(shape, scale, intercept):
    n, d, k, seed = shape
    features, labels = problem(n, d, min(k, n), seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    expected = float(logme(features, labels, fit_intercept=intercept))
    for changed, target in (
        (features * scale, labels),
        (features @ rotation, labels),
        (features[order], labels[order]),
        (np.hstack([features, np.zeros((n, 3))]), labels),
        (np.hstack([features, features]), labels),
    ):
        assert float(logme(changed, target, fit_intercept=intercept)) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(shape=shapes)
def test_gain_is_never_negative_and_moments_agree_with_rows(shape):
    n, d, k, seed = shape
    features, labels = problem(n, d, min(k, n), seed, noise=3.0)
    rows, moments = evidence(features, labels), streamed(features, labels, batch=7)
    assert (rows.per_output >= rows.null).all()
    assert float(rows.gain) >= 0
    np.testing.assert_allclose(moments.per_output, rows.per_output, rtol=1e-6, atol=1e-7)


def test_permuted_labels_have_almost_no_gain():
    features, labels = problem(2000, 20, 4)
    shuffled = np.random.default_rng(0).permutation(labels)
    assert float(evidence(features, labels).gain) > 0.3
    # Without an intercept, the mean of the features still explains the share of each class.
    assert float(evidence(features, shuffled, fit_intercept=True).gain) < 0.005


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(st.integers(4, 12), st.integers(1, 3), st.integers(0, 10_000)))
def test_brute_force_search_agrees_on_random_regressions(shape):
    n, d, seed = shape
    rng = np.random.default_rng(seed)
    features, y = rng.normal(size=(n, d)), rng.normal(size=n)
    y = y + features.sum(1) * rng.uniform(0, 2)
    # Nelder-Mead may miss a narrow maximum, and a grid over α/β may miss a sharp one.
    expected = max(oracles.brute_force(features, y), oracles.by_singular_values(features, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = float(logme(features, y, "regression"))
    # Where the maximum is at t = 0 or ∞, the brute-force search stops at its boundary and falls a little short.
    assert score >= expected - 1e-8
    assert score == pytest.approx(expected, abs=1e-6)


def test_multilabel_works_with_a_single_label():
    features, labels = problem(40, 5, 2)
    column = labels[:, None]
    result = evidence(features, column, "multilabel", num_classes=1)
    np.testing.assert_allclose(result.per_output, evidence(features, labels).per_output[1:], rtol=1e-12)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize(("n", "d"), [(60, 5), (20, 40)])
@PATHS
def test_scale_of_the_target_shifts_the_score(path, n, d, scale, fit_intercept):
    """log p(c·y) = log p(y) − n log c, and the same directions are used."""
    features, labels = problem(n, d, 3, noise=3.0)
    y = np.stack([labels, labels == 1], 1) + np.random.default_rng(0).normal(size=(n, 2))
    options = {"num_outputs": 2} if path is streamed else {}
    plain = path(features, y, "regression", fit_intercept=fit_intercept, **options)
    scaled = path(features, y * scale, "regression", fit_intercept=fit_intercept, **options)
    np.testing.assert_allclose(scaled.per_output, plain.per_output - math.log(scale), rtol=1e-7)
    np.testing.assert_allclose(scaled.effective_dim, plain.effective_dim, rtol=1e-4)
    np.testing.assert_allclose(scaled.weight, plain.weight * scale, rtol=1e-4, atol=1e-7 * scale)
    assert torch.equal(scaled.saturated, plain.saturated)


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e-12, 1e12, 1e30, 1e140])
@pytest.mark.parametrize(("n", "d"), [(120, 8), (60, 5), (20, 40)])
@PATHS
def test_scale_of_the_features_changes_nothing(path, n, d, scale):
    features, labels = problem(n, d, 3, noise=3.0)
    plain, scaled = path(features, labels), path(features * scale, labels)
    np.testing.assert_allclose(scaled.per_output, plain.per_output, rtol=1e-9)
    np.testing.assert_allclose(scaled.spectrum, plain.spectrum * scale**2, rtol=1e-9)
    np.testing.assert_allclose(scaled.weight * scale, plain.weight, rtol=1e-5, atol=1e-9)


class TestPerfectFit:
    """Features with fewer directions than samples fit the target exactly."""

    def test_leaked_labels_are_flagged(self):
        features, labels = problem(60, 6, 3)
        leaked = np.hstack([features, one_hot(labels, 3)])
        result = evidence(leaked, labels)
        assert result.saturated.all()
        assert torch.isfinite(result.score)
        assert float(result.score) > 5  # far above the score of features without leaked labels
        assert not evidence(features, labels).saturated.any()

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("n", [300, 3000])
    @PATHS
    def test_many_rows_are_flagged(self, path, n, seed):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(n, 3))
        assert path(features, features @ rng.normal(size=3), "regression").saturated.all()

    @pytest.mark.parametrize("scale", [1e-3, 1e3])
    @PATHS
    def test_score_is_the_evidence_where_the_search_ends(self, path, scale):
        """The evidence has no maximum. The search ends at the resolution of float64."""
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
        assert float(result.alpha / result.beta) == pytest.approx(t, rel=1e-6)


def test_intercept_is_off_by_default():
    features, labels = map(torch.as_tensor, problem(30, 5, 3))
    rows = rows_of(features + 2, labels, num_outputs=3)
    moments = Moments.zeros(5, 3).accumulate(rows)
    expected = evidence(features + 2, labels)
    for result in (Evidence.from_moments(moments, "multiclass"), Evidence.from_rows(rows, 3, "multiclass")):
        torch.testing.assert_close(result.per_output, expected.per_output, rtol=1e-9, atol=0)
        assert result.bias is None


@pytest.mark.parametrize("d", [1, 2, 5])
@PATHS
def test_two_samples_with_an_intercept_have_one_contrast(path, d):
    rng = np.random.default_rng(d)
    features, y = rng.normal(size=(2, d)), rng.normal(size=2)
    expected = evidence(oracles.without_mean(features), oracles.without_mean(y[:, None]), "regression")
    result = path(features, y, "regression", fit_intercept=True)
    np.testing.assert_allclose(result.per_output, expected.per_output, rtol=1e-9)
    assert torch.isfinite(result.score)
