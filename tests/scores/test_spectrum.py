"""The spectrum of rows and of moments: resolved directions, and digits lost to a mean far above the spread."""

import math
import re
import warnings

import numpy as np
import oracles
import pytest
import torch
from oracles import one_hot, problem
from streamed import metric_of, streamed

from lightning_logme.functional import evidence, logme


class TestMeanFarAboveSpread:
    """The digits of a Gram matrix are shared between the mean and the spread of the features."""

    def score(self, ratio, fit_intercept, path, n=1000, d=40):
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 4, n)
        centred = rng.normal(size=(4, d))[labels] * 0.3 + rng.normal(size=(n, d)) * np.logspace(0, -1, d)
        features, target = centred + ratio, one_hot(labels, 4)
        if fit_intercept:
            contrasts = oracles.without_mean(centred), oracles.without_mean(target)
        else:
            contrasts = features, target
        exact = np.mean([oracles.by_singular_values(contrasts[0], y) for y in contrasts[1].T])
        if path == "rows":
            return exact, float(logme(features, labels, fit_intercept=fit_intercept))
        return exact, float(streamed(features, labels, num_outputs=4, fit_intercept=fit_intercept, batch=50).score)

    @pytest.mark.parametrize("fit_intercept", [False, True])
    @pytest.mark.parametrize(("n", "d"), [(1000, 40), (60, 90), (200, 230)])
    @pytest.mark.parametrize(("ratio", "tolerance"), [(1, 1e-9), (10, 1e-9), (100, 1e-7), (1e3, 1e-6), (1e4, 1e-4)])
    def test_sums_lose_few_digits_up_to_ten_thousand_times_the_spread(self, n, d, ratio, tolerance, fit_intercept):
        """Errors are a few eps times ratio², and the smallest eigenvalues are 1/100 of the largest."""
        exact, score = self.score(ratio, fit_intercept, "moments", n, d)  # A warning would raise an error.
        assert score == pytest.approx(exact, abs=tolerance)

    @pytest.mark.parametrize("fit_intercept", [False, True])
    @pytest.mark.parametrize("ratio", [1, 1e2, 1e4, 1e6, 1e8])
    def test_rows_lose_no_digits(self, ratio, fit_intercept):
        """Rows are centred before they are multiplied."""
        exact, score = self.score(ratio, fit_intercept, "rows", n=60, d=90)
        assert score == pytest.approx(exact, abs=1e-7)

    @pytest.mark.slow
    @pytest.mark.parametrize("fit_intercept", [False, True])
    @pytest.mark.parametrize(("n", "d"), [(1000, 40), (60, 90), (200, 230)])
    @pytest.mark.parametrize("ratio", [10**power for power in (3, 4, 4.5, 5, 5.5, 6, 6.5, 7, 8, 9)])
    def test_wrong_scores_have_a_warning(self, n, d, ratio, fit_intercept):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exact, score = self.score(ratio, fit_intercept, "moments", n, d)
        messages = [str(warning.message) for warning in caught]
        assert all("LogME has lost digits" in message or "or constant" in message for message in messages)
        assert len(messages) < 2
        assert score < exact + 1e-3  # The error is never in favour of the features.
        assert messages or score > exact - 1e-3

    @pytest.mark.parametrize("fit_intercept", [False, True])
    def test_posterior_keeps_its_digits(self, fit_intercept):
        """The weights agree with ridge regression, solved as least squares so that no digits are lost."""
        features, labels = problem(300, 20, 3, noise=2.0)
        shifted = torch.as_tensor(features + 1e3)
        result = metric_of(shifted, torch.as_tensor(labels), num_classes=3, fit_intercept=fit_intercept)
        for k, y in enumerate(one_hot(labels, 3).T):
            t = float(result.alpha[k] / result.beta[k])
            x, y = (shifted.numpy(), y) if not fit_intercept else (features - features.mean(0), y - y.mean())
            stacked = np.vstack([x, math.sqrt(t) * np.eye(20)])
            expected = np.linalg.lstsq(stacked, np.concatenate([y, np.zeros(20)]), rcond=None)[0]
            np.testing.assert_allclose(result.weight[k], expected, rtol=1e-6, atol=1e-8)

    def test_warning_states_the_error_and_the_ratio(self):
        with pytest.warns(UserWarning, match="LogME has lost digits") as caught:
            self.score(2e5, False, "moments")
        said = re.search(
            r"wrong by (\S+) nats or more, because .* about (\S+) times their spread", str(caught[0].message)
        )
        assert float(said[1]) > 1e-3
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 4, 1000)
        centred = rng.normal(size=(4, 40))[labels] * 0.3 + rng.normal(size=(1000, 40)) * np.logspace(0, -1, 40)
        spread = math.sqrt(centred.var(0).sum())
        assert float(said[2]) == pytest.approx(2e5 * math.sqrt(40) / spread, rel=0.15)  # The message has one digit.

    @pytest.mark.parametrize("rank", [5, 60])
    def test_features_of_lower_rank_cause_no_warning(self, rank):
        """In the missing directions, only rounding errors are left."""
        rng = np.random.default_rng(0)
        features = rng.normal(size=(500, rank)) @ rng.normal(size=(rank, 90)) + 1e4 * rng.normal(size=90)
        metric_of(torch.as_tensor(features), torch.arange(500) % 3, num_classes=3)

    def test_features_of_an_untrained_network_are_scored_correctly(self):
        """Features of an untrained network have a mean far above their spread, which lies in few directions."""
        rng = np.random.default_rng(0)
        n, d, classes = 300, 256, 10
        labels = rng.integers(0, classes, n)
        latent = (rng.normal(size=(classes, d))[labels] + rng.normal(size=(n, d))) * np.arange(1, d + 1.0) ** -1.5
        rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
        features = np.float32(latent @ rotation + 30 * np.abs(rng.normal(size=d)))
        exact = np.mean([oracles.by_singular_values(features, y) for y in one_hot(labels, classes).T])
        result = metric_of(torch.as_tensor(features), torch.as_tensor(labels), num_classes=classes)
        assert float(result.score) == pytest.approx(exact, abs=1e-4)

    @pytest.mark.parametrize("fit_intercept", [False, True])
    @pytest.mark.parametrize("n", [2, 300, 5000])
    def test_constant_feature_is_no_direction_with_an_intercept(self, n, fit_intercept):
        features, labels = map(torch.as_tensor, problem(n, 3, 2))
        constant = torch.full((n, 1), 1 / 3, dtype=torch.float64)
        both = torch.hstack([features, constant])
        result = metric_of(both, labels, batch=7, num_classes=2, fit_intercept=fit_intercept)
        assert len(result.spectrum) == min(n - 1, 3) if fit_intercept else min(n, 4)
        if fit_intercept:
            expected = float(logme(features, labels, fit_intercept=True))
            assert float(result.score) == pytest.approx(expected, rel=1e-6)
            assert result.weight[:, 3].abs().max() == 0

    @pytest.mark.parametrize("path", ["rows", "moments"])
    def test_constant_features_with_an_intercept_have_no_gain_and_a_warning(self, path):
        features, labels = torch.full((40, 60), 1 / 3, dtype=torch.float64), torch.arange(40) % 2
        with pytest.warns(UserWarning, match="or constant, where an intercept is fitted"):
            result = (
                evidence(features, labels, fit_intercept=True)
                if path == "rows"
                else metric_of(features, labels, batch=7, num_classes=2, fit_intercept=True)
            )
        assert float(result.gain) == 0


