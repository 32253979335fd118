"""What numbers of all kinds and sizes do to the score."""

import math
import re
import warnings

import numpy as np
import oracles
import pytest
import torch
from models import CLASSES, Classifier, ConvNet, images, loader, penultimate, trainer, vectors
from oracles import one_hot, problem
from streamed import streamed
from torch import nn

from lightning_logme import LogME, LogMECallback
from lightning_logme.functional import evidence, logme

F, Y = map(torch.as_tensor, problem(120, 8, 4, noise=2.0))


def metric_of(features, target, batch=50, task="multiclass", **options):
    metric = LogME(task, features.shape[1], **options)
    for part, labels in zip(features.split(batch), target.split(batch), strict=True):
        metric.update(part, labels)
    return metric.evidence()


class TestHalfPrecision:
    """float16 ends at 65504."""

    def features(self):
        features = F.clone()
        features[7:9] *= 1e5
        return features.half()

    def test_overflow_in_a_few_rows(self):
        bad = int(self.features().isinf().sum())
        assert 0 < bad < 16
        with pytest.raises(ValueError, match=f"features must be finite, but {bad} of 960 values are NaN or Inf"):
            logme(self.features(), Y)
        with pytest.warns(UserWarning, match="features contain NaN or Inf"):
            assert math.isnan(metric_of(self.features(), Y, num_classes=4).score)

    def test_overflow_while_training(self, tmp_path):
        class Overflows(Classifier):
            def forward(self, x):
                features = self.model[:2](x)
                return self.model[2](
                    (features * 1e5).half().to(features.dtype) if self.trainer.validating else features
                )

        callback = LogMECallback()
        run = trainer(tmp_path, callback, max_epochs=2)
        with pytest.warns(UserWarning, match="features contain NaN or Inf"):
            run.fit(Overflows(), loader(), loader())
        assert [math.isnan(row["logme"]) for row in callback.history] == [True, True]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
    def test_is_summed_in_double(self, dtype):
        features = F.to(dtype)
        expected = evidence(features.double(), Y)
        for result in (evidence(features, Y), metric_of(features, Y, num_classes=4)):
            assert float(result.score) == pytest.approx(float(expected.score), rel=1e-12)


class TestLayouts:
    @pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state")
    @pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc])
    def test_sparse(self, sparse):
        features, labels = torch.where(F > 0, F, 0.0), torch.as_tensor(one_hot(Y.numpy(), 4))
        expected = float(logme(features, labels, "multilabel"))
        assert float(logme(sparse(features), sparse(labels), "multilabel")) == pytest.approx(expected, rel=1e-12)
        metric = LogME("multilabel", 8, num_labels=4)
        metric.update(sparse(features), sparse(labels))
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)

    def test_of_any_strides(self):
        expected = float(logme(F, Y))
        wide = torch.randn(240, 16, dtype=torch.float64)
        wide[::2, ::2] = F
        columns = F.T.contiguous().T
        for features in (wide[::2, ::2], columns):
            assert not features.is_contiguous()
            assert float(logme(features, Y)) == pytest.approx(expected, rel=1e-12)
            assert float(metric_of(features, Y, num_classes=4).score) == pytest.approx(expected, rel=1e-12)
        spread = torch.ones(1, 1).expand(120, 8)  # one number in memory
        assert float(logme(spread, Y)) == pytest.approx(float(logme(spread.contiguous(), Y)), rel=1e-12)

    def test_channels_last(self, tmp_path):
        class Map(Classifier):
            """The head is a convolution: its input is a map."""

            def forward(self, x):
                return self.model.head(self.model.features(x.to(memory_format=torch.channels_last))).mean((2, 3))

        model = ConvNet()
        model.head = nn.Conv2d(8, CLASSES, 1)
        data, callback = images(), LogMECallback("model.head", layers=["model.features"])
        module = Map(model.to(memory_format=torch.channels_last))
        trainer(tmp_path, callback).validate(module, loader(data), verbose=False)
        maps, labels = penultimate(module, "model.head", data)
        assert maps.is_contiguous(memory_format=torch.channels_last)
        expected = float(logme(maps.contiguous().mean((2, 3)), labels))
        assert [row["logme"] for row in callback.history] == pytest.approx([expected, expected], rel=1e-6)


