"""Features of any precision, layout and size get the right score from the function, the metric and the callback."""

import math
import warnings

import numpy as np
import oracles
import pytest
import torch
from models import CLASSES, Classifier, ConvNet, images, loader, penultimate, trainer, vectors
from oracles import one_hot, problem
from streamed import metric_of
from torch import nn

from lightning_logme import LogME, LogMECallback
from lightning_logme.functional import evidence, logme

F, Y = map(torch.as_tensor, problem(120, 8, 4, noise=2.0))


class TestHalfPrecision:
    """The largest float16 is 65504."""

    def features(self):
        features = F.clone()
        features[7:9] *= 1e5
        return features.half()

    def test_overflow_in_a_few_rows_is_counted_or_nan(self):
        bad = int(self.features().isinf().sum())
        assert 0 < bad < 16
        with pytest.raises(ValueError, match=f"features must be finite, but {bad} of 960 values are NaN or Inf"):
            logme(self.features(), Y)
        with pytest.warns(UserWarning, match="features contain NaN or Inf"):
            assert math.isnan(metric_of(self.features(), Y, num_classes=4).score)

    def test_overflow_while_training_is_nan_with_a_warning(self, tmp_path):
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
    def test_low_precision_is_summed_in_double(self, dtype):
        features = F.to(dtype)
        expected = evidence(features.double(), Y)
        for result in (evidence(features, Y), metric_of(features, Y, num_classes=4)):
            assert float(result.score) == pytest.approx(float(expected.score), rel=1e-12)


class TestLayouts:
    @pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state")
    @pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc])
    def test_sparse_tensors_are_scored(self, sparse):
        features, labels = torch.where(F > 0, F, 0.0), torch.as_tensor(one_hot(Y.numpy(), 4))
        expected = float(logme(features, labels, "multilabel"))
        assert float(logme(sparse(features), sparse(labels), "multilabel")) == pytest.approx(expected, rel=1e-12)
        metric = LogME("multilabel", 8, num_labels=4)
        metric.update(sparse(features), sparse(labels))
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)

    def test_tensors_of_any_strides_are_scored(self):
        expected = float(logme(F, Y))
        wide = torch.randn(240, 16, dtype=torch.float64)
        wide[::2, ::2] = F
        columns = F.T.contiguous().T
        for features in (wide[::2, ::2], columns):
            assert not features.is_contiguous()
            assert float(logme(features, Y)) == pytest.approx(expected, rel=1e-12)
            assert float(metric_of(features, Y, num_classes=4).score) == pytest.approx(expected, rel=1e-12)
        spread = torch.ones(1, 1).expand(120, 8)  # a single number in memory
        assert float(logme(spread, Y)) == pytest.approx(float(logme(spread.contiguous(), Y)), rel=1e-12)

    def test_channels_last_memory_is_scored(self, tmp_path):
        class Map(Classifier):
            """A network whose head is a convolution, so that the input of the head is a map."""

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
    def test_one_feature_is_enough(self, n, task):
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

    def test_one_output_is_enough_except_for_classes(self):
        features, labels = problem(50, 3, 2)
        expected = oracles.brute_force(features, labels.astype(float))
        for task in ("multilabel", "regression"):
            assert float(logme(features, labels[:, None], task)) == pytest.approx(expected, rel=1e-8)
        with pytest.warns(UserWarning, match="only one class is present in 50 samples"):
            assert math.isnan(logme(features, np.zeros(50, int), num_classes=1))

    def test_thousand_classes_are_scored(self):
        features, labels = problem(3000, 20, 1000, noise=0.3)
        result = metric_of(torch.as_tensor(features), torch.as_tensor(labels), num_classes=1000)
        np.testing.assert_allclose(result.per_output, evidence(features, labels).per_output, rtol=1e-9)
        for k in (0, 123, 999):
            expected = oracles.bayesian_ridge(features, one_hot(labels, 1000)[:, k])
            assert float(result.per_output[k]) == pytest.approx(expected, rel=1e-8)

    def test_absent_classes_do_not_count(self):
        """Three of a thousand classes are present."""
        features, labels = problem(60, 5, 3)
        result = evidence(features, np.array([3, 500, 998])[labels], num_classes=1000)
        assert int(result.per_output.isfinite().sum()) == 3
        assert float(result.score) == pytest.approx(float(logme(features, labels)), rel=1e-12)

    def test_one_sample_is_enough_for_regression_only(self):
        features, number = np.array([[0.5, -2.0]]), np.array([3.0])
        for result in (
            evidence(features, number, "regression"),
            metric_of(torch.as_tensor(features), torch.as_tensor(number), task="regression"),
        ):
            # One direction interpolates. The density of y is largest where its variance is y².
            assert float(result.score) == pytest.approx(-0.5 * (math.log(2 * math.pi * 9) + 1), abs=1e-12)
            assert float(result.gain) == pytest.approx(0, abs=1e-12)
        with pytest.warns(UserWarning, match="only one class is present in 1 samples"):
            assert math.isnan(logme(features, np.array([1])))
        with pytest.warns(UserWarning, match="an intercept needs at least two samples"):
            assert math.isnan(logme(features, number, "regression", fit_intercept=True))

    def test_million_samples_in_small_batches_are_summed_exactly(self):
        """The exact sums come from math.fsum (Shewchuk's algorithm)."""
        n, d = 1_000_000, 3
        features = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 3.0
        labels = (features[:, 0] > 3.5).long() + (features[:, 1] > 3.2).long()
        metric = LogME("multiclass", d, num_classes=3)
        for part, target in zip(features.split(250), labels.split(250), strict=True):
            metric.update(part, target)
        assert int(metric.count) == n
        exact = features.double().numpy()  # Products of two float32 numbers are exact in float64.
        of_class = [exact[labels.numpy() == k] for k in range(3)]
        sums = [[math.fsum(exact[:, i] * exact[:, j]) for j in range(d)] for i in range(d)]
        by_class = [[math.fsum(rows[:, j]) for j in range(d)] for rows in of_class]
        gram, cross = torch.tensor(sums, dtype=torch.float64), torch.tensor(by_class, dtype=torch.float64)
        torch.testing.assert_close(metric.gram.tril(), gram.tril(), rtol=1e-12, atol=0)
        torch.testing.assert_close(metric.cross, cross, rtol=1e-12, atol=0)
        assert metric.target_sum.tolist() == [len(rows) for rows in of_class]


class TestFarFromOne:
    @pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e-150])
    def test_features_too_small_to_square_have_no_gain_and_a_warning(self, scale):
        with pytest.warns(UserWarning, match="all zero or too small to square"):
            assert float(evidence(F * scale, Y).gain) == 0

    def test_numbers_too_large_to_square_are_nan_with_a_warning(self):
        with pytest.warns(UserWarning, match="NaN or Inf, or numbers too large to square"):
            assert math.isnan(logme(F * 1e200, Y))
        with pytest.warns(UserWarning, match="targets contain NaN or Inf, or numbers too large"):
            assert math.isnan(logme(F, F[:, 0] * 1e200, "regression"))

    def test_ordinary_features_cause_no_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for features in (F, F.relu(), F.relu() + 5, F.sigmoid(), vectors(50).tensors[0]):
                logme(features, Y[: len(features)])