@pytest.mark.parametrize("decay", [0, 0.5, 1])
@pytest.mark.parametrize("n", [40, 150, 250, 290])
def test_moments_of_few_rows_have_the_spectrum_of_the_rows(n, decay):
    """The Gram matrix has a lower rank than D."""
    rng = np.random.default_rng(n)
    features, labels = problem(n, 300, 5, seed=n, noise=2.0)
    features = (features * np.arange(1, 301.0) ** -decay) @ np.linalg.qr(rng.normal(size=(300, 300)))[0]
    rows, moments = evidence(features, labels), streamed(features, labels)
    assert len(rows.spectrum) == len(moments.spectrum) == n
    np.testing.assert_allclose(moments.spectrum, rows.spectrum, atol=1e-12 * float(rows.spectrum[0]))
    np.testing.assert_allclose(moments.per_output, rows.per_output, rtol=1e-8)


def test_duplicated_columns_change_nothing():
    features, labels = problem(40, 30, 4)
    wide = np.hstack([features] * 10 + [np.zeros((40, 50))]) / math.sqrt(10)
    assert float(streamed(wide, labels).score) == pytest.approx(float(logme(features, labels)), rel=1e-9)
    assert float(logme(wide, labels)) == pytest.approx(float(logme(features, labels)), rel=1e-9)


def test_evidence_is_deterministic_and_leaves_the_random_state_alone():
    features, labels = problem(50, 200, 4)
    before = torch.get_rng_state()
    first, second = streamed(features, labels), streamed(features, labels)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.score, second.score)


@pytest.mark.parametrize("seed", [67, *range(12)])
def test_moments_of_repeated_rows_and_features_of_many_sizes_equal_rows(seed):
    features = torch.randn(30, 40, generator=torch.Generator().manual_seed(seed))
    features[1] = features[0]
    features = features * 10 ** torch.linspace(0, 1.5, 40)
    labels = torch.arange(30) % 3
    torch.testing.assert_close(streamed(features, labels).score, logme(features, labels), rtol=1e-8, atol=0)