class TestSizes:
    @pytest.mark.parametrize("n", [2, 3, 50])
    @pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
    def test_one_feature(self, n, task):
        features, labels = problem(n, 1, 2)
        columns = one_hot(labels, 2)
        target = labels if task == "multiclass" else columns
        expected = [oracles.brute_force(features, y) for y in columns.T]
        for result in (
            evidence(features, target, task),
            metric_of(
                torch.as_tensor(features),
                torch.as_tensor(target),
                task=task,
                num_classes=2,
                num_labels=2,
                num_outputs=2,
            ),
        ):
            np.testing.assert_allclose(result.per_output, expected, rtol=1e-7, atol=1e-7)

    def test_one_output(self):
        features, labels = problem(50, 3, 2)
        expected = oracles.brute_force(features, labels.astype(float))
        for task in ("multilabel", "regression"):
            assert float(logme(features, labels[:, None], task)) == pytest.approx(expected, rel=1e-8)
        with pytest.warns(UserWarning, match="only one class is present in 50 samples"):
            assert math.isnan(logme(features, np.zeros(50, int), num_classes=1))

    def test_a_thousand_classes(self):
        features, labels = problem(3000, 20, 1000, noise=0.3)
        result = metric_of(torch.as_tensor(features), torch.as_tensor(labels), num_classes=1000)
        np.testing.assert_allclose(result.per_output, evidence(features, labels).per_output, rtol=1e-9)
        for k in (0, 123, 999):
            expected = oracles.bayesian_ridge(features, one_hot(labels, 1000)[:, k])
            assert float(result.per_output[k]) == pytest.approx(expected, rel=1e-8)

    def test_labels_few_and_far_between(self):
        """Of a thousand classes three are there."""
        features, labels = problem(60, 5, 3)
        result = evidence(features, np.array([3, 500, 998])[labels], num_classes=1000)
        assert int(result.per_output.isfinite().sum()) == 3
        assert float(result.score) == pytest.approx(float(logme(features, labels)), rel=1e-12)

    def test_one_sample(self):
        features, number = np.array([[0.5, -2.0]]), np.array([3.0])
        for result in (
            evidence(features, number, "regression"),
            metric_of(torch.as_tensor(features), torch.as_tensor(number), task="regression"),
        ):
            # One direction interpolates: the density of y under any α is largest where its variance is y².
            assert float(result.score) == pytest.approx(-0.5 * (math.log(2 * math.pi * 9) + 1), abs=1e-12)
            assert float(result.gain) == pytest.approx(0, abs=1e-12)
        with pytest.warns(UserWarning, match="only one class is present in 1 samples"):
            assert math.isnan(logme(features, np.array([1])))
        with pytest.warns(UserWarning, match="an intercept needs at least two samples"):
            assert math.isnan(logme(features, number, "regression", fit_intercept=True))

    def test_a_million_samples_in_small_batches(self):
        """Against sums that are exact (Shewchuk's, in math.fsum)."""
        n, d = 1_000_000, 3
        features = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 3.0
        labels = (features[:, 0] > 3.5).long() + (features[:, 1] > 3.2).long()
        metric = LogME("multiclass", d, num_classes=3)
        for part, target in zip(features.split(250), labels.split(250), strict=True):
            metric.update(part, target)
        assert int(metric.count) == n
        exact = features.double().numpy()  # products of float32 are exact in float64
        of_class = [exact[labels.numpy() == k] for k in range(3)]
        sums = [[math.fsum(exact[:, i] * exact[:, j]) for j in range(d)] for i in range(d)]
        by_class = [[math.fsum(rows[:, j]) for j in range(d)] for rows in of_class]
        gram, cross = torch.tensor(sums, dtype=torch.float64), torch.tensor(by_class, dtype=torch.float64)
        torch.testing.assert_close(metric.gram.tril(), gram.tril(), rtol=1e-12, atol=0)
        torch.testing.assert_close(metric.cross, cross, rtol=1e-12, atol=0)
        assert metric.target_sum.tolist() == [len(rows) for rows in of_class]


class TestMeanFarAboveSpread:
    """A Gram matrix has as many digits for the mean and the spread of features together as either had alone."""

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
    def test_sums_are_enough(self, n, d, ratio, tolerance, fit_intercept):
        """Their errors are some eps of ratio², and the smallest directions hold 1/100 of the largest."""
        exact, score = self.score(ratio, fit_intercept, "moments", n, d)  # any warning would be an error
        assert score == pytest.approx(exact, abs=tolerance)

    @pytest.mark.parametrize("fit_intercept", [False, True])
    @pytest.mark.parametrize("ratio", [1, 1e2, 1e4, 1e6, 1e8])
    def test_rows_lose_nothing(self, ratio, fit_intercept):
        """They are centred before they are multiplied."""
        exact, score = self.score(ratio, fit_intercept, "rows", n=60, d=90)
        assert score == pytest.approx(exact, abs=1e-7)

    @pytest.mark.parametrize("fit_intercept", [False, True])
    @pytest.mark.parametrize(("n", "d"), [(1000, 40), (60, 90), (200, 230)])
    @pytest.mark.parametrize("ratio", [10**power for power in (3, 4, 4.5, 5, 5.5, 6, 6.5, 7, 8, 9)])
    def test_no_number_is_wrong_without_a_warning(self, n, d, ratio, fit_intercept):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exact, score = self.score(ratio, fit_intercept, "moments", n, d)
        messages = [str(warning.message) for warning in caught]
        assert all("LogME has lost digits" in message or "or constant" in message for message in messages)
        assert len(messages) < 2
        assert score < exact + 1e-3  # never flatters
        assert messages or score > exact - 1e-3

    @pytest.mark.parametrize("fit_intercept", [False, True])
    def test_the_posterior_keeps_its_digits_too(self, fit_intercept):
        """Against the ridge solution of the normal equations of an orthogonal system that no mean spoils."""
        features, labels = problem(300, 20, 3, noise=2.0)
        shifted = torch.as_tensor(features + 1e3)
        result = metric_of(shifted, torch.as_tensor(labels), num_classes=3, fit_intercept=fit_intercept)
        for k, y in enumerate(one_hot(labels, 3).T):
            t = float(result.alpha[k] / result.beta[k])
            x, y = (shifted.numpy(), y) if not fit_intercept else (features - features.mean(0), y - y.mean())
            stacked = np.vstack([x, math.sqrt(t) * np.eye(20)])  # ridge regression as least squares
            expected = np.linalg.lstsq(stacked, np.concatenate([y, np.zeros(20)]), rcond=None)[0]
            np.testing.assert_allclose(result.weight[k], expected, rtol=1e-6, atol=1e-8)

    def test_the_warning_says_how_much(self):
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
        assert float(said[2]) == pytest.approx(2e5 * math.sqrt(40) / spread, rel=0.15)  # one digit

    @pytest.mark.parametrize("rank", [5, 60])
    def test_features_of_lower_rank_are_no_reason_to_warn(self, rank):
        """What is left of their missing directions is rounding alone."""
        rng = np.random.default_rng(0)
        features = rng.normal(size=(500, rank)) @ rng.normal(size=(rank, 90)) + 1e4 * rng.normal(size=90)
        metric_of(torch.as_tensor(features), torch.arange(500) % 3, num_classes=3)

    def test_random_network(self):
        """Untrained networks have features whose mean is far above their spread, which is in few directions."""
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
    def test_a_constant_feature_is_no_direction_beside_an_intercept(self, n, fit_intercept):
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
    def test_nothing_but_constants_beside_an_intercept(self, path):
        features, labels = torch.full((40, 60), 1 / 3, dtype=torch.float64), torch.arange(40) % 2
        with pytest.warns(UserWarning, match="or constant, where an intercept is fitted"):
            result = (
                evidence(features, labels, fit_intercept=True)
                if path == "rows"
                else metric_of(features, labels, batch=7, num_classes=2, fit_intercept=True)
            )
        assert float(result.gain) == 0


class TestFarFromOne:
    @pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
    def test_scale_of_the_features_changes_nothing(self, scale):
        expected = evidence(F, Y)
        for result in (evidence(F * scale, Y), metric_of(F * scale, Y, num_classes=4)):
            np.testing.assert_allclose(result.per_output, expected.per_output, rtol=1e-9)

    @pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e-150])
    def test_too_small_to_square(self, scale):
        with pytest.warns(UserWarning, match="all zero or too small to square"):
            assert float(evidence(F * scale, Y).gain) == 0

    def test_too_large_to_square(self):
        with pytest.warns(UserWarning, match="NaN or Inf, or numbers too large to square"):
            assert math.isnan(logme(F * 1e200, Y))
        with pytest.warns(UserWarning, match="targets contain NaN or Inf, or numbers too large"):
            assert math.isnan(logme(F, F[:, 0] * 1e200, "regression"))

    def test_no_warning_for_honest_features(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for features in (F, F.relu(), F.relu() + 5, F.sigmoid(), vectors(50).tensors[0]):
                logme(features, Y[: len(features)])
